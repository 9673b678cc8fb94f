"""`extract`: a manifest of images becomes Parquet files of features, on a cluster of Ray."""

import contextlib
import json
import math
import os
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from . import DeepFeatureExtractor, __version__
from ._backbones.fingerprint import UnknownContentError
from ._engine.devices import find_device
from ._engine.threads import count_processors
from ._extraction.readers import index_layers
from ._optional import import_optional
from ._parameters import check_parameters
from .arrow import FeatureBatch

ray: Any = import_optional("ray", extra="ray")
data: Any = import_optional("ray.data", extra="ray")
checkpoint: Any = import_optional("ray.data.checkpoint", extra="ray")
pa: Any = import_optional("pyarrow", extra="ray")
compute: Any = import_optional("pyarrow.compute", extra="ray")
datasets: Any = import_optional("pyarrow.dataset", extra="ray")
fs: Any = import_optional("pyarrow.fs", extra="ray")

# Readers of Parquet pass over names that begin with an underscore.
_DESCRIPTION, _CHECKPOINT, _SUCCESS = "_deepfeat.json", "_checkpoint", "_SUCCESS"
_KEY = "deepfeat"  # in the metadata of the schema
_SPARE_CPUS = 2  # Ray's own filter of finished rows holds one, its other tasks take turns on one
_LITTLE = 0.01  # CPUs of a task that waits for disks, so that it need not wait for a CPU
_DRAFT = "_deepfeat.draft"  # of either, so that none is ever half written
_PENDING = ".pending.parquet"  # how Ray names the record of a file that is being written
_ENCODED_KINDS = (
    *(pa.types.is_binary, pa.types.is_large_binary, pa.types.is_binary_view, pa.types.is_struct),
)
_LARGE = {pa.string(): pa.large_string(), pa.binary(): pa.large_binary()}
_ID_KINDS = (
    *(pa.types.is_integer, pa.types.is_string, pa.types.is_large_string),
    *(pa.types.is_binary, pa.types.is_large_binary),
)


@dataclass(frozen=True)
class Summary:
    """What `extract` has done.

    Attributes
    ----------
    rows : int
        Rows in the folder.
    failed : int
        Those of images that could not be read.
    computed : int
        Rows of the manifest that were not yet there, and which this call has added.
    seconds : float
        How long the call took.
    images_per_second : float
        `computed` divided by `seconds`.
    """

    rows: int
    failed: int
    computed: int
    seconds: float
    images_per_second: float


def extract(
    extractor: DeepFeatureExtractor,
    source: Any,
    output: str | os.PathLike[str],
    *,
    id: str = "id",
    image: str = "path",
    columns: list[str] | None = None,
    concurrency: int | None = None,
    num_cpus: float = 1,
    num_gpus: float | None = None,
    rows_per_task: int = 2048,
) -> Summary:
    """Extract the features of all images of a manifest to Parquet files, on a cluster of Ray.

    The same call again resumes: rows that are in the folder are not computed again, and rows that
    the manifest has gained are added. An image that cannot be read does not end the job: its row
    says why. A file `_SUCCESS` is written last; until then a file may be incomplete.

    Parameters
    ----------
    extractor : DeepFeatureExtractor
        What computes the features. Its `cache`, `on_error` and `verbose` are ignored.
    source : str, path or ray.data.Dataset
        The manifest, one row per image: a Parquet file or a folder of these, also as a URI, or a
        dataset that begins with a read.
    output : str or path
        A folder, or the URI of one in an object storage, for the Parquet files. All nodes must be
        able to write there.
    id : str, default="id"
        The column that identifies a row: integers, strings or bytes, none null and none twice.
        They are compared in the memory of this process, which takes up to 100 bytes per row, and
        on resuming in that of some nodes; integers take the least.
    image : str, default="path"
        The column of images: paths, URIs, encoded images or structs, as for `FeatureBatch`.
    columns : list of str, optional
        Columns of the manifest to copy. By default all, without encoded images.
    concurrency : int, optional
        Number of actors, each with a network. By default as many as fit into the cluster with two
        CPUs left, which Ray itself needs.
    num_cpus : float, default=1
        CPUs per actor: the threads that run the network, on a CPU, and those that read and
        prepare images, unless the extractor's `num_workers` is a number.
    num_gpus : float, optional
        GPUs per actor. By default one, if the cluster has any and the extractor's `device` is not a
        CPU.
    rows_per_task : int, default=2048
        Rows that are computed and written together, as one file. As many are lost per actor if the
        job is interrupted.

    Returns
    -------
    Summary
        `rows`, `failed`, `computed`, `seconds` and `images_per_second`.

    Raises
    ------
    ValueError
        If a parameter is invalid; the manifest is empty, lacks a column, or has ids that are null
        or repeated; the folder was filled by another extractor or contains other files; or the
        weights and the preprocessing cannot be digested. Nothing is written.
    RuntimeError
        If rows are missing in the folder in the end, or there twice. `_SUCCESS` is not written.
    OSError
        If the weights cannot be downloaded, or the folder cannot be written.

    See Also
    --------
    deepfeat.arrow.FeatureBatch : The same for a plain loop, Spark and others.

    Notes
    -----
    The files have the id, the columns of the manifest, "features", `FixedSizeList<float32>[d]`,
    null if the image cannot be read, and "error", then the reason. The order of the rows is not
    kept. The metadata of the schema has under "deepfeat" as JSON the extractor: "backbone",
    "layers", "pooling", "norm", "precision", "digest" (of the weights and the preprocessing),
    "preprocessing" (null if it is your own) and "version", that of deepfeat; "id", the column; and
    "columns", the type of each.

    A cluster that is running is used if `ray.init` or the environment variable `RAY_ADDRESS` says
    so; otherwise one is started on this machine. The progress is Ray's. Weights are downloaded once
    per node.

    Examples
    --------
    >>> from deepfeat import DeepFeatureExtractor
    >>> from deepfeat.ray import extract
    >>> extractor = DeepFeatureExtractor("resnet50")
    >>> extract(extractor, "s3://bucket/manifest", "s3://bucket/features")  # doctest: +SKIP
    """
    start = time.perf_counter()
    counts = {"concurrency": concurrency, "num_cpus": num_cpus, "num_gpus": num_gpus}
    check_parameters(extract, {**counts, "rows_per_task": rows_per_task})
    threads = max(1, int(num_cpus))
    add_features = FeatureBatch(_copy_for_actors(extractor, threads), image=image)
    folder = _Folder.find(output)
    if not ray.is_initialized():
        _start_ray()
    manifest = _read_manifest(source)
    schema = pa.schema(list(zip(manifest.schema().names, manifest.schema().types, strict=True)))
    copied = _choose_columns(schema, id, image, columns)
    written = (
        add_features(schema.empty_table())
        .select([*copied, add_features.column, add_features.error_column])
        .schema
    )
    description = _describe(add_features.extractor, id, written)
    folder.check(description)
    ids = _read_ids(manifest, id)
    folder.claim(description)
    n_missing = len(_find_missing(ids, folder.read_committed(id).cast(ids.type)))
    if n_missing:
        device = add_features.extractor.device
        concurrency, num_gpus = _plan_actors(device, concurrency, num_cpus, num_gpus)
        rows = (
            manifest.select_columns(list(dict.fromkeys([*copied, image])))
            .repartition(target_num_rows_per_block=rows_per_task, strict=True)
            .map_batches(
                _Extraction,
                fn_constructor_args=(add_features, written.names, threads),
                batch_format="pyarrow",
                batch_size=None,
                zero_copy_batch=True,
                compute=data.ActorPoolStrategy(
                    size=min(concurrency, math.ceil(n_missing / rows_per_task))
                ),
                num_cpus=num_cpus,
                num_gpus=num_gpus,
            )
        )
        with _committing_to(folder, rows.context, id):
            rows.write_parquet(
                folder.url,
                mode="append",
                schema=written.with_metadata({_KEY: json.dumps(description)}),
                ray_remote_args={"num_cpus": _LITTLE},
            )
    n_rows, n_failed = folder.check_rows(ids, id, add_features.error_column)
    seconds = time.perf_counter() - start
    summary = Summary(n_rows, n_failed, n_missing, seconds, n_missing / seconds)
    folder.finish(summary)
    return summary


def _copy_for_actors(extractor: Any, threads: int) -> DeepFeatureExtractor:
    """Copy an extractor, without a cache, which nodes cannot share, and with few threads."""
    if not isinstance(extractor, DeepFeatureExtractor):
        raise TypeError(
            f"extractor must be a DeepFeatureExtractor; got {type(extractor).__name__}."
        )
    copied = DeepFeatureExtractor(**extractor.get_params(deep=False))
    copied.set_params(cache=None, verbose=0)
    if copied.num_workers == "auto":  # as many as the node has processors, in each of its actors
        copied.set_params(num_workers=threads)
    return copied


class _Extraction:
    """An actor of Ray Data: adds features to a block of the manifest."""

    def __init__(self, add_features: FeatureBatch, columns: list[str], threads: int):
        torch.set_num_threads(threads)
        self.add_features = add_features
        self.columns = columns
        extractor = add_features.extractor
        home = Path(torch.hub.get_dir())
        home.mkdir(parents=True, exist_ok=True)
        with FileLock(home / "deepfeat.lock"):  # the first actor of a node downloads the weights
            extractor._find_backbone().load(find_device(extractor.device))

    def __call__(self, rows: Any) -> Any:
        return self.add_features(rows).select(self.columns)


# The cluster --------------------------------------------------------------------------------------


def _start_ray() -> None:
    """Join the cluster of this machine or of `RAY_ADDRESS`, or else start one."""
    try:
        ray.init(address="auto")
    except ConnectionError:
        ray.init(num_cpus=count_processors() + _SPARE_CPUS)


def _plan_actors(
    device: str | torch.device, concurrency: int | None, num_cpus: float, num_gpus: float | None
) -> tuple[int, float | None]:
    """Return the number of actors and the GPUs of each.

    Actors on all CPUs would wait forever for rows, which no task could read for them.
    """
    total = ray.cluster_resources()
    cpus, gpus = total.get("CPU", 0.0), total.get("GPU", 0.0)
    if num_gpus is None:
        num_gpus = 1 if gpus and str(device) != "cpu" else 0
    room = [(cpus - _SPARE_CPUS) // num_cpus, *([gpus // num_gpus] if num_gpus else [])]
    if (concurrency or 1) > min(room):
        warnings.warn(
            f"{concurrency or 1} actors need {(concurrency or 1) * num_cpus + _SPARE_CPUS:g} CPUs"
            f"{f' and {(concurrency or 1) * num_gpus:g} GPUs' * bool(num_gpus)}, with those that "
            f"Ray itself needs; the cluster has {cpus:g} CPUs and {gpus:g} GPUs, and waits for "
            "more nodes. CPUs of Ray are counts: `ray start --num-cpus` may exceed the cores.",
            UserWarning,
            stacklevel=3,
        )
    return concurrency or max(1, int(min(room))), num_gpus or None


@contextlib.contextmanager
def _committing_to(folder: "_Folder", context: Any, id: str) -> Iterator[None]:
    """Let Ray leave out the rows that are in a folder, and commit those that it writes there."""
    before = context.checkpoint_config
    context.checkpoint_config = checkpoint.CheckpointConfig(
        id_column=id,
        checkpoint_path=f"{folder.url}/{_CHECKPOINT}",
        delete_checkpoint_on_success=False,
    )
    try:
        yield
    finally:
        context.checkpoint_config = before


# The manifest -------------------------------------------------------------------------------------


def _read_manifest(source: Any) -> Any:
    if isinstance(source, data.Dataset):
        if not _begins_with_read(source._logical_plan.dag):
            raise ValueError(
                "source must be Parquet files or a dataset that begins with a read, such as "
                "ray.data.read_parquet, so that the job can resume; got a dataset without a read."
            )
        return source
    return data.read_parquet(os.fspath(source), num_cpus=_LITTLE)


def _begins_with_read(step: Any) -> bool:
    """Tell whether Ray can leave out finished rows; its own check passes datasets of no read."""
    if type(step).__name__ in ("Read", "ReadFiles"):
        return True
    return bool(step.input_dependencies) and all(map(_begins_with_read, step.input_dependencies))


def _choose_columns(schema: Any, id: str, image: str, columns: list[str] | None) -> list[str]:
    """Return the columns of the manifest to copy, the id first."""
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
    return list(dict.fromkeys([id, *columns]))


def _is_encoded(schema: Any, name: str) -> bool:
    kind = schema.field(name).type
    return any(is_kind(kind) for is_kind in _ENCODED_KINDS)


def _read_ids(manifest: Any, id: str) -> Any:
    """Read the ids of a manifest; raise if there are none, or some are null or repeated."""
    batches = manifest.select_columns([id]).iter_batches(batch_size=None, batch_format="pyarrow")
    chunks = [chunk for batch in batches for chunk in batch[id].chunks]
    if not sum(map(len, chunks)):
        raise ValueError("source must have rows; got an empty manifest.")
    ids = pa.chunked_array(chunks)
    if kind := _LARGE.get(ids.type):
        ids = ids.cast(kind)  # together they may be longer than 2 GB
    if ids.null_count:
        raise ValueError(
            f"id must name a column without nulls; {ids.null_count} of {len(ids)} in {id!r} are "
            "null."
        )
    repeated = _find_repeated(ids)
    if len(repeated):
        raise ValueError(
            f"id must name a column of distinct values; {len(repeated)} in {id!r} are repeated, "
            f"such as {', '.join(map(repr, repeated[:3].to_pylist()))}."
        )
    return ids


def _find_repeated(ids: Any) -> Any:
    """Return each id that is there more than once; by sorting, which takes the least memory."""
    ordered = ids.take(compute.sort_indices(ids)).combine_chunks()
    later = ordered[1:]
    return later.filter(compute.equal(later, ordered[:-1])).unique()


def _find_missing(ids: Any, found: Any) -> Any:
    """Return the ids that are not among others."""
    return ids.filter(compute.invert(compute.is_in(ids, value_set=found)))


def _describe(extractor: DeepFeatureExtractor, id: str, schema: Any) -> dict[str, Any]:
    """Describe what computes the rows, and the rows, for other programs."""
    backbone = extractor._find_backbone()
    sections = extractor._find_sections(index_layers(backbone))
    try:
        digest = backbone.fingerprint().hex()
    except UnknownContentError as error:
        raise ValueError(
            f"A job with {backbone.name} could not resume, as the network and its preprocessing "
            f"cannot be identified: {error}."
        ) from error
    return {
        "version": __version__,
        "backbone": backbone.name,
        "digest": digest,
        "preprocessing": backbone.preprocessing.description,
        "layers": [section.pooled.layer.name for section in sections],
        "pooling": [section.pooled.pooling for section in sections],
        "norm": extractor.norm,
        "precision": extractor.precision,
        "id": id,
        "columns": {field.name: str(field.type) for field in schema},
    }


# The folder of the rows ---------------------------------------------------------------------------


@dataclass(frozen=True)
class _Folder:
    """The folder of the rows, what has filled it, and Ray's record of what is committed."""

    url: str
    system: Any
    path: str

    @classmethod
    def find(cls, output: str | os.PathLike[str]) -> "_Folder":
        url = os.fspath(output)
        if "://" not in url:
            url = os.path.abspath(os.path.expanduser(url))
        url = url.rstrip("/")
        return cls(url, *fs.FileSystem.from_uri(url))

    def check(self, description: dict[str, Any]) -> None:
        """Raise if something else has filled the folder."""
        names = self._list_names()
        if _DESCRIPTION not in names:
            if names - {_DRAFT}:
                raise ValueError(
                    "output must be a new or empty folder, or one that extract has begun; "
                    f"{self.url!r} contains other files."
                )
            return
        found = json.loads(self._read(_DESCRIPTION))
        for key, value in json.loads(json.dumps(description)).items():  # tuples become lists
            if key != "version" and found.get(key) != value:
                raise ValueError(
                    "output was filled by another extractor or with other columns: in "
                    f"{self.url!r}, {key} is {found.get(key)!r} instead of {value!r}. Choose "
                    "another folder."
                )

    def claim(self, description: dict[str, Any]) -> None:
        """Note what fills the folder, and that it is not finished."""
        names = self._list_names()
        if _DESCRIPTION not in names:
            self.system.create_dir(self.path, recursive=True)
            self._write(_DESCRIPTION, description)
        if _SUCCESS in names:
            self.system.delete_file(f"{self.path}/{_SUCCESS}")

    def read_committed(self, id: str) -> Any:
        """Return the ids of the rows that earlier calls have committed."""
        files = [path for path in self._list(_CHECKPOINT) if not path.endswith(_PENDING)]
        if not files:
            return pa.chunked_array([], pa.null())
        return datasets.dataset(files, filesystem=self.system).to_table([id])[id]

    def check_rows(self, ids: Any, id: str, error_column: str) -> tuple[int, int]:
        """Return how many rows there are and how many have failed; raise unless each id has one."""
        rows = datasets.dataset(self.path, filesystem=self.system).to_table([id, error_column])
        found = rows[id].cast(ids.type)
        missing = _find_missing(ids, found)
        if len(missing):
            raise RuntimeError(
                f"{len(missing)} of {len(ids)} rows are missing in {self.url!r}, such as that of "
                f"{missing[0].as_py()!r}: files have been removed, or the nodes do not share this "
                "folder. Extract to a new one."
            )
        if len(_find_repeated(found)):
            raise RuntimeError(
                f"Rows are repeated in {self.url!r}, to which another job wrote at the same time. "
                "Extract to a new folder."
            )
        return len(found), len(found) - rows[error_column].null_count

    def finish(self, summary: Summary) -> None:
        self._write(_SUCCESS, asdict(summary))

    def _list_names(self) -> set[str]:
        return {path.rpartition("/")[2] for path in self._list("")}

    def _list(self, name: str) -> list[str]:
        selector = fs.FileSelector(f"{self.path}/{name}".rstrip("/"), allow_not_found=True)
        return [info.path for info in self.system.get_file_info(selector)]

    def _read(self, name: str) -> bytes:
        with self.system.open_input_file(f"{self.path}/{name}") as file:
            content: bytes = file.read()
        return content

    def _write(self, name: str, content: dict[str, Any]) -> None:
        with self.system.open_output_stream(f"{self.path}/{_DRAFT}") as file:
            file.write(json.dumps(content, indent=1).encode())
        self.system.move(f"{self.path}/{_DRAFT}", f"{self.path}/{name}")
