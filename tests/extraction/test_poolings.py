"""Lists of poolings: their columns, names and norms, one pass, and one row each in the cache."""

import numpy as np
import pytest
import timm
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.svm import LinearSVC

from deepfeat import DeepFeatureExtractor, FeatureCache
from deepfeat._backbones.resnet10_slim import SlimResNet

SLIM, VIT = "resnet10_slim", "timm/test_vit.r160_in1k"
KINDS = {SLIM: SlimResNet, VIT: timm.models.vision_transformer.VisionTransformer}


def make(backbone=VIT, layer="norm", **params):
    """Make a fast extractor, which computes every row anew unless it is given a cache."""
    fast = {"weights": None, "image_size": 32, "num_workers": 0, "cache": None}
    return DeepFeatureExtractor(backbone, layer, **fast | params)


LISTS = [
    (SLIM, ["layer2", "layer3"], ["avg", "max"]),
    (SLIM, ["layer3", "layer1", "avgpool"], ["flatten", "gem", "avg"]),
    (SLIM, "layer2", ["max"]),
    (VIT, ["norm", "blocks.3"], ["cls", "avg"]),
    (VIT, ["blocks.3", "penultimate", "norm"], ("max", "flatten", "cls", "gem")),
]


def as_list(given):
    return list(given) if isinstance(given, (list, tuple)) else [given]


def extract_apart(backbone, layers, poolings, X, **params):
    """Extract each pooling of each layer by itself; vectors, and maps of one position, once."""
    return [
        make(backbone, layer, pooling=pooling, **params).transform(X)
        for layer in as_list(layers)
        for pooling in (["avg"] if layer in ("avgpool", "penultimate") else poolings)
    ]


# Columns ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["l2", "max", None])
@pytest.mark.parametrize(("backbone", "layers", "poolings"), LISTS, ids=str)
def test_columns_are_those_of_each_pooling_alone(backbone, layers, poolings, norm, pictures):
    """Layer by layer, and in a layer in the order of the list, each with a norm of its own."""
    rows = make(backbone, layers, pooling=poolings, norm=norm).transform(pictures)
    parts = extract_apart(backbone, layers, poolings, pictures, norm=norm)
    assert_allclose(rows, np.hstack(parts), rtol=1e-5, atol=1e-6)
    if norm == "l2":
        width = np.cumsum([part.shape[1] for part in parts])[:-1]
        for part in np.split(rows, width, axis=1):
            assert_allclose(np.linalg.norm(part, axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize(("backbone", "layer"), [(VIT, "penultimate"), (SLIM, "avgpool")])
def test_what_has_one_position_is_given_once(backbone, layer, pictures):
    """Whatever the list, a vector is what it is, even where `gem` would raise values below 0."""
    poolings = ["avg", "gem", "max", "flatten"] + ["cls"] * (backbone == VIT)
    rows = make(backbone, layer, pooling=poolings, norm=None).transform(pictures)
    alone = make(backbone, layer, norm=None).transform(pictures)
    assert_allclose(rows, alone, rtol=1e-6)
    assert backbone == SLIM or rows.min() < 0


def test_a_list_of_one_is_that_one(pictures):
    """In values and names."""
    listed, alone = make(pooling=["cls"]), make(pooling="cls")
    assert_array_equal(listed.transform(pictures), alone.transform(pictures))
    assert_array_equal(listed.get_feature_names_out(), alone.get_feature_names_out())


# Names --------------------------------------------------------------------------------------------


def test_names_have_the_pooling_where_there_are_several(pictures):
    """Vectors have none; numbers begin anew in each."""
    extractor = make(layer=["norm", "penultimate"], pooling=["cls", "avg"])
    names = extractor.get_feature_names_out()
    assert_array_equal(
        names[[0, 17, 63, 64, 127, 128, 191]],
        [
            *("norm_cls_0000", "norm_cls_0017", "norm_cls_0063", "norm_avg_0000", "norm_avg_0063"),
            *("penultimate_0000", "penultimate_0063"),
        ],
    )
    assert len(set(names)) == len(names) == extractor.transform(pictures).shape[1]


@pytest.mark.parametrize(("backbone", "layers", "poolings"), LISTS, ids=str)
def test_there_is_one_name_a_column(backbone, layers, poolings, pictures):
    """None comes twice."""
    extractor = make(backbone, layers, pooling=poolings)
    names = extractor.get_feature_names_out()
    assert extractor.transform(pictures[:2]).shape[1] == len(names) == len(set(names))


# Errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backbone", "poolings", "message"),
    [
        (VIT, [], r"^pooling must be 'avg', .* or a list of these; got \[\]\.$"),
        (VIT, (), r"^pooling must be 'avg', .* or a list of these; got \(\)\.$"),
        (VIT, ["avg", "avg"], r"^pooling must not name one twice; got \['avg', 'avg'\]\.$"),
        (VIT, ["avg", "mean"], r"^pooling must be 'avg', .* or a list of these; got \['avg', 'me"),
        (VIT, ["avg", None], r"^pooling must be 'avg', .* or a list of these; got \['avg', None\]"),
        (VIT, [["avg"], "max"], r"^pooling must be 'avg', .* or a list of these; got \[\['avg'\]"),
        (SLIM, ["avg", "cls"], r"^pooling='cls' needs a class token, but layer 'layer2'"),
    ],
    ids=str,
)
@pytest.mark.parametrize("method", ["fit", "transform", "precompute"])
def test_a_wrong_list_is_refused(backbone, poolings, message, method, pictures):
    """Before any image is opened."""
    layer = "norm" if backbone == VIT else "layer2"
    extractor = make(backbone, layer, pooling=poolings, cache=FeatureCache())
    with pytest.raises(ValueError, match=message):
        getattr(extractor, method)(["nowhere.png"] if method != "fit" else pictures)


# One pass -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("backbone", [SLIM, VIT])
def test_several_poolings_need_one_pass(backbone, cached, pictures, count_images):
    """With a cache and without one."""
    seen = count_images(KINDS[backbone])
    layers, poolings = (
        (["layer2", "layer4"], ["avg", "max", "gem", "flatten"])
        if backbone == SLIM
        else (["blocks.1", "norm"], ["cls", "avg", "gem", "flatten"])
    )
    cache = FeatureCache() if cached else None
    make(backbone, layers, pooling=poolings, cache=cache).transform(pictures)
    assert sum(seen) == len(pictures)


SEARCHES = {
    SLIM: (["layer2", "layer3", ["layer3", "layer4"], "penultimate"], ["avg", ["max", "avg"]]),
    VIT: (["blocks.3", "stage2", ["blocks.5", "blocks.4"], "penultimate"], ["cls", ["cls", "avg"]]),
}


@pytest.mark.parametrize("where", ["memory", "disk"])
@pytest.mark.parametrize("backbone", SEARCHES)
def test_a_search_over_layers_and_poolings_needs_one_pass(
    backbone, where, pictures, count_images, tmp_path
):
    """4 layers x 2 poolings x 2 C x 2 folds and the refit: as many forwards as images."""
    seen = count_images(KINDS[backbone])
    layers, poolings = SEARCHES[backbone]
    y = np.arange(len(pictures)) % 2

    def search(cache):
        pipe = make_pipeline(make(backbone, cache=cache), LinearSVC(random_state=0))
        grid = {
            "deepfeatureextractor__layer": layers,
            "deepfeatureextractor__pooling": poolings,
            "linearsvc__C": [0.1, 10],
        }
        return GridSearchCV(pipe, grid, cv=2, error_score="raise").fit(pictures, y)

    found = search(str(tmp_path / "cache") if where == "disk" else FeatureCache())
    assert sum(seen) == len(pictures)
    if where == "memory":
        scores = search(None).cv_results_["mean_test_score"]
        assert sum(seen) > 10 * len(pictures)  # the measure can tell
        assert_allclose(found.cv_results_["mean_test_score"], scores)


def test_a_search_over_any_layers_needs_two_passes(pictures, count_images):
    """The norm is not the end of a stage: the second pass keeps all that are listed."""
    seen, cache = count_images(KINDS[VIT]), FeatureCache()
    for layer in ("blocks.3", "norm", "patch_embed", ["blocks.0", "norm"], -1):
        poolings = ["avg", "max"] if layer == "patch_embed" else ["cls", "avg", "max"]
        make(VIT, layer, pooling=poolings, cache=cache).transform(pictures)
    assert sum(seen) == 2 * len(pictures)


# The cache ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefetch", ["stages", None])
@pytest.mark.parametrize(("backbone", "layers", "poolings"), LISTS, ids=str)
def test_rows_from_the_cache_are_those_of_the_network(
    backbone, layers, poolings, prefetch, pictures, count_images
):
    """On their way in and on their way out."""
    params = {"pooling": poolings, "prefetch": prefetch}
    expected = make(backbone, layers, **params).transform(pictures)
    seen = count_images(KINDS[backbone])
    extractor = make(backbone, layers, cache=FeatureCache(), **params)
    for _ in range(2):
        assert_allclose(extractor.transform(pictures), expected, rtol=1e-5, atol=1e-6)
    assert sum(seen) == len(pictures)


def test_each_pooling_is_kept_by_itself(pictures, count_images):
    """Another extractor that asks for one of them, or in another order, finds it."""
    seen, cache = count_images(KINDS[VIT]), FeatureCache()
    first = ["cls", "gem", "flatten"]
    make(pooling=first, cache=cache, prefetch=None).transform(pictures)
    assert cache.info().namespaces == 3
    for pooling in (*first, first[::-1], ["flatten", "cls"]):
        rows = make(pooling=pooling, cache=cache, prefetch=None).transform(pictures)
        assert sum(seen) == len(pictures)
        expected = make(pooling=pooling).transform(pictures)
        seen.pop()
        assert_allclose(rows, expected, rtol=1e-5, atol=1e-6)
    make(pooling=["cls", "max"], cache=cache, prefetch=None).transform(pictures)
    assert sum(seen) == 2 * len(pictures)  # what was not asked for is not there


def test_the_usual_poolings_are_kept_with_any_other(pictures, count_images):
    """By default "avg", "max" and "cls" come along, of the layers that a pass keeps."""
    seen, cache = count_images(KINDS[VIT]), FeatureCache()
    make(pooling="gem", cache=cache).transform(pictures)
    for pooling in ("avg", "max", "cls", ["cls", "gem"]):
        make(layer=["norm", "blocks.5"], pooling=pooling, cache=cache).transform(pictures)
    assert sum(seen) == len(pictures)


def test_precompute_fills_in_all_poolings(pictures, count_images):
    """So that the search computes nothing."""
    seen, cache = count_images(KINDS[VIT]), FeatureCache()
    extractor = make(pooling=["cls", "gem"], cache=cache, prefetch=None).precompute(pictures)
    extractor.transform(pictures)
    assert sum(seen) == len(pictures)
