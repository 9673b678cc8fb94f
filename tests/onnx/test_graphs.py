"""Estimators as modules of torch: what comes out is what they give, without any file."""

import pickle

import joblib
import numpy as np
import pytest
import torch
from numpy.testing import assert_array_equal
from sklearn.decomposition import PCA
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression, Ridge, RidgeClassifier
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import MinMaxScaler, Normalizer, StandardScaler
from sklearn.svm import LinearSVC
from torch import nn

from deepfeat._extraction.readers import load_network
from deepfeat.onnx._graphs import plan_export


@pytest.fixture(scope="session")
def labels():
    return np.array(["dark", "grey", "light"] * 4)


@pytest.fixture(scope="session")
def make_pipe(make_extractor):
    """Make a pipeline with a network of one's own."""
    return lambda *steps, **params: make_pipeline(make_extractor(**params), *steps)


@pytest.fixture
def run_graph():
    """Run the module of an estimator on images as the network takes them."""

    def run_graph(estimator, images):
        with torch.no_grad():
            outputs = plan_export(estimator).graph(torch.from_numpy(images))
        return [output.numpy() for output in outputs]

    return run_graph


# Features ---------------------------------------------------------------------------------------

POOLINGS = ["avg", "max", "gem", "flatten"]
FEATURES = {
    "bundled": ("resnet10_slim", ["layer1", "stage3", "penultimate", -1], POOLINGS),
    "convolution before its ReLU": ("resnet10_slim", ["layer1.0.conv1", "layer1.0.bn1"], "max"),
    "int": ("resnet10_slim", 3, "avg"),
    "transformer": ("timm/test_vit.r160_in1k", ["blocks.2", "norm"], ["cls", "avg", "flatten"]),
    "channels last": ("timm/test_convnext.r160_in1k", ["stage2", "penultimate"], POOLINGS),
    "rectified": ("alexnet", ["fc8", "relu8", "relu5"], "avg"),
}


@pytest.mark.parametrize("norm", ["l1", "l2", "max", None])
@pytest.mark.parametrize("case", FEATURES)
def test_features_are_those_of_an_extractor(
    case, norm, pictures, make_extractor, run_graph, assert_near
):
    """Of several layers and poolings at once, each divided by its norm."""
    backbone, layer, pooling = FEATURES[case]
    weights = "DEFAULT" if backbone == "resnet10_slim" else None
    if backbone.startswith("timm/"):
        pytest.importorskip("timm")
    side = 64 if backbone == "alexnet" else 32
    X = pictures[:3].repeat(side // 32, axis=1).repeat(side // 32, axis=2)
    extractor = make_extractor(
        backbone, layer, pooling=pooling, norm=norm, weights=weights, image_size=side
    )
    expected = extractor.transform(X)
    assert np.ptp(expected, axis=0).max() > 1e-3 * np.abs(expected).max()
    (features,) = run_graph(extractor, X)
    assert_near(features, expected, 1e-5)


@pytest.mark.parametrize("layer", ["0", "1", "2", ["2", "1", "0"], "5"])
def test_a_layer_is_read_before_its_relu_overwrites_it(
    layer, pictures, as_floats, make_extractor, run_graph, assert_near
):
    """In a network of one's own, where ReLU works in place, and deeper layers are run as well."""
    extractor = make_extractor(layer=layer, pooling="max", norm=None)
    (features,) = run_graph(extractor, as_floats(pictures))
    assert_near(features, extractor.transform(pictures), 1e-5)
    assert (features.min() < 0) == (layer != "2")


@pytest.mark.parametrize("scale", [1e15, 1e-12, 1e-18])
def test_features_of_any_size_are_divided_by_their_norm(
    scale, pictures, as_floats, make_net, make_extractor, run_graph, assert_near
):
    """Unless it is all but zero."""
    net = make_net()
    with torch.no_grad():
        net[5].weight *= scale
        net[5].bias *= scale
    extractor = make_extractor(net, "5")
    (features,) = run_graph(extractor, as_floats(pictures))
    assert_near(features, extractor.transform(pictures), 1e-5)


# Predictions ------------------------------------------------------------------------------------

HEADS = [LinearSVC(), LogisticRegression(), RidgeClassifier()]


@pytest.mark.parametrize("head", HEADS, ids=str)
@pytest.mark.parametrize("n_classes", [2, 3])
def test_a_label_is_an_index_into_the_classes(
    head, n_classes, pictures, as_floats, labels, make_pipe, run_graph, assert_near
):
    """Of labels of any type; a boundary that no image is near."""
    X, y = (values[labels != "grey"] if n_classes == 2 else values for values in (pictures, labels))
    pipe = make_pipe(StandardScaler(), head).fit(X, y)
    plan = plan_export(pipe)
    label, scores = run_graph(pipe, as_floats(X))
    assert_array_equal(plan.classes, pipe.classes_)
    assert_array_equal(plan.classes[label], pipe.predict(X))
    assert_near(scores, pipe.decision_function(X))
    assert set(label) == set(range(n_classes))


def test_a_plan_predicts_what_its_estimator_does(pictures, labels, make_pipe):
    """That is what files are compared with."""
    pipe = make_pipe(StandardScaler(), PCA(3), LogisticRegression()).fit(pictures, labels)
    label, scores = plan_export(pipe).predict(pictures)
    assert_array_equal(pipe.classes_[label], pipe.predict(pictures))
    assert_array_equal(scores, pipe.decision_function(pictures))
    (features,) = plan_export(pipe[:-1]).predict(pictures)
    assert_array_equal(features, pipe[:-1].transform(pictures))
    pipe = make_pipe(Ridge()).fit(pictures, np.arange(12.0))
    (predictions,) = plan_export(pipe).predict(pictures)
    assert_array_equal(predictions, pipe.predict(pictures))


@pytest.mark.parametrize("n_classes", [2, 3])
def test_logits_are_those_of_a_fine_tuned_classifier(
    n_classes, pictures, labels, make_classifier, run_graph, assert_near
):
    """Those of two classes as one difference."""
    X, y = (values[labels != "grey"] if n_classes == 2 else values for values in (pictures, labels))
    classifier = make_classifier().fit(X, y)
    label, scores = run_graph(classifier, X)
    assert_near(scores, classifier.decision_function(X), 1e-5)
    assert_array_equal(classifier.classes_[label], classifier.predict(X))


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
@pytest.mark.slow
def test_auxiliary_outputs_are_left_out(
    name, pictures, labels, make_classifier, run_graph, assert_near
):
    """A network that returns several outputs while it is trained gives one in a file."""
    X = pictures.repeat(3, axis=1).repeat(3, axis=2)
    classifier = make_classifier(name, weights=None, image_size=96).fit(X, labels)
    _, scores = run_graph(classifier, X)
    assert_near(scores, classifier.decision_function(X), 1e-5)


# What may be exported ---------------------------------------------------------------------------


def nest(pipe):
    return Pipeline([("all", Pipeline([("pipe", pipe)]))])


def search(pipe):
    grid = {"linearsvc__C": [1e-9, 1]}
    return GridSearchCV(pipe, grid, cv=2, error_score="raise")


def search_a_step(pipe):
    *steps, (name, head) = pipe.steps
    return Pipeline([*steps, (name, GridSearchCV(head, {"C": [1e-9, 1]}, cv=2))])


def pass_through(pipe):
    (name, extractor), *steps = pipe.steps
    idle = ("idle", "passthrough")
    return Pipeline([idle, (name, extractor), ("none", None), *steps[:-1], idle_again(), steps[-1]])


def idle_again():
    return ("idle again", "passthrough")


def split_in_two(pipe):
    return Pipeline([("first", pipe[:2]), ("second", pipe[2:])])


@pytest.mark.parametrize("wrap", [nest, search, search_a_step, pass_through, split_in_two])
def test_pipelines_and_searches_may_be_nested(
    wrap, pictures, as_floats, labels, make_pipe, run_graph, assert_near
):
    """The fitted steps count, in their order."""
    pipe = make_pipe(MinMaxScaler(), LinearSVC())
    wrapped = wrap(pipe).fit(pictures, labels)
    plan = plan_export(wrapped)
    assert [type(step).__name__ for step in plan.steps] == ["MinMaxScaler", "LinearSVC"]
    _, scores = run_graph(wrapped, as_floats(pictures))
    assert_near(scores, wrapped.decision_function(pictures))


def test_a_search_for_a_fine_tuned_classifier_has_found_one(
    pictures, labels, make_net, make_classifier, as_floats, run_graph, assert_near
):
    """Its best estimator, in a pipeline or not."""
    classifier = make_classifier(make_net())
    for estimator, name in ((classifier, ""), (make_pipeline(classifier), "finetuneclassifier__")):
        grid = {f"{name}learning_rate": [1e-9, 0.5]}
        found = GridSearchCV(estimator, grid, cv=2, error_score="raise").fit(pictures, labels)
        _, scores = run_graph(found, as_floats(pictures))
        assert_near(scores, found.decision_function(pictures))


def test_an_extractor_of_a_trained_network_takes_what_its_classifier_does(
    pictures, labels, make_classifier, run_graph, assert_near
):
    """8-bit images: it knows their preprocessing, which it describes."""
    classifier = make_classifier().fit(pictures, labels)
    extractor = classifier.to_extractor(["layer4", "penultimate"]).set_params(num_workers=0)
    (features,) = run_graph(extractor, pictures)
    assert_near(features, extractor.transform(pictures), 1e-5)
    described = plan_export(extractor).preprocessing.description
    assert described == plan_export(classifier).preprocessing.description
    assert described["resize"] == "stretch"


def test_the_kind_tells_what_comes_out(pictures, labels, make_extractor, make_pipe):
    """A label and scores, predictions, or features."""
    kinds = {
        "classifier": make_pipe(LinearSVC()).fit(pictures, labels),
        "regressor": make_pipe(Ridge()).fit(pictures, np.arange(12)),
        "transformer": make_pipe(Normalizer()).fit(pictures),
    }
    for kind, estimator in kinds.items():
        assert plan_export(estimator).kind == kind
    assert plan_export(make_extractor()).kind == "transformer"


def test_what_does_not_begin_with_a_network_is_named(
    pictures, labels, make_extractor, make_classifier
):
    """With what may be exported."""
    flat = pictures.reshape(len(pictures), -1).astype(np.float32)
    head, scaler = LinearSVC().fit(flat, labels), StandardScaler().fit(flat)
    classifier = make_classifier().fit(pictures, labels)
    wrong = {
        "StandardScaler, then DeepFeatureExtractor": make_pipeline(scaler, make_extractor()),
        "FineTuneClassifier, then LinearSVC": make_pipeline(classifier, head),
        "LinearSVC": head,
        "'resnet10_slim'": "resnet10_slim",
        r"ReLU\(\)": nn.ReLU(),
        "an empty Pipeline": Pipeline([("idle", "passthrough")]),
    }
    for names, estimator in wrong.items():
        with pytest.raises(ValueError, match=rf"^estimator must be a Fine.*; got {names}\.$"):
            plan_export(estimator)


def test_a_search_that_keeps_no_estimator_is_refused(pictures, labels, make_pipe):
    """It says what it must do."""
    found = search(make_pipe(LinearSVC())).set_params(refit=False).fit(pictures, labels)
    with pytest.raises(ValueError, match=r"with refit=True; got GridSearchCV\.$"):
        plan_export(found)


@pytest.mark.parametrize("fitted", ["nothing", "all but the last", "a search"])
def test_what_is_not_fitted_is_refused(fitted, pictures, labels, make_pipe, make_classifier):
    """Each step is looked at."""
    pipe = make_pipe(StandardScaler(), LinearSVC())
    if fitted == "all but the last":
        pipe[:-1].fit(pictures)
    for estimator in (search(pipe) if fitted == "a search" else pipe, make_classifier()):
        with pytest.raises(NotFittedError):
            plan_export(estimator)


# What stays as it was ---------------------------------------------------------------------------


@pytest.mark.parametrize("backbone", [None, "resnet10_slim"])
@pytest.mark.parametrize("wrap", [nest, search])
def test_a_pipeline_stays_as_it_was(wrap, backbone, pictures, labels, make_pipe):
    """To the bit, with all parameters that a file does not depend on, also once it was run."""
    params = {"precision": "bfloat16", "on_error": "nan", "verbose": 0, "cache": "memory"}
    pipe = make_pipe(StandardScaler(), LinearSVC(), backbone=backbone, **params)
    estimator = wrap(pipe).fit(pictures, labels)
    before = pickle.dumps(estimator)
    plan_export(estimator).predict(pictures)
    assert pickle.dumps(estimator) == before


def describe(net):
    """Describe what others may have changed in a network."""
    modules = dict(net.named_modules())
    hooks = [(len(part._forward_hooks), len(part._forward_pre_hooks)) for part in modules.values()]
    modes = [part.training for part in modules.values()]
    weights = {name: (value.requires_grad, value.device) for name, value in net.named_parameters()}
    return list(modules), hooks, modes, weights, joblib.hash(net.state_dict())


def test_networks_stay_as_they_were(pictures, as_floats, labels, make_net, make_extractor):
    """That of the user, in training mode with a hook, and that which a process shares."""
    net = make_net().train()
    net[1].eval()
    net[0].register_forward_hook(lambda *_: None)
    named = make_extractor("resnet10_slim")
    shared = load_network(named._find_backbone(), torch.device("cpu"))
    before = [describe(net), describe(shared)]
    for extractor, images in ((make_extractor(net), as_floats(pictures)), (named, pictures)):
        plan_export(extractor).graph.eval()(torch.from_numpy(images))
    assert [describe(net), describe(shared)] == before


def test_a_fine_tuned_network_stays_as_it_was(pictures, labels, make_classifier):
    """Training it further is not affected."""
    classifier = make_classifier(unfreeze="layer4").fit(pictures, labels)
    classifier.module_.train()
    module, before = classifier.module_, describe(classifier.module_)
    params = classifier.set_params(precision="bfloat16", verbose=0).get_params()
    plan = plan_export(classifier)
    plan.graph.eval()(torch.from_numpy(pictures))
    plan.predict(pictures)
    assert classifier.module_ is module
    assert describe(module) == before
    assert classifier.get_params() == params
    assert plan.source.get_params()["precision"] == "float32"
