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
from sklearn.utils.multiclass import check_classification_targets, is_multilabel
from sklearn.utils.validation import column_or_1d

from .._images.records import Record

ClassWeight: TypeAlias = Mapping[Any, float] | Literal["balanced"] | None


@dataclass(frozen=True)
class Dataset:
    """Images with labels and weights.

    The labels have shape (n,), or if there are several per image (n, n_labels), with 0 and 1. The
    weights have shape (n,) until those of the classes, which may differ per label, are applied.
    """

    records: list[Record]
    labels: NDArray[Any]
    weights: NDArray[np.float64]

    @property
    def is_multilabel(self) -> bool:
        return self.labels.ndim == 2

    def __len__(self) -> int:
        return len(self.records)

    def take(self, indices: NDArray[np.intp]) -> "Dataset":
        records = [self.records[index] for index in indices]
        return Dataset(records, self.labels[indices], self.weights[indices])


def label_images(
    records: list[Record], y: Any, sample_weight: Any = None, *, name: str = "y"
) -> Dataset:
    """Validate labels and weights against the images; errors call the labels `name`."""
    labels = _as_indicators(y, name)
    if labels is None:
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
        if weights.shape != (len(labels),):
            raise ValueError(
                f"sample_weight must have shape ({len(labels)},), one weight per image; got shape "
                f"{weights.shape}."
            )
    return Dataset(records, labels, weights)


def _as_indicators(y: Any, name: str) -> NDArray[np.int64] | None:
    """Return labels as an indicator matrix if they are one; None if there is one per image."""
    if not is_multilabel(y):
        return None
    labels = check_array(y, accept_sparse="csr", input_name=name)
    dense = np.asarray(labels.toarray() if hasattr(labels, "toarray") else labels)
    if not np.isin(dense, (0, 1)).all():
        raise ValueError(
            f"{name} must have 0 and 1 if it has one column per label; got "
            f"{np.unique(dense)[:5].tolist()}."
        )
    return dense.astype(np.int64)


def find_classes(dataset: Dataset) -> NDArray[Any]:
    """Return the classes, in order; of several labels per image, the indices of these."""
    if dataset.is_multilabel:
        return np.arange(dataset.labels.shape[1])
    return np.unique(dataset.labels)


def check_known(dataset: Dataset, classes: NDArray[Any], name: str, *, multilabel: bool) -> None:
    """Raise unless the labels are among the classes, one per image unless `multilabel`."""
    labels = dataset.labels
    expected = (len(labels), len(classes)) if multilabel else (len(labels),)
    if labels.shape != expected:
        raise ValueError(
            f"{name} must have shape {expected}, as the labels of the training; got {labels.shape}."
        )
    unknown = np.setdiff1d(labels, [0, 1] if multilabel else classes)
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
    """Split off a part for validation, stratified by class; return the training part and it.

    Several labels per image are split at random.
    """
    total = len(dataset)
    count = math.ceil(fraction * total)
    if dataset.is_multilabel:
        if count == total:
            raise ValueError(
                f"validation_fraction must leave an image; {fraction} holds out {count} of {total}."
            )
        order = np.random.default_rng(seed).permutation(total)
        return dataset.take(order[count:]), dataset.take(order[:count])
    classes, counts = np.unique(dataset.labels, return_counts=True)
    if counts.min() < 2:
        raise ValueError(
            "y must have at least 2 images per class, so that early stopping can hold one out; "
            f"class {classes[counts.argmin()]!r} has 1. Pass X_val and y_val, or more images."
        )
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
    """Multiply the weights of images by those of their classes.

    Of several labels per image, each is a problem of its own with the classes 0 and 1.
    """
    if len(classes) < 2:
        raise ValueError(f"y must have at least 2 classes; got one class, {classes[0]!r}.")
    if class_weight is None:
        return dataset
    labels = dataset.labels.reshape(len(dataset), -1)
    try:
        by_class = [compute_sample_weight(class_weight, column) for column in labels.T]
    except (TypeError, ValueError) as error:
        raise ValueError(f"class_weight={class_weight!r}: {error}") from error
    weights = np.stack(by_class, axis=1) * dataset.weights[:, None]
    weights = weights if dataset.is_multilabel else weights[:, 0]
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
