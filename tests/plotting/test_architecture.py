"""ArchitectureDisplay: the artists, compared with values computed by hand."""

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from torch import nn
from torchvision import models, transforms

from deepfeat import DeepFeatureExtractor, list_layers
from deepfeat.plotting import ArchitectureDisplay


def texts_of(axes):
    return [text.get_text() for text in axes.texts]


def test_the_parameters_of_vgg16_are_in_its_linear_layers():
    """The bars, the legend and the title have the counts of torchvision's tensors."""
    with torch.device("meta"):
        net = models.vgg16(weights=None)
    linear = sum(
        value.numel()
        for module in net.modules()
        if isinstance(module, nn.Linear)
        for value in module.parameters()
    )
    total = sum(value.numel() for value in net.parameters())
    left, right = ArchitectureDisplay.from_backbone("vgg16").axes_
    assert right.get_title(loc="left") == f"{total:,} parameters"
    legend = [text.get_text() for text in right.get_legend().get_texts()]
    assert legend[0] == f"Linear  {linear:,} ({linear / total:.1%})"
    assert legend[1].startswith("Conv2d")
    assert linear == 123_642_856
    names = [tick.get_text() for tick in left.get_yticklabels()]
    assert names[:5] == ["conv1_1", "relu1_1", "conv1_2", "relu1_2", "pool1"]
    width_of = {names[round(bar.get_y() + 0.4)]: bar.get_width() for bar in right.patches}
    assert width_of["fc6"] == net.classifier[0].weight.numel() + 4096
    assert width_of["relu6"] == 0
    assert texts_of(left)[names.index("pool5")] == "512 × 7 × 7"
    right.figure.canvas.draw()
    for axes in (left, right):
        assert max(text.get_window_extent().x1 for text in axes.texts) <= axes.bbox.x1


@pytest.mark.parametrize(("name", "total"), [("vit_b_16", 86_567_656), ("googlenet", 13_004_888)])
def test_the_title_counts_all_parameters(name, total):
    """Those of tokens, position embeddings and auxiliary classifiers are included."""
    _, right = ArchitectureDisplay.from_backbone(name).axes_
    assert right.get_title(loc="left") == f"{total:,} parameters"


def test_outputs_are_as_wide_as_the_maps():
    """The side of maps, the square root of the number of tokens, one for a vector."""
    left, _ = ArchitectureDisplay.from_backbone("vit_b_16", merge_repeats=False).axes_
    widths = [bar.get_width() for bar in left.patches]
    assert_allclose(widths[:2], [14, np.sqrt(197)])
    assert widths[-1] == 1
    assert_allclose([bar.get_x() for bar in left.patches], -np.array(widths) / 2)


def test_the_width_of_a_sequence_depends_on_its_length():
    """It is the square root of its length, and not of its channels, which come first."""
    net = nn.Sequential(nn.Flatten(2), nn.Conv1d(3, 5, 4, 4))
    steps = transforms.Compose([transforms.Resize((8, 8)), transforms.ToTensor()])
    display = ArchitectureDisplay.from_backbone(net, preprocessing=steps)
    (bar,) = display.axes_[0].patches
    assert bar.get_width() == 4


def test_repeats_share_a_row():
    """Blocks of the same kind and shape are merged, and their parameters are added."""
    merged = ArchitectureDisplay.from_backbone("resnet50").axes_
    single = ArchitectureDisplay.from_backbone("resnet50", merge_repeats=False).axes_
    labels = [tick.get_text() for tick in merged[0].get_yticklabels()]
    assert labels[3:9] == [
        *("maxpool", "layer1.0–2", "layer2.0–3", "layer3.0–5", "layer4.0–2", "avgpool"),
    ]
    names = [tick.get_text() for tick in single[0].get_yticklabels()]
    assert names == [layer.name for layer in list_layers("resnet50")]
    with torch.device("meta"):
        layer3 = models.resnet50(weights=None).layer3
    counts = {labels[round(bar.get_y() + 0.4)]: bar.get_width() for bar in merged[1].patches}
    assert counts["layer3.0–5"] == sum(value.numel() for value in layer3.parameters())
    assert merged[1].get_title(loc="left") == single[1].get_title(loc="left")


def test_numbers_of_two_digits_are_not_cut():
    """A row that ends with features.13 ends in 13, not in 3."""
    left, _ = ArchitectureDisplay.from_backbone("mobilenet_v2").axes_
    labels = [tick.get_text() for tick in left.get_yticklabels()]
    assert {"features.7–10", "features.11–13"} <= set(labels)


def test_the_network_of_an_extractor():
    """Its image size is used; a user's network is named after its class."""
    small = ArchitectureDisplay.from_extractor(
        DeepFeatureExtractor("squeezenet1_1", "stage1", weights=None, image_size=64)
    )
    assert texts_of(small.axes_[0])[0] == "64 × 31 × 31"
    assert small.name == "squeezenet1_1"
    own = DeepFeatureExtractor(nn.Sequential(nn.ReLU()), "0", preprocessing=transforms.ToTensor())
    display = ArchitectureDisplay.from_extractor(own)
    assert display.name == "Sequential"
    assert display.axes_[1].get_title(loc="left") == "0 parameters"
    with pytest.raises(TypeError, match=r"must be a DeepFeatureExtractor; got str\."):
        ArchitectureDisplay.from_extractor("vgg16")
