"""Tests of several labels per image: the loss of a bare loop, weights, predictions, scorers."""

import pickle
from functools import partial

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image
from scipy.sparse import csr_array
from scipy.special import expit
from sklearn.base import clone
from sklearn.metrics import (
    accuracy_score,
    average_precision_score,
    f1_score,
    get_scorer,
    log_loss,
    roc_auc_score,
)
from sklearn.model_selection import GridSearchCV
from sklearn.utils.estimator_checks import check_classifier_multioutput
from torch.nn import functional as F

from deepfeat import FineTuneClassifier
from deepfeat._finetuning import classifier as _classifier
from deepfeat._finetuning.labels import hold_out
from deepfeat._finetuning.training import Trainer

Y = np.array(
    [[1, 0, 1], [0, 0, 1], [1, 1, 0], [0, 0, 0], [1, 0, 0], [0, 1, 1], [1, 1, 1], [0, 0, 1]]
)
WEIGHTS = np.array([1.0, 0.5, 2.0, 0.25, 3.0, 1.0, 1.0, 4.0])


@pytest.fixture
def X(make_images):
    """Eight images of noise."""
    return make_images()[0]


@pytest.fixture
def train_by_hand(X, make_plain, start_of, to_16_pixels):
    """Train in full batches with the loss of torch, from the start of a classifier's training."""

    def train_by_hand(epochs, weights=1.0, smoothing=0.0):
        net = start_of(Y, backbone=make_plain())
        inputs = torch.stack([to_16_pixels(Image.fromarray(pixels)) for pixels in X])
        weights = torch.as_tensor(weights, dtype=torch.float32).broadcast_to(Y.shape)
        targets = torch.tensor(Y).float() * (1 - smoothing) + smoothing / 2
        optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, nesterov=True)
        net.train().requires_grad_(True)
        losses = []
        for _ in range(epochs):
            optimizer.zero_grad()
            each = F.binary_cross_entropy_with_logits(net(inputs), targets, reduction="none")
            loss = (each * weights).sum() / weights.sum()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return net, losses

    return train_by_hand


def balance(labels):
    """Return the weights that make 0 and 1 of each label count the same."""
    return np.where(labels, 0.5 / labels.mean(0), 0.5 / (1 - labels.mean(0)))


CASES = {
    "plain": ({}, {}, {}),
    "label smoothing": ({"label_smoothing": 0.2}, {}, {"smoothing": 0.2}),
    "sample weights": ({}, {"sample_weight": WEIGHTS}, {"weights": WEIGHTS[:, None]}),
    "class weights": (
        {"class_weight": {0: 0.5, 1: 3.0}},
        {},
        {"weights": np.where(Y, 3.0, 0.5)},
    ),
    "balanced": ({"class_weight": "balanced"}, {}, {"weights": balance(Y)}),
    "all at once": (
        {"class_weight": "balanced", "label_smoothing": 0.1},
        {"sample_weight": WEIGHTS},
        {"weights": balance(Y) * WEIGHTS[:, None], "smoothing": 0.1},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_weights_are_those_of_a_bare_loop(
    case, X, train_by_hand, make_classifier, make_plain, state_of
):
    """The network, and the losses of all epochs."""
    params, options, recipe = CASES[case]
    net, losses = train_by_hand(10, **recipe)
    classifier = make_classifier(
        make_plain(), max_epochs=10, batch_size=8, augment=None, weight_decay=0, optimizer="sgd",
        schedule="constant", learning_rate=0.1, backbone_learning_rate=0.1, **params,
    ).fit(X, Y, **options)  # fmt: skip
    assert_allclose([epoch["train_loss"] for epoch in classifier.history_], losses, rtol=1e-4)
    for (path, value), expected in zip(
        state_of(classifier).items(), net.state_dict().values(), strict=True
    ):
        assert_allclose(value, expected, rtol=1e-3, atol=1e-4, err_msg=path)


def test_predictions_follow_from_logits(X, make_classifier):
    """A label is predicted if its probability is above one half."""
    classifier = make_classifier(max_epochs=3).fit(X, Y)
    logits = classifier.decision_function(X)
    assert logits.shape == (8, 3)
    assert_allclose(classifier.predict_proba(X), expit(logits))
    predictions = classifier.predict(X)
    assert predictions.dtype == np.int64
    assert_array_equal(predictions, logits > 0)
    assert_array_equal(classifier.classes_, [0, 1, 2])
    assert classifier.score(X, Y) == (predictions == Y).all(axis=1).mean()


def test_labels_are_learned(make_classifier, make_plain):
    """Of images that show them: a label is a colour that is bright."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, (48, 3))
    images = rng.integers(0, 60, (48, 16, 16, 3)) + 180 * labels[:, None, None, :]
    params = {"learning_rate": 0.01, "backbone_learning_rate": 0.01, "max_epochs": 60}
    classifier = make_classifier(make_plain(norm=True), batch_size=8, augment=None, **params)
    images = list(images.astype(np.uint8))
    classifier.fit(images[:32], labels[:32])
    assert classifier.score(images[32:], labels[32:]) > 0.9
    assert classifier.history_[-1]["train_score"] > 0.9


def test_scikit_learn_finds_predictions_consistent(make_classifier):
    """Its own check of classifiers with several outputs."""
    assert clone(make_classifier()).__sklearn_tags__().classifier_tags.multi_label
    images = [np.full((16, 16, 3), value, np.uint8) for value in range(0, 252, 6)]

    class OfImages(FineTuneClassifier):
        """A classifier of images that stand for the rows of the check."""

        def fit(self, X, y):
            return super().fit(images, y)

        def decision_function(self, X):
            return super().decision_function(images)

        def predict(self, X):
            return super().predict(images)

        def predict_proba(self, X):
            return super().predict_proba(images)

    params = make_classifier().get_params(deep=False)
    check_classifier_multioutput("FineTuneClassifier", OfImages(**params))


RANKINGS = {"roc_auc": roc_auc_score, "average_precision": average_precision_score}
SCORES = RANKINGS | {"accuracy": accuracy_score, "f1_macro": partial(f1_score, average="macro")}


@pytest.mark.parametrize("name", SCORES)
@pytest.mark.parametrize("n_labels", [2, 3])
def test_a_scorer_sees_the_predictions_of_the_classifier(name, n_labels, X, make_classifier):
    """With two labels, too, which are not two classes; validation images are scored the same."""
    labels = Y[:, :n_labels]
    params = {"early_stopping": True, "n_iter_no_change": 5, "scoring": name, "max_epochs": 4}
    classifier = make_classifier(**params).fit(X, labels, X_val=X, y_val=labels)
    score = get_scorer(name)(classifier, X, labels)
    assert_allclose(classifier.best_validation_score_, score, rtol=1e-6)
    given = classifier.predict_proba(X) if name in RANKINGS else classifier.predict(X)
    assert_allclose(score, SCORES[name](labels, given))


def test_the_validation_loss_is_the_mean_over_labels(X, make_classifier):
    """As scikit-learn computes it of each label."""
    classifier = make_classifier(max_epochs=1).fit(X, Y, X_val=X, y_val=Y)
    proba = classifier.predict_proba(X)
    losses = [log_loss(Y[:, label], proba[:, label]) for label in range(3)]
    assert_allclose(classifier.history_[0]["validation_loss"], np.mean(losses), rtol=1e-5)
    assert classifier.history_[0]["validation_score"] == classifier.score(X, Y)


def test_early_stopping_holds_images_out(X, make_classifier, monkeypatch):
    """At random: labels cannot be stratified."""
    params = {"early_stopping": True, "validation_fraction": 0.25, "max_epochs": 3}
    held_out = []

    def note(*args):
        training, validation = hold_out(*args)
        held_out.append([record.index for record in validation.records])
        assert len(training) == 6
        return training, validation

    monkeypatch.setattr(_classifier, "hold_out", note)
    for seed in range(4):
        classifier = make_classifier(**params, random_state=seed).fit(X, Y)
        assert classifier.best_validation_score_ is not None
    assert len(set(map(tuple, held_out))) > 2
    assert {len(indices) for indices in held_out} == {2}
    with pytest.raises(ValueError, match=r"validation_fraction must leave an image; 0.99"):
        make_classifier(early_stopping=True, validation_fraction=0.99).fit(X, Y)


FORMS = {
    "bool": Y.astype(bool),
    "float": Y.astype(float),
    "list": Y.tolist(),
    "sparse": csr_array(Y),
    "uint8": Y.astype(np.uint8),
}


@pytest.mark.parametrize("form", FORMS)
def test_labels_have_any_form_of_an_indicator_matrix(
    form, X, make_classifier, state_of, assert_same_state
):
    """And are the same labels."""
    expected = make_classifier().fit(X, Y)
    classifier = make_classifier().fit(X, FORMS[form])
    assert_same_state(state_of(classifier), state_of(expected))


def test_labels_may_be_a_table(X, make_classifier, state_of, assert_same_state):
    """Of which the columns are labels."""
    pandas = pytest.importorskip("pandas")
    classifier = make_classifier().fit(X, pandas.DataFrame(Y, columns=["sky", "sea", "sand"]))
    assert_same_state(state_of(classifier), state_of(make_classifier().fit(X, Y)))


def test_a_label_may_be_the_same_for_all_images(X, make_classifier):
    """Balanced, it weighs the same for all of them."""
    labels = Y.copy()
    labels[:, 1] = 0
    for class_weight in (None, "balanced", {0: 1, 1: 2}, {1: 2}):
        classifier = make_classifier(class_weight=class_weight).fit(X, labels)
        assert np.isfinite(classifier.predict_proba(X)).all()


WRONG = {
    "numbers": ({"y": Y * 2}, r"y must contain only 0 and 1 .* per label; got \[0, 2\]"),
    "signs": ({"y": 2 * Y - 1}, r"y must contain only 0 and 1 .* got \[-1, 1\]"),
    "outputs": ({"y": Y + np.arange(3)}, "y must have one class .*MultiLabelBinarizer"),
    "too few": ({"y": Y[:5]}, "inconsistent numbers of samples"),
    "names": ({"y": [("a",), ("b", "c")] * 4}, "y must have one class .*MultiLabelBinarizer"),
    "NaN": ({"y": Y * np.array([1, np.nan, 1])}, "y must have one class .*MultiLabelBinarizer"),
    "halves": ({"y": Y / 2}, "y must have one class .*MultiLabelBinarizer"),
    "one sparse column": (
        {"y": csr_array(Y[:, :1])},
        "y must have one class .*MultiLabelBinarizer",
    ),
    "weights": ({"sample_weight": np.ones(Y.shape)}, r"sample_weight must have shape \(8,\)"),
    "validation": ({"X_val": [0] * 8, "y_val": Y[:, :2]}, r"y_val must have shape \(8, 3\)"),
    "one class": ({"X_val": [0] * 8, "y_val": Y[:, 0]}, r"y_val must have shape \(8, 3\)"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_labels_are_named(case, X, make_classifier):
    """With what is allowed."""
    arguments, words = WRONG[case]
    arguments = {"y": Y} | arguments
    if "X_val" in arguments:
        arguments["X_val"] = X
    with pytest.raises(ValueError, match=words):
        make_classifier().fit(X, **arguments)


@pytest.mark.parametrize(
    "weight", [{"sky": 2.0}, {0: -1, 1: 1}, {0: 0, 1: 0}, {2: 1}, {0: 1, 1: 2, 2: 9}, {1: "a"}]
)
def test_wrong_class_weights_are_named(weight, X, make_classifier):
    """They are those of 0 and 1."""
    with pytest.raises(ValueError, match="class_weight"):
        make_classifier(class_weight=weight).fit(X, Y)


def test_training_goes_on_with_the_same_labels(X, make_classifier):
    """By a warm start and by `partial_fit`; other labels, and classes, are refused."""
    classifier = make_classifier(warm_start=True).fit(X, Y).fit(X, Y)
    assert classifier.n_iter_ == 4
    for other, shape in ((Y[:, :2], r"\(8, 3\)"), (Y[:, 0], r"\(8, 3\)")):
        with pytest.raises(ValueError, match=f"y must have shape {shape}.*; got"):
            classifier.fit(X, other)
    single = make_classifier(warm_start=True).fit(X, Y[:, 0])
    with pytest.raises(ValueError, match=r"y must have shape \(8,\), like .*; got \(8, 3\)"):
        single.fit(X, Y)
    partial = make_classifier().partial_fit(X, Y, classes=[0, 1, 2]).partial_fit(X, Y)
    assert partial.n_iter_ == 2
    with pytest.raises(ValueError, match=r"y must have shape \(8, 3\)"):
        partial.partial_fit(X, Y[:, :2])
    with pytest.raises(ValueError, match=r"classes must be the indices of the labels, .*; got"):
        make_classifier().partial_fit(X, Y, classes=["sky", "sea", "sand"])


def test_a_classifier_is_kept(X, make_classifier, monkeypatch, tmp_path):
    """In a file, in a pickle, and in a checkpoint."""
    classifier = make_classifier("resnet10_slim", checkpoint=tmp_path / "checkpoints").fit(X, Y)
    classifier.save(tmp_path / "classifier.safetensors")
    monkeypatch.setattr(Trainer, "run_epoch", None)  # nothing is trained again
    others = [
        FineTuneClassifier.load(tmp_path / "classifier.safetensors"),
        pickle.loads(pickle.dumps(classifier)),
        make_classifier("resnet10_slim", checkpoint=tmp_path / "checkpoints").fit(X, Y),
    ]
    for other in others:
        assert_array_equal(other.predict_proba(X), classifier.predict_proba(X))
        assert_array_equal(other.predict(X), classifier.predict(X))
    monkeypatch.undo()
    others[0].set_params(warm_start=True).fit(X, Y)


def test_labels_go_with_a_search(X, make_classifier):
    """Which splits their rows."""
    search = GridSearchCV(
        make_classifier(), {"learning_rate": [1e-3, 1e-2]}, cv=2, scoring="f1_micro"
    )
    search.fit(np.stack(X), Y)
    assert search.predict(np.stack(X)).shape == (8, 3)


def test_a_warm_start_may_not_change_what_is_learned_unnoticed(X, make_classifier, make_images):
    """Two columns of one label and two classes have the same number of outputs."""
    classifier = make_classifier(warm_start=True).fit(X, Y[:, :2])
    with pytest.raises(ValueError, match=r"y must have shape \(8, 2\)"):
        classifier.fit(X, Y[:, 0])


def test_a_score_that_is_not_a_number_is_refused(X, make_classifier):
    """A ranking of a label that no validation image has would end early stopping at once."""
    labels = Y.copy()
    labels[:, 1] = 0
    with pytest.raises(ValueError, match=r"scoring must be .* got 'roc_auc': it is NaN"):
        make_classifier(scoring="roc_auc").fit(X, Y, X_val=X, y_val=labels)
