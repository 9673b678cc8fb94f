"""LearningCurveDisplay: the artists, compared with values computed by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression

from deepfeat import FineTuneClassifier
from deepfeat.plotting import LearningCurveDisplay

HISTORY = [
    {
        "epoch": epoch,
        "train_loss": 2 * 0.8**epoch,
        "train_score": 1 - 0.5 * 0.7**epoch,
        "validation_loss": 2 * 0.85**epoch + 0.2,
        "validation_score": 1 - 0.55 * 0.8**epoch,
    }
    for epoch in range(1, 11)
]


def test_curves_are_the_history():
    """The loss is on the left, the score on the right, each for training and validation."""
    display = LearningCurveDisplay.from_estimator(SimpleNamespace(history_=HISTORY))
    left, right = display.axes_
    for axes, quantity, ylabel in ((left, "loss", "loss"), (right, "score", "accuracy")):
        assert axes.get_ylabel() == ylabel
        for line, name in zip(axes.lines, ("train", "validation"), strict=True):
            assert_array_equal(line.get_xdata(), range(1, 11))
            expected = [entry[f"{name}_{quantity}"] for entry in HISTORY]
            assert_array_equal(line.get_ydata(), expected)
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["training", "validation"]


@pytest.mark.parametrize("early_stopping", [False, True])
def test_a_fitted_classifier_shows_its_epochs(digits, early_stopping):
    """Its history has the entries that are plotted, with and without validation images."""
    classifier = FineTuneClassifier(
        "squeezenet1_1",
        weights=None,
        unfreeze=None,
        image_size=32,
        max_epochs=2,
        num_workers=0,
        early_stopping=early_stopping,
        validation_fraction=0.3,
        random_state=0,
    ).fit(digits[0][:40], digits[1][:40])
    display = LearningCurveDisplay.from_estimator(classifier)
    assert len(display.lines_) == (4 if early_stopping else 2)
    for name, line in display.lines_.items():
        assert_array_equal(line.get_xdata(), [1, 2])
        assert_array_equal(line.get_ydata(), [entry[name] for entry in classifier.history_])


def test_without_validation_there_is_no_validation_curve():
    """A single epoch is plotted, too, with whole epochs as ticks."""
    none = {"validation_loss": None, "validation_score": None}
    display = LearningCurveDisplay([HISTORY[0] | none]).plot()
    assert set(display.lines_) == {"train_loss", "train_score"}
    assert [len(axes.lines) for axes in display.axes_] == [1, 1]
    low, high = display.axes_[0].get_xlim()
    ticks = [tick for tick in display.axes_[0].get_xticks() if low <= tick <= high]
    assert ticks == [1]


def test_an_epoch_without_validation_is_a_gap():
    """`partial_fit` may be called with or without validation data."""
    none = {"validation_loss": None, "validation_score": None}
    display = LearningCurveDisplay([HISTORY[0], HISTORY[1] | none, HISTORY[2]]).plot()
    values = display.lines_["validation_loss"].get_ydata()
    assert_array_equal(np.isnan(values), [False, True, False])


@pytest.mark.parametrize("estimator", [LogisticRegression(), SimpleNamespace(history_=[])])
def test_without_a_history_there_is_no_curve(estimator):
    """An unfitted classifier or another estimator is refused."""
    with pytest.raises(
        NotFittedError, match=r"trained for .*; got .* without entries in history_\."
    ):
        LearningCurveDisplay.from_estimator(estimator)
