"""`transform_maps`: the output of a layer at each position, as torchvision and timm give it."""

import numpy as np
import pytest
import timm
import torch
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image
from torch import nn
from torchvision import models
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.transforms import functional as F

from deepfeat import DeepFeatureExtractor, FeatureCache, LayerNotFoundError
from deepfeat._backbones.resnet10_slim import SlimResNet

VIT = "timm/test_vit.r160_in1k"


class To:
    """Preprocessing to a size (H, W)."""

    def __init__(self, *size):
        self.size = size

    def __call__(self, image):
        return F.to_tensor(F.resize(image, self.size)) * 4 - 2


def make(backbone="resnet10_slim", layer="layer2", **params):
    """Make a fast extractor; random weights unless it is told others."""
    fast = {"num_workers": 0, "cache": None}
    if isinstance(backbone, str):
        fast |= {"weights": None, "image_size": 32}
    return DeepFeatureExtractor(backbone, layer, **fast | params)


def black_to_8(image):
    return F.to_tensor(F.resize(image, (8, 8)))


class ByProportions:
    """Preprocessing whose size depends on the image, with as many patches for each."""

    def __call__(self, image):
        return F.to_tensor(F.resize(image, (64, 64) if image.width == image.height else (32, 128)))


class ToOnePixel:
    """Preprocessing that leaves one pixel of a picture that is not square."""

    def __call__(self, image):
        return F.to_tensor(image if image.width == image.height else F.resize(image, (1, 1)))


def stack(pictures, preprocessing):
    return torch.stack([preprocessing(Image.fromarray(pixels)) for pixels in pictures])


def assert_relatively_close(found, expected, tolerance=1e-5):
    """Raise unless all values are equal up to a fraction of the largest."""
    assert_allclose(found, expected, rtol=0, atol=tolerance * np.abs(expected).max())


# Values -------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("pillow_resizes")
@pytest.mark.parametrize(
    ("name", "layer", "node"),
    [
        ("squeezenet1_1", "features.0", "features.0"),
        ("squeezenet1_1", "stage2", "features.4"),
        ("squeezenet1_1", "features.4.expand3x3", "features.4.expand3x3"),
        ("resnet18", "layer2.0.conv1", "layer2.0.conv1"),
        ("resnet18", "avgpool", "avgpool"),
        ("alexnet", "conv5", "features.10"),
        ("swin_t", "features.1", "features.1"),
    ],
)
def test_maps_are_those_of_torchvision(name, layer, node, pictures):
    """Unpooled and without norm; channels first, also where the network has them last."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = models.get_model(name, weights=None).eval()
    preprocess = models.get_model_weights(name)["DEFAULT"].transforms()
    batch = stack(pictures[:3], preprocess)
    read = create_feature_extractor(net, {node: "maps"}, suppress_diff_warning=True)
    with torch.inference_mode():
        expected = read(batch)["maps"]
    expected = expected.movedim(-1, 1) if name == "swin_t" else expected
    found = make(name, layer, image_size=None, batch_size=2).transform_maps(pictures[:3])
    assert found.dtype == np.float32
    assert_relatively_close(found, expected.numpy())


# The side of images, and a layer whose stages are read.
OF_TIMM = {
    "test_vit": (64, "blocks"),
    "test_vit3": (64, "blocks"),
    "test_convnext": (64, "stages"),
    "test_maxvit": (160, "stages"),
    "vit_small_patch14_reg4_dinov2": (56, "blocks"),
    "swin_tiny_patch4_window7_224": (64, "layers"),
    "vit_tiny_patch16_dinov3_qkvb": (64, "blocks"),
    "deit_tiny_distilled_patch16_224": (64, "blocks"),
    "beit_base_patch16_224": (64, "blocks"),
    "pvt_v2_b0": (64, "stages"),
    "davit_tiny": (64, "stages"),
}
QUICK = ("test_vit", "test_vit3", "test_convnext", "swin_tiny_patch4_window7_224")


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in OF_TIMM]
)
def test_maps_are_timms_own_intermediates(name, draw_timm, pictures):
    """Tokens of patches lie where their patches do, without those before them."""
    side, stem = OF_TIMM[name]
    is_sized = timm.get_pretrained_cfg(name).fixed_input_size and side != 160
    net = draw_timm(name, **({"img_size": side} if is_sized else {}))
    batch = stack(pictures[:2], To(side, side))
    with torch.inference_mode():
        maps = net.forward_intermediates(batch, intermediates_only=True, output_fmt="NCHW")
    offset = 1 if name == "test_maxvit" else 0  # its stem comes first
    for number in (0, len(maps) - 1 - offset):
        extractor = make(net, f"{stem}.{number}", preprocessing=To(side, side))
        expected = maps[number + offset].numpy()
        assert_relatively_close(extractor.transform_maps(pictures[:2]), expected)


@pytest.mark.usefixtures("pillow_resizes")
def test_maps_of_a_named_backbone_of_timm_are_its_own(write_timm, pictures):
    """Prepared as timm does it, with position embeddings for the size of images."""
    net, path = write_timm("test_vit")
    config = timm.data.resolve_data_config(model=net) | {"input_size": (3, 64, 64)}
    batch = stack(pictures[:4], timm.data.create_transform(**config))
    sized = timm.create_model(
        "test_vit", pretrained=True, pretrained_cfg_overlay={"file": str(path)}, img_size=64
    ).eval()
    with torch.inference_mode():
        (expected,) = sized.forward_intermediates(batch, indices=[3], intermediates_only=True)
    extractor = make(VIT, "blocks.3", weights=path, image_size=64)
    assert_relatively_close(extractor.transform_maps(pictures[:4]), expected.numpy())


@pytest.mark.parametrize("size", [(32, 96), (96, 32), (64, 48)], ids=str)
@pytest.mark.parametrize("layer", ["patch_embed", "blocks.2", "norm"])
def test_the_grid_of_images_that_are_not_square_is_not_turned(size, layer, draw_timm, pictures):
    """Rows of patches stay rows."""
    net = draw_timm("test_vit", img_size=size)
    batch = stack(pictures[:2], To(*size))
    with torch.inference_mode():
        if layer == "patch_embed":
            expected = net.patch_embed.proj(batch)
        else:
            index = [2] if layer == "blocks.2" else 1
            (expected,) = net.forward_intermediates(
                batch, indices=index, norm=layer == "norm", intermediates_only=True
            )
    found = make(net, layer, preprocessing=To(*size)).transform_maps(pictures[:2])
    assert found.shape[2:] == (size[0] // 16, size[1] // 16)
    assert_relatively_close(found, expected.numpy())


def test_maps_that_are_not_square_are_not_turned(pictures):
    """Of a convolution either."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3, stride=2), nn.ReLU())
    found = make(net, "0", preprocessing=To(20, 41)).transform_maps(pictures)
    assert found.shape == (16, 4, 9, 20)
    with torch.inference_mode():
        expected = net[0](stack(pictures, To(20, 41)))
    assert_relatively_close(found, expected.numpy())


# Networks that keep tokens in an order of their own in some of their layers.
SHUFFLED = {
    "sam2_hiera_tiny": 224,
    "nest_tiny": 224,
    "mvitv2_tiny": 64,
    "twins_svt_small": 224,
    "xcit_nano_12_p8_224": 64,
    "cait_xxs24_224": 224,
    "pit_ti_224": 224,
    "tnt_s_legacy_patch16_224": 224,
    "volo_d1_224": 224,
    "coat_tiny": 224,
    "levit_128s": 224,
    "efficientformer_l1": 224,
    "tiny_vit_5m_224": 224,
    "focalnet_tiny_srf": 224,
    "swinv2_tiny_window8_256": 256,
    "swinv2_cr_tiny_224": 224,
    "gcvit_xxtiny": 224,
    "mobilevit_xxs": 64,
    "sequencer2d_s": 224,
    "gmlp_ti16_224": 224,
    "visformer_tiny": 224,
    "nextvit_small": 64,
    "poolformerv2_s12": 64,
    "vit_tiny_r_s16_p8_224": 64,
    "test_vit_relpos": 160,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        *SHUFFLED,
        "hiera_tiny_224",
    ],
)
def test_maps_are_timms_own_or_refused(name, draw_timm, pictures):
    """Never silently in another order: of each layer that `feature_info` declares."""
    side = SHUFFLED.get(name, 224)
    net = draw_timm(name, **({"img_size": side} if side == 64 and "vit" in name[:5] else {}))
    batch = stack(pictures[:2], To(side, side))
    with torch.inference_mode():
        maps = net.forward_intermediates(batch, intermediates_only=True, output_fmt="NCHW")
    paths = [entry["module"] for entry in net.feature_info]
    for path, expected in list(zip(paths, maps[-len(paths) :], strict=True)):
        extractor = make(net, path, preprocessing=To(side, side))
        try:
            found = extractor.transform_maps(pictures[:2])
        except LayerNotFoundError:
            continue
        except ValueError as error:
            assert "layer must return maps (C, H, W) or the tokens" in str(error)  # noqa: PT017
            continue
        assert_relatively_close(found, expected.numpy(), 1e-3)  # visformer multiplies rounding


# out= ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["array", "memmap", "strided"])
def test_out_is_filled_and_returned(kind, pictures, tmp_path):
    """An array, a file on disk or every other row of one."""
    expected = make().transform_maps(pictures)
    shape = expected.shape
    if kind == "memmap":
        out = np.lib.format.open_memmap(tmp_path / "maps.npy", "w+", np.float32, shape)
    elif kind == "strided":
        out = np.zeros((32, *shape[1:]), np.float32)[::2]
    else:
        out = np.zeros(shape, np.float32)
    assert make(batch_size=5).transform_maps(pictures, out=out) is out
    assert_relatively_close(out, expected)
    if kind == "memmap":
        out.flush()
        assert_array_equal(np.load(tmp_path / "maps.npy"), out)


@pytest.mark.parametrize(
    ("out", "came"),
    [
        (np.zeros((16, 64, 4, 4), np.float64), r"float64 \(16, 64, 4, 4\)"),
        (np.zeros((15, 64, 4, 4), np.float32), r"float32 \(15, 64, 4, 4\)"),
        (np.zeros((16, 4, 4, 64), np.float32), r"float32 \(16, 4, 4, 64\)"),
        (np.zeros((16, 64 * 16), np.float32), r"float32 \(16, 1024\)"),
    ],
    ids=["float64", "rows", "channels last", "flat"],
)
def test_a_wrong_out_is_refused(out, came, pictures):
    """The error has both shapes, and nothing is written."""
    with pytest.raises(
        ValueError, match=rf"^out must be a float32 .* \(16, 64, 4, 4\); got {came}"
    ):
        make().transform_maps(pictures, out=out)
    assert not out.any()


def test_what_cannot_be_filled_is_refused(pictures, tmp_path):
    """A list, and a file that is open for reading."""
    shape = make().transform_maps(pictures).shape
    with pytest.raises(ValueError, match=r"out must be a float32 array .*; got list"):
        make().transform_maps(pictures, out=[])
    np.save(tmp_path / "maps.npy", np.zeros(shape, np.float32))
    with pytest.raises(ValueError, match="out must be writeable"):
        make().transform_maps(pictures, out=np.load(tmp_path / "maps.npy", mmap_mode="r"))


# What is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backbone", "layer", "message"),
    [
        (
            "resnet10_slim",
            ["layer1", "layer2"],
            r"^transform_maps reads one layer; got layer=\['lay",
        ),
        ("resnet10_slim", [], r"^transform_maps reads one layer; got layer=\[\]"),
        ("resnet10_slim", "fc", r"must return maps .*; got 'fc' with output shape \(1000,\)\.$"),
        (
            VIT,
            "penultimate",
            r"must return maps .*; got 'penultimate' with output shape \(64,\)\.$",
        ),
        ("resnet10_slim", "layer9", "no layer 'layer9'"),
    ],
    ids=str,
)
def test_a_layer_without_maps_is_refused(backbone, layer, message, pictures):
    """Vectors have no positions, and several layers no common shape."""
    with pytest.raises(ValueError, match=message):
        make(backbone, layer).transform_maps(pictures)


def test_images_of_another_size_than_the_maps_are_refused(pictures):
    """One value is not repeated at all positions of a map."""
    net = nn.Sequential(nn.Conv2d(3, 4, 1))
    with pytest.raises(ValueError, match="preprocessing"):
        make(net, "0", preprocessing=ToOnePixel()).transform_maps(pictures)


def test_patches_in_another_grid_are_refused(draw_timm, pictures):
    """4 x 4 patches are not taken for 2 x 8."""
    net = draw_timm("test_vit", img_size=64)  # which takes images of any size
    with pytest.raises(ValueError, match="preprocessing"):
        make(net, "blocks.1", preprocessing=ByProportions()).transform_maps(pictures)


def test_a_list_of_one_layer_is_read(pictures):
    """A list of one is that one."""
    assert_array_equal(
        make(layer=["layer2"]).transform_maps(pictures), make().transform_maps(pictures)
    )


@pytest.mark.parametrize("on_error", ["nan", "warn"])
def test_an_image_that_cannot_be_read_is_nan(on_error, pictures, tmp_path):
    """The others are as without it, and `errors_` has the reason."""
    bad = tmp_path / "bad.png"
    bad.write_text("no image")
    extractor = make(on_error=on_error, batch_size=3)
    X = [*pictures[:4], str(bad), *pictures[4:8]]
    if on_error == "warn":
        with pytest.warns(UserWarning, match="1 of 9 images could not be read"):
            maps = extractor.transform_maps(X)
    else:
        maps = extractor.transform_maps(X)
    assert np.isnan(maps[4]).all()
    assert_relatively_close(np.delete(maps, 4, axis=0), make().transform_maps(pictures[:8]))
    assert list(extractor.errors_) == [4]
    with pytest.raises(ValueError, match=r"X\[4\]"):
        make().transform_maps(X)


def test_maps_with_nan_in_them_are_nan_throughout(pictures):
    """As rows are: one place that is not a number spoils the image."""

    class Relative(nn.Module):
        def forward(self, batch):
            return batch / batch.amax((2, 3), keepdim=True)

    net = nn.Sequential(nn.Conv2d(3, 3, 1, bias=False), Relative())
    net[0].weight.data[:] = torch.eye(3)[..., None, None]
    pixels = pictures.copy()
    pixels[3, ..., 1] = 0
    extractor = make(net, "1", preprocessing=black_to_8, on_error="nan")
    maps = extractor.transform_maps(pixels)
    assert np.isnan(maps[3]).all()
    assert np.isfinite(np.delete(maps, 3, axis=0)).all()
    assert list(extractor.errors_) == [3]


# No cache, no pooling -----------------------------------------------------------------------------


def test_maps_are_neither_kept_nor_looked_up(pictures, count_images):
    """They are too large; rows that are kept are left alone."""
    seen, cache = count_images(SlimResNet), FeatureCache()
    extractor = make(cache=cache)
    rows = extractor.transform(pictures)
    before = cache.info()
    maps = extractor.transform_maps(pictures)
    assert_array_equal(extractor.transform_maps(pictures), maps)
    assert sum(seen) == 3 * len(pictures)
    assert cache.info() == before
    assert_array_equal(extractor.transform(pictures), rows)


@pytest.mark.parametrize("params", [{"norm": "max"}, {"pooling": ["max", "gem"]}], ids=str)
def test_pooling_and_norm_have_no_effect(params, pictures):
    """Maps are as the network gives them."""
    found = make(**params).transform_maps(pictures)
    assert_array_equal(found, make().transform_maps(pictures))


@pytest.mark.parametrize("pooling", ["avg", "max"])
@pytest.mark.parametrize(
    ("backbone", "layer"), [("resnet10_slim", "layer2"), (VIT, "blocks.3"), ("vgg11", "relu5_2")]
)
def test_rows_are_maps_that_are_pooled(backbone, layer, pooling, pictures):
    """`transform` pools the maps of `transform_maps`."""
    maps = make(backbone, layer).transform_maps(pictures[:4])
    rows = make(backbone, layer, pooling=pooling, norm=None).transform(pictures[:4])
    assert_relatively_close(rows, getattr(maps, {"avg": "mean"}.get(pooling, pooling))((2, 3)))
