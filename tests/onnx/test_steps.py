"""Steps of scikit-learn as functions of tensors: rows and scores are those of scikit-learn."""

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from sklearn.base import clone, is_regressor
from sklearn.decomposition import PCA, IncrementalPCA
from sklearn.ensemble import RandomForestClassifier
from sklearn.feature_selection import (
    GenericUnivariateSelect,
    SelectFdr,
    SelectFpr,
    SelectFromModel,
    SelectFwe,
    SelectKBest,
    SelectPercentile,
    VarianceThreshold,
)
from sklearn.linear_model import (
    LinearRegression,
    LogisticRegression,
    LogisticRegressionCV,
    Ridge,
    RidgeClassifier,
    RidgeClassifierCV,
    RidgeCV,
    SGDClassifier,
    SGDRegressor,
)
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import (
    FunctionTransformer,
    MinMaxScaler,
    Normalizer,
    RobustScaler,
    StandardScaler,
)
from sklearn.svm import SVC, LinearSVC

from deepfeat.onnx._steps import convert_step, divide_by_norm

# scikit-learn 1.8 warns of the next defaults of LogisticRegressionCV.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")

N_COLUMNS = 7


@pytest.fixture(scope="module")
def rows():
    """Rows of float32: columns of many scales, one of them constant, and a row of zeros."""
    scales = 10.0 ** np.array([-3, 0, 1, 2, 0, -1, 0])
    rows = np.random.default_rng(0).normal(size=(60, N_COLUMNS)) * scales + scales
    rows[:, 4] = 3
    rows[7] = 0
    return rows.astype(np.float32)


@pytest.fixture(scope="module")
def make_target(rows):
    """Make labels of any number of classes, or one or several targets, that rows tell about."""

    def make_target(step, count):
        values = rows[:, 1] + rows[:, 6]
        if not is_regressor(step):
            return np.array(list("abcde"))[np.argsort(np.argsort(values)) * count // len(rows)]
        return values if count == 1 else np.outer(values, np.arange(1, count + 1)) + rows[:, :count]

    return make_target


def assert_same(found, expected):
    assert found.dtype == torch.float32
    scale = np.abs(expected).max()
    assert_allclose(found.numpy() / scale, expected / scale, rtol=0, atol=1e-5)


TRANSFORMERS = [
    *(Normalizer(norm=norm) for norm in ("l1", "l2", "max")),
    *(StandardScaler(), StandardScaler(with_mean=False), StandardScaler(with_std=False)),
    StandardScaler(with_mean=False, with_std=False),
    *(MinMaxScaler(), MinMaxScaler((-3, 2)), MinMaxScaler((0.25, 0.5), clip=True)),
    *(PCA(whiten=whiten, n_components=count) for whiten in (False, True) for count in (1, 4)),
    *(PCA(0.5), PCA(3, svd_solver="randomized", random_state=0)),
    *(SelectKBest(k=3), SelectKBest(k="all"), SelectPercentile(percentile=40)),
    *(SelectFpr(alpha=0.2), SelectFdr(alpha=0.2), SelectFwe(alpha=0.2)),
    *(GenericUnivariateSelect(mode="k_best", param=2), VarianceThreshold(0.5)),
]


@pytest.mark.filterwarnings("ignore:Features .* are constant:UserWarning")
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("step", TRANSFORMERS, ids=str)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_rows_are_those_of_a_transformer(step, dtype, rows, make_target):
    """Whatever type it was fitted with, also for rows that it has not seen."""
    fitted = clone(step).fit(rows[:40].astype(dtype), make_target(step, 3)[:40])
    assert_same(convert_step(fitted)(torch.from_numpy(rows)), fitted.transform(rows))


CLASSIFIERS = [
    *(LinearSVC(random_state=0), LinearSVC(fit_intercept=False, random_state=0)),
    LinearSVC(multi_class="crammer_singer", random_state=0),
    *(LogisticRegression(), LogisticRegressionCV(cv=2)),
    LogisticRegression(solver="saga", random_state=0),
    *(SGDClassifier(random_state=0), SGDClassifier(loss="log_loss", random_state=0)),
    *(SGDClassifier(average=True, random_state=0), RidgeClassifier(), RidgeClassifierCV()),
    RidgeClassifier(fit_intercept=False),
]
REGRESSORS = [
    *(LinearRegression(), LinearRegression(fit_intercept=False), LinearRegression(positive=True)),
    *(Ridge(), Ridge(solver="lsqr"), RidgeCV()),
]


def fit(head, rows, target):
    """Fit to scaled rows, so that all converge."""
    scaler = StandardScaler().fit(rows)
    return clone(head).fit(scaler.transform(rows), target), scaler.transform(rows)


@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
@pytest.mark.parametrize("head", CLASSIFIERS, ids=str)
@pytest.mark.parametrize("n_classes", [2, 3, 5])
def test_scores_are_those_of_a_classifier(head, n_classes, rows, make_target):
    """One per class, or one in all for two; the largest, or the sign, gives the label."""
    fitted, scaled = fit(head, rows, make_target(head, n_classes))
    scores = convert_step(fitted)(torch.from_numpy(scaled))
    expected = fitted.decision_function(scaled)
    assert_same(scores, expected)
    label = scores.argmax(1) if n_classes > 2 else (scores > 0).int()
    assert set(label.tolist()) == set(range(n_classes))
    ordered = np.sort(expected, axis=1) if n_classes > 2 else np.outer(np.abs(expected), [0, 1])
    is_tie = ordered[:, -1] - ordered[:, -2] < 1e-4 * np.abs(expected).max()
    assert is_tie.mean() < 0.5
    assert_array_equal(fitted.classes_[label][~is_tie], fitted.predict(scaled)[~is_tie])


@pytest.mark.parametrize("head", REGRESSORS, ids=str)
@pytest.mark.parametrize("n_targets", [1, 2, 3])
def test_predictions_are_those_of_a_regressor(head, n_targets, rows, make_target):
    """Of one target or several."""
    fitted, scaled = fit(head, rows, make_target(head, n_targets))
    assert_same(convert_step(fitted)(torch.from_numpy(scaled)), fitted.predict(scaled))


@pytest.mark.parametrize("head", [Ridge(), LinearRegression(), RidgeCV()], ids=str)
def test_one_target_in_a_column_stays_in_a_column(head, rows, make_target):
    """As scikit-learn has it, or not, depending on its release and the model."""
    fitted, scaled = fit(head, rows, make_target(head, 1)[:, None])
    assert_same(convert_step(fitted)(torch.from_numpy(scaled)), fitted.predict(scaled))


@pytest.mark.parametrize("n_classes", [2, 4])
@pytest.mark.parametrize("kind", [LinearSVC, LogisticRegression, SGDClassifier])
def test_coefficients_may_be_sparse(kind, n_classes, rows, make_target):
    """After `sparsify`, which leaves them as they are."""
    head = kind(random_state=0)
    fitted, scaled = fit(head, rows, make_target(head, n_classes))
    fitted.coef_[abs(fitted.coef_) < 0.01] = 0
    expected = fitted.decision_function(scaled)
    fitted.sparsify()
    assert_same(convert_step(fitted)(torch.from_numpy(scaled)), expected)
    assert hasattr(fitted.coef_, "toarray")


@pytest.mark.parametrize("step", [*CLASSIFIERS[:1], *REGRESSORS[:1], *TRANSFORMERS], ids=str)
@pytest.mark.filterwarnings("ignore:Features .* are constant:UserWarning")
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_a_step_that_is_fitted_anew_does_not_change_what_was_converted(step, rows, make_target):
    """The function holds copies."""
    step = clone(step).fit(rows, make_target(step, 3 if not is_regressor(step) else 1))
    function = convert_step(step)
    before = function(torch.from_numpy(rows)).clone()
    for value in vars(step).values():
        if isinstance(value, np.ndarray) and value.dtype.kind == "f" and value.flags.writeable:
            value += 1
    assert torch.equal(function(torch.from_numpy(rows)), before)


@pytest.mark.parametrize("norm", ["l1", "l2", "max"])
def test_a_row_of_zeros_stays_as_it_is(norm):
    """There is nothing to divide by."""
    rows = torch.tensor([[0.0, 0.0], [3.0, -4.0]])
    expected = {"l1": [3 / 7, -4 / 7], "l2": [0.6, -0.8], "max": [0.75, -1]}[norm]
    assert_allclose(divide_by_norm(rows, norm, np.float64), [[0, 0], expected], rtol=1e-6)


class OtherScaler(StandardScaler):
    """May compute anything."""


class OtherHead(LogisticRegression):
    """So may this."""


OTHERS = [
    *(SVC(), KNeighborsClassifier(), RandomForestClassifier(3), SGDRegressor()),
    *(RobustScaler(), IncrementalPCA(2), FunctionTransformer(np.abs), SelectFromModel(LinearSVC())),
    *(OtherScaler(), OtherHead()),
]


@pytest.mark.parametrize("step", OTHERS, ids=str)
def test_a_step_that_is_not_known_is_named(step, rows, make_target):
    """With those that are; also a subclass of one, whatever it does."""
    target = make_target(step, 1 if is_regressor(step) else 3)
    fitted, _ = fit(step, rows, target)
    name = type(step).__name__
    with pytest.raises(
        ValueError, match=rf"^{name} cannot be exported\. After .*, PCA and .*Ridge"
    ):
        convert_step(fitted)


@pytest.mark.filterwarnings("ignore:Features .* are constant:UserWarning")
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("step", [SelectFwe(alpha=1e-200), SelectKBest(k=0)], ids=str)
def test_a_selector_that_has_selected_nothing_is_refused(step, rows, make_target):
    """There would be nothing to give."""
    fitted = clone(step).fit(rows, make_target(step, 3))
    refusal = rf"^{type(step).__name__} cannot be exported: it has not selected any feature\.$"
    with pytest.raises(ValueError, match=refusal):
        convert_step(fitted)


@pytest.mark.parametrize("norm", ["l1", "l2", "max"])
def test_a_row_that_is_all_but_zero_is_left_as_by_scikit_learn(norm):
    """A Normalizer does not divide by a norm that is less than 10 times float32's precision."""
    rows = np.array([[3e-7, -4e-7], [3, -4]], dtype=np.float32)
    step = Normalizer(norm=norm).fit(rows)
    assert_allclose(convert_step(step)(torch.from_numpy(rows)), step.transform(rows), rtol=1e-5)
