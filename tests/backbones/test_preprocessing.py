"""Tests of how an image is fitted to a network's input: against torchvision, however thin it is."""

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image
from torchvision.transforms import InterpolationMode, functional
from torchvision.transforms._presets import ImageClassification

from deepfeat._backbones.preprocessing import preprocess_like

SIZES = [(300, 1), (1, 300), (500, 7), (7, 500), (901, 100), (37, 800), (2, 17), (640, 480), (9, 9)]


def fit(image, resize, interpolation=InterpolationMode.BILINEAR):
    preset = ImageClassification(crop_size=32, resize_size=37, interpolation=interpolation)
    return preprocess_like(preset, resize, None).prepare(image).numpy()


@pytest.mark.parametrize("mode", [InterpolationMode.BILINEAR, InterpolationMode.BICUBIC])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_images_of_any_sides_are_resized_and_cropped_as_by_torchvision(size, mode):
    """To one level of grey, where what will be cut off is not enlarged before."""
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    expected = functional.center_crop(functional.resize(image, [37], mode), [32, 32])
    found = fit(image, "weights", mode)
    assert_allclose(found.astype(int), np.asarray(expected).astype(int), rtol=0, atol=1)


@pytest.mark.parametrize("size", [(4_000_000, 1), (1, 4_000_000)], ids=str)
@pytest.mark.parametrize("resize", ["weights", "squash", "pad"])
def test_a_thin_image_takes_no_more_memory_than_its_pixels(size, resize):
    """As high as the input, this line would be 118 million pixels wide."""
    image = Image.new("RGB", size, "red")
    found = fit(image, resize)
    assert found.shape == (32, 32, 3)
    assert_array_equal(found[15, 15], (255, 0, 0))
