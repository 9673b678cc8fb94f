"""Cost of a cache on disk: time to read and write rows, and bytes per row.

With the path of another checkout of deepfeat as an argument, the two are measured alternately, each
in a process of its own, and ratios are printed: below 1, this checkout is faster or smaller.
"""

import functools
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from deepfeat import FeatureCache

REPEATS = 9
ROWS = 5_000
WIDTHS = 512, 2048, 4096
NAMESPACE = b"namespace"


class Bench:
    """Tasks on a cache of one width, and on matrices of the same rows."""

    def __init__(self, folder: Path, width: int) -> None:
        self.folder = folder / str(width)
        rng = np.random.default_rng(0)
        self.matrix = rng.standard_normal((ROWS, width)).astype(np.float32)
        self.keys = [np.random.default_rng(i).bytes(32) for i in range(ROWS)]
        self.shuffled = [self.keys[i] for i in rng.permutation(ROWS)]
        self.cache = FeatureCache(self.folder / "cache")
        self.memory = FeatureCache()
        for cache in self.cache, self.memory:
            fill(cache, self.keys, self.matrix)
        np.testing.assert_array_equal(self.cache.get_many(NAMESPACE, self.keys)[1], self.matrix)
        np.save(self.folder / "matrix.npy", self.matrix)
        get = functools.partial(self.cache.get_many, NAMESPACE)
        self.tasks: dict[str, Callable[[], object]] = {
            "get_many, all": lambda: get(self.keys),
            "get_many, all, shuffled": lambda: get(self.shuffled),
            "get_many, 1000 in a row": lambda: get(self.keys[1000:2000]),
            "get_many, 1000 at random": lambda: get(self.shuffled[:1000]),
            "get_many, 32 at random, 30 times": lambda: [
                get(self.shuffled[i : i + 32]) for i in range(0, 960, 32)
            ],
            "get_many, all, marked as used": lambda: FeatureCache(
                self.cache.path, max_bytes=2**40
            ).get_many(NAMESPACE, self.keys),
            "put_many, 1000, 32 at a time": self.put,
            "get_many from memory, all": lambda: self.memory.get_many(NAMESPACE, self.keys),
            "np.load, all": lambda: np.load(self.folder / "matrix.npy"),
        }

    def put(self) -> None:
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            fill(FeatureCache(folder), self.keys[:1000], self.matrix)

    def measure(self, name: str) -> float:
        start = time.perf_counter()
        self.tasks[name]()
        return time.perf_counter() - start

    def bytes_per_row(self) -> float:
        self.cache._store.close()
        files = [path for path in Path(self.cache.path).rglob("*") if path.is_file()]
        return sum(path.stat().st_size for path in files) / ROWS


def fill(cache: FeatureCache, keys: list[bytes], matrix: np.ndarray) -> None:
    for i in range(0, len(keys), 32):
        cache.put_many(keys[i : i + 32], {NAMESPACE: matrix[i : i + 32][: len(keys) - i]})


def serve() -> None:
    """Measure what each line of standard input requests."""
    with tempfile.TemporaryDirectory() as folder:
        for line in sys.stdin:
            request, argument = line.rstrip("\n").split(": ")
            if request == "width":
                bench = Bench(Path(folder), int(argument))
                print(";".join(bench.tasks), flush=True)
            else:
                print(bench.bytes_per_row() if request == "size" else bench.measure(argument))
                sys.stdout.flush()


class Checkout:
    """A process that measures with the deepfeat of one checkout."""

    def __init__(self, path: Path) -> None:
        environment = {**os.environ, "PYTHONPATH": str(path)}
        command = [sys.executable, __file__, "--serve"]
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, request: str, argument: object) -> str:
        print(f"{request}: {argument}", file=self.process.stdin, flush=True)
        return self.process.stdout.readline().rstrip("\n")


def main() -> None:
    checkouts = [Checkout(path) for path in (Path(__file__).parents[2], *map(Path, sys.argv[1:]))]
    for width in WIDTHS:
        names = [checkout.ask("width", width) for checkout in checkouts].pop().split(";")
        print(f"{ROWS} rows of {width} floats, {4 * width} bytes each")
        for name in names:
            times = [
                [float(checkout.ask("time", name)) for checkout in checkouts]
                for _ in range(REPEATS)
            ]
            report(name, 1e3 * np.array(times), "ms")
        sizes = [float(checkout.ask("size", "")) / width / 4 for checkout in checkouts]
        report("bytes on disk per byte of values", np.array([sizes]), "")
    for checkout in checkouts:
        checkout.process.communicate()


def report(name: str, values: np.ndarray, unit: str) -> None:
    """Print the median of this checkout, and the median ratio to the other one."""
    words = f"  {name:38} {np.median(values[:, 0]):8.3f} {unit}"
    for other in values.T[1:]:
        ratios = values[:, 0] / other
        words += f", {statistics.median(ratios):5.2f} x the other"
        if len(ratios) > 1:
            words += f" ({ratios.min():.2f} to {ratios.max():.2f})"
    print(words, flush=True)


if __name__ == "__main__":
    serve() if sys.argv[1:] == ["--serve"] else main()
