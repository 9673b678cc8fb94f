"""How far a training has come: its epochs, the best of them, and those that are left."""

import math
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn

from .freezing import Trained
from .training import Epoch, Trainer


class Progress:
    """A network in training, between two epochs.

    Parameters
    ----------
    trainer : Trainer
        The network and its optimizer.
    history : list of dict
        The epochs before this training.

    Attributes
    ----------
    trainer : Trainer
        As passed.
    history : list of dict
        All epochs.
    best : BestEpoch
        The best epoch of this training.
    epochs_left : int
        The number of epochs to come, unless it stops early.
    was_stopped : bool
        Whether a callback has stopped it.
    is_complete : bool
        Whether the network has the weights that the training is for.
    """

    def __init__(self, trainer: Trainer, history: list[dict[str, Any]]):
        self.trainer = trainer
        self.history = history
        self.best = BestEpoch(trainer.module, trainer.trained)
        self.epochs_left = trainer.config.epochs or 1
        self.was_stopped = False
        self.is_complete = False

    @property
    def is_over(self) -> bool:
        """Tell whether no epoch is to come."""
        config = self.trainer.config
        stops = config.early_stopping and self.best.n_iter_no_change >= config.n_iter_no_change
        return stops or self.was_stopped or not self.epochs_left

    def add(self, epoch: Epoch) -> None:
        """Take one more epoch into account."""
        config = self.trainer.config
        self.history = [*self.history, asdict(epoch)]
        self.epochs_left -= 1
        if epoch.validation_score is not None:
            self.best.update(epoch.validation_score, config.tol, keep=config.early_stopping)

    def complete(self) -> None:
        """Give the network the weights of the best epoch."""
        self.best.restore()
        self.is_complete = True

    def state_dict(self) -> dict[str, Any]:
        """Return what is needed to go on, or the result if the training has ended."""
        state = {
            "history": self.history,
            "epochs_left": self.epochs_left,
            "was_stopped": self.was_stopped,
            "is_complete": self.is_complete,
            "network": _tensors_of(self.trainer.module),
            "best": self.best.state_dict(),
        }
        return state if self.is_complete else state | {"trainer": self.trainer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Become what the state of the same training says."""
        self.history = state["history"]
        self.epochs_left = state["epochs_left"]
        self.was_stopped = state["was_stopped"]
        self.is_complete = state["is_complete"]
        self.best.load_state_dict(state["best"])
        for name, value in _tensors_of(self.trainer.module).items():
            kept = state["network"][name]
            if (kept.shape, kept.dtype) != (value.shape, value.dtype):
                raise ValueError(f"{name} has shape {tuple(kept.shape)} and type {kept.dtype}.")
            value.copy_(kept)
        if not self.is_complete:
            self.trainer.load_state_dict(state["trainer"])


class BestEpoch:
    """The best validation score, its weights, and the epochs that have not improved on it."""

    def __init__(self, module: nn.Module, trained: Trained):
        self.score: float | None = None
        self.n_iter_no_change = 0
        tensors = _tensors_of(module)
        self._state = {name: value for name, value in tensors.items() if name in trained}
        self._kept: dict[str, Tensor] = {}

    def update(self, score: float, tol: float, *, keep: bool) -> None:
        """Take the score of one more epoch into account; `keep` its weights if it is the best."""
        best = -math.inf if self.score is None else self.score
        self.n_iter_no_change = 0 if score > best + tol else self.n_iter_no_change + 1
        if score > best:
            self.score = score
            if keep:
                self._kept = {name: value.clone() for name, value in self._state.items()}

    def restore(self) -> None:
        """Put the kept weights, if any, back into the network."""
        for name, value in self._kept.items():
            self._state[name].copy_(value)
        self._kept = {}

    def state_dict(self) -> dict[str, Any]:
        """Return all that this knows."""
        return {"score": self.score, "n": self.n_iter_no_change, "kept": self._kept}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over a state."""
        self.score, self.n_iter_no_change = state["score"], state["n"]
        self._kept = state["kept"]


def _tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of a network.

    Its state dict may be made of copies, and does not have all buffers.
    """
    parameters = {name: value.detach() for name, value in module.named_parameters()}
    return parameters | dict(module.named_buffers())
