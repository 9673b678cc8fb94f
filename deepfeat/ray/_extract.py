"""`extract`: a manifest of images becomes Parquet files of features, on a cluster of Ray."""

import copy
import json
import math
import os
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from .. import DeepFeatureExtractor, __version__
from .._backbones.fingerprint import UnknownContentError
from .._engine.threads import clear_frames
from .._extraction.readers import find_engine, index_layers, load_network
from .._optional import import_optional
from .._parameters import check_parameters
from ..arrow import FeatureBatch
from ._cluster import IO_CPUS, limit_readers, plan_actors, start_ray
from ._folder import Folder, committing_to
from ._ids import find_missing
from ._manifest import choose_columns, find_schema, plan_rows, read_ids, read_manifest

ray: Any = import_optional("ray", extra="ray")
data: Any = import_optional("ray.data", extra="ray")

_KEY = "deepfeat"  # in the metadata of the schema


@dataclass(frozen=True)
class Summary:
    """What `extract` has done.

    Attributes
    ----------
    rows : int
        Rows in the folder.
    failed : int
        Rows whose image could not be read.
    computed : int
        Rows that this call added.
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
    says why. A file `_SUCCESS` is written last; until then a file may be incomplete. A row is known
    by its id: what else has changed of it in the manifest is not noticed.

    Parameters
    ----------
    extractor : DeepFeatureExtractor
        What computes the features. Its `cache`, `on_error` and `verbose` are ignored.
    source : str, path or ray.data.Dataset
        The manifest, one row per image: a Parquet file or a folder of these, also as a URI; or a
        dataset that reads the ids, followed by maps and filters that give the same ids each time.
        It is executed twice: for the ids alone, and for all columns.
    output : str or path
        A folder, or the URI of one in an object storage, for the Parquet files. All nodes must be
        able to write there, and no other call may do so at the same time.
    id : str, default="id"
        The column that identifies a row: integers, strings or bytes, without nulls or duplicates.
        They are compared in the memory of this process. Integers take the least, about 70 bytes
        per row.
    image : str, default="path"
        The column of images: paths, URIs, encoded images or structs, as for `FeatureBatch`.
    columns : list of str, optional
        Columns of the manifest to copy, besides the id. By default all, without encoded images.
    concurrency : int, optional
        Number of actors, each with a network. By default as many as fit into the cluster with two
        CPUs left, which Ray itself needs.
    num_cpus : float, default=1
        CPUs per actor: the threads that run the network, on a CPU, and those that read and
        prepare images, unless the extractor's `num_workers` is a number.
    num_gpus : float, optional
        GPUs per actor. By default one, if the cluster has any, the extractor's `device` is not a
        CPU, and its engine is torch.
    rows_per_task : int, default=2048
        Rows that are computed and written together, as one file. After an interruption, about as
        many per actor are computed again.

    Returns
    -------
    Summary
        `rows`, `failed`, `computed`, `seconds` and `images_per_second`.

    Raises
    ------
    TypeError
        If `extractor` or `source` is of another type.
    ValueError
        If a parameter is invalid; the manifest is empty, lacks a column, or has ids that are null
        or repeated; the folder was filled by another extractor or contains other files; or the
        weights and the preprocessing cannot be digested. Nothing is written.
    RuntimeError
        If rows are missing in the folder in the end, there twice, or more than the manifest has.
        `_SUCCESS` is not written.
    OSError
        If the folder cannot be written.
    ray.exceptions.RayError
        If a task fails in another way; for example, if a node cannot download the weights. The same
        call resumes.

    See Also
    --------
    deepfeat.arrow.FeatureBatch : The same for a plain loop, Spark and others.

    Notes
    -----
    The files have the id, the columns of the manifest, "features", `FixedSizeList<float32>[d]`,
    null if the image cannot be read, and "error", then the reason. The order of the rows is not
    kept. The metadata of the schema has under "deepfeat" as JSON the extractor: "backbone",
    "layers", "pooling", "norm", "precision", "digest" (of the weights and the preprocessing),
    "preprocessing" (null if it is your own), "engine" and "version", that of deepfeat; "id" and
    "image", names of columns; and "columns", the type of each.

    Unless `ray.init` has been called, the cluster that the environment variable `RAY_ADDRESS` names
    is joined, or else one is started on this machine, until the process ends. The progress is
    Ray's. Weights are downloaded once per node.

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
    folder = Folder.find(output)
    if not ray.is_initialized():
        start_ray()
    manifest = read_manifest(source, id, folder)
    schema = find_schema(manifest)
    copied = choose_columns(schema, add_features, id, columns)
    written = plan_rows(schema, add_features, copied)
    description = _describe(add_features, id, written)
    folder.check(description)
    n_actors, num_gpus = plan_actors(add_features.extractor, concurrency, num_cpus, num_gpus)
    ids = read_ids(manifest, id, schema.field(id).type)
    folder.claim(description)
    committed = folder.read_committed(id, ids.type)
    n_missing = len(find_missing(ids, committed))
    if n_missing:
        rows = manifest.select_columns(list(dict.fromkeys([*copied, image]))).repartition(
            target_num_rows_per_block=rows_per_task, strict=True
        )
        size = min(n_actors, math.ceil(n_missing / rows_per_task))
        actors = {
            "fn_constructor_args": (add_features, written.names, threads, description["digest"]),
            "compute": data.ActorPoolStrategy(size=size),
            "num_cpus": num_cpus,
            "num_gpus": num_gpus,
        }
        schema = written.with_metadata({_KEY: json.dumps(description)})
        _run_job(rows, actors, folder, id, schema)
    n_rows, n_failed = folder.check_rows(ids, id, add_features.error_column)
    if n_rows != len(committed) + n_missing:
        raise RuntimeError(
            f"{folder.url!r} has {n_rows} rows instead of {len(committed) + n_missing}: source did "
            "not give the same rows each time. Extract to a new folder, from Parquet files."
        )
    seconds = time.perf_counter() - start
    summary = Summary(n_rows, n_failed, n_missing, seconds, n_missing / seconds)
    folder.finish(asdict(summary))
    return summary


def _run_job(rows: Any, actors: dict[str, Any], folder: Folder, id: str, schema: Any) -> None:
    """Let actors compute the rows of a manifest, and Ray write them.

    Raises
    ------
    OSError
        If a file cannot be written.
    """
    try:
        n_records = len(folder.list_records())
        with limit_readers(n_records), committing_to(folder, rows.context, id):
            rows.map_batches(
                _Extraction, batch_format="pyarrow", batch_size=None, **actors
            ).write_parquet(
                folder.path,
                filesystem=folder.system,
                schema=schema,
                ray_remote_args={"num_cpus": IO_CPUS},
            )
    except BaseException as error:
        # Whoever keeps the traceback, such as a notebook, would keep the actors and their CPUs.
        clear_frames(error)
        if isinstance(error, OSError):
            cause = getattr(error, "cause", error)  # of an error of a task of Ray
            raise OSError(
                f"The job on {folder.url!r} has ended: {cause}. What is written stays; the same "
                "call resumes."
            ) from error
        raise


def _copy_for_actors(extractor: Any, threads: int) -> Any:
    """Copy an extractor, without a cache, which nodes cannot share, and with few threads."""
    if not isinstance(extractor, DeepFeatureExtractor):
        return extractor  # which FeatureBatch refuses
    copied = copy.copy(extractor).set_params(cache=None, verbose=0)
    if copied.num_workers == "auto":  # as many as the node has processors, in each of its actors
        copied.set_params(num_workers=threads)
    return copied


class _Extraction:
    """An actor of Ray Data: adds features to a block of the manifest."""

    def __init__(self, add_features: FeatureBatch, columns: list[str], threads: int, digest: str):
        torch.set_num_threads(threads)
        self.add_features = add_features
        self.columns = columns
        self.digest = digest
        self.is_loaded = False

    def __call__(self, rows: Any) -> Any:
        if not self.is_loaded:  # the death of an actor, in its constructor, would be the error
            self.download()
            self.is_loaded = True
        return self.add_features(rows).select(self.columns)

    def download(self) -> None:
        """Download the weights, unless an actor of this node has; the others wait for the first."""
        node = ray.get_runtime_context().get_node_id()
        loaded = Path(tempfile.gettempdir(), f"deepfeat-{node[:16]}-{self.digest[:16]}")
        with FileLock(f"{loaded}.lock"):
            if not loaded.exists():
                extractor = self.add_features.extractor
                engine = find_engine(
                    extractor.engine, extractor.device, extractor.precision, extractor.batch_size, 0
                )
                load_network(extractor._find_backbone(), engine.device)
                loaded.touch()


def _describe(add_features: FeatureBatch, id: str, schema: Any) -> dict[str, Any]:
    """Describe what computes the rows, and the rows, for other programs."""
    extractor = add_features.extractor
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
        "engine": extractor.engine,
        "id": id,
        "image": add_features.image,
        "columns": {field.name: str(field.type) for field in schema},
    }
