"""Tests of parameters: what they may be is told by the signature, and equals the docstring."""

import ast
import inspect
import math
import re
import types
from collections.abc import Callable, Mapping
from typing import Literal, Union, get_args, get_origin

import numpy as np
import pytest
import torch

import deepfeat.datasets
import deepfeat.onnx
import deepfeat.plotting
import deepfeat.ray
from deepfeat import DeepFeatureExtractor, FineTuneClassifier, predict_categories
from deepfeat import _parameters as parameters
from deepfeat._parameters import check_device, check_parameter, check_parameters

Mode = Literal["fast", "slow"] | None
Workers = int | Literal["auto"] | None
CHECKED = [
    *(DeepFeatureExtractor, FineTuneClassifier, predict_categories),
    *(deepfeat.onnx.export, deepfeat.ray.extract),
]

# Values -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["fast", "slow", None])
def test_a_choice_passes(value):
    """Words, or None where it is one of them."""
    check_parameter("mode", value, Mode)


@pytest.mark.parametrize("value", ["FAST", "", 0, True, ["fast"], np.array(["fast", "slow"]), {}])
def test_what_is_no_choice_is_refused(value):
    """Whatever it is, also what cannot be compared with words."""
    with pytest.raises(ValueError) as caught:
        check_parameter("mode", value, Mode)
    assert str(caught.value) == f"mode must be one of 'fast', 'slow' or None; got {value!r}."


def test_none_has_to_be_among_the_choices():
    """It stands for no choice of its own."""
    with pytest.raises(ValueError, match=r"^mode must be 'fast' or 'slow'; got None\.$"):
        check_parameter("mode", None, Literal["fast", "slow"])


@pytest.mark.parametrize("value", [2, 3, np.int64(2), np.uint8(7), "auto", None])
def test_an_int_passes(value, monkeypatch):
    """Of Python and of NumPy."""
    monkeypatch.setitem(parameters._INTERVALS, "count", "[2, inf)")
    check_parameter("count", value, Workers)


@pytest.mark.parametrize("value", [1, 0, -1, 2.0, "2", True, math.nan, [2], np.array([2, 3])])
def test_what_is_no_int_in_its_interval_is_refused(value, monkeypatch):
    """A bool is none, nor is a float."""
    monkeypatch.setitem(parameters._INTERVALS, "count", "[2, inf)")
    with pytest.raises(ValueError) as caught:
        check_parameter("count", value, Workers)
    words = "count must be an int of at least 2, 'auto' or None"
    assert str(caught.value) == f"{words}; got {value!r}."


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
def test_an_interval_has_its_ends_or_not(interval, inside, outside, monkeypatch):
    """As the brackets say; infinity and NaN are in none."""
    monkeypatch.setitem(parameters._INTERVALS, "rate", interval)
    for value in inside:
        check_parameter("rate", value, float)
    for value in [*outside, math.nan, "0.5", None, True, np.True_, [0.5], 1j]:
        with pytest.raises(ValueError) as caught:
            check_parameter("rate", value, float)
        assert str(caught.value) == f"rate must be a float in {interval}; got {value!r}."
    check_parameter("rate", None, float | None)


def test_a_bool_is_one_of_python_or_numpy():
    """A number is none."""
    for value in (True, False, np.True_):
        check_parameter("early_stopping", value, bool)
    for value in (1, 0, None, "True", np.array([True, False])):
        with pytest.raises(ValueError) as caught:
            check_parameter("early_stopping", value, bool)
        assert str(caught.value) == f"early_stopping must be True or False; got {value!r}."


def test_what_the_caller_has_checked_is_named_too():
    """An error lists all that is allowed."""
    with pytest.raises(ValueError, match=r"^mode must be a callable, 'a' or None; got 3\.$"):
        check_parameter("mode", 3, Literal["a"] | Callable | None, "a callable")


def test_what_may_be_something_else_is_left_to_the_caller():
    """A signature is checked as far as it names choices, bools and numbers with an interval."""

    def function(
        mode: Mode,
        batch_size: int,
        other: Literal["a"] | Callable | None,
        weights: Mapping[str, float] | Literal["balanced"],
        path: str,
        verbose: int,
        unknown=3,
    ):
        pass

    params = dict.fromkeys(("other", "weights", "path", "verbose", "unknown"), object())
    check_parameters(function, params | {"mode": "fast", "batch_size": 1})
    for wrong in ({"mode": 1}, {"batch_size": 0}):
        with pytest.raises(ValueError, match=f"^{next(iter(wrong))} must be"):
            check_parameters(function, params | wrong)


@pytest.mark.parametrize("device", ["auto", "cpu", "cuda", "cuda:3", torch.device("cpu")])
def test_a_device_needs_a_name_only(device):
    """Whether it is there shows later."""
    check_device(device)


@pytest.mark.parametrize("device", ["gpu", "", None, 1.5, "cpu:x"])
def test_what_is_no_device_is_refused(device):
    """The error names the devices that most machines have."""
    with pytest.raises(ValueError, match=r"^device must be 'auto' or .*, such as 'cuda', .*; got "):
        check_device(device)


# Estimators -------------------------------------------------------------------------------------

WRONG = {
    "head": ["new", None, 3],
    "max_epochs": [0, 2.5, None],
    "cutmix": [-1, "all", None],
    "head_epochs": [-1, 0.5, None, "all"],
    "checkpoint": [1, True, ["folder"], b"folder"],
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
    "engine": ["tensorrt", None],
    "num_workers": [-1, None],
    "random_state": [-1, 2**32, 1.5, "RandomState"],
    "early_stopping": [1, None],
    "warm_start": [0, "yes"],
}


@pytest.mark.parametrize("method", ["fit", "partial_fit"])
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_parameter_of_a_classifier_is_named(name, method):
    """Before anything else is looked at."""
    for value in WRONG[name]:
        classifier = FineTuneClassifier("resnet18", **{name: value})
        with pytest.raises(ValueError, match=f"^{name} must be "):
            getattr(classifier, method)(["nowhere.png"], [0])


def test_every_choice_of_a_classifier_is_checked():
    """A parameter that is new needs a line above, or below where anything goes."""
    checked_elsewhere = {
        "backbone",
        "weights",
        "preprocessing",
        "unfreeze",
        "image_shape",
        "scoring",
    }
    assert (
        WRONG.keys() | checked_elsewhere | {"verbose"} == FineTuneClassifier().get_params().keys()
    )


def test_a_wrong_parameter_is_found_when_predicting_too():
    """Where it matters to it."""
    X, y = np.zeros((4, 32, 32), np.uint8), ["a", "b", "a", "b"]
    classifier = FineTuneClassifier("resnet10_slim", unfreeze=None, image_size=32, max_epochs=1)
    classifier.fit(X, y).set_params(batch_size=0)
    with pytest.raises(ValueError, match=r"^batch_size must be an int of at least 1; got 0"):
        classifier.predict(X)


# Signatures and docstrings ----------------------------------------------------------------------


def list_members(annotation):
    is_union = get_origin(annotation) in (Union, types.UnionType)
    return get_args(annotation) if is_union else (annotation,)


def list_choices(annotation):
    """List the words of an annotation in their order."""
    return [
        choice
        for member in list_members(annotation)
        if get_origin(member) is Literal
        for choice in get_args(member)
    ]


def test_every_number_has_an_interval():
    """And every interval a number."""
    numbers = {
        name
        for function in CHECKED
        for name, parameter in inspect.signature(function).parameters.items()
        if {int, float}.intersection(list_members(parameter.annotation))
    }
    assert numbers - {"layer", "unfreeze", "verbose"} == parameters._INTERVALS.keys()


def find_public():
    """Find what users call, by name: functions, classes and the methods of these."""
    found = {}
    for module in (deepfeat, deepfeat.datasets, deepfeat.onnx, deepfeat.plotting):
        for name in module.__all__:
            value = getattr(module, name)
            if isinstance(value, type) and issubclass(value, Exception):
                continue
            found[name] = value
            for method in vars(value) if isinstance(value, type) else ():
                function = inspect.getattr_static(value, method)
                if isinstance(function, (types.FunctionType, classmethod)) and method[0] != "_":
                    found[f"{name}.{method}"] = getattr(value, method)
    return found


PUBLIC = find_public()


def read_parameters(function):
    """Read the section of a docstring: what it says of the type of each parameter."""
    section = re.search(r"Parameters\n-+\n(.*?)(\n\n|$)", inspect.getdoc(function), re.S)
    return dict(re.findall(r"^(\w+) : (.*)$", section[1], re.M)) if section else {}


@pytest.mark.parametrize("name", PUBLIC)
def test_a_docstring_tells_the_choices_and_the_default_of_the_signature(name):
    """The same words in the same order; "optional" means that there is one."""
    described = read_parameters(PUBLIC[name])
    for parameter in inspect.signature(PUBLIC[name]).parameters.values():
        if parameter.name not in described:
            continue
        kind, _, default = described[parameter.name].partition(", default=")
        choices = list_choices(parameter.annotation)
        if choices or "{" in kind:
            assert re.findall(r'"([^"]*)"', kind) == choices, parameter
            assert ("or None" in kind) == (type(None) in list_members(parameter.annotation))
        if kind.endswith(", optional"):
            assert parameter.default is not inspect.Parameter.empty, parameter
        elif default:
            assert ast.literal_eval(default) == parameter.default, parameter
        else:
            assert parameter.default is inspect.Parameter.empty, parameter


def test_docstrings_are_read():
    """The law above has something to look at."""
    for estimator in (DeepFeatureExtractor(), FineTuneClassifier()):
        assert read_parameters(type(estimator)).keys() == estimator.get_params().keys()
    norm = inspect.signature(DeepFeatureExtractor).parameters["norm"]
    assert list_choices(norm.annotation) == ["l2", "l1", "max"]
    types = [words for function in PUBLIC.values() for words in read_parameters(function).values()]
    assert sum("{" in words for words in types) >= 14


@pytest.mark.parametrize("estimator", [DeepFeatureExtractor, FineTuneClassifier])
def test_a_subclass_may_have_parameters_of_its_own(estimator):
    """They are left to the subclass; those that it inherits are checked as ever."""

    class Subclass(estimator):
        def __init__(self, backbone="resnet10_slim", *, extra=1, resize="weights"):
            super().__init__(backbone, resize=resize)
            self.extra = extra

    check_parameters(estimator, Subclass(extra="anything").get_params(deep=False))
    with pytest.raises(ValueError, match=r"^resize must be one of"):
        check_parameters(estimator, Subclass(resize="crop").get_params(deep=False))
