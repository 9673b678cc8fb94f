"""Logits as predictions, and what scorers of scikit-learn say of those of validation images."""

import functools
import warnings
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.metrics import get_scorer

from .labels import Dataset
from .training import Score

Scoring: TypeAlias = str | Callable[..., float] | None


def make_score(scoring: Scoring, classes: NDArray[Any], validation: Dataset) -> Score | None:
    """Make the function that scores the logits of validation images; None stands for accuracy.

    Raises
    ------
    ValueError
        If `scoring` is not the name of a scorer or a callable, or cannot score these images.
    """
    if scoring is None:
        return None
    if scoring == "loss":
        return lambda _, loss: -loss
    noise = np.random.default_rng(0).normal(size=(len(validation), len(classes)))
    try:
        classifier = LogitClassifier(classes)
        score = functools.partial(_score, get_scorer(scoring), classifier, validation)
        with warnings.catch_warnings(action="ignore"):
            score(noise, 1.0)  # so that it fails now rather than after an epoch of hours
    except Exception as error:  # a user's function may fail in any way
        raise ValueError(
            "scoring must be None, 'loss', or a scorer of scikit-learn or a callable that scores "
            f"the validation images; got {scoring!r}: {error}"
        ) from error
    return score


def _score(
    scorer: Callable[..., float],
    classifier: "LogitClassifier",
    validation: Dataset,
    logits: NDArray[Any],
    _loss: float,
) -> float:
    labels, weights = validation.labels, validation.weights
    if (weights == weights[0]).all():
        return float(scorer(classifier, logits, labels))
    return float(scorer(classifier, logits, labels, sample_weight=weights))


class LogitClassifier(ClassifierMixin, BaseEstimator):
    """A fitted classifier of which X is what a network has given for the images."""

    def __init__(self, classes_: NDArray[Any]):
        self.classes_ = classes_

    def predict(self, X: NDArray[Any]) -> NDArray[Any]:
        labels: NDArray[Any] = self.classes_[X.argmax(axis=1)]
        return labels

    def predict_proba(self, X: NDArray[Any]) -> NDArray[Any]:
        probabilities: NDArray[Any] = torch.from_numpy(X).softmax(1).numpy()
        return probabilities

    def decision_function(self, X: NDArray[Any]) -> NDArray[Any]:
        return X[:, 1] - X[:, 0] if len(self.classes_) == 2 else X
