"""
A linear probe of many backbones
================================

Which backbone, layer and pooling suit your images? A logistic regression on frozen features tells,
for a folder of images with one folder per class, and prints a table::

    python examples/probe.py resnet50 timm/vit_small_patch14_dinov2.lvd142m --data photos

The choices are those of DINOv2's own evaluation (Oquab et al., 2023): of a transformer the class
token of the last block or of the last four, with and without the mean of the patches, scaled to
unit length. C is searched from 0.01 to 10,000; DINOv2's range is wider. Of a convolutional network,
the last layer with maps, or the last two stages, with their means, their maxima or both. C is
chosen by cross-validation on three quarters of the images; the others test the best candidate of
each backbone. Each image goes through a network once or twice, whatever the number of candidates;
with many images, fitting the regressions takes longer (five minutes for 900 photographs, 15 classes
and two networks on two cores), and ``--jobs`` with a folder as ``--cache`` shares the work.

Without arguments, the script tries itself on a few small photographs and the network that comes
with deepfeat.
"""

import argparse
import tempfile

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, train_test_split
from sklearn.pipeline import make_pipeline

from deepfeat import DeepFeatureExtractor, list_layers
from deepfeat.datasets import load_image_folder, write_sample_folder

BLOCKS = 4  # the class tokens of how many blocks are concatenated


def parse_arguments():
    parser = argparse.ArgumentParser(
        description="Compare backbones, layers and poolings on a folder of images."
    )
    parser.add_argument("backbones", nargs="*", default=["resnet10_slim"], metavar="BACKBONE")
    parser.add_argument("--data", metavar="FOLDER", help="folder with one folder per class")
    parser.add_argument(
        "--weights",
        nargs="+",
        action="extend",
        default=[],
        metavar="BACKBONE=WEIGHTS",
        help="a tag, the path of a .pth or .safetensors file, or 'random'",
    )
    parser.add_argument("--image-size", type=int, help="by default that of the weights")
    parser.add_argument("--cs", type=int, default=7, help="number of values of C")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=1, help="processes, with a folder as --cache")
    parser.add_argument("--cache", default="memory", help="a folder keeps the features")
    args = parser.parse_args()
    args.backbones = list(dict.fromkeys(args.backbones))  # each once
    unclear = [entry for entry in args.weights if not all(entry.partition("="))]
    if unclear:
        parser.error(f"--weights must have the form BACKBONE=WEIGHTS; got {unclear[0]}.")
    args.weights = dict(entry.split("=", 1) for entry in args.weights)
    unused = sorted(set(args.weights) - set(args.backbones))
    if unused:
        parser.error(f"--weights must name backbones of the comparison; got {', '.join(unused)}.")
    return args


def load_images(folder):
    """Return the images of a folder with the names of their classes."""
    photos = load_image_folder(folder)
    return photos.data, photos.target_names[photos.target]


def find_choices(extractor, images):
    """Return the layers and the poolings to compare."""
    layers = [
        layer
        for layer in list_layers(extractor.backbone, image_size=extractor.image_size)
        if np.prod(layer.output_shape[1:]) > 1
    ]
    last = layers[-1].name
    if len(layers[-1].output_shape) == 3:
        stages = [layer for layer in layers if any("stage" in name for name in layer.aliases)]
        return [last, [layer.name for layer in stages[-2:]]], ["avg", "max", ["avg", "max"]]
    # The tokens may be normalised after the last block, which is then read in this form.
    kind = layers[-1].kind if "Norm" not in layers[-1].kind else layers[-2].kind
    blocks = [layer.name for layer in layers if layer.kind == kind][-BLOCKS:]
    try:
        extractor.set_params(layer=last, pooling="cls").fit(images[:1])
    except ValueError as error:
        if "class token" not in str(error):
            raise
        return [last, blocks], ["avg"]
    return [last, blocks], ["cls", ["cls", "avg"]]


def probe(backbone, args, split):
    """Return a row of the table for each layer and pooling; print the best candidate's test."""
    train, test, y_train, y_test = split
    weights = args.weights.get(backbone, "DEFAULT")
    extractor = DeepFeatureExtractor(
        backbone,
        weights=None if weights == "random" else weights,
        image_size=args.image_size,
        cache=args.cache,
    )
    layers, poolings = find_choices(extractor, train)
    cs = np.logspace(-2, 4, args.cs).tolist()
    search = GridSearchCV(
        make_pipeline(extractor, LogisticRegression(max_iter=1000)),
        {
            "deepfeatureextractor__layer": layers,
            "deepfeatureextractor__pooling": poolings,
            "logisticregression__C": cs,
        },
        cv=args.folds,
        n_jobs=args.jobs,
    )
    print(f"{backbone}: {len(layers) * len(poolings) * len(cs)} candidates", flush=True)
    search.fit(train, y_train)
    rows = {}
    for params, score in zip(
        search.cv_results_["params"], search.cv_results_["mean_test_score"], strict=True
    ):
        layer, pooling = (
            " + ".join(np.ravel(params[f"deepfeatureextractor__{name}"]))
            for name in ("layer", "pooling")
        )
        row = (score, backbone, layer, pooling, params["logisticregression__C"])
        key = layer, pooling
        rows[key] = max(rows.get(key, row), row, key=lambda row: row[0])
    accuracy = search.score(test, y_test)
    print(f"{backbone}: accuracy of the best one on the test images {accuracy:.1%}", flush=True)
    return list(rows.values())


args = parse_arguments()
with tempfile.TemporaryDirectory() as samples:
    images, labels = load_images(args.data or write_sample_folder(samples))
    split = train_test_split(images, labels, test_size=0.25, stratify=labels, random_state=0)
    print(f"{len(split[0])} training and {len(split[1])} test images of {len(set(labels))} classes")
    rows = [row for backbone in args.backbones for row in probe(backbone, args, split)]

titles = ("backbone", "layer", "pooling")
lines = [(*titles, "C", f"accuracy in {args.folds} folds")]
for score, *names, c in sorted(rows, reverse=True):
    lines.append((*names, f"{c:.3g}", f"{score:.1%}"))
widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
print()
for line in lines:
    print("  ".join(map(str.ljust, line, widths)).rstrip())
