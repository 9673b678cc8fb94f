"""Trials: a file that differs is found, whatever differs; ties between two labels are not."""

import types

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.pipeline import make_pipeline
from sklearn.svm import LinearSVC
from torchvision.transforms import Compose, Resize, ToTensor

from deepfeat import ImageError
from deepfeat.onnx import export
from deepfeat.onnx._graphs import plan_export
from deepfeat.onnx._trials import (
    Trial,
    compare,
    load,
    make_example,
    make_noise,
    make_trial,
    run,
)

# Comparing --------------------------------------------------------------------------------------


def compare_arrays(kind, expected, found, tolerance=1e-3, tie=1e-2):
    as_arrays = [tuple(map(np.asarray, outputs)) for outputs in (expected, found)]
    trial = Trial("three images", [], as_arrays[0], tie)
    compare(types.SimpleNamespace(kind=kind, name="net"), trial, as_arrays[1], tolerance)


VALUES = [[1.0, -2.0, 0.5], [3.0, 100.0, 0.0]]
KINDS = {"transformer": "features", "regressor": "predictions"}


@pytest.mark.parametrize("kind", KINDS)
def test_values_may_differ_by_a_part_of_the_largest(kind):
    """Of all values, wherever they differ."""
    for sign in (-1, 1):
        compare_arrays(kind, [VALUES], [np.add(VALUES, sign * 0.099)])
        moved = np.array(VALUES)
        moved[0, 2] += sign * 0.101
        refusal = f"for three images, so it was not written. The {KINDS[kind]} differ by up to 0.1"
        with pytest.raises(ValueError) as caught:
            compare_arrays(kind, [VALUES], [moved])
        assert str(caught.value).startswith("net cannot be exported: ")
        assert refusal in str(caught.value)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("side", ["expected", "found", "both"])
def test_what_is_not_finite_is_never_the_same(value, side):
    """In the file, the estimator or both, among values that are equal."""
    bad = np.array(VALUES)
    bad[1, 0] = value
    expected = VALUES if side == "found" else bad
    found = VALUES if side == "expected" else bad
    with np.errstate(invalid="ignore"), pytest.raises(ValueError, match="features differ by up to"):
        compare_arrays("transformer", [expected], [found])


@pytest.mark.parametrize("shape", [(2, 1, 3), (3, 2), (6,), (2, 4), (2, 1), (1, 3), ()])
def test_another_shape_is_not_the_same(shape):
    """Not even if it can be broadcast, or all values are equal."""
    with pytest.raises(ValueError, match="features differ by up to inf"):
        compare_arrays("transformer", [np.ones((2, 3))], [np.ones(shape)])


def test_nothing_but_zeros_is_compared_exactly():
    """There is no scale."""
    compare_arrays("transformer", [np.zeros((2, 3))], [np.zeros((2, 3))])
    with pytest.raises(ValueError, match=r"differ by up to 1e-30, of 0\."):
        compare_arrays("transformer", [np.zeros((2, 3))], [np.full((2, 3), 1e-30)])


SCORES = [[5.0, -1.0, 4.9], [2.0, 3.0, 1.0], [1.0, 1.04, -10.0]]


@pytest.mark.parametrize(
    ("labels", "n_changed"),
    [
        ([0, 1, 1], 0),
        ([0, 1, 0], 0),  # 1.04 and 1.0 are a tie, of 10
        ([2, 1, 0], 0),  # so are 5.0 and 4.9, which are 0.1 apart
        ([0, 0, 1], 1),
        ([0, 2, 0], 1),
        ([1, 0, 2], 1),  # a tie is one, whichever label comes out
    ],
)
def test_labels_may_differ_where_two_scores_are_a_tie(labels, n_changed):
    """As close as a part of the largest score of all; a label of no class would be found by it."""
    expected, found = ([0, 1, 1], SCORES), (labels, SCORES)
    if not n_changed:
        compare_arrays("classifier", expected, found, tie=1.001e-2)
        return
    refusal = rf"so it was not written\. The labels of {n_changed} of 3 images differ\.$"
    with pytest.raises(ValueError, match=refusal):
        compare_arrays("classifier", expected, found, tie=1.001e-2)


def test_labels_of_two_classes_are_a_tie_near_zero():
    """Where the one score is close to the boundary."""
    scores = [-0.04, 5, 0.06, -5]
    compare_arrays("classifier", ([0, 1, 1, 0], scores), ([1, 1, 1, 0], scores))
    for labels, count in (([0, 1, 0, 0], 1), ([1, 0, 0, 1], 3)):
        with pytest.raises(ValueError, match=f"The labels of {count} of 4 images differ"):
            compare_arrays("classifier", ([0, 1, 1, 0], scores), (labels, scores))


def test_no_tie_is_closer_than_any():
    """With a tie of 0 only equal scores are one."""
    scores = [[1.0, 1.0], [1.0, np.nextafter(1, 2)]]
    compare_arrays("classifier", ([0, 1], scores), ([1, 1], scores), tie=0)
    with pytest.raises(ValueError, match="labels of 1 of 2 images"):
        compare_arrays("classifier", ([0, 1], scores), ([0, 0], scores), tie=0)


def test_scores_are_compared_before_labels():
    """Both must agree."""
    with pytest.raises(ValueError, match="scores differ by up to"):
        compare_arrays("classifier", ([0, 1, 1], SCORES), ([0, 1, 1], np.add(SCORES, 1)))


# Images -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("params", "shape"),
    [
        ({"backbone": "resnet10_slim"}, (32, 32)),
        ({"backbone": "resnet10_slim", "image_size": 40, "resize": "weights"}, (40, 40)),
        ({"preprocessing": Compose([Resize((8, 12)), ToTensor()])}, (8, 12)),
    ],
)
def test_noise_has_the_size_that_the_network_takes(params, shape, make_extractor):
    """Three images, which differ, of which one is darker and one lighter; always the same."""
    plan = plan_export(make_extractor(**params))
    noise = make_noise(plan)
    assert noise.shape == (3, *shape, 3)
    assert noise.dtype == np.uint8
    middle, dark, light = noise.mean(axis=(1, 2, 3))
    assert dark < middle / 2
    assert_allclose(dark + light, 255)
    assert noise.std(axis=(1, 2, 3)).min() > 10
    assert_array_equal(make_noise(plan), noise)


@pytest.mark.parametrize("batch_size", [None, 1, 2, 5, 8])
def test_an_example_is_a_batch_of_the_size_of_the_file(batch_size, make_extractor, pictures):
    """Of the images of the trial, again and again."""
    plan = plan_export(make_extractor("resnet10_slim"))
    trial = make_trial(plan, pictures[:3], "some images", tie=0)
    count = batch_size or 3
    expected = np.concatenate([pictures[:3]] * 3)[:count]
    assert_array_equal(make_example(plan, trial, batch_size), expected)


def test_an_image_that_cannot_be_read_is_named(tmp_path, make_extractor, pictures):
    """As by the estimator, though that may leave it out."""
    plan = plan_export(make_extractor("resnet10_slim", on_error="nan"))
    path = tmp_path / "broken.png"
    path.write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"broken\.png"):
        make_trial(plan, [pictures[0], str(path)], "some images", tie=0)


@pytest.mark.parametrize("batch", ["dynamic", 4])
def test_a_batch_that_is_not_full_gives_the_same(batch, tmp_path, make_extractor, pictures):
    """Files of one size are run on any number of images, of which each has one result."""
    pytest.importorskip("onnxruntime")
    pipe = make_pipeline(make_extractor(), LinearSVC())
    pipe.fit(pictures, np.array(["dark", "grey", "light"] * 4))
    plan = plan_export(pipe)
    export(pipe, tmp_path / "exported.onnx", batch=batch)
    session = load((tmp_path / "exported.onnx").read_bytes(), plan)
    for count in range(1, 6):
        X = pictures[:count]
        trial = make_trial(plan, X, "some images", tie=0)
        label, scores = run(session, plan, trial, None if batch == "dynamic" else batch)
        assert_array_equal(pipe.classes_[label], pipe.predict(X))
        assert_allclose(scores, pipe.decision_function(X), atol=1e-5)


def test_what_cannot_be_loaded_is_refused(make_extractor):
    """With the reason that ONNX Runtime gives."""
    pytest.importorskip("onnxruntime")
    plan = plan_export(make_extractor())
    with pytest.raises(
        ValueError, match=r"^Sequential cannot be exported: ONNX Runtime .*\(.+\)\.$"
    ):
        load(b"no model", plan)
