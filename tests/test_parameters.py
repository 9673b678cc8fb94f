"""Tests of parameters: each that is out of its range is refused, by name, with what is expected."""

import math

import numpy as np
import pytest
import torch
from small_networks import make_classifier, make_images

from deepfeat._parameters import check_choices, check_counts, check_device, check_ranges

CHOICES = {"mode": ("fast", "slow", None)}
COUNTS = (("count", 2, ("auto", None)),)


@pytest.mark.parametrize("value", ["fast", "slow", None])
def test_a_choice_passes(value):
    """Words, or None where it is one of them."""
    check_choices({"mode": value}, CHOICES)


@pytest.mark.parametrize("value", ["FAST", "", 0, True, ["fast"], np.array(["fast", "slow"]), {}])
def test_what_is_no_choice_is_refused(value):
    """Whatever it is, also what cannot be compared with words."""
    with pytest.raises(ValueError, match=r"mode=.* is none of \('fast', 'slow', None\)"):
        check_choices({"mode": value}, CHOICES)


@pytest.mark.parametrize("value", [2, 3, np.int64(2), np.uint8(7), "auto", None])
def test_a_count_passes(value):
    """Whole numbers of Python and NumPy."""
    check_counts({"count": value}, COUNTS)


@pytest.mark.parametrize("value", [1, 0, -1, 2.0, "2", True, math.nan, [2], np.array([2, 3])])
def test_what_is_no_count_is_refused(value):
    """A truth value is none, nor is a float."""
    with pytest.raises(
        ValueError, match=r"count=.*: a whole number from 2 or 'auto' or None is expected\."
    ):
        check_counts({"count": value}, COUNTS)


@pytest.mark.parametrize(
    ("interval", "inside", "outside"),
    [
        ("(0, 1)", [0.5, 1e-300, np.float32(0.5)], [0, 1, -1, 2]),
        ("[0, 1)", [0, 0.5, False + 0], [1, -1e-9]),
        ("(0, 1]", [1, 0.5], [0, 1.0000001]),
        ("(0, inf)", [1e300, 1, np.int64(3)], [0, -1, math.inf]),
        ("[0, inf)", [0, 0.0], [-1e-300, math.inf, -math.inf]),
    ],
)
def test_a_range_has_its_ends_or_not(interval, inside, outside):
    """As the brackets say; infinity and NaN are in none."""
    for value in inside:
        check_ranges({"rate": value}, [("rate", interval, ())])
    for value in [*outside, math.nan, "0.5", None, True, [0.5], 1j]:
        with pytest.raises(ValueError, match=r"rate=.*: a number in .* is expected\."):
            check_ranges({"rate": value}, [("rate", interval, ())])
    check_ranges({"rate": None}, [("rate", interval, (None,))])


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:3", torch.device("cpu")])
def test_a_device_needs_a_name_only(device):
    """Whether it is there shows later."""
    check_device(device)


@pytest.mark.parametrize("device", ["gpu", "", None, 1.5, "cpu:x"])
def test_what_is_no_device_is_refused(device):
    """The error names the devices that most machines have."""
    with pytest.raises(ValueError, match=r"^device=.*: 'auto' or .*, such as 'cuda',"):
        check_device(device)


WRONG = {
    "head": ["new", None, 3],
    "max_epochs": [0, 2.5, None],
    "batch_size": [0, -3, "auto"],
    "optimizer": ["adam", None],
    "learning_rate": [0, -1e-3, math.nan, math.inf, "fast", None],
    "backbone_learning_rate": [0, None],
    "weight_decay": [-1e-4, None],
    "schedule": ["linear", None],
    "warmup_epochs": [-1, math.inf],
    "augment": ["rotate", 3, ["flip"], True],
    "label_smoothing": [1, -0.1],
    "max_grad_norm": [0, -1],
    "class_weight": ["equal", 2],
    "validation_fraction": [0, 1, 2, None],
    "n_iter_no_change": [0, 1.5],
    "tol": [-1, math.nan],
    "resize": ["crop", None],
    "image_size": [0, 3.5],
    "device": ["gpu"],
    "precision": ["float64", torch.float16],
    "num_workers": [-1, None],
    "random_state": [-1, 1.5, np.random.RandomState(0)],
}


@pytest.mark.parametrize("method", ["fit", "partial_fit"])
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_parameter_of_a_classifier_is_named(name, method):
    """Before anything else is looked at."""
    for value in WRONG[name]:
        classifier = make_classifier("squeezenet1_1", **{name: value})
        with pytest.raises(ValueError, match=f"^{name}="):
            getattr(classifier, method)(["nowhere.png"], [0])


def test_every_choice_of_a_classifier_is_checked():
    """A parameter that is new needs a line above, or below where anything goes."""
    checked_elsewhere = {"backbone", "weights", "preprocessing", "unfreeze", "image_shape"}
    truths = {"early_stopping", "warm_start", "verbose"}
    assert WRONG.keys() | checked_elsewhere | truths == make_classifier().get_params().keys()


def test_a_wrong_parameter_is_found_when_predicting_too():
    """Where it matters to it."""
    X, y = make_images(4)
    classifier = make_classifier(max_epochs=1).fit(X, y).set_params(batch_size=0)
    with pytest.raises(ValueError, match="batch_size=0: a whole number from 1 is expected"):
        classifier.predict(X)
