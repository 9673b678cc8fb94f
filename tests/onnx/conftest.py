"""Small estimators to export, images for them, and files read with ONNX Runtime alone."""

import json

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.base import is_classifier, is_regressor
from torch import nn
from torchvision.transforms import Compose, Resize, ToTensor

from deepfeat import DeepFeatureExtractor, FineTuneClassifier
from deepfeat.onnx import export

# Older releases of torch cannot export some of the files, so the extra asks for this one.
collect_ignore_glob = [] if torch.__version__ >= "2.9" else ["test_*.py"]

SIDE = 32
AS_FLOATS = Compose([Resize((SIDE, SIDE)), ToTensor()])


@pytest.fixture(autouse=True, scope="session")
def one_thread():
    """More threads do not make networks this small faster, and slow them on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def pictures():
    """Twelve images of noise, at the size that the networks take, of three kinds of brightness."""
    noise = np.random.default_rng(0).integers(0, 100, (12, SIDE, SIDE, 3))
    return (noise + 70 * (np.arange(12) % 3)[:, None, None, None]).astype(np.uint8)


@pytest.fixture(scope="session")
def as_floats():
    """Turn images into what a network of one's own takes here, without torch."""
    return lambda pictures: np.moveaxis(pictures, 3, 1).astype(np.float32) / 255


@pytest.fixture(scope="session")
def make_net():
    """Make a network of one's own, with random weights and statistics."""

    def make_net():
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            net = nn.Sequential(
                *(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(inplace=True)),
                *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)),
            )
            nn.init.uniform_(net[1].running_mean, -0.3, 0.3)
            nn.init.uniform_(net[1].running_var, 0.5, 1.5)
        return net.eval()

    return make_net


@pytest.fixture(scope="session")
def make_extractor(make_net):
    """Make an extractor that computes each row anew: with a network of one's own, or a name."""

    def make_extractor(backbone=None, layer="penultimate", **params):
        fast = {"cache": None, "num_workers": 0, "device": "cpu"}
        if isinstance(backbone, str):
            fast |= {"image_size": SIDE, "resize": "squash"}
        else:
            fast |= {"preprocessing": AS_FLOATS}
            backbone = make_net() if backbone is None else backbone
        return DeepFeatureExtractor(backbone, layer, **fast | params)

    return make_extractor


@pytest.fixture(scope="session")
def make_classifier():
    """Make a classifier that learns in a moment."""

    def make_classifier(backbone="resnet10_slim", **params):
        fast = {"max_epochs": 1, "batch_size": 4, "num_workers": 0, "random_state": 0}
        fast |= {"unfreeze": None, "device": "cpu", "learning_rate": 0.1}
        if isinstance(backbone, str):
            fast |= {"image_size": SIDE, "resize": "squash"}
        else:
            fast |= {"preprocessing": AS_FLOATS}
        return FineTuneClassifier(backbone, **fast | params)

    return make_classifier


class File:
    """An exported file, as a program without torch and scikit-learn reads it."""

    def __init__(self, path):
        onnx, onnxruntime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
        self.content = path.read_bytes()
        self.model = onnx.load(path)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(
            path, options, providers=["CPUExecutionProvider"]
        )
        self.metadata = self.session.get_modelmeta().custom_metadata_map

    def read(self, key):
        return json.loads(self.metadata[key])

    def run(self, images):
        outputs = self.session.run(None, {"images": images})
        names = [output.name for output in self.session.get_outputs()]
        return dict(zip(names, outputs, strict=True))


@pytest.fixture(scope="session")
def read_file():
    """Read an exported file."""
    return File


@pytest.fixture
def export_file(tmp_path):
    """Export an estimator, and read the file."""

    def export_file(estimator, **options):
        path = tmp_path / "exported.onnx"
        export(estimator, path, **options)
        assert [entry.name for entry in tmp_path.iterdir()] == ["exported.onnx"]
        return File(path)

    return export_file


@pytest.fixture(scope="session")
def assert_near():
    """Raise unless values are equal to a part of the largest of all."""

    def assert_near(found, expected, tolerance=1e-4):
        assert found.dtype == np.float32
        scale = np.abs(expected).max()
        assert_allclose(found / scale, expected / scale, rtol=0, atol=tolerance)

    return assert_near


@pytest.fixture(scope="session")
def assert_gives_the_same(assert_near):
    """Raise unless a file gives for `images` what an estimator gives for X."""

    def assert_gives_the_same(file, estimator, X, images=None, tolerance=1e-4):
        found = file.run(X if images is None else images)
        if is_classifier(estimator):
            assert found.keys() == {"label", "scores"}
            assert_near(found["scores"], estimator.decision_function(X), tolerance)
            assert found["label"].dtype == np.int64
            classes = np.array(file.read("classes"))
            assert_array_equal(classes[found["label"]], estimator.predict(X))
        elif is_regressor(estimator):
            assert found.keys() == {"predictions"}
            assert_near(found["predictions"], estimator.predict(X), tolerance)
        else:
            assert found.keys() == {"features"}
            assert_near(found["features"], np.asarray(estimator.transform(X)), tolerance)

    return assert_gives_the_same
