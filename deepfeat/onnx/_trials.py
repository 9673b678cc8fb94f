"""Trials of a file: what it gives for images, against what the estimator gives."""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .._images.records import Record
from .._images.tables import find_records
from .._optional import import_optional
from ._graphs import OUTPUTS, Plan

_AT_ONCE = 2  # images; the last of an odd number alone, so that two sizes are tried


@dataclass(frozen=True)
class Trial:
    """Images, and what the estimator gives for them."""

    images: str  # in words
    records: list[Record]
    expected: tuple[NDArray[Any], ...]
    tie: float  # how close two scores must be, relative to the largest, for either to win


def make_trial(plan: Plan, X: Any, images: str, *, tie: float) -> Trial:
    """Ask the estimator about images.

    Raises
    ------
    ValueError
        If X is not a sequence of images, or one of them cannot be read.
    """
    try:
        records = find_records(plan.source, X, plan.source.image_shape, reset=False)
    except ValueError as error:
        raise ValueError(f"check: {error}") from error
    return Trial(images, records, plan.predict(X), tie)


def make_noise(plan: Plan) -> NDArray[np.uint8]:
    """Make three images of the size that the network takes: noise, darker and lighter noise."""
    *_, height, width = plan.preprocessing.input_shape
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return np.stack([noise, noise // 4, 255 - noise // 4])


def make_example(plan: Plan, trial: Trial, batch_size: int | None) -> NDArray[Any]:
    """Make a batch as the file takes it, of the images of a trial."""
    size = batch_size or len(trial.records)
    return next(_prepare(plan, itertools.islice(itertools.cycle(trial.records), size), size))


def load(content: bytes, plan: Plan) -> Any:
    """Load the content of a file in ONNX Runtime.

    Raises
    ------
    ValueError
        If that is not possible.
    """
    onnxruntime = import_optional("onnxruntime", extra="onnx")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors, which are raised as well
    try:
        return onnxruntime.InferenceSession(content, options, ["CPUExecutionProvider"])
    except Exception as error:  # each of its codes has a class of its own
        raise ValueError(
            f"{plan.name} cannot be exported: ONNX Runtime does not load it ({error})."
        ) from error


def run(session: Any, plan: Plan, trial: Trial, batch_size: int | None) -> list[NDArray[Any]]:
    """Run a file on the images of a trial; a batch that is not full repeats its first image."""
    parts = []
    for images in _prepare(plan, trial.records, batch_size or _AT_ONCE):
        lacking = 0 if batch_size is None else batch_size - len(images)
        outputs = session.run(None, {"images": np.concatenate([images, *[images[:1]] * lacking])})
        parts.append([output[: len(images)] for output in outputs])
    return [np.concatenate(output) for output in zip(*parts, strict=True)]


def _prepare(plan: Plan, records: Iterable[Record], size: int) -> Iterator[NDArray[Any]]:
    """Prepare images as the file takes them, in batches."""
    records = iter(records)
    while some := [_prepare_one(plan, record) for record in itertools.islice(records, size)]:
        yield np.stack(some)


def _prepare_one(plan: Plan, record: Record) -> NDArray[Any]:
    prepared = plan.preprocessing.prepare(record.open())
    if prepared.dtype == torch.uint8:
        return prepared.numpy()
    if tuple(prepared.shape) != plan.preprocessing.input_shape:
        raise ValueError(
            f"{plan.name} cannot be exported: preprocessing must give images of one shape; got "
            f"{tuple(prepared.shape)} and {plan.preprocessing.input_shape}."
        )
    return prepared.float().numpy()


def compare(plan: Plan, trial: Trial, found: Sequence[NDArray[Any]], tolerance: float) -> None:
    """Compare what a file gives with what the estimator does.

    Raises
    ------
    ValueError
        If values differ by more than the tolerance, relative to the largest of all, or labels do.
    """
    expected, values = trial.expected[-1], found[-1]
    scale = float(np.abs(expected).max())
    difference = math.inf
    if expected.shape == values.shape:
        difference = float(np.abs(expected - values).max())
    if not difference <= tolerance * scale or math.isinf(scale):  # nor if it is NaN
        problem = f"{OUTPUTS[plan.kind][-1]} differ by up to {difference:.2g}, of {scale:.2g}"
    elif changed := plan.kind == "classifier" and _count_changed(trial, found[0], scale):
        problem = f"labels of {changed} of {len(expected)} images differ"
    else:
        return
    raise ValueError(
        f"{plan.name} cannot be exported: the file would not reproduce the estimator for "
        f"{trial.images}, so it was not written. The {problem}."
    )


def _count_changed(trial: Trial, labels: NDArray[Any], scale: float) -> int:
    """Count the labels that differ, ties aside."""
    expected, scores = trial.expected
    if scores.ndim == 1:
        margins = np.abs(scores)
    else:
        second, first = np.partition(scores, -2, axis=1)[:, -2:].T
        margins = first - second
    return int(((labels != expected) & (margins > trial.tie * scale)).sum())
