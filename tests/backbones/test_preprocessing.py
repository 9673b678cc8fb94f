"""Tests of preprocessing: as the weights demand, against Pillow, however thin an image."""

import collections
import functools
import json
import os
import pickle
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image, ImageOps
from torch import nn
from torch.testing import assert_close
from torchvision import models
from torchvision.transforms import InterpolationMode, functional
from torchvision.transforms._presets import ImageClassification

from deepfeat._backbones import find, preprocessing
from deepfeat._backbones.find import find_backbone
from deepfeat._backbones.preprocessing import preprocess_like, preprocess_with

exactly = functools.partial(assert_close, rtol=0, atol=0)
BILINEAR, BICUBIC = InterpolationMode.BILINEAR, InterpolationMode.BICUBIC
NAME = "squeezenet1_1"
ALL_WEIGHTS = [
    (name, weights)
    for name in sorted(models.list_models(module=models))
    for weights in models.get_model_weights(name)
]


def as_tensor(image):
    """Turn an image into a small tensor, in double precision."""
    return torch.from_numpy(np.asarray(image.resize((48, 32)), dtype=np.float64)).permute(2, 0, 1)


def assert_about(found, expected, interpolation=BILINEAR):
    """Compare levels of grey with Pillow's: nearly all are the same, and the others next to it."""
    found, expected = (np.rint(np.asarray(levels, np.float64)) for levels in (found, expected))
    assert_allclose(found, expected, rtol=0, atol={BILINEAR: 1, BICUBIC: 2}[interpolation])
    assert (found != expected).mean() <= 0.03
    assert (abs(found - expected) > 1).mean() <= 0.001


def to_levels(normalized, preset):
    """Undo the normalisation of an image (C, H, W), which ends up as (H, W, C)."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (preset.mean, preset.std))
    levels = (normalized * std + mean) * 255
    assert_close(levels, levels.round(), rtol=0, atol=1e-3)
    return levels.permute(1, 2, 0)


SIZES = [(300, 1), (1, 300), (500, 7), (7, 500), (901, 100), (37, 800), (2, 17), (640, 480), (9, 9)]

# Named networks ---------------------------------------------------------------------------------


def presets():
    """Group all weights by what they do to an image."""
    groups = collections.defaultdict(list)
    for name, weights in ALL_WEIGHTS:
        groups[repr(weights.transforms())].append((name, weights))
    return groups


@pytest.fixture
def no_skeletons(monkeypatch):
    """Spare the skeletons, which take most of the time that finding takes."""
    monkeypatch.setattr(find, "make_skeleton", lambda *_: nn.Linear(1, 1000))


def test_there_are_115_weights_with_28_presets():
    """The law below goes through all classification weights of torchvision."""
    assert len(ALL_WEIGHTS) == 115
    assert len(presets()) == 28
    assert sum(map(len, presets().values())) == 115


@pytest.mark.usefixtures("no_skeletons")
@pytest.mark.parametrize("group", presets().values(), ids=lambda group: group[0][1])
def test_images_are_prepared_as_the_weights_demand(group, pictures, resizer):
    """Every pixel is what the weights' own transforms give with Pillow, for all 115 weights."""
    transforms = group[0][1].transforms()
    expected = {key: transforms(image) for key, image in pictures.items()}
    for name, weights in group:
        steps = find_backbone(name, weights).preprocessing
        for key, image in pictures.items():
            batch = steps.normalize(steps.prepare(np.array(image))[None])
            found, own = (to_levels(tensor, transforms) for tensor in (batch[0], expected[key]))
            if resizer == "Pillow":
                exactly(batch[0], expected[key])
            else:
                assert_about(found, own, transforms.interpolation)
            exactly(batch[0], steps(image))
            assert batch.dtype == torch.float32
            assert batch.shape[1:] == steps.input_shape
            assert batch.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("group", presets().values(), ids=lambda group: group[0][1])
def test_what_needs_no_resizing_is_prepared_bit_for_bit(group):
    """Cropping and normalising are those of the weights' own transforms."""
    transforms = group[0][1].transforms()
    (short,) = transforms.resize_size
    for width, height in ((short, short), (short + 37, short), (short, short + 36)):
        noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        steps = preprocess_like(transforms, "weights", None)
        prepared = steps.prepare(noise)
        expected = transforms(Image.fromarray(noise))
        assert_array_equal(prepared, to_levels(expected, transforms).round())
        exactly(steps.normalize(prepared[None])[0], expected)


def test_the_network_takes_what_is_prepared():
    """A vision transformer is built for the size of its weights' images."""
    for weights in models.ViT_B_16_Weights:
        backbone = find_backbone("vit_b_16", weights)
        side = weights.transforms().crop_size[0]
        assert backbone.preprocessing.input_shape == (3, side, side)
        assert backbone.skeleton.image_size == side


@pytest.mark.parametrize("name", ["portrait", "landscape", "tiny"])
def test_squash_brings_both_sides_to_the_input(name, pictures):
    """The whole image is resized as Pillow does it, whatever its proportions."""
    image = pictures[name]
    steps = find_backbone("resnet50", resize="squash").preprocessing
    expected = image.resize((224, 224), Image.Resampling.BILINEAR)
    assert_about(steps.prepare(np.array(image)), expected)
    assert_array_equal(steps.prepare(np.array(expected)), expected)


@pytest.mark.parametrize("name", ["portrait", "landscape", "tiny"])
def test_pad_keeps_the_proportions(name, pictures):
    """The whole image lies in the middle, and what is added is next to zero once normalised."""
    image = pictures[name]
    steps = find_backbone("resnet50", resize="pad").preprocessing
    # To the nearest pixel, as PIL's own function for this does it.
    inside = ImageOps.contain(image, (224, 224), Image.Resampling.BILINEAR)
    left, top = (224 - inside.width) // 2, (224 - inside.height) // 2
    prepared = steps.prepare(np.array(image))
    middle = slice(top, top + inside.height), slice(left, left + inside.width)
    assert_about(prepared[middle], inside)
    assert_array_equal(steps.prepare(np.array(inside))[middle], inside)

    normalized = steps.normalize(prepared[None])[0]
    outside = torch.ones(224, 224, dtype=torch.bool)
    outside[middle] = False
    assert outside.any()
    # The mean colour is rounded to whole steps of 1/255; the deviations are 0.22 and more.
    assert normalized[:, outside].abs().max() < 0.5 / 255 / 0.22


def test_an_extreme_image_keeps_a_pixel():
    """A line a thousand times as long as wide is still one pixel wide."""
    prepared = find_backbone("resnet50", resize="pad").preprocessing.prepare(
        np.zeros((2, 2000, 3), dtype=np.uint8)
    )
    mean = torch.tensor([round(255 * mean) for mean in (0.485, 0.456, 0.406)])
    assert (prepared != mean).any(-1).any(1).sum() == 1


@pytest.mark.parametrize("resize", ["weights", "squash", "pad"])
def test_image_size_replaces_the_size_of_the_weights(resize, pictures):
    """Images come at the size asked for; the crop takes the same part of the image."""
    steps = find_backbone("resnet50", resize=resize, image_size=112).preprocessing
    assert steps.input_shape == (3, 112, 112)
    image = pictures["landscape"]
    prepared = steps.prepare(np.array(image))
    assert prepared.shape == (112, 112, 3)
    if resize == "weights":
        transforms = models.ResNet50_Weights.DEFAULT.transforms(crop_size=112, resize_size=116)
        assert_about(prepared, to_levels(transforms(image), transforms))


def test_the_weights_decide_how_to_interpolate(pictures):
    """Where weights ask for bicubic or bilinear interpolation, squashing and padding follow."""
    asked = {weights.transforms().interpolation for _, weights in ALL_WEIGHTS}
    assert asked == {BILINEAR, BICUBIC}
    weights = models.EfficientNet_B0_Weights.DEFAULT
    assert weights.transforms().interpolation == BICUBIC
    image = pictures["portrait"]
    for resize in ("squash", "pad"):
        steps = find_backbone("efficientnet_b0", weights, resize=resize).preprocessing
        size = (224, 224) if resize == "squash" else (144, 224)
        left = (224 - size[0]) // 2
        found = steps.prepare(np.array(image))[:, left : left + size[0]]
        assert_about(found, image.resize(size, Image.Resampling.BICUBIC), BICUBIC)


@pytest.mark.parametrize("resize", ["weights", "squash", "pad"])
def test_what_is_cropped_already_is_squashed(resize, pictures):
    """Nothing is cut off a second time, whatever `resize` does to other images."""
    steps = find_backbone("resnet50", resize=resize, image_size=112).preprocessing
    squash = find_backbone("resnet50", resize="squash", image_size=112).preprocessing
    for image in pictures.values():
        exactly(steps.prepare_whole(np.array(image)), squash.prepare(np.array(image)))


def test_preprocessing_of_the_user_replaces_the_weights_own(
    pictures,
):
    """A function of the user decides on size and scale; the network gets float32 of it."""
    steps = find_backbone(NAME, None, preprocessing=as_tensor).preprocessing
    assert steps.settings is as_tensor
    assert steps.input_shape == (3, 32, 48)
    for image in pictures.values():
        for prepare in (steps.prepare, steps.prepare_whole):
            prepared = prepare(np.array(image))
            exactly(prepared, as_tensor(image))
            exactly(steps.normalize(prepared[None]), as_tensor(image)[None].float())


def paint(image):
    """Paint over an image."""
    assert image.mode == "RGB"
    image.paste("red", (0, 0, *image.size))
    return functional.to_tensor(image)


@pytest.mark.parametrize("resize", ["weights", "squash", "pad", None])
def test_preparing_does_not_change_the_pixels(resize):
    """They may be the user's own, also where nothing has to be resized, or a function paints."""
    given = {"image_size": 32, "resize": resize} if resize else {"preprocessing": paint}
    steps = find_backbone(NAME, None, **given).preprocessing
    for height, width in ((32, 32), (37, 37), (50, 60)):
        pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        before = pixels.copy()
        for prepare in (steps.prepare, steps.prepare_whole):
            steps.normalize(prepare(pixels)[None]).zero_()
        assert_array_equal(pixels, before)


# Whoever resizes --------------------------------------------------------------------------------

# How many values differ from what Pillow makes of the same noise.
COUNT_DIFFERENCES = """
import numpy as np
from PIL import Image
from torchvision.transforms import InterpolationMode, functional
from torchvision.transforms._presets import ImageClassification

from deepfeat._backbones.preprocessing import preprocess_like

count = 0
for size in [(640, 480), (97, 151), (5, 3), (37, 37), (150, 20)]:
    noise = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    for mode in (InterpolationMode.BILINEAR, InterpolationMode.BICUBIC):
        preset = ImageClassification(crop_size=32, resize_size=37, interpolation=mode)
        squashed = image.resize((32, 32), Image.Resampling[mode.name])
        cropped = functional.center_crop(functional.resize(image, [37], mode), [32, 32])
        for resize, expected in {"squash": squashed, "weights": cropped}.items():
            found = preprocess_like(preset, resize, None).prepare(noise).numpy()
            count += (found != np.asarray(expected)).sum()
print(count)
"""


@pytest.mark.parametrize("capability", ["default", None])
def test_pillow_resizes_where_torch_has_no_kernels_for_it(capability):
    """Bit for bit, on a processor without AVX2; one with it comes to levels next to those."""
    if capability is None and not preprocessing._has_native_resize():
        pytest.skip("a processor without AVX2, or torch before 2.9")
    if capability == "default" and platform.machine() in ("aarch64", "arm64"):
        pytest.skip("a processor on which torch always has kernels")
    given = {} if capability is None else {"ATEN_CPU_CAPABILITY": capability}
    command = [sys.executable, "-c", COUNT_DIFFERENCES]
    root = Path(__file__).parents[2]
    run = subprocess.run(command, cwd=root, env=os.environ | given, check=True, capture_output=True)
    assert (int(run.stdout) > 0) == (capability is None)


# Sides of any proportion ------------------------------------------------------------------------


def make_noise(size):
    return np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)


def fit(pixels, resize, interpolation=BILINEAR, crop=32, short_side=37):
    preset = ImageClassification(
        crop_size=crop, resize_size=short_side, interpolation=interpolation
    )
    return preprocess_like(preset, resize, None).prepare(pixels).numpy()


@pytest.mark.parametrize("mode", [BILINEAR, BICUBIC])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_images_of_any_sides_are_resized_and_cropped_as_by_torchvision(size, mode):
    """To one level of grey, where what will be cut off is not enlarged before."""
    noise = make_noise(size)
    resized = functional.resize(Image.fromarray(noise), [37], mode)
    for crop in (32, 64):  # the second is larger than the short side, and padded
        expected = functional.center_crop(resized, [crop, crop])
        found = fit(noise, "weights", mode, crop)
        assert_allclose(found.astype(int), np.asarray(expected).astype(int), rtol=0, atol=1)


@pytest.mark.parametrize("mode", [BILINEAR, BICUBIC])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_images_of_any_sides_are_squashed_as_by_pillow(size, mode):
    """First along the rows: releases of Pillow differ in the order, which bicubic depends on."""
    noise = make_noise(size)
    resample = Image.Resampling[mode.name]
    expected = Image.fromarray(noise).resize((32, size[1]), resample).resize((32, 32), resample)
    assert_about(fit(noise, "squash", mode), expected, mode)


@pytest.mark.parametrize("size", [(4_000_000, 1), (1, 4_000_000)], ids=str)
@pytest.mark.parametrize("resize", ["weights", "squash", "pad"])
def test_a_thin_image_takes_no_more_memory_than_its_pixels(size, resize):
    """As high as the input, this line would be 118 million pixels wide."""
    found = fit(np.full((*size[::-1], 3), (255, 0, 0), dtype=np.uint8), resize)
    assert found.shape == (32, 32, 3)
    assert_array_equal(found[15, 15], (255, 0, 0))


# Descriptions -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_skeletons", "pillow_resizes")
@pytest.mark.parametrize("image_size", [None, 112])
@pytest.mark.parametrize("resize", ["weights", "squash", "pad"])
@pytest.mark.parametrize("group", presets().values(), ids=lambda group: group[0][1])
def test_a_description_is_enough_to_prepare_images(
    group, resize, image_size, pictures, prepare_as_described
):
    """A program with Pillow and NumPy that reads it comes to the same pixels and numbers."""
    name, weights = group[0]
    steps = find_backbone(name, weights, resize=resize, image_size=image_size).preprocessing
    described = json.loads(json.dumps(steps.description))
    for image in (pictures["landscape"], pictures["portrait"]):
        pixels = prepare_as_described(image, described)
        assert_array_equal(pixels, steps.prepare(np.array(image)))
    mean, std = (np.array(described[key], dtype=np.float32) for key in ("mean", "std"))
    normalized = (pixels.astype(np.float32) / 255 - mean) / std
    assert_allclose(steps(image).permute(1, 2, 0), normalized, rtol=1e-5, atol=1e-5)


def test_a_description_has_the_same_entries_for_all():
    """A short side is a number, other sizes have two sides; what is padded has a fill."""
    entries = {"resize", "resize_size", "crop_size", "interpolation", "mean", "std"}
    for resize, extra, size in (
        ("weights", set(), 232),
        ("squash", set(), [224, 224]),
        ("pad", {"fill"}, [224, 224]),
    ):
        described = find_backbone("resnet50", resize=resize).preprocessing.description
        assert described.keys() == entries | extra
        assert described["resize_size"] == size
        assert described["crop_size"] == [224, 224]


def test_preprocessing_of_the_user_is_not_described():
    """It may be anything."""
    assert find_backbone(NAME, None, preprocessing=as_tensor).preprocessing.description is None


def test_preprocessing_of_a_network_may_be_given_to_another(pictures):
    """It stays what it is: 8-bit until a batch is normalised, and described."""
    steps = find_backbone("resnet50", resize="pad", image_size=48).preprocessing
    other = find_backbone(NAME, None, preprocessing=steps).preprocessing
    assert other is steps
    assert preprocess_with(steps) is steps
    assert other.prepare(np.array(pictures["portrait"])).dtype == torch.uint8


# Pickles ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("resize", ["weights", "squash", "pad"])
def test_the_preprocessing_of_a_named_network_can_be_pickled(resize):
    """A trained classifier holds it, and may be loaded by another process."""
    steps = find_backbone(NAME, resize=resize, image_size=32).preprocessing
    copy = pickle.loads(pickle.dumps(steps))
    image = Image.effect_noise((50, 40), 80).convert("RGB")
    exactly(copy(image), steps(image))
    assert copy.settings == steps.settings
