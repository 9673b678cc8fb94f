"""Tests of the backbone that comes with deepfeat: its network, its file, life without a network."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.svm import LinearSVC
from torch.testing import assert_close
from torchvision import transforms
from torchvision.models.resnet import BasicBlock, ResNet

from deepfeat import DeepFeatureExtractor, list_backbones, list_layers
from deepfeat._backbones.find import find_backbone
from deepfeat._backbones.resnet10_slim import ResNet10Slim_Weights, SlimResNet

NAME = "resnet10_slim"
ROOT = Path(__file__).parents[2]
FILE = ROOT / "deepfeat" / "_backbones" / "resnet10_slim.safetensors"
CPU = torch.device("cpu")
# Run before a script: whatever opens a connection or asks for an address raises.
CUT_OFF = """
import runpy, socket, sys
def cut_off(*args, **kwargs):
    raise OSError("the network is cut")
for name in ("connect", "connect_ex", "sendto", "bind"):
    setattr(socket.socket, name, cut_off)
for name in ("create_connection", "getaddrinfo", "gethostbyname"):
    setattr(socket, name, cut_off)
"""


def run_cut_off(code, folder):
    """Run Python without a network, a weights cache or settings of the user."""
    return subprocess.run(
        [sys.executable, "-c", CUT_OFF + code],
        cwd=folder,
        env={"PYTHONPATH": str(ROOT), "HOME": str(folder), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )


# The network ------------------------------------------------------------------------------------


def test_it_is_a_backbone_like_any_other():
    """It is listed, found by name, and its weights by theirs."""
    assert NAME in list_backbones()
    found = [
        find_backbone(NAME, weights)
        for weights in ("DEFAULT", "FORMULAS_V1", ResNet10Slim_Weights.DEFAULT)
    ]
    assert len({backbone.fingerprint() for backbone in found}) == 1
    with pytest.raises(ValueError, match="resnet10_slim has no weights 'IMAGENET1K_V1'"):
        find_backbone(NAME, "IMAGENET1K_V1")


def test_its_modules_are_those_of_a_resnet():
    """Names and order are torchvision's for one block a stage, the shapes half of them."""
    slim = SlimResNet(1000).state_dict()
    full = ResNet(BasicBlock, [1, 1, 1, 1]).state_dict()
    assert list(slim) == list(full)
    for name, tensor in slim.items():
        halved = [side if side in (1, 3, 7, 1000) else side // 2 for side in full[name].shape]
        assert list(tensor.shape) == halved, name


def test_it_computes_what_a_resnet_does():
    """torchvision's forward pass over the same modules gives the same numbers."""
    slim = find_backbone(NAME).load(CPU)
    oracle = ResNet(BasicBlock, [1, 1, 1, 1])
    for name, module in slim.named_children():
        setattr(oracle, name, module)
    batch = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        assert_close(slim(batch), oracle.eval()(batch), rtol=0, atol=0)


def test_its_layers_have_the_names_of_a_resnet():
    """`list_layers` names convolution, ReLU, poolings and the ends of the resolutions."""
    layers = {layer.name: layer for layer in list_layers(NAME)}
    assert {"conv1", "bn1", "relu", "maxpool", "avgpool", "fc"} < set(layers)
    stages = {alias: layer.output_shape for layer in layers.values() for alias in layer.aliases}
    assert stages["layer4"] == stages["stage5"] == (256, 3, 3)
    assert stages["layer2"] == stages["stage3"] == (64, 12, 12)


@pytest.mark.parametrize("size", [(250, 300), (96, 96), (8, 8), (640, 427)])
def test_images_are_prepared_as_in_training(size):
    """The shorter side becomes 96, its middle is cut; 0.5 and 0.25 are mean and deviation.

    Pillow's levels of grey differ by one at most, and by none where nothing is resized.
    """
    noise = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    steps = find_backbone(NAME).preprocessing
    assert steps.input_shape == (3, 96, 96)
    batch = steps.normalize(steps.prepare(noise)[None])
    by_hand = transforms.Compose(
        [
            transforms.Resize(96),
            transforms.CenterCrop(96),
            transforms.ToTensor(),
            transforms.Normalize((0.5, 0.5, 0.5), (0.25, 0.25, 0.25)),
        ]
    )
    assert_close(ResNet10Slim_Weights.DEFAULT.transforms()(image), by_hand(image), rtol=0, atol=0)
    level = 1 / 255 / 0.25
    atol = 1e-6 if size == (96, 96) else 1.001 * level
    assert_close(batch[0], by_hand(image), rtol=0, atol=atol)
    assert ((batch[0] - by_hand(image)).abs() > level / 2).float().mean() <= 0.03


# Its weights ------------------------------------------------------------------------------------


def test_default_weights_are_those_of_the_file():
    """The file in the package, at most 3 MB, is what is computed with, in single precision."""
    assert FILE.stat().st_size <= 3_000_000
    assert Path(ResNet10Slim_Weights.DEFAULT.url) == FILE
    state = find_backbone(NAME).load(CPU).state_dict()
    for name, tensor in load_file(FILE).items():
        assert torch.isfinite(tensor).all(), name
        assert_close(state[name], tensor.to(state[name].dtype), rtol=0, atol=0)
    assert sum(p.numel() for p in find_backbone(NAME).skeleton.parameters()) == 1_237_950


def test_its_fingerprint_digests_the_file(tmp_path, monkeypatch):
    """Other weights in the same place have another fingerprint, and so other rows in a cache."""
    before = find_backbone(NAME).fingerprint()
    state = load_file(FILE)
    state["fc.bias"] = state["fc.bias"] + 1
    save_file(state, tmp_path / FILE.name)
    monkeypatch.setattr(ResNet10Slim_Weights.DEFAULT.value, "url", str(tmp_path / FILE.name))
    assert find_backbone(NAME).fingerprint() != before


def test_each_output_has_a_category():
    """As many names as outputs, all different."""
    categories = ResNet10Slim_Weights.DEFAULT.meta["categories"]
    assert len(set(categories)) == find_backbone(NAME).skeleton.fc.out_features == len(categories)


def test_random_weights_are_drawn_from_a_seed():
    """`weights=None` gives the same network without training, the same for a seed."""
    image = [np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)]
    rows = [
        DeepFeatureExtractor(NAME, "avgpool", weights=weights, random_state=seed, cache=None)
        .fit_transform(image)
        .ravel()
        for weights, seed in ((None, 0), (None, 0), (None, 1), ("DEFAULT", 0))
    ]
    assert_allclose(rows[0], rows[1], rtol=0)
    assert rows[0] @ rows[2] < 0.999
    assert rows[0] @ rows[3] < 0.999


def test_a_file_of_weights_is_taken(tmp_path):
    """Weights of one's own, of any number of classes, take the place of those of the package."""
    save_file(SlimResNet(7).state_dict(), tmp_path / "own.safetensors")
    assert find_backbone(NAME, tmp_path / "own.safetensors").skeleton.fc.out_features == 7


def test_digits_are_read_better_than_from_pixels(record_property):
    """On a held-out half of scikit-learn's digits, with a linear SVM; it was not trained on any."""
    digits = load_digits()
    train, test, y_train, y_test = train_test_split(
        digits.images / 16, digits.target, test_size=0.5, stratify=digits.target, random_state=0
    )
    accuracy = {}
    for name, weights in (("weights of the package", "DEFAULT"), ("random weights", None)):
        extractor = DeepFeatureExtractor(
            *(NAME, ["layer3", "layer4"]),
            **{"weights": weights, "pooling": "flatten", "image_size": 48, "random_state": 0},
        )
        pipe = make_pipeline(extractor, LinearSVC(random_state=0)).fit(train, y_train)
        accuracy[name] = pipe.score(test, y_test)
    pixels = [half.reshape(len(half), -1) for half in (train, test)]
    svm = LinearSVC(random_state=0, max_iter=10_000).fit(pixels[0], y_train)
    accuracy["raw pixels"] = svm.score(pixels[1], y_test)
    for name, value in accuracy.items():
        record_property("figure", f"digits, {name}: accuracy {value:.4f}")
    assert accuracy["weights of the package"] >= accuracy["raw pixels"]
    assert accuracy["weights of the package"] > accuracy["random weights"]


# Without a network ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_without_a_network(tmp_path_factory):
    """A process that computes features of an image by this network, and then by another."""
    return run_cut_off(
        "import numpy as np\n"
        "from deepfeat import DeepFeatureExtractor\n"
        f"rows = DeepFeatureExtractor({NAME!r}, 'avgpool').fit_transform(np.eye(9)[None])\n"
        "print(rows.shape)\n"
        "DeepFeatureExtractor('squeezenet1_1', 'stage2').fit_transform(np.eye(9)[None])\n",
        tmp_path_factory.mktemp("home"),
    )


def test_features_need_no_network(run_without_a_network):
    """A process that cannot open a connection computes features of an image."""
    run = run_without_a_network
    assert run.stdout.startswith("(1, 256)\n"), run.stderr


def test_another_backbone_without_a_network_names_this_one(run_without_a_network):
    """Nothing falls back silently: the error says what could not be had, and what can be."""
    run = run_without_a_network
    assert run.returncode == 1
    assert "the network is cut" in run.stderr
    assert "The backbone 'resnet10_slim' needs no network" in run.stderr.splitlines()[-1]


@pytest.mark.slow  # and `nox -s quickstart` runs it too
def test_the_quickstart_needs_no_network(tmp_path):
    """The first example of the README runs to its end where no connection can be opened."""
    script = ROOT / "examples" / "quickstart.py"
    run = run_cut_off(f"runpy.run_path({str(script)!r}, run_name='__main__')\n", tmp_path)
    assert run.returncode == 0, run.stderr
    assert "accuracy" in run.stdout
