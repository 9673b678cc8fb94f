"""Estimators as modules of torch: prepared images in; features, labels and scores out."""

import copy
import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn import config_context
from sklearn.base import BaseEstimator, is_classifier, is_regressor
from sklearn.pipeline import Pipeline
from sklearn.utils.validation import check_is_fitted
from torch import Tensor, nn

from .. import DeepFeatureExtractor, FineTuneClassifier
from .._backbones.preprocessing import Preprocessing
from .._extraction.readers import index_layers, load_network
from .._layers.pooling import PooledLayer
from .._layers.reading import ForwardPass
from .._layers.trace import first_tensor
from ._steps import Step, convert_step, divide_by_norm

Kind: TypeAlias = Literal["classifier", "regressor", "transformer"]

# The names of what comes out.
OUTPUTS: dict[Kind, tuple[str, ...]] = {
    "classifier": ("label", "scores"),
    "regressor": ("predictions",),
    "transformer": ("features",),
}


@dataclass(frozen=True)
class Plan:
    """What is exported of an estimator, and what it is compared with.

    `source` reads the images: a copy of the extractor or classifier that computes as the file does.
    `steps` are the fitted ones after it, and `graph` is all of them as a module of torch.
    """

    kind: Kind
    name: str  # of the backbone
    source: DeepFeatureExtractor | FineTuneClassifier
    steps: Sequence[Any]
    graph: "Graph"
    preprocessing: Preprocessing
    layers: tuple[str, ...] | None

    @property
    def classes(self) -> NDArray[Any] | None:
        """The labels of a classifier."""
        return self._last.classes_ if self.kind == "classifier" else None

    @property
    def _last(self) -> Any:
        return self.steps[-1] if self.steps else self.source

    def predict(self, X: Any) -> tuple[NDArray[Any], ...]:
        """Return what the estimator gives for images, in the order of the outputs.

        Raises
        ------
        ValueError
            If an image cannot be read, or gets several labels.
        """
        with config_context(transform_output="default"):
            return self._predict(X)

    def _predict(self, X: Any) -> tuple[NDArray[Any], ...]:
        values = X if isinstance(self.source, FineTuneClassifier) else self.source.transform(X)
        for step in self.steps[:-1]:
            values = step.transform(values)
        if self.kind == "transformer":
            return (np.asarray(self.steps[-1].transform(values) if self.steps else values),)
        predictions = self._last.predict(values)
        if self.kind == "regressor":
            return (predictions,)
        if predictions.ndim != 1:
            raise ValueError(
                f"{type(self._last).__name__} gives several labels per image, which cannot be "
                "exported."
            )
        label = np.asarray(np.searchsorted(self._last.classes_, predictions))
        return label, self._last.decision_function(values)


def plan_export(estimator: Any) -> Plan:
    """Plan the export of a fitted estimator.

    Raises
    ------
    ValueError
        If it cannot be exported.
    NotFittedError
        If it is not fitted.
    """
    steps = _list_steps(estimator)
    if len(steps) == 1 and isinstance(steps[0], FineTuneClassifier):
        return _plan_classifier(steps[0])
    if steps and isinstance(steps[0], DeepFeatureExtractor):
        return _plan_pipeline(steps[0], steps[1:])
    names = [
        type(step).__name__ if isinstance(step, BaseEstimator) else repr(step) for step in steps
    ]
    raise ValueError(
        "estimator must be a FineTuneClassifier, a DeepFeatureExtractor, a Pipeline that begins "
        "with one, or a search over these with refit=True; got "
        f"{', then '.join(names) or 'an empty Pipeline'}."
    )


def _list_steps(estimator: Any) -> list[Any]:
    """List the fitted steps of a pipeline, in searches and pipelines too, that do something."""
    if hasattr(estimator, "best_estimator_"):
        return _list_steps(estimator.best_estimator_)
    if isinstance(estimator, Pipeline):
        steps = [step for _, step in estimator.steps if step is not None and step != "passthrough"]
        return list(itertools.chain.from_iterable(map(_list_steps, steps)))
    if isinstance(estimator, BaseEstimator):
        check_is_fitted(estimator)
    return [estimator]


def _plan_classifier(classifier: FineTuneClassifier) -> Plan:
    source = copy.copy(classifier)  # which has a copy of the network, on the CPU
    source.set_params(device="cpu", precision="float32", engine="torch", verbose=0)
    network, preprocessing = source.module_, source._preprocessing

    def read(batch: Tensor) -> Tensor:
        logits = first_tensor(network(batch)).float()
        return logits[:, 1] - logits[:, 0] if len(source.classes_) == 2 else logits

    graph = Graph(network, preprocessing, read, [], "classifier")
    return Plan("classifier", source._name, source, [], graph, preprocessing, None)


def _plan_pipeline(extractor: DeepFeatureExtractor, steps: list[Any]) -> Plan:
    source = copy.copy(extractor)
    source.set_params(device="cpu", precision="float32", engine="torch", verbose=0)
    source.set_params(cache=None, on_error="raise")
    kind: Kind = "transformer"
    if steps and (is_classifier(steps[-1]) or is_regressor(steps[-1])):
        kind = "classifier" if is_classifier(steps[-1]) else "regressor"
    converted = [convert_step(step) for step in steps]
    backbone = source._find_backbone()
    pooled = [section.pooled for section in source._find_sections(index_layers(backbone))]
    layers = {output.key: (output.layer, output.reduce) for output in pooled}
    run = ForwardPass(load_network(backbone, torch.device("cpu")), layers, stops=False)
    read = functools.partial(_extract, run=run, pooled=pooled, norm=source.norm)
    graph = Graph(run.module, backbone.preprocessing, read, converted, kind)
    names = tuple(dict.fromkeys(output.layer.name for output in pooled))
    return Plan(kind, backbone.name, source, steps, graph, backbone.preprocessing, names)


# Modules ------------------------------------------------------------------------------------------


class Graph(nn.Module):
    """An estimator as a module: prepared images in, a tuple of its outputs out."""

    def __init__(
        self,
        network: nn.Module,
        preprocessing: Preprocessing,
        read: Step,
        steps: Sequence[Step],
        kind: Kind,
    ):
        super().__init__()
        self.network = network  # in which torch looks for the weights
        self._normalize = preprocessing.normalize
        self._read = read
        self._steps = steps
        self._kind = kind

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        values = self._read(self._normalize(images))
        for step in self._steps:
            values = step(values)
        if self._kind != "classifier":
            return (values,)
        label = values.argmax(1) if values.ndim == 2 else (values > 0).long()
        return label, values


def _extract(
    batch: Tensor, run: ForwardPass, pooled: Sequence[PooledLayer], norm: str | None
) -> Tensor:
    """Compute features as `DeepFeatureExtractor.transform` does."""
    outputs = run(batch)
    sections = []
    for output in pooled:
        rows = outputs[output.key]
        rows = rows.relu() if output.layer.rectified else rows
        sections.append(rows if norm is None else divide_by_norm(rows, norm, np.float64))
    return torch.cat(sections, dim=1)
