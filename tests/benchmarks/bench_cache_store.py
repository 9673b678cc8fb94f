"""Measures what it costs to read rows from a cache: against `np.load`, and as the cache grows."""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from deepfeat._cache import FeatureCache

REPEATS = 9
BATCH = 500


def measure(*tasks: Callable[[], object]) -> list[float]:
    """Return the median seconds of each task; the tasks take turns, so all see the same machine."""
    times = [[] for _ in tasks]
    for _ in range(REPEATS):
        for task, taken in zip(tasks, times, strict=True):
            start = time.perf_counter()
            task()
            taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]


def fill(cache: FeatureCache, matrix: np.ndarray) -> tuple[list[bytes], float]:
    """Store the matrix in batches; return the keys of its rows and the seconds it took."""
    keys = [np.random.default_rng(i).bytes(32) for i in range(len(matrix))]
    start = time.perf_counter()
    for i in range(0, len(matrix), BATCH):
        cache.put_many(keys[i : i + BATCH], {b"context": matrix[i : i + BATCH]})
    return keys, time.perf_counter() - start


def compare_with_load(folder: Path, n_rows: int = 5_000, width: int = 4_096) -> None:
    matrix = np.random.default_rng(0).standard_normal((n_rows, width)).astype(np.float32)
    np.save(folder / "matrix.npy", matrix)
    on_disk, in_memory = FeatureCache(folder / "cache"), FeatureCache()
    keys, filled = fill(on_disk, matrix)
    fill(in_memory, matrix)
    shuffled = [keys[i] for i in np.random.default_rng(1).permutation(n_rows)]
    load, disk, mixed, memory = measure(
        lambda: np.load(folder / "matrix.npy"),
        lambda: on_disk.get_many(b"context", keys),
        lambda: on_disk.get_many(b"context", shuffled),
        lambda: in_memory.get_many(b"context", keys),
    )
    np.testing.assert_array_equal(on_disk.get_many(b"context", keys)[1], matrix)
    print(f"{n_rows} rows of {width} floats; np.load {load * 1e3:.1f} ms")
    for name, seconds in [("disk", disk), ("disk, shuffled", mixed), ("memory", memory)]:
        per_row = seconds / n_rows * 1e6
        print(f"  get_many, {name:15} {seconds / load:4.1f} x np.load, {per_row:5.1f} us a row")
    print(f"  put_many, disk            {filled / n_rows * 1e6:5.1f} us a row, {BATCH} at a time")


def show_growth(folder: Path, width: int = 512) -> None:
    print(f"rows of {width} floats, all read in one call")
    for n_rows in 1_000, 10_000, 50_000:
        cache = FeatureCache(folder / f"cache-{n_rows}")
        matrix = np.random.default_rng(0).standard_normal((n_rows, width)).astype(np.float32)
        keys, filled = fill(cache, matrix)
        (read,) = measure(lambda cache=cache, keys=keys: cache.get_many(b"context", keys))
        print(
            f"  {n_rows:6} rows: get_many {read / n_rows * 1e6:5.1f} us a row,"
            f" put_many {filled / n_rows * 1e6:5.1f} us a row"
        )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        compare_with_load(Path(folder))
        show_growth(Path(folder))
