"""
A linear probe of any backbone
==============================

A linear classifier on frozen features, for a folder of images with one folder per class. A grid
searches over poolings and over C, with cross-validation on three quarters of the images; the others
test the best candidate. For DINOv2, the poolings are those of its own linear probe with one layer:
the class token, with and without the mean of the patches. Each image goes through the network once,
whatever the number of candidates::

    python examples/linear_probe.py timm/vit_small_patch14_dinov2.lvd142m --data photos

Without arguments, the script tries itself on 300 digits and the network that comes with deepfeat.
"""

import argparse

import numpy as np
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from deepfeat import DeepFeatureExtractor, list_layers
from deepfeat.datasets import load_image_folder

CS = np.logspace(-4, 2, 7).tolist()
POOLINGS = ["avg", "max", ["avg", "max"]]
POOLINGS_OF_TOKENS = ["cls", "avg", ["cls", "avg"]]


def parse_arguments():
    parser = argparse.ArgumentParser(description="Compare poolings of a backbone on a folder.")
    parser.add_argument("backbone", nargs="?", default="resnet10_slim", metavar="BACKBONE")
    parser.add_argument("--data", metavar="FOLDER", help="folder with one folder per class")
    parser.add_argument(
        "--weights",
        default="DEFAULT",
        help="a tag, the path of a .pth or .safetensors file, or 'random'",
    )
    parser.add_argument("--layer", help="by default the last one with maps or tokens")
    parser.add_argument("--image-size", type=int, help="by default that of the weights")
    parser.add_argument("--folds", type=int, default=5)
    parser.add_argument("--cache", default="memory", help="a folder keeps the features")
    return parser.parse_args()


def load_images(folder):
    """Return the images of a folder with their labels, or digits."""
    if folder is None:
        digits = load_digits()
        return list(digits.images[:300] / 16), digits.target[:300]
    photos = load_image_folder(folder)
    return photos.data, photos.target


def find_layer(backbone, image_size):
    """Return the last layer with maps of several positions, or with tokens."""
    layers = list_layers(backbone, image_size=image_size)
    return [
        layer.name
        for layer in layers
        if len(layer.output_shape) == 2 or np.prod(layer.output_shape[1:]) > 1
    ][-1]


def find_poolings(extractor, images):
    """Return the poolings to compare: with the class token, if the layer has one."""
    extractor.set_params(pooling="avg").fit(images)
    try:
        extractor.set_params(pooling="cls").fit(images)
    except ValueError:
        return POOLINGS
    return POOLINGS_OF_TOKENS


def print_table(results):
    """Print the mean accuracy of each pooling and C, in percent."""
    poolings = [str(params["deepfeatureextractor__pooling"]) for params in results["params"]]
    scores = dict(zip(poolings, [{} for _ in poolings], strict=True))
    for pooling, params, score in zip(
        poolings, results["params"], results["mean_test_score"], strict=True
    ):
        scores[pooling][params["logisticregression__C"]] = score
    print(f"{'pooling':16}" + "".join(f"{f'C={c:g}':>10}" for c in CS))
    for pooling, row in scores.items():
        print(f"{pooling:16}" + "".join(f"{row[c]:10.1%}" for c in CS))


args = parse_arguments()
images, labels = load_images(args.data)
train, test, y_train, y_test = train_test_split(
    images, labels, test_size=0.25, stratify=labels, random_state=0
)
layer = args.layer or find_layer(args.backbone, args.image_size)
extractor = DeepFeatureExtractor(
    args.backbone,
    layer,
    weights=None if args.weights == "random" else args.weights,
    image_size=args.image_size,
    norm=None,
    cache=args.cache,
)
grid = {
    "deepfeatureextractor__pooling": find_poolings(extractor, train[:1]),
    "logisticregression__C": CS,
}
search = GridSearchCV(
    make_pipeline(extractor, StandardScaler(), LogisticRegression(max_iter=1000)),
    grid,
    cv=args.folds,
)
search.fit(train, y_train)

print(f"{args.backbone}, {layer}: {len(train)} images, accuracy in {args.folds} folds")
print_table(search.cv_results_)
best = search.best_params_
print(
    f"best: pooling={best['deepfeatureextractor__pooling']}, C={best['logisticregression__C']:g}; "
    f"accuracy on the other {len(test)} images {search.score(test, y_test):.1%}"
)
