"""LayerGridDisplay: the artists, compared with values computed by hand."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline

from deepfeat import DeepFeatureExtractor
from deepfeat.plotting import LayerGridDisplay


def make_search(params, scores, **attributes):
    """Make an object like a fitted search, with one mean score per candidate."""
    results = {
        "params": params,
        "mean_test_score": np.array(scores, dtype=float),
        "rank_test_score": np.argsort(np.argsort(-np.array(scores))) + 1,
    }
    return SimpleNamespace(cv_results_=results, refit=True, **attributes)


def grid(layers, Cs, **others):
    return [
        {"x__layer": layer, "svc__C": C, **dict(zip(others, values, strict=True))}
        for values in itertools.product(*others.values())
        for C in Cs
        for layer in layers
    ]


@pytest.fixture(scope="module")
def search(digits):
    """A real search; one of its candidates is a list of layers."""
    images, labels = digits
    extractor = DeepFeatureExtractor("squeezenet1_1", weights=None, image_size=32, num_workers=0)
    grid = {
        "deepfeatureextractor__layer": ["stage2", ["stage1", "stage2"]],
        "logisticregression__C": [10, 0.01, 1],
    }
    pipeline = make_pipeline(extractor, LogisticRegression())
    return GridSearchCV(pipeline, grid, cv=2).fit(images[:40], labels[:40])


def test_the_heat_map_holds_the_mean_scores(search):
    """Layers are in the given order, C in ascending order, and the best cell has a frame."""
    display = LayerGridDisplay.from_search(search)
    layers, Cs = ["stage2", ["stage1", "stage2"]], [0.01, 1, 10]
    expected = np.empty((2, 3))
    for params, score in zip(
        search.cv_results_["params"], search.cv_results_["mean_test_score"], strict=True
    ):
        row = layers.index(params["deepfeatureextractor__layer"])
        expected[row, Cs.index(params["logisticregression__C"])] = score
    assert_array_equal(display.im_.get_array(), expected)
    assert np.ptp(expected) > 0
    axes = display.ax_
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["stage2", "stage1 + stage2"]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0.01", "1", "10"]
    best = search.best_params_
    cell = (
        layers.index(best["deepfeatureextractor__layer"]),
        Cs.index(best["logisticregression__C"]),
    )
    assert display.best == cell
    for line in axes.lines:
        assert_allclose([line.get_ydata().mean(), line.get_xdata().mean()], cell, atol=0.2)
    written = [[text.get_text() for text in row] for row in display.text_]
    assert written == [[f"{score:.3f}" for score in row] for row in expected]
    assert display.figure_.axes[1].get_ylabel() == "mean test score"


def test_a_cell_has_the_best_score_over_other_parameters():
    """If more than the layer and C was searched, and if a candidate failed."""
    params = grid(["a", "b"], [1, 2], **{"x__norm": ["l2", None]})
    scores = np.array([0.1, 0.9, 0.3, np.nan, 0.5, 0.2, 0.25, 0.8])
    display = LayerGridDisplay.from_search(make_search(params, scores))
    assert_array_equal(display.scores, [[0.5, 0.3], [0.9, 0.8]])
    assert display.best == (1, 0)
    assert display.figure_.axes[1].get_ylabel() == "mean test score\n(best norm)"


def test_a_cell_without_a_candidate_is_empty():
    """A randomised search does not fill the grid."""
    params = grid(["a", "b"], [1, 2])[:3]
    display = LayerGridDisplay.from_search(make_search(params, [0.1, 0.2, 0.3]))
    assert_array_equal(display.scores, [[0.1, 0.3], [0.2, np.nan]])
    assert display.text_[1, 1] is None


def test_an_ambiguous_parameter_must_be_named():
    """If two steps have a C, the error asks for C_param."""
    params = [entry | {"other__C": 1} for entry in grid(["a", "b"], [1, 2])]
    search = make_search(params, [0.1, 0.2, 0.3, 0.4])
    with pytest.raises(ValueError, match=r"^Several.* in 'C': set C_param .*'svc__C', 'other__C'"):
        LayerGridDisplay.from_search(search)
    display = LayerGridDisplay.from_search(search, C_param="svc__C")
    assert display.scores.shape == (2, 2)
    with pytest.raises(ValueError, match="No candidate has both 'x__layer' and 'svc__c'"):
        LayerGridDisplay.from_search(search, C_param="svc__c")


def test_an_ambiguous_score_must_be_named():
    """By default it is that of refit."""
    search = make_search(grid(["a"], [1, 2]), [0.1, 0.2])
    results = search.cv_results_
    for name, scores in (("f1", [0.3, 0.4]), ("neg_log_loss", [-0.4, -0.5])):
        results[f"mean_test_{name}"] = np.array(scores)
        results[f"rank_test_{name}"] = np.argsort(np.argsort(-np.array(scores))) + 1
    del results["mean_test_score"], results["rank_test_score"]
    with pytest.raises(ValueError, match=r"must be one of \['f1', 'neg_log_loss'\]; got True\."):
        LayerGridDisplay.from_search(search)
    search.refit = "f1"
    assert LayerGridDisplay.from_search(search).best == (0, 1)
    chosen = LayerGridDisplay.from_search(search, score_name="neg_log_loss")
    assert_array_equal(chosen.scores, [[-0.4, -0.5]])
    assert chosen.best == (0, 0)


def test_anything_but_a_fitted_search_over_layers_is_refused(digits):
    """A search that is not fitted, another estimator, or a search over other parameters."""
    classifier = LogisticRegression()
    search = GridSearchCV(classifier, {"C": [1, 2]}, cv=2)
    with pytest.raises(NotFittedError, match="GridSearchCV is not fitted"):
        LayerGridDisplay.from_search(search)
    with pytest.raises(TypeError, match=r"must be a fitted search .*; got LogisticRegression\."):
        LayerGridDisplay.from_search(classifier)
    flat = digits[0].reshape(100, -1)
    with pytest.raises(ValueError, match=r"^No .* ends in 'layer': set layer_param .*\['C'\]"):
        LayerGridDisplay.from_search(search.fit(flat, digits[1]))


def test_scores_can_be_read_on_any_colour():
    """They are dark on light cells, and light on dark ones."""
    display = LayerGridDisplay(np.array([[0.0, 1.0]]), layers=["a"], C=[1, 2], best=(0, 1)).plot(
        cmap="gray"
    )
    assert [text.get_color() for text in display.text_[0]] == ["white", "black"]
