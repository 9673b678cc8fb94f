"""Reading of layers: the values are those of the network, which does not change."""

import copy
import functools
import sys
import threading
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close
from torchvision.models.feature_extraction import create_feature_extractor

from deepfeat import LayerNotFoundError
from deepfeat._layers.index import LayerIndex, ResolvedLayer
from deepfeat._layers.reading import ForwardPass

exactly = functools.partial(assert_close, rtol=0, atol=0)


def read_layers(
    module: nn.Module,
    layers: Sequence[ResolvedLayer],
    batch: Tensor,
    reduce: Callable[[ResolvedLayer, Tensor], Tensor],
) -> dict[str, Tensor]:
    """Read layers of a network once."""
    wanted = {layer.name: (layer, functools.partial(reduce, layer)) for layer in layers}
    return ForwardPass(module, wanted)(batch)


GIANTS = ("convnext_large", "efficientnet_v2_l", "regnet_y_128gf", "vit_h_14")


def as_it_is(_layer: ResolvedLayer, output: Tensor) -> Tensor:
    return output


def out_of_place(net: nn.Module) -> nn.Module:
    """Copy a network; no module of the copy overwrites its input."""
    net = copy.deepcopy(net)
    for module in net.modules():
        if hasattr(module, "inplace"):
            module.inplace = False
    return net


def test_reading_gives_what_torchvision_extracts(
    family: str,
    side: int,
    build: Callable[..., nn.Module],
    images: Callable[..., Tensor],
    capture_by_hooks: Callable[..., dict[str, Tensor]],
) -> None:
    """Every layer of every family has the values and the shape of torchvision's tracer."""
    net, batch = build(family, side), images(2 if side < 200 else 1, side)
    index = LayerIndex(copy.deepcopy(net).to("meta"), (3, side, side))
    apart = ("relu8", "penultimate")
    layers = [index.resolve(entry.name) for entry in index.table if entry.name not in apart]
    with torch.inference_mode():
        outputs = read_layers(net, layers, batch, as_it_is)

    still = out_of_place(net)
    paths = {layer.path: layer.name for layer in layers}
    with torch.inference_mode():
        expected = create_feature_extractor(still, paths, suppress_diff_warning=True)(batch)
    if family == "densenet121":
        # Its forward overwrites this output with a function, and so does the tracer's graph.
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
def test_giants_are_read_like_the_others(
    name: str,
    build: Callable[..., nn.Module],
    images: Callable[..., Tensor],
    capture_by_hooks: Callable[..., dict[str, Tensor]],
) -> None:
    """The largest networks, too, have the values of clones taken in a full pass."""
    side = 28 if name == "vit_h_14" else 32
    net, batch = build(name, side), images(1, side)
    index = LayerIndex(net, (3, side, side))
    layers = [index.resolve(layer) for layer in ("stage1", len(index.table) // 2, -2, -1)]
    expected = capture_by_hooks(net, [layer.path for layer in layers], batch)
    with torch.inference_mode():
        outputs = read_layers(net, layers, batch, as_it_is)
    for layer in layers:
        exactly(outputs[layer.name], expected[layer.path])


def test_a_layer_is_read_before_its_relu_overwrites_it(
    read: Callable[..., list[Tensor]],
    build: Callable[..., nn.Module],
    images: Callable[..., Tensor],
) -> None:
    """`conv5_3` and `relu5_3` of one pass differ, as do `fc6` and `relu6`: all are as computed."""
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


def test_the_order_of_layers_does_not_matter(
    read: Callable[..., list[Tensor]],
    build: Callable[..., nn.Module],
    images: Callable[..., Tensor],
) -> None:
    """Layers from the deepest to the first have the same values as in the opposite order."""
    net, batch = build("resnet18"), images()
    deep, shallow = read(net, batch, "layer2", "layer1.0.bn1")
    also_shallow, also_deep = read(net, batch, "layer1.0.bn1", "layer2")
    exactly(deep, also_deep)
    exactly(shallow, also_shallow)


def test_the_first_call_of_a_module_is_read(
    read: Callable[..., list[Tensor]],
    build: Callable[..., nn.Module],
    images: Callable[..., Tensor],
) -> None:
    """`layer1.0.relu` is called twice in a residual block; its first output is read."""
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


def test_the_first_element_of_a_tuple_is_read(
    read: Callable[..., list[Tensor]],
    build: Callable[..., nn.Module],
    images: Callable[..., Tensor],
) -> None:
    """Attention returns a tuple of tokens and weights; the tokens are read."""
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


def test_reading_stops_after_the_deepest_layer(
    build: Callable[..., nn.Module], images: Callable[..., Tensor]
) -> None:
    """Nothing after the deepest requested layer is run, and nothing before it runs twice."""
    net, batch = build("resnet18"), images()
    index = LayerIndex(net, (3, 32, 32))
    calls: list[str] = []
    for path, module in net.named_modules():
        module.register_forward_pre_hook(lambda _module, _inputs, path=path: calls.append(path))
    read_layers(net, [index.resolve("layer1"), index.resolve("layer2.0")], batch, as_it_is)
    assert "layer2.0.bn2" in calls
    assert not [path for path in calls if path.startswith(("layer2.1", "layer3", "layer4", "fc"))]
    assert calls.count("layer1.0.conv1") == 1


@pytest.mark.parametrize(
    ("name", "side", "layers"),
    [
        ("resnet18", 32, ("relu", "layer1", "layer2.0.conv1")),
        ("vgg11", 32, ("conv1_1", "conv2_1")),  # the ReLUs after them work in place
        ("vit_b_32", 64, ("encoder.ln", 1)),
    ],
)
def test_a_pass_that_does_not_stop_gives_the_same(
    name: str,
    side: int,
    layers: tuple[str | int, ...],
    build: Callable[..., nn.Module],
    images: Callable[..., Tensor],
) -> None:
    """The rest of the network is run, overwrites nothing that was read, and is ignored."""
    net, batch = build(name, side), images(2, side)
    index = LayerIndex(net, (3, side, side))
    wanted = {layer.name: (layer, lambda output: output) for layer in map(index.resolve, layers)}
    calls: list[str] = []
    for path, module in net.named_modules():
        module.register_forward_hook(
            lambda _module, _inputs, _output, path=path: calls.append(path)
        )
    with torch.inference_mode():
        expected = ForwardPass(net, wanted)(batch)
        assert "" not in calls
        found = ForwardPass(net, wanted, stops=False)(batch)
    assert calls.count("") == 1
    exactly(found, expected)


class Interruption:
    """Ctrl-C before the nth line of the package, or of torch's hooks, that a thread runs."""

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
def test_ctrl_c_between_any_two_lines_leaves_nothing_behind(images: Callable[..., Tensor]) -> None:
    """Neither a hook on the shared network nor a lock: the next pass has the same values."""
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


def test_a_reduced_output_does_not_keep_the_whole_output_alive(
    build: Callable[..., nn.Module], images: Callable[..., Tensor]
) -> None:
    """A slice that `reduce` takes from an output is copied, so that the rest can be freed."""
    net, batch = build("resnet18"), images(4)
    index = LayerIndex(net, (3, 32, 32))
    outputs = read_layers(net, [index.resolve("relu")], batch, lambda _, output: output[:, 0])
    row = outputs["relu"]
    assert row.untyped_storage().nbytes() == row.numel() * row.element_size()


def test_relu8_is_the_relu_of_fc8(build: Callable[..., nn.Module]) -> None:
    """`relu8` is read from `fc8`, and marked as rectified."""
    index = LayerIndex(build("alexnet", 64), (3, 64, 64))
    assert index.resolve("relu8").path == index.resolve("fc8").path
    assert index.resolve("relu8").rectified
    assert not index.resolve("fc8").rectified
    assert index.table[-1].name == "relu8"
    assert index.table[-1].parameters == index.table[-1].multiply_adds == 0


def test_a_module_that_is_not_called_cannot_be_read(
    build: Callable[..., nn.Module], images: Callable[..., Tensor]
) -> None:
    """A module outside the forward pass raises, both when it is resolved and when it is read."""
    net = build("googlenet")
    index = LayerIndex(net, (3, 32, 32))
    with pytest.raises(LayerNotFoundError, match="GoogLeNet does not call 'aux1'"):
        index.resolve("aux1")
    with pytest.raises(ValueError, match="'aux1' does not return a tensor in the forward pass"):
        read_layers(net, [ResolvedLayer("aux1", "aux1", (10,))], images(), as_it_is)
    assert_no_hooks(net)


def test_no_hook_is_left_behind(
    build: Callable[..., nn.Module], images: Callable[..., Tensor]
) -> None:
    """A forward pass or a reduction that fails leaves no hook, and raises its own error."""
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


def test_the_network_is_left_as_it_was(
    build: Callable[..., nn.Module], images: Callable[..., Tensor]
) -> None:
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


def test_the_batch_is_left_as_it_was(images: Callable[..., Tensor]) -> None:
    """Reading does not write into the batch, nor share memory with it."""
    net, batch = nn.Sequential(nn.Identity(), nn.Conv2d(3, 4, 3)), images()
    before = batch.clone()
    (output,) = read_layers(net, [ResolvedLayer("0", "0", (3, 32, 32))], batch, as_it_is).values()
    output.zero_()
    exactly(batch, before)


def test_threads_may_read_one_network_at_once(
    build: Callable[..., nn.Module], images: Callable[..., Tensor]
) -> None:
    """Threads that read different layers of one network get the right values."""
    net = build("squeezenet1_1", 64)
    index = LayerIndex(net, (3, 64, 64))
    names = ["features.3", "features.6", "features.9", "features.12"]
    batches = [images(2, 64, seed) for seed in range(4)]
    expected = [
        read_layers(net, [index.resolve(name)], batch, as_it_is)[name]
        for name, batch in zip(names, batches, strict=True)
    ]
    start = threading.Barrier(4)
    failures: list[str] = []

    def work(name: str, batch: Tensor, expected: Tensor) -> None:
        start.wait()
        for _ in range(10):
            try:
                exactly(read_layers(net, [index.resolve(name)], batch, as_it_is)[name], expected)
            except Exception as error:
                failures.append(f"{name}: {error}")

    run_in_threads(work, *zip(names, batches, expected, strict=True))
    assert not failures
    assert_no_hooks(net)


def run_in_threads(work: Any, *arguments: tuple[Any, ...]) -> None:
    threads = [threading.Thread(target=work, args=args) for args in arguments]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@pytest.mark.parametrize(
    ("name", "side"),
    [("alexnet", 64), ("densenet121", 32), ("mobilenet_v3_small", 32), ("vit_b_32", 64)],
)
def test_aliases_have_the_values_of_the_layer(
    name: str, side: int, build: Callable[..., nn.Module], images: Callable[..., Tensor]
) -> None:
    """An alias, a container and a module path have bit for bit the same values."""
    net, batch = build(name, side), images(1, side)
    index = LayerIndex(net, (3, side, side))
    for entry in index.table:
        if not entry.aliases or entry.name == "relu8":
            continue
        resolved = [index.resolve(alias) for alias in (entry.name, *entry.aliases)]
        # Read from the module of that name itself, if there is one.
        modules = dict(net.named_modules())
        layers = [
            ResolvedLayer(layer.name, layer.name if layer.name in modules else layer.path, ())
            for layer in resolved
        ]
        with torch.inference_mode():
            first, *others = read_layers(net, layers, batch, as_it_is).values()
        for other in others:
            exactly(other, first)


def test_outputs_that_do_not_belong_to_images_are_refused(
    build: Callable[..., nn.Module], images: Callable[..., Tensor]
) -> None:
    """Swin's position biases are computed once for all images, so they are not features."""
    net = build("swin_v2_t")
    layer = LayerIndex(net, (3, 32, 32)).resolve("features.1.0.attn.cpb_mlp")
    with pytest.raises(ValueError, match="cpb_mlp' does not return one output per image"):
        read_layers(net, [layer], images(2), as_it_is)
