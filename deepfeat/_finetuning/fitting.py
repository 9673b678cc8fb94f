"""The plan of a training, and the best epoch so far."""

import math
from dataclasses import dataclass
from typing import Any

from numpy.typing import NDArray
from torch import Tensor, nn

from .._backbones.preprocessing import Preprocessing
from .cutting import Cut
from .freezing import Trained
from .training import Recipe


@dataclass(frozen=True)
class Plan:
    """How a network is trained, and where it may be cut; no epochs: one, at constant rates."""

    module: nn.Module
    trained: Trained
    cut: Cut | None
    preprocessing: Preprocessing
    classes: NDArray[Any]
    recipe: Recipe
    epochs: int | None


class Best:
    """The best validation score, the weights that had it, and for how long there was no better."""

    def __init__(self, module: nn.Module, trained: Trained):
        self.score: float | None = None
        self.stale = 0
        self._state = {
            name: value for name, value in module.state_dict().items() if name in trained
        }
        self._kept: dict[str, Tensor] = {}

    def note(self, score: float, tol: float, *, keep: bool) -> None:
        so_far = -math.inf if self.score is None else self.score
        self.stale = 0 if score > so_far + tol else self.stale + 1
        if score > so_far:
            self.score = score
            if keep:
                self._kept = {name: value.clone() for name, value in self._state.items()}

    def restore(self) -> None:
        for name, value in self._kept.items():
            self._state[name].copy_(value)
