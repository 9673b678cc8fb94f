"""Names: Caffe's, stages and aliases; which modules are layers, and their parameters."""

import functools
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close
from torchvision import models
from torchvision.models._utils import IntermediateLayerGetter

from deepfeat import LayerNotFoundError
from deepfeat._backbones.find import find_backbone
from deepfeat._layers.index import LayerIndex

exactly = functools.partial(assert_close, rtol=0, atol=0)


def test_every_parameter_is_counted_with_a_layer(
    backbone: str, published: dict[str, Any], index_of: Callable[[str], LayerIndex]
) -> None:
    """The parameters of all layers add up to the network's, as torchvision publishes them."""
    expected = sum(weight.numel() for weight in find_backbone(backbone).skeleton.parameters())
    if backbone not in ("googlenet", "inception_v3"):  # published without auxiliary classifiers
        assert expected == published["num_params"]
    assert sum(layer.parameters for layer in index_of(backbone).table) == expected


def test_a_containers_own_parameters_are_counted_with_its_first_layer(
    index_of: Callable[[str], LayerIndex],
) -> None:
    """The class token is counted with the first layer, position embeddings with the first block."""
    net = find_backbone("vit_b_16").skeleton
    layers = {layer.name: layer.parameters for layer in index_of("vit_b_16").table}
    assert layers["conv_proj"] == (3 * 16 * 16 + 1) * 768 + net.class_token.numel()
    first, second = (layers[f"encoder.layers.encoder_layer_{number}"] for number in (0, 1))
    assert first - second == net.encoder.pos_embedding.numel()


def test_auxiliary_classifiers_are_counted_with_the_classifier(
    index_of: Callable[[str], LayerIndex],
) -> None:
    """They are not layers, since the forward pass skips them."""
    net = find_backbone("googlenet").skeleton
    *_, last = index_of("googlenet").table
    heads = (net.aux1, net.aux2, net.fc)
    assert last.name == "fc"
    assert last.parameters == sum(w.numel() for head in heads for w in head.parameters())


def test_a_shared_parameter_is_counted_once() -> None:
    """It is counted with the first layer that has it."""
    net = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.ReLU(), nn.Conv2d(3, 3, 1, bias=False))
    net[2].weight = net[0].weight
    assert [layer.parameters for layer in LayerIndex(net, (3, 8, 8)).table] == [9, 0, 0]


@pytest.mark.parametrize("batch_norm", ["", "_bn"])
@pytest.mark.parametrize(
    ("depth", "convolutions"),
    # Simonyan and Zisserman (2015), table 1: columns A, B, D, E.
    [(11, (1, 1, 2, 2, 2)), (13, (2, 2, 2, 2, 2)), (16, (2, 2, 3, 3, 3)), (19, (2, 2, 4, 4, 4))],
)
def test_vgg_has_the_names_of_caffe(
    depth: int,
    convolutions: tuple[int, ...],
    batch_norm: str,
    index_of: Callable[[str], LayerIndex],
) -> None:
    """VGG's layers are numbered by block and position, as in the paper's Caffe models."""
    expected: list[tuple[str, str, tuple[int, ...]]] = []
    for block, count in enumerate(convolutions, start=1):
        channels, side = min(64 * 2 ** (block - 1), 512), 224 // 2 ** (block - 1)
        for number in range(1, count + 1):
            kinds = [("conv", "Conv2d"), ("bn", "BatchNorm2d"), ("relu", "ReLU")]
            expected += [
                (f"{short}{block}_{number}", kind, (channels, side, side))
                for short, kind in kinds
                if batch_norm or short != "bn"
            ]
        expected.append((f"pool{block}", "MaxPool2d", (channels, side // 2, side // 2)))
    expected.append(("avgpool", "AdaptiveAvgPool2d", (512, 7, 7)))
    for number, width in ((6, 4096), (7, 4096), (8, 1000)):
        expected += [(f"fc{number}", "Linear", (width,)), (f"relu{number}", "ReLU", (width,))]
    table = index_of(f"vgg{depth}{batch_norm}").table
    assert [(layer.name, layer.kind, layer.output_shape) for layer in table] == expected


def test_alexnet_has_the_names_of_caffe(index_of: Callable[[str], LayerIndex]) -> None:
    """AlexNet's five convolutions are numbered consecutively; it pools after 1, 2 and 5."""
    names = (
        "conv1 relu1 pool1 conv2 relu2 pool2 conv3 relu3 conv4 relu4 conv5 relu5 pool5 avgpool "
        "fc6 relu6 fc7 relu7 fc8 relu8"
    )
    table = index_of("alexnet").table
    assert [layer.name for layer in table] == names.split()
    assert dict(zip(names.split(), table, strict=True))["pool5"].output_shape == (256, 6, 6)


def test_caffe_names_survive_another_head() -> None:
    """A VGG with other layers in the head keeps its names; the new layers get no Caffe names."""
    net = models.vgg11(init_weights=False)
    net.classifier = nn.Sequential(
        nn.Linear(25088, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2), nn.Softmax(1)
    )
    names = [layer.name for layer in LayerIndex(net, (3, 32, 32)).table]
    assert names[-5:] == ["fc6", "classifier.1", "relu6", "fc7", "classifier.4"]


# From the papers' tables and torchvision's definitions: the last module of each resolution, before
# the vectors. The keys are patterns of the names of networks.
STAGES = {
    "alexnet": "relu1 relu2 relu5",
    "vgg11(_bn)?": "relu1_1 relu2_1 relu3_2 relu4_2 relu5_2",
    "vgg13(_bn)?": "relu1_2 relu2_2 relu3_2 relu4_2 relu5_2",
    "vgg16(_bn)?": "relu1_2 relu2_2 relu3_3 relu4_3 relu5_3",
    "vgg19(_bn)?": "relu1_2 relu2_2 relu3_4 relu4_4 relu5_4",
    "(wide_)?resne.*": "relu layer1 layer2 layer3 layer4",
    "densenet.*": "features.relu0 features.denseblock1 features.denseblock2 features.denseblock3 "
    "features",
    "convnext.*|swin.*": "features.1 features.3 features.5 features.7",
    "maxvit_t": "stem blocks.0 blocks.1 blocks.2 blocks.3",
    "mnasnet.*": "layers.7 layers.8 layers.9 layers.11 layers",
    "mobilenet_v2": "features.1 features.3 features.6 features.13 features",
    "mobilenet_v3_large": "features.1 features.3 features.6 features.12 features",
    "mobilenet_v3_small": "features.0 features.1 features.3 features.8 features",
    "efficientnet.*": "features.1 features.2 features.3 features.5 features",
    "regnet.*": "stem trunk_output.block1 trunk_output.block2 trunk_output.block3 trunk_output",
    "shufflenet.*": "conv1 stage2 stage3 stage4",
    "squeezenet1_0": "features.1 features.5 features.10 features",
    "squeezenet1_1": "features.1 features.4 features.7 features",
    "googlenet": "conv1 conv3 inception3b inception4e inception5b",
    "inception_v3": "Conv2d_2b_3x3 Conv2d_4a_3x3 Mixed_5d Mixed_6e Mixed_7c",
}


def test_stages_end_before_each_down_sampling(
    backbone: str, index_of: Callable[[str], LayerIndex]
) -> None:
    """`stage1`, `stage2`, ... are the last layers of each resolution of the architecture."""
    index = index_of(backbone)
    if backbone.startswith("vit"):  # which never downsample
        blocks = [layer.name for layer in index.table if layer.kind == "EncoderBlock"]
        stages = [index.resolve(f"stage{number + 1}").path for number in range(len(blocks))]
        assert stages == blocks
        assert f"stage{len(blocks)}" == index.last_stage
        return
    (ends,) = (ends.split() for pattern, ends in STAGES.items() if re.fullmatch(pattern, backbone))
    areas = []
    for number, end in enumerate(ends, start=1):
        stage = index.resolve(f"stage{number}")
        assert stage.path == index.resolve(end).path
        areas.append(np.prod(stage.output_shape[1:]))
    assert (np.diff(areas) < 0).all()
    with pytest.raises(LayerNotFoundError):
        index.resolve(f"stage{len(ends) + 1}")


def test_a_down_sampling_that_rounds_up_ends_a_stage() -> None:
    """Maps of odd sides are halved to more than half: 15 x 15 to 8 x 8."""
    convolutions = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 3, stride=2, padding=1)
    index = LayerIndex(nn.Sequential(*convolutions), (3, 15, 15))
    assert index.resolve("stage1").path == "0"
    assert index.resolve("stage2").path == "1"


def test_a_stage_of_one_pixel_ends_before_the_pooling() -> None:
    """ResNet's last maps of 32-pixel images have one pixel; global pooling is not a stage."""
    index = LayerIndex(models.resnet18(weights=None), (3, 32, 32))
    assert index.resolve("layer4").output_shape == (512, 1, 1)
    assert index.resolve("stage5").path == "layer4.1"
    assert [layer.path for layer in index.stages()][-2:] == ["layer4.1", "avgpool"]


def test_modules_called_stage_keep_their_names(index_of: Callable[[str], LayerIndex]) -> None:
    """ShuffleNet has modules `stage2` to `stage4`, to which these names refer."""
    index = index_of("shufflenet_v2_x1_0")
    for number, blocks in ((2, 4), (3, 8), (4, 4)):
        assert index.resolve(f"stage{number}").path == f"stage{number}.{blocks - 1}"
    assert index.resolve("stage1").output_shape == (24, 112, 112)


class Doubling(nn.Module):
    """A block that computes something, whatever its name."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv2d(3, 3, 1)

    def forward(self, maps: Tensor) -> Tensor:
        return 2 * self.inner(maps)


@pytest.mark.parametrize(
    "kind",
    [
        *("IdentityBlock", "DropoutBlock", "StochasticDepthUnit", "PermuteMixer", "FlattenNet"),
        *("Sequential", "ModuleList", "AnyStage", "Encoder", "MaxVitBlock"),
        *("MyPool2d", "AdaptiveNormPool", "Permute", "WindowPartition", "LayerNormal"),
    ],
)
def test_the_name_of_a_class_does_not_matter(kind: str) -> None:
    """A block of the user is a layer like any other: in the list, in stages, by index."""
    block = type(kind, (Doubling,), {})
    net = nn.Sequential(
        nn.Conv2d(3, 3, 1), block(), nn.Sequential(block(), nn.Conv2d(3, 3, 2, 2)), block()
    )
    index = LayerIndex(net, (3, 8, 8))
    assert [layer.name for layer in index.table] == ["0", "1", "2.0", "2.1", "3"]
    assert [layer.kind for layer in index.table][1] == kind
    assert index.resolve(1).path == "1"
    assert index.resolve("stage1").path == "2.0"
    assert index.resolve("stage2").path == "3"
    assert {layer.output_shape for layer in index.table} == {(3, 8, 8), (3, 4, 4)}
    assert not any(index.resolve(layer.name).channels_last for layer in index.table)


class Quiet(nn.Module):
    """Adds noise in training, and returns its input otherwise."""

    def forward(self, maps: Tensor) -> Tensor:
        return maps + torch.randn_like(maps) if self.training else maps


class Reshaping(nn.Module):
    def forward(self, maps: Tensor) -> Tensor:
        return maps.reshape(len(maps), -1)


@pytest.mark.parametrize(
    "idle",
    [
        *(nn.Dropout(), nn.Dropout2d(), nn.AlphaDropout(), nn.FeatureAlphaDropout()),
        *(nn.Identity(), Quiet(), Reshaping(), nn.Flatten(1), type("Mine", (nn.Dropout,), {})()),
    ],
    ids=lambda idle: type(idle).__name__,
)
def test_a_module_that_returns_its_input_is_not_a_layer(idle: nn.Module) -> None:
    """In eval mode, at most with another shape; it can still be read by its path."""
    index = LayerIndex(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(True), idle), (3, 8, 8))
    listed = [layer.name for layer in index.table if layer.name != "penultimate"]
    assert listed == ["0", "1"]
    assert index.resolve("2").path == "2"


def test_modules_that_are_not_called_themselves_are_containers() -> None:
    """Their blocks are layers: those of a ModuleDict, or of a network that is not called."""

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleDict({"a": nn.Conv2d(3, 4, 1), "b": nn.Conv2d(4, 5, 1)})
            self.body = models.squeezenet1_1(weights=None).features[:2]
            self.wrapped = Doubling()

        def forward(self, batch: Tensor) -> Tensor:
            batch = self.wrapped.inner(self.body[0](batch)[:, :3])
            return self.parts["b"](self.parts["a"](batch))

    names = [layer.name for layer in LayerIndex(Whole(), (3, 16, 16)).table]
    assert names == ["body.0", "wrapped.inner", "parts.a", "parts.b"]


def test_the_layers_of_a_module_that_returns_a_dict_are_listed() -> None:
    """As in torchvision's networks for segmentation."""
    body = IntermediateLayerGetter(models.resnet18(weights=None), {"layer4": "out"})
    net = models.segmentation.FCN(body, nn.Conv2d(512, 2, 1)).eval()

    class Maps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def forward(self, batch: Tensor) -> Tensor:
            return self.net(batch)["out"]

    names = [layer.name for layer in LayerIndex(Maps(), (3, 32, 32)).table]
    first = ("conv1", "bn1", "relu", "maxpool", "layer1.0")
    assert names[:5] == [f"net.backbone.{name}" for name in first]
    assert names[-2:] == ["net.classifier", "penultimate"]


class Encoder(nn.Module):
    """A block with the name of one of torchvision's containers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 3, 1)
        self.second = nn.Conv2d(3, 3, 1)

    def forward(self, maps: Tensor) -> Tensor:
        return maps + self.second(self.first(maps))


class InPlaceEncoder(Encoder):
    def forward(self, maps: Tensor) -> Tensor:
        return F.relu(self.second(self.first(maps)), inplace=True)


InPlaceEncoder.__name__ = "Encoder"


class Mixed(nn.Module):
    """Modules and functions; one module is called twice, one never, one returns a dict."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        relu = nn.ReLU(inplace=True)
        self.encoder = encoder
        self.body = nn.Sequential(
            nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), relu),
            nn.Sequential(nn.Conv2d(4, 5, 3), relu),
        )
        self.tail = Tail()
        self.unused = nn.Linear(2, 2)

    def forward(self, batch: Tensor) -> dict[str, Tensor]:
        return self.tail(F.relu(self.body(self.encoder(batch))))


class Tail(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(5, 2)

    def forward(self, maps: Tensor) -> dict[str, Tensor]:
        return {"scores": self.fc(maps.mean((2, 3)))}


def test_a_network_of_the_user_is_listed_and_read(
    read: Callable[..., list[Tensor]], images: Callable[..., Tensor]
) -> None:
    """Plain containers are opened, blocks are not; a module that returns a dict is read inside."""
    net, batch = Mixed(Encoder()).eval(), images()
    index = LayerIndex(net, (3, 32, 32))
    names = ["encoder", "body.0.0", "body.0.1", "body.0.2", "body.1.0", "tail.fc"]
    assert [layer.name for layer in index.table] == names
    (scores, maps) = read(net, batch, "tail.fc", "body.1.0")
    with torch.inference_mode():
        exactly(scores, net(batch)["scores"])
        exactly(maps, net.body[1][0](net.body[0](net.encoder(batch))))
    for path in ("tail", "unused"):
        words = f"Mixed does not call '{path}' .*, or the module does not return a tensor"
        with pytest.raises(LayerNotFoundError, match=words):
            index.resolve(path)


@pytest.mark.parametrize("encoder", [Encoder, InPlaceEncoder])
def test_a_container_that_computes_is_not_an_alias_of_its_last_layer(
    encoder: type[nn.Module], read: Callable[..., list[Tensor]], images: Callable[..., Tensor]
) -> None:
    """A path means that very module, including a sum or a ReLU after its last child."""
    net, batch = Mixed(encoder()).eval(), images()
    encoded, second = read(net, batch, "encoder", "encoder.second")
    with torch.inference_mode():
        exactly(encoded, net.encoder(batch))
        exactly(second, net.encoder.second(net.encoder.first(batch)))


def test_a_container_that_ends_with_a_second_call_is_not_an_alias(
    read: Callable[..., list[Tensor]], images: Callable[..., Tensor]
) -> None:
    """With a ReLU that is used twice, `body` has its own values, not those of the first use."""
    net, batch = Mixed(Encoder()).eval(), images()
    body, conv, relu = read(net, batch, "body", "body.1.0", "body.0.2")
    with torch.inference_mode():
        exactly(body, net.body(net.encoder(batch)))
    assert conv.min() < 0
    assert relu.shape[1] == 4
