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
from sklearn.feature_selection import SelectorMixin
from sklearn.linear_model import (
    LinearRegression,
    LogisticRegression,
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

_LINEAR = (
    *(LinearSVC, LogisticRegression, SGDClassifier, RidgeClassifier, RidgeClassifierCV),
    *(LinearRegression, Ridge, RidgeCV),
)
_ORDERS = {"l1": 1, "l2": 2, "max": math.inf}


def convert_step(step: Any) -> Step:
    """Convert a fitted step into a function of tensors (n, d).

    Raises
    ------
    ValueError
        If there is none.
    """
    if isinstance(step, Normalizer):
        return functools.partial(divide_by_norm, norm=step.norm)
    if isinstance(step, StandardScaler):
        return _convert_standard_scaler(step)
    if isinstance(step, MinMaxScaler):
        return _convert_min_max_scaler(step)
    if isinstance(step, PCA):
        return _convert_pca(step)
    if isinstance(step, SelectorMixin):
        indices = torch.from_numpy(step.get_support(indices=True))
        return lambda rows: rows[:, indices]
    if isinstance(step, _LINEAR):
        return _convert_linear(step)
    raise ValueError(
        f"{type(step).__name__} cannot be exported. After a DeepFeatureExtractor there may be "
        "Normalizer, StandardScaler, MinMaxScaler, PCA and feature selectors, then LinearSVC, "
        "LogisticRegression, SGDClassifier, RidgeClassifier, LinearRegression or Ridge."
    )


def divide_by_norm(rows: Tensor, norm: str) -> Tensor:
    """Divide each row by its norm, "l1", "l2" or "max", unless that is 0."""
    norms = torch.linalg.vector_norm(rows, _ORDERS[norm], dim=1, keepdim=True)
    return rows / torch.where(norms == 0, 1.0, norms)


def _convert_standard_scaler(scaler: StandardScaler) -> Step:
    mean = _to_tensor(scaler.mean_ if scaler.with_mean else 0)
    scale = _to_tensor(1 if scaler.scale_ is None else scaler.scale_)
    return lambda rows: (rows - mean) / scale


def _convert_min_max_scaler(scaler: MinMaxScaler) -> Step:
    scale, shift = _to_tensor(scaler.scale_), _to_tensor(scaler.min_)
    low, high = scaler.feature_range if scaler.clip else (-math.inf, math.inf)
    return lambda rows: (rows * scale + shift).clamp(low, high)


def _convert_pca(pca: PCA) -> Step:
    mean, components = _to_tensor(pca.mean_), _to_tensor(pca.components_.T)
    scale = _to_tensor(1)
    if pca.whiten:
        deviation = np.sqrt(pca.explained_variance_)
        scale = _to_tensor(np.maximum(deviation, np.finfo(deviation.dtype).eps))
    return lambda rows: (rows - mean) @ components / scale


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
