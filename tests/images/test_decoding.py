"""Decoding: every file, mode and scale against numpy arithmetic, and every kind of failure."""

import contextlib
import gc
import io
import os
import re
import socket
import struct
import threading
import time
import tracemalloc
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal, assert_equal
from PIL import ExifTags, Image, ImageFile

from deepfeat._images.decoding import open_image
from deepfeat._images.records import ImageError, as_records

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


def quantized(tensor, scale):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates quantized tensors
        return torch.quantize_per_tensor(tensor * scale, scale, 0, torch.quint8)


def on_white(pictures):
    """Lay the alpha of arrays (..., C) on white and copy grey to three channels, in floats."""
    if pictures.shape[-1] in (2, 4):
        alpha = pictures[..., -1:] / 255
        pictures = pictures[..., :-1] * alpha + 255 * (1 - alpha)
    return np.broadcast_to(pictures, (*pictures.shape[:-1], 3))


@pytest.fixture(params=["bytes", "path", "PIL image"])
def as_source(request, tmp_path):
    """Pass an encoded image as bytes, as a path or as a PIL image; a test runs once for each."""
    path = tmp_path / "image"

    def convert(data):
        if request.param == "bytes":
            return data
        path.write_bytes(data)
        return path if request.param == "path" else files.enter_context(Image.open(path))

    with contextlib.ExitStack() as files:
        yield convert


INDICES = np.random.default_rng(2).integers(0, 4, (HEIGHT, WIDTH), dtype=np.uint8)
PALETTE = np.array([(250, 10, 20), (30, 200, 40), (5, 60, 220), (90, 90, 90)], dtype=np.uint8)
DEEP = np.linspace(0, 65535, HEIGHT * WIDTH).astype(np.uint16).reshape(HEIGHT, WIDTH)
VERY_DEEP = np.linspace(0, 2**32 - 1, HEIGHT * WIDTH).astype(np.uint32).reshape(HEIGHT, WIDTH)
INKS = np.random.default_rng(3).integers(0, 256, (HEIGHT, WIDTH, 4), dtype=np.uint8)


def grey(values):
    return np.repeat(np.asarray(values)[..., None], 3, axis=-1)


def in_palette(*alpha):
    """Make a palette image of four colours, with an alpha for each if given."""
    image = Image.fromarray(INDICES)
    colours = np.column_stack([PALETTE, alpha]) if alpha else PALETTE
    image.putpalette(colours.astype(np.uint8).tobytes(), "RGBA" if alpha else "RGB")
    return image


def palette_on_white(*alpha):
    return on_white(np.dstack([PALETTE[INDICES], np.array(alpha)[INDICES]]))


def in_cmyk():
    return Image.frombytes("CMYK", (WIDTH, HEIGHT), INKS.tobytes())


def mix(inks):
    return (255.0 - inks[..., :3]) * (255.0 - inks[..., 3:]) / 255


def pack(values, bits):
    """Pack the lowest bits of integers densely; each row starts at a new byte."""
    shifts = np.arange(bits - 1, -1, -1)
    digits = (values[..., None].astype(np.int64) >> shifts) & 1
    return np.packbits(digits.reshape(len(values), -1).astype(bool), axis=1).tobytes()


def make_tiff(values, sample_format, bits=None, white_is_zero=False):
    """Write an uncompressed grey TIFF; its samples are unsigned (1), signed (2) or floats (3)."""
    data, (height, width) = pack(values, bits) if bits else values.tobytes(), values.shape
    bits = bits or values.itemsize * 8
    tags = {
        **{256: width, 257: height, 258: bits, 259: 1, 262: int(not white_is_zero), 273: 8},
        **{277: 1, 278: height, 279: len(data), 339: sample_format},
    }
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    count = struct.pack("<H", len(tags))
    return b"II*\0" + struct.pack("<I", 8 + len(data)) + data + count + entries + bytes(4)


def make_png(values, bits, transparent=None):
    """Write a grey (H, W) or colour (H, W, 3) PNG, with one transparent level or colour."""
    height, width = values.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, bits, 2 * (values.ndim == 3), 0, 0, 0)
    rows = np.frombuffer(pack(values.reshape(height, -1), bits), np.uint8).reshape(height, -1)
    parts = [chunk(b"IHDR", header)]
    if transparent is not None:
        parts.append(chunk(b"tRNS", np.asarray(transparent, ">u2").tobytes()))
    unfiltered = np.insert(rows, 0, 0, axis=1).tobytes()
    parts += [chunk(b"IDAT", zlib.compress(unfiltered)), chunk(b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def levels(bits):
    """Spread pixels over all levels of a bit depth."""
    return np.linspace(0, 2**bits - 1, HEIGHT * WIDTH).round().astype("u4").reshape(HEIGHT, WIDTH)


def make_pgm(values, top):
    height, width = values.shape
    return f"P5 {width} {height} {top}\n".encode() + values.astype(">u2").tobytes()


DARK = INDICES * np.uint8(50)
FILES = {
    "1 bit": (encode(to_pil(INDICES > 1)), grey(255 * (INDICES > 1))),
    "1-bit PBM": (encode(to_pil(INDICES > 1), "PPM"), grey(255 * (INDICES > 1))),
    "palette": (encode(in_palette()), PALETTE[INDICES]),
    "palette, alpha per colour": (
        encode(in_palette(), transparency=bytes([0, 100, 200])),
        palette_on_white(0, 100, 200, 255),
    ),
    "palette, one transparent colour": (
        encode(in_palette(), transparency=2),
        palette_on_white(255, 255, 0, 255),
    ),
    "GIF, one transparent colour": (
        encode(in_palette(), "GIF", transparency=1),
        palette_on_white(255, 0, 255, 255),
    ),
    "RGB, one transparent colour": (
        encode(to_pil(PALETTE[INDICES]), transparency=tuple(PALETTE[3].tolist())),
        palette_on_white(255, 255, 255, 0),
    ),
    "grey, one transparent level": (
        encode(to_pil(DARK), transparency=100),
        grey(np.where(DARK == 100, 255, DARK)),
    ),
    "16-bit grey, one transparent level": (
        encode(to_pil(DEEP), transparency=int(DEEP[2, 3])),
        grey(np.where(DEEP[2, 3] == DEEP, 255, DEEP / 257)),
    ),
    "RGBA WebP": (encode(to_pil(INKS), "WEBP", lossless=True, exact=True), on_white(INKS)),
    "CMYK": (encode(in_cmyk(), "TIFF"), mix(INKS)),
    "16-bit PNG": (encode(to_pil(DEEP)), grey(DEEP / 257)),
    "16-bit TIFF": (encode(to_pil(DEEP), "TIFF"), grey(DEEP / 257)),
    "16-bit PGM": (make_pgm(DEEP, 65535), grey(DEEP / 257)),
    "12-bit PGM": (make_pgm(DEEP // 16, 4095), grey(DEEP / 257)),
    "signed 16-bit TIFF": (make_tiff(DEEP // 2, 2), grey(DEEP / 257)),
    "32-bit TIFF": (make_tiff(VERY_DEEP, 1), grey(VERY_DEEP / 16843009)),
    "signed 32-bit TIFF": (make_tiff(VERY_DEEP // 2, 2), grey(VERY_DEEP / 16843009)),
    "float TIFF": (make_tiff((DEEP / 65535).astype("f4"), 3), grey(DEEP / 257)),
    "float TIFF, white is 0": (
        make_tiff((DEEP / 65535).astype("f4"), 3, white_is_zero=True),
        grey(255 - DEEP / 257),
    ),
    "16-bit TIFF, white is 0": (make_tiff(DEEP, 1, white_is_zero=True), grey(255 - DEEP / 257)),
    "signed 8-bit TIFF": (make_tiff(levels(7).astype("i1"), 2), grey(levels(7) / 127 * 255)),
    "12-bit TIFF": (make_tiff(levels(12), 1, 12), grey(levels(12) / 4095 * 255)),
    **{
        f"{bits}-bit TIFF{', white is 0' * inverse}": (
            make_tiff(levels(bits), 1, bits, inverse),
            grey(abs(255 * inverse - levels(bits) / (2**bits - 1) * 255)),
        )
        for bits in (1, 2, 4, 8)
        for inverse in (False, True)
    },
    **{
        f"{bits}-bit PNG": (make_png(levels(bits), bits), grey(levels(bits) / (2**bits - 1) * 255))
        for bits in (1, 2, 4, 8, 16)
    },
    "1-bit PNG, transparent black": (
        make_png(levels(1), 1, 0),
        grey(np.full((HEIGHT, WIDTH), 255)),
    ),
    "1-bit PNG, transparent white": (make_png(levels(1), 1, 1), grey(levels(1) * 255)),
    "4-bit PNG, transparent black": (
        make_png(levels(4), 4, 0),
        grey(np.where(levels(4) == 0, 255, levels(4) * 17)),
    ),
    "16-bit colour PNG": (make_png(grey(DEEP), 16), grey(DEEP / 257)),
}


@pytest.mark.parametrize(("data", "expected"), FILES.values(), ids=FILES)
def test_every_colour_type_becomes_rgb(data, expected, as_source):
    """Grey is copied, alpha laid on white, inks mixed and depth scaled, to within one level."""
    assert_allclose(read([as_source(data)])[0], expected, rtol=0, atol=1)


@pytest.mark.parametrize(("bits", "transparent"), [(2, 1), (2, 2), (4, 3), (4, 14)])
def test_a_transparent_level_of_few_bits_is_white(bits, transparent, tmp_path):
    """This holds for a file; a PIL image, which does not keep its bit depth, is refused."""
    data = make_png(levels(bits), bits, transparent)
    expected = np.where(levels(bits) == transparent, 255, levels(bits) * (255 // (2**bits - 1)))
    path = tmp_path / "image.png"
    path.write_bytes(data)
    assert_array_equal(read([data, path]), [grey(expected)] * 2)
    with pytest.raises(ImageError, match=r"^X\[0\] \(L PIL image\): Pillow .*pass its path"):
        read([open_pil(data)])


def test_a_transparent_colour_of_16_bits_is_refused(as_source):
    """Pillow keeps 8 bits per sample, where this colour cannot be distinguished from others."""
    data = make_png(grey(DEEP), 16, [int(DEEP[2, 3])] * 3)
    with pytest.raises(ImageError, match=r"16-bit PNG .* transparent colour .*save it with an"):
        read([as_source(data)])


PREMULTIPLIED = np.minimum(INKS, INKS[..., 3:])
MODES = {
    "I;16": (Image.fromarray(DEEP), grey(DEEP / 257)),
    "I;16B": (
        Image.frombytes("I;16B", (WIDTH, HEIGHT), DEEP.astype(">u2").tobytes()),
        grey(DEEP / 257),
    ),
    "I": (Image.fromarray((VERY_DEEP // 2).astype("i4")), grey(VERY_DEEP / 16843009)),
    "F": (Image.fromarray((DEEP / 65535).astype("f4")), grey(DEEP / 257)),
    "CMYK": (in_cmyk(), mix(INKS)),
    "RGBX": (Image.frombytes("RGBX", (WIDTH, HEIGHT), INKS.tobytes()), INKS[..., :3]),
    "RGBa": (
        Image.frombytes("RGBa", (WIDTH, HEIGHT), PREMULTIPLIED.tobytes()),
        PREMULTIPLIED[..., :3] + 255.0 - PREMULTIPLIED[..., 3:],
    ),
    "La": (
        Image.frombytes("LA", (WIDTH, HEIGHT), PREMULTIPLIED[..., 2:].tobytes()).convert("La"),
        on_white(PREMULTIPLIED[..., 2:]),
    ),
    "P": (in_palette(), PALETTE[INDICES]),
    "P with alpha": (in_palette(0, 100, 200, 255), palette_on_white(0, 100, 200, 255)),
}


@pytest.mark.parametrize(("image", "expected"), MODES.values(), ids=MODES)
def test_every_pil_mode_becomes_rgb(image, expected):
    """PIL images that do not come from a file are read on the scale of their mode."""
    atol = 2 if image.mode in ("La", "RGBa") else 1  # premultiplied: rounded once more
    assert_allclose(np.asarray(open_image(image)), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("size", [(1000, 1000), (500_000, 3), (3, 500_000), (1, 1)], ids=str)
def test_images_of_many_pixels_are_read_whole(size, as_source):
    """Their pixels are copied in strips, of which the last is lower, or one is a row."""
    pixels = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    assert_array_equal(read([as_source(encode(to_pil(pixels), "PPM"))])[0], pixels)


# Where row 0 and column 0 of the stored image belong, by TIFF 6.0, page 36.
SIDES = {
    1: ("top", "left"),
    2: ("top", "right"),
    3: ("bottom", "right"),
    4: ("bottom", "left"),
    5: ("left", "top"),
    6: ("right", "top"),
    7: ("right", "bottom"),
    8: ("left", "bottom"),
}


@pytest.mark.parametrize("orientation", SIDES)
@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP", "JPEG"])
def test_exif_orientation_is_applied(format, orientation, as_source, colours):
    """The first row and column of the stored image end up on the sides that the tag names."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 100, "subsampling": 0}}
    stored = np.repeat(np.repeat(colours[0], 4, axis=0), 4, axis=1)
    data = encode(to_pil(stored), format, exif=exif, **options.get(format, {}))

    expected = stored
    if SIDES[orientation][0] in ("left", "right"):
        expected = expected.transpose(1, 0, 2)
    if "right" in SIDES[orientation]:
        expected = expected[:, ::-1]
    if "bottom" in SIDES[orientation]:
        expected = expected[::-1]
    atol = 12 if format == "JPEG" else 0
    assert_allclose(read([as_source(data)])[0].astype(int), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP"])
def test_the_first_frame_of_an_animation_is_read(format, as_source):
    """An animated GIF, PNG or WebP opens as its first frame."""
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    options = {"lossless": True} if format == "WEBP" else {}
    data = encode(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert_equal(Image.open(io.BytesIO(data)).n_frames, 3)
    assert_array_equal(read([as_source(data)])[0], np.full((8, 8, 3), (255, 0, 0)))


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", "u1", "u2", "i2", "u4", "i8"])
def test_the_pixels_of_an_image_do_not_depend_on_its_neighbours(dtype):
    """A dark image stays dark and a bright one bright, alone or together, in any order."""
    levels = np.linspace(0, 1, HEIGHT * WIDTH).reshape(HEIGHT, WIDTH)
    images = np.stack([levels * share for share in (1, 0.1, 0.6)])
    top = 1 if dtype[0] == "f" else np.iinfo(dtype).max
    X = (images * np.nextafter(float(top), 0)).astype(dtype)
    alone = np.concatenate([read(X[[index]]) for index in range(3)])
    assert_array_equal(read(X), alone)
    assert_array_equal(read(X[::-1]), alone[::-1])
    assert_allclose(alone, grey(images * 255), rtol=0, atol=1)


def test_booleans_are_black_and_white():
    """True is white and False is black."""
    assert_array_equal(read(np.array([[[True, False]]])), [[[[255] * 3, [0] * 3]]])


@pytest.mark.parametrize(("low", "high"), [(0, 1.02), (-0.03, 1), (-0.2, 1.3)])
def test_floats_just_off_the_scale_are_clipped_with_one_warning(low, high):
    """An overshoot, as resampling produces, is clipped with one warning per image."""
    levels = np.linspace(low, high, 42).reshape(6, 7)
    with pytest.warns(UserWarning, match=r"^Pixels outside the scale.* were clipped\.$") as caught:
        found = read([levels])[0]
    assert_equal(len(caught), 1)
    assert_allclose(found, grey(np.clip(levels, 0, 1) * 255), rtol=0, atol=0.5001)


WRONG_SCALES = {
    "digits 0 to 16": (np.arange(64.0).reshape(8, 8) % 17, "values up to 16: divide"),
    "floats 0 to 255": (np.arange(256.0).reshape(16, 16), "up to 255.*astype.np.uint8"),
    "floats 0 to 255, resized": (np.linspace(0.5, 254.7, 64).reshape(8, 8), "up to 254.7"),
    "float32 0 to 2": (np.arange(64).reshape(8, 8).astype("f4") % 3, "values up to 2"),
    "int64 0 to 255": (
        np.arange(256).reshape(16, 16),
        "int64.*largest value is 255.*astype.np.uint8",
    ),
    "int32 0 to 65535": (
        np.arange(0, 65536, 256, dtype="i4").reshape(16, 16),
        "largest value is 65280",
    ),
    "uint32 0 to 255": (np.arange(256, dtype="u4").reshape(16, 16), r"\[0, 4294967295\]"),
    "float TIFF 0 to 255": (
        make_tiff(np.arange(12.0, dtype="f4").reshape(3, 4) + 0.5, 3),
        "11.5: s",
    ),
    "float TIFF, negative": (make_tiff(np.full((3, 4), -1, "f4"), 3), "to -1: pass its pixels"),
    "brighter than by resizing": (np.linspace(0, 2.1, 64).reshape(8, 8), "values up to 2.1"),
    "ImageNet's mean and deviation": (
        (np.linspace(0, 0.9, 64).reshape(8, 8) - 0.485) / 0.229,
        "values down to -2.1.*: if it is normalised, pass the original pixels",
    ),
    "ImageNet's, with white": (
        (torch.linspace(0, 1, 64).reshape(8, 8) - 0.456) / 0.224,
        "values up to 2.4.*: if it is normalised, pass the original pixels",
    ),
    "from -1 to 1": (np.linspace(-1, 1, 64).reshape(8, 8), "down to -1: if it is normalised"),
    "signed, from -127 to 127": (np.arange(-127, 127, 2).astype("i1").reshape(1, -1), "to -127"),
    "I image 0 to 255": (Image.new("I", (5, 5), 200), "largest value is 200"),
    "F image 0 to 255": (Image.new("F", (5, 5), 200), "values up to 200"),
}


@pytest.mark.parametrize(("source", "message"), WRONG_SCALES.values(), ids=WRONG_SCALES)
def test_values_on_a_wrong_scale_are_refused(source, message):
    """Values that cannot be on the scale of their dtype raise an error that says how to fix it."""
    with pytest.raises(ImageError, match=rf"(?s)^X\[1\] .*{message}") as caught:
        as_records([np.zeros((5, 5)), source])[1].open()
    is_array = isinstance(source, (np.ndarray, torch.Tensor))
    assert is_array or "X.astype" not in str(caught.value)


@pytest.mark.parametrize("dtype", ["f8", "i8", "u4"])
def test_black_is_on_every_scale(dtype):
    """An image of zeros is black, not a wrong scale."""
    assert_array_equal(read(np.zeros((2, 5, 5), dtype)), np.zeros((2, 5, 5, 3)))


class Stream(io.RawIOBase):
    """A file that can be read only once, such as one from the network."""

    def __init__(self, data):
        super().__init__()
        self.data = data

    def read(self, size=-1):
        return self.data


def bomb():
    """Declare 400 million pixels in a PNG of a few bytes."""
    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0"))


def noise(side=40):
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype="u1"))


def broken_png():
    """Corrupt the middle of the compressed pixels; the PNG keeps its length."""
    data = bytearray(encode(noise()))
    data[1000:1004] = b"oops"
    return bytes(data)


BAD_FILES = {
    "truncated JPEG": (encode(noise(), "JPEG")[:700], "truncated"),
    "truncated PNG": (encode(noise())[:700], "truncated"),
    "broken PNG": (broken_png(), "broken data stream|unrecognized data stream"),
    "zero bytes": (b"", "it is empty"),
    "text": (b"hello world", "not an image that Pillow can read; it starts with b'hello wo'"),
    "bomb": (bomb(), "400000000 pixels.* exceeds limit"),
}


@pytest.mark.parametrize(("data", "reason"), BAD_FILES.values(), ids=BAD_FILES)
def test_an_error_about_a_file_gives_its_index_and_the_reason(data, reason, tmp_path):
    """A file that cannot be read is identified by index and path, bytes by index and length."""
    path = tmp_path / "bad.jpg"
    path.write_bytes(data)
    for source, kind in ((path, repr(str(path))), (data, f"{len(data)} encoded bytes")):
        with pytest.raises(ImageError, match=rf"^X\[1\] \({re.escape(kind)}\): .*({reason})"):
            as_records([np.zeros((5, 5)), source])[1].open()


BAD_SOURCES = {
    "URL": ("https://example.org/a.png", "this is a URL: download it first"),
    "HEIC": (b"\0\0\0\x18ftypheic" + bytes(99), "install pillow-heif"),
    "masked array": (
        np.ma.masked_greater(np.zeros((5, 5)) + np.eye(5), 0.5),
        r"a masked array has no pixels under its mask: pass X\.filled",
    ),
    "ragged lists": ([[1, 2], [3]], "lists of different lengths"),
    "image and label": ((np.zeros((5, 5)), 3), r"tuple of int and ndarray .*without their labels"),
    "mapping": ({"image": 1, "label": 3}, r"a dict with the keys 'image', 'label'.*X\['image'\]"),
    "stream": (Stream(b"abc"), r"read only once: pass file\.read\(\)"),
    "text file": (io.StringIO("abc"), "open in text mode: open it with mode 'rb'"),
    "missing file": ("no/such.png", r"'no/such.png'\): there is no such file$"),
    "folder": (os.curdir, "'.'.: this is a folder, not a file$"),
    "null byte": ("a\0.png", "null (byte|character)"),
    "NaN": (
        np.full((5, 5), np.nan),
        "float64 array of shape .5, 5..: the array contains NaN or inf",
    ),
    "infinity": (np.array([[0, np.inf]]), "the array contains NaN or infinity$"),
    "NaN in bfloat16": (torch.full((5, 5), torch.nan).bfloat16(), "contains NaN or infinity$"),
    "NaN in a PIL image": (Image.new("F", (5, 5), float("nan")), "F PIL image.: .*contains NaN"),
    "no height": (np.zeros((0, 5)), r"array of shape \(0, 5\) has no pixels$"),
    "PIL image without pixels": (Image.new("RGB", (0, 5)), r"of size \(0, 5\) has no pixels$"),
    "no width": (np.zeros((5, 0, 3)), r"array of shape \(5, 0, 3\) has no pixels$"),
    "vector": (
        np.zeros(64),
        r"array of shape \(64,\) is not an image: it must be \(H, W\) or \(H, W, C\), or a row",
    ),
    "batch": (np.zeros((1, 5, 5, 3)), r"array of shape \(1, 5, 5, 3\) is not an image"),
    "no channels": (np.zeros((8, 9, 7)), r"\(8, 9, 7\) has no axis of channels.* 1, 2, 3 or 4\.$"),
    "complex": (np.zeros((5, 5), complex), "an array of complex128 is not an image"),
    "dates": (np.zeros((5, 5), "M8[s]"), r"an array of datetime64\[s\] is not an image"),
    "objects": (np.zeros((5, 5), object), "an array of object is not an image"),
    "None": (None, "NoneType.: an image must be a path, .* or a binary file; got NoneType$"),
    "missing value": (float("nan"), "float.: an image must be a path, .*; got float$"),
    "number": (3, "int.: an image must be a path, .*; got int$"),
}


@pytest.mark.parametrize(("source", "reason"), BAD_SOURCES.values(), ids=BAD_SOURCES)
def test_an_error_about_a_source_gives_its_index_and_the_reason(source, reason):
    """A source that is not an image raises only when it is opened, with its index and type."""
    records = as_records(["a.png", "b.png", source])
    with pytest.raises(ImageError, match=rf"^X\[2\] \(.*{reason}"):
        records[2].open()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="a system without devices and pipes")
def test_only_regular_files_are_read(tmp_path):
    """Devices, pipes and sockets, which may never end, are refused, by path and as open files."""
    fifo = tmp_path / "pipe"
    os.mkfifo(fifo)
    with open("/dev/zero", "rb") as device, socket.socket() as network:
        for source in (fifo, "/dev/zero", device, network.makefile("rb")):
            (record,) = as_records([source])
            for read in (record.open, record.digest):
                with pytest.raises(
                    ImageError, match="not a regular file but a device, a pipe or a"
                ):
                    read()


def test_a_large_file_is_never_read_into_memory_as_a_whole(tmp_path):
    """It is digested in chunks, and refused by its first bytes if it is not an image."""
    path = tmp_path / "large.ppm"
    path.write_bytes(b"P6 4000 4000 255\n" + bytes(3 * 4000 * 4000))
    tracemalloc.start()
    try:
        as_records([path])[0].digest()
        assert tracemalloc.get_traced_memory()[1] < 2**23
    finally:
        tracemalloc.stop()
    with path.open("wb") as file:
        file.write(b"\0\0\0\x20ftypisom")
        file.truncate(2**34)  # a sparse file of zeros, which would take half a minute to digest
    with pytest.raises(ImageError, match=r"not an image that Pillow can read; it starts with b'"):
        as_records([path])[0].digest()


@pytest.mark.parametrize("format", ["JPEG", "progressive", "PNG", "GIF", "BMP", "TIFF", "WEBP"])
def test_a_truncated_file_never_opens_as_another_picture(format):
    """Wherever a file is cut, it opens as the whole picture or raises an error."""
    options = {"progressive": True} if format == "progressive" else {}
    data = encode(noise(), format.replace("progressive", "JPEG"), **options)
    whole = read([data])[0]
    for stop in [*range(0, len(data), len(data) // 25), *range(len(data) - 4, len(data))]:
        with contextlib.suppress(ImageError):
            assert_array_equal(as_records([data[:stop]])[0].open(), whole)


@pytest.mark.parametrize("name", ["truncated JPEG", "truncated PNG", "broken PNG"])
def test_a_bad_pil_image_is_refused_every_time(name, tmp_path):
    """Pillow considers an image loaded after a failure; a second attempt must fail as well."""
    data, reason = BAD_FILES[name]
    path = tmp_path / "image"
    path.write_bytes(data)
    for file in (path, io.BytesIO(data)):
        with Image.open(file) as image:
            for words in (reason, f"{reason}|file was closed", f"{reason}|file was closed"):
                with pytest.raises(ImageError, match=rf"^X\[0\] \(RGB PIL image\): .*({words})"):
                    as_records([image])[0].open()


def changed(image, orientation=1, **info):
    image.info.update(info)
    image.getexif()[ExifTags.Base.Orientation] = orientation
    return image


def open_pil(data):
    return Image.open(io.BytesIO(data))


LOOK_ALIKES = {
    "shapes": (INDICES, INDICES.reshape(WIDTH, HEIGHT)),
    "signs": (np.full((5, 5), 100, "u1"), np.full((5, 5), 100, "i1")),
    "byte orders": (DEEP, DEEP.view(">u2")),
    "modes": tuple(Image.frombytes(mode, (5, 5), bytes(range(75))) for mode in ("RGB", "YCbCr")),
    "palettes": (in_palette(), in_palette(0, 0, 0, 255)),
    "transparent colours": (
        changed(in_palette(), transparency=1),
        changed(in_palette(), transparency=2),
    ),
    "orientations": (changed(in_palette()), changed(in_palette(), orientation=3)),
    "stored signs": tuple(open_pil(make_tiff(VERY_DEEP // 2, kind)) for kind in (1, 2)),
    "which level is white": tuple(
        open_pil(make_tiff(DEEP, 1, None, inverse)) for inverse in (0, 1)
    ),
    "depths": (
        open_pil(make_tiff(levels(12), 1, 12)),
        open_pil(make_tiff(levels(12).astype("u2"), 1)),
    ),
    "scales of quantized tensors": tuple(quantized(torch.eye(9), scale) for scale in (0.5, 0.25)),
}


@pytest.mark.parametrize("sources", LOOK_ALIKES.values(), ids=LOOK_ALIKES)
@pytest.mark.filterwarnings("ignore:Pixels outside the scale")
def test_look_alikes_have_different_digests(sources):
    """Sources that hold the same bytes but open as different pixels have different digests."""
    one, other = as_records(list(sources))
    with pytest.raises(AssertionError):
        assert_array_equal(np.asarray(one.open()), np.asarray(other.open()))
    assert one.digest() != other.digest()


@pytest.mark.skipif(np.finfo("g").nmant != 63, reason="long doubles without padding")
def test_the_padding_of_long_doubles_does_not_affect_their_digest():
    """They hold ten bytes in sixteen; the other six are whatever was in memory before."""
    image = np.linspace(0, 1, 42, dtype="g").reshape(6, 7)
    dirty = image.copy()
    dirty.view("u1").reshape(6, 7, -1)[..., 10:] = 255
    one, other = as_records([image, dirty])
    assert_array_equal(one.open(), other.open())
    assert_equal(one.digest(), other.digest())


def test_a_source_that_cannot_be_read_cannot_be_digested():
    """The error names the image and the reason, as it does when the image is opened."""
    broken = open_pil(BAD_FILES["broken PNG"][0])
    for source, reason in (("no/such.png", "no such"), (None, "must be a path"), (broken, "data")):
        with pytest.raises(ImageError, match=rf"^X\[1\] \(.*: .*{reason}"):
            as_records(["a.png", source])[1].digest()


def test_no_file_is_left_open(tmp_path):
    """A file of any format is closed after it was read, also if it could not be read."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for format in ("PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP", "PPM"):
            data = encode(noise(), format)
            for share in (1, 0.6, 0):
                path = tmp_path / f"{share}.{format}"
                path.write_bytes(data[: int(share * len(data))])
                with contextlib.suppress(ImageError):
                    as_records([path])[0].open()
        gc.collect()
    assert_equal([str(warning.message) for warning in caught], [])


def test_a_pil_image_is_left_as_it_was():
    """Opening a PIL image leaves its pixels, mode, palette, orientation and other data alone."""
    image = in_palette()
    image.info["transparency"] = 2
    image.getexif()[ExifTags.Base.Orientation] = 6
    before = image.copy(), dict(image.info), dict(image.getexif()), image.getpalette()
    open_image(image)
    assert_equal((image, dict(image.info), dict(image.getexif()), image.getpalette()), before)


def test_a_pil_animation_stays_open():
    """The user can still seek to the other frames of an animation."""
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime")]
    image = Image.open(
        io.BytesIO(encode(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    )
    open_image(image)
    assert_equal(image.tell(), 0)
    image.seek(1)
    assert_equal(image.convert("RGB").getpixel((0, 0)), (0, 255, 0))


def test_one_lazy_image_can_be_opened_from_many_threads(monkeypatch, colours):
    """Threads that open the same lazy PIL image at once all get it whole and upright."""
    load_exif, load_prepare = Image.Exif.load, ImageFile.ImageFile.load_prepare

    def slowly(function):
        def run(*args):
            time.sleep(0.02)
            return function(*args)

        return run

    # Make it likely that a second thread sees an image half read.
    monkeypatch.setattr(Image.Exif, "load", slowly(load_exif))
    monkeypatch.setattr(ImageFile.ImageFile, "load_prepare", slowly(load_prepare))
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 3
    image = Image.open(io.BytesIO(encode(to_pil(colours[0]), exif=exif)))
    together = threading.Barrier(8)

    def open_it(record):
        together.wait()
        return np.asarray(record.open())

    with ThreadPoolExecutor(8) as threads:
        for found in threads.map(open_it, as_records([image] * 8)):
            assert_array_equal(found, colours[0][::-1, ::-1])
