"""JPEGs that take as long to decode as photographs."""

from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (300, 250)  # width and height in pixels


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
