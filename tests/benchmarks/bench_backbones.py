"""A table of backbones: size, cost, features and throughput on this machine, as markdown.

Weights are random, so nothing is downloaded. The size of the download is computed: 4 bytes for each
parameter of the network. The throughput is that of one core, from the processor time of the
process, which depends less on other processes than the time that passes. With names of backbones as
arguments, the table has these alone.
"""

import argparse
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from _pictures import SIZE, write_pictures

from deepfeat import DeepFeatureExtractor, list_backbones, list_layers

REPEATS = 5
MULTIPLY_ADDS = 50e9  # of one run, which sets its number of images
FEWEST, MOST = 1, 32


@dataclass(frozen=True)
class Entry:
    """A backbone, and what its name does not tell: the data, and the year of the paper."""

    backbone: str
    trained_on: str
    year: int
    image_size: int | None = None


IMAGENET = "ImageNet"
ENTRIES = (
    Entry("resnet10_slim", "drawings and 17 photographs", 2026),
    Entry("mobilenet_v2", IMAGENET, 2018),
    Entry("efficientnet_b0", IMAGENET, 2019),
    Entry("resnet50", IMAGENET, 2015),
    Entry("timm/resnet50.a1_in1k", IMAGENET, 2021),
    Entry("convnext_tiny", IMAGENET, 2022),
    Entry("timm/convnextv2_tiny.fcmae_ft_in22k_in1k", "ImageNet-22k, then ImageNet", 2023),
    Entry("timm/convnext_tiny.dinov3_lvd1689m", "LVD-1689M, no labels", 2025),
    Entry("swin_t", IMAGENET, 2021),
    Entry("vit_b_16", IMAGENET, 2020),
    Entry("timm/vit_base_patch16_clip_quickgelu_224.openai", "images with captions", 2021),
    Entry("timm/vit_base_patch16_siglip_224.webli", "WebLI, images with captions", 2023),
    Entry("timm/vit_small_patch16_dinov3.lvd1689m", "LVD-1689M, no labels", 2025),
    Entry("timm/vit_small_patch14_dinov2.lvd142m", "LVD-142M, no labels", 2023, 224),
    Entry("timm/vit_small_patch14_dinov2.lvd142m", "LVD-142M, no labels", 2023),
    Entry("timm/vit_base_patch14_dinov2.lvd142m", "LVD-142M, no labels", 2023, 224),
    Entry("timm/vit_base_patch14_dinov2.lvd142m", "LVD-142M, no labels", 2023),
)
SMOKE = (ENTRIES[0], Entry("timm/test_vit.r160_in1k", IMAGENET, 2024))
HEAD = (
    *("backbone", "trained on", "year", "download, MB", "input", "parameters, M"),
    *("multiply-adds, G", "features", "images/s"),
)


def measure(entry: Entry, paths: list[str], repeats: int) -> tuple[tuple[str, ...], float]:
    """Return the cells of a row, and the rate of the slowest run as a part of the median."""
    layers = list_layers(entry.backbone, image_size=entry.image_size)
    # A smaller input has fewer position embeddings, but they are downloaded.
    parameters = sum(layer.parameters for layer in list_layers(entry.backbone))
    multiply_adds = sum(layer.multiply_adds for layer in layers)
    (penultimate,) = (layer for layer in layers if "penultimate" in (layer.name, *layer.aliases))
    # Without a cache, from which the second call would take all rows.
    extractor = DeepFeatureExtractor(
        entry.backbone, weights=None, image_size=entry.image_size, cache=None, num_workers=0
    )
    side, _ = extractor.preview(paths[:1])[0].size
    some = paths[: int(min(max(MULTIPLY_ADDS / multiply_adds, FEWEST), MOST))]
    assert extractor.transform(some).shape[1] == penultimate.n_features  # and a warm-up
    rates = []
    for _ in range(repeats):
        start = time.process_time()
        extractor.transform(some)
        rates.append(len(some) / (time.process_time() - start))
    rate = statistics.median(rates)
    cells = (
        f"`{entry.backbone}`",
        entry.trained_on,
        str(entry.year),
        "none" if entry is ENTRIES[0] else f"{parameters * 4 / 1e6:,.0f}",
        str(side),
        f"{parameters / 1e6:,.1f}",
        f"{multiply_adds / 1e9:,.2f}",
        f"{penultimate.n_features:,}",
        f"{rate:#.2g}".rstrip(".") if rate < 100 else f"{rate:.0f}",
    )
    return cells, min(rates) / rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="only check that it runs")
    parser.add_argument("backbones", nargs="*", help="by default all in the table")
    arguments = parser.parse_args()
    entries = SMOKE if arguments.smoke else ENTRIES
    if arguments.backbones:
        entries = [entry for entry in ENTRIES if entry.backbone in arguments.backbones]
    unknown = {entry.backbone for entry in entries} - set(list_backbones("*"))
    if unknown:
        raise SystemExit(f"list_backbones() does not have {', '.join(sorted(unknown))}.")
    repeats = 1 if arguments.smoke else REPEATS
    torch.set_num_threads(1)
    print(
        f"One thread of the CPU, torch {torch.__version__}, random weights, float32, JPEGs of "
        f"{SIZE[0]} x {SIZE[1]} pixels from the disk to the penultimate layer, cache=None, "
        f"num_workers=0.\nImages per second of processor time: median of {repeats} runs.\n"
    )
    print(f"| {' | '.join(HEAD)} |")
    print(f"|{'---|' * 3}{'---:|' * (len(HEAD) - 3)}")
    with tempfile.TemporaryDirectory() as folder:
        paths = write_pictures(Path(folder), MOST)
        slowest = 1.0
        for entry in entries:
            cells, part = measure(entry, paths, repeats)
            slowest = min(slowest, part)
            print(f"| {' | '.join(cells)} |", flush=True)
    print(f"\nThe slowest run of a backbone reached {slowest:.0%} of its median or more.")


if __name__ == "__main__":
    main()
