"""Checks of parameters: an annotation says what one may be, a table in which interval it lies."""

import functools
import inspect
import numbers
import typing
from collections.abc import Callable, Mapping
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union

import numpy as np
import torch

# A number that is not listed, such as `verbose`, is not checked.
_INTERVALS = {
    "backbone_learning_rate": "(0, inf)",
    "batch": "[1, inf)",
    "batch_size": "[1, inf)",
    "concurrency": "[1, inf)",
    "cutmix": "[0, inf)",
    "head_epochs": "[0, inf)",
    "image_size": "[1, inf)",
    "label_smoothing": "[0, 1)",
    "learning_rate": "(0, inf)",
    "max_epochs": "[1, inf)",
    "max_grad_norm": "(0, inf)",
    "n_iter_no_change": "[1, inf)",
    "num_cpus": "(0, inf)",
    "num_gpus": "[0, inf)",
    "num_workers": "[0, inf)",
    "random_state": "[0, inf)",
    "rows_per_task": "[1, inf)",
    "tol": "[0, inf)",
    "top": "[1, inf)",
    "validation_fraction": "(0, 1)",
    "warmup_epochs": "[0, inf)",
    "weight_decay": "[0, inf)",
}


def check_parameters(function: Callable[..., Any], params: Mapping[str, Any]) -> None:
    """Raise unless each parameter is what the signature of a function or a class allows.

    A parameter that may also be something else than a choice, a bool, a number of the table or
    None is left to the caller, and so is one that the signature does not have, of a subclass.
    """
    annotations = _find_annotations(function)
    for name in annotations.keys() & params.keys():
        if all(_list_alternatives(name, member) for member in _split(annotations[name])):
            check_parameter(name, params[name], annotations[name])


def check_parameter(name: str, value: Any, annotation: Any, *others: str) -> None:
    """Raise unless a parameter is one of an annotation's choices, bools, numbers or None.

    `others` describe what else is allowed, which the caller has checked.
    """
    members = _split(annotation)
    alternatives = [known for member in members for known in _list_alternatives(name, member)]
    if any(alternative.allows(value) for alternative in alternatives):
        return
    *most, last = [*others, *(alternative.words for alternative in alternatives)]
    words = f"{', '.join(most)} or {last}" if most else last
    if len(most) > 1 and not others and all(map(_is_word_or_none, members)):
        words = f"one of {words}"
    raise ValueError(f"{name} must be {words}; got {value!r}.")


def check_device(device: str | torch.device) -> None:
    """Raise unless a device is "auto" or has a name that torch knows."""
    if isinstance(device, str) and device == "auto":
        return
    try:
        torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            "device must be 'auto' or a device of torch, such as 'cuda', 'cuda:1', 'mps' or "
            f"'cpu'; got {device!r}."
        ) from error


class _Alternative(NamedTuple):
    """One of the things that a parameter may be."""

    words: str
    allows: Callable[[Any], bool]


@functools.cache
def _find_annotations(function: Callable[..., Any]) -> dict[str, Any]:
    parameters = inspect.signature(function, eval_str=True).parameters
    return {name: parameter.annotation for name, parameter in parameters.items()}


def _split(annotation: Any) -> tuple[Any, ...]:
    """Return the members of a union; of another annotation, itself."""
    is_union = typing.get_origin(annotation) in (Union, UnionType)
    return typing.get_args(annotation) if is_union else (annotation,)


def _is_word_or_none(member: Any) -> bool:
    return typing.get_origin(member) is Literal or member is NoneType


def _list_alternatives(name: str, member: Any) -> list[_Alternative]:
    """List what one member of an annotation allows; empty if that is not known here."""
    if typing.get_origin(member) is Literal:
        return [
            _Alternative(repr(choice), functools.partial(_is_choice, choice=choice))
            for choice in typing.get_args(member)
        ]
    if member is NoneType:
        return [_Alternative("None", lambda value: value is None)]
    if member is bool:
        return [_Alternative("True or False", lambda value: isinstance(value, (bool, np.bool_)))]
    if member in (int, float) and name in _INTERVALS:
        interval = _INTERVALS[name]
        words = f"a float in {interval}" if member is float else f"an int of at least {interval[1]}"
        return [_Alternative(words, functools.partial(_is_number, kind=member, interval=interval))]
    return []


def _is_choice(value: Any, choice: str) -> bool:
    return isinstance(value, str) and value == choice  # an array would be compared by its entries


def _is_number(value: Any, kind: type, interval: str) -> bool:
    numeric = numbers.Real if kind is float else numbers.Integral
    is_number = isinstance(value, numeric) and not isinstance(value, bool)
    return is_number and _lies_in(value, interval)


def _lies_in(value: Any, interval: str) -> bool:
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    below = value <= high if interval[-1] == "]" else value < high
    return bool(above and below)  # neither of NaN
