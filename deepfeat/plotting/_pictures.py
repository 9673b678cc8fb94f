"""Pictures of images, whatever they are given as."""

from collections.abc import Iterable
from typing import Any

from PIL import Image

from .._images.records import as_records


def open_pictures(
    images: Any,
    indices: Iterable[int] | None = None,
    *,
    side: int | None = None,
    name: str = "X",
    image_shape: tuple[int, ...] | None = None,
) -> list[Image.Image]:
    """Open images, or those with some indices, as RGB; the longer side is at most `side` pixels.

    Errors call them `name`.
    """
    records = as_records(images, image_shape, input_name=name)
    pictures = []
    for index in range(len(records)) if indices is None else indices:
        picture = Image.fromarray(records[index].open())
        if side is not None:
            picture.thumbnail((side, side))
        pictures.append(picture)
    return pictures
