"""Tests of trained classifiers in files: what is saved can be loaded, and nothing else."""

import copy
import json
import os
import pickle
import pickletools
import struct
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from numpy.testing import assert_array_equal
from sklearn.datasets import load_digits
from sklearn.pipeline import make_pipeline
from torch import nn

from deepfeat import FineTuneClassifier
from deepfeat._finetuning.saving import read_network, write_network

SMALL = "squeezenet1_1"


@pytest.fixture(scope="module")
def images(make_images):
    return make_images(8, 32)


@pytest.fixture(scope="module")
def fitted(images, make_classifier):
    X, y = images
    return make_classifier(SMALL, unfreeze="stage4").fit(X, y, X_val=X[:2], y_val=y[:2])


@pytest.fixture
def file(tmp_path):
    return tmp_path / "classifier.safetensors"


def saved_and_loaded(classifier, file):
    classifier.save(file)
    return FineTuneClassifier.load(file)


def header_of(file):
    """Read the header of a safetensors file as the format defines it: a length, and JSON."""
    content = file.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    return json.loads(content[8 : 8 + length])


# There and back ---------------------------------------------------------------------------------


def test_what_is_loaded_is_what_was_saved(fitted, images, file, assert_same_state, state_of):
    """Predictions to the bit, parameters, classes and history."""
    again = saved_and_loaded(fitted, file)
    assert_array_equal(again.predict_proba(images[0]), fitted.predict_proba(images[0]))
    assert_same_state(state_of(again), state_of(fitted))
    assert again.get_params() == fitted.get_params()
    assert_array_equal(again.classes_, fitted.classes_)
    assert again.classes_.dtype == fitted.classes_.dtype
    assert again.history_ == fitted.history_
    assert again.n_iter_ == fitted.n_iter_
    assert again.best_validation_score_ == fitted.best_validation_score_
    assert not again.module_.training


FAMILIES = {
    "squeezenet1_1": (32, "stage4"),
    "mobilenet_v2": (32, "features.18"),
    "mnasnet0_5": (32, "layers.14"),
    "shufflenet_v2_x0_5": (32, "conv5"),
}
SLOW = {
    "googlenet": (32, "all"),
    "inception_v3": (75, None),
    "densenet121": (32, "features.norm5"),
    "efficientnet_b0": (32, "features.8"),
    "swin_t": (32, None),
    "vit_b_32": (64, None),
    "maxvit_t": (224, None),
    "convnext_tiny": (32, None),
}


@pytest.mark.parametrize("head", ["replace", "append"])
@pytest.mark.parametrize(
    "name", [*FAMILIES, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]
)
def test_every_family_can_be_saved(file, name, head, make_images, make_classifier, state_of):
    """With either head: the network is rebuilt from its weights."""
    side, unfreeze = (FAMILIES | SLOW)[name]
    X, y = make_images(4, side)
    classifier = make_classifier(
        name, unfreeze=unfreeze, head=head, image_size=side, max_epochs=1
    ).fit(X, y)
    again = saved_and_loaded(classifier, file)
    assert_array_equal(again.decision_function(X), classifier.decision_function(X))
    assert state_of(again).keys() == state_of(classifier).keys()


@pytest.mark.parametrize("head", ["replace", "append"])
def test_a_network_with_other_outputs_than_a_new_one_can_be_saved(
    file, head, make_images, make_classifier
):
    """The weights that come with deepfeat have 30 outputs, a new network 1000."""
    X, y = make_images(4, 32)
    options = {"weights": "DEFAULT", "unfreeze": "layer4", "head": head}
    classifier = make_classifier("resnet10_slim", **options).fit(X, y)
    again = saved_and_loaded(classifier, file)
    assert_array_equal(again.decision_function(X), classifier.decision_function(X))


LABELS = {
    "str": np.array(["ä", "b c"] * 4),
    "int": np.array([-5, 2**40] * 4),
    "uint8": np.array([3, 200] * 4, dtype=np.uint8),
    "bool": np.array([True, False] * 4),
    "object": np.array(["ä", "b"] * 4, dtype=object),
    "float": np.array([0.0, 1.0] * 4),
}


@pytest.mark.parametrize("kind", LABELS)
def test_labels_of_every_type_come_back(images, file, kind, make_classifier):
    """With their dtype."""
    X, y = images[0], LABELS[kind]
    classifier = make_classifier(SMALL, unfreeze=None, max_epochs=1).fit(X, y)
    again = saved_and_loaded(classifier, file)
    assert again.classes_.dtype == y.dtype
    assert_array_equal(again.classes_, np.unique(y))
    assert_array_equal(again.predict(X), classifier.predict(X))


PARAMS = {
    "class_weight": {"dark": 2, "light": np.float32(0.5)},
    "batch_size": np.int64(4),
    "learning_rate": np.float64(0.01),
    "device": torch.device("cpu"),
    "unfreeze": ["stage4", 3],
    "max_grad_norm": 1.0,
    "random_state": 3,
    "precision": "bfloat16",
}


@pytest.mark.parametrize("name", PARAMS)
def test_parameters_come_back(images, file, name, make_classifier):
    """Scalars of NumPy and devices of torch come back as plain numbers and strings."""
    classifier = make_classifier(SMALL, **{"unfreeze": None, "max_epochs": 1, name: PARAMS[name]})
    again = saved_and_loaded(classifier.fit(*images), file)
    expected = str(PARAMS[name]) if name == "device" else PARAMS[name]
    assert again.get_params()[name] == expected
    assert_array_equal(again.predict(images[0]), classifier.predict(images[0]))


def test_a_random_state_is_left_out(images, file, make_classifier):
    """What was drawn from it is the seed."""
    state = np.random.RandomState(0)
    params = {"unfreeze": None, "max_epochs": 1, "random_state": state}
    again = saved_and_loaded(make_classifier(SMALL, **params).fit(*images), file)
    assert again.random_state is None


def test_class_weights_of_numbers_stay_of_numbers(images, file, make_classifier):
    """JSON would turn the keys into strings."""
    X, _ = images
    weights = {0: 2.0, 1: 1.0}
    params = {"unfreeze": None, "max_epochs": 1, "class_weight": weights}
    again = saved_and_loaded(make_classifier(SMALL, **params).fit(X, [0, 1] * 4), file)
    assert again.class_weight == weights
    again.fit(X, [0, 1] * 4)


def test_columns_of_tables_come_back(file, make_classifier):
    """Their number and their names."""
    X, y = load_digits(n_class=2, return_X_y=True, as_frame=True)
    params = {"image_shape": (8, 8), "unfreeze": None, "max_epochs": 1}
    classifier = make_classifier(SMALL, **params).fit(X[:8] / 16, y[:8])
    again = saved_and_loaded(classifier, file)
    assert again.n_features_in_ == 64
    assert_array_equal(again.feature_names_in_, X.columns)
    assert_array_equal(again.predict_proba(X[:8] / 16), classifier.predict_proba(X[:8] / 16))
    with pytest.raises(ValueError, match="feature names"):
        again.predict(X[X.columns[::-1]])


def test_what_was_loaded_learns_on(fitted, images, file, state_of):
    """By a warm start and by partial fits, with epochs that keep counting."""
    again = saved_and_loaded(fitted, file).set_params(warm_start=True)
    again.fit(*images).partial_fit(*images)
    assert [epoch["epoch"] for epoch in again.history_] == [1, 2, 3, 4, 5]
    assert not torch.equal(
        state_of(again)["classifier.1.weight"], state_of(fitted)["classifier.1.weight"]
    )
    again.save(file)
    assert FineTuneClassifier.load(file).n_iter_ == 5


def test_loading_downloads_nothing(fitted, file, monkeypatch):
    """Even if the weights were downloaded for training."""
    fitted.save(file)
    state, description = read_network(file)
    description["params"]["weights"] = "DEFAULT"
    write_network(file, state, description)
    monkeypatch.setattr("deepfeat._backbones.torchvision.PublishedWeights.state", pytest.fail)
    assert FineTuneClassifier.load(file).weights == "DEFAULT"


# The file ---------------------------------------------------------------------------------------


def test_the_file_is_tensors_and_json(fitted, file, assert_same_state, state_of):
    """Any safetensors reader can open it."""
    fitted.save(str(file))
    tensors = safetensors.torch.load_file(file)
    assert_same_state(tensors, state_of(fitted))
    description = json.loads(header_of(file)["__metadata__"]["deepfeat"])
    assert description["format"] == 1
    assert description["params"]["backbone"] == SMALL
    assert description["classes"] == ["<U5", ["dark", "light"]]
    assert len(description["history"]) == 2


def test_there_is_no_pickle_in_the_file(fitted, file):
    """Pickle refuses it at the first byte, and loading does not call pickle."""
    fitted.save(file)
    with pytest.raises((ValueError, pickle.UnpicklingError)):
        list(pickletools.genops(file.read_bytes()))
    with pytest.MonkeyPatch.context() as patch:
        for name in ("load", "loads", "Unpickler"):
            patch.setattr(pickle, name, pytest.fail)
        patch.setattr(torch, "load", pytest.fail)
        FineTuneClassifier.load(file)


def test_a_file_is_replaced_in_one_step(fitted, images, file, monkeypatch, make_classifier):
    """A save that fails leaves the file as it was, and no other file."""
    fitted.save(file)
    before = file.read_bytes()

    def fail(tensors, path, **options):
        Path(path).write_bytes(b"half")
        raise OSError("the disk is full")

    monkeypatch.setattr("deepfeat._finetuning.saving.save_file", fail)
    with pytest.raises(OSError, match="the disk is full"):
        fitted.save(file)
    assert file.read_bytes() == before
    assert os.listdir(file.parent) == [file.name]
    monkeypatch.undo()
    make_classifier(SMALL, unfreeze=None, max_epochs=1).fit(*images).save(file)
    assert FineTuneClassifier.load(file).n_iter_ == 1
    assert os.listdir(file.parent) == [file.name]


def test_a_path_may_begin_with_the_home_folder(fitted, tmp_path, monkeypatch):
    """As in a shell."""
    monkeypatch.setenv("HOME", str(tmp_path))
    fitted.save("~/mine.safetensors")
    assert (tmp_path / "mine.safetensors").is_file()
    assert FineTuneClassifier.load("~/mine.safetensors").n_iter_ == 2


def test_tensors_of_any_layout_are_written(file, assert_same_state):
    """Views, channels last, whole numbers and single numbers."""
    wide = torch.arange(24.0).reshape(2, 3, 2, 2).contiguous(memory_format=torch.channels_last)
    state = {"a": wide, "b": torch.arange(6).view(2, 3).T, "c": torch.tensor(3)}
    write_network(file, state, {"told": [1, None, "ü"]})
    tensors, description = read_network(file)
    assert_same_state(tensors, state)
    assert description == {"told": [1, None, "ü"]}


# What cannot be saved or loaded -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["backbone", "augment"])
def test_code_cannot_be_saved(images, file, name, to_16_pixels, make_plain, make_classifier):
    """The error says what can: pickle."""
    params = {
        "backbone": {"backbone": make_plain(), "unfreeze": None},
        "augment": {"backbone": SMALL, "augment": to_16_pixels},
    }[name]
    classifier = make_classifier(**{"max_epochs": 1, "unfreeze": None} | params)
    classifier.set_params(augment=classifier.augment if name == "backbone" else copy_image)
    with pytest.raises(
        ValueError, match=rf"(?s){name}=.* cannot be saved without pickle: use pickle or"
    ):
        classifier.fit(*images).save(file)
    assert not file.exists()


def copy_image(image):
    return image.copy()


def test_preprocessing_of_ones_own_cannot_be_saved(images, file, make_classifier, to_16_pixels):
    """It is code too."""
    params = {"unfreeze": None, "image_size": None, "max_epochs": 1}
    classifier = make_classifier("mobilenet_v2", preprocessing=to_16_pixels, **params)
    with pytest.raises(ValueError, match=r"(?s)preprocessing=.* use pickle"):
        classifier.fit(*images).save(file)


def test_nothing_is_saved_before_fit(file, make_classifier):
    """There is no network yet."""
    with pytest.raises(ValueError, match="not fitted yet"):
        make_classifier(SMALL).save(file)
    assert not file.exists()


def test_a_file_that_is_not_there_is_named(file, tmp_path):
    """So is a folder in its place."""
    for path in (file, tmp_path):
        with pytest.raises(FileNotFoundError, match="path must be an existing file; got "):
            FineTuneClassifier.load(path)


DAMAGES = {
    "empty": lambda content: b"",
    "text": lambda content: b"no network",
    "cut off": lambda content: content[:-100],
    "cut off early": lambda content: content[:50],
    "longer": lambda content: content + b"0",
    "another length": lambda content: struct.pack("<Q", 2**40) + content[8:],
    "pickle": lambda content: pickle.dumps({"a": 1}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_refused(fitted, file, damage):
    """With its name."""
    fitted.save(file)
    file.write_bytes(DAMAGES[damage](file.read_bytes()))
    with pytest.raises(ValueError, match=r"classifier.safetensors is damaged or not a safetensors"):
        FineTuneClassifier.load(file)


def test_a_flipped_bit_is_found(fitted, file):
    """Wherever it is: other weights would load without a word."""
    fitted.save(file)
    content = file.read_bytes()
    header = 8 + struct.unpack("<Q", content[:8])[0]
    places = np.random.default_rng(0).integers(header, len(content), 40)
    for place in [header, *places, len(content) - 1]:
        damaged = bytearray(content)
        damaged[place] ^= 1 << int(place) % 8
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match="is damaged: its contents do not have the digest"):
            FineTuneClassifier.load(file)


ODD = {
    "a list": [1],
    "a number": 3,
    "without a format": {"params": {}},
    "parameters in a list": {"format": 1, "params": [1]},
    "no classes": {"format": 1, "params": {}, "classes": None},
}


@pytest.mark.parametrize("odd", ODD)
def test_an_odd_description_is_refused(file, odd):
    """With the name of the file, whatever goes wrong in reading it."""
    write_network(file, {"a": torch.zeros(2)}, ODD[odd])
    with pytest.raises(ValueError, match=r"classifier.safetensors does not hold what its header"):
        FineTuneClassifier.load(file)


def test_a_deep_description_is_refused(file, monkeypatch):
    """Python's own reader of JSON gives up on it."""
    monkeypatch.setattr("deepfeat._finetuning.saving.json.dumps", lambda _: "[" * 100_000)
    write_network(file, {"a": torch.zeros(2)}, {})
    with pytest.raises(ValueError, match="does not hold what its header says: RecursionError"):
        FineTuneClassifier.load(file)


def test_a_full_disk_is_an_error_of_the_system(fitted, file):
    """Of files as large as a process may write, as of disks; nothing is left behind."""
    resource = pytest.importorskip("resource")  # of POSIX
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"classifier.safetensors cannot be written: .*large"):
            fitted.save(file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(file.parent) == []


def test_a_file_of_somebody_else_is_refused(file):
    """Weights alone do not say which network they belong to."""
    safetensors.torch.save_file({"a": torch.zeros(2)}, file)
    with pytest.raises(ValueError, match=r"was not written by FineTuneClassifier.save"):
        FineTuneClassifier.load(file)


def test_a_file_of_a_later_release_is_refused(fitted, file):
    """Rather than misread."""
    fitted.save(file)
    state, description = read_network(file)
    write_network(file, state, description | {"format": 2})
    with pytest.raises(ValueError, match="has format 2, but this release reads format 1"):
        FineTuneClassifier.load(file)


# skops ------------------------------------------------------------------------------------------

TRUSTED = ["deepfeat.FineTuneClassifier", "deepfeat._finetuning.saving.Fitted"]


def test_skops_keeps_a_classifier(images, make_classifier, state_of, assert_same_state):
    """Trained or not, alone or in a pipeline; it holds the bytes of a file."""
    skops = pytest.importorskip("skops.io")
    X, y = images
    trained = make_classifier("resnet10_slim").fit(X, y)
    trained.threshold_ = 0.3  # of the user
    content = skops.dumps(make_pipeline("passthrough", trained))
    loaded = skops.loads(content, trusted=TRUSTED)
    assert_same_state(state_of(loaded[-1]), state_of(trained))
    assert loaded[-1].history_ == trained.history_
    assert loaded[-1].threshold_ == 0.3
    assert loaded.predict(X).tolist() == trained.predict(X).tolist()
    untrained = skops.loads(skops.dumps(make_classifier("resnet10_slim")), trusted=TRUSTED)
    assert untrained.get_params() == make_classifier("resnet10_slim").get_params()
    assert not hasattr(untrained, "module_")


def test_a_pickle_has_the_network_as_it_is(images, make_classifier):
    """Also one that was changed after training, of which a file has the weights alone."""
    classifier = make_classifier("resnet10_slim").fit(*images)
    classifier.module_.fc = nn.Sequential(classifier.module_.fc, nn.Tanh())
    for how in (lambda one: pickle.loads(pickle.dumps(one)), copy.copy, copy.deepcopy):
        copied = how(classifier)
        assert (copied.predict_proba(images[0]) == classifier.predict_proba(images[0])).all()


@pytest.mark.parametrize(("name", "value"), [("backbone", "alexnet"), ("image_size", 64)])
def test_a_changed_parameter_is_not_saved_with_another_network(name, value, fitted, file):
    """It would say what the file does not hold."""
    changed = copy.copy(fitted).set_params(**{name: value})
    with pytest.raises(ValueError, match=f"^{name} must not change while a network is trained"):
        changed.save(file)
    assert not file.exists()
