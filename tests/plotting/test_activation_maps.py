"""ActivationMapDisplay: the artists, compared with values computed by hand."""

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image
from sklearn.pipeline import make_pipeline
from torch import nn
from torchvision import models, transforms
from torchvision.models.feature_extraction import create_feature_extractor

from deepfeat import DeepFeatureExtractor, LayerNotFoundError
from deepfeat.plotting import ActivationMapDisplay


def make(layer="stage1", **params):
    params = {"weights": None, "image_size": 64, "num_workers": 0} | params
    return DeepFeatureExtractor("squeezenet1_1", layer, **params)


def maps_by_hand(image, node):
    """Run an image through torchvision's network, up to a node."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = models.squeezenet1_1(weights=None).eval()
    preset = models.SqueezeNet1_1_Weights.DEFAULT.transforms
    preprocess = preset(crop_size=64, resize_size=round(256 * 64 / 224))
    with torch.no_grad():
        return create_feature_extractor(net, {node: "out"})(preprocess(image)[None])["out"][0]


@pytest.mark.parametrize(
    ("layer", "node"),
    [("stage1", "features.1"), (0, "features.0"), ("classifier.1", "classifier.1")],
)
def test_the_maps_are_those_of_a_plain_forward_pass(photograph, layer, node):
    """The pooling, the norm and the cache of the extractor have no influence."""
    extractor = make("stage3", pooling="max", norm="l2").fit([photograph])
    before = extractor.get_params()
    display = ActivationMapDisplay.from_extractor(extractor, photograph, layer=layer, channels=5)
    expected = maps_by_hand(photograph, node).numpy()[:5]
    scale = np.abs(expected).max()
    assert_allclose(display.maps / scale, expected / scale, atol=1e-5)
    for axes, values in zip(display.axes_[1:], expected, strict=True):
        assert_allclose(axes.images[0].get_array() / scale, values / scale, atol=1e-5)
    assert extractor.get_params() == before
    assert np.ptp(expected / scale, axis=0).max() > 1e-3  # or swapped channels would go unnoticed


def test_the_input_is_shown_as_the_network_sees_it(photograph):
    """The image is shown after its resizing and cropping."""
    display = ActivationMapDisplay.from_extractor(make(resize="squash"), photograph, channels=1)
    expected = np.asarray(photograph.resize((64, 64), Image.Resampling.BILINEAR), dtype=int)
    shown = display.axes_[0].images[0].get_array()
    assert_allclose(shown, expected, rtol=0, atol=1)
    assert (shown != expected).mean() <= 0.03


def test_channels_are_chosen_and_labelled(photograph):
    """A number selects the first channels, at most all of them; a list selects by index."""
    first = ActivationMapDisplay.from_extractor(make(), photograph, channels=3)
    every = ActivationMapDisplay.from_extractor(make(), photograph, channels=1000)
    chosen = ActivationMapDisplay.from_extractor(make(), photograph, channels=[60, 2])
    assert first.maps.shape[0] == 3
    assert every.maps.shape[0] == 64
    assert_array_equal(chosen.maps, every.maps[[60, 2]])
    assert [axes.get_title() for axes in chosen.axes_[1:]] == ["60", "2"]
    assert chosen.axes_[0].get_title() == "input, and 2 channels\nof stage1"


def test_the_maps_of_a_users_network(photograph):
    """Maps need not be square, nor the input RGB."""
    net = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False))
    nn.init.constant_(net[0].weight, 2)
    steps = [transforms.Grayscale(), transforms.Resize((20, 30)), transforms.ToTensor()]
    to_grey = transforms.Compose(steps)
    extractor = DeepFeatureExtractor(net, "0", preprocessing=to_grey)
    display = ActivationMapDisplay.from_extractor(extractor, photograph)
    assert_allclose(display.maps, [2 * to_grey(photograph)[0].numpy()] * 2, atol=1e-6)
    assert display.axes_[0].images[0].get_array().shape == (20, 30)


def test_all_maps_can_share_a_scale(photograph):
    """`im_kw` is passed to matplotlib."""
    display = ActivationMapDisplay.from_extractor(
        make(), photograph, channels=2, cmap="cividis", im_kw={"vmin": 0, "vmax": 7}
    )
    for axes in display.axes_[1:]:
        assert axes.images[0].get_clim() == (0, 7)
        assert axes.images[0].get_cmap().name == "cividis"


@pytest.mark.parametrize(
    ("extractor", "words", "error", "message"),
    [
        (make(), {"layer": "stage99"}, LayerNotFoundError, "no layer 'stage99'.*'stage"),
        (make(["stage1", "stage2"]), {}, ValueError, r"must be a single layer; got \['stage1'"),
        (make(), {"channels": [64]}, ValueError, r"from 0 to 63, .* has 64 channels; got \[64\]"),
        (make(), {"channels": []}, ValueError, r"has 64 channels; got \[\]\."),
        (make(), {"channels": 0}, ValueError, r"channels must be at least 1; got 0\."),
        (make_pipeline(make()), {}, TypeError, "got Pipeline.*pipeline"),
        (
            DeepFeatureExtractor("alexnet", "relu7", weights=None),
            {},
            ValueError,
            r"must return maps \(C, H, W\) .* got 'relu7' with output shape \(4096,\)\.",
        ),
    ],
)
def test_a_layer_without_maps_is_refused(photograph, extractor, words, error, message):
    """The error gives the layer and its shape."""
    with pytest.raises(error, match=message):
        ActivationMapDisplay.from_extractor(extractor, photograph, **words)
