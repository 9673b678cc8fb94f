"""Tests of naming what is in images: against torchvision by hand, and every way to fail."""

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.testing import assert_allclose
from PIL import Image
from torch import nn
from torchvision import models
from torchvision.models import SqueezeNet1_1_Weights, VGG16_Weights

from deepfeat import predict_categories
from deepfeat._backbones.find import find_backbone

NAME = "squeezenet1_1"


@pytest.fixture(scope="module")
def net():
    """A small network with random weights, sharpened: else its probabilities are all alike."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = models.get_model(NAME, weights=None).eval()
    with torch.no_grad():
        net.classifier[1].weight.mul_(40)
    return net


@pytest.fixture(scope="module")
def weights(net, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "net.pth"
    torch.save(net.state_dict(), path)
    return path


@pytest.fixture
def images(scene_paths):
    return [Image.open(path).convert("RGB").resize((48, 48)) for path in scene_paths[:4]]


def classify(images, weights, **params):
    return predict_categories(NAME, images, weights=weights, **{"image_size": 64} | params)


def classify_by_hand(net, name, images, top, **preset):
    """Do with torchvision what `predict_categories` promises."""
    source = models.get_model_weights(name)["DEFAULT"]
    preprocess = source.transforms(**preset)
    with torch.no_grad():
        logits = net(torch.stack([preprocess(image) for image in images]))
    probabilities, places = logits.softmax(dim=1).topk(top)
    names = [[source.meta["categories"][place] for place in row] for row in places]
    return names, probabilities.numpy()


def split_pairs(predictions):
    """Take names and probabilities apart."""
    names = [[name for name, _ in pairs] for pairs in predictions]
    return names, np.array([[probability for _, probability in pairs] for pairs in predictions])


def same(predictions, expected):
    names, probabilities = split_pairs(predictions)
    assert names == split_pairs(expected)[0]
    assert_allclose(probabilities, split_pairs(expected)[1], rtol=1e-4)


@pytest.mark.usefixtures("pillow_resizes")
@pytest.mark.parametrize("size", [None, 64])
@pytest.mark.parametrize("top", [1, 5])
def test_names_and_probabilities_are_those_of_torchvision_by_hand(net, weights, images, top, size):
    """The weights' own preprocessing, the network, a softmax, and the names of the largest."""
    preset = {} if size is None else {"crop_size": 64, "resize_size": round(256 * 64 / 224)}
    expected, probabilities = classify_by_hand(net, NAME, images, top, **preset)
    names, found = split_pairs(classify(images, weights, top=top, image_size=size))
    assert names == expected
    assert_allclose(found, probabilities, rtol=1e-3)
    # Were all images alike to this network, predictions for the wrong image would pass.
    assert np.ptp(probabilities, axis=0).max() > 0.1 * probabilities.max()


def test_all_probabilities_sum_to_one(weights, images):
    """With `top` as large as it can be, each category comes once, in falling order."""
    names, probabilities = split_pairs(classify(images, weights, top=1000))
    assert all(sorted(row) == sorted(VGG16_Weights.DEFAULT.meta["categories"]) for row in names)
    assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-4)
    assert_allclose(np.diff(probabilities).max(), 0, atol=1e-12)


def test_pairs_are_plain_strings_and_floats(weights, images):
    """They print, and go into JSON, as they are."""
    for pairs in classify(images, weights):
        assert [(type(name), type(value)) for name, value in pairs] == [(str, float)] * 5


KINDS = {
    "images": list,
    "arrays": lambda images: [np.asarray(image) for image in images],
    "array": lambda images: np.stack([np.asarray(image) for image in images]),
    "floats": lambda images: np.stack([np.asarray(image) / 255 for image in images]),
    "tensor": lambda images: torch.stack([torch.tensor(np.asarray(one)) for one in images]),
    "frame": lambda images: pd.DataFrame({"image": images}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_input_is_named_alike(weights, images, kind):
    """The same pictures give the same names however they arrive."""
    same(classify(KINDS[kind](images), weights), classify(images, weights))


@pytest.mark.parametrize("as_table", [np.asarray, pd.DataFrame, np.ndarray.tolist, torch.tensor])
def test_flattened_rows_are_named_with_their_shape(weights, images, as_table):
    """A table of pixels is taken with `image_shape`."""
    rows = np.stack([np.asarray(image).ravel() for image in images]) / 255
    expected = classify(images, weights)
    same(classify(as_table(rows), weights, image_shape=(48, 48, 3)), expected)
    with pytest.raises(ValueError, match="has one row per image: set image_shape to"):
        classify(as_table(rows), weights)


def test_paths_are_named_in_their_order(weights, scene_paths):
    """Batches and threads leave the order alone."""
    alone = [classify([path], weights)[0] for path in scene_paths]
    same(classify(scene_paths, weights, batch_size=5, num_workers=3), alone)
    same(classify(pd.Series(scene_paths), weights, num_workers=0), alone)


def test_precision_is_that_of_the_network(weights, images):
    """In bfloat16 the probabilities differ a little, and still sum to one."""
    exact = split_pairs(classify(images, weights, top=1000))[1]
    rough = split_pairs(classify(images, weights, top=1000, precision="bfloat16"))[1]
    assert_allclose(rough.sum(axis=1), 1, rtol=1e-4)
    assert np.abs(rough - exact).max() > 1e-4


@pytest.mark.parametrize("resize", ["squash", "pad"])
def test_resize_is_passed_on(weights, images, resize):
    """A wide image is not seen alike when its sides are cut off."""
    wide = [image.resize((200, 48)) for image in images]
    first, second = classify(wide, weights), classify(wide, weights, resize=resize)
    assert first != second


# Names ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("entry", [VGG16_Weights.IMAGENET1K_V1, "IMAGENET1K_V1", "DEFAULT"])
def test_weights_of_torchvision_bring_their_names(entry):
    """A backbone knows the categories of its weights before any are loaded."""
    expected = VGG16_Weights.IMAGENET1K_V1.meta["categories"]
    assert find_backbone("vgg16", entry).categories == tuple(expected)


def test_weights_without_categories_have_no_names(images):
    """VGG16's weights that were made for their features alone have no head to speak of."""
    with pytest.raises(ValueError, match=r"The outputs of vgg16 with .* have no category names"):
        predict_categories("vgg16", images, weights="IMAGENET1K_FEATURES")


def test_random_weights_have_no_names(images):
    """What is random tells no categories apart."""
    with pytest.raises(
        ValueError, match=r"The outputs of .* with weights=None have no category names"
    ):
        classify(images, None)


def test_a_file_with_another_number_of_outputs_has_no_names(tmp_path, images):
    """Weights of one's own for 15 classes are not called by names of ImageNet."""
    path = tmp_path / "scenes.pth"
    torch.save(models.get_model(NAME, weights=None, num_classes=15).state_dict(), path)
    with pytest.raises(
        ValueError, match=r"The outputs of squeezenet1_1 with .* have no category names: "
    ):
        classify(images, path)


def test_a_module_of_ones_own_is_refused(images):
    """Nobody knows what its outputs stand for."""
    refusal = r"^backbone, the first argument, must be a name; got a Linear\."
    with pytest.raises(TypeError, match=refusal):
        predict_categories(nn.Linear(3, 5), images)
    module = models.get_model(NAME, weights=None)
    preprocessing = SqueezeNet1_1_Weights.DEFAULT.transforms()
    assert find_backbone(module, preprocessing=preprocessing).categories is None


# Errors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"top": 0}, "^top must be an int of at least 1; got 0"),
        (
            {"top": 1001},
            "^top must be at most 1000, the number of squeezenet1_1's categories; got 1001",
        ),
        ({"top": 2.5}, "^top must be an int of at least 1; got 2.5"),
        ({"top": True}, "^top must be an int of at least 1; got True"),
        ({"resize": "crop"}, "^resize must be one of 'weights', 'squash' or 'pad'; got 'crop'"),
        (
            {"precision": "double"},
            "^precision must be one of 'float32', .*; got 'double'",
        ),
        ({"batch_size": 0}, "^batch_size must be an int of at least 1; got 0"),
        ({"num_workers": -1}, "^num_workers must be an int of at least 0 or 'auto'; got -1"),
        (
            {"num_workers": "many"},
            "^num_workers must be an int .* or 'auto'; got 'many'",
        ),
        ({"device": "nowhere"}, "device 'nowhere' cannot be used"),
    ],
)
def test_arguments_out_of_range_are_refused(weights, images, params, message):
    """What came, and what was expected."""
    with pytest.raises(ValueError, match=message):
        classify(images, weights, **params)


def test_an_image_that_cannot_be_read_is_named(weights, images, tmp_path):
    """By its place, its path and the reason."""
    path = tmp_path / "bad.jpg"
    path.write_text("no image")
    with pytest.raises(ValueError, match=r"X\[4\] \('.*bad.jpg'\): not an image"):
        classify([*images, path], weights)
    with pytest.raises(ValueError, match="X is empty"):
        classify([], weights)


def test_infinite_outputs_are_an_error(net, tmp_path, images):
    """Rather than a name and a probability of NaN."""
    path = tmp_path / "broken.pth"
    state = net.state_dict()
    torch.save(state | {"classifier.1.bias": torch.full((1000,), torch.nan)}, path)
    with pytest.raises(ValueError, match=r"X\[0\] .*the network gave NaN or infinity"):
        classify(images, path)
