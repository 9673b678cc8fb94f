"""Time of a search over layers and C: with the cache, with Pipeline(memory=...), with neither.

The images are 300 of those under DEEPFEAT_DATA, with the MobileNetV2 weights from there, or else
300 generated ones, with random weights. Each result is from a single run on this machine.

Arguments: the number of images, and the path of another checkout of deepfeat. With a checkout, only
the warm grid is measured, alternating between the two, each in a process of its own.
"""

import csv
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.svm import LinearSVC
from torchvision.models import MobileNetV2

from deepfeat import DeepFeatureExtractor, FeatureCache

IMAGES = int(sys.argv[1]) if len(sys.argv) > 1 else 300
LAYERS = ["stage3", "stage4", "stage5"]
CS = [0.01, 0.1, 1, 10]
FOLDS = 3
REPEATS = 5


def main():
    if len(sys.argv) > 2:
        serve() if sys.argv[2] == "--serve" else compare_checkouts(sys.argv[2])
        return
    with tempfile.TemporaryDirectory() as folder:
        paths, y, weights = find_images(Path(folder))
        extractor = DeepFeatureExtractor("mobilenet_v2", weights=weights)
        kind = "real images, given weights" if weights else "generated images, random weights"
        print(f"{len(LAYERS)} layers x {len(CS)} C x {FOLDS} folds, {len(paths)} {kind}:")
        count_forwards()
        cache = FeatureCache(Path(folder, "cache"))
        with_cache = extractor.set_params(cache=cache)
        report("FeatureCache on disk, empty", search(with_cache), paths, y)
        report("FeatureCache on disk, warm", search(with_cache), paths, y)
        without = DeepFeatureExtractor("mobilenet_v2", weights=weights, cache=None)
        report(
            "Pipeline(memory=...)", search(without, memory=str(Path(folder, "memory"))), paths, y
        )
        report("no cache", search(without), paths, y)
        compare_with_matrices("on disk", extractor.set_params(cache=cache), paths, y)
        compare_with_matrices("in memory", extractor.set_params(cache="memory"), paths, y)


def compare_checkouts(other):
    """Print the time of the warm grid, and its ratio to that of the other checkout."""
    command = [sys.executable, __file__, str(IMAGES), "--serve"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    servers = [
        subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(path)}, **pipes)
        for path in (Path(__file__).parents[2], other)
    ]
    for cache in "disk", "memory":
        times = np.array([[ask(server, cache) for server in servers] for _ in range(REPEATS + 1)])
        ratios = times[1:, 0] / times[1:, 1]  # the first one fills the caches
        print(
            f"warm grid, {IMAGES} images, cache on {cache}: {np.median(times[1:, 0]):.3f} s, "
            f"{np.median(ratios):.2f} x the other ({ratios.min():.2f} to {ratios.max():.2f})"
        )
    for server in servers:
        server.communicate()


def ask(server, cache):
    print(cache, file=server.stdin, flush=True)
    return float(server.stdout.readline())


def serve():
    """For each line of standard input, which names a cache, print the seconds of one grid."""
    with tempfile.TemporaryDirectory() as folder:
        paths, y, weights = find_images(Path(folder))
        caches = {"disk": FeatureCache(Path(folder, "cache")), "memory": FeatureCache()}
        for line in sys.stdin:
            extractor = DeepFeatureExtractor("mobilenet_v2", weights=weights)
            grid = search(extractor.set_params(cache=caches[line.strip()]))
            start = time.perf_counter()
            grid.fit(paths, y)
            print(time.perf_counter() - start, flush=True)


def search(extractor, memory=None):
    return GridSearchCV(
        make_pipeline(extractor, LinearSVC(random_state=0), memory=memory),
        {"deepfeatureextractor__layer": LAYERS, "linearsvc__C": CS},
        cv=FOLDS,
    )


def report(words, grid, paths, y):
    forwards.clear()
    start = time.perf_counter()
    grid.fit(paths, y)
    seconds = time.perf_counter() - start
    print(
        f"  {words:30} {seconds:7.1f} s, {sum(forwards):6} images through the network", flush=True
    )


def compare_with_matrices(where, extractor, paths, y):
    """Compare a warm grid with the same fits on precomputed feature matrices."""
    matrices = [extractor.set_params(layer=layer).transform(paths) for layer in LAYERS]
    warm, ready = [], []
    for _ in range(REPEATS):
        start = time.perf_counter()
        search(extractor).fit(paths, y)
        warm.append(time.perf_counter() - start)
        start = time.perf_counter()
        for matrix in matrices:
            GridSearchCV(LinearSVC(random_state=0), {"C": CS}, cv=FOLDS).fit(matrix, y)
        ready.append(time.perf_counter() - start)
    ratios = np.divide(warm, ready)
    print(
        f"  warm grid {where} {np.median(warm):.2f} s, the same fits on precomputed matrices "
        f"{np.median(ready):.2f} s: ratio {np.median(ratios):.2f} "
        f"({ratios.min():.2f} to {ratios.max():.2f} in {REPEATS} runs; aim 1.15)"
    )


forwards = []


def count_forwards():
    forward = MobileNetV2.forward

    def counted(self, x):
        if x.device.type != "meta":
            forwards.append(len(x))
        return forward(self, x)

    MobileNetV2.forward = counted


def find_images(folder):
    data = os.environ.get("DEEPFEAT_DATA")
    if data:
        with open(Path(data, "scene15_split.csv"), newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["split"] == "train"]
        rows = rows[:: max(1, len(rows) // IMAGES)][:IMAGES]
        paths = [str(Path(data, "scene15", row["class"], row["file"])) for row in rows]
        return paths, [row["class"] for row in rows], str(Path(data, "weights/mobilenet_v2.pth"))
    rng = np.random.default_rng(0)
    paths = []
    for number in range(IMAGES):
        pixels = rng.integers(0, 256, (25, 30), dtype=np.uint8)
        paths.append(str(folder / f"{number}.jpg"))
        Image.fromarray(pixels).resize((300, 250)).save(paths[-1])
    return paths, [number % 5 for number in range(IMAGES)], None


if __name__ == "__main__":
    main()
