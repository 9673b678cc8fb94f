"""Knows how any X becomes a list of records, and how a record opens as an upright RGB image."""

import io
import os
import threading
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

Pixels: TypeAlias = NDArray[Any]
Source: TypeAlias = str | os.PathLike[str] | bytes | Image.Image | Pixels
ImageShape: TypeAlias = tuple[int, ...] | None

_CHANNELS = (1, 2, 3, 4)  # grey, grey + alpha, RGB, RGBA
_DEEP_MODES = ("I", "F", "I;16", "I;16L", "I;16B", "I;16N")
_loading = threading.Lock()


class ImageError(ValueError):
    """An image cannot be read; the message names its place in X and the reason."""


@dataclass(frozen=True, eq=False)
class Record:
    """One image of X: where it stands, and what it can be opened from."""

    index: int
    source: Any

    def __str__(self) -> str:
        return f"X[{self.index}] ({_describe(self.source)})"

    def open(self) -> Image.Image:
        """Return the upright RGB image.

        Raises
        ------
        ImageError
            If it cannot be read, naming the index, the path or kind, and the reason.
        """
        try:
            return open_image(self.source)
        except MemoryError:
            raise
        except Exception as error:
            raise ImageError(f"{self}: {_reason(error, self.source)}") from error


def as_records(X: Any, image_shape: ImageShape = None) -> list[Record]:
    """Take any X apart into one record an image, without reading a pixel.

    Parameters
    ----------
    X : sequence of images, or an array of them
        Paths, PIL images, arrays, tensors or encoded bytes, in a list, a tuple, an object array,
        a Series or a one-column DataFrame; or one array or tensor of shape (n, H, W),
        (n, H, W, C) or (n, C, H, W); or, with `image_shape`, rows of shape (n, H * W * C).
    image_shape : tuple of int, optional
        (H, W) or (H, W, C) of a flattened row; one entry may be -1.
    """
    X = _unwrap_columns(X)
    if isinstance(X, np.ndarray) and X.dtype.kind not in "OSU":
        sources: Sequence[Any] = _split_array(X, image_shape)
    else:
        sources = [_as_source(item) for item in X]
    if not len(sources):
        raise ValueError("X is empty: at least one image is needed.")
    return [Record(index, source) for index, source in enumerate(sources)]


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


def open_image(source: Source) -> Image.Image:
    """Open a path, encoded bytes, a PIL image or an (H, W[, C]) array as upright 8-bit RGB.

    Alpha is composited on white, grey is copied to the three channels, the first frame of an
    animation is taken and the EXIF orientation is applied. Floats are read on the scale [0, 1],
    integers on [0, the maximum of their dtype].
    """
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Image.Image):
        with _loading:  # Pillow loads lazily; two threads must not load one image at once
            source.load()
        return _to_rgb(ImageOps.exif_transpose(source))
    if not isinstance(source, (str, bytes, os.PathLike)):
        raise TypeError(
            "expected a path, a PIL image, an array, a tensor or encoded bytes, "
            f"got {type(source).__name__}"
        )
    with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
        return _to_rgb(image)


# X, taken apart ---------------------------------------------------------------------------------


def _unwrap_columns(X: Any) -> Any:
    """Refuse a single image; turn tensors, Series and one-column tables into arrays or lists."""
    if isinstance(X, (str, bytes, os.PathLike, Image.Image)):
        raise ValueError(
            f"X is a single {_describe(X)}; a sequence of images is expected: pass [X]."
        )
    if hasattr(X, "detach"):
        return _from_tensor(X)
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
    if isinstance(X, np.ndarray) and X.dtype.kind in "OSU":
        if X.ndim == 0 or (X.ndim > 1 and X.size != len(X)):
            raise ValueError(
                f"X of shape {X.shape} and dtype {X.dtype} is no sequence of images: "
                "one column (of paths, say) is expected."
            )
        return X.ravel()
    return X


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
    known = int(np.prod([side for side in image_shape if side != -1]))
    if X.shape[1] == 0 or X.shape[1] % known or (-1 not in image_shape and X.shape[1] != known):
        raise ValueError(
            f"image_shape={image_shape} does not fit X of shape {X.shape}: "
            f"a row has {X.shape[1]} values."
        )
    shape = tuple(side if side != -1 else X.shape[1] // known for side in image_shape)
    if len(shape) == 3 and shape[-1] not in _CHANNELS:
        raise ValueError(
            f"image_shape={image_shape} gives {shape[-1]} channels: 1, 2, 3 or 4 are expected, "
            "as the last of (H, W, C)."
        )
    return shape


def _as_source(item: Any) -> Any:
    """Turn what a sequence holds into something that `open_image` takes, where that is cheap."""
    if hasattr(item, "detach"):
        return _from_tensor(item)
    if isinstance(item, (bytearray, memoryview)):
        return bytes(item)
    return np.asarray(item) if isinstance(item, (list, tuple)) else item


def _from_tensor(tensor: Any) -> Pixels:
    tensor = tensor.detach().cpu()
    if str(tensor.dtype) == "torch.bfloat16":  # numpy has no such type
        tensor = tensor.float()
    array: Pixels = tensor.numpy()
    return array


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
    if isinstance(item, (str, bytes, bytearray, os.PathLike, Image.Image)) or item is None:
        return True
    return np.ndim(item) >= 2


# One image, opened ------------------------------------------------------------------------------


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    if image.mode in _DEEP_MODES:
        return _from_array(_deep_pixels(image))
    return image if image.mode == "RGB" else image.convert("RGB")


def _deep_pixels(image: Image.Image) -> Pixels:
    pixels = np.asarray(image)
    # Pillow holds 16-bit PNG and PNM files in 32 bits; their scale is that of the file.
    if image.mode == "I" and image.format in ("PNG", "PPM"):
        return pixels.astype(np.uint16)
    return pixels


def _from_array(array: Pixels) -> Image.Image:
    if array.ndim not in (2, 3):
        raise ValueError(f"an array of shape {array.shape} is no image: (H, W) or (H, W, C)")
    if 0 in array.shape:
        raise ValueError(f"an array of shape {array.shape} has no pixels")
    if array.ndim == 3:
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
    if high > 1 and (array == np.rint(array)).all():
        raise ValueError(
            f"a float image is read on the scale [0, 1], but holds whole numbers up to {high:g}: "
            "divide by the maximum of their scale, or cast (X.astype(np.uint8) for 0 to 255)"
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
    scaled = array.astype(np.float64 if array.dtype.itemsize > 2 else np.float32) * (255 / top)
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
        return repr(os.fspath(source))
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
    return str(error) or type(error).__name__


def _first_bytes(source: Any) -> bytes:
    if isinstance(source, bytes):
        return source[:8]
    with open(source, "rb") as file:
        return file.read(8)
