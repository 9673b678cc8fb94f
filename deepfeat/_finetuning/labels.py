"""Labelled images: validation, class and sample weights, hold-out split."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import train_test_split
from sklearn.utils import assert_all_finite, check_array, check_consistent_length
from sklearn.utils.class_weight import compute_sample_weight
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import column_or_1d

from .._images.records import Record

ClassWeight: TypeAlias = Mapping[Any, float] | Literal["balanced"] | None


@dataclass(frozen=True)
class Dataset:
    """Images with labels and weights."""

    records: list[Record]
    labels: NDArray[Any]
    weights: NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.records)

    def take(self, indices: NDArray[np.intp]) -> "Dataset":
        records = [self.records[index] for index in indices]
        return Dataset(records, self.labels[indices], self.weights[indices])


def label_images(
    records: list[Record], y: Any, sample_weight: Any = None, *, name: str = "y"
) -> Dataset:
    """Validate labels and weights against the images; errors call the labels `name`."""
    labels = column_or_1d(y, warn=True)
    assert_all_finite(labels, input_name=name)
    try:
        check_classification_targets(labels)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    check_consistent_length(records, labels)
    weights = np.ones(len(records))
    if sample_weight is not None:
        weights = check_array(
            sample_weight,
            ensure_2d=False,
            dtype=np.float64,
            ensure_non_negative=True,
            input_name="sample_weight",
        )
        if weights.shape != labels.shape:
            raise ValueError(
                f"sample_weight must have shape {labels.shape}, one weight per image; got shape "
                f"{weights.shape}."
            )
    return Dataset(records, labels, weights)


def check_known(labels: NDArray[Any], classes: NDArray[Any], name: str) -> None:
    """Raise if there are labels outside the classes."""
    unknown = np.setdiff1d(labels, classes)
    if len(unknown):
        raise ValueError(
            f"{name} must not have labels outside the classes {classes[:20].tolist()}; got "
            f"{unknown[:5].tolist()}."
        )


def drop_zero_weight(dataset: Dataset) -> Dataset:
    """Drop images whose weight is 0."""
    dataset = dataset.take(np.flatnonzero(dataset.weights))
    if not len(dataset):
        raise ValueError(
            "sample_weight must be positive for at least one image; got zero for every image."
        )
    return dataset


def hold_out(dataset: Dataset, fraction: float, seed: int) -> tuple[Dataset, Dataset]:
    """Split off a stratified part for validation; return the training part and it."""
    classes, counts = np.unique(dataset.labels, return_counts=True)
    if counts.min() < 2:
        raise ValueError(
            "y must have at least 2 images per class, so that early stopping can hold one out; "
            f"class {classes[counts.argmin()]!r} has 1. Pass X_val and y_val, or more images."
        )
    total = len(dataset)
    count = math.ceil(fraction * total)
    fits = len(classes) <= count <= total - len(classes)
    if fits:
        training, validation = map(
            dataset.take,
            train_test_split(
                np.arange(total), test_size=count, stratify=dataset.labels, random_state=seed
            ),
        )
    if not fits or len(np.unique(training.labels)) < len(classes):
        raise ValueError(
            f"validation_fraction must hold out at least {len(classes)} images, one per class, and "
            f"leave one of each; {fraction} holds out {count} of {total} images. Change it, or "
            "pass X_val and y_val."
        )
    return training, validation


def apply_class_weight(
    dataset: Dataset, classes: NDArray[Any], class_weight: ClassWeight
) -> Dataset:
    """Multiply the weights of images by those of their classes."""
    if len(classes) < 2:
        raise ValueError(f"y must have at least 2 classes; got one class, {classes[0]!r}.")
    try:
        weights = dataset.weights * compute_sample_weight(class_weight, dataset.labels)
    except (TypeError, ValueError) as error:
        raise ValueError(f"class_weight={class_weight!r}: {error}") from error
    if not (np.isfinite(weights).all() and (weights >= 0).all()):
        raise ValueError(
            f"class_weight must have finite, non-negative weights; got {class_weight!r}."
        )
    if not weights.any():
        raise ValueError(
            "class_weight must leave at least one image with a positive weight; got "
            f"{class_weight!r}."
        )
    return replace(dataset, weights=weights)
