"""Inputs of the displays, and figures that are closed after each test."""

import matplotlib
import numpy as np
import pytest
from matplotlib import pyplot as plt
from PIL import Image
from sklearn.datasets import load_digits

matplotlib.use("Agg")


@pytest.fixture(autouse=True)
def no_figure_is_left_open():
    """Close the figures of a test: matplotlib warns about many, and warnings are errors."""
    yield
    plt.close("all")


@pytest.fixture
def photograph():
    """A wide picture with different content in each corner."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((90, 60), Image.Resampling.BILINEAR)


@pytest.fixture(scope="session")
def digits():
    data = load_digits()
    return data.images[:100] / 16, np.array([f"digit {target}" for target in data.target[:100]])
