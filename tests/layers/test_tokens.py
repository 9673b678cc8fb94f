"""Tokens: which come before the patches, and which represents the image."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.testing import assert_close

from deepfeat._layers.index import LayerIndex
from deepfeat._layers.pooling import PooledLayer, count_features, pool
from deepfeat._layers.reading import ForwardPass


def test_tokens_count_their_width_as_features(index_of: Callable[[str], LayerIndex]) -> None:
    """Tokens (N, D) have D features, and the first token of ViT represents the image."""
    layer = {layer.name: layer for layer in index_of("vit_b_16").table}["encoder.ln"]
    assert (layer.output_shape, layer.n_features) == ((197, 768), 768)
    assert index_of("vit_b_16").resolve("encoder.ln").class_token
    assert index_of("vit_b_16").resolve("encoder.ln").prefix_tokens == 1
    assert not index_of("vit_b_16").resolve("heads").class_token
    assert not index_of("swin_t").resolve("stage4").class_token


class Tokens(nn.Module):
    """Blocks over tokens: those of 4 x 4 patches, after any that are parameters of the network."""

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
        prefix = [self.get_parameter(name).view(1, -1, 8) for name in self.names]
        prefix = [parameter.expand(len(tokens), -1, -1) for parameter in prefix]
        return torch.cat([*prefix, tokens], dim=1)


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
    names: tuple[str, ...],
    count: int,
    by_linear: bool,
    read: Callable[..., list[Tensor]],
    images: Callable[..., Tensor],
) -> None:
    """A mean over positions excludes them, whatever they are called."""
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
    """For these "cls" is refused, and the first patch is like any other (CaiT)."""
    net = Tokens("cls_token", late=True, by_linear=by_linear)
    index = LayerIndex(net, (3, 16, 16))
    early, late = index.resolve("first"), index.resolve("second")
    assert (early.prefix_tokens, early.class_token) == (0, False)
    assert (late.prefix_tokens, late.class_token) == (1, True)
    with pytest.raises(ValueError, match="needs a class token, but layer 'first'"):
        count_features(early, "cls")
    assert count_features(late, "cls") == 8


def test_a_count_that_fits_no_grid_is_not_a_class_token() -> None:
    """Merged tokens cannot be assigned to patches, so all of them are pooled."""

    class Merging(Tokens):
        def forward(self, batch: Tensor) -> Tensor:
            return self.first(super().forward(batch)[:, ::3])

    index = LayerIndex(Merging("cls_token"), (3, 16, 16))
    net = nn.Sequential(Merging("cls_token"))
    layer = LayerIndex(net, (3, 16, 16)).resolve("0")
    assert layer.output_shape == (6, 8)
    assert (layer.prefix_tokens, layer.class_token) == (0, False)
    assert index.resolve("second").prefix_tokens == 1


# From timm's own code: the number of prefix tokens, and whether the first is a class token.
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
def test_prefix_tokens_of_timm_are_found(name: str) -> None:
    """Layer by layer; and every parameter is counted once."""
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
def test_pooled_blocks_are_timms_own_intermediates(
    name: str, side: int, images: Callable[..., Tensor]
) -> None:
    """`forward_intermediates` returns maps of the patches alone, whatever the layout inside."""
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
    layers = [index.resolve(f"{stem}.{number}") for number in range(len(maps))]
    with torch.no_grad():
        wanted = {layer.name: (layer, PooledLayer(layer, "avg").reduce) for layer in layers}
        rows = ForwardPass(net, wanted)(batch)
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
def test_cls_is_timms_own_class_token(name: str, side: int, images: Callable[..., Tensor]) -> None:
    """It is the first token of `forward_features`."""
    timm = pytest.importorskip("timm")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = timm.create_model(name, pretrained=False, img_size=side).eval()
    batch, layer = images(2, side), LayerIndex(net, (3, side, side)).resolve("norm")
    assert count_features(layer, "cls") == net.num_features
    with torch.no_grad():
        rows = ForwardPass(net, {"norm": (layer, PooledLayer(layer, "cls").reduce)})(batch)
        assert_close(rows["norm"], net.forward_features(batch)[:, 0])


class LearnedQuery(nn.Module):
    """Pool by attention with one query, a parameter that is passed to a module (SigLIP)."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, 1, 8))
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        query = self.norm(self.query.expand(len(tokens), -1, -1))
        return self.attention(query, tokens, tokens)[0][:, 0]


def test_a_parameter_may_be_passed_to_a_module() -> None:
    """Tracing neither computes nor requires gradients."""
    net = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.Flatten(2), Transposing(), LearnedQuery())
    index = LayerIndex(net, (3, 16, 16))
    assert index.table[-1].output_shape == (8,)
    assert all(weight.requires_grad for weight in net.parameters())


class Transposing(nn.Module):
    def forward(self, batch: Tensor) -> Tensor:
        return batch.transpose(1, 2)
