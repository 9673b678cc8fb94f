"""The records of X: how any X becomes records, one per image, which open as upright RGB images."""

import contextlib
import math
import numbers
import os
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import numpy as np
from PIL import Image

from .decoding import (
    CHANNELS,
    DataSetItem,
    Pixels,
    channels_to_end,
    describe,
    digest_image,
    explain,
    is_url,
    open_image,
    unwrap_tensor,
)

ImageShape: TypeAlias = tuple[int, ...] | None
T = TypeVar("T")

_SINGLE = (str, bytes, bytearray, memoryview, os.PathLike, Image.Image)


class ImageError(ValueError):
    """An image cannot be read. The arguments are its place in X, in words, and the reason."""

    __module__ = "deepfeat"  # so that pickles outlive moves

    def __str__(self) -> str:
        return ": ".join(map(str, self.args))

    @property
    def reason(self) -> str:
        return str(self.args[1])


@dataclass(frozen=True, eq=False)
class Record:
    """One image of X: where it stands, and what it can be opened from."""

    index: int
    source: Any
    channels_last: bool = False
    of: str = "X"  # what it was given as
    is_row: bool = False  # of a table

    def __str__(self) -> str:
        return f"{self.of}[{self.index}] ({describe(self.source)})"

    def open(self) -> Image.Image:
        """Return the upright RGB image.

        Raises
        ------
        ImageError
            If it cannot be read, naming the index, the path or kind, and the reason.
        """
        return self._try(lambda: open_image(self.source, self.channels_last, self.is_row))

    def digest(self) -> bytes:
        """Digest what the image is opened from: equal digests, equal pixels.

        Raises
        ------
        ImageError
            If it cannot be read that far.
        """
        return self._try(lambda: digest_image(self.source, self.channels_last, self.is_row))

    def error(self, cause: Exception) -> ImageError:
        """Return an error that names this image, where whatever was done to it raised `cause`."""
        if isinstance(cause, ImageError):
            return cause
        reason = ": ".join(filter(None, (type(cause).__name__, str(cause))))
        error = ImageError(str(self), reason)
        error.__cause__ = cause
        return error

    def stat(self) -> tuple[str, int, int, int, int, int] | None:
        """Return path, size, mtime_ns, ctime_ns, inode and device of a file; None for others."""
        if not isinstance(self.source, (str, os.PathLike)):
            return None
        try:
            path = os.path.abspath(os.fspath(self.source))
            status = os.stat(path)
        except Exception:  # no file, no name that a file can have, or an object that gives none
            return None
        times = status.st_mtime_ns, status.st_ctime_ns
        return path, status.st_size, *times, status.st_ino, status.st_dev

    def _try(self, read: Callable[[], T]) -> T:
        try:
            return read()
        except Exception as error:
            raise ImageError(str(self), explain(error, self.source)) from error


def as_records(X: Any, image_shape: ImageShape = None, of: str = "X") -> list[Record]:
    """Take any X apart into one record per image, without reading a pixel.

    Parameters
    ----------
    X : sequence of images, or an array of them
        Paths, PIL images, arrays, tensors, encoded bytes or binary files, in a list, a tuple, an
        object array, a Series or a one-column DataFrame; a data set of images with a length; or
        one array or tensor of shape (n, H, W), (n, H, W, C) or (n, C, H, W); or, with
        `image_shape`, rows of shape (n, H * W * C).
    image_shape : tuple of int, optional
        (H, W) or (H, W, C) of a flattened row; one entry may be -1.
    of : str, default="X"
        What an error calls `X`, where it names one of the images.
    """
    X = unwrap_tensor(X)
    X = _unwrap_columns(np.asarray(X) if is_tabular(X) else X)
    if not len(X):
        raise ValueError("X is empty: at least one image is needed.")
    if isinstance(X, np.ndarray):
        images, is_row = _split_array(X, image_shape), X.ndim == 2
        return [Record(index, image, True, of, is_row) for index, image in enumerate(images)]
    if isinstance(X, (list, tuple)):
        return [_as_record(index, item, image_shape, of) for index, item in enumerate(X)]
    lock = threading.Lock()
    return [Record(index, DataSetItem(X, index, lock), of=of) for index in range(len(X))]


def is_tabular(X: Any) -> bool:
    """Tell whether X is a numeric table, one flattened image a row, rather than images."""
    if hasattr(X, "columns") and hasattr(X, "dtypes"):  # a pandas or polars DataFrame
        return X.shape[1] != 1 or X.to_numpy().dtype.kind in "biuf"
    if isinstance(X, (list, tuple)):
        return _holds_rows(X)
    if hasattr(X, "__array__") and not hasattr(X, "ndim"):
        X = np.asarray(X)
    kind = getattr(getattr(X, "dtype", None), "kind", "")
    if kind == "O":
        return X.ndim == 2 and (X.shape[1] != 1 or _holds_rows(X.ravel().tolist()))
    # A single dimension of numbers is a table gone wrong.
    return kind not in ("U", "S", "T") and getattr(X, "ndim", 0) in ((1, 2) if kind else (2,))


# X, taken apart ---------------------------------------------------------------------------------


def _unwrap_columns(X: Any) -> Any:
    """Refuse what holds no images; turn tensors, Series and one-column tables into arrays."""
    _check_container(X)
    if hasattr(X, "columns") and hasattr(X, "dtypes"):  # a pandas or polars DataFrame
        X = X.to_numpy()
    if hasattr(X, "to_numpy"):  # a Series
        X = X.to_numpy()
    if not isinstance(X, (np.ndarray, Sequence)) and hasattr(X, "__array__"):
        X = np.asarray(X)
    if not isinstance(X, np.ndarray):
        return X
    if X.dtype.kind == "S":
        raise ValueError(
            f"X of dtype {X.dtype} has lost the zero bytes in which an encoded image may end: "
            "pass a list of bytes, or an array with dtype=object."
        )
    is_numeric = X.dtype.kind not in "OTU"
    if X.ndim == 0 or not (is_numeric or X.size == len(X)):
        raise ValueError(
            f"X of shape {X.shape} and dtype {X.dtype} is no sequence of images: "
            "one column (of paths, say) is expected."
        )
    # A memory map is taken apart ten times as fast as the plain array that it is.
    return np.asarray(X) if is_numeric else X.ravel().tolist()


def _check_container(X: Any) -> None:
    """Raise if X is one image, or nothing with a length that gives images by their index."""
    if is_url(X):
        raise ValueError(f"X is a URL: download {X!r}, and pass a list of paths.")
    if isinstance(X, _SINGLE):
        is_folder = isinstance(X, (str, os.PathLike)) and os.path.isdir(X)
        raise ValueError(
            f"X is a single {describe(X)}; a sequence of images is expected: pass "
            + ('sorted(pathlib.Path(X).rglob("*.jpg")).' if is_folder else "[X].")
        )
    expected = f"X is of type {type(X).__name__}; a sequence of images with a length is expected"
    if isinstance(X, Mapping):
        keys = list(X)
        likely = next((key for key in ("data", "images", "image") if key in keys), None)
        if likely:
            likely = f"X.{likely}" if hasattr(X, likely) else f"X[{likely!r}]"
        raise ValueError(
            f"{expected}: pass the entry of {keys} that holds the images"
            + (f", {likely}." if likely else ".")
        )
    if hasattr(X, "__array__") or (hasattr(X, "__len__") and hasattr(X, "__getitem__")):
        return
    if hasattr(X, "dataset") and isinstance(X, Iterable):
        raise ValueError(f"{expected}, and not batches of them: pass X.dataset, or the paths.")
    raise ValueError(expected + (": pass list(X)." if isinstance(X, Iterable) else "."))


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
        return list(channels_to_end(X, first_axis=1))
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
    if len(shape) == 3 and shape[-1] not in CHANNELS:
        raise ValueError(
            f"image_shape={image_shape} gives {shape[-1]} channels: 1, 2, 3 or 4 are expected, "
            "as the last of (H, W, C)."
        )
    return shape


def _as_record(index: int, item: Any, image_shape: ImageShape, of: str) -> Record:
    """Make a record of what a list holds; a row that fits is brought to its shape."""
    if image_shape is not None and _count_values(item):
        with contextlib.suppress(Exception):  # an error of its own, once it is opened
            row = np.asarray(unwrap_tensor(item))
            image = row.reshape(_row_shape(row[None], image_shape))
            return Record(index, image, True, of, is_row=True)
    return Record(index, item, of=of)


def _holds_rows(items: Sequence[Any]) -> bool:
    """Tell whether all items are numbers, or rows of as many: one image makes them images."""
    lengths = {_count_values(items[0])} if items else {None}
    return None not in lengths and all(_count_values(item) in lengths for item in items)


def _count_values(item: Any) -> int | None:
    """Count the values of a row, 0 for a number; None if it is, or should be, something else."""
    with contextlib.suppress(
        Exception
    ):  # a lazy array may fail at every look: an image like others
        return _count_readable(item)
    return None


def _count_readable(item: Any) -> int | None:
    if isinstance(item, (list, tuple)):
        is_row = all(isinstance(value, numbers.Number) for value in item)
        return len(item) or None if is_row else None
    if isinstance(item, numbers.Number):
        return 0 if item == item else None  # NaN stands for something that is missing
    if getattr(item, "ndim", None) == 1 and hasattr(item, "dtype"):
        return len(item) or None
    return None
