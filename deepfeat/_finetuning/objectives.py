"""Objectives: what a network learns to tell of an image, one class or several labels."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Objective(ABC):
    """How labels become targets, and logits (n, n_outputs) losses and predictions.

    `classes` has one entry per output of the network.
    """

    classes: NDArray[Any]

    @abstractmethod
    def encode(self, labels: NDArray[Any]) -> Tensor:
        """Return the targets of labels, one per image."""

    @abstractmethod
    def compute_losses(self, logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
        """Return the losses of each image, of shape (n, n_losses), with label smoothing."""

    @abstractmethod
    def find_correct(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Return which images are classified correctly, of shape (n,)."""

    @abstractmethod
    def predict(self, logits: NDArray[np.float64]) -> NDArray[Any]:
        """Return the predicted labels."""

    @abstractmethod
    def predict_proba(self, logits: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the probability of each class, of shape (n, n_outputs)."""

    @abstractmethod
    def decision_function(self, logits: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return what scikit-learn calls the decision function."""


class SingleLabel(Objective):
    """One class per image: softmax and cross-entropy."""

    def encode(self, labels: NDArray[Any]) -> Tensor:
        return torch.from_numpy(np.searchsorted(self.classes, labels))

    def compute_losses(self, logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
        losses = F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
        return losses[:, None]

    def find_correct(self, logits: Tensor, targets: Tensor) -> Tensor:
        return logits.argmax(1) == targets

    def predict(self, logits: NDArray[np.float64]) -> NDArray[Any]:
        labels: NDArray[Any] = self.classes[logits.argmax(axis=1)]
        return labels

    def predict_proba(self, logits: NDArray[np.float64]) -> NDArray[np.float64]:
        probabilities: NDArray[np.float64] = torch.from_numpy(logits).softmax(1).numpy()
        return probabilities

    def decision_function(self, logits: NDArray[np.float64]) -> NDArray[np.float64]:
        return logits[:, 1] - logits[:, 0] if len(self.classes) == 2 else logits


class MultiLabel(Objective):
    """Any number of labels per image, each on its own: sigmoid and logistic loss."""

    def encode(self, labels: NDArray[Any]) -> Tensor:
        return torch.from_numpy(labels.astype(np.float32))

    def compute_losses(self, logits: Tensor, targets: Tensor, smoothing: float) -> Tensor:
        smooth = targets * (1 - smoothing) + smoothing / 2
        return F.binary_cross_entropy_with_logits(logits, smooth, reduction="none")

    def find_correct(self, logits: Tensor, targets: Tensor) -> Tensor:
        return ((logits > 0) == (targets > 0)).all(1)

    def predict(self, logits: NDArray[np.float64]) -> NDArray[Any]:
        return (logits > 0).astype(np.int64)

    def predict_proba(self, logits: NDArray[np.float64]) -> NDArray[np.float64]:
        probabilities: NDArray[np.float64] = torch.from_numpy(logits).sigmoid().numpy()
        return probabilities

    def decision_function(self, logits: NDArray[np.float64]) -> NDArray[np.float64]:
        return logits


def make_objective(classes: NDArray[Any], *, multilabel: bool) -> Objective:
    """Make the objective for one class per image, or several labels."""
    return MultiLabel(classes) if multilabel else SingleLabel(classes)
