"""Shared parts of the report scripts: arguments, images, networks, tables and figures."""

import argparse
import csv
import math
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_sample_images
from sklearn.feature_extraction.image import extract_patches_2d
from sklearn.utils import Bunch

from deepfeat import list_layers
from deepfeat.datasets import fetch_scene15, load_image_folder, load_scene15

BUNDLED = "resnet10_slim"  # its weights come with deepfeat
QUICK_PER_CLASS = 10
QUICK_SIZE = 96
QUICK_NOTE = "quick trial: the results are meaningless"

# Columns of accuracies, and how figures name and draw them.
STYLES = {
    "accuracy %": {"label": "● here", "marker": "o", "color": "#0072B2"},
    "report %": {"label": "◆ report", "marker": "D", "color": "#D55E00"},
}


def parse_arguments(description, *, backbones, quick_backbones=(BUNDLED,)):
    """Parse the arguments that all report scripts share."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--data",
        metavar="DIR",
        help="folder of 15-Scene, which is downloaded by default; with --quick, any folder with "
        "one folder per class, by default patches of scikit-learn's two photographs",
    )
    parser.add_argument(
        "--split",
        choices=["fixed", "random"],
        help="the split that comes with the images (the default with --data), or a random one with "
        "seed 0",
    )
    parser.add_argument("--backbones", nargs="+", metavar="NAME")
    parser.add_argument(
        "--weights",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=PATH",
        help="files of weights; for other backbones, torchvision's weights are downloaded",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="try the script on a few small images, with random weights unless some are given; the "
        "results are meaningless, which the figures and the names of the files say",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="folder for tables and figures, by default report, or report-quick with --quick",
    )
    args = parser.parse_args()
    args.out = args.out or Path("report-quick" if args.quick else "report")
    args.backbones = args.backbones or list(quick_backbones if args.quick else backbones)
    unclear = [entry for entry in args.weights if not all(entry.partition("="))]
    if unclear:
        parser.error(f"--weights must have the form NAME=PATH; got {unclear[0]}.")
    args.weights = dict(entry.split("=", 1) for entry in args.weights)
    unused = sorted(set(args.weights) - set(args.backbones))
    if unused:
        parser.error(f"--weights must name networks in --backbones; got {', '.join(unused)}.")
    args.out.mkdir(parents=True, exist_ok=True)
    return args


def load_images(args):
    """Load images with a split: 15-Scene, or with --quick a few images."""
    if args.quick:
        images = load_few(args.data)
        name = QUICK_NOTE
    elif args.data is None:
        images = fetch_scene15(split=args.split or "random", random_state=0)
        name = f"15-Scene, {args.split or 'random'} split"
    else:
        split = args.split or "fixed"
        images = load_scene15(args.data, split=split, random_state=0)
        name = f"15-Scene, {split} split"
    print(f"{name}: {len(images.train)} training and {len(images.test)} test images")
    return images


def load_few(data):
    """Load a few images per class, half of them for training."""
    if data is None:
        images = Bunch(
            data=np.concatenate(
                [
                    extract_patches_2d(photograph, (96, 96), max_patches=20, random_state=0)
                    for photograph in load_sample_images().images
                ]
            ),
            target=np.repeat([0, 1], 20),
            target_names=np.array(["palace", "dahlia"]),
        )
    else:
        images = load_image_folder(data)
    few = [
        np.flatnonzero(images.target == label)[:QUICK_PER_CLASS]
        for label in range(len(images.target_names))
    ]
    images.train = np.concatenate([indices[::2] for indices in few])
    images.test = np.concatenate([indices[1::2] for indices in few])
    return images


def choose_network(args, backbone):
    """Choose the network's parameters of an estimator: weights and input size."""
    default = "DEFAULT" if backbone == BUNDLED or not args.quick else None
    return {
        "backbone": backbone,
        "weights": args.weights.get(backbone, default),
        "image_size": QUICK_SIZE if args.quick else None,
    }


def find_penultimate(backbone):
    """Return the last layer before the class scores, such as relu7 of VGG16, avgpool of ResNet."""
    layers = list_layers(backbone)
    scores = layers[-1].output_shape[0]
    return [layer.name for layer in layers if layer.output_shape[0] != scores][-1]


def make_row(names, accuracy, reported):
    """Make a table row of its first columns and, in percent, our accuracy and the report's."""
    return names | {
        "accuracy %": "" if accuracy is None else f"{100 * accuracy:.2f}",
        "report %": "" if reported is None else f"{reported:.2f}",
    }


def write_table(args, rows, file):
    """Print rows (dicts with the same keys) as a table, and write them to a CSV file."""
    columns = list(rows[0])
    cells = [columns, *([str(row[column]) for column in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    print()
    for line in cells:
        print("  ".join(map(str.ljust, line, widths)).rstrip())
    with find_path(args, file).open("w", newline="", encoding="utf-8") as opened:
        csv.writer(opened).writerows(cells)


def save_figure(args, figure, file):
    """Save a figure, with a note above it if it is of a quick trial."""
    if args.quick:
        note = {"color": "white", "backgroundcolor": "firebrick", "weight": "bold"}
        figure.text(0.5, 1.03, QUICK_NOTE, ha="center", va="bottom", **note)
    path = find_path(args, file)
    figure.savefig(path, dpi=150, bbox_inches="tight")
    print(f"wrote {path}")


def find_path(args, file):
    """Return the path of a file to write, whose name says so if it is of a quick trial."""
    path = args.out / file
    return path.with_stem(f"{path.stem}-quick") if args.quick else path


def draw_rows(rows, title):
    """Draw the accuracy of each row, here and in the report, as dots; return the figure."""
    figure, axes = plt.subplots(figsize=(8, 1.4 + 0.3 * len(rows)), layout="constrained")
    drawn = []
    for column, style in STYLES.items():
        known = {i: float(row[column]) for i, row in enumerate(rows) if row[column]}
        axes.plot(known.values(), known.keys(), linestyle="", clip_on=False, zorder=3, **style)
        drawn += known.values()
    names = [
        ", ".join(str(value) for column, value in row.items() if column not in STYLES and value)
        for row in rows
    ]
    axes.set_yticks(range(len(rows)), names)
    axes.set(xlim=find_limits(drawn), ylim=(len(rows) - 0.5, -0.5))
    axes.locator_params(axis="x", nbins=15, steps=[1, 5, 10])
    axes.set(xlabel="accuracy in %", title=title)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    write_beside(axes, rows)
    return figure


def find_limits(accuracies):
    """Return the limits of an axis: 85 to 95 %, and as much more as the accuracies need."""
    return 5 * math.floor(min([85, *accuracies]) / 5), 5 * math.ceil(max([95, *accuracies]) / 5)


def write_beside(axes, rows):
    """Write the accuracies to the right of the axes, in columns whose heads are the legend."""
    for x, (column, style) in zip((1.14, 1.3), STYLES.items(), strict=True):
        for y, text in enumerate([style["label"], *(row[column] for row in rows)], start=-1):
            beside = {"transform": axes.get_yaxis_transform(), "ha": "right", "va": "center"}
            axes.text(x, y, text, color=style["color"], **beside)
