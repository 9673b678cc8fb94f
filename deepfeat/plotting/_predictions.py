"""Knows how to show images beside what a classifier takes them for."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.utils.validation import check_is_fitted

from deepfeat import predict_categories

from .._images.records import as_records
from ._axes import SKY, find_axes


class PredictionDisplay:
    """Images, each beside a bar for every class that it was probably taken for.

    It is recommended to use `from_estimator`, `from_backbone` or `from_predictions`. All parameters
    are stored as attributes.

    Parameters
    ----------
    images : list of n PIL images
        The images.
    predictions : list of n lists of pairs (str, float)
        For each image names of classes with their probabilities, from the top down.

    Attributes
    ----------
    figure_ : matplotlib Figure
        Figure of the picture.
    axes_ : ndarray of matplotlib Axes of shape (n, 2)
        For each image the axes of the image and of its bars.

    Examples
    --------
    >>> from deepfeat.plotting import PredictionDisplay
    >>> from sklearn.datasets import load_sample_images
    >>> display = PredictionDisplay.from_predictions(
    ...     load_sample_images().images,
    ...     [[("palace", 0.9), ("boathouse", 0.04)], [("daisy", 0.5), ("artichoke", 0.3)]],
    ... )
    >>> display.axes_.shape
    (2, 2)
    """

    __module__ = "deepfeat.plotting"  # so that pickles outlive moves

    def __init__(
        self,
        images: Sequence[Image.Image],
        *,
        predictions: Sequence[Sequence[tuple[Any, float]]],
    ):
        self.images = images
        self.predictions = predictions

    @classmethod
    def from_predictions(
        cls,
        images: Any,
        predictions: Sequence[Sequence[tuple[Any, float]]],
        *,
        ax: Any = None,
        n_cols: int = 2,
    ) -> "PredictionDisplay":
        """Draw predictions that are there already.

        Parameters
        ----------
        images : sequence or array of n images
            As for `DeepFeatureExtractor`, but no flattened rows.
        predictions : sequence of n sequences of pairs (str, float)
            For each image names of classes with their probabilities, from the top down.
        ax : matplotlib Axes or sequence of these, default=None
            As for `plot`.
        n_cols : int, default=2
            As for `plot`.

        Returns
        -------
        display : PredictionDisplay
            The display, drawn.

        Raises
        ------
        ValueError
            If there are not as many predictions as images, or an image cannot be read.
        """
        pictures = [record.open() for record in as_records(images)]
        if len(predictions) != len(pictures):
            raise ValueError(
                f"{len(predictions)} predictions of {len(pictures)} images were given; for each "
                "image one sequence of pairs (name, probability) is expected."
            )
        return cls(pictures, predictions=predictions).plot(ax, n_cols=n_cols)

    @classmethod
    def from_estimator(
        cls,
        estimator: Any,
        images: Any,
        *,
        top: int = 5,
        ax: Any = None,
        n_cols: int = 2,
    ) -> "PredictionDisplay":
        """Draw what a fitted classifier of images predicts.

        Parameters
        ----------
        estimator : classifier
            A fitted classifier, or a pipeline that ends in one, that takes images and has
            `predict_proba` and `classes_`.
        images : sequence or array of n images
            What the classifier takes, but no flattened rows.
        top : int, default=5
            How many classes an image is shown with; fewer where the classifier has not as many.
        ax : matplotlib Axes or sequence of these, default=None
            As for `plot`.
        n_cols : int, default=2
            As for `plot`.

        Returns
        -------
        display : PredictionDisplay
            The display, drawn.

        Raises
        ------
        NotFittedError
            If the classifier is not fitted.
        TypeError
            If it has no `predict_proba`.
        """
        check_is_fitted(estimator)
        if not hasattr(estimator, "predict_proba"):
            raise TypeError(
                f"this {type(estimator).__name__} has no predict_proba: take a classifier with "
                "probabilities, such as LogisticRegression, or wrap it in CalibratedClassifierCV."
            )
        predictions = []
        for probabilities in estimator.predict_proba(images):
            order = np.argsort(-probabilities, kind="stable")[:top]
            predictions.append([(estimator.classes_[k], float(probabilities[k])) for k in order])
        return cls.from_predictions(images, predictions, ax=ax, n_cols=n_cols)

    @classmethod
    def from_backbone(
        cls,
        backbone: str,
        images: Any,
        *,
        weights: Any = "DEFAULT",
        top: int = 5,
        ax: Any = None,
        n_cols: int = 2,
    ) -> "PredictionDisplay":
        """Draw what a pretrained network sees in images, in the words of its weights.

        Of the choices of `predict_categories` these are the common ones; for others give what it
        returns to `from_predictions`.

        Parameters
        ----------
        backbone : str
            As for `predict_categories`.
        images : sequence or array of n images
            As for `predict_categories`, but no flattened rows.
        weights : str, path or torchvision weights, default="DEFAULT"
            As for `predict_categories`.
        top : int, default=5
            How many categories an image is shown with.
        ax : matplotlib Axes or sequence of these, default=None
            As for `plot`.
        n_cols : int, default=2
            As for `plot`.

        Returns
        -------
        display : PredictionDisplay
            The display, drawn.
        """
        predictions = predict_categories(images, backbone, weights=weights, top=top)
        return cls.from_predictions(images, predictions, ax=ax, n_cols=n_cols)

    def plot(self, ax: Any = None, *, n_cols: int = 2) -> "PredictionDisplay":
        """Draw the images and their bars.

        Parameters
        ----------
        ax : matplotlib Axes or sequence of these, default=None
            A subplot, which is divided; or 2 n Axes, those of an image and of its bars in turn;
            by default a new figure.
        n_cols : int, default=2
            How many images stand side by side.

        Returns
        -------
        self : PredictionDisplay
            The display itself.
        """
        count = len(self.images)
        columns = min(n_cols, count)
        rows = math.ceil(count / columns)
        cells = []
        for number in range(count):
            row, column = divmod(number, columns)
            cells += [np.s_[row, 2 * column], np.s_[row, 2 * column + 1]]
        self.figure_, axes = find_axes(
            ax,
            (rows, 2 * columns),
            cells,
            figsize=(5 * columns, rows * (0.5 + 0.28 * max(5, *map(len, self.predictions)))),
            width_ratios=(4, 5) * columns,
        )
        self.axes_: NDArray[Any] = np.array(axes, dtype=object).reshape(count, 2)
        for (left, right), image, pairs in zip(
            self.axes_, self.images, self.predictions, strict=True
        ):
            left.imshow(image)
            left.set_axis_off()
            _draw_bars(right, pairs)
        return self


def _draw_bars(axis: Any, pairs: Sequence[tuple[Any, float]]) -> None:
    places = range(len(pairs))
    axis.barh(places, [probability for _, probability in pairs], color=SKY, alpha=0.6)
    axis.set_xlim(0, 1)
    axis.set_ylim(len(pairs) - 0.4, -0.6)
    # On the bars and not beside them, where long names would leave no room for the image.
    axis.set_yticks(places, [_label(*pair) for pair in pairs], ha="left", fontsize="small")
    axis.tick_params(axis="y", length=0, pad=-4)
    axis.set_xticks([])
    axis.spines[["top", "right", "bottom"]].set_visible(False)


def _label(name: Any, probability: float) -> str:
    """Write the probability in as much room as 100.0% takes, so that the names are aligned."""
    return f"{probability:.1%}".rjust(6, "\N{FIGURE SPACE}") + f"  {name}"
