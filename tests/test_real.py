"""Tests on real images with real weights, where DEEPFEAT_DATA names the folder that holds them."""

import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime
import pandas as pd
import pytest
import torch
from numpy.testing import assert_allclose
from PIL import Image
from sklearn.datasets import load_sample_images
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, Normalizer, normalize
from sklearn.svm import LinearSVC
from torchvision import models

from deepfeat import DeepFeatureExtractor, FineTuneClassifier, predict_categories
from deepfeat._backbones import preprocessing
from deepfeat.datasets._folders import load_image_folder
from deepfeat.datasets._scene15 import load_scene15
from deepfeat.onnx import export

pytestmark = [
    pytest.mark.real,
    pytest.mark.timeout(3600),
    pytest.mark.skipif("DEEPFEAT_DATA" not in os.environ, reason="DEEPFEAT_DATA is not set"),
]


@pytest.fixture(scope="module")
def folder():
    return Path(os.environ["DEEPFEAT_DATA"])


@pytest.fixture(scope="module")
def split(folder):
    """The files of 15-Scene: columns split, class, file and path."""
    table = pd.read_csv(folder / "scene15_split.csv")
    paths = [folder / "scene15" / row["class"] / row["file"] for _, row in table.iterrows()]
    return table.assign(path=list(map(str, paths)))


def test_squashed_scenes_are_told_apart(folder, split, record_property):
    """On the fixed split of 15-Scene, with a linear SVM; tests/test_report.py has cropped images.

    A plain torchvision loop reaches 0.8740.
    """
    train, test = (split[split["split"] == part] for part in ("train", "test"))
    assert (len(train), len(test)) == (1500, 2985)
    weights = folder / "weights" / "squeezenet1_1.pth"
    extractor = DeepFeatureExtractor("squeezenet1_1", "features", weights=weights, resize="squash")
    pipe = make_pipeline(extractor, LinearSVC(C=1, random_state=0))
    accuracy = pipe.fit(train["path"], train["class"]).score(test["path"], test["class"])
    record_property("figure", f"15-Scene, squeezenet1_1, squashed: accuracy {accuracy:.4f}")
    assert accuracy >= 0.870


def test_scenes_are_told_apart_by_fine_tuning(folder, split, record_property):
    """Frozen features with a linear SVM reach 0.90; the last blocks trained reach more.

    Every third test image will do: two standard errors of their accuracy are 0.017.
    """
    train, test = (split[split["split"] == part] for part in ("train", "test"))
    classifier = FineTuneClassifier(
        "mobilenet_v2",
        weights=folder / "weights" / "mobilenet_v2.pth",
        unfreeze="features.14",
        max_epochs=4,
        random_state=0,
    )
    start = time.process_time()
    classifier.fit(train["path"], train["class"])
    minutes = (time.process_time() - start) / 60
    accuracy = classifier.score(test["path"][::3], test["class"][::3])
    record_property(
        "figure",
        f"15-Scene, mobilenet_v2 trained from features.14 on: accuracy {accuracy:.4f} on every "
        f"third test image after {minutes:.1f} CPU minutes",
    )
    assert accuracy >= 0.915


@pytest.fixture
def measure(split, record_property):
    """Measure features on 15-Scene; C is chosen on the training part alone."""
    train, test = (split[split["split"] == part] for part in ("train", "test"))

    def measure(name, step):
        rows = [step.fit_transform(part["path"]) for part in (train, test)]
        svm = LinearSVC(random_state=0, max_iter=20_000)
        search = GridSearchCV(svm, {"C": [0.3, 1, 3, 10, 30]}).fit(rows[0], train["class"])
        accuracy, C = search.score(rows[1], test["class"]), search.best_params_["C"]
        record_property("figure", f"15-Scene, {name}: accuracy {accuracy:.4f} (C={C:g})")
        return accuracy

    return measure


@pytest.mark.parametrize(("image_size", "least"), [(96, 0.75), (128, 0.78)])
def test_the_bundled_backbone_tells_scenes_apart(measure, image_size, least):
    """Better than with random weights."""
    its_own, random = (
        measure(
            f"resnet10_slim at {image_size} pixels, weights={weights!r}",
            DeepFeatureExtractor(
                *("resnet10_slim", ["layer1", "layer2", "layer3", "layer4"]),
                **{"weights": weights, "image_size": image_size, "resize": "squash"},
                random_state=0,
            ),
        )
        for weights in ("DEFAULT", None)
    )
    assert its_own >= least
    assert its_own > random


def test_pixels_tell_scenes_less_apart(measure):
    """Than any of the above."""
    steps = make_pipeline(FunctionTransformer(small_grey), Normalizer())
    assert measure("32 x 32 pixels", steps) < 0.75


def small_grey(paths):
    """Read images as the rows of their 32 x 32 grey pixels."""
    images = (Image.open(path).convert("L").resize((32, 32)) for path in paths)
    return np.stack([np.asarray(image).ravel() for image in images])


@pytest.mark.usefixtures("pillow_resizes")
@pytest.mark.parametrize("backbone", ["mobilenet_v2", "squeezenet1_1"])
def test_rows_of_real_images_are_those_of_a_plain_loop(folder, split, backbone):
    """Real weights, real JPEGs: PIL, `weights.transforms()`, the network, the mean, the norm."""
    paths = split["path"][::500]
    weights = folder / "weights" / f"{backbone}.pth"
    net = models.get_model(backbone, weights=None).eval()
    net.load_state_dict(torch.load(weights, weights_only=True))
    preprocess = models.get_model_weights(backbone)["DEFAULT"].transforms()
    means = []
    for path in paths:
        with Image.open(path) as image, torch.inference_mode():
            maps = net.features(preprocess(image.convert("RGB"))[None])
        means.append(maps.mean((2, 3))[0].numpy())
    rows = DeepFeatureExtractor(backbone, "features", weights=weights).fit_transform(paths)
    assert_allclose(rows, normalize(np.array(means)), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("backbone", ["mobilenet_v2", "squeezenet1_1"])
def test_features_hardly_depend_on_who_resizes(
    folder, split, backbone, monkeypatch, record_property
):
    """On ten images of each class: levels of grey next to Pillow's hardly turn the features.

    Pillow is furthest from torch where an upright image is squashed to a lower and wider one: it
    resizes the columns first, torch always the rows.
    """
    paths = split.groupby("class").head(10)["path"]
    assert len(paths) == 150
    for resize, least in (("weights", 0.9999), ("squash", 0.999)):
        extractor = DeepFeatureExtractor(
            *(backbone, "features"),
            **{"weights": folder / "weights" / f"{backbone}.pth", "resize": resize, "cache": None},
        )
        by_torch = extractor.fit_transform(paths)
        with monkeypatch.context() as patch:
            patch.setattr(preprocessing, "_has_native_resize", lambda: False)
            by_pillow = extractor.fit_transform(paths)
        cosines = (by_torch * by_pillow).sum(axis=1)
        record_property(
            "figure",
            f"15-Scene, {backbone}, resize={resize!r}: cosine of features by torch's resizing and "
            f"by Pillow's {cosines.min():.6f} at least, {np.median(cosines):.6f} in the middle",
        )
        assert cosines.min() >= least


@pytest.mark.usefixtures("pillow_resizes")
@pytest.mark.parametrize("backbone", ["mobilenet_v2", "squeezenet1_1"])
def test_categories_of_photographs_are_those_of_torchvision(folder, record_property, backbone):
    """Real weights on scikit-learn's two photographs: names and probabilities as by hand."""
    weights = folder / "weights" / f"{backbone}.pth"
    photographs = load_sample_images()
    net = models.get_model(backbone, weights=None).eval()
    net.load_state_dict(torch.load(weights, weights_only=True))
    entry = models.get_model_weights(backbone)["DEFAULT"]
    batch = torch.stack([entry.transforms()(Image.fromarray(one)) for one in photographs.images])
    with torch.inference_mode():
        probabilities, places = net(batch).softmax(dim=1).topk(5)
    found = predict_categories(backbone, photographs.images, weights=weights)
    names = [[entry.meta["categories"][place] for place in row] for row in places]
    assert [[name for name, _ in pairs] for pairs in found] == names
    values = [[probability for _, probability in pairs] for pairs in found]
    assert_allclose(values, probabilities, rtol=1e-3)
    for path, pairs in zip(photographs.filenames, found, strict=True):
        words = ", ".join(f"{name} {probability:.3f}" for name, probability in pairs)
        record_property("figure", f"{backbone}, {Path(path).name}: {words}")


def test_scenes_are_loaded_with_their_split(folder, split):
    """All of 15-Scene is found; the file beside it decides on the fixed split."""
    scenes = load_scene15(folder / "scene15")
    assert len(scenes.data) == len(load_image_folder(folder / "scene15").data) == 4485
    for part, places in {"train": scenes.train, "test": scenes.test}.items():
        rows = split[split["split"] == part]
        assert set(scenes.data[places]) == set(rows["path"])
        labels = dict(zip(rows["path"], rows["class"], strict=True))
        assert [labels[path] for path in scenes.data[places]] == list(
            scenes.target_names[scenes.target[places]]
        )


@pytest.fixture(scope="module")
def exported(folder, split, tmp_path_factory):
    """A pipeline for 15-Scene, and its file."""
    train = split[split["split"] == "train"]
    weights = folder / "weights" / "mobilenet_v2.pth"
    pipe = make_pipeline(
        DeepFeatureExtractor("mobilenet_v2", weights=weights), LinearSVC(C=1, random_state=0)
    )
    pipe.fit(train["path"], train["class"])
    file = tmp_path_factory.mktemp("exported") / "scenes.onnx"
    export(pipe, file, check=train["path"][::50])
    return pipe, file


def test_an_exported_file_gives_the_labels_of_the_pipeline(exported, split, record_property):
    """For all test images of 15-Scene, in float32 and with halved weights."""
    pipe, file = exported
    test = split.loc[split["split"] == "test", "path"]
    scores, labels = pipe.decision_function(test), pipe.predict(test)
    pictures = np.stack([np.asarray(picture) for picture in pipe[0].preview(test)])
    halved = file.with_suffix(".float16.onnx")
    export(pipe, halved, check=test[::50], precision="float16")
    for each, words, most in ((file, "float32", 0), (halved, "halved weights", 9)):
        session = onnxruntime.InferenceSession(each, providers=["CPUExecutionProvider"])
        runs = [session.run(None, {"images": some}) for some in np.array_split(pictures, 100)]
        found, values = map(np.concatenate, zip(*runs, strict=True))
        changed = int((pipe.classes_[found] != labels).sum())
        difference = np.abs(values - scores).max()
        record_property(
            "figure",
            f"15-Scene, ONNX file of {each.stat().st_size / 1e6:.1f} MB, {words}: {changed} of "
            f"{len(test)} labels differ, scores by up to {difference:.1e}",
        )
        assert changed <= most
        assert difference < (1e-4 if each == file else 1e-2) * np.abs(scores).max()


@pytest.mark.slow
@pytest.mark.network
def test_a_file_is_read_without_torch(exported, split, tmp_path, record_property):
    """By the program of the docs, in an environment with NumPy, Pillow and ONNX Runtime alone."""
    pipe, file = exported
    paths = split.loc[split["split"] == "test", "path"][::30].tolist()
    assert len(paths) == 100
    python = tmp_path / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", tmp_path], check=True)
    packages = ["numpy", "pillow", "onnxruntime"]
    subprocess.run([python, "-m", "pip", "install", "--quiet", *packages], check=True)
    assert subprocess.run([python, "-c", "import torch"], stderr=subprocess.DEVNULL).returncode
    program = Path(__file__).parents[1] / "examples/deployment/predict.py"
    run = subprocess.run([python, program, file, *paths], check=True, capture_output=True)
    found = [line.split("\t")[:2] for line in run.stdout.decode().splitlines()]
    assert [path for path, _ in found] == paths
    scores = np.sort(pipe.decision_function(paths), axis=1)
    margins = scores[:, -1] - scores[:, -2]
    differ = np.array([label for _, label in found]) != pipe.predict(paths)
    record_property(
        "figure", f"15-Scene, read without torch: {differ.sum()} of {len(paths)} labels differ"
    )
    # Pillow and torch resize to pixels that differ by a grey level.
    assert (margins[differ] < 0.02).all()
    assert differ.sum() <= 1
