"""Layers of timm's networks: their values, their stages and their tokens are timm's own."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from deepfeat._layers.index import LayerIndex
from deepfeat._layers.pooling import PooledLayer, Pooling, count_features
from deepfeat._layers.reading import ForwardPass


@pytest.fixture
def noise() -> Callable[[nn.Module], Tensor]:
    """Draw a batch of the size that a network of timm is made for."""

    def noise(net: nn.Module) -> Tensor:
        shape = net.pretrained_cfg["input_size"]
        return torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))

    return noise


def assert_relatively_close(found: Tensor, expected: Tensor) -> None:
    """Raise unless all values are equal up to 1e-5 of the largest."""
    scale = expected.abs().max().clamp(min=1e-30)
    assert_close(found / scale, expected / scale, rtol=0, atol=1e-5)


def read_pooled(net: nn.Module, batch: Tensor, pooling: Pooling, *names: str) -> dict[str, Tensor]:
    """Read layers of a network once, and pool them."""
    index = LayerIndex(net, tuple(batch.shape[1:]))
    layers = {name: index.resolve(name) for name in names}
    wanted = {name: (layer, PooledLayer(layer, pooling).reduce) for name, layer in layers.items()}
    with torch.inference_mode():
        return ForwardPass(net, wanted)(batch)


def test_every_listed_layer_has_the_values_of_its_module(
    name_in_timm: str,
    build_timm: Callable[..., nn.Module],
    noise: Callable[[nn.Module], Tensor],
    capture_by_hooks: Callable[..., dict[str, Tensor]],
) -> None:
    """All layers of one pass are those that plain hooks see, and have the shape that is listed."""
    net = build_timm(name_in_timm)
    batch = noise(net)
    index = LayerIndex(copy.deepcopy(net).to("meta"), tuple(batch.shape[1:]))
    layers = [index.resolve(entry.name) for entry in index.table]
    layers = [layer for layer in layers if layer.reads == "output" and layer.path]
    wanted = {layer.name: (layer, lambda output: output) for layer in layers}
    expected = capture_by_hooks(net, {layer.path for layer in layers}, batch)
    for layer in list(layers):
        if len(expected[layer.path]) != len(batch):  # one output per patch (TNT)
            layers.remove(layer)
            alone = {layer.name: wanted.pop(layer.name)}
            with pytest.raises(ValueError, match="does not return one output per image"):
                ForwardPass(net, alone)(batch)
    with torch.inference_mode():
        outputs = ForwardPass(net, wanted)(batch)

    assert len(layers) >= 5
    for layer in layers:
        found = outputs[layer.name]
        assert_relatively_close(found, expected[layer.path])
        moved = layer.channels_last and found.ndim == 4
        shape = tuple((found.movedim(-1, 1) if moved else found).shape)
        assert shape == (len(batch), *layer.output_shape), layer.name


# Networks whose feature_info is of no use, and why; their stages are found from the resolution.
WITHOUT_STAGES = {
    "coat_tiny": "it names a list of blocks, three times",
    "crossvit_tiny_240": "it names blocks of two branches, once for each",
    "hrnet_w18_small": "it names a stage that does not exist",
    "mvitv2_tiny": "it names modules that do not exist",
    "tresnet_m": "it does not name the module of the first stage",
    "twins_svt_small": "it names modules that do not exist",
}


def test_stages_are_those_that_timm_declares(
    name_in_timm: str,
    build_timm: Callable[..., nn.Module],
    noise: Callable[[nn.Module], Tensor],
    capture_by_hooks: Callable[..., dict[str, Tensor]],
) -> None:
    """The modules of `feature_info`, in the order of computation."""
    if name_in_timm in WITHOUT_STAGES:
        pytest.skip(WITHOUT_STAGES[name_in_timm])
    net = build_timm(name_in_timm)
    batch = noise(net)
    declared = [entry["module"] for entry in net.feature_info]
    index = LayerIndex(copy.deepcopy(net).to("meta"), tuple(batch.shape[1:]))
    stages = [index.resolve(f"stage{number}") for number in range(1, len(declared) + 1)]
    assert index.last_stage == f"stage{len(declared)}"
    expected = capture_by_hooks(net, set(declared), batch)
    outputs = capture_by_hooks(net, {stage.path for stage in stages}, batch)
    for stage, path in zip(stages, declared, strict=True):
        assert_close(outputs[stage.path], expected[path], rtol=0, atol=0)
        index.resolve(path)


# With a class token or without, registers, a distillation token, blocks of two kinds.
OF_TOKENS = {
    "test_vit": 64,
    "test_vit2": 64,
    "test_vit3": 64,
    "test_vit_relpos": 160,
    "deit_tiny_distilled_patch16_224": 64,
    "vit_small_patch14_reg4_dinov2": 56,
    "vit_tiny_patch16_dinov3_qkvb": 64,
    "beit_base_patch16_224": 64,
    "vit_medium_patch16_reg4_gap_256": 64,
}
QUICK = ("test_vit", "test_vit2", "test_vit3", "test_vit_relpos")


@pytest.fixture(
    params=[
        pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in OF_TOKENS
    ]
)
def net_of_tokens(
    request: pytest.FixtureRequest, build_timm: Callable[..., nn.Module]
) -> nn.Module:
    """Networks whose blocks return tokens."""
    side = OF_TOKENS[request.param]
    sized = {} if side == 160 else {"img_size": side}
    net = build_timm(request.param, **sized)
    net.side = side
    with torch.no_grad():  # prefix tokens that a wrong mean would notice
        for name, value in net.named_parameters():
            if "token" in name:
                value.add_(5.0)
    return net


def test_the_class_token_of_a_block_is_timms_own(
    net_of_tokens: nn.Module, images: Callable[..., Tensor]
) -> None:
    """Not a register and not a patch; networks without one refuse it."""
    batch = images(2, net_of_tokens.side)
    names = [f"blocks.{number}" for number in range(len(net_of_tokens.blocks))]
    if getattr(net_of_tokens, "cls_token", None) is None:
        layer = LayerIndex(net_of_tokens, tuple(batch.shape[1:])).resolve("blocks.1")
        with pytest.raises(ValueError, match=r"needs a class token, but layer 'blocks\.1'"):
            count_features(layer, "cls")
        return
    rows = read_pooled(net_of_tokens, batch, "cls", *names)
    with torch.inference_mode():
        pairs = net_of_tokens.forward_intermediates(
            batch, intermediates_only=True, return_prefix_tokens=True
        )
    for name, (_, prefix) in zip(names, pairs, strict=True):
        assert_relatively_close(rows[name], prefix[:, 0])


@pytest.mark.parametrize("pooling", ["avg", "max"])
def test_the_norm_is_pooled_over_patches_alone(
    pooling: Pooling, net_of_tokens: nn.Module, images: Callable[..., Tensor]
) -> None:
    """As timm's maps of the last block after the norm, which have no prefix tokens."""
    batch = images(2, net_of_tokens.side)
    last = f"blocks.{len(net_of_tokens.blocks) - 1}"
    rows = read_pooled(net_of_tokens, batch, pooling, last, "norm")
    for name, norm in ((last, False), ("norm", True)):
        with torch.inference_mode():
            (maps,) = net_of_tokens.forward_intermediates(
                batch, indices=1, norm=norm, intermediates_only=True, output_fmt="NCHW"
            )
        expected = maps.mean((2, 3)) if pooling == "avg" else maps.amax((2, 3))
        assert_relatively_close(rows[name], expected)
