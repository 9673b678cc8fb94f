"""The input of estimators: images, or a table, which scikit-learn validates first."""

from typing import Any

from sklearn.base import BaseEstimator
from sklearn.utils import Tags
from sklearn.utils.validation import validate_data

from .decoding import unwrap_tensor
from .records import ImageShape, Record, as_records, is_tabular


def find_records(
    estimator: BaseEstimator,
    X: Any,
    image_shape: ImageShape,
    *,
    reset: bool,
    ensure_all_finite: bool = True,
    input_name: str = "X",
) -> list[Record]:
    """Split X into records; with `reset` store the columns of a table, else check them."""
    X = unwrap_tensor(X)
    if reset:  # X may be images where it was a table before
        estimator.__dict__.pop("n_features_in_", None)
        estimator.__dict__.pop("feature_names_in_", None)
    if image_shape is not None and is_tabular(X):
        X = validate_data(estimator, X, reset=reset, ensure_all_finite=ensure_all_finite)
    return as_records(X, image_shape, input_name)


def tag_images(tags: Tags, image_shape: ImageShape) -> Tags:
    """Set the input tags: images, and also tables if `image_shape` is given."""
    tags.input_tags.two_d_array = image_shape is not None
    tags.input_tags.three_d_array = True
    tags.input_tags.string = True
    return tags
