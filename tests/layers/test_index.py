"""The index of a network: its layers, resolved by name or index, and its blocks."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
from torch import nn

from deepfeat import LayerNotFoundError, list_backbones
from deepfeat._backbones.find import find_backbone
from deepfeat._layers.index import LayerIndex


def test_there_are_81_backbones() -> None:
    """The tests below cover all classification models of torchvision, and our own."""
    assert len(list_backbones()) == 81


def test_multiply_adds_are_those_that_torchvision_publishes(
    backbone: str, published: dict[str, Any], index_of: Callable[[str], LayerIndex]
) -> None:
    """The multiply-adds of all layers add up to torchvision's figure, to its last digit."""
    total = sum(layer.multiply_adds for layer in index_of(backbone).table)
    assert round(total / 1e9, 3) == published["_ops"]


def test_names_and_indices_resolve_to_the_same_layers(
    backbone: str, index_of: Callable[[str], LayerIndex]
) -> None:
    """The name, an alias and the index from the start or the end mean the same layer."""
    index = index_of(backbone)
    count = len(index.table)
    names = [layer.name for layer in index.table]
    assert len(set(names)) == count
    for number, layer in enumerate(index.table):
        resolved = index.resolve(number)
        assert resolved == index.resolve(layer.name) == index.resolve(number - count)
        assert resolved == index.resolve(np.int64(number))
        assert (resolved.name, resolved.output_shape) == (layer.name, layer.output_shape)
        for alias in layer.aliases:
            other = index.resolve(alias)
            assert (other.path, other.output_shape) == (resolved.path, resolved.output_shape)
            assert other.name == alias
    assert index.resolve(-1).name == names[-1]


def test_the_fully_connected_layers_of_vgg16(index_of: Callable[[str], LayerIndex]) -> None:
    """`fc6`, `fc7` and `fc8` of VGG16 have 123,642,856 parameters together."""
    layers = {layer.name: layer for layer in index_of("vgg16").table}
    fc6, fc7, fc8 = (layers[name] for name in ("fc6", "fc7", "fc8"))
    assert fc6.parameters == (512 * 7 * 7 + 1) * 4096
    assert fc6.parameters + fc7.parameters + fc8.parameters == 123_642_856
    assert fc6.multiply_adds == 512 * 7 * 7 * 4096


def test_a_layer_may_lie_inside_a_block(index_of: Callable[[str], LayerIndex]) -> None:
    """Any module path can be read, even if it is not in the list."""
    index = index_of("resnet50")
    assert "layer3.1.conv2" not in [layer.name for layer in index.table]
    assert index.resolve("layer3.1.conv2").output_shape == (256, 14, 14)
    assert index.resolve("layer3.1.conv2").path == "layer3.1.conv2"


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        ("conv5_4", "VGG has no layer 'conv5_4'. Close matches: 'conv5_3', 'conv5_2', 'conv5_1'."),
        ("zzz", "VGG has no layer 'zzz'. Its last layers are 'relu7', 'fc8', 'relu8'."),
        ("", "VGG has no layer ''. Its last layers are 'relu7', 'fc8', 'relu8'."),
        (38, "VGG has 38 layers, from -38 to 37; there is no layer 38."),
        (-39, "VGG has 38 layers, from -38 to 37; there is no layer -39."),
    ],
)
def test_an_error_about_a_wrong_name_suggests_right_ones(
    layer: str | int, words: str, index_of: Callable[[str], LayerIndex]
) -> None:
    """The error gives the network, the requested layer and existing ones."""
    with pytest.raises(LayerNotFoundError) as caught:
        index_of("vgg16").resolve(layer)
    assert str(caught.value) == words
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("layer", [True, False, 1.0, None, b"fc8", ["fc8"], np.bool_(True)])
def test_only_names_and_integers_resolve(layer: Any, index_of: Callable[[str], LayerIndex]) -> None:
    """Neither a bool nor a float is an index."""
    with pytest.raises(TypeError, match="layer must be a name or an integer; got"):
        index_of("vgg16").resolve(layer)


@pytest.mark.parametrize(
    ("name", "layer", "paths"),
    [
        ("resnet18", "layer3", ["layer3"]),
        ("resnet18", "layer3.1", ["layer3.1"]),
        ("resnet18", "layer3.1.conv2", ["layer3.1.conv2"]),
        ("resnet18", "stage1", ["conv1", "bn1", "relu"]),
        ("resnet18", "stage2", ["maxpool", "layer1.0", "layer1.1"]),
        ("resnet18", "stage4", ["layer3.0", "layer3.1"]),
        ("resnet18", -1, ["fc"]),
        ("resnet18", 0, ["conv1"]),
        ("vgg11", "conv5_2", ["features.18"]),
        ("vgg11", "features", ["features"]),
        ("vgg11", "classifier", ["classifier"]),
        ("vgg11", "fc8", ["classifier.6"]),
        ("vgg11", "relu8", ["classifier.6"]),
        ("vgg11", "stage2", ["features.2", "features.3", "features.4"]),
        ("squeezenet1_1", "stage4", [f"features.{number}" for number in range(8, 13)]),
        # A module of that name takes precedence over a stage.
        ("shufflenet_v2_x0_5", "stage2", ["stage2"]),
        ("vit_b_32", "encoder", ["encoder"]),
        ("vit_b_32", "encoder.layers", ["encoder.layers"]),
    ],
)
def test_a_name_stands_for_a_block(
    name: str, layer: str | int, paths: list[str], index_of: Callable[[str], LayerIndex]
) -> None:
    """A container is a block as a whole, a stage consists of all layers after the previous one."""
    assert list(index_of(name).block(layer)) == paths


def test_stages_partition_the_layers_of_a_network(
    family: str, index_of: Callable[[str], LayerIndex]
) -> None:
    """In order and without a gap, from the first layer to the end of the last stage."""
    index = index_of(family)
    stages = [alias for layer in index.table for alias in layer.aliases if alias[:5] == "stage"]
    stages = [stage for stage in stages if stage not in index.calls]
    blocks = [index.block(stage) for stage in stages]
    if stages[:1] == ["stage1"]:
        shared = [path for block in blocks for path in block]
        assert shared == list(index.units[: len(shared)])
    assert all(block[-1] == index.resolve(s).path for s, block in zip(stages, blocks, strict=True))


@pytest.mark.parametrize("layer", ["layer5", "", "layer3.", "stage9", 99])
def test_a_missing_block_raises_like_a_missing_layer(
    layer: str | int, index_of: Callable[[str], LayerIndex]
) -> None:
    """With close matches."""
    with pytest.raises(LayerNotFoundError, match=r"has no layer|there is no layer"):
        index_of("resnet18").block(layer)


def test_units_are_the_layers_of_the_list(
    family: str, index_of: Callable[[str], LayerIndex]
) -> None:
    """As module paths, in the order of computation; `calls` has an entry for each."""
    index = index_of(family)
    apart = ("relu8", "penultimate")
    listed = [index.resolve(layer.name).path for layer in index.table if layer.name not in apart]
    assert list(index.units) == listed
    order = [list(index.calls).index(path) for path in index.units]
    assert order == sorted(order)
    skeleton = find_backbone(family).skeleton
    for path in index.units:
        kind = type(skeleton.get_submodule(path)).__name__
        assert index.calls[path].kind == kind


def test_the_list_prints_as_a_table() -> None:
    """The repr of a list is a table with aligned columns."""
    net = nn.Sequential()
    net.body = nn.Sequential(nn.Conv2d(3, 1000, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout())
    net.fc = nn.Sequential(nn.Flatten(), nn.Linear(49000, 2))
    assert repr(LayerIndex(net, (3, 16, 16)).table) == "\n".join(
        [
            "   name         aliases  kind             output          features  parameters  "
            "multiply-adds",
            "0  body.0                Conv2d           1000 x 14 x 14     1,000      28,000      "
            "5,292,000",
            "1  body.1       stage1   ReLU             1000 x 14 x 14     1,000           0      "
            "        0",
            "2  body.2       body     MaxPool2d        1000 x 7 x 7       1,000           0      "
            "        0",
            "3  penultimate           input of Linear  49000             49,000           0      "
            "        0",
            "4  fc.1         fc       Linear           2                      2      98,002      "
            "   98,000",
        ]
    )


def test_the_list_turns_into_a_data_frame(index_of: Callable[[str], LayerIndex]) -> None:
    """pandas converts the list to a frame with one row per layer and one column per attribute."""
    table = index_of("vgg16").table
    frame = pd.DataFrame(table)
    assert list(frame.columns) == [
        "name",
        "aliases",
        "kind",
        "output_shape",
        "n_features",
        "parameters",
        "multiply_adds",
    ]
    assert len(frame) == 38
    assert frame.set_index("name").loc["conv5_3", "output_shape"] == (512, 14, 14)
    assert frame.parameters.sum() == 138_357_544
    assert frame.n_features.tolist() == [shape[0] for shape in frame.output_shape]
