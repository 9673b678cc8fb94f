"""Throughput of `transform(paths)` against the bare network and a plain torchvision loop."""

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from _pictures import SIZE, write_pictures
from PIL import Image
from sklearn.preprocessing import normalize
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import models
from torchvision.models.feature_extraction import create_feature_extractor

from deepfeat import DeepFeatureExtractor

REPEATS = 3
LOOP_BATCH = 32
LOOP_WORKERS = (0, 2)
BARE_BATCHES = (4, 8, 16, 32)  # compared with the best of these and the last
TARGET_FOR_BARE, TARGET_FOR_LOOP = 0.95, 1.4


@dataclass(frozen=True)
class Task:
    backbone: str
    layer: str
    node: str  # of torchvision's `create_feature_extractor`
    n_images: int  # a multiple of 32


TASKS = (Task("vgg16", "relu7", "classifier.4", 32), Task("resnet50", "avgpool", "avgpool", 96))
SMOKE = (Task("squeezenet1_1", "stage2", "features.4", 4),)


class Pictures(Dataset):
    """The files and the preprocessing of a plain loop."""

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
    with torch.no_grad():
        for batch in DataLoader(pictures, LOOP_BATCH, num_workers=num_workers):
            output = net(batch)["output"]
            rows.append((output if output.ndim == 2 else output.mean((2, 3))).numpy())
    return normalize(np.concatenate(rows))


def run_bare(net: nn.Module, tensors: Tensor, batch_size: int) -> None:
    """Run the whole network over tensors in memory, and keep nothing."""
    with torch.inference_mode():
        for batch in tensors.split(batch_size):
            net(batch)


def measure_in_turns(
    tasks: dict[str, Callable[[], object]], repeats: int
) -> dict[str, list[float]]:
    """Return the seconds of each task; tasks alternate, so that conditions are equal."""
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for _ in range(repeats):
        for name, task in tasks.items():
            start = time.perf_counter()
            task()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def compare(task: Task, paths: list[str], repeats: int) -> None:
    torch.manual_seed(0)
    net = models.get_model(task.backbone, weights=None).eval()
    loop_net = create_feature_extractor(net, {task.node: "output"})
    bare_net = copy.deepcopy(net).to(memory_format=torch.channels_last)
    preprocess = models.get_model_weights(task.backbone)["DEFAULT"].transforms()
    pictures = Pictures(paths[: task.n_images], preprocess)
    tensors = torch.stack(list(pictures)).contiguous(memory_format=torch.channels_last)
    # Without a cache, from which the second call would take all rows.
    extractor = DeepFeatureExtractor(task.backbone, task.layer, weights=None, cache=None)

    # This is a warm-up, and a check that both compute the same features.
    rows = run_loop(loop_net, pictures, 0)
    np.testing.assert_allclose(extractor.transform(pictures.paths), rows, rtol=1e-2, atol=1e-4)

    few = tensors[:32]
    bare = {size: lambda size=size: run_bare(bare_net, few, size) for size in BARE_BATCHES}
    searched = measure_in_turns(bare, repeats)
    best = min(BARE_BATCHES, key=lambda size: statistics.median(searched[size]))

    rivals = {
        f"bare forward, batch {size}": lambda size=size: run_bare(bare_net, tensors, size)
        for size in sorted({best, BARE_BATCHES[-1]})
    }
    rivals |= {
        f"torchvision loop, {count} workers": lambda count=count: run_loop(
            loop_net, pictures, count
        )
        for count in LOOP_WORKERS
    }
    ours = {"transform(paths)": lambda: extractor.transform(pictures.paths)}
    seconds = measure_in_turns(ours | rivals, repeats)

    print(f"\n{task.backbone}, {task.layer}: {task.n_images} images, median of {repeats} rounds")
    (mine,) = (seconds[name] for name in ours)
    print(f"  {'transform(paths)':28} {task.n_images / statistics.median(mine):7.1f} images/s")
    for name in rivals:
        ratio = statistics.median(
            other / own for other, own in zip(seconds[name], mine, strict=True)
        )
        target = TARGET_FOR_BARE if name.startswith("bare") else TARGET_FOR_LOOP
        note = " (its best)" if name == f"bare forward, batch {best}" else ""
        rate = task.n_images / statistics.median(seconds[name])
        print(
            f"  {name:28} {rate:7.1f} images/s; "
            f"transform has {ratio:.2f} x its throughput, target {target}{note}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="only check that it runs")
    smoke = parser.parse_known_args()[0].smoke
    tasks = SMOKE if smoke else TASKS
    print(
        f"Throughput on {torch.get_num_threads()} threads of the CPU, torch {torch.__version__}, "
        f"random weights, default parameters except for cache=None.\n"
        f"transform and loop read JPEGs of {SIZE[0]} x {SIZE[1]} pixels, half of them grey, and "
        "resize them as the weights require;\nthe bare forward gets float tensors in memory, "
        f"channels last; the loop has batches of {LOOP_BATCH}, channels first."
    )
    with tempfile.TemporaryDirectory() as folder:
        paths = write_pictures(Path(folder), max(task.n_images for task in tasks))
        for task in tasks:
            compare(task, paths, 1 if smoke else REPEATS)


if __name__ == "__main__":
    main()
