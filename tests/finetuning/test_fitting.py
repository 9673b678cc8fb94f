"""Tests of fitting: when training stops, which network it leaves, and what it reports."""

import json

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.testing import assert_allclose
from torch.nn import functional as F

from deepfeat._finetuning import training as _training


def copy_of(state):
    return {name: value.clone() for name, value in state.items()}


# Early stopping -----------------------------------------------------------------------------------


@pytest.fixture
def planted(monkeypatch):
    """Plant the validation scores; return the state of the network after each epoch."""

    def plant(*scores):
        states, remaining = [], list(scores)

        def evaluate(trainer, source):
            states.append(copy_of(trainer.module.state_dict()))
            return 1.0, remaining.pop(0)

        monkeypatch.setattr(_training.Trainer, "evaluate", evaluate)
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
    images,
    planted,
    scores,
    tol,
    patience,
    epochs,
    best,
    make_classifier,
    make_plain,
    assert_same_state,
    state_of,
):
    """And the network is that of the best epoch, including statistics."""
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


def test_without_early_stopping_scores_are_only_noted(
    images, planted, make_classifier, assert_same_state, state_of
):
    """The network of the last epoch is kept."""
    X, y = images
    states = planted(0.9, 0.1, 0.1, 0.2)
    classifier = make_classifier(max_epochs=4, n_iter_no_change=1)
    classifier.fit(X, y, X_val=X[:2], y_val=y[:2])
    assert classifier.n_iter_ == 4
    assert classifier.best_validation_score_ == 0.9
    assert_same_state(state_of(classifier), states[-1])


def test_validation_images_are_scored_as_the_classifier_would(
    images, make_images, make_classifier, make_plain
):
    """Loss and accuracy of the last epoch are those of the final network."""
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


def test_the_history_is_plain_data(images, make_classifier):
    """One dict per epoch, of values that JSON can hold."""
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


# Interruption -------------------------------------------------------------------------------------


def interrupted_at(count):
    """Make an augmentation that is interrupted by Ctrl-C."""
    calls = []

    def augment(image):
        calls.append(image)
        if len(calls) == count:
            raise KeyboardInterrupt
        return image

    return augment


@pytest.mark.parametrize(("count", "epochs"), [(1, 0), (5, 0), (9, 1), (17, 2), (24, 2)])
def test_what_was_learned_before_an_interruption_is_kept(images, count, epochs, make_classifier):
    """With a warning, and the history of the epochs that were completed."""
    X, y = images
    classifier = make_classifier(augment=interrupted_at(count), max_epochs=3)
    words = f"Training was interrupted in epoch {epochs + 1}; what has been learned so far is"
    with pytest.warns(UserWarning, match=words):
        classifier.fit(X, y)
    assert classifier.n_iter_ == len(classifier.history_) == epochs
    whole = make_classifier(augment=interrupted_at(99), max_epochs=3).fit(X, y)
    assert [epoch["train_loss"] for epoch in classifier.history_] == [
        epoch["train_loss"] for epoch in whole.history_[:epochs]
    ]
    assert np.isfinite(classifier.predict_proba(X)).all()
    assert not classifier.module_.training


def test_an_interruption_leaves_the_best_network(
    images, planted, make_classifier, assert_same_state, state_of
):
    """With early stopping, that of the best epoch is restored."""
    X, y = images
    states = planted(0.9, 0.1)
    classifier = make_classifier(augment=interrupted_at(20), max_epochs=3, early_stopping=True)
    with pytest.warns(UserWarning, match="interrupted in epoch 3") as caught:
        classifier.fit(X, y, X_val=X[:2], y_val=y[:2])
    assert [warning.filename for warning in caught] == [__file__]
    assert_same_state(state_of(classifier), states[0])


def test_a_training_that_was_interrupted_can_be_resumed(images, make_classifier):
    """By a warm start."""
    X, y = images
    classifier = make_classifier(augment=interrupted_at(9), max_epochs=3, warm_start=True)
    with pytest.warns(UserWarning, match="interrupted"):
        classifier.fit(X, y)
    classifier.set_params(augment=None).fit(X, y)
    assert [epoch["epoch"] for epoch in classifier.history_] == [1, 2, 3, 4]


# Progress and memory -----------------------------------------------------------------------------


def test_progress_is_shown_if_asked_for(images, capsys, make_classifier):
    """With the loss; otherwise nothing is printed."""
    make_classifier(unfreeze="hidden", max_epochs=3).fit(*images).predict(images[0])
    assert capsys.readouterr() == ("", "")
    make_classifier(unfreeze="hidden", max_epochs=3, verbose=1).fit(*images).predict(images[0])
    shown = capsys.readouterr().err
    assert "frozen part" in shown
    assert "6/6" in shown
    assert "loss=" in shown
    assert "PlainNet" in shown


def test_no_gradients_are_left(images, make_classifier):
    """They take as much memory as the trained weights."""
    module = make_classifier().fit(*images).module_
    assert all(value.grad is None for value in module.parameters())
    assert not module.training


# The head first -----------------------------------------------------------------------------------


def test_the_head_is_trained_alone_first(
    images, make_plain, make_classifier, assert_same_state, state_of
):
    """As by a fit of the head, and another fit that starts with what it has learned."""
    X, y = images
    params = {"augment": None, "early_stopping": False}
    both = make_classifier(
        make_plain(norm=True), unfreeze="blocks.2", head_epochs=3, max_epochs=2, **params
    ).fit(X, y, X_val=X, y_val=y)
    in_turn = make_classifier(make_plain(norm=True), unfreeze=None, max_epochs=3, **params)
    in_turn.fit(X, y, X_val=X, y_val=y)
    in_turn.set_params(unfreeze="blocks.2", max_epochs=2, warm_start=True)
    in_turn.fit(X, y, X_val=X, y_val=y)
    assert_same_state(state_of(both), state_of(in_turn))
    assert [epoch["epoch"] for epoch in both.history_] == [1, 2, 3, 4, 5]
    assert both.n_iter_ == 5
    for key in ("train_loss", "validation_score", "learning_rate"):
        assert [e[key] for e in both.history_] == [e[key] for e in in_turn.history_]


def test_neither_warm_up_nor_early_stopping_apply_to_the_head_alone(images, make_classifier):
    """They are of the training that follows."""
    params = {"warmup_epochs": 1, "max_epochs": 2, "head_epochs": 1, "early_stopping": True}
    params |= {"n_iter_no_change": 1, "tol": 1.0, "learning_rate": 0.01}
    classifier = make_classifier(unfreeze="blocks.2", **params)
    classifier.fit(*images, X_val=images[0], y_val=images[1])
    assert classifier.history_[0]["learning_rate"] == 0.01
    assert classifier.history_[1]["learning_rate"] < 0.01


def test_a_warm_start_and_partial_fits_have_no_head_epochs(images, make_classifier):
    """The head has been trained."""
    classifier = make_classifier(head_epochs=2, max_epochs=1, warm_start=True).fit(*images)
    assert classifier.n_iter_ == 3
    assert classifier.fit(*images).n_iter_ == 4
    assert classifier.partial_fit(*images).n_iter_ == 5


def test_after_an_interruption_the_rest_is_not_trained(images, make_classifier):
    """What the head has learned is kept."""
    params = {"augment": interrupted_at(13), "head_epochs": 3, "max_epochs": 2}
    classifier = make_classifier(unfreeze="blocks.2", **params)
    with pytest.warns(UserWarning, match="Training was interrupted in epoch 2"):
        classifier.fit(*images)
    assert classifier.n_iter_ == 1
