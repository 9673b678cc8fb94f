"""The manifest: the rows to compute, their columns and their ids."""

import os
from typing import Any

from .._optional import import_optional
from ..arrow import FeatureBatch
from ._cluster import IO_CPUS, limit_readers
from ._folder import Folder, find_file_system, list_files
from ._ids import find_repeated

data: Any = import_optional("ray.data", extra="ray")
steps: Any = import_optional("ray.data._internal.logical.operators", extra="ray")
pa: Any = import_optional("pyarrow", extra="ray")

_ENCODED_KINDS = (
    pa.types.is_binary,
    pa.types.is_large_binary,
    pa.types.is_binary_view,
    pa.types.is_struct,
)
_ID_KINDS = (
    pa.types.is_integer,
    pa.types.is_string,
    pa.types.is_large_string,
    pa.types.is_binary,
    pa.types.is_large_binary,
)
_LARGE = {pa.string(): pa.large_string(), pa.binary(): pa.large_binary()}


def read_manifest(source: Any, id: str, folder: Folder) -> Any:
    """Return a manifest as a dataset of Ray; it must not contain the folder of the output.

    Raises
    ------
    TypeError
        If it is of another type.
    ValueError
        If it contains the folder, or is a dataset with which a job could not resume.
    """
    if isinstance(source, data.Dataset):
        _check_steps(source._logical_plan.dag, id)
        return source
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(
            "source must be the path of Parquet files or a ray.data.Dataset; got "
            f"{type(source).__name__}."
        )
    url, system, path = find_file_system(source)
    if f"{folder.url}/".startswith(f"{url}/"):
        raise ValueError(
            f"output must not lie in the folder of the manifest, {url!r}, where its files would be "
            f"read as well; got {folder.url!r}."
        )
    with limit_readers(len(list_files(system, path, recursive=True))):
        return data.read_parquet(path, filesystem=system, num_cpus=IO_CPUS)


def _check_steps(step: Any, id: str) -> None:
    """Raise unless Ray can leave out finished rows, which it does right after the read.

    Its own check lets datasets without a read pass, and then computes all rows again.
    """
    reads = steps.Read, steps.ReadFiles
    while isinstance(step, steps.AbstractMap) and not isinstance(step, reads):
        (step,) = step.input_dependencies
    if not isinstance(step, reads):
        raise ValueError(
            "source must be Parquet files, or a dataset of a read, such as ray.data.read_parquet, "
            f"and maps and filters, so that the job can resume; got one with {step.name}."
        )
    schema = step.infer_schema()
    if schema is not None and id not in schema.names:
        raise ValueError(
            f"id must name a column that the dataset reads, so that the job can resume; {id!r} is "
            f"added or renamed after the read, of {', '.join(map(repr, schema.names))}."
        )


def find_schema(manifest: Any) -> Any:
    """Return the schema of a manifest, as one of Arrow."""
    schema = manifest.schema()
    if schema is None:
        raise ValueError("source must have rows; got an empty manifest.")
    return pa.schema(list(zip(schema.names, schema.types, strict=True)))


def choose_columns(
    schema: Any, add_features: FeatureBatch, id: str, columns: list[str] | None
) -> list[str]:
    """Return the columns of the manifest to copy, the id first."""
    image = add_features.image
    if isinstance(columns, str):
        raise ValueError(f"columns must be a list of names or None; got {columns!r}.")
    for parameter, names in (("id", [id]), ("image", [image]), ("columns", columns or [])):
        for name in names:
            if name not in schema.names:
                raise ValueError(
                    f"{parameter} must name a column of the manifest; got {name!r}, and the "
                    f"columns are {', '.join(map(repr, schema.names))}."
                )
    kind = schema.field(id).type
    if not any(is_kind(kind) for is_kind in _ID_KINDS):
        raise ValueError(
            f"id must name a column of integers, strings or bytes; got {id!r} of type {kind}."
        )
    if columns is None:
        columns = [name for name in schema.names if name != image or not _is_encoded(schema, name)]
    copied = list(dict.fromkeys([id, *columns]))
    for name in {add_features.column, add_features.error_column}.intersection(copied):
        raise ValueError(
            f"The manifest has a column {name!r}, as the output will: leave it out with columns=."
        )
    return copied


def plan_rows(schema: Any, add_features: FeatureBatch, copied: list[str]) -> Any:
    """Return the schema of the rows."""
    taken = pa.schema([schema.field(name) for name in dict.fromkeys([*copied, add_features.image])])
    rows = add_features(taken.empty_table())
    return rows.select([*copied, add_features.column, add_features.error_column]).schema


def _is_encoded(schema: Any, name: str) -> bool:
    kind = schema.field(name).type
    return any(is_kind(kind) for is_kind in _ENCODED_KINDS)


def read_ids(manifest: Any, id: str, kind: Any) -> Any:
    """Read the ids of a manifest; raise if there are none, or some are null or repeated."""
    kind = _LARGE.get(kind, kind)  # together they may be longer than 2 GB
    batches = manifest.select_columns([id]).iter_batches(batch_size=None, batch_format="pyarrow")
    chunks = [chunk for batch in batches for chunk in batch[id].cast(kind).chunks]
    # A copy: the batches are views of Ray's memory, which would not be freed.
    ids = pa.chunked_array([pa.chunked_array(chunks, kind).combine_chunks()])
    if not len(ids):
        raise ValueError("source must have rows; got an empty manifest.")
    if ids.null_count:
        raise ValueError(
            f"id must name a column without nulls; {ids.null_count} of {len(ids)} in {id!r} are "
            "null."
        )
    repeated = find_repeated(ids)
    if len(repeated):
        raise ValueError(
            f"id must name a column of distinct values; {len(repeated)} in {id!r} are repeated, "
            f"such as {', '.join(map(repr, repeated[:3].to_pylist()))}."
        )
    return ids
