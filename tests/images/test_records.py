"""Records: every kind of X reads the same, and anything but a sequence of images is refused."""

import io
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.dtypes import StringDType
from numpy.testing import assert_allclose, assert_array_equal, assert_equal
from PIL import ExifTags, Image
from sklearn.utils import Bunch
from torch.utils.data import DataLoader

from deepfeat._images.decoding import open_image
from deepfeat._images.records import ImageError, as_records, is_tabular

HEIGHT, WIDTH = 6, 7


def read(X, image_shape=None):
    """Open every image of X."""
    return np.stack([np.asarray(record.open()) for record in as_records(X, image_shape)])


def to_pil(picture):
    return Image.fromarray(picture[..., 0] if picture.shape[2:] == (1,) else picture)


def encode(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def encode_all(pictures):
    return [encode(to_pil(picture)) for picture in pictures]


def save(pictures, folder):
    paths = [folder / f"{index}.png" for index in range(len(pictures))]
    for path, picture in zip(paths, pictures, strict=True):
        to_pil(picture).save(path)
    return paths


def save_str(pictures, folder):
    return [str(path) for path in save(pictures, folder)]


def rescale(pictures, dtype):
    """Bring uint8 pictures to the scale of another dtype."""
    if np.dtype(dtype).kind == "f":
        return (pictures / 255).astype(dtype)
    return (pictures.astype(object) * int(np.iinfo(dtype).max) // 255).astype(dtype)


def channels_first(pictures):
    return np.moveaxis(pictures, -1, 1) if pictures.ndim == 4 else pictures[:, None]


def in_objects(items):
    array = np.empty(len(items), dtype=object)
    array[:] = items
    return array


def mapped(pictures, folder):
    np.save(folder / "pictures.npy", pictures)
    return np.load(folder / "pictures.npy", mmap_mode="r")


def frozen(array):
    array = array.copy()
    array.flags.writeable = False
    return array


def rows(pictures):
    return pictures.reshape(len(pictures), -1)


def tensor(pictures, dtype):
    return torch.from_numpy(pictures / 255).to(dtype)


KINDS = {
    "list of str": save_str,
    "tuple of Path": lambda x, folder: tuple(save(x, folder)),
    "array of str": lambda x, folder: np.array(save_str(x, folder)),
    "array of str objects": lambda x, folder: np.array(save_str(x, folder), dtype=object),
    "array of StringDType": lambda x, folder: np.array(save_str(x, folder), StringDType()),
    "array of Path": lambda x, folder: in_objects(save(x, folder)),
    "column of str": lambda x, folder: np.array(save_str(x, folder))[:, None],
    "Series of str": lambda x, folder: pd.Series(save_str(x, folder), dtype="str"),
    "Series of str objects": lambda x, folder: pd.Series(save_str(x, folder), dtype=object),
    "Series of categories": lambda x, folder: pd.Series(save_str(x, folder), dtype="category"),
    "Series of any index": lambda x, folder: pd.Series(save(x, folder), index=[9, 0, 5]),
    "Series of PIL images": lambda x, folder: pd.Series([to_pil(picture) for picture in x]),
    "Series of arrays": lambda x, folder: pd.Series(list(x)),
    "Index of str": lambda x, folder: pd.Index(save_str(x, folder)),
    "DataFrame of str": lambda x, folder: pd.DataFrame({"path": save_str(x, folder)}),
    "DataFrame of arrays": lambda x, folder: pd.DataFrame({"image": list(x)}),
    "DataFrame of rows": lambda x, folder: pd.DataFrame(rows(x)),
    "polars Series of str": lambda x, folder: pl.Series(save_str(x, folder)),
    "polars Series of bytes": lambda x, folder: pl.Series(encode_all(x)),
    "polars DataFrame of str": lambda x, folder: pl.DataFrame({"path": save_str(x, folder)}),
    "list of bytes": lambda x, folder: encode_all(x),
    "list of bytearray": lambda x, folder: [bytearray(data) for data in encode_all(x)],
    "list of memoryview": lambda x, folder: [memoryview(data) for data in encode_all(x)],
    "list of PIL images": lambda x, folder: [to_pil(picture) for picture in x],
    "list of lazy PIL images": lambda x, folder: [
        Image.open(io.BytesIO(data)) for data in encode_all(x)
    ],
    "array of PIL images": lambda x, folder: in_objects([to_pil(picture) for picture in x]),
    "list of arrays": lambda x, folder: list(x),
    "list of arrays, channels first": lambda x, folder: list(channels_first(x)),
    "list of float lists": lambda x, folder: (x / 255).tolist(),
    "list of lazy arrays": lambda x, folder: [LazyArray(picture) for picture in x],
    "list of BytesIO": lambda x, folder: [io.BytesIO(data) for data in encode_all(x)],
    "list of dataset dicts": lambda x, folder: [
        {"bytes": data, "path": None} for data in encode_all(x)
    ],
    "dataset": lambda x, folder: Dataset([to_pil(picture) for picture in x]),
    "dataset of paths": lambda x, folder: Dataset(save(x, folder)),
    "array": lambda x, folder: x,
    "array, channels first": lambda x, folder: channels_first(x),
    "array, Fortran order": lambda x, folder: np.asfortranarray(x),
    "array, read backwards": lambda x, folder: x[::-1, ::-1, ::-1].copy()[::-1, ::-1, ::-1],
    "array, read-only": lambda x, folder: frozen(x),
    "memory map": mapped,
    **{
        f"{dtype} array": lambda x, folder, dtype=dtype: rescale(x, dtype)
        for dtype in ("f2", "f4", "f8", "g", ">f4", "i2", "i4", "i8", "u2", ">u2", "u4", "u8")
    },
    "tensor": lambda x, folder: torch.from_numpy(x),
    "tensor, channels first": lambda x, folder: torch.from_numpy(channels_first(x).copy()),
    "float16 tensor": lambda x, folder: tensor(x, torch.float16),
    "bfloat16 tensor": lambda x, folder: tensor(x, torch.bfloat16),
    "negative view of a tensor": lambda x, folder: torch._neg_view(-tensor(x, torch.float32)),
    "tensor that requires grad": lambda x, folder: tensor(x, torch.float32).requires_grad_(),
    "list of tensors": lambda x, folder: list(tensor(x, torch.bfloat16).requires_grad_()),
    "rows": lambda x, folder: rows(x),
    "rows, Fortran order": lambda x, folder: np.asfortranarray(rows(x)),
    "rows, every other column": lambda x, folder: np.repeat(rows(x), 2, axis=1)[:, ::2],
    "float rows": lambda x, folder: rows(x) / 255,
    "memory-mapped rows": lambda x, folder: mapped(rows(x), folder),
    "tensor of rows": lambda x, folder: tensor(rows(x), torch.bfloat16).requires_grad_(),
}


class Dataset:
    """The interface of all datasets: a length, and images by index."""

    def __init__(self, images):
        self.images = images

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.images[index]


class LazyArray:
    """An object that numpy can convert to an array, such as those of xarray and dask."""

    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        return self.array


COLOURS = {"grey": (), "one channel": (1,), "grey + alpha": (2,), "RGB": (3,), "RGBA": (4,)}


@pytest.fixture(params=KINDS)
def as_kind(request, tmp_path):
    """Turn uint8 pictures (3, H, W[, C]) into one kind of X; a test runs once per kind."""
    return lambda pictures: KINDS[request.param](pictures, tmp_path)


@pytest.fixture(params=COLOURS)
def pictures(request):
    """Three uint8 pictures of each number of channels."""
    shape = (3, HEIGHT, WIDTH, *COLOURS[request.param])
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def on_white(pictures):
    """Lay the alpha of arrays (..., C) on white and copy grey to three channels, in floats."""
    if pictures.shape[-1] in (2, 4):
        alpha = pictures[..., -1:] / 255
        pictures = pictures[..., :-1] * alpha + 255 * (1 - alpha)
    return np.broadcast_to(pictures, (*pictures.shape[:-1], 3))


def test_every_kind_of_input_reads_the_same(as_kind, pictures):
    """The same picture gives the same pixels however it arrives."""
    found = read(as_kind(pictures), pictures.shape[1:])
    assert_array_equal(found, read([to_pil(picture) for picture in pictures]))
    channels = pictures if pictures.ndim == 4 else pictures[..., None]
    opaque = channels.shape[-1] in (1, 3)
    assert_allclose(found, on_white(channels), rtol=0, atol=0 if opaque else 1)


@pytest.mark.parametrize("pictures", ["grey", "RGBA"], indirect=True)
def test_no_kind_of_input_is_changed(as_kind, pictures):
    """Opening X does not change a byte of it."""
    X = as_kind(pictures)
    before = copy_content(X)
    for record in as_records(X, pictures.shape[1:]):
        record.open()
    assert_equal(copy_content(X), before)


@pytest.mark.parametrize("pictures", ["grey", "RGB", "RGBA"], indirect=True)
def test_torch_can_take_over_the_pixels_of_any_kind(as_kind, pictures):
    """They are contiguous and may be written to, so that torch neither copies them nor warns."""
    for record in as_records(as_kind(pictures), pictures.shape[1:]):
        pixels = record.open()
        tensor = torch.from_numpy(pixels)
        assert_equal((tensor.dtype, tensor.shape), (torch.uint8, (HEIGHT, WIDTH, 3)))
        assert tensor.is_contiguous()
        assert np.shares_memory(tensor.numpy(), pixels)


def copy_content(X):
    """Copy the content of X, without the library's help."""
    if hasattr(X, "to_numpy"):
        X = X.to_numpy()
    if isinstance(X, torch.Tensor):
        X = X.detach().double().numpy()
    if isinstance(X, np.ndarray) and X.dtype != object:
        return X.shape, X.dtype.str, X.tobytes()
    if isinstance(X, (list, tuple, np.ndarray)):
        return [copy_content(item) for item in X]
    if isinstance(X, dict):
        return dict(X)
    if isinstance(X, Image.Image):
        return X.mode, X.size, X.tobytes()
    if isinstance(X, (Dataset, LazyArray)):
        return copy_content(*vars(X).values())
    if isinstance(X, io.BytesIO):
        return X.getvalue(), X.tell()
    return bytes(X) if isinstance(X, (bytearray, memoryview)) else X


def test_only_rows_are_a_table(as_kind, colours, request):
    """Numeric tables, one flattened image per row, are distinguished from every kind of images."""
    assert is_tabular(as_kind(colours)) == ("rows" in request.node.callspec.params["as_kind"])


def test_images_of_different_sizes_come_in_one_call():
    """Each image keeps its own size, whatever the others are."""
    shapes = [(9, 5), (5, 9, 3), (20, 6, 4), (30, 8)]
    arrays = [np.zeros(shape, dtype=np.uint8) for shape in shapes]
    mixed = [arrays[0], to_pil(arrays[1]), encode(to_pil(arrays[2])), torch.from_numpy(arrays[3])]
    sizes = [record.open().shape for record in as_records(mixed)]
    assert_equal(sizes, [(*shape[:2], 3) for shape in shapes])


MODES = (
    *("1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"),
    *("I;16", "I;16L", "I;16B", "I", "F"),
)


def sides():
    """Draw a height or width that cannot be mistaken for a number of channels."""
    return st.integers(5, 12)


@st.composite
def pixels(draw, channels):
    """Draw a uint8 array (H, W, C), or (H, W) if the channels are None."""
    last = draw(st.sampled_from(channels))
    shape = draw(sides()), draw(sides())
    return draw(arrays(np.uint8, shape if last is None else (*shape, last)))


@st.composite
def pil_images(draw):
    """Draw a PIL image of any mode, palette and orientation."""
    mode, size = draw(st.sampled_from(MODES)), (draw(sides()), draw(sides()))
    blank = Image.new(mode, size)
    if mode == "F":
        image = Image.fromarray(draw(arrays("f4", size[::-1], elements=st.floats(0, 1, width=32))))
    elif mode == "I":
        image = Image.fromarray(draw(arrays("u1", size[::-1])).astype(np.int32) << 23)
    else:
        count = len(blank.tobytes())
        image = Image.frombytes(mode, size, draw(st.binary(min_size=count, max_size=count)))
    if mode in ("P", "PA"):
        image.putpalette(draw(st.binary(min_size=768, max_size=768)))
    image.getexif()[ExifTags.Base.Orientation] = draw(st.integers(1, 8))
    return image


def sources():
    """Draw an item of a sequence of images; it need not open."""
    return st.text() | st.binary() | st.none() | pixels([None, 3]) | pil_images()


def in_series(items):
    return pd.Series(in_objects(items), dtype=object)


@given(st.lists(sources(), min_size=1), st.sampled_from([list, tuple, in_objects, in_series]))
def test_records_keep_order_and_length(items, container):
    """There is one record per item, with its index, holding it."""
    records = as_records(container(items))
    assert_equal([record.index for record in records], list(range(len(items))))
    for record, item in zip(records, items, strict=True):
        assert record.source is item


LOSSLESS = {
    "PNG": lambda x: encode(to_pil(x), "PNG"),
    "TIFF": lambda x: encode(to_pil(x), "TIFF"),
    "WebP": lambda x: encode(to_pil(x), "WEBP", lossless=True),
    "PPM": lambda x: encode(to_pil(x), "PPM"),
    "PIL": to_pil,
    "uint8": lambda x: x,
    "uint16": lambda x: rescale(x, "u2"),
    "float16": lambda x: rescale(x, "f2"),
    "float32": lambda x: rescale(x, "f4"),
    "float64": lambda x: rescale(x, "f8"),
    "bfloat16": lambda x: tensor(x, torch.bfloat16),
}


@given(pixels([None, 1, 3]), st.sampled_from(list(LOSSLESS)))
def test_lossless_kinds_give_back_every_pixel(picture, kind):
    """Random pixels survive every lossless kind of input."""
    (found,) = read([LOSSLESS[kind](picture)])
    expected = picture if picture.ndim == 3 else picture[..., None]
    assert_array_equal(found, np.broadcast_to(expected, found.shape))


@given(pil_images())
def test_any_mode_opens_as_upright_rgb(image):
    """An image of any mode opens as RGB of its size, its sides swapped if it lies on its side."""
    opened = open_image(image)
    sides = image.size if image.getexif()[ExifTags.Base.Orientation] > 4 else image.size[::-1]
    assert_equal((opened.dtype, opened.shape), (np.dtype(np.uint8), (*sides, 3)))


@pytest.mark.parametrize("shape", [(2, 3, 8, 3), (2, 1, 8, 1), (2, 4, 9, 3)], ids=str)
def test_ambiguous_channels_raise_and_the_advice_works(shape):
    """If both axes could be the channels, X is refused, and what the error advises works."""
    X = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    for refused in (lambda: as_records(X), lambda: as_records(list(X))[1].open()):
        with pytest.raises(ValueError, match="channels first or as channels last") as error:
            refused()
    assert "pass PIL images, or flattened rows with image_shape=(H, W, C)" in str(error.value)
    found = read(X.reshape(2, -1), shape[1:])
    assert_array_equal(found, np.broadcast_to(X, (*shape[:-1], 3)))
    assert_array_equal(found, read([to_pil(picture) for picture in X]))


def test_one_colour_image_raises_and_the_advice_works(colours):
    """(H, W, 3) may be one image, or grey images of width 3; what the error advises works."""
    with pytest.raises(ValueError, match=r"one colour image.*\[X\].*X\[..., None\]"):
        as_records(colours[0])
    assert_array_equal(read([colours[0]])[0], colours[0])
    assert_equal(read(colours[0][..., None]).shape, (HEIGHT, WIDTH, 3, 3))


SINGLE = {
    "str": "a.png",
    "numpy str": np.str_("a.png"),
    "Path": Path("a.png"),
    "bytes": b"\x89PNG",
    "bytearray": bytearray(b"\x89PNG"),
    "memoryview": memoryview(b"\x89PNG"),
    "PIL image": Image.new("L", (2, 2)),
}


@pytest.mark.parametrize("X", SINGLE.values(), ids=SINGLE)
def test_a_single_image_raises(X):
    """A single path, image or byte string is refused, and the error says what to pass."""
    with pytest.raises(ValueError, match=r"got a single image \(.*\): pass \[X\]\."):
        as_records(X)


REFUSED = {
    "generator": ((path for path in ["a.png"]), r"got generator: pass list\(X\)"),
    "map": (map(str, ["a.png"]), r"got map: pass list\(X\)"),
    "dict": ({"a": "a.png"}, r"sequence of images.* got dict: pass the entry of \['a'\]"),
    "dict of data": ({"data": 1, "y": 2}, r"got dict.*, X\['data'\]\.$"),
    "Bunch": (Bunch(data=1, target=2), r"got Bunch.*, X\.data\.$"),
    "DataLoader": (DataLoader([1, 2]), r"got DataLoader.*batches.*pass X\.dataset"),
    "URL": ("https://example.org/a.png", "X is a URL: download 'https://example.org/a.png'"),
    "array of bytes": (np.array([b"BM\0\0"]), r"\|S4, which drops the zero bytes.*dtype=object"),
    "masked array": (np.ma.masked_less(np.zeros((2, 5, 5)), 1), r"masked array.*X\.filled"),
    "sparse tensor": (
        torch.eye(5).to_sparse()[None],
        r"tensor of shape \(1, 5, 5\) on cpu cannot.*dense",
    ),
    "tensor without values": (
        torch.empty(2, 5, 5, device="meta"),
        "on meta cannot be read: .*no data",
    ),
    "set": ({"a.png"}, r"sequence of images.*; got set: pass list\(X\)\."),
    "None": (None, r"sequence of images.*; got NoneType\."),
    "int": (3, r"sequence of images.*; got int\."),
    "float": (0.5, r"sequence of images.*; got float\."),
    "0-d array": (np.array(0.5), r"sequence of images.*; got shape \(\) and"),
    "0-d str": (np.array("a.png"), r"sequence of images.*; got shape \(\) and"),
    "0-d tensor": (torch.tensor(0.5), r"sequence of images.*; got shape \(\) and"),
    "1-D numbers": (np.zeros(5), r"X must have shape \(n, H, W\).*got \(5,\)\."),
    "1-D tensor": (torch.zeros(5), r"X must have shape .*got \(5,\)\."),
    "Series of numbers": (pd.Series([0.5, 1]), r"X must have shape \(n, H, W\).*got \(2,\)\."),
    "5-D array": (np.zeros((1, 2, 5, 5, 3)), r"X must have shape .*got \(1, 2, 5, 5, 3\)\."),
    "rows without a shape": (np.zeros((2, 64)), r"\(2, 64\) has one row per image: set image_sh"),
    "numeric column": (pd.DataFrame({"a": [1.0]}), r"\(1, 1\) has one row per image"),
    "two columns of paths": (pd.DataFrame({"a": ["x"], "b": ["y"]}), r"one column.*\(1, 2\)"),
    "paths and labels": (np.array([["a.png", "1"], ["b.png", "2"]]), r"one column.*\(2, 2\)"),
    "objects in 4-D": (np.zeros((2, 5, 5, 3), dtype=object), r"\(2, 5, 5, 3\) and dtype object"),
    "no channels": (np.zeros((2, 8, 9, 7)), r"\(2, 8, 9, 7\) has no axis of channels.*2, 3 or 4\."),
}


@pytest.mark.parametrize(("X", "message"), REFUSED.values(), ids=REFUSED)
def test_anything_but_a_sequence_of_images_raises(X, message):
    """The error gives the type or shape of X, and those that are accepted."""
    with pytest.raises(ValueError, match=message):
        as_records(X)


EMPTY = {
    "list": [],
    "tuple": (),
    "array of grey": np.zeros((0, 8, 8)),
    "array of colour": np.zeros((0, 8, 8, 3)),
    "array that looks like one image": np.zeros((0, 8, 3)),
    "array of nothing": np.array([]),
    "table": np.zeros((0, 64)),
    "objects": np.array([], dtype=object),
    "Series": pd.Series([], dtype=object),
    "Series of str": pd.Series([], dtype="str"),
    "Series of numbers": pd.Series([], dtype=float),
    "DataFrame": pd.DataFrame({"path": []}),
    "polars Series": pl.Series([]),
    "tensor": torch.zeros(0, 3, 8, 8),
}


@pytest.mark.parametrize("X", EMPTY.values(), ids=EMPTY)
def test_an_empty_x_raises(X):
    """Without any image X is refused, whatever container it is."""
    with pytest.raises(ValueError, match=r"^X is empty: at least one image is needed"):
        as_records(X, (8, 8))


def test_a_missing_file_of_a_dataset_is_named():
    """X alone does not show which file it was."""
    with pytest.raises(ImageError, match=r"^X\[0\] \(from a Dataset\): .* file: 'no/such.png'$"):
        as_records(Dataset(["no/such.png"]))[0].open()


@pytest.mark.parametrize("shape", [(2, 0, 8), (2, 8, 0), (2, 0, 8, 3), (2, 8, 0, 3)], ids=str)
def test_arrays_of_images_without_pixels_raise_one_by_one(shape):
    """Images without height or width are refused one by one, not as an empty X."""
    records = as_records(np.zeros(shape))
    with pytest.raises(ImageError, match=r"^X\[1\] \(float64 array of shape .* has no pixels$"):
        records[1].open()


def test_an_open_file_is_read_from_its_start_and_keeps_its_position(tmp_path, colours):
    """However often it is read, from any position, and by many threads at once."""
    (path,) = save(colours[:1], tmp_path)
    with path.open("rb") as file, zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.write(path, "a.png")
    with path.open("rb") as file, zipfile.ZipFile(tmp_path / "a.zip") as archive:
        for opened in (file, archive.open("a.png"), io.BytesIO(path.read_bytes())):
            opened.seek(9)
            with ThreadPoolExecutor(8) as threads:
                for found in threads.map(lambda record: record.open(), as_records([opened] * 20)):
                    assert_array_equal(found, colours[0])
            assert_equal(opened.tell(), 9)


def test_a_pil_image_of_a_closed_file_says_so(tmp_path):
    """Leaving `with Image.open(path)` before the pixels are read raises a specific error."""
    (path,) = save([np.zeros((5, 5), dtype=np.uint8)], tmp_path)
    with Image.open(path) as image:
        pass
    with pytest.raises(ImageError, match=r"^X\[0\] \(L PIL image\): its file was closed"):
        as_records([image])[0].open()


def test_a_digest_distinguishes_images(as_kind, colours):
    """The digest of an image is the same each time, and differs from that of another image."""
    first, again = (
        [record.digest() for record in as_records(as_kind(colours), colours.shape[1:])]
        for _ in range(2)
    )
    assert_equal(again, first)
    assert_equal(len(set(first)), 3)


@pytest.mark.parametrize("image_shape", [None, (50, 60), (5, 200, 3)], ids=str)
def test_a_memory_map_is_neither_copied_nor_changed(image_shape, tmp_path):
    """Records of a memory-mapped array are views of the file, which does not change."""
    pictures = np.random.default_rng(0).integers(0, 256, (4, 3000), dtype=np.uint8)
    path = tmp_path / "pictures.npy"
    np.save(path, pictures if image_shape else pictures.reshape(4, 50, 60))
    before = path.read_bytes()
    X = np.load(path, mmap_mode="r")
    for record in as_records(X, image_shape):
        assert np.shares_memory(record.source, X)
        record.open()
    assert_equal(path.read_bytes(), before)


@pytest.mark.parametrize("shape", [(9, 10**6, 10**6), (9, 10**6, 10**6, 3), (9, 10**12)], ids=str)
def test_an_array_larger_than_memory_is_split(shape):
    """`as_records` neither reads nor copies: nine terabytes become nine records."""
    X = np.broadcast_to(np.uint8(0), shape)
    assert_equal(len(as_records(X, (10**6, 10**6))), 9)


@pytest.mark.parametrize("container", [list, np.array, pd.Series, in_objects])
def test_fifty_thousand_paths_take_less_than_half_a_second(container):
    """Splitting X takes microseconds per path."""
    X = container([f"{index}.png" for index in range(50_000)])
    seconds = []
    for _ in range(3):
        start = time.process_time()
        is_tabular(X)
        as_records(X)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.5
