"""Decoding: a path, bytes, a PIL image or an array becomes upright 8-bit RGB and has a digest."""

import functools
import hashlib
import importlib
import io
import math
import os
import re
import stat
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageFile, UnidentifiedImageError
from PIL.TiffImagePlugin import (
    BITSPERSAMPLE,
    PHOTOMETRIC_INTERPRETATION,
    SAMPLEFORMAT,
    TiffImageFile,
)

Pixels: TypeAlias = NDArray[Any]
RGB: TypeAlias = NDArray[np.uint8]
Content: TypeAlias = str | os.PathLike[str] | bytes | Image.Image | Pixels

CHANNELS = (1, 2, 3, 4)  # grey, grey + alpha, RGB, RGBA
_DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
_CHUNK = 2**20  # bytes of a file that are read at a time
_ROWS_OR_PIXELS = (list, tuple, np.ndarray), (int, float, np.generic)  # of an image as a list
_NUMPY_FLOATS = ("torch.float16", "torch.float32", "torch.float64")
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
# Resizing may overshoot the scale by up to a fifth. Values further below it are normalised, values
# further above it are on another scale. The rows of a table may hold any numbers, by scikit-learn's
# rules, and are refused only if they are clearly on another scale.
_OVERSHOOT = -0.25, 2.0
_ROW_OVERSHOOT = -math.inf, 127.0
_loading = threading.Lock()
_STRIP = 2**20  # bytes of pixels that are copied from Pillow at a time
_JPEG_SPACES = {"RGB": "RGB", "L": "GRAY"}
_UPRIGHT: dict[Any, Callable[[Pixels], Pixels]] = {  # by EXIF orientation
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: pixels[::-1].swapaxes(0, 1),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: pixels[:, ::-1].swapaxes(0, 1),
}


@dataclass(eq=False)
class DatasetItem:
    """An image of a dataset, fetched each time it is needed."""

    dataset: Any
    index: int
    lock: AbstractContextManager[Any]  # one per dataset, since few datasets are thread-safe
    digest: bytes | None = field(default=None, init=False)

    def read(self) -> Any:
        with self.lock:
            return self.dataset[self.index]


@dataclass(frozen=True)
class RemoteFile:
    """A file on another machine, fetched each time it is needed, in whichever thread needs it."""

    name: str
    fetch: Callable[[], bytes]


def open_image(source: Any, channels_last: bool = False, is_row: bool = False) -> RGB:
    """Open a path, encoded bytes, a PIL image or an array as upright RGB of shape (H, W, 3).

    An array has shape (H, W), (H, W, C) or, unless `channels_last`, (C, H, W). With `is_row` it is
    the row of a table.

    Alpha is composited on white, grey is copied to all three channels, the first frame of an
    animation is used and the EXIF orientation is applied. Floats are read on the scale [0, 1],
    integers on [0, the maximum of their dtype]. The pixels may be those of the source itself, and
    must not be changed.
    """
    if isinstance(source, DatasetItem):
        item = source.read()
        is_known = source.digest is not None
        if is_known and source.digest != digest_image(item, channels_last, is_row):
            raise ValueError(
                "its dataset returns a different image each time, so that no row of it can be "
                "cached: turn off random transforms, or set cache=None (checkpoint=None)"
            )
        source = item
    content = _find_content(source)
    if isinstance(content, np.ndarray):
        return _from_array(content, channels_last, _ROW_OVERSHOOT if is_row else _OVERSHOOT)
    if isinstance(content, Image.Image):
        if 0 in content.size:
            raise ValueError(f"an image of size {content.size} has no pixels")
        _load(content)
        samples = _find_samples(content)
        copy = content.copy()
        _rescale_transparency(copy, content.format)
        return _turn_upright(_as_pixels(_to_rgb(copy, samples)), content)
    with _open_encoded(content) as image:
        pixels = _decode_jpeg(image, content)
        if pixels is not None:
            return pixels
        tile = getattr(image, "tile", None)
        raw_mode = tile[0].args if tile else None  # the layout of the samples in the file
        image.load()
        samples = _find_samples(image)
        _rescale_transparency(image, image.format, raw_mode)
        return _turn_upright(_as_pixels(_to_rgb(image, samples)), image)


def digest_image(source: Any, channels_last: bool = False, is_row: bool = False) -> bytes:
    """Digest the content that an image is opened from: equal digests mean equal pixels."""
    digest = hashlib.blake2b(b"%d%d" % (channels_last, is_row), digest_size=32)
    item = source.read() if isinstance(source, DatasetItem) else source
    for part in _iterate_content(_find_content(item)):
        digest.update(part)
    if isinstance(source, DatasetItem):
        source.digest = digest.digest()
    return digest.digest()


def decoding_settings() -> tuple[bool]:
    """Return the settings that affect the pixels of a file besides its content."""
    return (ImageFile.LOAD_TRUNCATED_IMAGES,)


def unwrap_tensor(X: Any) -> Any:
    """Return a torch tensor as an array and anything else unchanged; refuse masked arrays."""
    if isinstance(X, np.ma.MaskedArray):
        raise ValueError(
            "a masked array has no pixels under its mask: pass X.filled(value), or X.data for the "
            "values under it"
        )
    if not hasattr(X, "requires_grad"):  # not `detach`, which file objects also have
        return X
    try:
        tensor = X.detach().cpu().resolve_conj().resolve_neg()
        if tensor.is_quantized:
            tensor = tensor.dequantize()
        if tensor.is_floating_point() and str(tensor.dtype) not in _NUMPY_FLOATS:
            tensor = tensor.float()
        return tensor.numpy()
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"{describe(X)} on {X.device} cannot be read: {error}") from error


def channels_to_end(array: Pixels, first_axis: int) -> Pixels:
    """Move the channels of (..., H, W, C) or (..., C, H, W) to the end."""
    first, last = array.shape[first_axis] in CHANNELS, array.shape[-1] in CHANNELS
    if first and last:
        raise ValueError(
            f"shape {array.shape} can be read as channels first or as channels last: "
            "pass PIL images, or flattened rows with image_shape=(H, W, C)."
        )
    if not first and not last:
        raise ValueError(
            f"shape {array.shape} has no axis of channels: the first or the last axis of an image "
            "must have length 1, 2, 3 or 4."
        )
    return array if last else np.moveaxis(array, first_axis, -1)


# Sources ----------------------------------------------------------------------------------------


def _find_content(source: Any) -> Content:
    """Reduce any source to a path, encoded bytes, a PIL image or an array."""
    if isinstance(source, (str, bytes, os.PathLike, Image.Image)):
        return source
    if isinstance(source, (bytearray, memoryview)):
        return bytes(source)
    if isinstance(source, RemoteFile):
        return source.fetch()
    if isinstance(source, Mapping):
        return _from_mapping(source)
    if hasattr(source, "read"):
        return _read_whole(source)
    if isinstance(source, (list, tuple)):
        return _from_lists(source)
    if isinstance(source, np.generic) or not hasattr(source, "__array__"):
        raise TypeError(
            "an image must be a path, a PIL image, an array, a tensor, encoded bytes or a binary "
            f"file; got {type(source).__name__}"
        )
    array: Pixels = np.asarray(unwrap_tensor(source))
    if array.dtype.kind == "f" and array.dtype.itemsize > 8:  # a long double, padded with any bytes
        with np.errstate(over="ignore"):
            array = array.astype(np.float64)
    return array


def _from_mapping(source: Mapping[Any, Any]) -> Content:
    """Read an image from a dict, as Hugging Face's datasets store it."""
    if {"bytes", "path"} <= set(source):
        return _find_content(source["path"] if source["bytes"] is None else source["bytes"])
    raise TypeError(
        f"a {type(source).__name__} with the keys {', '.join(map(repr, source))} is not an image: "
        "pass only the images, such as X['image']"
    )


def _from_lists(source: list[Any] | tuple[Any, ...]) -> Pixels:
    if not any(all(isinstance(part, kinds) for part in source) for kinds in _ROWS_OR_PIXELS):
        names = " and ".join(sorted({type(part).__name__ for part in source}))
        raise TypeError(
            f"a {type(source).__name__} of {names} is not an image: pass images without their "
            "labels ([image for image, label in X], or [path for path, label in X.samples] for "
            "an ImageFolder)"
        )
    try:
        return np.asarray(source)
    except ValueError as error:
        raise ValueError("lists of different lengths are not an image") from error


def _read_whole(file: Any) -> bytes:
    """Read an open file from start to end, and restore its position."""
    if getattr(file, "closed", False):
        raise ValueError("the file is closed: pass its path, or open it again")
    if isinstance(file, io.TextIOBase):
        raise TypeError("the file is open in text mode: open it with mode 'rb'")
    try:
        number = file.fileno()
    except (AttributeError, OSError):
        number = None  # not a file of the operating system
    if number is not None:
        _check_regular(os.fstat(number))
    if not (hasattr(file, "seekable") and file.seekable()):
        raise TypeError("the file can be read only once: pass file.read()")
    with _loading:
        position = file.tell()
        try:
            file.seek(0)
            data = file.read()
        finally:
            file.seek(position)
    return bytes(data)


def _open_encoded(source: str | os.PathLike[str] | bytes) -> Image.Image:
    """Open an encoded image, of which Pillow reads only the header."""
    if not isinstance(source, bytes):
        _check_regular(os.stat(source))  # before opening it, which may block for ever
    try:
        return Image.open(io.BytesIO(source) if isinstance(source, bytes) else source)
    except UnidentifiedImageError as error:
        raise ValueError(_explain_unidentified(_first_bytes(source))) from error


def _check_regular(status: os.stat_result) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError
    if not stat.S_ISREG(status.st_mode):
        raise ValueError("not a regular file but a device, a pipe or a socket")


def _iterate_content(content: Content) -> Iterator[bytes]:
    """Yield everything that affects the pixels of an image."""
    if isinstance(content, np.ndarray):
        yield f"array {content.shape} {content.dtype.str}".encode()
        yield content.tobytes()
    elif isinstance(content, Image.Image):
        _load(content)
        orientation = content.getexif().get(ExifTags.Base.Orientation)
        transparency = content.info.get("transparency")
        palette = content.getpalette("RGBA") if content.palette else None
        is_png, samples = content.format == "PNG", _find_samples(content)
        header = (content.mode, content.size, is_png, samples, orientation, transparency, palette)
        yield f"image {header}".encode()
        yield content.tobytes()
    else:
        yield b"encoded"
        if isinstance(content, bytes):
            yield content
            return
        with _open_encoded(content):
            pass  # refuse a video, say, by its header instead of reading it to its end first
        with open(content, "rb") as file:
            while chunk := file.read(_CHUNK):
                yield chunk


# Files and PIL images ---------------------------------------------------------------------------


def _decode_jpeg(image: Image.Image, source: str | os.PathLike[str] | bytes) -> RGB | None:
    """Decode a JPEG bit for bit as Pillow does, but without its copies, if simplejpeg is installed.

    Returns None for what is left to Pillow: rarer kinds, and whatever is wrong with a file.
    """
    decode = _find_jpeg_decoder()
    is_plain = image.format in ("JPEG", "MPO") and image.mode in _JPEG_SPACES
    if decode is None or not is_plain or ImageFile.LOAD_TRUNCATED_IMAGES:
        return None
    if not isinstance(source, bytes):
        with open(source, "rb") as file:
            source = file.read()
    try:
        pixels = decode(source, _JPEG_SPACES[image.mode], fastdct=False, fastupsample=False)
    except ValueError:
        return None
    if pixels.shape[:2] != image.size[::-1]:  # the file holds more than one image
        return None
    return _turn_upright(_as_three_channels(pixels), image)


@functools.cache
def _find_jpeg_decoder() -> Callable[..., Pixels] | None:
    try:
        decode: Callable[..., Pixels] = importlib.import_module("simplejpeg").decode_jpeg
    except ImportError:
        return None
    return decode


def _as_pixels(image: Image.Image) -> RGB:
    """Copy the pixels of an RGB image, in strips: Pillow needs twice as long for a large whole."""
    pixels = np.empty((image.height, image.width, 3), dtype=np.uint8)
    rows = max(1, _STRIP // (3 * image.width))
    for top in range(0, image.height, rows):
        bottom = min(image.height, top + rows)
        pixels[top:bottom] = np.asarray(image.crop((0, top, image.width, bottom)))
    return pixels


def _turn_upright(pixels: RGB, image: Image.Image) -> RGB:
    """Turn the pixels of an image as its EXIF data say.

    Unlike Pillow's function for this, it does not write EXIF data, which fails if they are damaged.
    """
    turn = _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
    return pixels if turn is None else np.ascontiguousarray(turn(pixels))


def _as_three_channels(pixels: RGB) -> RGB:
    """Repeat grey, and copy what is not contiguous or must not be written to, as torch demands."""
    if pixels.ndim == 2 or pixels.shape[-1] == 1:
        pixels = np.repeat(pixels.reshape(*pixels.shape[:2], 1), 3, axis=2)
    return np.require(pixels, requirements=["C", "W"])


class _Samples(NamedTuple):
    """The format of a file's samples, if Pillow does not rescale them to those of a mode."""

    dtype: str
    top: int
    white_is_zero: bool


def _find_samples(image: Image.Image) -> _Samples | None:
    if image.mode == "I" and image.format in ("PNG", "PPM"):
        return _Samples("u2", 65535, False)
    if not isinstance(image, TiffImageFile) or image.mode not in (*_DEEP_MODES, "L"):
        return None
    bits = image.tag_v2.get(BITSPERSAMPLE, (1,))[0]
    is_signed = image.tag_v2.get(SAMPLEFORMAT, (1,))[0] == 2
    if image.mode == "L" and not is_signed:
        return None
    white_is_zero = image.tag_v2.get(PHOTOMETRIC_INTERPRETATION) == 0
    if image.mode == "F":
        return _Samples("f4", 1, white_is_zero)
    dtype = f"{'i' if is_signed else 'u'}{math.ceil(bits / 8)}"
    return _Samples(dtype, 2 ** (bits - is_signed) - 1, white_is_zero)


def _rescale_transparency(image: Image.Image, format: str | None, raw_mode: Any = None) -> None:
    """Bring the transparent colour of a PNG to the scale of the pixels that Pillow returns."""
    transparent = image.info.get("transparency")
    if image.mode == "1" and isinstance(transparent, int):
        image.info["transparency"] = 255 * min(transparent, 1)
    elif format != "PNG" or transparent is None:
        return
    elif raw_mode in ("L;2", "L;4"):
        image.info["transparency"] = transparent * {"L;2": 85, "L;4": 17}[raw_mode]
    elif raw_mode is None and image.mode == "L" and 0 < transparent < 16:
        raise ValueError(
            "Pillow does not keep the bit depth of a grey PNG, on which its transparent level "
            "depends: pass its path"
        )
    elif raw_mode == "RGB;16B" or (image.mode == "RGB" and max(transparent) > 255):
        raise ValueError(
            "Pillow reads a 16-bit PNG as 8 bits, where its transparent colour cannot be "
            "distinguished from others: save it with an alpha channel"
        )


def _load(image: Image.Image) -> None:
    """Load pixels and EXIF data, which Pillow reads lazily, in one thread at a time."""
    with _loading:
        tile = getattr(image, "tile", None)
        try:
            image.load()
        except Exception:
            # Otherwise Pillow considers the image loaded, and the next attempt gets a part of it.
            image.tile = tile  # type: ignore[attr-defined]
            raise
        image.getexif()  # other threads would see it half read


def _to_rgb(image: Image.Image, samples: _Samples | None = None) -> Image.Image:
    if image.mode in _DEEP_MODES or samples is not None:
        return _to_rgb(Image.fromarray(_deep_pixels(image, samples)))
    if image.has_transparency_data:
        image = image.convert("LA") if image.mode == "La" else image
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _deep_pixels(image: Image.Image, samples: _Samples | None) -> NDArray[np.uint8]:
    pixels = np.asarray(image)
    top = None
    if samples is not None:
        pixels, top = pixels.astype(samples.dtype), samples.top
        if samples.white_is_zero:
            pixels = top - pixels
    if image.mode == "I;16" and "transparency" in image.info:  # one transparent grey level
        pixels = np.where(pixels == image.info["transparency"], 65535, pixels).astype(np.uint16)
    return _to_uint8(pixels, top, _OVERSHOOT, _FILE_REMEDIES)


# Arrays -----------------------------------------------------------------------------------------


class _Remedies(NamedTuple):
    """Advice on an image whose values are on another scale."""

    floats: str
    integers: str
    negative: str


_ARRAY_REMEDIES = _Remedies(
    "divide by the maximum of its scale, or cast it (X.astype(np.uint8) for 0 to 255)",
    "cast it to the dtype of its scale (X.astype(np.uint8) for 0 to 255)",
    "if it is normalised, pass the original pixels, since deepfeat normalises them",
)
_RESCALE = "pass its pixels as an array on the scale of its dtype"
_FILE_REMEDIES = _Remedies(*(f"save it with 8 bits, or {_RESCALE}",) * 2, _RESCALE)


def _from_array(array: Pixels, channels_last: bool, overshoot: tuple[float, float]) -> RGB:
    if array.ndim not in (2, 3):
        raise ValueError(
            f"an array of shape {array.shape} is not an image: it must be (H, W) or (H, W, C)"
            + ", or a row that fits image_shape" * (array.ndim == 1)
        )
    if 0 in array.shape:
        raise ValueError(f"an array of shape {array.shape} has no pixels")
    if array.ndim == 3 and not channels_last:
        array = channels_to_end(array, first_axis=0)
    pixels = _to_uint8(array, None, overshoot, _ARRAY_REMEDIES)
    if pixels.ndim == 3 and pixels.shape[-1] in (2, 4):
        return _as_pixels(_to_rgb(Image.fromarray(np.ascontiguousarray(pixels))))
    return _as_three_channels(pixels)


def _to_uint8(
    array: Pixels, top: int | None, overshoot: tuple[float, float], remedies: _Remedies
) -> NDArray[np.uint8]:
    """Map [0, top] to [0, 255].

    The top is 1 for floats, and by default the maximum of the dtype for integers.
    """
    if array.dtype == np.uint8:
        return array
    if array.dtype == bool:
        return np.where(array, 255, 0).astype(np.uint8)
    if array.dtype.kind == "f":
        top = 1
        _check_floats(array, overshoot, remedies)
    elif array.dtype.kind in "iu":
        top = top or int(np.iinfo(array.dtype).max)
        _check_integers(array, top, remedies)
    else:
        raise TypeError(
            f"an array of {array.dtype} is not an image: it must hold floats, integers or booleans"
        )
    low = array.min()
    if low < overshoot[0] * top:
        raise ValueError(
            f"an image of {array.dtype} is read on the scale [0, {top}], but has values down to "
            f"{low:g}: {remedies.negative}"
        )
    return _scale(array, top)


def _check_floats(array: Pixels, overshoot: tuple[float, float], remedies: _Remedies) -> None:
    if not np.isfinite(array).all():
        raise ValueError("the array contains NaN or infinity")
    lowest, highest = overshoot
    high = array.max()
    if high > highest or (high > 1 and (array == np.rint(array)).all()):
        raise ValueError(
            f"a float image is read on the scale [0, 1], but has values up to {high:g}: "
            + (remedies.negative if array.min() < lowest else remedies.floats)
        )


def _check_integers(array: Pixels, top: int, remedies: _Remedies) -> None:
    high = int(array.max())
    if array.dtype.itemsize >= 4 and 0 < high * 255 < top / 2:
        raise ValueError(
            f"an image of {array.dtype} is read on the scale [0, {top}], but its largest value is "
            f"{high}, which is black: {remedies.integers}"
        )


def _scale(array: Pixels, top: int) -> NDArray[np.uint8]:
    scaled = array.astype("f8" if array.dtype.itemsize > 2 else "f4") * (255 / top)
    if scaled.min() < 0 or scaled.max() > 255:
        # Without numbers, so that Python shows a repeated warning once.
        warnings.warn(
            "Pixels outside the scale of their dtype ([0, 1] for floats) were clipped.",
            UserWarning,
            stacklevel=2,
        )
        scaled = np.clip(scaled, 0, 255)
    return np.asarray(np.rint(scaled), dtype=np.uint8)


# Messages ---------------------------------------------------------------------------------------


def describe(source: Any) -> str:
    """Describe the source of an image."""
    try:
        return _describe(source)
    except Exception:  # an object of the user may raise whenever it is accessed
        return type(source).__name__


def _describe(source: Any) -> str:
    if isinstance(source, (str, os.PathLike)):
        return repr(str(os.fspath(source)))
    if isinstance(source, RemoteFile):
        return repr(source.name)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return f"{len(source)} encoded bytes"
    if isinstance(source, Image.Image):
        return f"{source.mode} PIL image"
    if isinstance(source, np.ndarray):
        return f"{source.dtype} array of shape {source.shape}"
    if hasattr(source, "requires_grad"):
        return f"{source.dtype} tensor of shape {tuple(source.shape)}"
    if isinstance(source, DatasetItem):
        return f"from a {type(source.dataset).__name__}"
    return type(source).__name__


def is_url(source: Any) -> bool:
    return isinstance(source, str) and re.match(r"[A-Za-z][A-Za-z0-9+.-]+://", source) is not None


def explain(error: Exception, source: Any) -> str:
    """Explain why an image could not be opened."""
    is_item = isinstance(source, DatasetItem)
    if isinstance(error, OSError) and is_url(source):
        return "this is a URL: download it first and pass the path or the bytes"
    if isinstance(error, FileNotFoundError):
        return "there is no such file" + f": {error.filename!r}" * is_item
    if isinstance(error, IsADirectoryError):
        return "this is a folder, not a file"
    if isinstance(error, MemoryError):
        return "there is not enough memory to open it"
    if isinstance(source, Image.Image) and isinstance(error, (AssertionError, AttributeError)):
        return "its file was closed before all of its pixels were read"
    return str(error) or type(error).__name__


def _explain_unidentified(start: bytes) -> str:
    if not start:
        return "it is empty"
    if start[4:8] == b"ftyp" and start[8:12] in _HEIC_BRANDS:
        return (
            "Pillow needs a plugin to read HEIC: install pillow-heif and call "
            "pillow_heif.register_heif_opener()"
        )
    return f"not an image that Pillow can read; it starts with {start[:8]!r}"


def _first_bytes(source: str | os.PathLike[str] | bytes) -> bytes:
    if isinstance(source, bytes):
        return source[:12]
    with open(source, "rb") as file:
        return file.read(12)
