"""The penultimate layer: what the classifier of a network takes, or what the network returns."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from deepfeat._layers.index import LayerIndex
from deepfeat._layers.pooling import PooledLayer
from deepfeat._layers.reading import ForwardPass

# Written down by hand: the module that turns features into the logits of each family.
CLASSIFIERS = {
    "alexnet": "classifier.6",
    "convnext_tiny": "classifier.2",
    "densenet121": "classifier",
    "efficientnet_b0": "classifier.1",
    "efficientnet_v2_s": "classifier.1",
    "maxvit_t": "classifier.5",
    "mnasnet0_5": "classifier.1",
    "mobilenet_v2": "classifier.1",
    "mobilenet_v3_small": "classifier.3",
    "squeezenet1_1": "classifier.1",
    "swin_t": "head",
    "swin_v2_t": "head",
    "vgg11": "classifier.6",
    "vgg11_bn": "classifier.6",
    "vit_b_32": "heads.head",
}


@pytest.fixture
def read_penultimate() -> Callable[[nn.Module, Tensor], Tensor]:
    """Read the penultimate layer, pooled by its mean."""

    def read_penultimate(net: nn.Module, batch: Tensor) -> Tensor:
        layer = LayerIndex(net, tuple(batch.shape[1:])).resolve("penultimate")
        wanted = {"penultimate": (layer, PooledLayer(layer, "avg").reduce)}
        with torch.inference_mode():
            return ForwardPass(net, wanted)(batch)["penultimate"]

    return read_penultimate


def input_of(net: nn.Module, path: str, batch: Tensor) -> Tensor:
    """Capture the first input of a module with a plain hook."""
    inputs: list[Tensor] = []

    def keep(_module: nn.Module, given: Any) -> None:
        inputs.append(given[0].clone())

    handle = net.get_submodule(path).register_forward_pre_hook(keep)
    with torch.inference_mode():
        net(batch)
    handle.remove()
    return inputs[0]


def assert_relatively_close(found: Tensor, expected: Tensor) -> None:
    """Raise unless all values are equal up to 1e-5 of the largest."""
    scale = expected.abs().max()
    assert scale > 0
    assert_close(found / scale, expected / scale, rtol=0, atol=1e-5)


# torchvision --------------------------------------------------------------------------------------


def test_it_is_the_input_of_the_classifier(
    family: str,
    side: int,
    build: Callable[..., nn.Module],
    images: Callable[..., Tensor],
    read_penultimate: Callable[[nn.Module, Tensor], Tensor],
) -> None:
    """Whether a layer returns it or a function does; maps are pooled like any other."""
    net, batch = build(family, side), images(2 if side < 200 else 1, side)
    expected = input_of(net, CLASSIFIERS.get(family, "fc"), batch)
    if expected.ndim == 4:
        expected = expected.mean((2, 3))
    assert_relatively_close(read_penultimate(net, batch), expected)


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("alexnet", "relu7"),
        ("vgg16", "relu7"),
        ("resnet18", "avgpool"),
        ("resnet10_slim", "avgpool"),
        ("mobilenet_v2", "input of classifier.1"),
        ("densenet121", "input of classifier"),
        ("squeezenet1_1", "features.12"),
        ("swin_t", "avgpool"),
        ("convnext_tiny", "classifier.0"),
        ("vit_b_16", "input of heads.head"),
    ],
)
def test_it_is_a_layer_by_another_name_where_one_returns_the_same(
    name: str, layer: str, index_of: Callable[[str], LayerIndex]
) -> None:
    """So that both share one row in the cache."""
    index = index_of(name)
    found = index.resolve("penultimate")
    if layer.startswith("input of"):
        assert found.source == layer
        assert index.table[-2].name == "penultimate"
    else:
        assert found.source == index.resolve(layer).source
        (entry,) = [entry for entry in index.table if "penultimate" in entry.aliases]
        assert layer in (entry.name, *entry.aliases)


def test_a_backbone_has_it(backbone: str, index_of: Callable[[str], LayerIndex]) -> None:
    """It can be pooled by its mean."""
    index = index_of(backbone)
    assert PooledLayer(index.resolve("penultimate"), "avg").n_features > 0
    assert index.resolve("penultimate").source in {layer.source for layer in index.stages()}


# The user's networks ------------------------------------------------------------------------------


class Headless(nn.Module):
    """Return maps, or their means, of a convolution whose output a function changes."""

    def __init__(self, pooled: bool, then: nn.Module | None = None):
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, bias=False)
        self.then = then
        self.pooled = pooled

    def forward(self, batch: Tensor) -> Tensor:
        maps = self.conv(batch) * 2 + 1
        maps = maps if self.then is None else self.then(maps)
        return maps.mean((2, 3)) if self.pooled else maps


@pytest.mark.parametrize("then", [None, nn.ReLU(), nn.Conv2d(6, 5, 1)], ids=str)
@pytest.mark.parametrize("pooled", [False, True])
def test_without_a_classifier_it_is_the_output(
    pooled: bool,
    then: nn.Module | None,
    images: Callable[..., Tensor],
    read_penultimate: Callable[[nn.Module, Tensor], Tensor],
) -> None:
    """An encoder has been freed of its classifier; a 1 x 1 convolution before a mean is one."""
    net, batch = Headless(pooled, then), images(2, 8)
    with torch.inference_mode():
        maps = net.conv(batch) * 2 + 1
        if not (pooled and isinstance(then, nn.Conv2d)) and then is not None:
            maps = then(maps)
    assert_relatively_close(read_penultimate(net, batch), maps.mean((2, 3)))


def test_a_resnet_without_its_classifier_returns_it(
    build: Callable[..., nn.Module],
    images: Callable[..., Tensor],
    read_penultimate: Callable[[nn.Module, Tensor], Tensor],
) -> None:
    """`fc` is often replaced by an identity."""
    net, batch = build("resnet18"), images()
    expected = input_of(net, "fc", batch)
    net.fc = nn.Identity()
    assert_relatively_close(read_penultimate(net, batch), expected)


def test_a_module_of_this_name_keeps_it(
    images: Callable[..., Tensor], read: Callable[..., list[Tensor]]
) -> None:
    """Paths of modules come first."""
    net = nn.Sequential()
    net.add_module("penultimate", nn.Conv2d(3, 4, 3))
    net.add_module("flatten", nn.Flatten())
    net.add_module("second", nn.Linear(4 * 36, 8))
    net.add_module("last", nn.Linear(8, 2))
    batch = images(2, 8)
    (found,) = read(net, batch, "penultimate")
    with torch.inference_mode():
        assert_close(found, net[0](batch))


def test_an_input_is_read_before_the_classifier_overwrites_it(
    images: Callable[..., Tensor], read: Callable[..., list[Tensor]]
) -> None:
    """A function in place before it counts, and one after it does not."""

    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.hidden = nn.Linear(192, 8)
            self.fc = nn.Linear(8, 3)

        def forward(self, batch: Tensor) -> Tensor:
            hidden = self.hidden(batch.flatten(1)).relu_()
            logits = self.fc(hidden)
            hidden.zero_()
            return logits

    net, batch = InPlace(), images(2, 8)
    found, before = read(net, batch, "penultimate", "hidden")
    with torch.inference_mode():
        assert_close(before, net.hidden(batch.flatten(1)))
        assert_close(found, before.relu())


# timm ---------------------------------------------------------------------------------------------


def test_in_timm_it_is_what_timm_gives_before_logits(
    name_in_timm: str,
    build_timm: Callable[..., nn.Module],
    read_penultimate: Callable[[nn.Module, Tensor], Tensor],
) -> None:
    """`forward_head(..., pre_logits=True)`, of one small network of each of its modules."""
    net = build_timm(name_in_timm)
    batch = torch.randn(
        2, *net.pretrained_cfg["input_size"], generator=torch.Generator().manual_seed(0)
    )
    found = read_penultimate(net, batch)
    with torch.inference_mode():
        expected = net.forward_head(net.forward_features(batch), pre_logits=True)
    assert_relatively_close(found, expected.flatten(1))


@pytest.mark.parametrize("name", ["test_vit", "test_convnext", "test_resnet", "test_efficientnet"])
def test_in_timm_it_is_what_a_network_without_classes_returns(
    name: str,
    build_timm: Callable[..., nn.Module],
    images: Callable[..., Tensor],
    read_penultimate: Callable[[nn.Module, Tensor], Tensor],
) -> None:
    """`num_classes=0` is timm's way to remove a classifier."""
    net, batch = build_timm(name), images(2, 160)
    found = read_penultimate(net, batch)
    net.reset_classifier(0)
    with torch.inference_mode():
        expected = net(batch)
    assert_relatively_close(found, expected)
    assert_relatively_close(read_penultimate(net, batch), expected)


@pytest.mark.parametrize("name", ["efficientvit_m0", "shvit_s1", "test_convnext"])
def test_a_norm_that_belongs_to_the_classifier_comes_after_it(
    name: str, read_penultimate: Callable[[nn.Module, Tensor], Tensor]
) -> None:
    """As timm has it, and with statistics that change the values, as those of real weights do."""
    net = pytest.importorskip("timm").create_model(name).eval()
    generator = torch.Generator().manual_seed(0)
    for key, value in net.state_dict().items():
        if key.endswith(("running_mean", "running_var")) or "norm" in key:
            value.copy_(torch.rand(value.shape, generator=generator) + 0.5)
    batch = torch.rand(2, *net.pretrained_cfg["input_size"], generator=generator)
    with torch.inference_mode():
        expected = net.forward_head(net.forward_features(batch), pre_logits=True)
    assert_close(read_penultimate(net, batch), expected.flatten(1), rtol=1e-4, atol=1e-5)


class Choosing(nn.Module):
    """Returns the second of two inputs."""

    def forward(self, first: Tensor, second: Tensor) -> Tensor:
        return second


def test_a_module_that_chooses_an_input_is_not_its_first(
    images: Callable[..., Tensor], read_penultimate: Callable[[nn.Module, Tensor], Tensor]
) -> None:
    """The classifier takes what was chosen."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(12, 5), nn.Linear(12, 5)
            self.choose, self.head = Choosing(), nn.Linear(5, 3)

        def forward(self, batch: Tensor) -> Tensor:
            flat = batch.flatten(1)
            return self.head(input=self.choose(self.a(flat), self.b(flat)))

    net, batch = Net().eval(), images(2, 2)
    with torch.inference_mode():
        assert_close(read_penultimate(net, batch), net.b(batch.flatten(1)))


def test_one_value_per_token_is_not_averaged(
    images: Callable[..., Tensor], read_penultimate: Callable[[nn.Module, Tensor], Tensor]
) -> None:
    """Tokens of one value, flattened for the classifier, are as many features."""
    net = nn.Sequential(
        nn.Flatten(2), nn.Conv1d(3, 6, 1), nn.Unflatten(1, (6,)), nn.Linear(16, 1), nn.Flatten(),
        nn.Linear(6, 2),
    ).eval()  # fmt: skip
    batch = images(2, 4)
    assert read_penultimate(net, batch).shape == (2, 6)


def test_weights_are_freed_with_a_network_that_has_several_classifiers() -> None:
    """Without the garbage collector: what reads them is not part of a cycle."""
    net = pytest.importorskip("timm").create_model("deit_tiny_distilled_patch16_224", img_size=32)
    layer = LayerIndex(net, (3, 32, 32)).resolve("penultimate")
    weight = weakref.ref(net.head.weight)
    read = ForwardPass(net, {"penultimate": (layer, lambda output: output)})
    gc.collect()
    gc.disable()
    try:
        del net, read
        assert weight() is None
    finally:
        gc.enable()
