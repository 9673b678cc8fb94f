"""Knows what holds of the layers of a network: their names, their sizes, and how they are read."""

import copy
import functools
import re
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close
from torchvision import models
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.feature_extraction import create_feature_extractor

from deepfeat import LayerNotFoundError, list_backbones
from deepfeat._backbones.find import find_backbone
from deepfeat._backbones.torchvision import known_weights
from deepfeat._layers.index import LayerIndex, ResolvedLayer
from deepfeat._layers.pooling import count_features, pool
from deepfeat._layers.reading import ForwardPass

exactly = functools.partial(assert_close, rtol=0, atol=0)


def read_layers(
    module: nn.Module,
    layers: Sequence[ResolvedLayer],
    batch: Tensor,
    reduce: Callable[[ResolvedLayer, Tensor], Tensor],
) -> dict[str, Tensor]:
    """Read layers of a network for a single batch."""
    return ForwardPass(module, layers, reduce)(batch)


# One small member of each family of torchvision, and a side of input that it takes.
FAMILIES = {
    "alexnet": 64,
    "convnext_tiny": 32,
    "densenet121": 32,
    "efficientnet_b0": 32,
    "efficientnet_v2_s": 32,
    "googlenet": 32,
    "inception_v3": 75,
    "maxvit_t": 224,
    "mnasnet0_5": 32,
    "mobilenet_v2": 32,
    "mobilenet_v3_small": 32,
    "regnet_x_400mf": 32,
    "regnet_y_400mf": 32,
    "resnet18": 32,
    "resnext50_32x4d": 32,
    "wide_resnet50_2": 32,
    "shufflenet_v2_x0_5": 32,
    "squeezenet1_1": 32,
    "swin_t": 64,
    "swin_v2_t": 64,
    "vgg11": 32,
    "vgg11_bn": 32,
    "vit_b_32": 64,
}
GIANTS = ("convnext_large", "efficientnet_v2_l", "regnet_y_128gf", "vit_h_14")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Nets this small run no faster on more, and far slower on a machine that is busy."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@functools.cache
def index_of(name: str) -> LayerIndex:
    """Index a backbone of torchvision as its default weights take it, without any weights."""
    backbone = find_backbone(name)
    return LayerIndex(backbone.skeleton, backbone.preprocessing.input_shape)


def build(name: str, side: int = 32, **options: Any) -> nn.Module:
    """Build a network of torchvision with random weights, for few classes."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if name.startswith(("alexnet", "vgg")):
            return build_narrow(name)
        if name in ("googlenet", "inception_v3"):
            options["init_weights"] = False  # drawing them takes a minute
        if name.startswith("vit"):
            options["image_size"] = side
        return models.get_model(name, weights=None, **{"num_classes": 10, **options}).eval()


def build_narrow(name: str) -> nn.Module:
    """Build an AlexNet or VGG with 16 units in place of 4,096, which take seconds to draw."""
    with torch.device("meta"):
        net = models.get_model(name, weights=None)
    for place, layer in enumerate(net.classifier):
        if isinstance(layer, nn.Linear):
            inputs = layer.in_features if layer.in_features > 4096 else 16
            net.classifier[place] = nn.Linear(inputs, 16)
    net.to_empty(device="cpu")
    for module in net.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    return net.eval()


def images(count: int = 2, side: int = 32, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def as_it_is(_layer: ResolvedLayer, output: Tensor) -> Tensor:
    return output


def read(net: nn.Module, batch: Tensor, *names: str | int) -> list[Tensor]:
    """Read layers of a network by name."""
    index = LayerIndex(net, tuple(batch.shape[1:]))
    layers = [index.resolve(name) for name in names]
    with torch.inference_mode():
        outputs = read_layers(net, layers, batch, as_it_is)
    return [outputs[layer.name] for layer in layers]


def out_of_place(net: nn.Module) -> nn.Module:
    """Copy a network; no module of the copy overwrites its input."""
    net = copy.deepcopy(net)
    for module in net.modules():
        if hasattr(module, "inplace"):
            module.inplace = False
    return net


def capture_by_hooks(net: nn.Module, paths: list[str], batch: Tensor) -> dict[str, Tensor]:
    """Run the whole network and keep a clone of each first output."""
    kept: dict[str, Tensor] = {}

    def keep(path: str, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
        kept.setdefault(path, output.clone())

    hooked = copy.deepcopy(net)
    for path in paths:
        hooked.get_submodule(path).register_forward_hook(functools.partial(keep, path))
    with torch.inference_mode():
        hooked(batch)
    return kept


# Reading ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_reading_gives_what_torchvision_extracts(name: str) -> None:
    """Every layer of every family has the values and the shape that torchvision's tracer gives."""
    side = FAMILIES[name]
    net, batch = build(name, side), images(2 if side < 200 else 1, side)
    index = LayerIndex(copy.deepcopy(net).to("meta"), (3, side, side))
    layers = [index.resolve(entry.name) for entry in index.table if entry.name != "relu8"]
    with torch.inference_mode():
        outputs = read_layers(net, layers, batch, as_it_is)

    still = out_of_place(net)
    paths = {layer.path: layer.name for layer in layers}
    with torch.inference_mode():
        expected = create_feature_extractor(still, paths, suppress_diff_warning=True)(batch)
    if name == "densenet121":
        # Its forward overwrites this one by a function, which the tracer's graph does as well.
        expected |= capture_by_hooks(still, ["features.norm5"], batch)

    assert len(layers) >= 8
    for layer in layers:
        exactly(outputs[layer.name], expected[layer.name])
        output = outputs[layer.name]
        moved = layer.channels_last and output.ndim == 4
        maps = output.movedim(-1, 1) if moved else output
        assert tuple(maps.shape) == (len(batch), *layer.output_shape), layer.name


@pytest.mark.slow
@pytest.mark.parametrize("name", GIANTS)
def test_giants_are_read_like_the_others(name: str) -> None:
    """The largest networks, too, give at each stage what a clone taken in a full pass holds."""
    side = 28 if name == "vit_h_14" else 32
    net, batch = build(name, side), images(1, side)
    index = LayerIndex(net, (3, side, side))
    layers = [index.resolve(layer) for layer in ("stage1", len(index.table) // 2, -2, -1)]
    expected = capture_by_hooks(net, [layer.path for layer in layers], batch)
    with torch.inference_mode():
        outputs = read_layers(net, layers, batch, as_it_is)
    for layer in layers:
        exactly(outputs[layer.name], expected[layer.path])


def test_a_layer_is_read_before_its_relu_overwrites_it() -> None:
    """`conv5_3` and `relu5_3` of one call differ, as do `fc6` and `relu6`: both are as computed."""
    net, batch = build("vgg16"), images()
    conv, relu, fc6, relu6 = read(net, batch, "conv5_3", "relu5_3", "fc6", "relu6")

    still = out_of_place(net)
    with torch.inference_mode():
        expected = still.features[:29](batch)
        pooled = still.avgpool(still.features(batch)).flatten(1)
        expected_fc6 = still.classifier[0](pooled)
    exactly(conv, expected)
    exactly(relu, expected.clamp(min=0))
    exactly(fc6, expected_fc6)
    exactly(relu6, expected_fc6.clamp(min=0))
    assert conv.min() < 0
    assert fc6.min() < 0


def test_the_order_of_asking_does_not_matter() -> None:
    """Layers asked for from the deepest to the first have the values of the other order."""
    net, batch = build("resnet18"), images()
    deep, shallow = read(net, batch, "layer2", "layer1.0.bn1")
    also_shallow, also_deep = read(net, batch, "layer1.0.bn1", "layer2")
    exactly(deep, also_deep)
    exactly(shallow, also_shallow)


def test_the_first_call_of_a_module_is_read() -> None:
    """`layer1.0.relu` is called twice in a residual block; its first output is the one read."""
    net, batch = build("resnet18"), images()
    (relu,) = read(net, batch, "layer1.0.relu")
    still = out_of_place(net)
    block = still.layer1[0]
    with torch.inference_mode():
        before = still.maxpool(still.relu(still.bn1(still.conv1(batch))))
        first = block.relu(block.bn1(block.conv1(before)))
        second = block(before)
    exactly(relu, first)
    with pytest.raises(AssertionError):
        exactly(second, first)


def test_the_first_of_a_tuple_is_read() -> None:
    """Attention gives a tuple of tokens and weights; the tokens are read."""
    net, batch = build("vit_b_32", 64), images(2, 64)
    path = "encoder.layers.encoder_layer_0.self_attention"
    (tokens,) = read(net, batch, path)
    with torch.inference_mode():
        embedded = net._process_input(batch)
        embedded = torch.cat([net.class_token.expand(2, -1, -1), embedded], dim=1)
        block = net.encoder.layers[0]
        normed = block.ln_1(embedded + net.encoder.pos_embedding)
        expected, _ = block.self_attention(normed, normed, normed, need_weights=False)
    exactly(tokens, expected)


def test_reading_stops_after_the_deepest_layer() -> None:
    """Nothing past the deepest layer asked for is run, and nothing before it twice."""
    net, batch = build("resnet18"), images()
    index = LayerIndex(net, (3, 32, 32))
    calls: list[str] = []
    for path, module in net.named_modules():
        module.register_forward_pre_hook(lambda _module, _inputs, path=path: calls.append(path))
    read_layers(net, [index.resolve("layer1"), index.resolve("layer2.0")], batch, as_it_is)
    assert "layer2.0.bn2" in calls
    assert not [path for path in calls if path.startswith(("layer2.1", "layer3", "layer4", "fc"))]
    assert calls.count("layer1.0.conv1") == 1


class Interruption:
    """Ctrl-C before the nth line that a thread runs of the package, or of torch's hooks."""

    FILES = ("reading.py", "trace.py", "cutting.py", "torch/nn/modules/module.py", "hooks.py")

    def __init__(self, line: int):
        self.left = line

    def __enter__(self) -> None:
        sys.settrace(self.trace)

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def trace(self, frame: FrameType, event: str, _argument: Any) -> Any:
        if not frame.f_code.co_filename.endswith(self.FILES):
            return None
        if event == "line":
            self.left -= 1
            if self.left < 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self.trace


@pytest.mark.filterwarnings("ignore:.*:ResourceWarning")
def test_ctrl_c_between_any_two_lines_leaves_nothing_behind() -> None:
    """Neither a hook on the shared network nor a lock: the next read gives what it always did."""
    net, batch = nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(inplace=True)).eval(), images(2, 4)
    layers = [ResolvedLayer(path, path, (3, 4, 4)) for path in ("0", "1")]
    expected = read_layers(net, layers, batch, as_it_is)
    for line in range(10_000):
        try:
            with Interruption(line):
                read_layers(net, layers, batch, as_it_is)
            break
        except KeyboardInterrupt:
            assert_no_hooks(net)
            exactly(net(batch), expected["1"])
    else:
        pytest.fail("always interrupted")
    assert line > 20
    exactly(read_layers(net, layers, batch, as_it_is), expected)


def test_what_is_kept_does_not_hold_the_whole_output() -> None:
    """A row that `reduce` cuts out of an output is a copy, and lets go of the rest."""
    net, batch = build("resnet18"), images(4)
    index = LayerIndex(net, (3, 32, 32))
    outputs = read_layers(net, [index.resolve("relu")], batch, lambda _, output: output[:, 0])
    row = outputs["relu"]
    assert row.untyped_storage().nbytes() == row.numel() * row.element_size()


def test_relu8_is_the_relu_of_fc8() -> None:
    """`relu8` is read at `fc8`, and says that negative values are to be cut off."""
    index = LayerIndex(build("alexnet", 64), (3, 64, 64))
    assert index.resolve("relu8").path == index.resolve("fc8").path
    assert index.resolve("relu8").rectified
    assert not index.resolve("fc8").rectified
    assert index.table[-1].name == "relu8"
    assert index.table[-1].parameters == index.table[-1].multiply_adds == 0


def test_a_module_that_is_not_called_cannot_be_read() -> None:
    """A module outside the forward pass has an error that says so, found or forced."""
    net = build("googlenet")
    index = LayerIndex(net, (3, 32, 32))
    with pytest.raises(LayerNotFoundError, match="GoogLeNet does not call 'aux1'"):
        index.resolve("aux1")
    with pytest.raises(ValueError, match="'aux1' gives no tensor in the forward pass"):
        read_layers(net, [ResolvedLayer("aux1", "aux1", (10,))], images(), as_it_is)
    assert_no_hooks(net)


def test_hooks_are_removed_whatever_happens() -> None:
    """A forward pass or a reduction that raises leaves no hook behind, and raises its own error."""
    net, batch = build("resnet18"), images()
    index = LayerIndex(net, (3, 32, 32))
    layers = [index.resolve("layer1"), index.resolve("fc")]

    def fail(_layer: ResolvedLayer, _output: Tensor) -> Tensor:
        raise ZeroDivisionError("in reduce")

    read_layers(net, layers, batch, as_it_is)
    assert_no_hooks(net)
    with pytest.raises(RuntimeError, match="channels"):
        read_layers(net, layers, batch[:, :1], as_it_is)
    assert_no_hooks(net)
    with pytest.raises(ZeroDivisionError, match="in reduce"):
        read_layers(net, layers, batch, fail)
    assert_no_hooks(net)
    read_layers(net, layers, batch, as_it_is)  # and the lock is free again


def assert_no_hooks(net: nn.Module) -> None:
    for path, module in net.named_modules():
        assert not module._forward_hooks, path
        assert not module._forward_pre_hooks, path


def test_the_network_is_left_as_it_was() -> None:
    """Neither listing nor reading changes weights, buffers, modes, gradients, hooks or device."""
    net, batch = build("resnet18"), images()
    net.train()
    net.layer1.eval()
    net.bn1.weight.requires_grad_(False)
    calls = []
    net.layer2.register_forward_hook(lambda *_: calls.append("mine") and None)
    modes = {path: module.training for path, module in net.named_modules()}
    hooks = {path: dict(module._forward_hooks) for path, module in net.named_modules()}
    state = copy.deepcopy(net.state_dict())
    gradients = {name: weight.requires_grad for name, weight in net.named_parameters()}

    index = LayerIndex(net, (3, 32, 32))
    exactly(net.state_dict(), state)
    net.eval()
    read_layers(net, [index.resolve("layer3")], batch, as_it_is)
    for path, module in net.named_modules():
        assert not module.training, path
        module.training = modes[path]

    exactly(net.state_dict(), state)
    assert {path: dict(module._forward_hooks) for path, module in net.named_modules()} == hooks
    assert {name: weight.requires_grad for name, weight in net.named_parameters()} == gradients
    assert {weight.device.type for weight in net.parameters()} == {"cpu"}


def test_the_batch_is_left_as_it_was() -> None:
    """Reading does not write into the batch, nor share memory with it."""
    net, batch = nn.Sequential(nn.Identity(), nn.Conv2d(3, 4, 3)), images()
    before = batch.clone()
    (output,) = read_layers(net, [ResolvedLayer("0", "0", (3, 32, 32))], batch, as_it_is).values()
    output.zero_()
    exactly(batch, before)


def test_threads_may_read_one_network_at_once() -> None:
    """Several threads that read other layers of one network each get their own values."""
    net = build("squeezenet1_1", 64)
    index = LayerIndex(net, (3, 64, 64))
    names = ["features.3", "features.6", "features.9", "features.12"]
    batches = [images(2, 64, seed) for seed in range(4)]
    expected = [
        read_layers(net, [index.resolve(name)], batch, as_it_is)[name]
        for name, batch in zip(names, batches, strict=True)
    ]
    start = threading.Barrier(4)
    faults: list[str] = []

    def work(name: str, batch: Tensor, right: Tensor) -> None:
        start.wait()
        for _ in range(10):
            try:
                exactly(read_layers(net, [index.resolve(name)], batch, as_it_is)[name], right)
            except Exception as error:
                faults.append(f"{name}: {error}")

    run_in_threads(work, *zip(names, batches, expected, strict=True))
    assert not faults
    assert_no_hooks(net)


def run_in_threads(work: Any, *arguments: tuple[Any, ...]) -> None:
    threads = [threading.Thread(target=work, args=args) for args in arguments]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


# Listing ----------------------------------------------------------------------------------------


def test_there_are_81_backbones() -> None:
    """The laws below go through all classification models of torchvision, and our own."""
    assert len(list_backbones()) == 81
    assert set(FAMILIES) < set(list_backbones())


@pytest.mark.parametrize("name", list_backbones())
def test_the_list_shares_out_all_parameters(name: str) -> None:
    """The parameters of all layers add up to the network's, as torchvision publishes them."""
    expected = sum(weight.numel() for weight in find_backbone(name).skeleton.parameters())
    if name not in ("googlenet", "inception_v3"):  # published without auxiliary classifiers
        assert expected == known_weights(name)["DEFAULT"].meta["num_params"]
    assert sum(layer.parameters for layer in index_of(name).table) == expected


def test_a_containers_own_parameters_count_with_its_first_layer() -> None:
    """The class token with the first layer of all, position embeddings with the first block."""
    net = find_backbone("vit_b_16").skeleton
    layers = {layer.name: layer.parameters for layer in index_of("vit_b_16").table}
    assert layers["conv_proj"] == (3 * 16 * 16 + 1) * 768 + net.class_token.numel()
    first, second = (layers[f"encoder.layers.encoder_layer_{place}"] for place in (0, 1))
    assert first - second == net.encoder.pos_embedding.numel()


def test_auxiliary_classifiers_count_with_the_classifier() -> None:
    """They are no layers of the forward pass, which leaves them out."""
    net = find_backbone("googlenet").skeleton
    *_, last = index_of("googlenet").table
    heads = (net.aux1, net.aux2, net.fc)
    assert last.name == "fc"
    assert last.parameters == sum(w.numel() for head in heads for w in head.parameters())


def test_a_shared_parameter_is_counted_once() -> None:
    """With the first layer that has it."""
    net = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), nn.ReLU(), nn.Conv2d(3, 3, 1, bias=False))
    net[2].weight = net[0].weight
    assert [layer.parameters for layer in LayerIndex(net, (3, 8, 8)).table] == [9, 0, 0]


@pytest.mark.parametrize("name", list_backbones())
def test_multiply_adds_are_those_that_torchvision_publishes(name: str) -> None:
    """The multiply-adds of all layers add up to torchvision's figure, to the last digit of it."""
    total = sum(layer.multiply_adds for layer in index_of(name).table)
    assert round(total / 1e9, 3) == known_weights(name)["DEFAULT"].meta["_ops"]


@pytest.mark.parametrize("name", list_backbones())
def test_names_and_numbers_lead_to_the_same_layers(name: str) -> None:
    """Name, aliases, place from the start and place from the end of a layer mean the same."""
    index = index_of(name)
    count = len(index.table)
    names = [layer.name for layer in index.table]
    assert len(set(names)) == count
    for place, layer in enumerate(index.table):
        here = index.resolve(place)
        assert here == index.resolve(layer.name) == index.resolve(place - count)
        assert here == index.resolve(np.int64(place))
        assert (here.name, here.output_shape) == (layer.name, layer.output_shape)
        for alias in layer.aliases:
            there = index.resolve(alias)
            assert (there.path, there.output_shape) == (here.path, here.output_shape)
            assert there.name == alias
    assert index.resolve(-1).name == names[-1]


def test_the_fully_connected_layers_of_vgg16() -> None:
    """`fc6`, `fc7` and `fc8` of VGG16 have 123,642,856 parameters together."""
    layers = {layer.name: layer for layer in index_of("vgg16").table}
    fc6, fc7, fc8 = (layers[name] for name in ("fc6", "fc7", "fc8"))
    assert fc6.parameters == (512 * 7 * 7 + 1) * 4096
    assert fc6.parameters + fc7.parameters + fc8.parameters == 123_642_856
    assert fc6.multiply_adds == 512 * 7 * 7 * 4096


@pytest.mark.parametrize("batch_norm", ["", "_bn"])
@pytest.mark.parametrize(
    ("depth", "convolutions"),
    # Simonyan and Zisserman (2015), table 1: columns A, B, D, E.
    [(11, (1, 1, 2, 2, 2)), (13, (2, 2, 2, 2, 2)), (16, (2, 2, 3, 3, 3)), (19, (2, 2, 4, 4, 4))],
)
def test_vgg_has_the_names_of_caffe(
    depth: int, convolutions: tuple[int, ...], batch_norm: str
) -> None:
    """VGG's layers are numbered by block and place, as in the paper's Caffe models."""
    expected: list[tuple[str, str, tuple[int, ...]]] = []
    for block, count in enumerate(convolutions, start=1):
        channels, side = min(64 * 2 ** (block - 1), 512), 224 // 2 ** (block - 1)
        for place in range(1, count + 1):
            kinds = [("conv", "Conv2d"), ("bn", "BatchNorm2d"), ("relu", "ReLU")]
            expected += [
                (f"{short}{block}_{place}", kind, (channels, side, side))
                for short, kind in kinds
                if batch_norm or short != "bn"
            ]
        expected.append((f"pool{block}", "MaxPool2d", (channels, side // 2, side // 2)))
    expected.append(("avgpool", "AdaptiveAvgPool2d", (512, 7, 7)))
    for number, width in ((6, 4096), (7, 4096), (8, 1000)):
        expected += [(f"fc{number}", "Linear", (width,)), (f"relu{number}", "ReLU", (width,))]
    table = index_of(f"vgg{depth}{batch_norm}").table
    assert [(layer.name, layer.kind, layer.output_shape) for layer in table] == expected


def test_alexnet_has_the_names_of_caffe() -> None:
    """AlexNet's five convolutions are numbered through; it pools after 1, 2 and 5."""
    names = (
        "conv1 relu1 pool1 conv2 relu2 pool2 conv3 relu3 conv4 relu4 conv5 relu5 pool5 avgpool "
        "fc6 relu6 fc7 relu7 fc8 relu8"
    )
    table = index_of("alexnet").table
    assert [layer.name for layer in table] == names.split()
    assert dict(zip(names.split(), table, strict=True))["pool5"].output_shape == (256, 6, 6)


def test_caffe_names_survive_another_head() -> None:
    """A VGG with layers of its own in the head keeps good names, and gets none made up."""
    net = models.vgg11(init_weights=False)
    net.classifier = nn.Sequential(
        nn.Linear(25088, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2), nn.Softmax(1)
    )
    names = [layer.name for layer in LayerIndex(net, (3, 32, 32)).table]
    assert names[-5:] == ["fc6", "classifier.1", "relu6", "fc7", "classifier.4"]


# From the papers' tables and torchvision's definitions: the end of each resolution but the last
# vectors, as modules. A name stands for all networks that it is a pattern of.
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
    "vit.*": "encoder",
}


@pytest.mark.parametrize("name", list_backbones())
def test_stages_end_before_each_down_sampling(name: str) -> None:
    """`stage1`, `stage2`, ... are the ends of the resolutions that the architecture has."""
    index = index_of(name)
    (ends,) = (ends.split() for pattern, ends in STAGES.items() if re.fullmatch(pattern, name))
    areas = []
    for number, end in enumerate(ends, start=1):
        stage = index.resolve(f"stage{number}")
        assert stage.path == index.resolve(end).path
        areas.append(np.prod(stage.output_shape[1:]))
    assert (np.diff(areas) < 0).all()
    with pytest.raises(LayerNotFoundError):
        index.resolve(f"stage{len(ends) + 1}")


def test_a_stage_of_one_pixel_ends_on_what_is_learned() -> None:
    """ResNet's last maps of 32-pixel images have one pixel; the global pooling is no stage."""
    index = LayerIndex(models.resnet18(weights=None), (3, 32, 32))
    assert index.resolve("layer4").output_shape == (512, 1, 1)
    assert index.resolve("stage5").path == "layer4.1"
    assert [layer.path for layer in index.stages()][-2:] == ["layer4.1", "avgpool"]


def test_modules_called_stage_keep_their_names() -> None:
    """ShuffleNet has modules `stage2` to `stage4`, which are meant by these names."""
    index = index_of("shufflenet_v2_x1_0")
    for number, blocks in ((2, 4), (3, 8), (4, 4)):
        assert index.resolve(f"stage{number}").path == f"stage{number}.{blocks - 1}"
    assert index.resolve("stage1").output_shape == (24, 112, 112)


@pytest.mark.parametrize("name", ["alexnet", "densenet121", "mobilenet_v3_small", "vit_b_32"])
def test_aliases_have_the_values_of_the_layer(name: str) -> None:
    """What is read under an alias, container or module path is bit for bit the same."""
    side = FAMILIES[name]
    net, batch = build(name, side), images(1, side)
    index = LayerIndex(net, (3, side, side))
    for entry in index.table:
        if not entry.aliases or entry.name == "relu8":
            continue
        resolved = [index.resolve(alias) for alias in (entry.name, *entry.aliases)]
        # Read at the module of that name itself, where there is one.
        modules = dict(net.named_modules())
        layers = [
            ResolvedLayer(layer.name, layer.name if layer.name in modules else layer.path, ())
            for layer in resolved
        ]
        with torch.inference_mode():
            first, *others = read_layers(net, layers, batch, as_it_is).values()
        for other in others:
            exactly(other, first)


def test_a_layer_may_lie_inside_a_block() -> None:
    """Any module path can be read, also one that is not in the list."""
    index = index_of("resnet50")
    assert "layer3.1.conv2" not in [layer.name for layer in index.table]
    assert index.resolve("layer3.1.conv2").output_shape == (256, 14, 14)
    assert index.resolve("layer3.1.conv2").path == "layer3.1.conv2"


@pytest.mark.parametrize(
    ("layer", "words"),
    [
        ("conv5_4", "VGG has no layer 'conv5_4'. Close matches: 'conv5_3', 'conv5_2', 'conv5_1'."),
        ("zzz", "VGG has no layer 'zzz'. Its last ones are 'relu7', 'fc8', 'relu8'."),
        ("", "VGG has no layer ''. Its last ones are 'relu7', 'fc8', 'relu8'."),
        (38, "VGG has 38 layers, from -38 to 37; there is no layer 38."),
        (-39, "VGG has 38 layers, from -38 to 37; there is no layer -39."),
    ],
)
def test_a_wrong_name_is_answered_with_the_right_ones(layer: str | int, words: str) -> None:
    """The error tells the network, what was asked for, and what there is."""
    with pytest.raises(LayerNotFoundError) as caught:
        index_of("vgg16").resolve(layer)
    assert str(caught.value) == words
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("layer", [True, False, 1.0, None, b"fc8", ["fc8"], np.bool_(True)])
def test_what_is_no_name_is_refused(layer: Any) -> None:
    """A truth value is no place in the list, nor is a float a number of one."""
    with pytest.raises(TypeError, match="a name or a whole number is expected"):
        index_of("vgg16").resolve(layer)


# Blocks -----------------------------------------------------------------------------------------


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
        ("squeezenet1_1", "stage4", [f"features.{place}" for place in range(8, 13)]),
        # A module of that name comes before a stage.
        ("shufflenet_v2_x0_5", "stage2", ["stage2"]),
        ("vit_b_32", "encoder", ["encoder"]),
        ("vit_b_32", "encoder.layers", ["encoder.layers"]),
    ],
)
def test_a_name_stands_for_a_block(name: str, layer: str | int, paths: list[str]) -> None:
    """Of a container that is all of it, of a stage all layers since the stage before."""
    assert list(index_of(name).block(layer)) == paths


@pytest.mark.parametrize("name", FAMILIES)
def test_stages_share_out_the_layers_of_a_network(name: str) -> None:
    """In order, without a gap, from the first layer to the last stage's last."""
    index = index_of(name)
    stages = [alias for layer in index.table for alias in layer.aliases if alias[:5] == "stage"]
    stages = [stage for stage in stages if stage not in index.calls]
    blocks = [index.block(stage) for stage in stages]
    if stages[:1] == ["stage1"]:
        shared = [path for block in blocks for path in block]
        assert shared == list(index.units[: len(shared)])
    assert all(block[-1] == index.resolve(s).path for s, block in zip(stages, blocks, strict=True))


@pytest.mark.parametrize("layer", ["layer5", "", "layer3.", "stage9", 99])
def test_a_block_that_is_not_there_is_answered_like_a_layer(layer: str | int) -> None:
    """With close matches."""
    with pytest.raises(LayerNotFoundError, match=r"has no layer|there is no layer"):
        index_of("resnet18").block(layer)


@pytest.mark.parametrize("name", FAMILIES)
def test_units_are_the_layers_of_the_list(name: str) -> None:
    """As paths of modules, in the order of computation; `calls` tells of each."""
    index = index_of(name)
    listed = [index.resolve(layer.name).path for layer in index.table if layer.name != "relu8"]
    assert list(index.units) == listed
    places = [list(index.calls).index(path) for path in index.units]
    assert places == sorted(places)
    skeleton = find_backbone(name).skeleton
    for path in index.units:
        kind = type(skeleton.get_submodule(path)).__name__
        assert index.calls[path].kind == kind


@pytest.mark.parametrize("name", ["resnet18", "vgg11_bn", "mobilenet_v2", "vit_b_32"])
def test_calls_tell_of_every_module_that_gives_a_tensor(name: str) -> None:
    """In order of return, as hooks see it."""
    net, batch = build(name, 64), images(1, 64)
    seen: list[str] = []
    for path, module in net.named_modules():
        if path:
            module.register_forward_hook(lambda _m, _i, _o, path=path: seen.append(path))
    with torch.inference_mode():
        net(batch)
    expected = list(dict.fromkeys(seen))
    for module in net.modules():
        module._forward_hooks.clear()
    assert list(LayerIndex(net, (3, 64, 64)).calls) == expected


def test_the_list_prints_as_a_table() -> None:
    """The representation of a list is a table with aligned columns."""
    net = nn.Sequential()
    net.body = nn.Sequential(nn.Conv2d(3, 1000, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Dropout())
    net.fc = nn.Sequential(nn.Flatten(), nn.Linear(49000, 2))
    assert repr(LayerIndex(net, (3, 16, 16)).table) == "\n".join(
        [
            "   name    aliases  kind       output          features  parameters  multiply-adds",
            "0  body.0           Conv2d     1000 x 14 x 14     1,000      28,000      5,292,000",
            "1  body.1  stage1   ReLU       1000 x 14 x 14     1,000           0              0",
            "2  body.2  body     MaxPool2d  1000 x 7 x 7       1,000           0              0",
            "3  fc.1    fc       Linear     2                      2      98,002         98,000",
        ]
    )


def test_the_list_turns_into_a_data_frame() -> None:
    """pandas makes a frame of the list: a row a layer, a column each thing known of it."""
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


def test_tokens_count_their_width_as_features() -> None:
    """Of tokens (N, D) there are D features, and the first one stands for the image in ViT."""
    layer = {layer.name: layer for layer in index_of("vit_b_16").table}["encoder.ln"]
    assert (layer.output_shape, layer.n_features) == ((197, 768), 768)
    assert index_of("vit_b_16").resolve("encoder.ln").class_token
    assert index_of("vit_b_16").resolve("encoder.ln").prefix_tokens == 1
    assert not index_of("vit_b_16").resolve("heads").class_token
    assert not index_of("swin_t").resolve("stage4").class_token


# Channels ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["swin_t", "swin_b", "swin_v2_t", "convnext_tiny", "convnext_base", "maxvit_t"]
)
def test_channels_are_told_from_places(name: str) -> None:
    """In networks that permute inside, each module's first dimension is its own channel count."""
    net = find_backbone(name).skeleton
    index = index_of(name)
    checked = 0
    for path, module in net.named_modules():
        match module:
            case nn.Conv2d():
                channels = module.out_channels
            case nn.BatchNorm2d():
                channels = module.num_features
            case nn.Linear():
                channels = module.out_features
            case nn.LayerNorm():
                channels = module.normalized_shape[0]
            case _:
                continue
        if "cpb_mlp" in path or path.endswith(".qkv") or path.endswith("attn.proj"):
            continue  # not of an image; or not called as modules
        assert index.resolve(path).output_shape[0] == channels, path
        checked += 1
    assert checked > 50


@pytest.mark.parametrize(
    ("name", "widths"),
    [
        ("swin_t", (96, 192, 384, 768)),
        ("swin_v2_b", (128, 256, 512, 1024)),
        ("convnext_small", (96, 192, 384, 768)),
        ("convnext_large", (192, 384, 768, 1536)),
    ],
)
def test_blocks_that_permute_have_the_width_of_the_paper(
    name: str, widths: tuple[int, ...]
) -> None:
    """All blocks of a stage of Swin and ConvNeXt have the published number of channels."""
    for stage, width in zip((1, 3, 5, 7), widths, strict=True):
        blocks = [
            layer for layer in index_of(name).table if layer.name.startswith(f"features.{stage}.")
        ]
        assert {layer.n_features for layer in blocks} == {width}
        assert {layer.output_shape[0] for layer in blocks} == {width}


@pytest.mark.parametrize("kind", ["window", "grid"])
@pytest.mark.parametrize(("block", "width"), [(0, 64), (1, 128), (2, 256), (3, 512)])
def test_partitions_of_maxvit_have_their_channels_last(block: int, width: int, kind: str) -> None:
    """What lies between the partition of a map and its undoing has the channels of the map."""
    index = index_of("maxvit_t")
    path = f"blocks.{block}.layers.1.layers.{kind}_attention"
    parts = ("partition_op", "partition_swap", "attn_layer", "mlp_layer", "departition_swap")
    for part in parts:
        layer = index.resolve(f"{path}.{part}")
        assert (layer.output_shape[0], layer.channels_last) == (width, True), part
    for part in ("", ".departition_op"):
        layer = index.resolve(path + part)
        assert (layer.output_shape[0], layer.channels_last) == (width, False), part


@pytest.mark.parametrize(
    ("name", "path", "shape", "channels_last"),
    [
        ("convnext_tiny", "features.1.0.block.0", (96, 56, 56), False),
        ("convnext_tiny", "features.1.0.block.1", (96, 56, 56), True),
        ("convnext_tiny", "features.1.0.block.4", (384, 56, 56), True),
        ("convnext_tiny", "features.1.0.block.6", (96, 56, 56), False),
        ("swin_t", "features.0.1", (96, 56, 56), True),
        ("swin_t", "features.2", (192, 28, 28), True),
        ("swin_t", "permute", (768, 7, 7), False),
        ("swin_t", "avgpool", (768, 1, 1), False),
        ("maxvit_t", "blocks.0.layers.0.layers.MBconv", (64, 56, 56), False),
    ],
)
def test_permutations_by_modules_are_followed(
    name: str, path: str, shape: tuple[int, ...], channels_last: bool
) -> None:
    """Before a permutation, after it and after its undoing, the layout is known."""
    layer = index_of(name).resolve(path)
    assert (layer.output_shape, layer.channels_last) == (shape, channels_last)


class PermutingBlock(nn.Module):
    """ConvNeXt's block as timm writes it: the permutations are no modules."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, maps: Tensor) -> Tensor:
        places = self.conv(maps).permute(0, 2, 3, 1)
        return maps + self.mlp(self.norm(places)).permute(0, 3, 1, 2)


def test_permutations_by_functions_are_followed() -> None:
    """A block that permutes and permutes back without modules has its channels first again."""
    net = nn.Sequential(nn.Conv2d(3, 5, 4, 4), PermutingBlock(5), nn.AdaptiveAvgPool2d(1))
    index = LayerIndex(net, (3, 32, 32))
    assert [layer.output_shape for layer in index.table] == [(5, 8, 8), (5, 8, 8), (5, 1, 1)]
    inner = index.resolve("1.mlp.0")
    assert (inner.output_shape, inner.channels_last) == ((20, 8, 8), True)


def test_a_convolution_has_its_channels_first_whatever_came_before() -> None:
    """A permutation that was not seen is forgotten at the next module that takes maps."""

    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(5, 6)

        def forward(self, maps: Tensor) -> Tensor:
            return self.linear(maps.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    for follower in (nn.Conv2d(6, 7, 1), nn.BatchNorm2d(6), nn.MaxPool2d(2), nn.AvgPool2d(2)):
        net = nn.Sequential(nn.Conv2d(3, 5, 4, 4), Mixer(), follower)
        layer = LayerIndex(net, (3, 32, 32)).resolve("2")
        assert not layer.channels_last
        assert layer.output_shape[0] in (6, 7)


class MapsLast(nn.Module):
    """Embed patches, and give them as (H, W, C) where they are asked for so (DINOv3's)."""

    def __init__(self, width: int):
        super().__init__()
        self.proj = nn.Conv2d(3, width, 4, 4)
        self.norm = nn.Identity()

    def forward(self, batch: Tensor) -> Tensor:
        return self.norm(self.proj(batch).permute(0, 2, 3, 1))


def test_maps_with_their_channels_last_are_known_layer_by_layer() -> None:
    """By what was done to them, also where no module of theirs says so."""
    net = nn.Sequential(MapsLast(5), nn.Flatten(1, 2), nn.Linear(5, 6), nn.LayerNorm(6))
    index = LayerIndex(net, (3, 16, 32))
    layer, inner = index.resolve("0"), index.resolve("0.norm")
    assert (layer.output_shape, layer.channels_last) == ((5, 4, 8), True)
    assert (inner.output_shape, inner.channels_last) == ((5, 4, 8), True)
    assert not index.resolve("0.proj").channels_last
    assert [entry.n_features for entry in index.table] == [5, 6, 6]
    batch = torch.rand(2, 3, 16, 32)
    (maps,) = read(net.eval(), batch, "0")
    row = pool(layer, maps, "avg")
    with torch.no_grad():
        assert_close(row, net[0].proj(batch).mean((2, 3)))


@pytest.mark.parametrize("after", [(), (nn.ReLU(),), (nn.BatchNorm1d(5), nn.MaxPool1d(2))], ids=len)
def test_a_sequence_has_its_channels_first(after: tuple[nn.Module, ...]) -> None:
    """Conv1d's (C, L) are no tokens: it has C features, which are means over L."""
    net = nn.Sequential(nn.Flatten(2), nn.Conv1d(3, 5, 4, 4), *after).eval()
    index, batch = LayerIndex(net, (3, 8, 8)), images(2, 8)
    layer = index.resolve(-1)
    assert (index.table[-1].n_features, layer.channels_last) == (5, False)
    (output,) = read(net, batch, -1)
    with torch.no_grad():
        assert_close(pool(layer, output, "avg"), net(batch).mean(2))


# Tokens -----------------------------------------------------------------------------------------


class Tokens(nn.Module):
    """Blocks over tokens: some of its own parameters may be put before those of 4 x 4 patches."""

    def __init__(self, *names: str, late: bool = False, by_linear: bool = False):
        super().__init__()
        for name in names:
            shape = (8,) if name == "class_embedding" else (1, 3 if "reg" in name else 1, 8)
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))
        self.names, self.late, self.by_linear = names, late, by_linear
        self.embed = nn.Linear(48, 8) if by_linear else nn.Conv2d(3, 8, 4, 4)
        self.first = nn.Linear(8, 8)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, 8))
        self.second = nn.Linear(8, 8)

    def forward(self, batch: Tensor) -> Tensor:
        if self.by_linear:
            patches = F.pixel_unshuffle(batch, 4).flatten(2).transpose(1, 2)
            tokens = self.embed(patches)
        else:
            tokens = self.embed(batch).flatten(2).transpose(1, 2)
        if self.late:
            return self.second(self.join(self.first(tokens)))
        return self.second(self.first(self.join(tokens)))

    def join(self, tokens: Tensor) -> Tensor:
        own = [self.get_parameter(name).view(1, -1, 8) for name in self.names]
        own = [some.expand(len(tokens), -1, -1) for some in own]
        return torch.cat([*own, tokens], dim=1)


@pytest.mark.parametrize("by_linear", [False, True])
@pytest.mark.parametrize(
    ("names", "count"),
    [
        ((), 0),
        (("class_token",), 1),
        (("cls_token",), 1),
        (("class_embedding",), 1),
        (("cls_token", "dist_token"), 2),
        (("cls_token", "distillation_token"), 2),
        (("cls_token", "reg_token"), 4),
        (("cls_token", "register_tokens"), 4),
        (("cls_token", "storage_tokens"), 2),
        (("reg_token",), 3),
    ],
    ids=str,
)
def test_tokens_before_the_patches_are_left_out(
    names: tuple[str, ...], count: int, by_linear: bool
) -> None:
    """Of a mean over places, whatever they are called; the first may stand for the image."""
    net, batch = Tokens(*names, by_linear=by_linear).eval(), images(2, 16)
    index = LayerIndex(net, (3, 16, 16))
    has_class = any("cl" in name for name in names)
    for name in ("first", "second"):
        layer = index.resolve(name)
        assert (layer.prefix_tokens, layer.class_token) == (count, has_class)
    (tokens,) = read(net, batch, "second")
    with torch.no_grad():
        assert_close(pool(layer, tokens, "avg"), net(batch)[:, -16:].mean(1))


@pytest.mark.parametrize("by_linear", [False, True])
def test_layers_before_the_class_token_have_none(by_linear: bool) -> None:
    """There "cls" is refused, and the first patch counts like any other (CaiT)."""
    net = Tokens("cls_token", late=True, by_linear=by_linear)
    index = LayerIndex(net, (3, 16, 16))
    early, late = index.resolve("first"), index.resolve("second")
    assert (early.prefix_tokens, early.class_token) == (0, False)
    assert (late.prefix_tokens, late.class_token) == (1, True)
    with pytest.raises(ValueError, match="needs a class token, but layer 'first'"):
        count_features(early, "cls")
    assert count_features(late, "cls") == 8


def test_a_count_that_no_grid_explains_is_no_class_token() -> None:
    """Of merged tokens nobody knows which are of patches: all are pooled."""

    class Merging(Tokens):
        def forward(self, batch: Tensor) -> Tensor:
            return self.first(super().forward(batch)[:, ::3])

    index = LayerIndex(Merging("cls_token"), (3, 16, 16))
    net = nn.Sequential(Merging("cls_token"))
    layer = LayerIndex(net, (3, 16, 16)).resolve("0")
    assert layer.output_shape == (6, 8)
    assert (layer.prefix_tokens, layer.class_token) == (0, False)
    assert index.resolve("second").prefix_tokens == 1


# How timm itself tells them apart: the number before the patches of each layer.
TIMM = {
    "deit_tiny_distilled_patch16_224": {"patch_embed": (0, False), "blocks.1": (2, True)},
    "vit_small_patch14_reg4_dinov2": {"patch_embed": (0, False), "blocks.1": (5, True)},
    "vit_small_patch16_dinov3": {"patch_embed": (0, False), "blocks.1": (5, True)},
    "vit_medium_patch16_reg4_gap_256": {"patch_embed": (0, False), "blocks.1": (4, False)},
    "cait_xxs24_224": {"blocks.1": (0, False), "blocks_token_only.1": (0, True), "norm": (1, True)},
    "xcit_nano_12_p16_224": {"blocks.1": (0, False), "cls_attn_blocks.1": (1, True)},
    "crossvit_tiny_240": {"patch_embed.0": (0, False), "blocks.1": (1, True), "norm.1": (1, True)},
    "vit_base_patch16_siglip_224": {"patch_embed": (0, False), "blocks.1": (0, False)},
    "vit_base_patch16_clip_224": {"patch_embed": (0, False), "blocks.1": (1, True)},
    "swin_tiny_patch4_window7_224": {"layers.1": (0, False)},
    "convnext_atto": {"stages.1": (0, False)},
}


@pytest.mark.parametrize("name", TIMM)
def test_tokens_of_timm_are_told_apart(name: str) -> None:
    """Layer by layer, with every parameter shared out."""
    timm = pytest.importorskip("timm")
    side = {"crossvit_tiny_240": 240, "vit_small_patch14_reg4_dinov2": 56}.get(name, 64)
    sized = {} if name.startswith(("cross", "convnext")) else {"img_size": side}
    with torch.device("meta"):
        net = timm.create_model(name, pretrained=False, **sized).eval()
    index = LayerIndex(net, (3, side, side))
    for layer, expected in TIMM[name].items():
        found = index.resolve(layer)
        assert (found.prefix_tokens, found.class_token) == expected, layer
    total = sum(weight.numel() for weight in net.parameters())
    assert sum(layer.parameters for layer in index.table) == total


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "side"),
    [
        ("deit_tiny_distilled_patch16_224", 64),
        ("vit_small_patch14_reg4_dinov2", 56),
        ("vit_small_patch16_dinov3", 64),
        ("vit_medium_patch16_reg4_gap_256", 64),
        ("xcit_nano_12_p16_224", 64),
        ("vit_base_patch16_siglip_224", 64),
        ("swin_tiny_patch4_window7_224", 64),
        ("convnext_atto", 64),
    ],
)
def test_pooled_blocks_are_timms_own_intermediates(name: str, side: int) -> None:
    """`forward_intermediates` gives maps of the patches alone, whatever the network computes in."""
    timm = pytest.importorskip("timm")
    sized = {} if name.startswith("convnext") else {"img_size": side}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = timm.create_model(name, pretrained=False, **sized).eval()
    batch = images(2, side)
    with torch.no_grad():
        maps = net.forward_intermediates(batch, intermediates_only=True, output_fmt="NCHW")
    index = LayerIndex(net, (3, side, side))
    stem = next(stem for stem in ("blocks", "layers", "stages") if hasattr(net, stem))
    layers = [index.resolve(f"{stem}.{place}") for place in range(len(maps))]
    with torch.no_grad():
        rows = read_layers(net, layers, batch, functools.partial(pool, pooling="avg"))
    for layer, expected in zip(layers, maps, strict=True):
        assert_close(rows[layer.name], expected.mean((2, 3)), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "side"),
    [
        ("deit_tiny_distilled_patch16_224", 64),
        ("vit_small_patch14_reg4_dinov2", 56),
        ("vit_small_patch16_dinov3", 64),
        ("cait_xxs24_224", 64),
        ("xcit_nano_12_p16_224", 64),
        ("vit_base_patch16_clip_224", 64),
    ],
)
def test_cls_is_timms_own_class_token(name: str, side: int) -> None:
    """The first of what `forward_features` gives."""
    timm = pytest.importorskip("timm")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = timm.create_model(name, pretrained=False, img_size=side).eval()
    batch, layer = images(2, side), LayerIndex(net, (3, side, side)).resolve("norm")
    assert count_features(layer, "cls") == net.num_features
    with torch.no_grad():
        rows = read_layers(net, [layer], batch, functools.partial(pool, pooling="cls"))
        assert_close(rows["norm"], net.forward_features(batch)[:, 0])


class LearnedQuery(nn.Module):
    """Pool by attention of one query, a parameter that is handed to a module (SigLIP's)."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, 1, 8))
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        query = self.norm(self.query.expand(len(tokens), -1, -1))
        return self.attention(query, tokens, tokens)[0][:, 0]


def test_a_parameter_may_be_handed_to_a_module() -> None:
    """Tracing computes no gradients, and does not ask for any."""
    net = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Flatten(2), Transposing(), LearnedQuery())
    index = LayerIndex(net, (3, 16, 16))
    assert index.table[-1].output_shape == (8,)
    assert all(weight.requires_grad for weight in net.parameters())


class Transposing(nn.Module):
    def forward(self, batch: Tensor) -> Tensor:
        return batch.transpose(1, 2)


# Networks of the user ---------------------------------------------------------------------------


class Doubling(nn.Module):
    """A block that computes, under whatever name."""

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
def test_the_name_of_a_class_decides_nothing(kind: str) -> None:
    """A block of the user is a layer like any other: in the list, in stages, by number."""
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
    """Draw noise in training, and pass on everything otherwise."""

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
def test_what_passes_on_its_input_is_no_layer(idle: nn.Module) -> None:
    """In eval mode, at most viewed in another shape; it can still be read by its path."""
    index = LayerIndex(nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(True), idle), (3, 8, 8))
    assert [layer.name for layer in index.table] == ["0", "1"]
    assert index.resolve("2").path == "2"


def test_what_is_not_called_itself_is_opened() -> None:
    """Blocks in a ModuleDict, and those of a network that is run by another of its methods."""

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


def test_the_layers_of_what_gives_a_dict_are_listed() -> None:
    """A network as torchvision builds it for segmentation."""
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
    assert names[-1] == "net.classifier"


class Encoder(nn.Module):
    """A block with a name that torchvision gives to a container."""

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
    """Modules and functions, one module twice, one never, one that gives a dict."""

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


def test_a_network_of_the_user_is_listed_and_read() -> None:
    """Plain containers are opened, blocks are not; what gives a dict is read inside."""
    net, batch = Mixed(Encoder()).eval(), images()
    index = LayerIndex(net, (3, 32, 32))
    names = ["encoder", "body.0.0", "body.0.1", "body.0.2", "body.1.0", "tail.fc"]
    assert [layer.name for layer in index.table] == names
    (scores, maps) = read(net, batch, "tail.fc", "body.1.0")
    with torch.inference_mode():
        exactly(scores, net(batch)["scores"])
        exactly(maps, net.body[1][0](net.body[0](net.encoder(batch))))
    for silent in ("tail", "unused"):
        with pytest.raises(LayerNotFoundError, match=f"Mixed does not call '{silent}' .* or gets"):
            index.resolve(silent)


@pytest.mark.parametrize("encoder", [Encoder, InPlaceEncoder])
def test_a_container_that_computes_is_no_alias_of_its_end(encoder: type[nn.Module]) -> None:
    """A path means that very module: a sum or a ReLU after the last child is not left out."""
    net, batch = Mixed(encoder()).eval(), images()
    encoded, second = read(net, batch, "encoder", "encoder.second")
    with torch.inference_mode():
        exactly(encoded, net.encoder(batch))
        exactly(second, net.encoder.second(net.encoder.first(batch)))


def test_a_container_that_ends_on_a_second_call_is_no_alias() -> None:
    """A ReLU shared by two places gives `body` its own values, not those of the layer before."""
    net, batch = Mixed(Encoder()).eval(), images()
    body, conv, relu = read(net, batch, "body", "body.1.0", "body.0.2")
    with torch.inference_mode():
        exactly(body, net.body(net.encoder(batch)))
    assert conv.min() < 0
    assert relu.shape[1] == 4


def test_multiply_adds_of_all_calls_are_counted() -> None:
    """A module that is called twice costs twice, and lists its parameters once."""
    conv = nn.Conv2d(3, 3, 1, bias=False)
    (layer,) = LayerIndex(nn.Sequential(conv, conv), (3, 8, 8)).table
    assert (layer.multiply_adds, layer.parameters) == (2 * 9 * 64, 9)


def test_one_number_an_image_is_no_layer() -> None:
    """A module that gives a scalar an image is passed over."""

    class Mean(nn.Module):
        def forward(self, maps: Tensor) -> Tensor:
            return maps.mean((1, 2, 3))

    index = LayerIndex(nn.Sequential(nn.Conv2d(3, 3, 1), Mean()), (3, 8, 8))
    assert [layer.name for layer in index.table] == ["0"]


def test_a_network_without_modules_has_no_layers() -> None:
    """There is nothing to hook into where all is done by functions."""

    class Bare(nn.Module):
        def forward(self, batch: Tensor) -> Tensor:
            return F.relu(batch)

    with pytest.raises(ValueError, match="Bare has no layers"):
        LayerIndex(Bare(), (3, 8, 8))


def test_an_image_that_does_not_fit_is_refused() -> None:
    """Whatever the network raises, the error names it and the shape of the image."""

    class Careless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, batch: Tensor) -> Tensor:
            return {"maps": self.conv(batch)}["map"]

    with pytest.raises(ValueError, match=r"Careless does not take .* \(3, 8, 8\): 'map'"):
        LayerIndex(Careless(), (3, 8, 8))
    with pytest.raises(ValueError, match=r"VGG does not take an image of shape \(3, 16, 16\)"):
        LayerIndex(find_backbone("vgg11").skeleton, (3, 16, 16))


def test_outputs_that_are_not_of_images_are_refused() -> None:
    """Swin's position biases are computed once for all images: they are features of none."""
    net = build("swin_v2_t")
    layer = LayerIndex(net, (3, 32, 32)).resolve("features.1.0.attn.cpb_mlp")
    with pytest.raises(ValueError, match="cpb_mlp' does not give one output per image"):
        read_layers(net, [layer], images(2), as_it_is)


def test_half_precision_and_double_are_traced() -> None:
    """The image that is run through takes the type of the network's weights."""
    for dtype in (torch.bfloat16, torch.float64):
        assert len(LayerIndex(build("squeezenet1_1").to(dtype), (3, 32, 32)).table) == 16


def test_a_list_may_be_made_in_inference_mode() -> None:
    """Tensors without version counters do not disturb the listing."""
    with torch.inference_mode():
        table = LayerIndex(build("squeezenet1_1"), (3, 32, 32)).table
    assert repr(table) == repr(LayerIndex(build("squeezenet1_1"), (3, 32, 32)).table)


def test_random_numbers_are_not_used_up() -> None:
    """Listing and reading leave the global generator where it was."""
    net, batch = build("resnet18"), images()
    state = torch.get_rng_state()
    read(net, batch, "layer1")
    exactly(torch.get_rng_state(), state)


def test_other_threads_do_not_disturb_the_counts() -> None:
    """A network of the same class that runs in another thread is not counted as well."""
    net, batch = build("squeezenet1_1", 64), images(2, 64)
    expected = repr(LayerIndex(net, (3, 64, 64)).table)
    stop = threading.Event()

    def run() -> None:
        with torch.inference_mode():
            while not stop.is_set():
                net(batch)

    other = threading.Thread(target=run)
    other.start()
    try:
        tables = [repr(LayerIndex(net, (3, 64, 64)).table) for _ in range(5)]
    finally:
        stop.set()
        other.join()
    assert set(tables) == {expected}
