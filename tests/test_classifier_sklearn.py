"""Tests of the classifier among scikit-learn's tools: its own checks, and ours over images."""

import copy
import pickle
from collections import Counter

import cloudpickle
import joblib
import numpy as np
import pandas as pd
import pytest
import sklearn
import torch
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV, cross_val_predict, cross_validate
from sklearn.pipeline import Pipeline
from sklearn.utils import get_tags
from sklearn.utils.estimator_checks import check_estimator, parametrize_with_checks
from small_networks import (
    LineNet,
    assert_same_state,
    make_classifier,
    make_images,
    make_plain,
    seeded,
    state_of,
    to_a_line,
)

from deepfeat import FineTuneClassifier

# The checks of scikit-learn ---------------------------------------------------------------------

# Its tables of random numbers become images of one line.
of_tables = FineTuneClassifier(
    seeded(LineNet),
    preprocessing=to_a_line,
    unfreeze="all",
    image_shape=(1, -1),
    max_epochs=20,
    batch_size=16,
    learning_rate=0.03,
    backbone_learning_rate=0.03,
    augment=None,
    num_workers=0,
    random_state=0,
)
BLACK = (
    "its small integers are read on the scale of int64, where they are black: such an image is "
    "refused, rather than read on a scale that is guessed from its values"
)


def expected_to_fail(_estimator):
    return {
        "check_estimators_dtypes": BLACK,
        "check_sample_weights_pandas_series": BLACK,
        "check_sample_weights_not_an_array": BLACK,
        "check_sample_weights_shape": BLACK,
        "check_classifier_data_not_an_array": BLACK,
        "check_sample_weights_not_overwritten": (
            "its floats go far beyond [0, 1], the scale of floats: they are refused"
        ),
        "check_estimators_overwrite_params": (
            "it compares joblib's hashes, and that of a torch module is another for each copy"
        ),
        "check_sample_weight_equivalence_on_dense_data": (
            "an image that is repeated takes part in another order of steps than one that counts "
            "twice: stochastic gradient descent ends at another place"
        ),
    }


# The checks draw from normal distributions; of pixels, what lies outside [0, 1] is clipped.
ignores_clipping = pytest.mark.filterwarnings("ignore:pixels outside the scale:UserWarning")


@ignores_clipping
@parametrize_with_checks([of_tables], expected_failed_checks=expected_to_fail)
def test_the_checks_of_scikit_learn_pass(estimator, check):
    """On the real class: with `image_shape` a table is a legal input."""
    check(estimator)


@ignores_clipping
def test_the_checks_of_scikit_learn_really_run():
    """An estimator that refuses tables passes one check: ours passes at least 45."""
    results = check_estimator(
        of_tables,
        expected_failed_checks=expected_to_fail(of_tables),
        on_fail=None,
        on_skip=None,
    )
    counts = Counter(result["status"] for result in results)
    assert counts["passed"] >= 45
    assert counts["failed"] == 0
    # Releases of scikit-learn differ in which of these checks they have.
    assert 0 < counts["xfail"] <= len(expected_to_fail(of_tables))
