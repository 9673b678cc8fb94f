"""Knows how any X becomes a list of records, and how a record opens as an upright RGB image."""

import hashlib
import io
import math
import numbers
import os
import threading
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import BITSPERSAMPLE, SAMPLEFORMAT, TiffImageFile

Pixels: TypeAlias = NDArray[Any]
Source: TypeAlias = str | os.PathLike[str] | bytes | Image.Image | Pixels
ImageShape: TypeAlias = tuple[int, ...] | None

_CHANNELS = (1, 2, 3, 4)  # grey, grey + alpha, RGB, RGBA
_DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
_SINGLE = (str, bytes, bytearray, memoryview, os.PathLike, Image.Image)
_loading = threading.Lock()


class ImageError(ValueError):
    """An image cannot be read. The arguments are its place in X, in words, and the reason."""

    def __str__(self) -> str:
        return ": ".join(map(str, self.args))


@dataclass(frozen=True, eq=False)
class Record:
    """One image of X: where it stands, and what it can be opened from."""

    index: int
    source: Any
    channels_last: bool = False
    of: str = "X"  # what it was given as

    def __str__(self) -> str:
        return f"{self.of}[{self.index}] ({_describe(self.source)})"

    def open(self) -> Image.Image:
        """Return the upright RGB image.

        Raises
        ------
        ImageError
            If it cannot be read, naming the index, the path or kind, and the reason.
        """
        try:
            return open_image(self.source, self.channels_last)
        except MemoryError:
            raise
        except Exception as error:
            raise ImageError(str(self), _reason(error, self.source)) from error

    def error(self, cause: Exception) -> ImageError:
        """Return an error that names this image, where whatever was done to it raised `cause`."""
        if isinstance(cause, ImageError):
            return cause
        error = ImageError(str(self), f"{type(cause).__name__}: {cause}")
        error.__cause__ = cause
        return error

    def digest(self) -> bytes:
        """Digest what the image is opened from: equal digests, equal pixels.

        Raises
        ------
        ImageError
            If a file cannot be read.
        """
        digest = hashlib.blake2b(b"%d" % self.channels_last, digest_size=32)
        try:
            for part in _content(self.source):
                digest.update(part)
        except MemoryError:
            raise
        except Exception as error:
            raise ImageError(str(self), _reason(error, self.source)) from error
        return digest.digest()

    def stat(self) -> tuple[str, int, int, int, int, int] | None:
        """Return path, size, mtime_ns, ctime_ns, inode and device of a file; None for others."""
        if not isinstance(self.source, (str, os.PathLike)):
            return None
        try:
            status = os.stat(self.source)
        except OSError:
            return None
        times = status.st_mtime_ns, status.st_ctime_ns
        path = os.path.abspath(os.fspath(self.source))
        return path, status.st_size, *times, status.st_ino, status.st_dev


def as_records(X: Any, image_shape: ImageShape = None, of: str = "X") -> list[Record]:
    """Take any X apart into one record an image, without reading a pixel.

    Parameters
    ----------
    X : sequence of images, or an array of them
        Paths, PIL images, arrays, tensors or encoded bytes, in a list, a tuple, an object array,
        a Series or a one-column DataFrame; or one array or tensor of shape (n, H, W),
        (n, H, W, C) or (n, C, H, W); or, with `image_shape`, rows of shape (n, H * W * C).
    image_shape : tuple of int, optional
        (H, W) or (H, W, C) of a flattened row; one entry may be -1.
    of : str, default="X"
        What an error calls `X`, where it names one of the images.
    """
    X = _unwrap_columns(X)
    if not len(X):
        raise ValueError("X is empty: at least one image is needed.")
    if isinstance(X, np.ndarray):
        images = _split_array(X, image_shape)
        return [Record(index, image, True, of) for index, image in enumerate(images)]
    return [Record(index, _as_source(item), of=of) for index, item in enumerate(X)]


def is_tabular(X: Any) -> bool:
    """Tell whether X is a numeric table, one flattened image a row, rather than images."""
    if hasattr(X, "columns") and hasattr(X, "dtypes"):  # a pandas or polars DataFrame
        return X.shape[1] != 1 or X.to_numpy().dtype.kind in "biuf"
    if isinstance(X, (list, tuple)):
        return len(X) > 0 and not _is_image(X[0])
    if hasattr(X, "__array__") and not hasattr(X, "ndim"):
        X = np.asarray(X)
    kind = getattr(getattr(X, "dtype", None), "kind", "")
    if kind == "O":
        return X.ndim == 2 and not (X.size and _is_image(X.ravel()[0]))
    # A single dimension of numbers is a table gone wrong.
    return kind not in ("U", "S", "T") and getattr(X, "ndim", 0) in ((1, 2) if kind else (2,))


def unwrap_tensor(X: Any) -> Any:
    """Return a torch tensor as an array, and anything else as it is."""
    if not hasattr(X, "requires_grad"):  # `detach` would take a file object for one
        return X
    tensor = X.detach().cpu()
    if str(tensor.dtype) == "torch.bfloat16":  # numpy has no such type
        tensor = tensor.float()
    return tensor.numpy()


def open_image(source: Source, channels_last: bool = False) -> Image.Image:
    """Open a path, encoded bytes, a PIL image or an array as upright 8-bit RGB.

    An array is (H, W), (H, W, C) or (C, H, W); with `channels_last` it is not the last.

    Alpha is composited on white, grey is copied to the three channels, the first frame of an
    animation is taken and the EXIF orientation is applied. Floats are read on the scale [0, 1],
    integers on [0, the maximum of their dtype].
    """
    if isinstance(source, np.ndarray):
        return _from_array(source, channels_last)
    if isinstance(source, Image.Image):
        _load(source)
        return _to_rgb(ImageOps.exif_transpose(source), _stored_dtype(source))
    _check_encoded(source)
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return _to_rgb(image, _stored_dtype(image))


def _content(source: Any) -> Iterator[bytes]:
    """Yield all that decides on the pixels of a source."""
    if isinstance(source, np.ndarray):
        yield f"array {source.shape} {source.dtype.str}".encode()
        yield source.tobytes()
    elif isinstance(source, Image.Image):
        _load(source)
        orientation = source.getexif().get(ExifTags.Base.Orientation)
        transparency = source.info.get("transparency")
        palette = source.getpalette("RGBA") if source.palette else None
        dtype = _stored_dtype(source)
        told = (source.mode, source.size, dtype, orientation, transparency, palette)
        yield f"image {told}".encode()
        yield source.tobytes()
    else:
        _check_encoded(source)
        yield b"encoded"
        yield source if isinstance(source, bytes) else Path(source).read_bytes()


# X, taken apart ---------------------------------------------------------------------------------


def _unwrap_columns(X: Any) -> Any:
    """Refuse a single image; turn tensors, Series and one-column tables into arrays or lists."""
    if isinstance(X, _SINGLE):
        is_folder = isinstance(X, (str, os.PathLike)) and os.path.isdir(X)
        raise ValueError(
            f"X is a single {_describe(X)}; a sequence of images is expected: pass "
            + ('sorted(pathlib.Path(X).rglob("*.jpg")).' if is_folder else "[X].")
        )
    X = unwrap_tensor(X)
    if hasattr(X, "columns") and hasattr(X, "dtypes"):  # a pandas or polars DataFrame
        X = X.to_numpy()
    if hasattr(X, "to_numpy"):  # a Series
        X = X.to_numpy()
    if not isinstance(X, (np.ndarray, Sequence)):
        if not hasattr(X, "__array__"):
            raise ValueError(
                f"X is of type {type(X).__name__}; a sequence of images with a length is expected"
                + (": pass list(X)." if isinstance(X, Iterable) else ".")
            )
        X = np.asarray(X)
    if not isinstance(X, np.ndarray):
        return X
    is_numeric = X.dtype.kind not in "OSTU"
    if X.ndim == 0 or not (is_numeric or X.size == len(X)):
        raise ValueError(
            f"X of shape {X.shape} and dtype {X.dtype} is no sequence of images: "
            "one column (of paths, say) is expected."
        )
    # A memory map is taken apart ten times as fast as the plain array that it is.
    return np.asarray(X) if is_numeric else X.ravel().tolist()


def _split_array(X: Pixels, image_shape: ImageShape) -> Sequence[Pixels]:
    """View an array of images as its (H, W) or (H, W, C) images."""
    if X.ndim == 2:
        return list(X.reshape(len(X), *_row_shape(X, image_shape)))
    if X.ndim == 3:
        if X.shape[-1] in (3, 4):
            raise ValueError(
                f"X of shape {X.shape} looks like one colour image; a 3-D X is read as (n, H, W), "
                "n grey images: pass [X] for one colour image, or X[..., None] for grey ones."
            )
        return list(X)
    if X.ndim == 4:
        return list(_channels_to_end(X, first_axis=1))
    raise ValueError(
        f"X of shape {X.shape} is no array of images: (n, H, W), (n, H, W, C) or (n, C, H, W) "
        "is expected, or (n, H * W * C) with image_shape=."
    )


def _row_shape(X: Pixels, image_shape: ImageShape) -> tuple[int, ...]:
    if image_shape is None:
        raise ValueError(
            f"X of shape {X.shape} holds one row an image: give image_shape=(H, W) or (H, W, C), "
            "the shape of the image that a row was flattened from."
        )
    sides = list(image_shape) if isinstance(image_shape, Iterable) else []
    known = [side for side in sides if side != -1]
    if (
        len(sides) not in (2, 3)
        or len(known) < len(sides) - 1
        or not all(isinstance(side, numbers.Integral) and side > 0 for side in known)
    ):
        raise ValueError(
            f"image_shape={image_shape!r} is no shape of an image: (H, W) or (H, W, C) is "
            "expected; one entry may be -1."
        )
    inferred, rest = divmod(X.shape[1], math.prod(known))
    if rest or not inferred or (inferred > 1 and -1 not in sides):
        raise ValueError(
            f"image_shape={image_shape} does not fit X of shape {X.shape}: "
            f"a row has {X.shape[1]} values."
        )
    shape = tuple(side if side != -1 else inferred for side in sides)
    if len(shape) == 3 and shape[-1] not in _CHANNELS:
        raise ValueError(
            f"image_shape={image_shape} gives {shape[-1]} channels: 1, 2, 3 or 4 are expected, "
            "as the last of (H, W, C)."
        )
    return shape


def _as_source(item: Any) -> Any:
    """Turn what a sequence holds into something that `open_image` takes, where that is cheap."""
    item = unwrap_tensor(item)
    if isinstance(item, (bytearray, memoryview)):
        return bytes(item)
    return np.asarray(item) if isinstance(item, (list, tuple)) else item


def _channels_to_end(array: Pixels, first_axis: int) -> Pixels:
    """Move the channels of (..., H, W, C) or (..., C, H, W) to the end."""
    first, last = array.shape[first_axis] in _CHANNELS, array.shape[-1] in _CHANNELS
    if first and last:
        raise ValueError(
            f"shape {array.shape} can be read as channels first and as channels last: "
            "pass PIL images, or flattened rows with image_shape=(H, W, C)."
        )
    if not first and not last:
        raise ValueError(
            f"shape {array.shape} has no axis of 1, 2, 3 or 4 channels, "
            "neither first nor last in an image."
        )
    return array if last else np.moveaxis(array, first_axis, -1)


def _is_image(item: Any) -> bool:
    """Tell whether an item of X is an image, or should be one, rather than a row or a number."""
    return isinstance(item, _SINGLE) or item is None or np.ndim(item) >= 2


# One image, opened ------------------------------------------------------------------------------


def _check_encoded(source: Any) -> None:
    if not isinstance(source, (str, bytes, os.PathLike)):
        raise TypeError(
            "expected a path, a PIL image, an array, a tensor or encoded bytes, "
            f"got {type(source).__name__}"
        )


def _load(image: Image.Image) -> None:
    """Load what Pillow has put off, in one thread at a time."""
    with _loading:
        tile = getattr(image, "tile", None)
        try:
            image.load()
        except Exception:
            # Else Pillow takes it for loaded, and the next attempt gets what was decoded so far.
            image.tile = tile  # type: ignore[attr-defined]
            raise
        image.getexif()  # put off as well, and seen half done by other threads


def _to_rgb(image: Image.Image, stored_dtype: np.dtype[Any] | None = None) -> Image.Image:
    if image.mode in _DEEP_MODES:
        return _from_array(_deep_pixels(image, stored_dtype))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _deep_pixels(image: Image.Image, stored_dtype: np.dtype[Any] | None) -> Pixels:
    pixels = np.asarray(image)
    if stored_dtype is not None:
        pixels = pixels.astype(stored_dtype)
    if image.mode == "I;16" and "transparency" in image.info:  # one grey that is transparent
        pixels = np.where(pixels == image.info["transparency"], 65535, pixels).astype(np.uint16)
    return pixels


def _stored_dtype(image: Image.Image) -> np.dtype[Any] | None:
    """Tell what a file holds that Pillow reads into signed 32 bits; its scale is the file's."""
    if image.mode == "I" and image.format in ("PNG", "PPM"):
        return np.dtype(np.uint16)
    if image.mode == "I" and isinstance(image, TiffImageFile):
        bits, kind = image.tag_v2[BITSPERSAMPLE][0], image.tag_v2.get(SAMPLEFORMAT, (1,))[0]
        return np.dtype(f"{'ui'[kind - 1]}{bits // 8}")
    return None


def _from_array(array: Pixels, channels_last: bool = False) -> Image.Image:
    if array.ndim not in (2, 3):
        raise ValueError(f"an array of shape {array.shape} is no image: (H, W) or (H, W, C)")
    if 0 in array.shape:
        raise ValueError(f"an array of shape {array.shape} has no pixels")
    if array.ndim == 3 and not channels_last:
        array = _channels_to_end(array, first_axis=0)
    pixels = np.ascontiguousarray(_to_uint8(array))
    if pixels.ndim == 3 and pixels.shape[-1] == 1:
        pixels = pixels[..., 0]
    return _to_rgb(Image.fromarray(pixels))


def _to_uint8(array: Pixels) -> NDArray[np.uint8]:
    """Map [0, 1] for floats, and [0, maximum of the dtype] for integers, to [0, 255]."""
    if array.dtype == np.uint8:
        return array
    if array.dtype == bool:
        return np.where(array, 255, 0).astype(np.uint8)
    if array.dtype.kind == "f":
        return _scale(array, _check_float_scale(array))
    if array.dtype.kind in "iu":
        return _scale(array, _check_integer_scale(array))
    raise TypeError(f"an array of {array.dtype} is no image: floats, integers or booleans")


def _check_float_scale(array: Pixels) -> int:
    if not np.isfinite(array).all():
        raise ValueError("the array contains NaN or infinity")
    high = array.max()
    # What lies outside is clipped, but these were surely meant for another scale.
    if high > 127 or (high > 1 and (array == np.rint(array)).all()):
        raise ValueError(
            f"a float image is read on the scale [0, 1], but holds values up to {high:g}: divide "
            "by the maximum of their scale, or cast (X.astype(np.uint8) for 0 to 255)"
        )
    return 1


def _check_integer_scale(array: Pixels) -> int:
    top = int(np.iinfo(array.dtype).max)
    high = int(array.max())
    if array.dtype.itemsize >= 4 and 0 < high * 255 < top / 2:
        raise ValueError(
            f"an image of {array.dtype} is read on the scale [0, {top}], but its values end at "
            f"{high}, which is black: cast to the dtype of their scale "
            "(X.astype(np.uint8) for 0 to 255)"
        )
    return top


def _scale(array: Pixels, top: int) -> NDArray[np.uint8]:
    scaled = array.astype("f8" if array.dtype.itemsize > 2 else "f4") * (255 / top)
    if scaled.min() < 0 or scaled.max() > 255:
        # No figures in the text: Python shows a repeated warning once.
        warnings.warn(
            "pixels outside the scale of their dtype ([0, 1] for floats) were clipped",
            UserWarning,
            stacklevel=2,
        )
        scaled = np.clip(scaled, 0, 255)
    return np.asarray(np.rint(scaled), dtype=np.uint8)


# Words for messages -----------------------------------------------------------------------------


def _describe(source: Any) -> str:
    if isinstance(source, (str, os.PathLike)):
        return repr(str(os.fspath(source)))
    if isinstance(source, bytes):
        return f"{len(source)} encoded bytes"
    if isinstance(source, Image.Image):
        return f"{source.mode} PIL image"
    if isinstance(source, np.ndarray):
        return f"{source.dtype} array of shape {source.shape}"
    return type(source).__name__


def _reason(error: Exception, source: Any) -> str:
    if isinstance(error, FileNotFoundError):
        return "there is no such file"
    if isinstance(error, IsADirectoryError):
        return "this is a folder, not a file"
    if isinstance(error, UnidentifiedImageError):
        start = _first_bytes(source)
        return f"not an image that Pillow can read; it starts with {start!r}" if start else "empty"
    if isinstance(source, Image.Image) and isinstance(error, (AssertionError, AttributeError)):
        return "its file is closed and was not read to the end"
    return str(error) or type(error).__name__


def _first_bytes(source: Any) -> bytes:
    if isinstance(source, bytes):
        return source[:8]
    with open(source, "rb") as file:
        return file.read(8)
