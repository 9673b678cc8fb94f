"""Scores of validation images by the scorers of scikit-learn, which ask a classifier for them."""

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.metrics import get_scorer

from .labels import Dataset
from .objectives import Objective
from .training import Score

Scoring: TypeAlias = str | Callable[..., float] | None


def make_score(scoring: Scoring, objective: Objective, validation: Dataset) -> Score | None:
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
    noise = np.random.default_rng(0).normal(size=(len(validation), len(objective.classes)))
    try:
        classifier = LogitClassifier(objective)
        score = functools.partial(_score, get_scorer(scoring), classifier, validation)
        with warnings.catch_warnings(action="ignore"):
            trial = score(noise, 1.0)  # so that it fails now rather than after an epoch of hours
        if math.isnan(trial):
            raise ValueError("it is NaN, as a ranking is if a class or label is missing")
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

    def __init__(self, objective: Objective):
        self.objective = objective
        self.classes_ = objective.classes
        self.predict = objective.predict
        self.predict_proba = objective.predict_proba
        self.decision_function = objective.decision_function
