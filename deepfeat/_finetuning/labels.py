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
class LabelledImages:
    """Images with labels and weights."""

    records: list[Record]
    labels: NDArray[Any]
    weights: NDArray[np.float64]

    def take(self, places: NDArray[np.intp]) -> "LabelledImages":
        records = [self.records[place] for place in places]
        return LabelledImages(records, self.labels[places], self.weights[places])


def label_images(
    records: list[Record], y: Any, sample_weight: Any = None, *, name: str = "y"
) -> LabelledImages:
    """Check labels, which an error calls `name`, and weights of images against these."""
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
                f"sample_weight has shape {weights.shape}, and {labels.shape} is expected: one "
                "weight an image."
            )
    return LabelledImages(records, labels, weights)


def check_known(labels: NDArray[Any], classes: NDArray[Any], name: str) -> None:
    """Raise if there are labels that are none of the classes."""
    unknown = np.setdiff1d(labels, classes)
    if len(unknown):
        raise ValueError(
            f"{name} has labels that are none of the classes: {unknown[:5].tolist()}. The classes "
            f"are {classes[:20].tolist()}."
        )


def leave_out_weightless(images: LabelledImages) -> LabelledImages:
    """Leave out images whose weight is 0."""
    images = images.take(np.flatnonzero(images.weights))
    if not images.records:
        raise ValueError("sample_weight is zero for every image.")
    return images


def set_aside(
    images: LabelledImages, fraction: float, seed: int
) -> tuple[LabelledImages, LabelledImages]:
    """Set a stratified part of the images aside; return the others, and it."""
    classes, counts = np.unique(images.labels, return_counts=True)
    if counts.min() < 2:
        raise ValueError(
            f"class {classes[counts.argmin()]!r} has one image, of which none can be set aside for "
            "early stopping: give X_val and y_val, or more images."
        )
    total = len(images.records)
    count = math.ceil(fraction * total)
    fits = len(classes) <= count <= total - len(classes)
    if fits:
        learned, checked = map(
            images.take,
            train_test_split(
                np.arange(total), test_size=count, stratify=images.labels, random_state=seed
            ),
        )
    if not fits or len(np.unique(learned.labels)) < len(classes):
        raise ValueError(
            f"validation_fraction={fraction} sets {count} of {total} images aside. As many as the "
            f"{len(classes)} classes are needed, and an image of each class has to be left: "
            "change it, or give X_val and y_val."
        )
    return learned, checked


def weigh(
    images: LabelledImages, classes: NDArray[Any], class_weight: ClassWeight
) -> LabelledImages:
    """Multiply the weights of images by those of their classes."""
    if len(classes) < 2:
        raise ValueError(
            f"y has one class, {classes[0]!r}, and a classifier needs at least 2 classes."
        )
    try:
        weights = images.weights * compute_sample_weight(class_weight, images.labels)
    except (TypeError, ValueError) as error:
        raise ValueError(f"class_weight={class_weight!r}: {error}") from error
    if not (np.isfinite(weights).all() and (weights >= 0).all()):
        raise ValueError(f"class_weight={class_weight!r}: finite weights from 0 are expected.")
    if not weights.any():
        raise ValueError("class_weight leaves no image a weight above 0.")
    return replace(images, weights=weights)
