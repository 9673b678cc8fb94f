"""Tests of the classifier among scikit-learn's tools: its own checks, and ours over images."""

import copy
import pickle

import cloudpickle
import joblib
import numpy as np
import pytest
import sklearn
import torch
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.exceptions import NotFittedError, UnsetMetadataPassedError
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV, StratifiedKFold, cross_validate
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.utils import get_tags
from sklearn.utils.estimator_checks import estimator_checks_generator, parametrize_with_checks
from torch import nn
from torchvision.transforms import functional

from deepfeat import FineTuneClassifier

# The checks of scikit-learn ---------------------------------------------------------------------


class LineNet(nn.Module):
    """A network for images of one line, into which the tables of scikit-learn's checks turn."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 16, (1, 3), padding=(0, 1)), nn.ReLU(), nn.Flatten())
        self.fc = nn.Linear(16 * 16, 10)

    def forward(self, images):
        return self.fc(self.body(images))


class ToALine:
    """Preprocessing that is named alike in all processes, as the ids of tests must be."""

    def __call__(self, image):
        return functional.to_tensor(image.resize((16, 1), 0))

    def __repr__(self):
        return "to_a_line"


with torch.random.fork_rng(devices=[]):
    torch.manual_seed(0)
    line_net = LineNet()

# Its tables of random numbers become images of one line.
of_tables = FineTuneClassifier(
    line_net,
    preprocessing=ToALine(),
    unfreeze="all",
    image_shape=(1, -1),
    max_epochs=7,
    batch_size=16,
    learning_rate=0.03,
    backbone_learning_rate=0.03,
    augment=None,
    num_workers=0,
    random_state=0,
)
BLACK = (
    "its small integers are read on the scale of int64, where they are black: such an image is "
    "refused, rather than read on a scale that is guessed from its values"
)


def expected_to_fail(_estimator):
    return {
        "check_estimators_dtypes": BLACK,
        "check_sample_weights_pandas_series": BLACK,
        "check_sample_weights_not_an_array": BLACK,
        "check_sample_weights_shape": BLACK,
        "check_classifier_data_not_an_array": BLACK,
        "check_sample_weights_not_overwritten": (
            "its floats go far beyond [0, 1], the scale of floats: they are refused"
        ),
        "check_estimators_overwrite_params": (
            "it compares joblib's hashes, and that of a torch module is another for each copy"
        ),
        "check_sample_weight_equivalence_on_dense_data": (
            "an image that is repeated takes part in another order of steps than one that counts "
            "twice: stochastic gradient descent ends at another place"
        ),
    }


# The checks draw from normal distributions; of pixels, what lies outside [0, 1] is clipped.
ignores_clipping = pytest.mark.filterwarnings("ignore:Pixels outside the scale:UserWarning")


@ignores_clipping
@parametrize_with_checks([of_tables], expected_failed_checks=expected_to_fail)
def test_the_checks_of_scikit_learn_pass(estimator, check):
    """On the real class: with `image_shape` a table is a legal input."""
    check(estimator)


def test_the_checks_of_scikit_learn_really_run():
    """For an estimator that refuses tables there is one check: for ours there are 45 to pass."""
    checks = estimator_checks_generator(of_tables, expected_failed_checks=expected_to_fail(None))
    names = {check.func.__name__ for _, check in checks}
    assert len(names - expected_to_fail(None).keys()) >= 45


# Parameters and copies --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images(make_images):
    return make_images()


@pytest.fixture(scope="module")
def fitted(images, make_classifier):
    return make_classifier().fit(*images)


def test_get_params_and_set_params_name_every_parameter():
    """What was given is kept as it is, by a clone as well."""
    classifier = FineTuneClassifier("resnet18", unfreeze=["layer4"], batch_size=np.int64(3))
    params = classifier.get_params()
    assert params["unfreeze"] is classifier.unfreeze
    assert clone(classifier).get_params() == params
    assert FineTuneClassifier().set_params(**params).get_params() == params
    with pytest.raises(ValueError, match="Invalid parameter 'epochs'"):
        classifier.set_params(epochs=3)


def test_nothing_is_checked_before_fit():
    """As scikit-learn has it: a constructor only keeps what it is given."""
    params = FineTuneClassifier("nothing", unfreeze=3.5, max_epochs="many").get_params()
    assert params["backbone"] == "nothing"
    assert params["max_epochs"] == "many"


def test_a_clone_has_learned_nothing(fitted, images, assert_same_state, state_of):
    """It has the parameters alone."""
    new = clone(fitted)
    assert not hasattr(new, "module_")
    with pytest.raises(NotFittedError):
        new.predict(images[0])
    again = new.fit(*images)
    assert_same_state(state_of(again), state_of(fitted))


@pytest.mark.parametrize("method", ["predict", "predict_proba", "decision_function"])
def test_before_fit_there_is_nothing_to_predict_with(images, method, make_classifier):
    """Also after a `fit` that failed when it knew the columns of X already."""
    classifier = make_classifier(image_shape=(16, 16, 3))
    with pytest.raises(NotFittedError):
        getattr(classifier, method)(images[0])
    table = np.stack(images[0]).reshape(8, -1)
    with pytest.raises(ValueError, match="one class"):
        classifier.fit(table, ["a"] * 8)
    with pytest.raises(NotFittedError):
        getattr(classifier, method)(table)
    with pytest.raises(NotFittedError):
        classifier.to_extractor("hidden")


COPIES = {
    "pickle": lambda value: pickle.loads(pickle.dumps(value)),
    "cloudpickle": lambda value: pickle.loads(cloudpickle.dumps(value)),
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("kind", [*COPIES, "joblib"])
def test_a_copy_predicts_the_same(fitted, images, tmp_path, kind):
    """And has the same history, and can learn on."""
    X, y = images
    if kind == "joblib":
        joblib.dump(fitted, tmp_path / "classifier.joblib")
        again = joblib.load(tmp_path / "classifier.joblib")
    else:
        again = COPIES[kind](fitted)
    assert_array_equal(again.predict_proba(X), fitted.predict_proba(X))
    assert again.history_ == fitted.history_
    assert_array_equal(again.classes_, fitted.classes_)
    again.set_params(warm_start=True).fit(X, y)
    assert [epoch["epoch"] for epoch in again.history_] == [1, 2, 3, 4]
    assert len(fitted.history_) == 2


def test_a_pickle_has_its_tensors_on_the_cpu(images, make_classifier):
    """What was trained on a device opens on a machine without; `meta` plays the device here."""
    classifier = make_classifier().partial_fit(*images, classes=["dark", "light"])

    class Elsewhere(nn.Module):
        def cpu(self):
            moved.append(self)
            return self

        def __deepcopy__(self, memo):
            return self

    moved = []
    classifier.module_ = Elsewhere()
    state = classifier.__getstate__()
    assert moved == [classifier.module_]
    moments = state["_fitted"].attributes["_optimizer_state"]["optimizer"]["state"]
    assert {value.device.type for one in moments.values() for value in one.values()} == {"cpu"}


# Tools ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_search_chooses_what_to_unfreeze(n_jobs, make_images, make_classifier, make_plain):
    """And how fast to learn, also in two processes."""
    X, y = make_images(12)
    search = GridSearchCV(
        make_classifier(make_plain(norm=True), max_epochs=25, backbone_learning_rate=0.01),
        {"unfreeze": [None, ["blocks.1"], "all"], "learning_rate": [1e-30, 0.02]},
        cv=2,
        n_jobs=n_jobs,
        error_score="raise",
    )
    search.fit(X, y)
    assert search.best_params_["unfreeze"] == "all"
    assert search.best_score_ > 0.9
    assert search.score(X, y) == 1


def test_scores_of_folds_are_those_of_classifiers_fitted_on_them(images, make_classifier):
    """Folds of a list are lists."""
    X, y = images
    scores = cross_validate(make_classifier(max_epochs=5), X, y, cv=2, scoring="accuracy")
    halves = list(StratifiedKFold(2).split(X, y))
    expected = [
        make_classifier(max_epochs=5)
        .fit([X[i] for i in train], y[train])
        .score([X[i] for i in test], y[test])
        for train, test in halves
    ]
    assert_array_equal(scores["test_score"], expected)


def test_probabilities_can_be_calibrated(make_images, make_classifier):
    """By folds, and of a classifier that is fitted already."""
    X, y = make_images(12)
    calibrated = CalibratedClassifierCV(
        make_classifier(max_epochs=15, learning_rate=0.02, backbone_learning_rate=0.01), cv=2
    ).fit(X, y)
    probabilities = calibrated.predict_proba(X)
    assert_allclose(probabilities.sum(axis=1), 1)
    assert_array_equal(calibrated.classes_, ["dark", "light"])
    assert roc_auc_score(y == "light", probabilities[:, 1]) > 0.9


def test_it_is_the_end_of_a_pipeline(images, make_classifier):
    """Before it comes what makes images of something else."""
    X, y = images
    pipe = make_pipeline(FunctionTransformer(lambda rows: [255 - row for row in rows]))
    pipe.steps.append(("classifier", make_classifier(max_epochs=5)))
    pipe.fit(X, y)
    assert_array_equal(pipe.predict(X), pipe[-1].predict([255 - image for image in X]))


def test_weights_are_routed(make_images, make_classifier, assert_same_state, state_of):
    """To `fit` and to `score`, if that is asked for."""
    X, y = make_images(12)
    weights = np.linspace(0.1, 3, 12)
    with sklearn.config_context(enable_metadata_routing=True):
        classifier = make_classifier().set_fit_request(sample_weight=True)
        classifier.set_score_request(sample_weight=True)
        search = GridSearchCV(classifier, {"unfreeze": ["all"]}, cv=2, error_score="raise")
        search.fit(X, y, sample_weight=weights)
        with pytest.raises(UnsetMetadataPassedError):
            GridSearchCV(make_classifier(), {"unfreeze": ["all"]}, cv=2, error_score="raise").fit(
                X, y, sample_weight=weights
            )
    expected = make_classifier().fit(X, y, sample_weight=weights)
    assert_same_state(state_of(search.best_estimator_), state_of(expected))


def test_the_tags_tell_what_it_takes(make_classifier):
    """A classifier of images, and of tables where rows have a shape."""
    for image_shape, tables in [(None, False), ((4, 4), True)]:
        tags = get_tags(make_classifier(image_shape=image_shape))
        assert tags.estimator_type == "classifier"
        assert tags.input_tags.two_d_array is tables
        assert tags.input_tags.three_d_array
        assert tags.input_tags.string
        assert tags.target_tags.required
