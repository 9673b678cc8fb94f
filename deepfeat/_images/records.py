"""Records: one per image of any X, each of which opens as an upright RGB image."""

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
    RGB,
    DatasetItem,
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
    """An image cannot be read. The arguments are its location, as a string, and the reason."""

    __module__ = "deepfeat"  # so that pickles outlive moves

    def __str__(self) -> str:
        return ": ".join(map(str, self.args))

    @property
    def reason(self) -> str:
        return str(self.args[1])


@dataclass(frozen=True, eq=False)
class Record:
    """One image of X: its index, and the source that it is opened from."""

    index: int
    source: Any
    channels_last: bool = False
    input_name: str = "X"  # in error messages
    is_row: bool = False  # of a table

    def __str__(self) -> str:
        return f"{self.input_name}[{self.index}] ({describe(self.source)})"

    def open(self) -> RGB:
        """Return the upright image, 8-bit RGB of shape (H, W, 3), which must not be changed.

        Raises
        ------
        ImageError
            If it cannot be read. The message gives the index, the path or type, and the reason.
        """
        return self._try(lambda: open_image(self.source, self.channels_last, self.is_row))

    def digest(self) -> bytes:
        """Digest the content that the image is opened from: equal digests mean equal pixels.

        Raises
        ------
        ImageError
            If the content cannot be read.
        """
        return self._try(lambda: digest_image(self.source, self.channels_last, self.is_row))

    def error(self, cause: Exception) -> ImageError:
        """Return an error that names this image and is caused by `cause`.

        An `ImageError` is returned unchanged.
        """
        if isinstance(cause, ImageError):
            return cause
        reason = ": ".join(filter(None, (type(cause).__name__, str(cause))))
        error = ImageError(str(self), reason)
        error.__cause__ = cause
        return error

    def stat(self) -> tuple[str, int, int, int, int, int] | None:
        """Return path, size, mtime_ns, ctime_ns, inode and device; None if there is no file."""
        if not isinstance(self.source, (str, os.PathLike)):
            return None
        try:
            path = os.path.abspath(os.fspath(self.source))
            status = os.stat(path)
        except Exception:  # no file, not a valid name, or a user's path object that raises
            return None
        times = status.st_mtime_ns, status.st_ctime_ns
        return path, status.st_size, *times, status.st_ino, status.st_dev

    def _try(self, read: Callable[[], T]) -> T:
        try:
            return read()
        except Exception as error:
            raise ImageError(str(self), explain(error, self.source)) from error


def as_records(X: Any, image_shape: ImageShape = None, input_name: str = "X") -> list[Record]:
    """Split any X into records, one per image, without reading a pixel.

    Parameters
    ----------
    X : sequence of images, or an array of them
        Paths, PIL images, arrays, tensors, encoded bytes or binary files, in a list, a tuple, an
        object array, a Series or a one-column DataFrame; a dataset with a length that returns
        images by index; an array or tensor of shape (n, H, W), (n, H, W, C) or (n, C, H, W); or,
        with `image_shape`, rows of shape (n, H * W * C).
    image_shape : tuple of int, optional
        (H, W) or (H, W, C) of a flattened row; one entry may be -1.
    input_name : str, default="X"
        The name of `X` in errors about one of its images.
    """
    X = unwrap_tensor(X)
    X = _unwrap_columns(np.asarray(X) if is_tabular(X) else X)
    if not len(X):
        raise ValueError("X is empty: at least one image is needed.")
    if isinstance(X, np.ndarray):
        images, is_row = _split_array(X, image_shape), X.ndim == 2
        return [
            Record(index, image, True, input_name, is_row) for index, image in enumerate(images)
        ]
    if isinstance(X, (list, tuple)):
        return [_as_record(index, item, image_shape, input_name) for index, item in enumerate(X)]
    lock = threading.Lock()
    items = (DatasetItem(X, index, lock) for index in range(len(X)))
    return [Record(item.index, item, input_name=input_name) for item in items]


def is_tabular(X: Any) -> bool:
    """Return whether X is a numeric table, one flattened image per row, rather than images."""
    if hasattr(X, "columns") and hasattr(X, "dtypes"):  # a pandas or polars DataFrame
        return X.shape[1] != 1 or X.to_numpy().dtype.kind in "biuf"
    if isinstance(X, (list, tuple)):
        return _holds_rows(X)
    if hasattr(X, "__array__") and not hasattr(X, "ndim"):
        X = np.asarray(X)
    kind = getattr(getattr(X, "dtype", None), "kind", "")
    if kind == "O":
        return X.ndim == 2 and (X.shape[1] != 1 or _holds_rows(X.ravel().tolist()))
    # Numbers in one dimension are a malformed table.
    return kind not in ("U", "S", "T") and getattr(X, "ndim", 0) in ((1, 2) if kind else (2,))


# Containers -------------------------------------------------------------------------------------


def _unwrap_columns(X: Any) -> Any:
    """Check X; convert a Series, a DataFrame or any array-like to an array or a list."""
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
            f"X has dtype {X.dtype}, which drops the zero bytes that an encoded image may end in: "
            "pass a list of bytes, or an array with dtype=object."
        )
    is_numeric = X.dtype.kind not in "OTU"
    if X.ndim == 0 or not (is_numeric or X.size == len(X)):
        raise ValueError(
            "X must be a sequence of images, such as one column of paths; "
            f"got shape {X.shape} and dtype {X.dtype}."
        )
    # Splitting a memory map is ten times faster through the plain array that it wraps.
    return np.asarray(X) if is_numeric else X.ravel().tolist()


def _check_container(X: Any) -> None:
    """Raise if X is a single image, or does not have a length and return images by index."""
    if is_url(X):
        raise ValueError(f"X is a URL: download {X!r} and pass a list of paths.")
    if isinstance(X, _SINGLE):
        is_folder = isinstance(X, (str, os.PathLike)) and os.path.isdir(X)
        raise ValueError(
            "X must be a sequence of images; "
            f"got a {'folder' if is_folder else 'single image'} ({describe(X)}): pass "
            + ('sorted(pathlib.Path(X).rglob("*.jpg")).' if is_folder else "[X].")
        )
    refusal = f"X must be a sequence of images with a length; got {type(X).__name__}"
    if isinstance(X, Mapping):
        keys = list(X)
        likely = next((key for key in ("data", "images", "image") if key in keys), None)
        if likely:
            likely = f"X.{likely}" if hasattr(X, likely) else f"X[{likely!r}]"
        raise ValueError(
            f"{refusal}: pass the entry of {keys} that holds the images"
            + (f", {likely}." if likely else ".")
        )
    if hasattr(X, "__array__") or (hasattr(X, "__len__") and hasattr(X, "__getitem__")):
        return
    if hasattr(X, "dataset") and isinstance(X, Iterable):
        raise ValueError(f"{refusal}, which returns batches: pass X.dataset, or the paths.")
    raise ValueError(refusal + (": pass list(X)." if isinstance(X, Iterable) else "."))


def _split_array(X: Pixels, image_shape: ImageShape) -> Sequence[Pixels]:
    """Split an array into views of its images, (H, W) or (H, W, C)."""
    if X.ndim == 2:
        return list(X.reshape(len(X), *_row_shape(X, image_shape)))
    if X.ndim == 3:
        if X.shape[-1] in (3, 4):
            raise ValueError(
                f"X of shape {X.shape} looks like one colour image, but a 3-D X is read as n grey "
                "images (n, H, W): pass [X] for one colour image, or X[..., None] for grey images."
            )
        return list(X)
    if X.ndim == 4:
        return list(channels_to_end(X, first_axis=1))
    raise ValueError(
        "X must have shape (n, H, W), (n, H, W, C) or (n, C, H, W), or (n, H * W * C) with "
        f"image_shape=; got {X.shape}."
    )


def _row_shape(X: Pixels, image_shape: ImageShape) -> tuple[int, ...]:
    if image_shape is None:
        raise ValueError(
            f"X of shape {X.shape} has one row per image: set image_shape to (H, W) or (H, W, C), "
            "the shape of an image before it was flattened."
        )
    sides = list(image_shape) if isinstance(image_shape, Iterable) else []
    known = [side for side in sides if side != -1]
    if (
        len(sides) not in (2, 3)
        or len(known) < len(sides) - 1
        or not all(isinstance(side, numbers.Integral) and side > 0 for side in known)
    ):
        raise ValueError(
            "image_shape must be (H, W) or (H, W, C), where one entry may be -1; "
            f"got {image_shape!r}."
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
            f"image_shape={image_shape} means {shape[-1]} channels, the last of (H, W, C), but an "
            "image must have 1, 2, 3 or 4."
        )
    return shape


def _as_record(index: int, item: Any, image_shape: ImageShape, input_name: str) -> Record:
    """Make a record of an item of a list; a row that fits `image_shape` is reshaped to it."""
    if image_shape is not None and _count_values(item):
        with contextlib.suppress(Exception):  # a row that does not fit raises when it is opened
            row = np.asarray(unwrap_tensor(item))
            image = row.reshape(_row_shape(row[None], image_shape))
            return Record(index, image, True, input_name, is_row=True)
    return Record(index, item, input_name=input_name)


def _holds_rows(items: Sequence[Any]) -> bool:
    """Return whether all items are numbers, or all are rows of one length."""
    lengths = {_count_values(items[0])} if items else {None}
    return None not in lengths and all(_count_values(item) in lengths for item in items)


def _count_values(item: Any) -> int | None:
    """Return the length of a row, 0 for a number and None for anything else."""
    with contextlib.suppress(Exception):  # a lazy array may raise whenever it is accessed
        return _count_readable(item)
    return None


def _count_readable(item: Any) -> int | None:
    if isinstance(item, (list, tuple)):
        is_row = all(isinstance(value, numbers.Number) for value in item)
        return len(item) or None if is_row else None
    if isinstance(item, numbers.Number):
        return 0 if item == item else None  # NaN marks a missing image
    if getattr(item, "ndim", None) == 1 and hasattr(item, "dtype"):
        return len(item) or None
    return None
