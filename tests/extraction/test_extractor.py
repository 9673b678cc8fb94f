"""Tests of extraction end to end: rows against a plain torchvision loop, and every way to fail."""

import contextlib
import io
import pickle
import threading
import traceback
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image, ImageFile
from sklearn.base import clone
from sklearn.preprocessing import normalize
from torch import nn
from torchvision import models, transforms
from torchvision.models.feature_extraction import create_feature_extractor

from deepfeat import DeepFeatureExtractor, FeatureCache, LayerNotFoundError

TO_8_PIXELS = transforms.Compose([transforms.Resize((8, 8)), transforms.ToTensor()])


def make(backbone="squeezenet1_1", layer="stage2", **params):
    """Make a fast extractor, which computes every row anew unless it is given a cache."""
    if isinstance(backbone, str):
        params = {"weights": None, "image_size": 32} | params
    return DeepFeatureExtractor(backbone, layer, **{"cache": None} | params)


def extract(X, *args, **params):
    return make(*args, **params).fit_transform(X)


def make_net():
    """Make a network of one's own, in train mode, with a BatchNorm that would notice that."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU()).train()


def make_bright(weight):
    """Make a network that sums up the channels and multiplies them by `weight`."""
    net = nn.Sequential(nn.Conv2d(3, 2, 1, bias=False))
    nn.init.constant_(net[0].weight, weight)
    return net


class Relative(nn.Module):
    """Divide each channel by its brightest value: NaN for a black one."""

    def forward(self, batch):
        return batch / batch.amax((2, 3), keepdim=True)


@pytest.fixture
def bad_file(tmp_path):
    path = tmp_path / "bad.jpg"
    path.write_text("no image")
    return str(path)


# Against a plain loop ---------------------------------------------------------------------------


def rows_by_hand(paths, name, node, pooling, norm):
    """Do with torchvision, NumPy and scikit-learn what the extractor promises."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = models.get_model(name, weights=None).eval()
    read = create_feature_extractor(net, {node: "output"})
    preprocess = models.get_model_weights(name)["DEFAULT"].transforms()
    rows = []
    for path in paths:
        with Image.open(path) as image, torch.no_grad():
            output = read(preprocess(image.convert("RGB"))[None])["output"][0].double().numpy()
        if output.ndim == 3 and pooling != "flatten":
            places = output.reshape(len(output), -1)
            if pooling == "gem":
                output = (np.maximum(places, 1e-6) ** 3).mean(axis=1) ** (1 / 3)
            else:
                output = {"avg": np.mean, "max": np.max}[pooling](places, axis=1)
        rows.append(output.ravel())
    return np.array(rows) if norm is None else normalize(rows, norm)


@pytest.mark.usefixtures("pillow_resizes")
@pytest.mark.parametrize(
    ("name", "layer", "node", "pooling", "norm"),
    [
        ("squeezenet1_1", "stage2", "features.4", "avg", "l2"),
        ("squeezenet1_1", "features.12", "features.12", "max", "l1"),
        ("squeezenet1_1", -1, "classifier.3", "avg", None),
        ("mobilenet_v3_small", "features.3", "features.3", "gem", "l2"),
        ("mobilenet_v3_small", "features.2.block.1", "features.2.block.1", "flatten", "l2"),
        ("resnet18", "layer3.0", "layer3.0", "avg", "l2"),
        ("resnet18", "avgpool", "avgpool", "flatten", "max"),
        ("alexnet", "relu7", "classifier.5", "avg", "l2"),
    ],
)
def test_rows_are_those_of_a_plain_loop(scene_paths, name, layer, node, pooling, norm):
    """Same pixels, same network, same pooling and norm: the rows are the same to rounding."""
    paths = scene_paths[:3]
    expected = rows_by_hand(paths, name, node, pooling, norm)
    rows = extract(paths, name, layer, image_size=None, pooling=pooling, norm=norm)
    assert rows.dtype == np.float32
    scale = np.abs(expected).max()
    assert_allclose(rows / scale, expected / scale, rtol=1e-4, atol=1e-5)
    # Were all images alike to this network, rows of the wrong image would pass.
    assert np.ptp(expected / scale, axis=0).max() > 1e-3


def test_tokens_are_read_by_their_class_token(scene_paths):
    """A transformer of one's own gives its class token, and its tokens without that."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = models.VisionTransformer(32, 8, 2, 2, hidden_dim=16, mlp_dim=32).eval()
    to_tensor = transforms.Compose([transforms.Resize((32, 32)), transforms.ToTensor()])
    batch = torch.stack([to_tensor(Image.open(path).convert("RGB")) for path in scene_paths[:3]])
    with torch.no_grad():
        tokens = create_feature_extractor(net, ["encoder.ln"])(batch)["encoder.ln"].numpy()
    for pooling, expected in {
        "cls": tokens[:, 0],
        "avg": tokens[:, 1:].mean(axis=1),
        "max": tokens[:, 1:].max(axis=1),
        "flatten": tokens.reshape(3, -1),
    }.items():
        extractor = make(net, "encoder.ln", preprocessing=to_tensor, pooling=pooling, norm=None)
        rows = extractor.fit_transform(scene_paths[:3])
        assert_allclose(rows, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", ["l2", "l1", "max", None])
def test_a_list_of_layers_gives_their_columns_in_that_order(scene_paths, norm):
    """Each layer is scaled by itself, whatever its depth and its company."""
    layers = ["features.12", "stage1", -7]
    together = extract(scene_paths, layer=layers, norm=norm)
    alone = [extract(scene_paths, layer=layer, norm=norm) for layer in layers]
    assert [rows.shape[1] for rows in alone] == [512, 64, 384]
    assert_allclose(together, np.hstack(alone), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("norm", ["l2", "l1", "max"])
def test_norm_scales_each_row(scene_paths, norm):
    """It does so as scikit-learn's `normalize` does, and to nothing else."""
    expected = normalize(extract(scene_paths, norm=None), norm)
    assert_allclose(extract(scene_paths, norm=norm), expected, rtol=1e-5)


@pytest.mark.parametrize("norm", ["l2", "l1", "max", None])
def test_rows_of_zeros_stay_zero(scene_paths, norm):
    """Nothing is divided by zero; a warning would fail this test."""
    rows = extract(scene_paths, make_bright(0.0), "0", preprocessing=TO_8_PIXELS, norm=norm)
    assert_array_equal(rows, np.zeros((12, 2)))


@pytest.mark.parametrize("size", [1e-9, 1e9, 1e25])
@pytest.mark.parametrize("norm", ["l2", "l1", "max"])
def test_rows_of_any_size_have_their_norm(scene_paths, norm, size):
    """No square of a value ends at zero or infinity."""
    expected = extract(scene_paths, make_bright(1.0), "0", preprocessing=TO_8_PIXELS, norm=norm)
    rows = extract(scene_paths, make_bright(size), "0", preprocessing=TO_8_PIXELS, norm=norm)
    assert_allclose(rows, expected, rtol=1e-5)


@pytest.mark.parametrize("resize", ["weights", "squash", "pad"])
def test_every_resize_gives_rows_of_its_own(scene_paths, resize):
    """The choice reaches the network."""
    rows = extract(scene_paths, resize=resize)
    others = {"weights", "squash", "pad"} - {resize}
    for other in others:
        assert np.abs(rows - extract(scene_paths, resize=other)).max() > 1e-3


# Input ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).integers(0, 256, (4, 20, 24, 3), dtype=np.uint8)


KINDS = {
    "path": lambda array, path: (Image.fromarray(array).save(path), str(path))[1],
    "PathLike": lambda array, path: (Image.fromarray(array).save(path), path)[1],
    "bytes": lambda array, path: (Image.fromarray(array).save(path), path.read_bytes())[1],
    "PIL": lambda array, path: Image.fromarray(array),
    "array": lambda array, path: array,
    "array, channels first": lambda array, path: np.moveaxis(array, -1, 0),
    "floats": lambda array, path: array / 255,
    "tensor": lambda array, path: torch.from_numpy(array).permute(2, 0, 1),
    "RGBA": lambda array, path: Image.fromarray(array).convert("RGBA"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_image_gives_the_same_rows(pixels, tmp_path, kind):
    """Pixels decide, not how they arrive; kinds may be mixed."""
    expected = extract(list(pixels))
    images = [KINDS[kind](array, tmp_path / f"{i}.png") for i, array in enumerate(pixels)]
    assert_array_equal(extract(images), expected)
    assert_array_equal(extract([images[0], *pixels[1:]]), expected)


CONTAINERS = {
    "tuple": tuple,
    "array of str": np.array,
    "array of objects": lambda paths: np.array(paths, dtype=object),
    "column of objects": lambda paths: np.array(paths, dtype=object)[:, None],
    "Series": pd.Series,
    "Series with an index": lambda paths: pd.Series(paths, index=range(12, 0, -1)),
    "DataFrame": lambda paths: pd.DataFrame({"path": paths}),
    "polars Series": pl.Series,
    "polars DataFrame": lambda paths: pl.DataFrame({"path": paths}),
    "paths": lambda paths: [Path(path) for path in paths],
}


@pytest.mark.parametrize("container", CONTAINERS)
def test_every_container_gives_the_same_rows(scene_paths, container):
    """Rows come in the order of the items."""
    X = CONTAINERS[container](scene_paths)
    assert_array_equal(extract(X), extract(scene_paths))


ARRAYS = {
    "channels last": (lambda pixels: pixels, None),
    "channels first": (lambda pixels: np.moveaxis(pixels, -1, 1), None),
    "tensor": (lambda pixels: torch.from_numpy(pixels).permute(0, 3, 1, 2), None),
    "float64": (lambda pixels: pixels / 255, None),
    "float32": (lambda pixels: (pixels / 255).astype(np.float32), None),
    "16 bits": (lambda pixels: pixels.astype(np.uint16) * 257, None),
    "rows": (lambda pixels: pixels.reshape(4, -1), (20, 24, 3)),
    "rows of inferred height": (lambda pixels: pixels.reshape(4, -1), (-1, 24, 3)),
    "table": (lambda pixels: pd.DataFrame(pixels.reshape(4, -1)), (20, 24, 3)),
    "polars table": (lambda pixels: pl.DataFrame(pixels.reshape(4, -1)), (20, 24, 3)),
}


@pytest.mark.parametrize("kind", ARRAYS)
def test_every_array_gives_the_same_rows(pixels, kind):
    """The layout and the type of an array do not change its pixels."""
    make_array, image_shape = ARRAYS[kind]
    rows = extract(make_array(pixels), image_shape=image_shape)
    assert_array_equal(rows, extract(list(pixels)))


def test_images_of_different_sizes_come_in_one_call(pixels):
    """Each is resized for itself."""
    images = [pixels[0], pixels[1][:11], pixels[2][:, :9], pixels[3][..., 0]]
    alone = [extract([image]) for image in images]
    assert_allclose(extract(images), np.vstack(alone), rtol=1e-5, atol=1e-7)


def test_X_is_not_changed(pixels):
    """Read-only arrays will do, and PIL images keep mode, size and pixels."""
    array, image = pixels.copy(), Image.fromarray(pixels[0]).convert("P")
    array.flags.writeable = False
    floats = torch.rand(4, 3, 20, 24)
    before = image.tobytes(), image.mode, image.size, floats.clone()
    X = [image]
    extract(array)
    extract(X)
    extract(floats)
    assert_array_equal(array, pixels)
    assert X[0] is image
    assert (image.tobytes(), image.mode, image.size) == before[:3]
    assert_array_equal(floats, before[3])


@pytest.mark.parametrize(
    ("X", "message"),
    [
        ([], "X is empty"),
        ("a.jpg", r"X must be a .*; got a single image \('a.jpg'\): pass \[X\]"),
        (np.zeros((2, 8)), r"X of shape \(2, 8\) has one row per image: set image_shape"),
        (np.zeros((2, 3, 8, 3)), "channels first or as channels last"),
    ],
    ids=["empty", "single path", "rows without image_shape", "ambiguous"],
)
@pytest.mark.parametrize("method", ["fit", "transform"])
def test_what_is_no_sequence_of_images_is_refused(X, message, method):
    """Already `fit` does so, and says what to do."""
    with pytest.raises(ValueError, match=message):
        getattr(make(), method)(X)


# Preview ----------------------------------------------------------------------------------------


@pytest.mark.usefixtures("pillow_resizes")
def test_a_preview_is_what_torchvision_feeds_the_network(scene_paths):
    """Normalized as the weights ask, the pictures are torchvision's own input to the network."""
    pictures = DeepFeatureExtractor("mobilenet_v2", -1, weights=None).preview(scene_paths)
    preset = models.MobileNet_V2_Weights.DEFAULT.transforms()
    for path, picture in zip(scene_paths, pictures, strict=True):
        assert (picture.mode, picture.size) == ("RGB", (224, 224))
        normalized = transforms.functional.normalize(
            transforms.functional.to_tensor(picture), preset.mean, preset.std
        )
        assert_allclose(normalized, preset(Image.open(path).convert("RGB")), atol=1e-6)


def test_a_preview_follows_the_parameters():
    """The whole image squashed or padded with the mean colour, of any size, of any input."""
    image = Image.new("RGB", (40, 20), (200, 100, 0))
    (squashed,) = make(resize="squash").preview([image])
    (padded,) = make(resize="pad", image_size=48).preview([np.asarray(image)])
    assert_array_equal(squashed, np.full((32, 32, 3), (200, 100, 0)))
    assert padded.size == (48, 48)
    assert padded.getpixel((24, 24)) == (200, 100, 0)
    assert padded.getpixel((24, 0)) == (124, 116, 104)  # 255 times the mean of ImageNet
    (row,) = make(image_shape=(8, 8)).preview(np.linspace(0, 1, 64).reshape(1, 64))
    assert np.ptp(np.asarray(row)) > 200


def test_a_preview_of_preprocessing_of_ones_own_is_stretched():
    """Its smallest value becomes black and its largest white, in one scale for all channels."""
    values = np.array([[[-1.0, 3.0]], [[0.0, 1.0]], [[2.0, 2.0]]], dtype=np.float32)
    image = Image.new("RGB", (4, 4))
    colour = make(make_net(), "0", preprocessing=lambda _: torch.tensor(values))
    (picture,) = colour.preview([image])
    assert_array_equal(picture, [[[0, 64, 191], [255, 128, 191]]])
    (flat,) = make(make_net(), "0", preprocessing=lambda _: torch.ones(3, 4, 4)).preview([image])
    assert_array_equal(flat, np.zeros((4, 4, 3)))
    double = make(nn.Conv2d(2, 1, 1), "", preprocessing=lambda _: torch.tensor(values[:2]))
    assert_array_equal(double.preview([image])[0], [[0, 255]])  # the first channel


def test_an_image_that_cannot_be_previewed_raises(scene_paths, bad_file):
    """There is no picture of NaN."""
    with pytest.raises(ValueError, match=r"X\[1\].*bad\.jpg"):
        make(on_error="nan").preview([scene_paths[0], bad_file])


# Images that cannot be read ---------------------------------------------------------------------

PLACES = [{0}, {2}, {5}, {0, 1, 5}]


@pytest.mark.parametrize(("num_workers", "cache"), [(0, None), (4, None), (4, "memory")])
@pytest.mark.parametrize("places", PLACES, ids=str)
@pytest.mark.parametrize("on_error", ["warn", "nan"])
def test_a_bad_image_leaves_nan_in_its_own_row(
    scene_paths, bad_file, places, on_error, num_workers, cache
):
    """No row is shifted, and the neighbours' rows are what they are without it."""
    X = [bad_file if place in places else scene_paths[place] for place in range(6)]
    expected = extract(scene_paths[:6])
    expected[list(places)] = np.nan
    extractor = make(on_error=on_error, batch_size=4, num_workers=num_workers, cache=cache)
    expecting = (
        pytest.warns(UserWarning, match=rf"^{len(places)} of 6 images could not be read.*bad\.jpg")
        if on_error == "warn"
        else contextlib.nullcontext()
    )
    with expecting:
        rows = extractor.fit_transform(X)
    assert_allclose(rows, expected, rtol=1e-5, atol=1e-7)
    assert set(extractor.errors_) == places
    reason = "not an image that Pillow can read; it starts with b'no image'"
    assert set(extractor.errors_.values()) == {reason}


@pytest.mark.parametrize("place", [0, 2, 5])
def test_by_default_a_bad_image_is_an_error_that_names_it(scene_paths, bad_file, place):
    """Index and path are told, and what the file starts with."""
    X = [*scene_paths[:place], bad_file, *scene_paths[place:5]]
    with pytest.raises(ValueError, match=rf"X\[{place}\] \('.*bad\.jpg'\): .*b'no image'"):
        extract(X, batch_size=2)


def test_a_call_of_nothing_but_bad_images_gives_nothing_but_nan(bad_file):
    """The number of columns is known all the same."""
    extractor = make(on_error="nan", batch_size=2)
    assert_array_equal(extractor.fit_transform([bad_file] * 5), np.full((5, 128), np.nan))
    assert list(extractor.errors_) == list(range(5))


def test_several_layers_are_nan_together(scene_paths, bad_file):
    """A row is whole or NaN."""
    rows = extract([scene_paths[0], bad_file], layer=["stage1", "stage2"], on_error="nan")
    assert_array_equal(np.isnan(rows), [[False] * 192, [True] * 192])


def test_errors_are_those_of_the_last_transform(scene_paths, bad_file):
    """They do not pile up."""
    extractor = make(on_error="nan").fit(scene_paths)
    assert extractor.errors_ == {}
    extractor.transform([scene_paths[0], bad_file])
    assert list(extractor.errors_) == [1]
    extractor.transform(scene_paths[:2])
    assert extractor.errors_ == {}


BAD = {
    "missing file": lambda folder: folder / "missing.jpg",
    "folder": lambda folder: folder,
    "empty bytes": lambda folder: b"",
    "array with NaN": lambda folder: np.full((4, 4), np.nan),
    "array without pixels": lambda folder: np.zeros((0, 4)),
    "None": lambda folder: None,
    "missing value": lambda folder: np.nan,
    "number": lambda folder: 7,
    "null byte": lambda folder: "a\0.jpg",
    "lone surrogate": lambda folder: "\ud800.jpg",
    "URL": lambda folder: "https://example.org/a.jpg",
    "row": lambda folder: np.zeros(5),
    "nothing": lambda folder: [],
    "ragged": lambda folder: [[1, 2], [3]],
    "image and label": lambda folder: (Image.new("RGB", (9, 9)), 3),
    "array and label": lambda folder: [np.zeros((9, 9)), 3],
    "path and label": lambda folder: ("a.jpg", 3),
    "dict": lambda folder: {"image": Image.new("RGB", (9, 9)), "label": 3},
    "masked array": lambda folder: np.ma.masked_less(np.zeros((4, 4)), 1),
    "tensor without values": lambda folder: torch.empty(3, 9, 9, device="meta"),
    "sparse tensor": lambda folder: torch.eye(9).to_sparse(),
    "text file": lambda folder: io.StringIO("text"),
    "closed file": lambda folder: closed(io.BytesIO(b"")),
    "path that fails": lambda folder: BrokenPath(),
    "array that fails": lambda folder: BrokenArray(),
}


class BrokenPath:
    def __fspath__(self):
        raise RuntimeError("the mount is gone")


class BrokenArray:
    """As a lazy array whose file was closed: every look at it fails."""

    @property
    def ndim(self):
        raise RuntimeError("the file is closed")

    dtype = shape = requires_grad = __array__ = ndim


def closed(file):
    file.close()
    return file


@pytest.mark.parametrize("place", [0, 2])
@pytest.mark.parametrize("cache", [None, "memory"])
@pytest.mark.parametrize("kind", BAD)
def test_every_kind_of_bad_image_is_confined_to_its_row(scene_paths, tmp_path, kind, cache, place):
    """Whatever comes in a list of images, first or last, the others are read."""
    good = [scene_paths[0], np.asarray(Image.open(scene_paths[1]))]
    X = [*good[:place], BAD[kind](tmp_path), *good[place:]]
    extractor = make(on_error="nan", cache=cache).fit(X)
    rows = extractor.transform(X)
    assert_allclose(np.delete(rows, place, 0), extract(good), rtol=1e-5, atol=1e-7)
    assert np.isnan(rows[place]).all()
    assert list(extractor.errors_) == [place]


@pytest.mark.parametrize("kind", ["missing value", "None", "nothing", "image and label", "dict"])
@pytest.mark.parametrize("container", [list, pd.Series])
def test_an_x_of_nothing_but_bad_images_is_told_from_a_table(tmp_path, kind, container):
    """Also where there is no good image that would tell."""
    X = container([BAD[kind](tmp_path) for _ in range(2)])
    if isinstance(X, pd.Series):
        X = X.astype(object)
    extractor = make(on_error="nan").fit(X)
    assert np.isnan(extractor.transform(X)).all()
    assert list(extractor.errors_) == [0, 1]


def test_a_bad_row_of_a_list_is_confined_to_itself(pixels):
    """A list of rows may miss one, or hold one that is too long."""
    good = list(pixels.reshape(4, -1))
    for bad in (None, np.nan, good[0][:-1], [], "a.jpg"):
        extractor = make(on_error="nan", image_shape=(20, 24, 3))
        rows = extractor.fit_transform([bad, *good])
        assert_allclose(rows[1:], extract(list(pixels)), rtol=1e-5, atol=1e-7)
        assert list(extractor.errors_) == [0]


def test_images_that_fail_are_not_held():
    """However many there are, no more of them are in memory than are worked on."""
    opened = []
    most = 0

    def fail(image):
        nonlocal most
        if image.size == (256, 256):  # the grey image that the preprocessing is tried on
            return TO_8_PIXELS(image)
        opened.append(weakref.ref(image))
        most = max(most, sum(reference() is not None for reference in opened))
        raise ValueError("planted")

    images = np.random.default_rng(0).integers(0, 256, (40, 9, 9, 3), dtype=np.uint8)
    extractor = make(make_net(), "0", preprocessing=fail, on_error="nan", num_workers=0)
    assert np.isnan(extractor.transform(images)).all()
    assert most <= 2
    assert set(extractor.errors_.values()) == {"ValueError: planted"}


def test_an_image_that_is_too_large_for_memory_is_named(pixels):
    """It is an error of that image, and a row of NaN, as any other."""

    def prepare(image):
        if image.size == (24, 1):
            raise MemoryError
        return TO_8_PIXELS(image)

    X = [pixels[0], pixels[1][:1, :, 0], pixels[2]]
    net = make_net()
    with pytest.raises(ValueError, match=r"^X\[1\] \(uint8 array .*\): MemoryError$"):
        extract(X, net, "0", preprocessing=prepare)
    with pytest.raises(ValueError, match=r"^X\[1\] \(uint8 array .*\): MemoryError$"):
        make(net, "0", preprocessing=prepare).preview(X)
    extractor = make(net, "0", preprocessing=prepare, on_error="nan")
    assert_array_equal(np.isnan(extractor.transform(X)).all(axis=1), [False, True, False])
    assert extractor.errors_ == {1: "MemoryError"}


@pytest.mark.parametrize("place", [0, 1])
def test_the_cause_of_an_error_is_kept_with_the_lines_where_it_was_raised(scene_paths, place):
    """With or without a cache, and for any of several equal images."""

    def fail(image):
        if image.size == (256, 256):  # the grey image that the preprocessing is tried on
            return TO_8_PIXELS(image)
        raise KeyError("planted")

    for cache in (None, FeatureCache()):
        with pytest.raises(ValueError, match=r"^X\[0\] ") as caught:
            extract(scene_paths[place:] * 2, make_net(), "2", preprocessing=fail, cache=cache)
        assert isinstance(caught.value.__cause__, KeyError)
        lines = "".join(traceback.format_exception(caught.value))
        assert 'raise KeyError("planted")' in lines


def test_errors_belong_to_one_call(scene_paths, bad_file):
    """Two calls at once, of threads that share an extractor, do not mix theirs."""
    together = threading.Barrier(2, timeout=20)

    def prepare(image):
        if image.size != (256, 256):  # the grey image that the preprocessing is tried on
            together.wait()
        return TO_8_PIXELS(image)

    net = make_net()
    extractor = make(net, "0", preprocessing=prepare, on_error="nan", batch_size=1)
    calls = [bad_file, scene_paths[0]], [scene_paths[1], bad_file]
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(extractor.transform, calls))
    assert list(extractor.errors_) in ([0], [1])


def test_a_call_that_raises_leaves_the_errors_of_the_last_one(scene_paths, bad_file):
    """`errors_` is always that of a whole call."""
    extractor = make(on_error="nan")
    extractor.transform([bad_file, scene_paths[0]])
    with pytest.raises(ValueError, match=r"X\[1\]"):
        extractor.set_params(on_error="raise").transform([scene_paths[0], bad_file])
    assert list(extractor.errors_) == [0]


def test_whether_truncated_files_are_read_is_part_of_what_decides_on_a_row(
    scene_paths, tmp_path, monkeypatch
):
    """A row of half an image is not served once Pillow is told to refuse it again."""
    path = tmp_path / "half.png"
    path.write_bytes(Path(scene_paths[0]).read_bytes()[:-3000])
    for X in ([path], [path.read_bytes()]):
        extractor = make(on_error="nan", cache=FeatureCache())
        for is_read in (True, False, True, False):
            monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", is_read)
            assert np.isnan(extractor.transform(X)).all() != is_read


# Datasets --------------------------------------------------------------------------------------


class Scenes(torch.utils.data.Dataset):
    """A dataset as torch has them: images by index, not made for threads."""

    def __init__(self, pixels, give=Image.fromarray):
        self.pixels = pixels
        self.give = give
        self.at_work = 0

    def __len__(self):
        return len(self.pixels)

    def __getitem__(self, index):
        assert not self.at_work
        self.at_work += 1
        image = self.give(self.pixels[index])
        self.at_work -= 1
        return image


@pytest.mark.parametrize("cache", [None, "memory"])
def test_a_data_set_of_images_is_read_image_by_image(pixels, cache):
    """One that gives a label with each image has an error that says what to pass."""
    scenes = Scenes(np.repeat(pixels, 5, axis=0))
    expected = extract(list(scenes.pixels))
    assert_allclose(extract(scenes, cache=cache, num_workers=4), expected, rtol=1e-5, atol=1e-7)
    for give, advice in (
        (lambda array: (Image.fromarray(array), 3), "tuple of Image and int .*X.samples"),
        (
            lambda array: {"image": array, "label": 3},
            "dict with the keys 'image', 'label'.*'image'",
        ),
    ):
        with pytest.raises(ValueError, match=rf"^X\[0\] \(from a Scenes\): a {advice}"):
            extract(Scenes(pixels, give), cache=cache)


def test_a_data_set_that_draws_at_random_is_not_kept(pixels):
    """The row of one draw would be taken for that of another."""
    draws = iter(np.random.default_rng(0).integers(0, 256, (99, 20, 24, 3), dtype=np.uint8))
    scenes = Scenes(pixels, lambda array: Image.fromarray(next(draws)))
    assert np.isfinite(extract(scenes)).all()
    with pytest.raises(ValueError, match=r"X\[0\] .*a different image each time.*set cache=None"):
        extract(scenes, cache="memory")


# Networks that give what is no number -----------------------------------------------------------


def test_weights_of_nan_are_reported(scene_paths):
    """NaN is never handed out as if it were a feature."""
    net = make_bright(np.nan)
    with pytest.raises(ValueError, match=r"X\[0\] .* NaN or infinity at layer '0'"):
        extract(scene_paths, net, "0", preprocessing=TO_8_PIXELS)
    extractor = make(net, "0", preprocessing=TO_8_PIXELS, on_error="nan")
    assert np.isnan(extractor.fit_transform(scene_paths)).all()
    assert list(extractor.errors_) == list(range(12))


def test_what_overflows_in_float16_is_reported(scene_paths):
    """The error says where float16 ends, and that bfloat16 goes further."""
    net = make_bright(60_000.0)
    kwargs = {"preprocessing": TO_8_PIXELS, "norm": None}
    with pytest.raises(ValueError, match=r"float16 ends at 65,504.*try bfloat16"):
        extract(scene_paths, net, "0", precision="float16", **kwargs)
    rows = extract(scene_paths, net, "0", precision="bfloat16", **kwargs)
    assert_allclose(rows, extract(scene_paths, net, "0", **kwargs), rtol=2e-2)


@pytest.mark.parametrize("norm", ["l2", "l1", "max", None])
def test_an_image_that_gives_nan_does_not_change_its_neighbours(pixels, norm):
    """Their rows have their norm as ever; its own is NaN throughout, though one feature was."""
    net = nn.Sequential(Relative())
    make_one = {"preprocessing": TO_8_PIXELS, "norm": norm, "on_error": "nan"}
    without_blue = pixels[1] * np.array([1, 1, 0], dtype=np.uint8)
    rows = extract([pixels[0], without_blue, pixels[2]], net, "0", **make_one)
    assert np.isnan(rows[1]).all()
    assert_allclose(rows[::2], extract(list(pixels[[0, 2]]), net, "0", **make_one), rtol=1e-5)


# The user's own preprocessing and network -------------------------------------------------------


def test_preprocessing_of_the_user_takes_the_place_of_the_weights_own(scene_paths):
    """The tensor it makes is what the network sees."""
    own = transforms.Compose([transforms.Resize((32, 32)), transforms.ToTensor()])
    net = models.squeezenet1_1(weights=None)
    by_name = extract(scene_paths, image_size=None, preprocessing=own)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = models.squeezenet1_1(weights=None)
    assert_allclose(extract(scene_paths, net, "stage2", preprocessing=own), by_name, rtol=1e-5)
    batch = torch.stack([own(Image.open(path).convert("RGB")) for path in scene_paths])
    with torch.no_grad():
        maps = net.features[:5](batch)
    assert_allclose(by_name, normalize(maps.mean((2, 3)).numpy()), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("preprocessing", "came"),
    [
        (np.asarray, "a ndarray"),
        (transforms.PILToTensor(), r"a tensor of torch.uint8 and shape \(3, 256, 256\)"),
        (lambda image: torch.zeros(3), r"a tensor of torch.float32 and shape \(3,\)"),
        (lambda image: None, "a NoneType"),
    ],
    ids=["array", "uint8", "vector", "None"],
)
def test_preprocessing_that_makes_no_image_is_refused(scene_paths, preprocessing, came):
    """`fit` tries it on a grey image, and says what came of it."""
    with pytest.raises(ValueError, match=rf"float tensor of shape \(C, H, W\); got {came}"):
        make(make_net(), "2", preprocessing=preprocessing).fit(scene_paths)


def test_preprocessing_that_makes_images_of_many_sizes_is_refused(scene_paths):
    """The error names two that differ."""
    keep_proportions = transforms.Compose([transforms.Resize(8), transforms.ToTensor()])
    with pytest.raises(
        ValueError, match=r"got \(3, 8, 8\) for X\[1\] .*, and \(3, 9, 8\) for X\[0\] "
    ):
        extract(scene_paths, make_net(), "2", preprocessing=keep_proportions)


def test_preprocessing_that_fails_names_the_image_and_its_own_error(scene_paths):
    """The error of the user's function is the cause, for its traceback."""

    def fail(image):
        if image.size != (256, 256):  # the grey image that `fit` tries
            raise KeyError("planted")
        return TO_8_PIXELS(image)

    with pytest.raises(ValueError, match=r"X\[0\] .*KeyError.*planted") as caught:
        extract(scene_paths, make_net(), "2", preprocessing=fail)
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_network_needs_preprocessing(scene_paths):
    """Nobody knows what it was trained on."""
    with pytest.raises(ValueError, match="A module needs preprocessing="):
        make(make_net(), "2").fit(scene_paths)


def test_a_network_of_the_user_is_left_as_it_was(scene_paths):
    """It is read in eval mode, and keeps its own mode, statistics, gradients and hooks."""
    net = make_net()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    extractor = make(net, "1", preprocessing=TO_8_PIXELS, norm=None)
    rows = extractor.fit_transform(scene_paths)

    assert all(module.training for module in net.modules())
    assert all(parameter.requires_grad for parameter in net.parameters())
    assert not any(module._forward_hooks for module in net.modules())
    assert extractor.backbone is net
    for name, value in net.state_dict().items():
        assert_array_equal(value, before[name])
    again = pickle.loads(pickle.dumps(extractor))
    assert_array_equal(again.transform(scene_paths), rows)

    batch = torch.stack([TO_8_PIXELS(Image.open(path).convert("RGB")) for path in scene_paths])
    with torch.no_grad():
        expected = net.eval()[:2](batch).mean((2, 3))
    assert_allclose(rows, expected, rtol=1e-4, atol=1e-6)


def test_a_network_that_was_trained_further_gives_other_rows(scene_paths):
    """The extractor sees the user's module as it is at the time of each call."""
    net = make_net()
    extractor = make(net, "0", preprocessing=TO_8_PIXELS, norm=None, cache="memory")
    before = extractor.fit_transform(scene_paths)
    with torch.no_grad():
        net[0].weight.mul_(2)
        net[0].bias.mul_(2)
    assert_allclose(extractor.transform(scene_paths), 2 * before, rtol=1e-5)


# Names ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backbone", "layer", "pooling", "count", "name_17"),
    [
        ("alexnet", "relu7", "avg", 4096, "relu7_0017"),
        ("alexnet", "conv5", "flatten", 256 * 13 * 13, "conv5_00017"),
        ("squeezenet1_1", "stage2", "avg", 128, "stage2_0017"),
        ("squeezenet1_1", -1, "avg", 1000, "classifier.3_0017"),
        ("squeezenet1_1", 4, "avg", 128, "features.4_0017"),
    ],
)
def test_a_feature_is_named_by_its_layer_and_number(backbone, layer, pooling, count, name_17):
    """A layer is named as it was asked for; numbers have as many digits as the last one needs."""
    params = {"pooling": pooling, "weights": None}
    names = DeepFeatureExtractor(backbone, layer, **params).get_feature_names_out()
    assert names.dtype == object
    assert names.shape == (count,)
    assert names[17] == name_17
    assert len(set(names)) == count


def test_the_names_of_several_layers_follow_their_columns(scene_paths):
    """There is one name a column."""
    extractor = make(layer=["stage2", "stage1"])
    names = extractor.get_feature_names_out()
    assert_array_equal(
        names[[0, 127, 128, 191]], [f"stage{n}" for n in ("2_0000", "2_0127", "1_0000", "1_0063")]
    )
    assert extractor.transform(scene_paths).shape == (12, len(names))


# Parameters -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (
            {"pooling": "mean"},
            r"^pooling must be 'avg', .* 'flatten' or a list of these; got 'mean'\.",
        ),
        ({"pooling": "cls"}, r"pooling='cls' needs a class token, but layer 'stage2'"),
        ({"norm": "l3"}, r"^norm must be one of 'l2', 'l1', 'max' or None; got 'l3'"),
        ({"resize": "crop"}, r"^resize must be one of 'weights', 'squash' or 'pad'; got 'crop'"),
        ({"precision": "float64"}, r"^precision must be one of .* or 'float16'; got 'float64'"),
        (
            {"on_error": "ignore"},
            r"^on_error must be one of 'raise', .* or 'nan'; got 'ignore'",
        ),
        ({"batch_size": 0}, r"^batch_size must be an int of at least 1; got 0\."),
        ({"batch_size": 2.5}, r"^batch_size must be an int of at least 1; got 2\.5\."),
        ({"batch_size": True}, r"^batch_size must be an int of at least 1; got True\."),
        ({"num_workers": -1}, r"^num_workers must be an int of at least 0 or 'auto'; got -1\."),
        ({"num_workers": None}, r"^num_workers must be an int of at least 0 or 'auto'; got None\."),
        ({"image_size": 0}, r"^image_size must be an int of at least 1 or None; got 0\."),
        ({"random_state": -1}, r"^random_state must be an int of at least 0 or None; got -1\."),
        ({"layer": []}, r"an empty list"),
        (
            {"layer": ["stage1", "stage1"]},
            "layer has 'stage1' and 'stage1', which are the same layer",
        ),
        ({"layer": "stagge2"}, r"SqueezeNet has no layer 'stagge2'. Close matches: 'stage2'"),
        ({"layer": 99}, r"SqueezeNet has 16 layers, from -16 to 15; there is no layer 99"),
        ({"backbone": "squeezenet"}, r"no backbone 'squeezenet'. Close matches: 'squeezenet1_1'"),
        ({"weights": "IMAGENET"}, r"squeezenet1_1 has no weights 'IMAGENET'. It has 'IMAGENET1K_V"),
    ],
    ids=str,
)
@pytest.mark.parametrize("method", ["fit", "transform"])
def test_a_wrong_parameter_is_refused(scene_paths, params, message, method):
    """The error says what came, what was expected, or what is close to it."""
    with pytest.raises(ValueError, match=message):
        getattr(make().set_params(**params), method)(scene_paths)


def test_a_layer_that_is_not_there_has_an_error_of_its_own(scene_paths):
    """It can be caught by name."""
    with pytest.raises(LayerNotFoundError):
        make(layer="relu7").fit(scene_paths)


@pytest.mark.parametrize("backbone", [None, 3, models.alexnet], ids=["None", "3", "function"])
def test_a_backbone_is_a_name_or_a_module(scene_paths, backbone):
    """A constructor is neither."""
    with pytest.raises(TypeError, match=r"^backbone must be a name or a torch\.nn\.Module; got a "):
        make().set_params(backbone=backbone).fit(scene_paths)


def test_whole_numbers_of_numpy_will_do(scene_paths):
    """A grid of parameters is often an array."""
    params = {"batch_size": np.int64(2), "image_size": np.int32(32), "random_state": np.int64(0)}
    assert_array_equal(extract(scene_paths, **params), extract(scene_paths))


def test_a_device_that_cannot_be_had_is_refused(scene_paths):
    """The error names it."""
    with pytest.raises(ValueError, match="device 'cuda:99' cannot be used here"):
        extract(scene_paths, device="cuda:99")


@pytest.mark.parametrize(
    "params",
    [
        {"batch_size": 1},
        {"batch_size": 5},
        {"batch_size": 100},
        {"num_workers": 0},
        {"num_workers": 4},
        {"num_workers": 0, "batch_size": 5},
        {"device": "cpu"},
        {"device": torch.device("cpu")},
        {"cache": "memory"},
    ],
    ids=str,
)
def test_how_it_is_computed_does_not_change_rows(scene_paths, params):
    """Batch, threads, device and cache are means, not ends."""
    assert_allclose(extract(scene_paths, **params), extract(scene_paths), rtol=1e-5, atol=1e-7)


def test_norm_and_concatenation_are_no_matter_of_the_cache(scene_paths):
    """Rows are kept as they are, and what is done to them afterwards does not reach the cache."""
    cache = FeatureCache()
    for params in (
        {"norm": "l2"},
        {"norm": None},
        {"norm": "max", "layer": ["stage1", "stage2"]},
        {"norm": "l1", "layer": "stage1"},
        {"norm": None},
    ):
        rows = extract(scene_paths, cache=cache, **params)
        rows_of_today = rows.copy()
        assert_allclose(rows, extract(scene_paths, **params), rtol=1e-5, atol=1e-7)
        rows *= 0  # as a caller may
        assert_array_equal(extract(scene_paths, cache=cache, **params), rows_of_today)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_a_lower_precision_gives_float32_rows_near_the_same(scene_paths, precision):
    """The unit rows point the same way to within a degree, and are not the very same."""
    rows, expected = extract(scene_paths, precision=precision), extract(scene_paths)
    assert rows.dtype == np.float32
    assert_allclose((rows * expected).sum(axis=1), 1, rtol=1e-4)
    assert np.abs(rows - expected).max() > 1e-6


def test_random_weights_follow_random_state(scene_paths):
    """The same seed gives the same network, None is 0, and torch's own state is left alone."""
    state = torch.get_rng_state()
    rows = {seed: extract(scene_paths, random_state=seed) for seed in (None, 0, 1)}
    assert_array_equal(torch.get_rng_state(), state)
    assert_array_equal(rows[None], rows[0])
    assert np.abs(rows[1] - rows[0]).max() > 1e-3


def test_verbose_shows_a_progress_bar(scene_paths, bad_file, capsys):
    """It counts images, the bad ones as well, and goes to stderr."""
    extract([*scene_paths, bad_file], verbose=1, on_error="nan", batch_size=4)
    output = capsys.readouterr()
    assert output.out == ""
    assert "squeezenet1_1: 100%" in output.err
    assert "13/13" in output.err


def test_by_default_nothing_is_printed(scene_paths, capfd):
    """Neither by Python nor by what it calls."""
    extract(scene_paths)
    assert tuple(capfd.readouterr()) == ("", "")


# fit, transform, threads ------------------------------------------------------------------------


def test_fit_loads_no_weights_and_reads_no_image(tmp_path, monkeypatch):
    """It passes where neither can be had; `transform` does not."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    X = [str(tmp_path / "missing.jpg")]
    extractor = make(weights="DEFAULT", on_error="nan").fit(X)
    assert extractor.get_feature_names_out().shape == (128,)
    assert not list(tmp_path.iterdir())
    with pytest.raises(OSError, match="could not be downloaded"):
        extractor.transform(X)


def test_fit_learns_nothing(scene_paths):
    """It returns the extractor, and what it was shown has no effect."""
    extractor = make()
    assert extractor.fit(scene_paths[:1]) is extractor
    assert_array_equal(extractor.transform(scene_paths), extract(scene_paths))


def test_transform_needs_no_fit(scene_paths):
    """There is nothing to learn."""
    assert_array_equal(make().transform(scene_paths), extract(scene_paths))
    assert_array_equal(clone(make().fit(scene_paths)).transform(scene_paths), extract(scene_paths))


def test_parameters_take_effect_when_they_are_set(scene_paths):
    """Nothing of an earlier fit lingers."""
    extractor = make().fit(scene_paths)
    extractor.set_params(layer="stage1", norm=None)
    expected = extract(scene_paths, layer="stage1", norm=None)
    assert_array_equal(extractor.transform(scene_paths), expected)
    assert extractor.get_feature_names_out()[0] == "stage1_0000"


def test_images_may_follow_a_table(scene_paths, pixels):
    """What an earlier fit saw of a table's columns says nothing about images."""
    extractor = make(image_shape=(20, 24, 3)).fit(pixels.reshape(4, -1))
    extractor.fit(pd.DataFrame({"path": scene_paths}))
    assert len(extractor.get_feature_names_out(["path"])) == 128


@pytest.mark.parametrize("cache", [None, "memory"])
def test_threads_share_one_network(scene_paths, cache):
    """Calls at the same time, of other layers as well, give the rows that each gives alone."""
    tasks = [(layer, scene_paths[start:]) for layer in ("stage1", "stage3") for start in range(4)]
    # Of a seed of its own: threads that ask first also load the network.
    expected = [extract(X, layer=layer, random_state=7) for layer, X in tasks]
    with ThreadPoolExecutor(8) as threads:
        seeds = {"random_state": 7, "cache": cache, "batch_size": 3}
        futures = [threads.submit(extract, X, layer=layer, **seeds) for layer, X in tasks]
        rows = [future.result() for future in futures]
    for here, there in zip(rows, expected, strict=True):
        assert_allclose(here, there, rtol=1e-5, atol=1e-7)


def test_threads_may_share_one_extractor(scene_paths):
    """A server keeps one, for all its requests."""
    extractor = make(batch_size=3).fit(scene_paths)
    expected = extractor.transform(scene_paths)
    with ThreadPoolExecutor(4) as threads:
        rows = list(threads.map(extractor.transform, [scene_paths[i:] for i in range(8)]))
    for start, here in enumerate(rows):
        assert_allclose(here, expected[start:], rtol=1e-5, atol=1e-7)
