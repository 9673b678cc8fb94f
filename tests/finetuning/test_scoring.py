"""Tests of scores of validation images: those of scikit-learn, on what the network gives."""

import numpy as np
import pytest
from numpy.testing import assert_allclose
from sklearn.metrics import get_scorer


def name_of(scoring):
    return getattr(scoring, "__name__", str(scoring))


def score_by_hand(classifier, X, y):
    """Count the images of which the class is at all likely."""
    chosen = np.searchsorted(classifier.classes_, y)
    return float((classifier.predict_proba(X)[np.arange(len(y)), chosen] > 0.2).mean())


@pytest.mark.parametrize(
    "scoring",
    ["accuracy", "balanced_accuracy", "neg_log_loss", "roc_auc", "f1_macro", score_by_hand],
    ids=name_of,
)
def test_a_score_is_that_of_the_trained_classifier(make_images, make_classifier, scoring):
    """What scikit-learn says of the network after the last epoch."""
    X, y = make_images(12)
    classifier = make_classifier(scoring=scoring, max_epochs=2)
    classifier.fit(X[:8], y[:8], X_val=X[8:], y_val=y[8:])
    scorer = scoring if callable(scoring) else get_scorer(scoring)
    assert_allclose(
        classifier.history_[-1]["validation_score"], scorer(classifier, X[8:], y[8:]), rtol=1e-5
    )


def test_a_score_may_be_of_more_than_two_classes(make_images, make_classifier):
    """By probabilities of all of them."""
    X, _ = make_images(12)
    y = np.array(["a", "b", "c"] * 4)
    classifier = make_classifier(scoring="roc_auc_ovr", max_epochs=2).fit(X, y, X_val=X, y_val=y)
    expected = get_scorer("roc_auc_ovr")(classifier, X, y)
    assert_allclose(classifier.history_[-1]["validation_score"], expected, rtol=1e-5)


def test_of_losses_the_least_is_the_best(make_images, make_classifier):
    """And an epoch counts as an improvement if the loss falls, whatever the accuracy does."""
    X, y = make_images(12)
    classifier = make_classifier(scoring="loss", early_stopping=True, max_epochs=3)
    classifier.fit(X, y, X_val=X, y_val=y)
    losses = [epoch["validation_loss"] for epoch in classifier.history_]
    assert_allclose(
        [epoch["validation_score"] for epoch in classifier.history_], np.negative(losses)
    )
    assert classifier.best_validation_score_ == -min(losses)


def test_by_default_the_score_is_the_accuracy(make_images, make_classifier):
    """Weighted by the weights of images that are held out, as that of scikit-learn."""
    X, y = make_images(12)
    weights = np.linspace(1, 3, 12)
    params = {"early_stopping": True, "validation_fraction": 0.5, "max_epochs": 2}
    by_default, by_name = (
        make_classifier(scoring=scoring, **params).fit(X, y, weights).history_
        for scoring in (None, "accuracy")
    )
    for first, second in zip(by_default, by_name, strict=True):
        assert_allclose(first["validation_score"], second["validation_score"], rtol=1e-6)


@pytest.mark.parametrize(
    "scoring", ["nonsense", 3, "roc_auc", lambda classifier, X, y: 1 / 0], ids=name_of
)
def test_what_cannot_score_is_found_before_training(make_images, make_classifier, scoring):
    """Rather than after an epoch; "roc_auc" is for two classes."""
    X, _ = make_images(12)
    y = np.array(["a", "b", "c"] * 4)
    classifier = make_classifier(scoring=scoring)
    with pytest.raises(ValueError, match="scoring must be None, 'loss', or a scorer"):
        classifier.fit(X, y, X_val=X, y_val=y)
    assert not hasattr(classifier, "module_")
