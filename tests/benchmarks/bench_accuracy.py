"""Accuracy of a linear SVM on 15-Scene by engine and precision, and how close the features are.

It needs the images and weights of the folder that DEEPFEAT_DATA names. In the second column of
accuracies the SVM is the one that was trained on the features of torch in float32.
"""

import argparse
import os
from pathlib import Path

import numpy as np
from sklearn.svm import LinearSVC

from deepfeat import DeepFeatureExtractor
from deepfeat.datasets import load_scene15

BACKBONES = ("mobilenet_v2", "squeezenet1_1")
ENGINES = ("torch", "openvino")
PRECISIONS = ("float32", "bfloat16")


def compare(backbone: str, data: Path, step: int) -> None:
    scenes = load_scene15(data / "scene15")
    train, test = scenes.train[::step], scenes.test[::step]
    reference = svm = None
    for precision in PRECISIONS:
        for engine in ENGINES:
            extractor = DeepFeatureExtractor(
                backbone,
                weights=data / "weights" / f"{backbone}.pth",
                engine=engine,
                precision=precision,
                cache=None,
            )
            features = extractor.transform(scenes.data[np.concatenate([train, test])])
            ours, theirs = features[: len(train)], features[len(train) :]
            own = LinearSVC(random_state=0).fit(ours, scenes.target[train])
            if svm is None:
                reference, svm = features, own
            accuracies = [model.score(theirs, scenes.target[test]) for model in (own, svm)]
            cosines = (features * reference).sum(axis=1)  # of rows of length 1
            cells = (
                *(backbone, engine, precision),
                *(f"{100 * accuracy:.2f} %" for accuracy in accuracies),
                *(f"{1 - value:.1e}" for value in (np.median(cosines), cosines.min())),
            )
            print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="only check that it runs")
    step = 50 if parser.parse_known_args()[0].smoke else 1
    if "DEEPFEAT_DATA" not in os.environ:
        print("DEEPFEAT_DATA does not name a folder of images and weights: nothing is measured.")
        return
    print("| backbone | engine | precision | accuracy | SVM of float32 | 1 - cosine | at worst |")
    print("|---|---|---|---:|---:|---:|---:|")
    for backbone in BACKBONES:
        compare(backbone, Path(os.environ["DEEPFEAT_DATA"]), step)


if __name__ == "__main__":
    main()
