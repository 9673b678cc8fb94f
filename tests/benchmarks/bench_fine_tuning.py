"""Accuracy and CPU minutes of fine-tuning on few and many images, by method.

It needs the images and weights of the folder that DEEPFEAT_DATA names. Training images are drawn
from the training part of 15-Scene's fixed split, and the accuracy is that on its test part; of the
digits of scikit-learn, 75 per class are for testing. CPU minutes are those of `fit`. Without
arguments it prints all cells of a table, with two draws each. One cell alone is, for instance,

    bench_fine_tuning.py --backbone mobilenet_v2 --method default --images 20 --size 96
"""

import argparse
import itertools
import os
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.pipeline import make_pipeline
from sklearn.svm import LinearSVC
from torch import nn
from torchvision import models

from deepfeat import DeepFeatureExtractor, FineTuneClassifier
from deepfeat._finetuning import fitting
from deepfeat.datasets import load_scene15

BACKBONES = ("mobilenet_v2", "squeezenet1_1", "resnet10_slim")
DATASETS = ("scenes", "digits")
COUNTS = (20, 50, 100)
SIZES = (96, 160)
FINE_TUNING = {
    "default": {},
    "head_epochs=0": {"head_epochs": 0},
    "unfreeze=None": {"unfreeze": None},
    "unfreeze='all'": {"unfreeze": "all"},
    "unfreeze='all', cutmix=1": {"unfreeze": "all", "cutmix": 1.0},
    "unfreeze='all', momentum 0.1": {"unfreeze": "all"},  # of BatchNorm, as torch has it
}
METHODS = ("LinearSVC", *FINE_TUNING, "skorch")
LAST_STAGE = {"mobilenet_v2": 14, "squeezenet1_1": 9}  # the first module of it
TEST_DIGITS = 75  # per class


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dataset", nargs="+", choices=DATASETS, default=DATASETS[:1])
    parser.add_argument("--backbone", nargs="+", choices=BACKBONES, default=BACKBONES)
    parser.add_argument("--images", nargs="+", type=int, default=COUNTS, help="per class")
    parser.add_argument("--size", nargs="+", type=int, default=SIZES[:1], help="pixels")
    parser.add_argument("--method", nargs="+", choices=METHODS, default=("LinearSVC", "default"))
    parser.add_argument("--draws", type=int, default=2)
    parser.add_argument("--smoke", action="store_true", help="only check that it runs")
    args, _ = parser.parse_known_args()
    if "DEEPFEAT_DATA" not in os.environ:
        print("DEEPFEAT_DATA does not name a folder of images and weights: nothing is measured.")
        return
    if args.smoke:
        args.backbone, args.images, args.size, args.draws = ["squeezenet1_1"], [2], [64], 1
        args.method = METHODS
    cells = itertools.product(args.dataset, args.backbone, args.size, args.images, args.method)
    print("| images | backbone | pixels | per class | method | accuracy | CPU minutes |")
    print("|---|---|---:|---:|---|---:|---:|")
    for dataset, backbone, size, count, method in cells:
        runs = [
            measure(method, backbone, size, *load(dataset, count, seed, args.smoke), seed)
            for seed in range(args.draws)
        ]
        accuracy, minutes = np.mean(runs, axis=0)
        figures = f"{100 * accuracy:.1f} % | {minutes:.2f}"
        print(f"| {dataset} | {backbone} | {size} | {count} | {method} | {figures} |", flush=True)


def load(dataset, count, seed, smoke):
    """Return images and labels for training, then those for testing."""
    if dataset == "digits":
        data, target = load_digits(return_X_y=True)
        data = (255 / 16 * data).astype(np.uint8).reshape(-1, 8, 8)
        order = np.random.default_rng(0).permutation(len(target))
        test = np.concatenate([order[target[order] == k][:TEST_DIGITS] for k in range(10)])
        pool = np.setdiff1d(order, test)
    else:
        scenes = load_scene15(Path(os.environ["DEEPFEAT_DATA"], "scene15"))
        data, target, pool, test = scenes.data, scenes.target, scenes.train, scenes.test
    rng = np.random.default_rng(seed)
    labels = np.unique(target)
    drawn = [rng.permutation(pool[target[pool] == label])[:count] for label in labels]
    train, test = np.concatenate(drawn), test[:: 50 if smoke else 1]
    return data[train], target[train], data[test], target[test]


def measure(method, backbone, size, X, y, X_test, y_test, seed):
    """Return the accuracy and the CPU minutes of `fit`."""
    if method == "skorch":
        estimator = make_skorch(backbone, seed, len(np.unique(y)))
        X, X_test = Photos(backbone, size, X, y), Photos(backbone, size, X_test)
        y = None  # which the dataset has
    else:
        estimator = make_estimator(method, backbone, size, seed)
    at_most = fitting._MOMENTUM
    if method.endswith("momentum 0.1"):
        fitting._MOMENTUM = 0.1
    start = time.process_time()
    estimator.fit(X, y)
    minutes = (time.process_time() - start) / 60
    fitting._MOMENTUM = at_most
    return (estimator.predict(X_test) == y_test).mean(), minutes


def make_estimator(method, backbone, size, seed):
    options = {"image_size": size, "device": "cpu"}
    if backbone != "resnet10_slim":  # whose weights come with the package
        options["weights"] = find_weights(backbone)
    if method == "LinearSVC":
        extractor = DeepFeatureExtractor(backbone, cache=None, **options)
        return make_pipeline(extractor, LinearSVC(random_state=seed))
    return FineTuneClassifier(backbone, random_state=seed, **options, **FINE_TUNING[method])


def find_weights(backbone):
    return Path(os.environ["DEEPFEAT_DATA"], "weights", f"{backbone}.pth")


def make_skorch(backbone, seed, n_classes):
    """Make a classifier of skorch that trains the same layers with the same optimizer.

    It runs the whole network in every epoch, and has no epochs for the head alone.
    """
    from skorch import NeuralNetClassifier
    from skorch.callbacks import LRScheduler

    ours = FineTuneClassifier()
    torch.manual_seed(seed)
    network = models.get_model(backbone)
    network.load_state_dict(torch.load(find_weights(backbone)))
    network.features[: LAST_STAGE[backbone]].requires_grad_(False)
    if backbone == "mobilenet_v2":
        network.classifier[1] = nn.Linear(network.last_channel, n_classes)
    else:
        network.classifier[1] = nn.Conv2d(512, n_classes, 1)
    return NeuralNetClassifier(
        network,
        criterion=nn.CrossEntropyLoss,
        optimizer=torch.optim.AdamW,
        optimizer__weight_decay=ours.weight_decay,
        optimizer__param_groups=[("classifier.*", {"lr": ours.learning_rate})],
        lr=ours.backbone_learning_rate,
        max_epochs=ours.max_epochs,
        batch_size=ours.batch_size,
        iterator_train__shuffle=True,
        train_split=None,
        callbacks=[LRScheduler("CosineAnnealingLR", T_max=ours.max_epochs)],
        verbose=0,
    )


class Photos(torch.utils.data.Dataset):
    """Images as a loop of torch prepares them; a random half of those with labels is mirrored."""

    def __init__(self, backbone, size, paths, labels=None):
        self.paths, self.labels = paths, labels
        self.prepare = models.get_model_weights(backbone)["DEFAULT"].transforms(
            crop_size=size, resize_size=round(size * 256 / 224)
        )

    def __len__(self):
        return len(self.paths)

    def __getitem__(self, index):
        with Image.open(self.paths[index]) as image:
            tensor = self.prepare(image.convert("RGB"))
        if self.labels is None:
            return tensor, 0
        return (tensor.flip(2) if torch.rand(()) < 0.5 else tensor), int(self.labels[index])


if __name__ == "__main__":
    main()
