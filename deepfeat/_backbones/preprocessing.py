"""Preprocessing: what is done to an image before it enters a network, per image and per batch."""

import functools
import math
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms import Compose, InterpolationMode
from torchvision.transforms._presets import ImageClassification
from torchvision.transforms.functional import convert_image_dtype
from torchvision.transforms.v2 import functional as F

Resize: TypeAlias = Literal["weights", "squash", "pad"]
RGB: TypeAlias = NDArray[np.uint8]  # of shape (H, W, 3)
Fit: TypeAlias = Callable[[Tensor], Tensor]

_THIN = 8  # times as long as wide: beyond, most of what is enlarged would be cut off
_NATIVE = InterpolationMode.BILINEAR, InterpolationMode.BICUBIC
_REACH = 4  # pixels: one more than the widest filter, Lanczos, looks to each side when enlarging


@dataclass(frozen=True)
class Preprocessing:
    """What is done to an image before it enters a network.

    `prepare` turns RGB pixels into a tensor, image by image, in a worker thread; `prepare_whole`
    is the same without cropping, for images that are cropped already. `normalize` finishes a batch,
    on the device, as float32 of shape (n, C, H, W). `settings` identifies all of it; `description`
    tells other programs how to do the same, unless it is the user's own.
    """

    prepare: Callable[[RGB], Tensor] = field(repr=False)
    prepare_whole: Callable[[RGB], Tensor] = field(repr=False)
    normalize: Callable[[Tensor], Tensor] = field(repr=False)
    input_shape: tuple[int, ...]  # (C, H, W)
    settings: Any = field(repr=False)
    description: Mapping[str, Any] | None = field(default=None, repr=False)

    def __call__(self, image: Image.Image) -> Tensor:
        """Turn an RGB image into what the network takes, of shape (C, H, W)."""
        return self.normalize(self.prepare(np.array(image))[None])[0]


def preprocess_with(prepare: Callable[[Image.Image], Tensor]) -> Preprocessing:
    """Take a function of the user as the preprocessing, also of images that are cropped already."""
    if isinstance(prepare, Preprocessing):  # of a network that was fine-tuned
        return prepare
    sample = prepare(Image.new("RGB", (256, 256), "grey"))
    if not isinstance(sample, Tensor) or sample.ndim != 3 or not sample.is_floating_point():
        raise ValueError(
            "preprocessing must turn an RGB PIL image into a float tensor of shape (C, H, W); "
            f"got {_shape_words(sample)}."
        )
    prepare_pixels = functools.partial(_prepare_with, prepare)
    return Preprocessing(prepare_pixels, prepare_pixels, _as_float32, tuple(sample.shape), prepare)


def _prepare_with(prepare: Callable[[Image.Image], Tensor], pixels: RGB) -> Tensor:
    return prepare(Image.fromarray(pixels))


def _as_float32(batch: Tensor) -> Tensor:
    # Modules of the user may take maps to lie channel by channel, which permuted tensors do not.
    return batch.to(torch.float32, memory_format=torch.contiguous_format)


def _shape_words(sample: Any) -> str:
    if isinstance(sample, Tensor):
        return f"a tensor of {sample.dtype} and shape {tuple(sample.shape)}"
    return f"a {type(sample).__name__}"


def as_picture(prepared: Tensor) -> Image.Image:
    """Make a picture of a prepared image: as it is if 8-bit, else stretched to the full range.

    How a preprocessing of the user normalizes is unknown, so that it cannot be undone.
    """
    pixels = prepared.cpu().numpy()
    if prepared.is_floating_point():
        pixels = np.moveaxis(pixels - pixels.min(), 0, -1)
        pixels = (255 * pixels / max(pixels.max(), np.finfo(pixels.dtype).tiny)).round()
    pixels = pixels[..., 0] if pixels.shape[-1] != 3 else pixels
    return Image.fromarray(pixels.astype(np.uint8))


def preprocess_like(
    preset: ImageClassification, resize: Resize, image_size: int | None
) -> Preprocessing:
    """Split the preprocessing of torchvision's weights into a per-image and a per-batch part."""
    (crop_size,), (resize_size,) = set(preset.crop_size), set(preset.resize_size)
    size = image_size or crop_size
    short_side = round(resize_size * size / crop_size)
    fit = functools.partial(
        _resize_and_crop, size=size, short_side=short_side, interpolation=preset.interpolation
    )
    own = {"resize": "short side", "resize_size": short_side}
    settings = (resize, size, resize_size, crop_size, preset.mean, preset.std)
    how = [("antialias", preset.antialias), ("interpolation", preset.interpolation)]
    return _preprocess(
        *(resize, fit, own, (size, size), preset.interpolation, preset.mean, preset.std),
        settings=(*settings, how),
    )


def preprocess_like_timm(
    config: Mapping[str, Any], create_transform: Callable[..., Any], resize: Resize
) -> Preprocessing:
    """Split the preprocessing of timm's weights into a per-image and a per-batch part.

    `config` is what timm's `resolve_data_config` returns.
    """
    size = tuple(config["input_size"][1:])
    interpolation = InterpolationMode(config["interpolation"])
    resize_size = [math.floor(side / config["crop_pct"]) for side in size]
    own: dict[str, Any]
    fit: Fit
    if config["crop_mode"] == "center" and size[0] == size[1]:  # the same, also for thin images
        fit = functools.partial(
            _resize_and_crop,
            size=size[0],
            short_side=resize_size[0],
            interpolation=interpolation,
        )
        own = {"resize": "short side", "resize_size": resize_size[0]}
    elif config["crop_mode"] == "border" and config["crop_pct"] == 1:  # timm's fails on thin ones
        fill = tuple(round(255 * value) for value in config["mean"])
        fit = functools.partial(_pad, size=size, fill=fill, interpolation=interpolation)
        own = {"resize": "pad", "resize_size": list(size), "fill": list(fill)}
    else:
        # Without the last step, which makes a tensor.
        transform = Compose(create_transform(**config, normalize=False).transforms[:-1])
        fit = functools.partial(_fit_with, transform)
        kind = "stretch" if config["crop_mode"] == "squash" else f"timm's {config['crop_mode']}"
        own = {"resize": kind, "resize_size": resize_size}
    settings = ("timm", resize, sorted(config.items()))
    return _preprocess(
        *(resize, fit, own, size, interpolation, config["mean"], config["std"]), settings=settings
    )


def _preprocess(
    resize: Resize,
    fit: Fit,
    own: Mapping[str, Any],
    size: tuple[int, int],
    interpolation: InterpolationMode,
    mean: Sequence[float],
    std: Sequence[float],
    settings: Any,
) -> Preprocessing:
    """Make a preprocessing, of which `fit`, described by `own`, is what the weights ask for."""
    fill = tuple(round(255 * value) for value in mean)
    fits: dict[Resize, Fit] = {
        "weights": fit,
        "squash": functools.partial(_resize, size=size, interpolation=interpolation),
        "pad": functools.partial(_pad, size=size, fill=fill, interpolation=interpolation),
    }
    resizing: dict[Resize, Mapping[str, Any]] = {
        "weights": own,
        "squash": {"resize": "stretch", "resize_size": list(size)},
        "pad": {"resize": "pad", "resize_size": list(size), "fill": list(fill)},
    }
    description = {
        **resizing[resize],
        "crop_size": list(size),
        "interpolation": interpolation.value,
        "mean": list(mean),
        "std": list(std),
    }
    return Preprocessing(
        functools.partial(_prepare, fit=fits[resize]),
        functools.partial(_prepare, fit=fits["squash"]),
        functools.partial(_normalize, mean=list(mean), std=list(std)),
        (3, *size),
        repr(settings),
        description,
    )


def _prepare(pixels: RGB, fit: Fit) -> Tensor:
    """Fit an image to the input size, as 8-bit (H, W, C): a quarter of the bytes of floats."""
    # Copied by NumPy: torch would do it in threads of its own for each thread that prepares images,
    # after which OpenMP lets those of the network sleep between any two of its steps.
    fitted = fit(torch.from_numpy(np.ascontiguousarray(pixels)))
    return torch.from_numpy(np.ascontiguousarray(fitted.numpy()))


def _normalize(batch: Tensor, mean: list[float], std: list[float]) -> Tensor:
    """Turn 8-bit (n, H, W, C) into normalised float32 (n, C, H, W), channels last in memory."""
    floats = convert_image_dtype(batch.permute(0, 3, 1, 2))
    normalized: Tensor = F.normalize(floats, mean, std, inplace=True)
    return normalized


# Fitting: images of shape (H, W, C) ---------------------------------------------------------------


def _resize(image: Tensor, size: tuple[int, int], interpolation: InterpolationMode) -> Tensor:
    """Resize an image with torch's kernels for 8 bits, or with Pillow where it has none.

    They differ by a level of grey (bilinear) or two (bicubic), and by more where recent releases
    of Pillow resize columns first: for some images that are squashed or thin.
    """
    if interpolation in _NATIVE and _has_native_resize():
        resized: Tensor = F.resize(image.permute(2, 0, 1), list(size), interpolation)
        return resized.permute(1, 2, 0)
    resample = Image.Resampling[interpolation.name]
    return _fit_with(lambda picture: picture.resize(size[::-1], resample), image)


def _has_native_resize() -> bool:
    has_kernels = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") or (
        platform.machine() in ("aarch64", "arm64")
    )
    # Before, the bilinear one gave a fifth of the pixels another level than Pillow does.
    return has_kernels and torch.__version__ >= "2.9"


def _fit_with(transform: Callable[[Image.Image], Image.Image], image: Tensor) -> Tensor:
    """Fit an image with a function of pictures."""
    return torch.from_numpy(np.array(transform(Image.fromarray(image.numpy()))))


def _resize_and_crop(
    image: Tensor, size: int, short_side: int, interpolation: InterpolationMode
) -> Tensor:
    short, long = sorted(image.shape[:2])
    height, width = (int(short_side * side / short) for side in image.shape[:2])
    if short < short_side and long > _THIN * short:
        resample = Image.Resampling[interpolation.name]
        enlarge = functools.partial(
            _enlarge_centre, size=size, resized=(width, height), resample=resample
        )
        resized = _fit_with(enlarge, image)
    else:
        resized = _resize(image, (height, width), interpolation)
    # This pads what is smaller.
    cropped: Tensor = F.center_crop(resized.permute(2, 0, 1), [size, size])
    return cropped.permute(1, 2, 0)


def _enlarge_centre(
    image: Image.Image, size: int, resized: tuple[int, int], resample: Image.Resampling
) -> Image.Image:
    """Resize and crop with the same result, without enlarging the parts that are cut off."""
    width, height = (min(size, side) for side in resized)
    spans = [_find_centre(*sides, size) for sides in zip(image.size, resized, strict=True)]
    (left, right), (top, bottom) = spans
    # With the pixels beyond that the filter reads for the outermost ones.
    columns, rows = (
        (max(0, int(start) - _REACH), min(side, math.ceil(stop) + _REACH))
        for (start, stop), side in zip(spans, image.size, strict=True)
    )
    centre = image.crop((columns[0], rows[0], columns[1], rows[1]))
    # Rows first, as Pillow enlarges: it rounds and clips between the two.
    box = left - columns[0], 0, right - columns[0], centre.height
    wide = centre.resize((width, centre.height), resample, box)
    return wide.resize((width, height), resample, (0, top - rows[0], width, bottom - rows[0]))


def _find_centre(side: int, resized: int, size: int) -> tuple[float, float]:
    """Find the part of a side that resizing and cropping leave."""
    start = max(0, round((resized - size) / 2))
    return start * side / resized, min((start + size) * side / resized, side)


def _pad(
    image: Tensor, size: tuple[int, int], fill: tuple[int, ...], interpolation: InterpolationMode
) -> Tensor:
    """Fit the whole image in, and pad with the mean colour, which is zero once normalised."""
    scale = min(side / own for side, own in zip(size, image.shape[:2], strict=True))
    height, width = (max(1, round(side * scale)) for side in image.shape[:2])
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    canvas = torch.tensor(fill, dtype=torch.uint8).repeat(*size, 1)
    canvas[top : top + height, left : left + width] = _resize(image, (height, width), interpolation)
    return canvas
