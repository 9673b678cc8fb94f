"""Knows how the parameters of an estimator are checked, each by itself."""

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import torch

Choices: TypeAlias = Mapping[str, tuple[str | None, ...]]
Counts: TypeAlias = Sequence[tuple[str, int, tuple[str | None, ...]]]
Ranges: TypeAlias = Sequence[tuple[str, str, tuple[None, ...]]]


def check_choices(params: Mapping[str, Any], choices: Choices) -> None:
    """Raise unless each parameter is one of its choices."""
    for name, allowed in choices.items():
        value = params[name]
        if not (value is None or isinstance(value, str)) or value not in allowed:
            raise ValueError(f"{name}={value!r} is none of {allowed}.")


def check_counts(params: Mapping[str, Any], counts: Counts) -> None:
    """Raise unless each parameter is a whole number from a lowest one on, or one of some others."""
    for name, low, others in counts:
        value = params[name]
        is_count = isinstance(value, numbers.Integral) and not isinstance(value, bool)
        if not ((is_count and value >= low) or _is_any(value, others)):
            raise ValueError(f"{name}={value!r}: {_words(f'a whole number from {low}', others)}")


def check_ranges(params: Mapping[str, Any], ranges: Ranges) -> None:
    """Raise unless each parameter is a finite number in an interval such as "(0, 1]", or None.

    Where None is possible it is listed with the interval.
    """
    for name, interval, others in ranges:
        value = params[name]
        is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
        if not ((is_number and _lies_in(float(value), interval)) or _is_any(value, others)):
            raise ValueError(f"{name}={value!r}: {_words(f'a number in {interval}', others)}")


def check_device(device: str | torch.device) -> None:
    """Raise unless a device is "auto" or has a name that torch knows."""
    if isinstance(device, str) and device == "auto":
        return
    try:
        torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"device={device!r}: 'auto' or a device of torch, such as 'cuda', 'cuda:1', 'mps' or "
            "'cpu', is expected."
        ) from error


def _is_any(value: Any, others: tuple[str | None, ...]) -> bool:
    return (value is None or isinstance(value, str)) and value in others


def _lies_in(value: float, interval: str) -> bool:
    low, high = (float(bound) for bound in interval[1:-1].split(","))
    above = value >= low if interval[0] == "[" else value > low
    below = value <= high if interval[-1] == "]" else value < high
    return math.isfinite(value) and above and below


def _words(what: str, others: tuple[str | None, ...]) -> str:
    return what + "".join(f" or {other!r}" for other in others) + " is expected."
