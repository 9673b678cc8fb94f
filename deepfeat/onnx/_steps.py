"""Fitted steps of scikit-learn as functions of tensors.

They become plain operators. skl2onnx would use those of the domain `ai.onnx.ml`, which OpenVINO and
others do not run.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import torch
from sklearn.base import is_classifier
from sklearn.decomposition import PCA
from sklearn.feature_selection import (
    GenericUnivariateSelect,
    SelectFdr,
    SelectFpr,
    SelectFwe,
    SelectKBest,
    SelectorMixin,
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
)
from sklearn.preprocessing import MinMaxScaler, Normalizer, StandardScaler
from sklearn.svm import LinearSVC
from torch import Tensor

Step: TypeAlias = Callable[[Tensor], Tensor]

_SELECTORS = (
    *(SelectKBest, SelectPercentile, SelectFpr, SelectFdr, SelectFwe),
    *(GenericUnivariateSelect, VarianceThreshold),
)
_LINEAR_MODELS = (
    *(LinearSVC, LogisticRegression, LogisticRegressionCV, SGDClassifier),
    *(RidgeClassifier, RidgeClassifierCV, LinearRegression, Ridge, RidgeCV),
)
_ORDERS = {"l1": 1, "l2": 2, "max": math.inf}


def convert_step(step: Any) -> Step:
    """Convert a fitted step into a function of tensors (n, d).

    Raises
    ------
    ValueError
        If it is none of those that can be converted; a subclass may compute something else.
    """
    name = type(step).__name__
    if type(step) not in _CONVERSIONS:
        raise ValueError(
            f"{name} cannot be exported. After a DeepFeatureExtractor there may be Normalizer, "
            "StandardScaler, MinMaxScaler, PCA and univariate feature selectors, then LinearSVC, "
            "LogisticRegression, SGDClassifier, RidgeClassifier, LinearRegression or Ridge."
        )
    return _CONVERSIONS[type(step)](step)


def divide_by_norm(rows: Tensor, norm: str, dtype: type[np.floating[Any]]) -> Tensor:
    """Divide each row by its norm, "l1", "l2" or "max", as scikit-learn does in this dtype.

    A norm that may be rounding alone counts as 1.
    """
    norms = torch.linalg.vector_norm(rows, _ORDERS[norm], dim=1, keepdim=True)
    return rows / torch.where(norms < 10 * float(np.finfo(dtype).eps), 1.0, norms)


def _convert_normalizer(normalizer: Normalizer) -> Step:
    return functools.partial(divide_by_norm, norm=normalizer.norm, dtype=np.float32)


def _convert_standard_scaler(scaler: StandardScaler) -> Step:
    mean = _to_tensor(scaler.mean_ if scaler.with_mean else 0)
    scale = _to_tensor(1 if scaler.scale_ is None else scaler.scale_)
    return lambda rows: (rows - mean) / scale


def _convert_min_max_scaler(scaler: MinMaxScaler) -> Step:
    scale, shift = _to_tensor(scaler.scale_), _to_tensor(scaler.min_)
    if not scaler.clip:
        return lambda rows: rows * scale + shift
    low, high = scaler.feature_range
    return lambda rows: (rows * scale + shift).clamp(low, high)


def _convert_pca(pca: PCA) -> Step:
    mean, components = _to_tensor(pca.mean_), _to_tensor(pca.components_.T)
    scale = _to_tensor(1)
    if pca.whiten:
        deviation = np.sqrt(pca.explained_variance_)
        scale = _to_tensor(np.maximum(deviation, np.finfo(deviation.dtype).eps))
    return lambda rows: (rows - mean) @ components / scale


def _convert_selector(selector: SelectorMixin) -> Step:
    indices = torch.from_numpy(selector.get_support(indices=True))
    if not len(indices):
        raise ValueError(
            f"{type(selector).__name__} cannot be exported: it has not selected any feature."
        )
    return lambda rows: rows[:, indices]


def _convert_linear(model: Any) -> Step:
    coef = model.coef_
    dense = coef.toarray() if hasattr(coef, "toarray") else coef  # after `sparsify`
    weight, intercept = _to_tensor(dense.T), _to_tensor(model.intercept_)
    is_binary = is_classifier(model) and len(dense) == 1

    def compute(rows: Tensor) -> Tensor:
        scores = rows @ weight + intercept
        return scores[:, 0] if is_binary else scores

    return compute


def _to_tensor(values: Any) -> Tensor:
    return torch.from_numpy(np.array(values, dtype=np.float32))


_CONVERSIONS: dict[type, Callable[[Any], Step]] = {
    Normalizer: _convert_normalizer,
    StandardScaler: _convert_standard_scaler,
    MinMaxScaler: _convert_min_max_scaler,
    PCA: _convert_pca,
    **dict.fromkeys(_SELECTORS, _convert_selector),
    **dict.fromkeys(_LINEAR_MODELS, _convert_linear),
}
