"""Training throughput of `FineTuneClassifier` against a bare torch loop, and cached activations."""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from _pictures import SIZE, write_pictures
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision import models

from deepfeat import FineTuneClassifier

REPEATS = 3
BATCH = 32
EPOCHS = 4
TARGET_FOR_BARE, TARGET_FOR_CACHED = 0.95, 2.5


def make_classifier(backbone: str, image_size: int | None, epochs: int) -> FineTuneClassifier:
    return FineTuneClassifier(
        backbone,
        weights=None,
        unfreeze="layer4",
        max_epochs=epochs,
        head_epochs=0,
        batch_size=BATCH,
        augment=None,
        schedule="constant",
        image_size=image_size,
        random_state=0,
    )


def make_bare(backbone: str) -> nn.Module:
    """Freeze a network by hand as the classifier does: everything but layer4 and the head."""
    torch.manual_seed(0)
    net = models.get_model(backbone, weights=None).eval().to(memory_format=torch.channels_last)
    net.fc = nn.Linear(net.fc.in_features, 2)
    net.requires_grad_(False)
    net.layer4.requires_grad_(True).train()
    net.fc.requires_grad_(True).train()
    return net


def run_bare(net: nn.Module, tensors: Tensor, targets: Tensor) -> None:
    """Train one epoch on tensors in memory."""
    groups = [
        {"params": list(net.fc.parameters()), "lr": 1e-3},
        {"params": list(net.layer4.parameters()), "lr": 1e-4},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=1e-4)
    for batch, labels in zip(tensors.split(BATCH), targets.split(BATCH), strict=True):
        optimizer.zero_grad()
        F.cross_entropy(net(batch), labels).backward()
        optimizer.step()


def compare(backbone: str, paths: list[str], image_size: int | None, repeats: int) -> None:
    labels = np.arange(len(paths)) % 2
    preset = models.get_model_weights(backbone)["DEFAULT"].transforms()
    if image_size is not None:
        preset.crop_size, preset.resize_size = [image_size], [image_size]
    images = []
    for path in paths:
        with Image.open(path) as image:
            images.append(preset(image.convert("RGB")))
    tensors = torch.stack(images).contiguous(memory_format=torch.channels_last)
    targets = torch.from_numpy(labels)
    net = make_bare(backbone)

    bare, ours, first, cached = [], [], [], []
    for _ in range(repeats):
        start = time.perf_counter()
        run_bare(net, tensors, targets)
        bare.append(time.perf_counter() - start)
        single = make_classifier(backbone, image_size, 1).fit(paths, labels)
        ours.append(single.history_[0]["seconds"])
        several = make_classifier(backbone, image_size, EPOCHS).fit(paths, labels)
        first.append(several.history_[0]["seconds"])
        cached += [epoch["seconds"] for epoch in several.history_[1:]]

    count = len(paths)
    ratio = statistics.median(other / own for other, own in zip(bare, ours, strict=True))
    gain = statistics.median(ours) / statistics.median(cached)
    print(f"\n{backbone}, layer4 and head trained, {count} images, median of {repeats} rounds")
    print(f"  bare torch loop, tensors         {count / statistics.median(bare):7.1f} images/s")
    print(
        f"  fit(paths), one epoch            {count / statistics.median(ours):7.1f} images/s: "
        f"{ratio:.2f} x the bare loop's throughput, target {TARGET_FOR_BARE}"
    )
    rate = count / statistics.median(first)
    print(f"  first of {EPOCHS} epochs                {rate:7.1f} images/s")
    print(
        f"  later epochs, cached activations {count / statistics.median(cached):7.1f} images/s: "
        f"{gain:.2f} x as fast as an epoch without, target {TARGET_FOR_CACHED}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="only check that it runs")
    smoke = parser.parse_known_args()[0].smoke
    print(
        f"Training on {torch.get_num_threads()} threads of the CPU, torch {torch.__version__}, "
        f"float32, AdamW, batches of {BATCH}, no augmentation.\n"
        f"fit reads JPEGs of {SIZE[0]} x {SIZE[1]} pixels; the bare loop gets float tensors "
        "in memory, channels last."
    )
    with tempfile.TemporaryDirectory() as folder:
        paths = write_pictures(Path(folder), 8 if smoke else 96)
        for backbone in ("resnet18",) if smoke else ("resnet18", "resnet50"):
            compare(backbone, paths, 32 if smoke else None, 1 if smoke else REPEATS)


if __name__ == "__main__":
    main()
