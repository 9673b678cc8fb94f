"""Throughput from image files to features: deepfeat's engines, and the usual ways besides it.

All run in turns on the same files, in one process, with random weights. "of the bound" compares
`transform` with what its parts allow: the forward pass and the preparation of images, each measured
alone, sharing the cores without a loss. With `--plot`, the rates are drawn.
"""

import argparse
import functools
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import numpy as np
import timm
import torch
from _pictures import PHOTOGRAPH, SIZE, write_photographs, write_pictures
from embetter.vision import ImageLoader, TimmEncoder
from PIL import Image
from sklearn.pipeline import make_pipeline
from timm.data import create_transform, resolve_data_config
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import models
from torchvision.models.feature_extraction import create_feature_extractor

from deepfeat import DeepFeatureExtractor
from deepfeat._engine.threads import map_in_threads
from deepfeat._extraction.readers import (
    find_engine,
    index_layers,
    load_network,
    make_layer_reader,
)
from deepfeat._images.records import Record, as_records

REPEATS = 3
BATCH = 32
WORKERS = (0, 2)  # of a DataLoader; the faster one counts
ENGINES = ("torch", "openvino")
PRECISIONS = ("float32", "bfloat16")


@dataclass(frozen=True)
class Task:
    """A layer of a network, by deepfeat's name and torchvision's, and timm's name for the same."""

    backbone: str
    layer: str
    node: str
    in_timm: str
    n_images: int
    photographs: bool = False  # of 12 megapixels

    def __str__(self) -> str:
        kind = ", photographs of 12 megapixels" * self.photographs
        return f"{self.backbone} {self.layer}{kind}"


TASKS = (
    Task("vgg16", "relu7", "classifier.4", "vgg16", 32),
    Task("resnet50", "avgpool", "avgpool", "resnet50", 64),
    Task("mobilenet_v2", "penultimate", "classifier.0", "mobilenetv2_100", 192),
    Task("resnet50", "avgpool", "avgpool", "resnet50", 16, photographs=True),
)
SMOKE = (Task("squeezenet1_1", "penultimate", "classifier.0", "test_resnet", 8),)


class Pictures(Dataset):
    """Files, read and preprocessed as in the tutorials."""

    def __init__(self, paths: list[str], preprocess: Callable[[Image.Image], Tensor]):
        self.paths = paths
        self.preprocess = preprocess

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Tensor:
        with Image.open(self.paths[index]) as image:
            return self.preprocess(image.convert("RGB"))


def run_loop(net: nn.Module, pictures: Pictures, num_workers: int) -> np.ndarray:
    """Extract features with the usual loop."""
    rows = []
    with torch.inference_mode():
        for batch in DataLoader(pictures, BATCH, num_workers=num_workers):
            found = net(batch)
            output = found["output"] if isinstance(found, dict) else found
            rows.append((output if output.ndim == 2 else output.mean((2, 3))).numpy())
    return np.concatenate(rows)


def make_peers(task: Task, paths: list[str]) -> dict[str, Callable[[], np.ndarray]]:
    """Make the other ways, by name."""
    torch.manual_seed(0)
    net = models.get_model(task.backbone, weights=None).eval()
    loop_net = create_feature_extractor(net, {task.node: "output"})
    preprocess = models.get_model_weights(task.backbone)["DEFAULT"].transforms()
    timm_net = timm.create_model(task.in_timm, num_classes=0).eval()
    timm_preprocess = create_transform(**resolve_data_config({}, model=timm_net))
    create = functools.partial(timm.create_model, pretrained=False)
    with mock.patch("timm.create_model", lambda name, pretrained, **other: create(name, **other)):
        encoder = make_pipeline(ImageLoader(), TimmEncoder(task.in_timm))
    encoder[-1].model.eval()  # embetter leaves dropout and batch normalisation as in training
    loops = {"torchvision": (loop_net, preprocess), "timm": (timm_net, timm_preprocess)}
    peers: dict[str, Callable[[], np.ndarray]] = {
        f"{name}, DataLoader with {count} workers": functools.partial(
            run_loop, network, Pictures(paths, steps), count
        )
        for name, (network, steps) in loops.items()
        for count in WORKERS
    }
    return peers | {"embetter": lambda: encoder.fit_transform(paths)}


def make_extractor(task: Task, engine: str, precision: str) -> DeepFeatureExtractor:
    # Without a cache, from which the second call would take all rows.
    return DeepFeatureExtractor(
        task.backbone, task.layer, weights=None, engine=engine, precision=precision, cache=None
    )


def make_parts(
    extractor: DeepFeatureExtractor, paths: list[str]
) -> tuple[Callable[[], None], Callable[[], None]]:
    """Make the forward pass of prepared images, and their preparation, each alone."""
    backbone = extractor._find_backbone()
    engine = find_engine(extractor.engine, "cpu", extractor.precision)
    network = load_network(backbone, engine.device)
    sections = extractor._find_sections(index_layers(backbone))
    reader = make_layer_reader(backbone, network, [section.pooled for section in sections], engine)
    records = as_records(paths)
    tensors = [reader.prepare(record.open()) for record in records]

    def forward() -> None:
        for start in range(0, len(tensors), BATCH):
            reader.read(torch.stack(tensors[start : start + BATCH]))

    def prepare() -> None:
        def open_and_prepare(record: Record) -> Tensor:
            return reader.prepare(record.open())

        for _, result in map_in_threads(open_and_prepare, records, "auto", ahead=2 * BATCH):
            assert isinstance(result, Tensor), result

    return forward, prepare


def measure_in_turns(
    tasks: dict[str, Callable[[], object]], repeats: int
) -> dict[str, list[float]]:
    """Return the seconds of each task; tasks alternate, so that conditions are equal."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for task in tasks.values():
        task()
    for _ in range(repeats):
        for name, task in tasks.items():
            start = time.perf_counter()
            task()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def compare(task: Task, paths: list[str], repeats: int) -> dict[str, float]:
    """Print the table of a network; return images per second by name."""
    peers = make_peers(task, paths)
    extractors = {
        f"deepfeat, {engine}, {precision}": make_extractor(task, engine, precision)
        for engine in ENGINES
        for precision in PRECISIONS
    }
    ours = {
        name: functools.partial(extractor.transform, paths)
        for name, extractor in extractors.items()
    }
    parts = {name: make_parts(extractor, paths) for name, extractor in extractors.items()}
    forwards = {f"forward of {name}": forward for name, (forward, _) in parts.items()}
    prepares = {f"preparation for {name}": prepare for name, (_, prepare) in parts.items()}
    seconds = measure_in_turns(peers | ours | forwards | prepares, repeats)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    fastest = min(peers, key=medians.__getitem__)

    print(f"\n{task}, {len(paths)} images, median of {repeats} rounds")
    print("| | images/s | x the fastest peer (range) | forward alone | of the bound |")
    print("|---|---:|---:|---:|---:|")
    for name in (*peers, *ours):
        ratios = [peer / own for peer, own in zip(seconds[fastest], seconds[name], strict=True)]
        cells = [
            name,
            f"{len(paths) / medians[name]:.1f}",
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
        ]
        if name in ours:
            alone = medians[f"forward of {name}"]
            bound = alone + medians[f"preparation for {name}"]
            cells += [f"{len(paths) / alone:.1f}", f"{bound / medians[name]:.2f}"]
        print(f"| {' | '.join(cells)} |", flush=True)
    return {name: len(paths) / medians[name] for name in (fastest, *ours)}


def draw(rates: dict[str, dict[str, float]], path: str) -> None:
    """Draw images per second as multiples of the fastest peer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, ax = plt.subplots(figsize=(8, 4.2), layout="constrained")
    labels = [f"{engine}, {precision}" for engine in ENGINES for precision in PRECISIONS]
    colours = ["#9ecae1", "#3182bd", "#fdae6b", "#e6550d"]
    width = 0.8 / len(labels)
    for number, (label, colour) in enumerate(zip(labels, colours, strict=True)):
        heights = [
            found[f"deepfeat, {label}"] / next(iter(found.values())) for found in rates.values()
        ]
        places = np.arange(len(rates)) + (number - (len(labels) - 1) / 2) * width
        bars = ax.bar(places, heights, width, label=f"deepfeat, {label}", color=colour)
        ax.bar_label(bars, fmt="%.1f", padding=2, fontsize=8)
    ax.axhline(1, color="black", linewidth=1)
    ax.set_xticks(range(len(rates)), [title.replace(", ", ",\n") for title in rates])
    ax.set_ylabel("Throughput, fastest peer = 1")
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, loc="upper left")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="only check that it runs")
    parser.add_argument("--plot", help="a file for the plot")
    arguments = parser.parse_args()
    tasks = SMOKE if arguments.smoke else TASKS
    repeats = 1 if arguments.smoke else REPEATS
    print(
        f"Throughput on {torch.get_num_threads()} threads of a CPU with "
        f"{torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}, random weights.\n"
        f"JPEGs of {SIZE[0]} x {SIZE[1]} pixels, half of them grey, or photographs of "
        f"{PHOTOGRAPH[0]} x {PHOTOGRAPH[1]}; batches of {BATCH}."
    )
    rates = {}
    with tempfile.TemporaryDirectory() as folder:
        pictures = write_pictures(Path(folder), max(task.n_images for task in tasks))
        large = max((task.n_images for task in tasks if task.photographs), default=0)
        photographs = write_photographs(Path(folder), large)
        for task in tasks:
            paths = photographs if task.photographs else pictures
            rates[str(task)] = compare(task, paths[: task.n_images], repeats)
    if arguments.plot:
        draw(rates, arguments.plot)


if __name__ == "__main__":
    main()
