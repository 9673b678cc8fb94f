"""Checks of what displays are made from."""

import numbers
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.utils import check_array

from deepfeat import DeepFeatureExtractor


def check_extractor(extractor: Any) -> None:
    """Raise unless an object is an extractor."""
    if not isinstance(extractor, DeepFeatureExtractor):
        raise TypeError(
            f"extractor must be a DeepFeatureExtractor; got {type(extractor).__name__}. If it is a "
            "step of a pipeline, pass that step, such as pipeline[0]."
        )


def check_count(name: str, value: Any, smallest: int = 1) -> None:
    """Raise unless a parameter is an int that is large enough."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < smallest:
        raise ValueError(f"{name} must be an int of at least {smallest}; got {value!r}.")


def extract_rows(extractor: Any, images: Any) -> NDArray[Any]:
    """Return the features of images, one finite row per image."""
    rows = check_array(extractor.transform(images), ensure_all_finite=False)
    finite = np.isfinite(rows).all(axis=1)
    if not finite.all():
        raise ValueError(
            "The features of all images must be finite; those of images "
            f"{np.flatnonzero(~finite).tolist()[:10]} are not. Images that cannot be read must be "
            "left out."
        )
    return np.asarray(rows)
