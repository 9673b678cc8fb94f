"""`LearningCurveDisplay`: the loss and the accuracy of each epoch of training."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import NotFittedError

from ._axes import BLUE, VERMILION, find_axes

_LABELS = {"loss": "loss", "score": "accuracy"}
_SETS = {"train": ("training", BLUE, "o"), "validation": ("validation", VERMILION, "s")}


class LearningCurveDisplay:
    """Loss and accuracy of each epoch, on the training data and on the validation data.

    It is recommended to use `from_estimator`. All parameters are stored as attributes.

    Parameters
    ----------
    history : sequence of dict
        The `history_` of a `FineTuneClassifier`. The curves show "train_loss", "train_score",
        "validation_loss" and "validation_score" of each epoch, the last two unless they are None.

    Attributes
    ----------
    figure_ : matplotlib Figure
        Figure that contains the display.
    axes_ : ndarray of matplotlib Axes of shape (2,)
        Axes of the losses and of the accuracies.
    lines_ : dict of str to matplotlib Line2D
        The curves, by their keys in the history.

    See Also
    --------
    deepfeat.FineTuneClassifier : Documents all entries of a history.

    Examples
    --------
    >>> import matplotlib.pyplot as plt
    >>> from deepfeat.plotting import LearningCurveDisplay
    >>> history = [
    ...     {"epoch": 1, "train_loss": 1.2, "train_score": 0.6,
    ...      "validation_loss": 1.3, "validation_score": 0.5},
    ...     {"epoch": 2, "train_loss": 0.7, "train_score": 0.8,
    ...      "validation_loss": 0.9, "validation_score": 0.7},
    ...     {"epoch": 3, "train_loss": 0.5, "train_score": 0.9,
    ...      "validation_loss": 0.8, "validation_score": 0.75},
    ... ]
    >>> display = LearningCurveDisplay(history).plot()
    >>> display.lines_["validation_score"].get_ydata()
    array([0.5 , 0.7 , 0.75])
    >>> plt.show()  # doctest: +SKIP
    """

    __module__ = "deepfeat.plotting"  # so that pickles outlive moves

    def __init__(self, history: Sequence[Mapping[str, Any]]):
        self.history = history

    @classmethod
    def from_estimator(cls, estimator: Any, *, ax: Any = None) -> "LearningCurveDisplay":
        """Plot the history of a fitted classifier.

        Parameters
        ----------
        estimator : FineTuneClassifier
            A fitted classifier.
        ax : matplotlib Axes or sequence of Axes, default=None
            As for `plot`.

        Returns
        -------
        display : LearningCurveDisplay
            The plotted display.

        Raises
        ------
        NotFittedError
            If the classifier has no history yet.
        """
        if not getattr(estimator, "history_", None):
            raise NotFittedError(
                "estimator must be a FineTuneClassifier that was trained for at least one epoch; "
                f"got {type(estimator).__name__} without entries in history_."
            )
        return cls(estimator.history_).plot(ax)

    def plot(self, ax: Any = None) -> "LearningCurveDisplay":
        """Plot the losses and the accuracies side by side.

        Parameters
        ----------
        ax : matplotlib Axes or sequence of Axes, default=None
            A subplot to divide, or two Axes. If None, a new figure is created.

        Returns
        -------
        self : LearningCurveDisplay
            The display itself.
        """
        cells = [np.s_[0, 0], np.s_[0, 1]]
        self.figure_, axes = find_axes(ax, (1, 2), cells, figsize=(9, 3.4), wspace=0.4)
        self.axes_: NDArray[Any] = np.array(axes, dtype=object)
        self.lines_: dict[str, Any] = {}
        epochs = [entry["epoch"] for entry in self.history]
        for axis, (quantity, ylabel) in zip(axes, _LABELS.items(), strict=True):
            for name, (label, color, marker) in _SETS.items():
                values = [entry[f"{name}_{quantity}"] for entry in self.history]
                if all(value is None for value in values):
                    continue
                (self.lines_[f"{name}_{quantity}"],) = axis.plot(
                    epochs,
                    np.array(values, dtype=float),  # None, without validation, becomes a gap
                    color=color,
                    marker=marker,
                    markersize=4,
                    label=label,
                )
            axis.locator_params(axis="x", integer=True, min_n_ticks=1)
            axis.set(xlabel="epoch", ylabel=ylabel)
            axis.grid(alpha=0.3)
            axis.spines[["top", "right"]].set_visible(False)
        axes[0].legend(frameon=False)
        return self
