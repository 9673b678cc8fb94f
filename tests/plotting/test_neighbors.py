"""NeighborsDisplay: neighbours and distances, compared with those computed by hand."""

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image
from scipy.spatial.distance import cdist
from sklearn.preprocessing import FunctionTransformer

from deepfeat.plotting import NeighborsDisplay


def flatten(images):
    return np.asarray(images).reshape(len(images), -1)


@pytest.fixture
def pixels():
    """A transformer of images whose features are their pixels."""
    return FunctionTransformer(flatten)


@pytest.fixture
def images(digits):
    return digits[0]


def shown(axis):
    return np.asarray(axis.images[0].get_array())[..., 0]


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_the_neighbours_of_an_index_are_the_nearest_other_images(pixels, images, metric):
    """In order, with their distances; the image itself is not among them."""
    display = NeighborsDisplay.from_extractor(pixels, images, [3, 50], n_neighbors=4, metric=metric)
    distances = cdist(flatten(images)[[3, 50]], flatten(images), metric)
    distances[[0, 1], [3, 50]] = np.inf
    assert_array_equal(display.indices, np.argsort(distances, axis=1)[:, :4])
    assert_allclose(display.distances, np.sort(distances, axis=1)[:, :4], atol=1e-6)


def test_each_picture_is_where_its_number_says(pixels, images):
    """A row has the query and its neighbours, under their distances."""
    display = NeighborsDisplay.from_extractor(pixels, images, [3, 50], n_neighbors=4)
    assert display.axes_.shape == (2, 5)
    for row, query, indices, distances in zip(
        display.axes_, [3, 50], display.indices, display.distances, strict=True
    ):
        for axis, index in zip(row, [query, *indices], strict=True):
            assert_allclose(shown(axis), images[index] * 255, atol=1)
        assert [axis.get_title() for axis in row[1:]] == [f"{d:.3g}" for d in distances]


def test_duplicates_are_neighbours_of_each_other(pixels, images):
    """A copy is a neighbour at distance zero, and no image is its own, however many copies."""
    copies = np.concatenate([images[:3], np.repeat(images[:1], 4, axis=0)])
    display = NeighborsDisplay.from_extractor(pixels, copies, [0, 6], n_neighbors=3)
    for query, row, distances in zip([0, 6], display.indices, display.distances, strict=True):
        assert query not in row
        assert set(row) < {0, 3, 4, 5, 6}
        assert_allclose(distances, 0, atol=1e-6)


def test_queries_may_be_other_images(pixels, images, tmp_path):
    """Also paths, for which the nearest image may be the same picture."""
    display = NeighborsDisplay.from_extractor(pixels, images[:50], images[[20, 70]], n_neighbors=2)
    assert display.indices[0, 0] == 20
    assert display.distances[0, 0] == pytest.approx(0, abs=1e-6)
    assert_allclose(shown(display.axes_[1, 0]), images[70] * 255, atol=1)
    Image.new("RGB", (400, 300), "red").save(tmp_path / "wide.png")
    wide = NeighborsDisplay.from_neighbors([tmp_path / "wide.png"], images, [[0.5]], [[7]])
    assert wide.queries[0].size == (224, 168)
    assert_allclose(shown(wide.axes_[0, 1]), images[7] * 255, atol=1)


@pytest.mark.parametrize(
    ("queries", "message"),
    [
        ([], r"^X is empty: at least one image is needed\.$"),
        ([0, 100], r"^queries must be indices from 0 to 99, or images; got \[0, 100\]\.$"),
        ([-1], r"^queries must be indices from 0 to 99, or images; got \[-1\]\.$"),
    ],
)
def test_bad_queries_are_refused(pixels, images, queries, message):
    """The error says which indices there are."""
    with pytest.raises(ValueError, match=message):
        NeighborsDisplay.from_extractor(pixels, images, queries)


def test_more_neighbours_than_images_are_refused(pixels, images):
    """An image is not its own neighbour."""
    message = r"^n_neighbors must be at most 2, the number of other images; got 3\.$"
    with pytest.raises(ValueError, match=message):
        NeighborsDisplay.from_extractor(pixels, images[:3], [0], n_neighbors=3)


@pytest.mark.parametrize("indices", [[1, 2], [[1, 2]], [[1], [2]]])
def test_neighbours_of_another_shape_are_refused(images, indices):
    """Distances and indices have one row per query."""
    with pytest.raises(ValueError, match=r"^distances and indices must both have shape \(1, k\)"):
        NeighborsDisplay.from_neighbors(images[:1], images, [[0.1]], indices)


@pytest.mark.parametrize(
    "queries",
    [(3, 50), np.array([3, 50]), torch.tensor([3, 50]), pd.Series([3, 50]), range(3, 51, 47)],
    ids=["tuple", "array", "tensor", "Series", "range"],
)
def test_indices_may_be_any_sequence_of_ints(pixels, images, queries):
    """All are read as indices, and not as images."""
    display = NeighborsDisplay.from_extractor(pixels, images, queries, n_neighbors=1)
    expected = NeighborsDisplay.from_extractor(pixels, images, [3, 50], n_neighbors=1)
    assert_array_equal(display.indices, expected.indices)


@pytest.mark.parametrize("queries", [np.array([True] * 100), np.array([3.0, 5.0])])
def test_masks_and_floats_are_no_indices(pixels, images, queries):
    """A mask would be read as the indices 0 and 1."""
    with pytest.raises(ValueError, match=r"^queries must be indices from 0 to 99, or images"):
        NeighborsDisplay.from_extractor(pixels, images, queries)


def test_features_may_come_as_a_dataframe(pixels, images):
    """As with `set_output`."""
    expected = NeighborsDisplay.from_extractor(pixels, images, [3, 50])
    frames = FunctionTransformer(lambda images: pd.DataFrame(flatten(images)))
    display = NeighborsDisplay.from_extractor(frames, images, [3, 50])
    assert_array_equal(display.indices, expected.indices)


def test_images_without_features_are_named(images):
    """NaN has no neighbours."""
    with_nan = FunctionTransformer(lambda X: np.where(np.arange(len(X))[:, None] == 4, np.nan, 1))
    with pytest.raises(ValueError, match=r"those of images \[4\] are not\."):
        NeighborsDisplay.from_extractor(with_nan, images, [0])


def test_a_missing_neighbour_leaves_its_axes_empty(images):
    """-1 is FAISS's sign of fewer neighbours than were asked for, and not the last image."""
    display = NeighborsDisplay.from_neighbors(images[:1], images, [[0.1, 3.4e38]], [[3, -1]])
    assert len(display.axes_[0, 1].images) == 1
    assert not display.axes_[0, 2].images
    assert display.axes_[0, 2].get_title() == ""


@pytest.mark.parametrize("indices", [[[100]], [[-2]], [[0.5]]])
def test_indices_of_no_image_are_refused(images, indices):
    """The error says which there are."""
    with pytest.raises(ValueError, match=r"^indices must be ints from 0 to 99, or -1; got "):
        NeighborsDisplay.from_neighbors(images[:1], images, [[0.1]], indices)


def test_only_the_neighbours_are_opened(images, tmp_path):
    """Of a million images, few are found."""
    mixed = [images[i] if i in (3, 5) else tmp_path / "missing.png" for i in range(10)]
    NeighborsDisplay.from_neighbors(images[:1], mixed, [[0.1, 0.2]], [[3, 5]])


@pytest.mark.parametrize("n_neighbors", [0, -1, 2.5, True])
def test_the_number_of_neighbours_is_a_count(pixels, images, n_neighbors):
    """At least one."""
    with pytest.raises(ValueError, match=r"^n_neighbors must be an int of at least 1; got "):
        NeighborsDisplay.from_extractor(pixels, images, [0], n_neighbors=n_neighbors)
