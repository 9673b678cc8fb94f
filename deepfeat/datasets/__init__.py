"""Datasets: images in one folder per class, and the 15-Scene dataset."""

from ._folders import load_image_folder
from ._samples import write_sample_folder
from ._scene15 import fetch_scene15, load_scene15

__all__ = ["fetch_scene15", "load_image_folder", "load_scene15", "write_sample_folder"]
