"""Tests of preprocessing: as the weights demand, against torchvision, however thin an image."""

import collections
import functools
import pickle

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

from deepfeat._backbones import find
from deepfeat._backbones.find import find_backbone
from deepfeat._backbones.preprocessing import preprocess_like

exactly = functools.partial(assert_close, rtol=0, atol=0)
NAME = "squeezenet1_1"
ALL_WEIGHTS = [
    (name, weights)
    for name in sorted(models.list_models(module=models))
    for weights in models.get_model_weights(name)
]


def as_tensor(image):
    """Turn an image into a small tensor, in double precision."""
    return torch.from_numpy(np.asarray(image.resize((48, 32)), dtype=np.float64)).permute(2, 0, 1)


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
def test_images_are_prepared_as_the_weights_demand(group, pictures):
    """Every pixel is bit for bit what the weights' own transforms give, for all 115 weights."""
    transforms = group[0][1].transforms()
    expected = {key: transforms(image) for key, image in pictures.items()}
    for name, weights in group:
        steps = find_backbone(name, weights).preprocessing
        for key, image in pictures.items():
            batch = steps.normalize(steps.prepare(image)[None])
            exactly(batch[0], expected[key])
            assert batch.shape[1:] == steps.input_shape
            assert batch.is_contiguous(memory_format=torch.channels_last)


def test_the_network_takes_what_is_prepared():
    """A vision transformer is built for the size of its weights' images."""
    for weights in models.ViT_B_16_Weights:
        backbone = find_backbone("vit_b_16", weights)
        side = weights.transforms().crop_size[0]
        assert backbone.preprocessing.input_shape == (3, side, side)
        assert backbone.skeleton.image_size == side


@pytest.mark.parametrize("name", ["portrait", "landscape", "tiny"])
def test_squash_brings_both_sides_to_the_input(name, pictures):
    """The whole image is resized as PIL does it, whatever its proportions."""
    image = pictures[name]
    steps = find_backbone("resnet50", resize="squash").preprocessing
    expected = image.resize((224, 224), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(steps.prepare(image), np.asarray(expected))


@pytest.mark.parametrize("name", ["portrait", "landscape", "tiny"])
def test_pad_keeps_the_proportions(name, pictures):
    """The whole image lies in the middle, and what is added is next to zero once normalised."""
    image = pictures[name]
    steps = find_backbone("resnet50", resize="pad").preprocessing
    # To the nearest pixel, as PIL's own function for this does it.
    inside = ImageOps.contain(image, (224, 224), Image.Resampling.BILINEAR)
    left, top = (224 - inside.width) // 2, (224 - inside.height) // 2
    prepared = steps.prepare(image)
    middle = slice(top, top + inside.height), slice(left, left + inside.width)
    np.testing.assert_array_equal(prepared[middle], np.asarray(inside))

    normalized = steps.normalize(prepared[None])[0]
    outside = torch.ones(224, 224, dtype=torch.bool)
    outside[middle] = False
    assert outside.any()
    # The mean colour is rounded to whole steps of 1/255; the deviations are 0.22 and more.
    assert normalized[:, outside].abs().max() < 0.5 / 255 / 0.22


def test_an_extreme_image_keeps_a_pixel():
    """A line a thousand times as long as wide is still one pixel wide."""
    prepared = find_backbone("resnet50", resize="pad").preprocessing.prepare(
        Image.new("RGB", (2000, 2))
    )
    mean = torch.tensor([round(255 * mean) for mean in (0.485, 0.456, 0.406)])
    assert (prepared != mean).any(-1).any(1).sum() == 1


@pytest.mark.parametrize("resize", ["weights", "squash", "pad"])
def test_image_size_replaces_the_size_of_the_weights(resize, pictures):
    """Images come at the size asked for; the crop takes the same part of the image."""
    steps = find_backbone("resnet50", resize=resize, image_size=112).preprocessing
    assert steps.input_shape == (3, 112, 112)
    image = pictures["landscape"]
    prepared = steps.prepare(image)
    assert prepared.shape == (112, 112, 3)
    if resize == "weights":
        transforms = models.ResNet50_Weights.DEFAULT.transforms(crop_size=112, resize_size=116)
        exactly(steps.normalize(prepared[None])[0], transforms(image))


def test_the_weights_decide_how_to_interpolate(pictures):
    """Where weights ask for bicubic or bilinear interpolation, squashing and padding follow."""
    asked = {weights.transforms().interpolation for _, weights in ALL_WEIGHTS}
    assert asked == {InterpolationMode.BILINEAR, InterpolationMode.BICUBIC}
    weights = models.EfficientNet_B0_Weights.DEFAULT
    assert weights.transforms().interpolation == InterpolationMode.BICUBIC
    steps = find_backbone("efficientnet_b0", weights, resize="squash").preprocessing
    image = pictures["portrait"]
    expected = image.resize((224, 224), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(steps.prepare(image), np.asarray(expected))


@pytest.mark.parametrize("resize", ["weights", "squash", "pad"])
def test_what_is_cropped_already_is_squashed(resize, pictures):
    """Nothing is cut off a second time, whatever `resize` does to other images."""
    steps = find_backbone("resnet50", resize=resize, image_size=112).preprocessing
    squash = find_backbone("resnet50", resize="squash", image_size=112).preprocessing
    for image in pictures.values():
        exactly(steps.prepare_whole(image), squash.prepare(image))


def test_preprocessing_of_the_user_replaces_the_weights_own(
    pictures,
):
    """A function of the user decides on size and scale; the network gets float32 of it."""
    steps = find_backbone(NAME, None, preprocessing=as_tensor).preprocessing
    assert steps.prepare is steps.prepare_whole is as_tensor
    assert steps.input_shape == (3, 32, 48)
    batch = steps.normalize(steps.prepare(pictures["tiny"])[None])
    exactly(batch, as_tensor(pictures["tiny"])[None].float())


# Sides of any proportion ------------------------------------------------------------------------


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


@pytest.mark.parametrize("resize", ["weights", "squash", "pad"])
def test_the_preprocessing_of_a_named_network_can_be_pickled(resize):
    """A trained classifier holds it, and may be loaded by another process."""
    steps = find_backbone(NAME, resize=resize, image_size=32).preprocessing
    copy = pickle.loads(pickle.dumps(steps))
    image = Image.effect_noise((50, 40), 80).convert("RGB")
    exactly(copy(image), steps(image))
    assert copy.settings == steps.settings
