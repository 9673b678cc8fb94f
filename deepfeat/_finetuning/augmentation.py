"""Augmentation of training images: random flips and crops."""

import math
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .._images.decoding import RGB

Augment: TypeAlias = Literal["flip", "crop"] | Callable[[Image.Image], Image.Image] | None

_CROP_AREA = 0.08, 1.0  # as shares of the image's area
_CROP_RATIO = 3 / 4, 4 / 3  # width to height
_CROP_TRIES = 10


def count_views(augment: Augment) -> int | None:
    """Count the views of an image that training can see; None if unlimited."""
    return {None: 1, "flip": 2}.get(augment) if not callable(augment) else None


def draw_flips(augment: Augment, seed: int, epoch: int | None, count: int) -> NDArray[np.bool_]:
    """Draw which images are mirrored in an epoch; none if `epoch` is None."""
    if epoch is None or augment not in ("flip", "crop"):
        return np.zeros(count, dtype=bool)
    return np.random.default_rng([seed, epoch]).random(count) < 0.5


def mirror(pixels: RGB) -> RGB:
    """Mirror an image from left to right."""
    return np.ascontiguousarray(pixels[:, ::-1])


def augment_image(pixels: RGB, augment: Augment, seed: Sequence[int]) -> tuple[RGB, bool]:
    """Augment an image that has been flipped already; return it, and whether it was cropped."""
    if callable(augment):
        image = augment(Image.fromarray(pixels))
        if not isinstance(image, Image.Image):
            raise TypeError(
                f"augment must return a PIL image; got a {type(image).__name__}. Leave "
                "normalisation and conversion to a tensor to the preprocessing."
            )
        return np.array(image.convert("RGB")), False
    if augment == "crop":
        return crop_at_random(pixels, np.random.default_rng(seed)), True
    return pixels, False


def crop_at_random(pixels: RGB, rng: np.random.Generator) -> RGB:
    """Crop an image to 8 to 100 % of its area, with an aspect ratio between 3:4 and 4:3.

    Area and aspect ratio are drawn as in Szegedy et al. (2015), "Going Deeper with Convolutions".
    If no such crop fits into the image after ten tries, the whole image is returned.
    """
    height, width = pixels.shape[:2]
    for _ in range(_CROP_TRIES):
        area = width * height * rng.uniform(*_CROP_AREA)
        ratio = math.exp(rng.uniform(math.log(_CROP_RATIO[0]), math.log(_CROP_RATIO[1])))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left = int(rng.integers(width - w, endpoint=True))
            top = int(rng.integers(height - h, endpoint=True))
            return pixels[top : top + h, left : left + w]
    return pixels
