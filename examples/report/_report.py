"""Knows what the scripts of the report share: arguments, images, layers, and tables in files."""

import argparse
import csv
import functools
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from sklearn.datasets import load_sample_images
from sklearn.feature_extraction.image import extract_patches_2d
from sklearn.utils import Bunch

from deepfeat import list_layers
from deepfeat.datasets._folders import load_image_folder
from deepfeat.datasets._scene15 import fetch_scene15, load_scene15

BUNDLED = "resnet10_slim"  # its weights come with deepfeat
QUICK_PER_CLASS = 10
QUICK_SIZE = 96


def parse_arguments(description, *, backbones, quick_backbones=(BUNDLED,)):
    """Read the arguments that all scripts of the report take."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument(
        "--data",
        metavar="DIR",
        help="folder of 15-Scene; without it 15-Scene is downloaded. With --quick any folder of "
        "class folders; without it, patches of the two photographs that come with scikit-learn",
    )
    parser.add_argument(
        "--split",
        choices=["fixed", "random"],
        help="the split that comes with the images (the default with --data), or one drawn with "
        "seed 0",
    )
    parser.add_argument("--backbones", nargs="+", metavar="NAME")
    parser.add_argument(
        "--weights",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME=PATH",
        help="files of weights; other backbones take torchvision's, which are downloaded",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a few small images, and random weights where none are given: a try of the script, "
        "whose figures mean nothing",
    )
    parser.add_argument("--out", type=Path, default=Path("report"), metavar="DIR")
    args = parser.parse_args()
    args.backbones = args.backbones or list(quick_backbones if args.quick else backbones)
    unclear = [entry for entry in args.weights if not all(entry.partition("="))]
    if unclear:
        parser.error(f"--weights {unclear[0]}: NAME=PATH is expected")
    args.weights = dict(entry.split("=", 1) for entry in args.weights)
    unused = sorted(set(args.weights) - set(args.backbones))
    if unused:
        parser.error(f"--weights of {', '.join(unused)}, which --backbones does not name")
    args.out.mkdir(parents=True, exist_ok=True)
    return args


def load_images(args):
    """Load images with a split: 15-Scene, or a few of anything."""
    if args.quick:
        images = load_few(args.data)
        name = "--quick, the figures mean nothing"
    elif args.data is None:
        images = fetch_scene15(split=args.split or "random", random_state=0)
        name = f"15-Scene, {args.split or 'random'} split"
    else:
        split = args.split or "fixed"
        images = load_scene15(args.data, split=split, random_state=0)
        name = f"15-Scene, {split} split"
    print(f"{name}: {len(images.train)} images to train on, {len(images.test)} to test on")
    return images


def load_few(data):
    """Load a few images of each class, one half to train on."""
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
    images.train = np.concatenate([places[::2] for places in few])
    images.test = np.concatenate([places[1::2] for places in few])
    return images


def choose_network(args, backbone):
    """Choose weights and input size, as arguments of an estimator of deepfeat."""
    known = "DEFAULT" if backbone == BUNDLED or not args.quick else None
    weights = args.weights.get(backbone, known)
    return {
        "backbone": backbone,
        "weights": weights,
        "image_size": QUICK_SIZE if args.quick else None,
    }


def find_penultimate(backbone):
    """Name the last layer before the scores of the classes: relu7 of VGG16, avgpool of ResNet."""
    layers = list_layers(backbone)
    scores = layers[-1].output_shape[0]
    return [layer.name for layer in layers if layer.output_shape[0] != scores][-1]


def make_row(names, accuracy, reported):
    """Make a row of a table from its first columns, the accuracy and the report's in percent."""
    return names | {
        "accuracy %": "" if accuracy is None else f"{100 * accuracy:.2f}",
        "report %": "" if reported is None else f"{reported:.2f}",
    }


def write_table(rows, path):
    """Print rows (dicts of the same keys) as a table, and write them to a CSV file."""
    columns = list(rows[0])
    cells = [columns, *([str(row[column]) for column in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    print()
    for line in cells:
        print("  ".join(map(str.ljust, line, widths)).rstrip())
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(cells)


def save_figure(figure, path):
    figure.savefig(path, dpi=150)
    print(f"wrote {path}")


def draw_rows(rows, title):
    """Draw a bar for the accuracy of each row, and a mark at the report's; return the figure."""
    figure, axes = plt.subplots(figsize=(8, 1.4 + 0.35 * len(rows)), layout="constrained")
    for column, draw in (
        (
            "accuracy %",
            functools.partial(axes.barh, height=0.6, color="lightsteelblue", label="here"),
        ),
        ("report %", functools.partial(_mark, axes)),
    ):
        known = [place for place, row in enumerate(rows) if row[column]]
        if known:
            draw(known, [float(rows[place][column]) for place in known])
    for place, row in enumerate(rows):
        if row["accuracy %"]:
            axes.text(1, place, row["accuracy %"], va="center")
    names = [
        ", ".join(str(value) for column, value in row.items() if not column.endswith("%") and value)
        for row in rows
    ]
    axes.set_yticks(range(len(rows)), names)
    axes.invert_yaxis()
    axes.set(xlim=(0, 100), xlabel="accuracy in %", title=title)
    figure.legend(loc="outside right upper")
    return figure


def _mark(axes, places, values):
    axes.plot(values, places, "D", color="black", label="report")
