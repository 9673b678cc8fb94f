"""Tables: which inputs are tables, and rows that take the shape of an image."""

import re

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from numpy.testing import assert_array_equal, assert_equal
from PIL import Image
from sklearn.base import BaseEstimator

from deepfeat import ImageError
from deepfeat._images.records import as_records, is_tabular
from deepfeat._images.tables import find_records


def read(X, image_shape=None):
    """Open every image of X."""
    return np.stack([np.asarray(record.open()) for record in as_records(X, image_shape)])


def rows(pictures):
    return pictures.reshape(len(pictures), -1)


TABLES = {
    "list of rows": [[0.0, 0.5], [1.0, 0.0]],
    "list of 1-D arrays": [np.zeros(64), np.ones(64)],
    "numbers": np.zeros(4),
    "list of numbers": [1, 2, 3],
    "list of booleans": [[True, False], [False, True]],
    "table of objects": np.zeros((3, 64), dtype=object),
    "empty table": np.zeros((0, 64)),
    "Series of numbers": pd.Series([0.0, 1.0]),
    "numeric column": pd.DataFrame({"a": [0.0, 1.0]}),
    "whole-number column": pd.DataFrame({"a": [0, 1]}),
    "two columns of str": pd.DataFrame({"a": ["x"], "b": ["y"]}),
    "no columns": pd.DataFrame(),
    "polars Series of numbers": pl.Series([0.0, 1.0]),
    "polars numeric column": pl.DataFrame({"a": [0.0, 1.0]}),
    "polars table": pl.DataFrame({"a": [0.0], "b": [1.0]}),
    "tensor of rows": torch.zeros(3, 64),
}
NO_TABLES = {
    "nothing": [],
    "missing first": [None, "a.png"],
    "NaN first": [np.nan, "a.png"],
    "NaN alone": [np.nan],
    "row first": [np.zeros(4), np.zeros((4, 4))],
    "nothing first": [[], np.zeros((4, 4))],
    "number first": [1, np.zeros((4, 4))],
    "rows of two lengths": [[1, 2], [3]],
    "images and labels": [(np.zeros((4, 4)), 1), (np.ones((4, 4)), 0)],
    "column of objects, NaN first": np.array([[np.nan], ["a.png"]], dtype=object),
    "objects, missing first": np.array([None, "a.png"], dtype=object),
    "Series with a missing path": pd.Series(["a.png", None]),
    "Series of objects": pd.Series([], dtype=object),
    "one image": Image.new("L", (2, 2)),
    "text": "a.png",
    "dict": {"a": 1},
    "number": 3,
    "none": None,
    "scalar": np.array(1.0),
}


@pytest.mark.parametrize("X", TABLES.values(), ids=TABLES)
def test_numbers_in_one_or_two_dimensions_are_a_table(X):
    """Whatever scikit-learn would validate as numbers is a table, in any container."""
    assert_equal(is_tabular(X), True)


@pytest.mark.parametrize("X", NO_TABLES.values(), ids=NO_TABLES)
def test_anything_but_numbers_is_not_a_table(X):
    """`as_records` splits it into images, or refuses it."""
    assert_equal(is_tabular(X), False)


@pytest.mark.parametrize(
    "image_shape", [(6, 7), (-1, 7), (6, -1), [6, 7], np.array([6, 7])], ids=str
)
def test_grey_rows_take_the_given_shape(image_shape):
    """A flattened grey image becomes (H, W), with one side inferred if it is -1."""
    grey = np.arange(84, dtype=np.uint8).reshape(2, 6, 7)
    assert_array_equal(read(grey.reshape(2, 42), image_shape), read(grey))


@pytest.mark.parametrize("image_shape", [(6, 7, 3), (-1, 7, 3), (6, -1, 3), (6, 7, -1)], ids=str)
def test_colour_rows_take_the_given_shape(image_shape, colours):
    """A flattened colour image becomes (H, W, C), with one side or the channels inferred."""
    assert_array_equal(read(rows(colours), image_shape), colours)


IMAGE_SHAPES = {
    **dict.fromkeys(
        [(7, 7), (3, -1), (8, 8, 3)],
        r"^image_shape=.* does not fit X of shape .2, 64.: a row has 64",
    ),
    **dict.fromkeys(
        [(4, 2, 8), (2, 4, -1)], "^image_shape=.* means 8 channels.* must have 1, 2, 3 or 4"
    ),
    **{
        shape: rf"^image_shape must be \(H, W\) or \(H, W, C\), .*; got {re.escape(repr(shape))}\.$"
        for shape in [(), (64,), 64, "88", (8, 8, 1, 1), (8.0, 8), (-1, -1), (0, 8), (-2, 8)]
    },
}


@pytest.mark.parametrize(
    ("image_shape", "message"), IMAGE_SHAPES.items(), ids=map(str, IMAGE_SHAPES)
)
def test_an_invalid_image_shape_raises(image_shape, message):
    """An image_shape that is malformed, or does not fit the rows, is shown with the reason."""
    with pytest.raises(ValueError, match=message):
        as_records(np.zeros((2, 64)), image_shape)


def test_the_columns_of_an_earlier_table_are_forgotten():
    """An estimator that is fitted again, on images, has no columns."""
    estimator = BaseEstimator()
    table = pd.DataFrame(np.zeros((2, 16)), columns=[f"pixel{number}" for number in range(16)])
    find_records(estimator, table, (4, 4), reset=True)
    assert estimator.n_features_in_ == len(estimator.feature_names_in_) == 16
    find_records(estimator, [np.zeros((4, 4))], (4, 4), reset=True)
    assert vars(estimator) == {}


def test_nan_in_a_row_is_an_error_of_the_call_or_of_that_image():
    """With ensure_all_finite=False, the other rows are read."""
    table = np.zeros((2, 16))
    table[1, 3] = np.nan
    with pytest.raises(ValueError, match="contains NaN"):
        find_records(BaseEstimator(), table, (4, 4), reset=True)
    options = {"reset": True, "ensure_all_finite": False}
    good, bad = find_records(BaseEstimator(), table, (4, 4), **options)
    assert good.open().shape == (4, 4, 3)
    with pytest.raises(ImageError, match=r"^X\[1\].*contains NaN"):
        bad.open()


@pytest.mark.parametrize("channels", [3, 4])
def test_an_array_of_one_colour_image_is_refused(channels):
    """Its rows would be read as grey images."""
    with pytest.raises(ValueError, match=r"looks like one colour image, .* pass \[X\]"):
        as_records(np.zeros((5, 6, channels), dtype=np.uint8))
