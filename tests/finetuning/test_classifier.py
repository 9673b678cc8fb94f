"""Tests of fine-tuning end to end: when it stops, how it goes on, and every way to fail."""

import json
import pickle

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image
from sklearn.datasets import load_digits
from small_networks import (
    PlainNet,
    assert_same_state,
    make_classifier,
    make_images,
    make_plain,
    state_of,
    to_16_pixels,
)
from torch.nn import functional as F
from torchvision import models, transforms
from torchvision.models.feature_extraction import create_feature_extractor

from deepfeat import DeepFeatureExtractor, FeatureCache
from deepfeat._finetuning import classifier as _classifier
from deepfeat._finetuning import training as _training

RATES = {"learning_rate": 0.02, "backbone_learning_rate": 0.01}


@pytest.fixture
def images():
    return make_images()


def copy_of(state):
    return {name: value.clone() for name, value in state.items()}


# Early stopping ---------------------------------------------------------------------------------


@pytest.fixture
def planted(monkeypatch):
    """Plant the validation scores; return what the network was after each epoch."""

    def plant(*scores):
        states, remaining = [], list(scores)

        def evaluate(learner, samples):
            states.append(copy_of(learner.module.state_dict()))
            return 1.0, remaining.pop(0)

        monkeypatch.setattr(_training.Learner, "evaluate", evaluate)
        return states

    return plant


@pytest.mark.parametrize(
    ("scores", "tol", "patience", "epochs", "best"),
    [
        ([0.1, 0.3, 0.2, 0.2], 0, 2, 4, 1),
        ([0.1, 0.3, 0.2, 0.4, 0.1, 0.1], 0, 2, 6, 3),
        ([0.5, 0.5, 0.5], 0, 2, 3, 0),
        ([0.5], 0, 1, 2, 0),
        ([0.0, 0.0, 0.0], 0, 2, 3, 0),
        # A rise by less than tol is none, but its weights are better all the same.
        ([0.5, 0.55, 0.58], 0.1, 2, 3, 2),
        ([0.5, 0.7, 0.75, 0.75], 0.1, 2, 4, 2),
        # The network of the last epoch may be the best.
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], 0, 2, 6, 5),
    ],
)
def test_training_stops_when_the_score_rises_no_more(
    images, planted, scores, tol, patience, epochs, best
):
    """And the network is that of the best epoch, statistics and all."""
    states = planted(*scores, *[0.0] * 6)
    X, y = images
    classifier = make_classifier(
        make_plain(norm=True),
        early_stopping=True,
        max_epochs=6,
        n_iter_no_change=patience,
        tol=tol,
    )
    classifier.fit(X, y, X_val=X[:2], y_val=y[:2])
    assert classifier.n_iter_ == len(classifier.history_) == len(states) == epochs
    assert classifier.best_validation_score_ == max(scores)
    assert_same_state(state_of(classifier), states[best])
    assert not torch.equal(states[0]["fc.weight"], states[-1]["fc.weight"])


def test_without_early_stopping_scores_are_only_noted(images, planted):
    """The last network is kept."""
    X, y = images
    states = planted(0.9, 0.1, 0.1, 0.2)
    classifier = make_classifier(max_epochs=4, n_iter_no_change=1)
    classifier.fit(X, y, X_val=X[:2], y_val=y[:2])
    assert classifier.n_iter_ == 4
    assert classifier.best_validation_score_ == 0.9
    assert_same_state(state_of(classifier), states[-1])


def test_a_stratified_part_is_set_aside():
    """A quarter of each class, of which nothing is learned."""
    X, y = make_images(16)
    seen, checked = [], []

    def note(image):
        seen.append(np.asarray(image).tobytes())
        return image

    def prepare(image):
        if np.asarray(image).shape == (16, 16, 3):
            checked.append(np.asarray(image).tobytes())
        return to_16_pixels(image)

    make_classifier(
        preprocessing=prepare,
        augment=note,
        early_stopping=True,
        validation_fraction=0.25,
        max_epochs=1,
    ).fit(X, y)
    names = {image.tobytes(): label for image, label in zip(X, y, strict=True)}
    assert sorted(names[pixels] for pixels in seen) == ["dark"] * 6 + ["light"] * 6
    aside = set(checked) - set(seen)
    assert sorted(names[pixels] for pixels in aside) == ["dark"] * 2 + ["light"] * 2


def test_validation_images_are_scored_as_the_classifier_would(images):
    """Loss and accuracy of the last epoch are those of the network that is left."""
    X, y = images
    X_val, y_val = make_images(5, seed=1)
    classifier = make_classifier(
        make_plain(dropout=0.5, norm=True), label_smoothing=0.3, class_weight={"dark": 5}
    ).fit(X, y, X_val=X_val, y_val=y_val)
    last = classifier.history_[-1]
    assert last["validation_score"] == classifier.score(X_val, y_val)
    logits = torch.from_numpy(classifier._compute_logits(X_val))
    loss = F.cross_entropy(logits, torch.tensor([0, 1, 0, 1, 0]))
    assert_allclose(last["validation_loss"], loss, rtol=1e-5)
    assert classifier.best_validation_score_ == max(
        e["validation_score"] for e in classifier.history_
    )


def test_the_history_is_plain_data(images):
    """A dict an epoch, of numbers that JSON knows."""
    classifier = make_classifier(max_epochs=3).fit(*images)
    frame = pd.DataFrame(json.loads(json.dumps(classifier.history_)))
    assert list(frame.columns) == [
        *("epoch", "train_loss", "train_score", "validation_loss", "validation_score"),
        *("learning_rate", "backbone_learning_rate", "seconds", "images_per_second"),
    ]
    assert list(frame["epoch"]) == [1, 2, 3]
    assert frame["validation_loss"].isna().all()
    assert classifier.best_validation_score_ is None
    assert classifier.n_iter_ == 3
    assert_allclose(frame["learning_rate"], [1e-3, 7.5e-4, 2.5e-4])
    assert_allclose(frame["backbone_learning_rate"], frame["learning_rate"] / 10)
    assert (frame["seconds"] > 0).all()


# Interruption -----------------------------------------------------------------------------------


def interrupted_at(count):
    """Make an augmentation during which somebody presses Ctrl-C."""
    calls = []

    def augment(image):
        calls.append(image)
        if len(calls) == count:
            raise KeyboardInterrupt
        return image

    return augment


@pytest.mark.parametrize(("count", "epochs"), [(1, 0), (5, 0), (9, 1), (17, 2), (24, 2)])
def test_what_was_learned_before_an_interruption_is_kept(images, count, epochs):
    """With a warning, and the history of the epochs that came to their end."""
    X, y = images
    classifier = make_classifier(augment=interrupted_at(count), max_epochs=3)
    words = f"interrupted in epoch {epochs + 1}; what was learned so far is kept"
    with pytest.warns(UserWarning, match=words):
        classifier.fit(X, y)
    assert classifier.n_iter_ == len(classifier.history_) == epochs
    whole = make_classifier(augment=interrupted_at(99), max_epochs=3).fit(X, y)
    assert [epoch["train_loss"] for epoch in classifier.history_] == [
        epoch["train_loss"] for epoch in whole.history_[:epochs]
    ]
    assert np.isfinite(classifier.predict_proba(X)).all()
    assert not classifier.module_.training


def test_an_interruption_leaves_the_best_network(images, planted):
    """With early stopping, that is what there is to keep."""
    X, y = images
    states = planted(0.9, 0.1)
    classifier = make_classifier(augment=interrupted_at(20), max_epochs=3, early_stopping=True)
    with pytest.warns(UserWarning, match="interrupted in epoch 3"):
        classifier.fit(X, y, X_val=X[:2], y_val=y[:2])
    assert_same_state(state_of(classifier), states[0])


def test_a_training_that_was_interrupted_goes_on(images):
    """By a warm start."""
    X, y = images
    classifier = make_classifier(augment=interrupted_at(9), max_epochs=3, warm_start=True)
    with pytest.warns(UserWarning, match="interrupted"):
        classifier.fit(X, y)
    classifier.set_params(augment=None).fit(X, y)
    assert [epoch["epoch"] for epoch in classifier.history_] == [1, 2, 3, 4]


# Going on ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("pickled", [False, True])
def test_partial_fits_are_a_bare_loop(images, optimizer, pickled):
    """At constant learning rates, with moments that go on, also through a pickle."""
    X, y = images
    batch = torch.stack([to_16_pixels(Image.fromarray(image)) for image in X])
    targets = torch.tensor([0, 1] * 4)
    params = {"batch_size": 8, "augment": None, "optimizer": optimizer, "warmup_epochs": 3, **RATES}
    classifier = make_classifier(**params).partial_fit(X, y, classes=["dark", "light"])
    net = make_plain()
    head = make_classifier(**params | {"learning_rate": 1e-30, "backbone_learning_rate": 1e-30})
    head = head.set_params(weight_decay=0, max_epochs=1, warmup_epochs=0).fit(X, y)
    net.fc = torch.nn.Linear(16, 2)
    net.load_state_dict(state_of(head))
    groups = [
        {"params": list(net.fc.parameters()), "lr": 0.02},
        {"params": [p for n, p in net.named_parameters() if n[:3] != "fc."], "lr": 0.01},
    ]
    make = {
        "adamw": lambda: torch.optim.AdamW(groups, weight_decay=1e-4),
        "sgd": lambda: torch.optim.SGD(groups, momentum=0.9, nesterov=True, weight_decay=1e-4),
    }
    by_hand = make[optimizer]()
    for number in range(6):
        by_hand.zero_grad()
        F.cross_entropy(net(batch), targets).backward()
        by_hand.step()
        if number:
            if pickled:
                classifier = pickle.loads(pickle.dumps(classifier))
            classifier.partial_fit(X, y)
    for (path, value), expected in zip(
        state_of(classifier).items(), net.state_dict().values(), strict=True
    ):
        assert_allclose(value, expected, rtol=1e-3, atol=1e-4, err_msg=path)
    assert [epoch["epoch"] for epoch in classifier.history_] == [1, 2, 3, 4, 5, 6]
    assert {epoch["learning_rate"] for epoch in classifier.history_} == {0.02}


def test_partial_fit_needs_to_know_the_classes(images):
    """Of the first call on; a call may bring one of them only."""
    X, y = images
    with pytest.raises(ValueError, match="classes must be passed on the first call"):
        make_classifier().partial_fit(X, y)
    classifier = make_classifier().partial_fit(X[:1], y[:1], classes=["light", "dark"])
    assert_array_equal(classifier.classes_, ["dark", "light"])
    classifier.partial_fit(X, y, classes=["dark", "light"])
    with pytest.raises(ValueError, match="are not those of the first call"):
        classifier.partial_fit(X, y, classes=["dark", "bright"])
    with pytest.raises(ValueError, match=r"none of the classes: \['bright'\]"):
        classifier.partial_fit(X[:1], ["bright"])
    with pytest.raises(ValueError, match="one class"):
        make_classifier().partial_fit(X[:1], y[:1], classes=["dark"])


def test_partial_fit_goes_on_from_fit_and_anew_with_other_blocks(images):
    """Moments of other parameters are of no use."""
    X, y = images
    classifier = make_classifier().fit(X, y)
    before = copy_of(state_of(classifier))
    classifier.partial_fit(X, y).set_params(unfreeze=None).partial_fit(X, y)
    classifier.set_params(unfreeze="all", optimizer="sgd").partial_fit(X, y)
    assert classifier.n_iter_ == 5
    assert not torch.equal(before["fc.weight"], state_of(classifier)["fc.weight"])


def test_partial_fit_takes_the_learning_rates_of_now(images):
    """Not those that the optimizer had when its moments were kept."""
    X, y = images
    classifier = make_classifier().partial_fit(X, y, classes=["dark", "light"])
    classifier.set_params(learning_rate=0.5, backbone_learning_rate=0.25).partial_fit(X, y)
    rates = [(e["learning_rate"], e["backbone_learning_rate"]) for e in classifier.history_]
    assert rates == [(1e-3, 1e-4), (0.5, 0.25)]


def test_fit_begins_anew_without_a_warm_start(images):
    """Other classes and all."""
    X, y = images
    classifier = make_classifier().fit(X, y)
    first = copy_of(state_of(classifier))
    assert_same_state(state_of(classifier.fit(X, y)), first)
    classifier.fit(X, [0, 1, 2, 3] * 2)
    assert_array_equal(classifier.classes_, [0, 1, 2, 3])
    assert classifier.predict_proba(X).shape == (8, 4)
    assert classifier.n_iter_ == 2


def test_a_warm_start_goes_on(images):
    """From the weights that are there, with epochs that count on."""
    X, y = images
    classifier = make_classifier(warm_start=True, optimizer="sgd").fit(X, y)
    old, state = classifier.module_, copy_of(state_of(classifier))
    classifier.set_params(learning_rate=1e-30, backbone_learning_rate=1e-30, weight_decay=0)
    classifier.fit(X, y)
    assert classifier.module_ is not old
    torch.testing.assert_close(dict(state_of(classifier)), state)
    assert [epoch["epoch"] for epoch in classifier.history_] == [1, 2, 3, 4]
    assert classifier.n_iter_ == 4


def test_blocks_are_unfrozen_one_after_the_other(images):
    """By warm starts: what is frozen stays as the one before left it."""
    X, y = images
    classifier = make_classifier(make_plain(norm=True), warm_start=True, unfreeze=None)
    before = copy_of(state_of(classifier.fit(X, y)))
    for unfreeze, trained in [
        ("hidden", ("hidden.", "fc.")),
        (["blocks.1"], ("blocks.1.", "fc.")),
        (None, ("fc.",)),
    ]:
        classifier.set_params(unfreeze=unfreeze).fit(X, y)
        for name, value in state_of(classifier).items():
            assert torch.equal(value, before[name]) is not name.startswith(trained), name
        before = copy_of(state_of(classifier))
    assert classifier.n_iter_ == 8


@pytest.mark.parametrize(
    "change",
    [
        {"backbone": "resnet18"},
        {"weights": "IMAGENET1K_V1"},
        {"head": "append"},
        {"image_size": 64},
        {"resize": "pad"},
    ],
    ids=str,
)
@pytest.mark.parametrize("method", ["fit", "partial_fit"])
def test_another_network_cannot_go_on(change, method):
    """What the network comes from is settled when it begins."""
    X, y = make_images(4, 32)
    classifier = make_classifier("squeezenet1_1", unfreeze=None, warm_start=True).fit(X, y)
    (name,) = change
    with pytest.raises(ValueError, match=f"{name} was .* when the training began, and is"):
        getattr(classifier.set_params(**change), method)(X, y)


def test_a_warm_start_has_no_new_classes(images):
    """Fewer are fine."""
    X, y = images
    classifier = make_classifier(warm_start=True).fit(X, y)
    classifier.fit(X[:1], y[:1])
    assert len(classifier.classes_) == 2
    with pytest.raises(ValueError, match=r"y has labels that are none of the classes: \['new'\]"):
        classifier.fit(X, ["new"] * 8)


# Labels and predictions -------------------------------------------------------------------------

LABELS = {
    "str": np.array(["b", "a"] * 4),
    "list of str": ["b", "a"] * 4,
    "int": np.array([7, -3] * 4),
    "uint8": np.array([7, 3] * 4, dtype=np.uint8),
    "bool": np.array([True, False] * 4),
    "object": np.array(["b", "a"] * 4, dtype=object),
    "float": np.array([1.0, 0.0] * 4),
    "Series": pd.Series(["b", "a"] * 4, index=range(10, 18)),
    "Categorical": pd.Series(["b", "a"] * 4, dtype="category"),
}


@pytest.mark.parametrize("kind", LABELS)
def test_labels_come_back_as_they_came(kind):
    """In their own type; `classes_` is sorted."""
    X, _ = make_images()
    y = LABELS[kind]
    classifier = make_classifier(make_plain(norm=True), max_epochs=15, **RATES).fit(X, y)
    predicted = classifier.predict(X)
    assert_array_equal(predicted, np.asarray(y))
    assert predicted.dtype == np.asarray(y).dtype
    assert_array_equal(classifier.classes_, sorted(set(y)))
    assert classifier.score(X, y) == 1


@pytest.mark.parametrize("n_classes", [2, 3])
def test_probabilities_are_those_of_the_network_run_by_hand(scene_paths, n_classes):
    """Through the preprocessing of the weights, as torchvision has it."""
    y = np.arange(12) % n_classes
    classifier = make_classifier("squeezenet1_1", image_size=None, unfreeze=None, max_epochs=1)
    classifier.fit(scene_paths, y)
    transform = models.SqueezeNet1_1_Weights.DEFAULT.transforms()
    logits = []
    for path in scene_paths:
        with Image.open(path) as image, torch.no_grad():
            logits.append(classifier.module_(transform(image.convert("RGB"))[None])[0])
    logits = torch.stack(logits).double()
    probabilities = classifier.predict_proba(scene_paths)
    assert probabilities.dtype == np.float64
    assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-12)
    assert_allclose(probabilities, logits.softmax(1), rtol=1e-4)
    decision = classifier.decision_function(scene_paths)
    expected = logits if n_classes == 3 else logits[:, 1] - logits[:, 0]
    assert_allclose(decision, expected, rtol=1e-3, atol=1e-5)
    assert_array_equal(classifier.predict(scene_paths), logits.argmax(1))


# Input ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("augment", [None, "flip", "crop"])
def test_every_kind_of_input_learns_the_same(tmp_path, augment):
    """Paths, pictures, arrays, columns: pixels decide."""
    X, y = make_images()
    paths = [tmp_path / f"{number}.png" for number in range(8)]
    for path, pixels in zip(paths, X, strict=True):
        Image.fromarray(pixels).save(path)
    kinds = {
        "paths": paths,
        "pictures": [Image.fromarray(pixels) for pixels in X],
        "one array": np.stack(X),
        "channels first": np.moveaxis(np.stack(X), -1, 1),
        "tensor": torch.from_numpy(np.stack(X)),
        "Series": pd.Series(map(str, paths)),
        "DataFrame": pd.DataFrame({"path": map(str, paths)}),
        "bytes": [path.read_bytes() for path in paths],
    }
    expected = make_classifier(augment=augment).fit(X, y)
    for kind, images in kinds.items():
        classifier = make_classifier(augment=augment).fit(images, y)
        assert_same_state(state_of(classifier), state_of(expected))
        assert_array_equal(classifier.predict_proba(images), expected.predict_proba(X), kind)


def test_rows_of_a_table_are_images_of_a_shape():
    """The digits of scikit-learn; columns are remembered."""
    X, y = load_digits(n_class=2, return_X_y=True, as_frame=True)
    X, y = X[:60] / 16, y[:60]
    params = {"image_shape": (8, 8), "max_epochs": 8, "batch_size": 16, **RATES}
    classifier = make_classifier(make_plain(norm=True), **params).fit(X, y)
    assert classifier.score(X, y) > 0.9
    assert classifier.n_features_in_ == 64
    assert_array_equal(classifier.feature_names_in_, X.columns)
    with pytest.raises(ValueError, match="feature names"):
        classifier.predict(X[X.columns[::-1]])
    with pytest.raises(ValueError, match="X has 32 features, but FineTuneClassifier is expecting"):
        classifier.fit(X.to_numpy(), y).predict(X.to_numpy()[:, :32])
    classifier.fit(X, y)
    with pytest.raises(ValueError, match="feature names"):
        classifier.fit(X, y, X_val=X[X.columns[::-1]], y_val=y)


# Errors -----------------------------------------------------------------------------------------

X8, Y8 = make_images()
ERRORS = {
    "no labels": ({"y": None}, "requires y to be passed"),
    "one class": ({"y": ["a"] * 8}, "y has one class, .*'a'.*, and a classifier needs at least 2"),
    "too few labels": ({"y": ["a", "b"]}, r"inconsistent numbers of samples: \[8, 2\]"),
    "labels that are measures": ({"y": np.linspace(0, 1, 8)}, "Unknown label type"),
    "labels that are no numbers": ({"y": [0, 1, np.nan, 1] * 2}, "y contains NaN"),
    "labels in two columns": ({"y": np.ones((8, 2))}, "y should be a 1d array"),
    "no images": ({"X": [], "y": []}, "X is empty|0 sample|no image|at least one"),
    "one image": ({"X": X8[0]}, "X of shape .* looks like one colour image"),
    "weights of NaN": ({"sample_weight": [1.0] * 7 + [np.nan]}, "sample_weight contains NaN"),
    "infinite weights": ({"sample_weight": [1.0] * 7 + [np.inf]}, "sample_weight contains infi"),
    "negative weights": ({"sample_weight": [1.0] * 7 + [-1]}, "Negative values in data.*sample_w"),
    "no weights": ({"sample_weight": [0.0] * 8}, "sample_weight is zero for every image"),
    "too few weights": (
        {"sample_weight": [1.0]},
        r"sample_weight has shape \(1,\), and \(8,\) is expected: one weight an image",
    ),
    "a matrix of weights": (
        {"sample_weight": np.ones((8, 1))},
        r"sample_weight has shape \(8, 1\), and \(8,\) is expected",
    ),
    "X_val alone": ({"X_val": X8}, "X_val and y_val go together"),
    "y_val alone": ({"y_val": Y8}, "X_val and y_val go together"),
    "too few labels to check": ({"X_val": X8, "y_val": Y8[:3]}, "inconsistent numbers of sam"),
    "new labels to check": (
        {"X_val": X8[:2], "y_val": ["dark", "grey"]},
        r"y_val has labels that are none of the classes: \['grey'\]. The classes are \['dark', 'l",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_data_that_does_not_go_together_is_refused(case):
    """With what came, and what is expected; nothing is learned from it."""
    changes, words = ERRORS[case]
    classifier = make_classifier()
    with pytest.raises(ValueError, match=words):
        classifier.fit(**{"X": X8, "y": Y8} | changes)
    assert not hasattr(classifier, "module_")


@pytest.mark.parametrize(
    ("y", "fraction", "words"),
    [
        (["a"] * 7 + ["b"], 0.25, "class .*'b'.* has one image, of which none can be set aside"),
        (["a", "b", "c", "d"] * 2, 0.1, "sets 1 of 8 images aside. As many as the 4 classes are"),
        (["a", "b"] * 4, 0.95, "sets 8 of 8 images aside"),
    ],
)
def test_early_stopping_needs_images_to_set_aside(y, fraction, words):
    """Unless it is told what to check on."""
    params = {"early_stopping": True, "validation_fraction": fraction}
    with pytest.raises(ValueError, match=words):
        make_classifier(**params).fit(X8, y)
    classifier = make_classifier(**params).fit(X8, y, X_val=X8[:1], y_val=y[:1])
    assert classifier.best_validation_score_ is not None


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ("auto", "^class_weight must be a dict, 'balanced' or None; got 'auto'"),
        (3, "^class_weight must be a dict, .*; got 3"),
        ([1, 2], r"^class_weight must be a dict, .*; got \[1, 2\]"),
        ({"gray": 2}, "gray|not in class_weight"),
        ({"dark": -1}, "finite weights from 0 are expected"),
        ({"dark": np.nan}, "finite weights from 0 are expected"),
        ({"dark": 0, "light": 0}, "class_weight leaves no image a weight above 0"),
    ],
)
def test_class_weights_that_make_no_sense_are_refused(images, weights, words):
    """Rather than learned from."""
    with pytest.raises(ValueError, match=words):
        make_classifier(class_weight=weights).fit(*images)


@pytest.mark.parametrize("augment", [None, "flip", "crop", lambda image: image])
@pytest.mark.parametrize("where", ["X", "X_val"])
def test_an_image_that_cannot_be_read_is_named(scene_paths, scene_labels, tmp_path, augment, where):
    """Whether what it gives is kept or not."""
    bad = tmp_path / "bad.jpg"
    bad.write_text("no image")
    data = {"X": scene_paths, "y": scene_labels, "X_val": scene_paths, "y_val": scene_labels}
    data[where] = [*scene_paths[:11], str(bad)]
    classifier = make_classifier(augment=augment, unfreeze="hidden", max_epochs=3)
    with pytest.raises(ValueError, match=r"bad\.jpg"):
        classifier.fit(**data)
    classifier.fit(scene_paths, scene_labels)
    with pytest.raises(ValueError, match=r"bad\.jpg"):
        classifier.predict([str(bad)])


def test_a_device_that_is_not_there_is_refused(images):
    """Before anything is loaded."""
    with pytest.raises(ValueError, match="device 'cuda:99' cannot be used here"):
        make_classifier(device="cuda:99").fit(*images)


# Back to features -------------------------------------------------------------------------------


@pytest.mark.parametrize("layer", ["stage2", "features.12", ["stage1", "stage3"]])
def test_features_are_those_of_the_tuned_network(scene_paths, scene_labels, layer):
    """Through the preprocessing of the weights, read by torchvision's own extractor."""
    classifier = make_classifier("squeezenet1_1", image_size=None, unfreeze="stage2", max_epochs=1)
    classifier.fit(scene_paths, scene_labels)
    rows = classifier.to_extractor(layer).set_params(norm=None).fit_transform(scene_paths)
    nodes = {"stage2": "features.4", "stage1": "features.1", "stage3": "features.7"}
    names = [nodes.get(name, name) for name in ([layer] if isinstance(layer, str) else layer)]
    read = create_feature_extractor(classifier.module_, names)
    transform = models.SqueezeNet1_1_Weights.DEFAULT.transforms()
    expected = []
    for path in scene_paths:
        with Image.open(path) as image, torch.no_grad():
            maps = read(transform(image.convert("RGB"))[None])
        expected.append(np.concatenate([maps[name][0].mean((1, 2)).numpy() for name in names]))
    assert_allclose(rows, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("cache", ["memory", FeatureCache])
def test_rows_of_different_weights_are_never_mixed_up(scene_paths, scene_labels, cache):
    """Those of the stock weights, of the tuned ones, and of the same tuned further."""
    cache = cache if cache == "memory" else cache()
    stock = DeepFeatureExtractor(
        "squeezenet1_1", "stage4", weights=None, image_size=32, cache=cache, random_state=0
    )
    slow = {"learning_rate": 1e-3, "backbone_learning_rate": 1e-3}  # no ReLU may die of it
    classifier = make_classifier("squeezenet1_1", unfreeze="stage3", warm_start=True, **slow)

    def read(extractor):
        return extractor.set_params(cache=cache).fit_transform(scene_paths)

    def read_anew(extractor):
        return extractor.set_params(cache=None).fit_transform(scene_paths)

    extractors = [stock]
    rows = [read(stock)]
    for _ in range(2):
        extractors.append(classifier.fit(scene_paths, scene_labels).to_extractor("stage4"))
        rows.append(read(extractors[-1]))
    for place, extractor in enumerate(extractors):
        assert_allclose(rows[place], read_anew(extractor), rtol=1e-5, atol=1e-6)
        assert_array_equal(rows[place], read(extractor))
        for other in rows[:place]:
            assert np.abs(rows[place] - other).max() > 1e-4


def test_an_extractor_stays_as_it_is_when_the_classifier_learns_on(images):
    """It has a copy of the network."""
    X, y = images
    classifier = make_classifier(warm_start=True, **RATES).fit(X, y)
    extractor = classifier.to_extractor("hidden").set_params(cache=None)
    rows = extractor.fit_transform(X)
    classifier.fit(X, y)
    with torch.no_grad():
        classifier.module_.hidden.weight.zero_()
    assert_array_equal(extractor.fit_transform(X), rows)
    assert np.abs(rows).max() > 0


def test_an_extractor_works_like_its_classifier():
    """In batch size, precision, shape of rows and threads."""
    X, y = load_digits(n_class=2, return_X_y=True)
    params = {"image_shape": (8, 8), "batch_size": 16, "precision": "bfloat16", "num_workers": 2}
    classifier = make_classifier(**params, max_epochs=1).fit(X[:20] / 16, y[:20])
    extractor = classifier.to_extractor(["hidden", "fc"])
    assert {name: extractor.get_params()[name] for name in params} == params
    assert extractor.fit_transform(X[:5] / 16).shape == (5, 18)


# What is left behind ----------------------------------------------------------------------------


def test_no_gradients_are_left(images):
    """They are as large as what was trained."""
    module = make_classifier().fit(*images).module_
    assert all(value.grad is None for value in module.parameters())
    assert not module.training


def test_the_data_of_the_user_stays_as_it_was(images):
    """Images, labels and weights."""
    X, y = images
    weights = np.linspace(1, 2, 8)
    copies = [image.copy() for image in X], y.copy(), weights.copy()
    make_classifier(class_weight="balanced").fit(X, y, sample_weight=weights)
    assert_array_equal(np.stack(X), np.stack(copies[0]))
    assert_array_equal(y, copies[1])
    assert_array_equal(weights, copies[2])


def test_progress_is_shown_if_asked_for(images, capsys):
    """With the loss; else nothing is printed."""
    make_classifier(unfreeze="hidden", max_epochs=3).fit(*images).predict(images[0])
    assert capsys.readouterr() == ("", "")
    make_classifier(unfreeze="hidden", max_epochs=3, verbose=1).fit(*images).predict(images[0])
    shown = capsys.readouterr().err
    assert "frozen part" in shown
    assert "6/6" in shown
    assert "loss=" in shown
    assert "PlainNet" in shown


# What goes wrong leaves things as they were -------------------------------------------------------


def test_a_call_that_fails_leaves_the_optimizer_as_it_was(images):
    """Doing what the error says helps: the moments of the failed call are forgotten."""
    X, y = images
    params = {"augment": None, **RATES}
    classifier = make_classifier(**params).partial_fit(X, y, classes=["dark", "light"])
    undisturbed = pickle.loads(pickle.dumps(classifier)).partial_fit(X, y)
    classifier.set_params(learning_rate=1e20, backbone_learning_rate=1e20)
    with pytest.raises(ValueError, match="lower learning_rate"):
        classifier.partial_fit(X, y).partial_fit(X, y)
    classifier = make_classifier(**params).partial_fit(X, y, classes=["dark", "light"])
    with pytest.raises(ValueError, match=r"nowhere\.png"):
        classifier.partial_fit([*X[:7], "nowhere.png"], y)
    assert_same_state(state_of(classifier.partial_fit(X, y)), state_of(undisturbed))


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_what_diverges_in_the_last_step_is_an_error_too(images, optimizer):
    """No loss comes after it; weights that are no numbers would classify anything as "dark"."""
    X, y = images
    rates = {"learning_rate": 1e36, "backbone_learning_rate": 1e36}
    classifier = make_classifier(
        max_epochs=1, batch_size=8, optimizer=optimizer, schedule="constant", **rates
    )
    with pytest.raises(ValueError, match=r"became .* in epoch 1: lower learning_rate"):
        classifier.fit(X, y, X_val=X, y_val=y)
    assert not hasattr(classifier, "module_")


def test_columns_are_those_of_the_last_training_that_went_well():
    """A table of another width fails, and is forgotten."""
    X, y = load_digits(n_class=2, return_X_y=True)
    X, y = X[:12] / 16, y[:12]
    classifier = make_classifier(image_shape=(8, -1), warm_start=True).fit(X, y)
    with pytest.raises(ValueError, match="X has 56 features, but FineTuneClassifier is expecting"):
        classifier.fit(X[:, :56], y)
    new = make_classifier(image_shape=(8, -1)).fit(X, y)
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        new.fit(X[:, :56], y[:5])
    for fitted in (classifier, new):
        assert fitted.n_features_in_ == 64
        assert len(fitted.predict(X)) == 12


def test_gradients_are_on_whatever_the_caller_has_set(images):
    """In inference mode too; and what is loaded there can be trained elsewhere."""
    X, y = images
    with torch.inference_mode():
        inside = make_classifier("squeezenet1_0", unfreeze="features.12").fit(X, y)
    outside = make_classifier("squeezenet1_0", unfreeze="features.12").fit(X, y)
    assert_same_state(state_of(inside), state_of(outside))
    with torch.no_grad():
        assert_same_state(
            state_of(make_classifier().fit(X, y)), state_of(make_classifier().fit(X, y))
        )


# Weights and splits -------------------------------------------------------------------------------


def test_partial_fits_keep_the_scale_of_weights(images):
    """Half the weight of all classes is half the learning rate, for SGD; `fit` scales to mean 1."""
    X, y = images
    params = {"optimizer": "sgd", "augment": None, "weight_decay": 0}
    half = make_classifier(class_weight={"dark": 0.5, "light": 0.5}, **params, **RATES)
    rates = {name: rate / 2 for name, rate in RATES.items()}
    slow = make_classifier(**params, **rates)
    for classifier in (half, slow):
        classifier.partial_fit(X, y, classes=["dark", "light"])
    for mine, other in zip(state_of(half).values(), state_of(slow).values(), strict=True):
        assert_allclose(mine, other, rtol=1e-5, atol=1e-7)
    assert_same_state(
        state_of(half.fit(X, y)), state_of(make_classifier(**params, **RATES).fit(X, y))
    )
    with pytest.raises(ValueError, match="class_weight='balanced' is not possible with partial"):
        make_classifier(class_weight="balanced").partial_fit(X, y, classes=["dark", "light"])


def test_a_warm_start_sets_the_same_images_aside(monkeypatch):
    """Also without a `random_state`: else images that were learned from would judge."""
    splits = []
    weigh = _classifier.weigh

    def note(images, classes, class_weight):
        splits.append([record.index for record in images.records])
        return weigh(images, classes, class_weight)

    monkeypatch.setattr(_classifier, "weigh", note)
    X, y = make_images(20)
    params = {"random_state": None, "early_stopping": True, "validation_fraction": 0.3}
    classifier = make_classifier(warm_start=True, **params).fit(X, y).fit(X, y)
    assert splits[0] == splits[1]
    classifier.set_params(warm_start=False).fit(X, y)
    assert splits[2] != splits[0]


# Networks and images of one's own -----------------------------------------------------------------


def test_weights_shared_with_a_frozen_module_cannot_be_trained(images):
    """They would be trained and frozen at once."""
    net = make_plain()
    net.blocks[2][0].bias = net.blocks[1][0].bias
    with pytest.raises(ValueError, match=r"blocks\.2\.0\.bias is shared between a module that is"):
        make_classifier(net, unfreeze="blocks.2").fit(*images)


def test_an_augmentation_gives_pictures(images):
    """Grey ones become RGB; what is none is named."""
    grey = transforms.Grayscale()
    classifier = make_classifier("squeezenet1_0", unfreeze=None, augment=grey).fit(*images)
    assert classifier.n_iter_ == 2
    with pytest.raises(ValueError, match=r"X\[\d\] .*augment gave a Tensor, and a PIL image is"):
        make_classifier(augment=transforms.ToTensor()).fit(*images)


def test_what_is_wrong_with_validation_images_is_said_of_them(images):
    """Not of X and y."""
    X, y = images
    for params, words in (
        ({"X_val": [], "y_val": []}, "X_val and y_val: X is empty"),
        ({"X_val": X, "y_val": y[:3]}, "X_val and y_val: .*inconsistent numbers"),
        ({"X_val": X[:2], "y_val": [0.0, np.nan]}, "Input y_val contains NaN"),
        ({"X_val": X[:2], "y_val": [0.5, 1.5]}, "y_val: Unknown label type"),
        ({"X_val": ["nowhere.png"], "y_val": y[:1]}, r"X_val\[0\] \('nowhere.png'\)"),
    ):
        with pytest.raises(ValueError, match=words):
            make_classifier().fit(X, y, **params)


def test_auxiliary_classifiers_need_images_of_some_size(images):
    """Inception's takes no maps of images of 96 pixels: it is left out, with a warning."""
    params = {"image_size": 96, "unfreeze": "Mixed_6e", "max_epochs": 1}
    classifier = make_classifier("inception_v3", **params)
    with pytest.warns(UserWarning, match="too small for the auxiliary classifiers of Inception3"):
        classifier.fit(*images)
    assert classifier.module_.AuxLogits is None


class NetWithAux1(PlainNet):
    """A network with a hidden layer of that name."""

    def __init__(self):
        super().__init__()
        self.aux1 = self.hidden
        del self.hidden

    def forward(self, batch):
        return self.fc(self.aux1(self.blocks(batch).flatten(1)).relu())


def test_a_module_called_like_an_auxiliary_classifier_is_none(images):
    """Of a network that is neither GoogLeNet nor Inception."""
    net = NetWithAux1()
    classifier = make_classifier(net).fit(*images)
    assert classifier.module_.aux1 is not None
