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
    labels = _as_indicators(y, name) if is_multilabel(y) else _as_classes(y, name)
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


def _as_classes(y: Any, name: str) -> NDArray[Any]:
    """Return labels of which there is one per image."""
    try:
        labels: NDArray[Any] = column_or_1d(y, warn=True)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{name} must have one class per image, or a column of 0 and 1 for each label, as "
            f"MultiLabelBinarizer of scikit-learn makes it: {error}"
        ) from error
    assert_all_finite(labels, input_name=name)
    try:
        check_classification_targets(labels)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return labels


def _as_indicators(y: Any, name: str) -> NDArray[np.int64]:
    """Return labels of which there may be several per image, as a dense matrix of 0 and 1."""
    labels = check_array(y, accept_sparse="csr", input_name=name)
    dense = np.asarray(labels.toarray() if hasattr(labels, "toarray") else labels)
    if not np.isin(dense, (0, 1)).all():
        raise ValueError(
            f"{name} must contain only 0 and 1 if it has one column per label; got "
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
            f"{name} must have shape {expected}, like the labels of the training; got "
            f"{labels.shape}."
        )
    unknown = [] if multilabel else np.setdiff1d(labels, classes).tolist()
    if len(unknown):
        raise ValueError(
            f"{name} must not have labels outside the classes {classes[:20].tolist()}; got "
            f"{unknown[:5]}."
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

    With several labels per image, each label is a separate problem with the classes 0 and 1.
    """
    if len(classes) < 2:
        raise ValueError(f"y must have at least 2 classes; got one class, {classes[0]!r}.")
    if class_weight is None:
        return dataset
    try:
        if dataset.is_multilabel:
            by_class = _weigh_labels(dataset.labels, class_weight)
            weights = by_class * dataset.weights[:, None]
        else:
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


def _weigh_labels(labels: NDArray[np.int64], class_weight: ClassWeight) -> NDArray[np.float64]:
    """Return the weight of each label of each image."""
    if isinstance(class_weight, Mapping):
        if not {0, 1}.issuperset(class_weight):
            raise ValueError("with several labels per image, the keys must be 0 and 1")
        weights = [float(class_weight.get(value, 1)) for value in (0, 1)]
        return np.where(labels, weights[1], weights[0])
    return np.stack([compute_sample_weight(class_weight, label) for label in labels.T], axis=1)
