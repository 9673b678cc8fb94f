"""The trace: the output of each module, the axis of its channels, and its cost."""

import functools
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from deepfeat._backbones.find import find_backbone
from deepfeat._layers.index import LayerIndex
from deepfeat._layers.pooling import pool

exactly = functools.partial(assert_close, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["resnet18", "vgg11_bn", "mobilenet_v2", "vit_b_32"])
def test_calls_have_every_module_that_returns_a_tensor(
    name: str, build: Callable[..., nn.Module], images: Callable[..., Tensor]
) -> None:
    """In the order in which they return, as seen by hooks."""
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


@pytest.mark.parametrize(
    "name", ["swin_t", "swin_b", "swin_v2_t", "convnext_tiny", "convnext_base", "maxvit_t"]
)
def test_the_channel_axis_is_found(name: str, index_of: Callable[[str], LayerIndex]) -> None:
    """In networks that permute, the first dimension of each module is its number of channels."""
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
            continue  # their output is not of an image, or they are not called as modules
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
    name: str, widths: tuple[int, ...], index_of: Callable[[str], LayerIndex]
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
def test_partitions_of_maxvit_have_their_channels_last(
    block: int, width: int, kind: str, index_of: Callable[[str], LayerIndex]
) -> None:
    """Between the partition of a map and its reversal, the channels are those of the map."""
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
    name: str,
    path: str,
    shape: tuple[int, ...],
    channels_last: bool,
    index_of: Callable[[str], LayerIndex],
) -> None:
    """The layout is known before a permutation, after it and after its reversal."""
    layer = index_of(name).resolve(path)
    assert (layer.output_shape, layer.channels_last) == (shape, channels_last)


class PermutingBlock(nn.Module):
    """ConvNeXt's block as timm writes it: the permutations are not modules."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, maps: Tensor) -> Tensor:
        channels_last = self.conv(maps).permute(0, 2, 3, 1)
        return maps + self.mlp(self.norm(channels_last)).permute(0, 3, 1, 2)


def test_permutations_by_functions_are_followed() -> None:
    """A block that permutes and permutes back without modules has its channels first again."""
    net = nn.Sequential(nn.Conv2d(3, 5, 4, 4), PermutingBlock(5), nn.AdaptiveAvgPool2d(1))
    index = LayerIndex(net, (3, 32, 32))
    assert [layer.output_shape for layer in index.table] == [(5, 8, 8), (5, 8, 8), (5, 1, 1)]
    inner = index.resolve("1.mlp.0")
    assert (inner.output_shape, inner.channels_last) == ((20, 8, 8), True)


def test_a_convolution_has_its_channels_first_whatever_came_before() -> None:
    """Permutations without modules do not affect the next module that takes maps."""

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
    """Embed patches, and return them as (H, W, C), as DINOv3 can."""

    def __init__(self, width: int):
        super().__init__()
        self.proj = nn.Conv2d(3, width, 4, 4)
        self.norm = nn.Identity()

    def forward(self, batch: Tensor) -> Tensor:
        return self.norm(self.proj(batch).permute(0, 2, 3, 1))


def test_maps_with_their_channels_last_are_recognised(
    read: Callable[..., list[Tensor]],
) -> None:
    """By the functions that made them, even if no module reveals it."""
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
def test_a_sequence_has_its_channels_first(
    after: tuple[nn.Module, ...], read: Callable[..., list[Tensor]], images: Callable[..., Tensor]
) -> None:
    """The (C, L) of a Conv1d are not tokens: it has C features, which are means over L."""
    net = nn.Sequential(nn.Flatten(2), nn.Conv1d(3, 5, 4, 4), *after).eval()
    index, batch = LayerIndex(net, (3, 8, 8)), images(2, 8)
    layer = index.resolve(-1)
    assert (index.table[-1].n_features, layer.channels_last) == (5, False)
    (output,) = read(net, batch, -1)
    with torch.no_grad():
        assert_close(pool(layer, output, "avg"), net(batch).mean(2))


def test_multiply_adds_of_all_calls_are_counted() -> None:
    """A module that is called twice costs twice as much, but its parameters count once."""
    conv = nn.Conv2d(3, 3, 1, bias=False)
    layer = LayerIndex(nn.Sequential(conv, conv), (3, 8, 8)).table[0]
    assert (layer.multiply_adds, layer.parameters) == (2 * 9 * 64, 9)


def test_a_module_that_returns_one_number_per_image_is_not_a_layer() -> None:
    """It is not listed."""

    class Mean(nn.Module):
        def forward(self, maps: Tensor) -> Tensor:
            return maps.mean((1, 2, 3))

    index = LayerIndex(nn.Sequential(nn.Conv2d(3, 3, 1), Mean()), (3, 8, 8))
    assert [layer.name for layer in index.table] == ["0"]


def test_a_network_without_modules_has_no_layers() -> None:
    """A network of functions has no module to attach hooks to."""

    class Bare(nn.Module):
        def forward(self, batch: Tensor) -> Tensor:
            return F.relu(batch)

    with pytest.raises(ValueError, match="Bare has no layers"):
        LayerIndex(Bare(), (3, 8, 8))


def test_an_image_that_does_not_fit_is_refused() -> None:
    """Whatever the network raises, the error gives its name and the shape of the image."""

    class Careless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, batch: Tensor) -> Tensor:
            return {"maps": self.conv(batch)}["map"]

    with pytest.raises(ValueError, match=r"Careless does not accept .* \(3, 8, 8\): 'map'"):
        LayerIndex(Careless(), (3, 8, 8))
    with pytest.raises(ValueError, match=r"VGG does not accept an image of shape \(3, 16, 16\)"):
        LayerIndex(find_backbone("vgg11").skeleton, (3, 16, 16))


def test_half_precision_and_double_are_traced(build: Callable[..., nn.Module]) -> None:
    """The image that is traced has the dtype of the network's weights."""
    for dtype in (torch.bfloat16, torch.float64):
        assert len(LayerIndex(build("squeezenet1_1").to(dtype), (3, 32, 32)).table) == 16


def test_a_list_may_be_made_in_inference_mode(build: Callable[..., nn.Module]) -> None:
    """Tensors without version counters do not disturb the listing."""
    with torch.inference_mode():
        table = LayerIndex(build("squeezenet1_1"), (3, 32, 32)).table
    assert repr(table) == repr(LayerIndex(build("squeezenet1_1"), (3, 32, 32)).table)


def test_the_random_state_does_not_change(
    read: Callable[..., list[Tensor]],
    build: Callable[..., nn.Module],
    images: Callable[..., Tensor],
) -> None:
    """Neither listing nor reading advances the global generator."""
    net, batch = build("resnet18"), images()
    state = torch.get_rng_state()
    read(net, batch, "layer1")
    exactly(torch.get_rng_state(), state)


def test_other_threads_do_not_disturb_the_counts(
    build: Callable[..., nn.Module], images: Callable[..., Tensor]
) -> None:
    """A network that runs in another thread meanwhile is not counted."""
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
