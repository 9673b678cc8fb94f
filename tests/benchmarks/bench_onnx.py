"""Files of deepfeat.onnx against `predict`: size, time to load, and throughput on a CPU.

A linear SVM on features of networks with random weights. All run in turns on the same pixels, at
the input size of the network, in memory. With `--threads`, all use that many.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import openvino
import torch
from numpy.typing import NDArray
from sklearn.base import clone
from sklearn.pipeline import make_pipeline
from sklearn.svm import LinearSVC

from deepfeat import DeepFeatureExtractor
from deepfeat.onnx import export

BACKBONES = {"mobilenet_v2": 128, "resnet50": 48, "squeezenet1_1": 128}  # numbers of images
SIZE = 224
BATCH = 8
REPEATS = 5

Pixels = NDArray[np.uint8]
Run = Callable[[Pixels], object]


def make_images(count: int) -> Pixels:
    return np.random.default_rng(0).integers(0, 256, (count, SIZE, SIZE, 3), dtype=np.uint8)


def load_in_onnxruntime(file: Path, threads: int) -> Run:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda batch: session.run(None, {"images": batch})


def load_in_openvino(file: Path, threads: int) -> Run:
    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": threads}
    model = openvino.Core().read_model(file)
    model.reshape([BATCH, SIZE, SIZE, 3])
    request = openvino.compile_model(model, "CPU", settings).create_infer_request()
    return lambda batch: request.infer([batch])


def in_batches(run: Run) -> Run:
    return lambda images: [run(batch) for batch in np.split(images, len(images) // BATCH)]


def measure(run: Run, images: Pixels) -> float:
    start = time.perf_counter()
    run(images)
    return len(images) / (time.perf_counter() - start)


def compare(backbone: str, count: int, repeats: int, threads: int, folder: Path) -> None:
    images = make_images(count)
    # Squashed, an image of the input size stays as it is.
    extractor = DeepFeatureExtractor(backbone, weights=None, resize="squash", cache=None)
    pipe = make_pipeline(extractor, LinearSVC()).fit(images[:16], np.arange(16) % 4)
    with_openvino = make_pipeline(clone(extractor).set_params(engine="openvino"), pipe[-1])
    runs: dict[str, tuple[Run, str, float]] = {}
    for name, predict in (("torch", pipe.predict), ("openvino", with_openvino.predict)):
        start = time.perf_counter()
        predict(images[:BATCH])
        runs[f"predict, {name}"] = predict, "", time.perf_counter() - start
    for precision in ("float32", "float16"):
        file = folder / f"{backbone}.{precision}.onnx"
        export(pipe, file, check=images[:8], precision=precision)
        megabytes = f"{file.stat().st_size / 1e6:.1f}"
        for name, load in (("ONNX Runtime", load_in_onnxruntime), ("OpenVINO", load_in_openvino)):
            start = time.perf_counter()
            run = in_batches(load(file, threads))
            run(images[:BATCH])
            seconds = time.perf_counter() - start
            runs[f"{name}, weights in {precision}"] = run, megabytes, seconds
    rates: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, (run, _, _) in runs.items():
            rates[name].append(measure(run, images))
    reference = statistics.median(rates["predict, torch"])
    for name, (_, megabytes, seconds) in runs.items():
        rate = statistics.median(rates[name])
        print(
            f"| {backbone} | {name} | {megabytes} | {seconds:.1f} | {rate:.1f} "
            f"({rate / reference:.2f} x) |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="only check that it runs")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options, _ = parser.parse_known_args()
    torch.set_num_threads(options.threads)
    backbones = {"squeezenet1_1": 16} if options.smoke else BACKBONES
    print("| backbone | what runs it | MB | first batch, s | images/s |")
    print("|---|---|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as folder:
        for backbone, count in backbones.items():
            repeats = 1 if options.smoke else REPEATS
            compare(backbone, count, repeats, options.threads, Path(folder))


if __name__ == "__main__":
    main()
