"""The cluster: how many actors it has room for, and what is left to Ray itself."""

import contextlib
import math
import os
import warnings
from collections.abc import Iterator
from typing import Any

from .. import DeepFeatureExtractor
from .._engine.threads import count_processors
from .._optional import import_optional

ray: Any = import_optional("ray", extra="ray")

IO_CPUS = 0.01  # of a task that waits for disks, so that it need not wait for a CPU
_READERS = "RAY_DATA_PARQUET_FOOTER_NUM_ACTORS"
_SPARE_CPUS = 2  # Ray's own filter of finished rows holds one, its other tasks take turns on one


def start_ray() -> None:
    """Join the cluster that `RAY_ADDRESS` names, or else start one."""
    if "RAY_ADDRESS" in os.environ:
        ray.init()
    else:
        ray.init(num_cpus=count_processors() + _SPARE_CPUS)


@contextlib.contextmanager
def limit_readers(n_files: int) -> Iterator[None]:
    """Let Ray start fewer than 32 processes to read the footers of a few Parquet files.

    On a laptop, these alone would take minutes to start.
    """
    if _READERS in os.environ:
        yield
        return
    os.environ[_READERS] = str(min(32, max(1, math.ceil(n_files / 10))))
    try:
        yield
    finally:
        del os.environ[_READERS]


def plan_actors(
    extractor: DeepFeatureExtractor,
    concurrency: int | None,
    num_cpus: float,
    num_gpus: float | None,
) -> tuple[int, float | None]:
    """Return the number of actors and the GPUs of each.

    Actors on all CPUs would wait forever for rows, which no task could read for them.

    Raises
    ------
    ValueError
        If the extractor needs a GPU that actors do not have.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus, gpus = (sum(node.get(kind, 0) for node in nodes) for kind in ("CPU", "GPU"))
    if num_gpus is None:
        on_gpu = str(extractor.device) != "cpu" and extractor.engine == "torch"
        num_gpus = 1 if gpus and on_gpu else 0
    if str(extractor.device).startswith("cuda") and not num_gpus:
        raise ValueError(
            f"device={extractor.device!r} needs a GPU per actor; the cluster has {gpus:g} GPUs, "
            f"and num_gpus is {num_gpus}."
        )
    rooms = [node.get("CPU", 0) // num_cpus for node in nodes]
    if num_gpus:
        rooms = [
            min(room, node.get("GPU", 0) // num_gpus)
            for room, node in zip(rooms, nodes, strict=True)
        ]
    room = int(min(sum(rooms), (cpus - _SPARE_CPUS) // num_cpus))
    count = concurrency or max(1, room)
    if count > room:
        needed = f"{count * num_cpus + _SPARE_CPUS:g} CPUs"
        needed += f" and {count * num_gpus:g} GPUs" if num_gpus else ""
        warnings.warn(
            f"concurrency={count} needs {needed}, including {_SPARE_CPUS} CPUs for Ray itself; the "
            f"cluster of {len(nodes)} nodes has {cpus:g} CPUs and {gpus:g} GPUs, and will wait for "
            "more. CPUs of Ray are counts: `ray start --num-cpus` may exceed the cores.",
            UserWarning,
            stacklevel=3,
        )
    return count, num_gpus or None
