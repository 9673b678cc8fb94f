"""`FeatureBatch`: tables of images become the same tables with features, a batch at a time."""

import copy
import functools
import re
from typing import Any, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from . import DeepFeatureExtractor
from ._images.decoding import RemoteFile
from ._optional import import_optional
from ._parameters import check_parameters

pa: Any = import_optional("pyarrow", extra="arrow")
fs: Any = import_optional("pyarrow.fs", extra="arrow")

Rows = TypeVar("Rows")  # pyarrow.Table or pyarrow.RecordBatch

_KINDS = (  # of columns that may hold images
    *(pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view),
    *(pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view),
    *(pa.types.is_struct, pa.types.is_dictionary, pa.types.is_null),
)
_URI = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+://[^/]*)/*(.*)", re.DOTALL)
_NO_IMAGE = "the image is null"


class FeatureBatch:
    """Add the features of images to tables of Arrow.

    An instance is a function of tables, for whatever maps such functions over data of any size: Ray
    Data (`map_batches`), Spark (`mapInArrow`), Daft, Hugging Face's datasets, or a loop over
    Parquet files. An image that cannot be read does not raise: its row says why. A pickle of an
    instance is as small as that of its extractor.

    Parameters
    ----------
    extractor : DeepFeatureExtractor
        What computes the features. Its `on_error` is ignored.
    image : str, default="path"
        The column of images: paths, URIs of a file system of pyarrow (`s3://`, `gs://`, `file://`,
        ...), encoded images, or structs of "bytes" and "path", as in Hugging Face's datasets.
    column : str, default="features"
        The column of features that is added: lists of one length, null for an image that cannot be
        read.
    error_column : str, default="error"
        The column that is added with the reason why an image cannot be read; null for all others.
    dtype : {"float32", "float16"}, default="float32"
        Type of the features. Those beyond 65,504 cannot be float16, and count as an error.

    Examples
    --------
    >>> import pyarrow as pa
    >>> from deepfeat import DeepFeatureExtractor
    >>> from deepfeat.arrow import FeatureBatch
    >>> add_features = FeatureBatch(DeepFeatureExtractor("resnet10_slim"))
    >>> table = add_features(pa.table({"path": ["missing.jpg"], "photographer": ["Ada"]}))
    >>> table.column_names
    ['path', 'photographer', 'features', 'error']
    >>> table["error"].to_pylist()
    ['there is no such file']
    """

    def __init__(
        self,
        extractor: DeepFeatureExtractor,
        *,
        image: str = "path",
        column: str = "features",
        error_column: str = "error",
        dtype: Literal["float32", "float16"] = "float32",
    ):
        check_parameters(FeatureBatch, {"dtype": dtype})
        if not isinstance(extractor, DeepFeatureExtractor):
            raise TypeError(
                f"extractor must be a DeepFeatureExtractor; got {type(extractor).__name__}."
            )
        if len({image, column, error_column}) < 3:
            raise ValueError(
                "image, column and error_column must be three names; got "
                f"{image!r}, {column!r} and {error_column!r}."
            )
        extractor.get_feature_names_out()  # so that what is wrong with it is found here
        self.extractor = extractor
        self.image = image
        self.column = column
        self.error_column = error_column
        self.dtype = dtype

    def __call__(self, rows: Rows) -> Rows:
        """Add the features of a batch of images.

        Parameters
        ----------
        rows : pyarrow.Table or pyarrow.RecordBatch of n rows
            With the column of images.

        Returns
        -------
        rows : pyarrow.Table or pyarrow.RecordBatch of n rows
            The same rows, with two more columns: features, `FixedSizeList<float32>[d]`, and errors,
            strings.

        Raises
        ------
        ValueError
            If the column of images is missing or not one of images, if there is a column of
            features or errors already, or as `DeepFeatureExtractor.transform` for parameters.
        OSError
            If the weights cannot be downloaded.
        """
        table: Any = rows
        self._check_columns(table.schema)
        images = [_as_image(value) for value in table.column(self.image).to_pylist()]
        features, reasons = self._extract(images)
        columns = (
            (self.column, self._to_lists(features, reasons)),
            (self.error_column, pa.array(reasons, pa.string())),
        )
        for name, values in columns:
            table = table.append_column(name, values)
        added: Rows = table
        return added

    def _check_columns(self, schema: Any) -> None:
        if self.image not in schema.names:
            raise ValueError(
                f"image must name a column of images; got {self.image!r}, and the columns are "
                f"{', '.join(map(repr, schema.names))}."
            )
        kind = schema.field(self.image).type
        if not any(is_kind(kind) for is_kind in _KINDS):
            raise ValueError(
                f"image must name a column of paths, URIs, encoded images or structs of 'bytes' "
                f"and 'path'; got {self.image!r} of type {kind}."
            )
        for name in (self.column, self.error_column):
            if name in schema.names:
                raise ValueError(f"The rows have a column {name!r} already: choose another name.")

    def _extract(self, images: list[Any]) -> tuple[NDArray[Any], list[str | None]]:
        """Return the features of images, and for each the reason why there are none, or None."""
        extractor = copy.copy(self.extractor)  # threads may share this instance
        extractor.set_params(on_error="nan")
        if not images:
            width = len(extractor.get_feature_names_out())
            return np.empty((0, width), dtype=self.dtype), []
        features = extractor.transform(images)
        reasons = [
            _NO_IMAGE if image is None else extractor.errors_.get(index)
            for index, image in enumerate(images)
        ]
        with np.errstate(over="ignore"):
            features = features.astype(self.dtype, copy=False)
        for index in np.flatnonzero(np.isinf(features).any(axis=1)):
            reasons[index] = "a feature is beyond 65,504, the largest value of float16"
        return features, reasons

    def _to_lists(self, features: NDArray[Any], reasons: list[str | None]) -> Any:
        """Make a column of lists of one length, null where there are none."""
        mask = pa.array([reason is not None for reason in reasons], pa.bool_())
        values = pa.array(features.ravel())
        return pa.FixedSizeListArray.from_arrays(values, features.shape[1], mask=mask)


def _as_image(value: Any) -> Any:
    """Return an image as `DeepFeatureExtractor` takes it."""
    if isinstance(value, dict) and value.get("bytes") is None:
        value = value.get("path")
    if isinstance(value, str) and _URI.fullmatch(value):
        return RemoteFile(value, functools.partial(_fetch, value))
    return value


def _fetch(uri: str) -> bytes:
    match = _URI.fullmatch(uri)
    assert match is not None
    system, base = _find_file_system(match[1])
    # Names of objects are taken as they are, unlike those in URIs, which are encoded.
    with system.open_input_file(f"{base.rstrip('/')}/{match[2]}") as file:
        content: bytes = file.read()
    return content


@functools.lru_cache(maxsize=32)
def _find_file_system(root: str) -> tuple[Any, str]:
    """Find a file system once: that of a bucket asks for its region."""
    found: tuple[Any, str] = fs.FileSystem.from_uri(f"{root}/")
    return found
