"""JPEGs that take as long to decode as photographs."""

import io
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (300, 250)  # width and height in pixels
PHOTOGRAPH = (4000, 3000)


def write_pictures(folder: Path, count: int) -> list[str]:
    """Write `count` JPEGs, every other one grey, and return their paths."""
    rng = np.random.default_rng(0)
    paths = []
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (25, 30, 3), dtype=np.uint8))
        image = coarse.resize(SIZE, Image.Resampling.BICUBIC)
        paths.append(str(folder / f"{number:05}.jpg"))
        (image.convert("L") if number % 2 else image).save(paths[-1], quality=90)
    return paths


def write_photographs(folder: Path, count: int) -> list[str]:
    """Write `count` JPEGs of 12 megapixels, with the detail of a camera's, and return their paths.

    They are a few images under different names.
    """
    rng = np.random.default_rng(0)
    encoded = []
    for _ in range(min(count, 4)):
        coarse = rng.integers(0, 256, (75, 100, 3), dtype=np.uint8)
        smooth = Image.fromarray(coarse).resize(PHOTOGRAPH, Image.Resampling.BICUBIC)
        noise = rng.normal(0, 9, (*PHOTOGRAPH[::-1], 1))
        file = io.BytesIO()
        pixels = np.clip(np.asarray(smooth) + noise, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(file, "JPEG", quality=92)
        encoded.append(file.getvalue())
    paths = [folder / f"photograph{number:05}.jpg" for number in range(count)]
    for number, path in enumerate(paths):
        path.write_bytes(encoded[number % len(encoded)])
    return list(map(str, paths))
