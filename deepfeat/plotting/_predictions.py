"""`PredictionDisplay`: images with their most probable classes."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from sklearn.utils.validation import check_is_fitted

from deepfeat import predict_categories

from ._axes import GREEN, SKY, VERMILION, find_pairs
from ._checks import check_count
from ._pictures import open_pictures


class PredictionDisplay:
    """Images, each next to a bar chart of its most probable classes.

    It is recommended to use `from_estimator`, `from_backbone` or `from_predictions`. All parameters
    are stored as attributes.

    Parameters
    ----------
    images : list of n PIL images
        The images.
    predictions : list of n lists of pairs (str, float)
        Class names with probabilities for each image, from top to bottom.
    y_true : sequence of n class names, default=None
        The class that each image belongs to, if known.

    Attributes
    ----------
    figure_ : matplotlib Figure
        Figure that contains the display.
    axes_ : ndarray of matplotlib Axes of shape (n, 2)
        Axes of each image and of its bars.

    Examples
    --------
    >>> import matplotlib.pyplot as plt
    >>> from deepfeat.plotting import PredictionDisplay
    >>> from sklearn.datasets import load_sample_images
    >>> display = PredictionDisplay.from_predictions(
    ...     load_sample_images().images,
    ...     [[("palace", 0.9), ("boathouse", 0.04)], [("daisy", 0.5), ("artichoke", 0.3)]],
    ... )
    >>> display.axes_.shape
    (2, 2)
    >>> plt.show()  # doctest: +SKIP
    """

    __module__ = "deepfeat.plotting"  # so that pickles outlive moves

    def __init__(
        self,
        images: Sequence[Image.Image],
        *,
        predictions: Sequence[Sequence[tuple[Any, float]]],
        y_true: Sequence[Any] | None = None,
    ):
        self.images = images
        self.predictions = predictions
        self.y_true = y_true

    @classmethod
    def from_predictions(
        cls,
        images: Any,
        predictions: Sequence[Sequence[tuple[Any, float]]],
        *,
        ax: Any = None,
        n_cols: int = 2,
    ) -> "PredictionDisplay":
        """Plot existing predictions.

        Parameters
        ----------
        images : sequence or array of n images
            As for `DeepFeatureExtractor`, except for flattened rows.
        predictions : sequence of n sequences of pairs (str, float)
            Class names with probabilities for each image, from top to bottom.
        ax : matplotlib Axes or sequence of Axes, default=None
            As for `plot`.
        n_cols : int, default=2
            As for `plot`.

        Returns
        -------
        display : PredictionDisplay
            The plotted display.

        Raises
        ------
        ValueError
            If the numbers of predictions and images differ, or an image cannot be read.
        """
        pictures = open_pictures(images)
        if len(predictions) != len(pictures):
            raise ValueError(
                "predictions must have one sequence of pairs (name, probability) per image; "
                f"got {len(predictions)} for {len(pictures)} images."
            )
        return cls(pictures, predictions=predictions).plot(ax, n_cols=n_cols)

    @classmethod
    def from_estimator(
        cls,
        estimator: Any,
        images: Any,
        *,
        y_true: ArrayLike | None = None,
        top: int = 5,
        max_images: int | None = None,
        ax: Any = None,
        n_cols: int = 2,
    ) -> "PredictionDisplay":
        """Plot the predictions of a fitted classifier of images, or the worst of them.

        Parameters
        ----------
        estimator : classifier
            A fitted classifier, or a pipeline that ends in one, that accepts images and has
            `predict_proba` and `classes_`.
        images : sequence or array of n images
            As for the classifier, except for flattened rows.
        y_true : array of shape (n,), default=None
            The class of each image. If given, the images with the lowest probability of their
            class come first ("top losses"), and its bar has another colour.
        top : int, default=5
            Number of classes to show per image; at most those of the classifier. The class of an
            image is shown in any case.
        max_images : int, default=None
            Number of images to show at most; by default 12 with `y_true`, and all without.
        ax : matplotlib Axes or sequence of Axes, default=None
            As for `plot`.
        n_cols : int, default=2
            As for `plot`.

        Returns
        -------
        display : PredictionDisplay
            The plotted display.

        Raises
        ------
        NotFittedError
            If the classifier is not fitted.
        TypeError
            If it has no `predict_proba`.
        ValueError
            If `y_true` has another length or holds a class that the classifier does not know, the
            classifier predicts several labels per image, or an image cannot be read.
        """
        check_is_fitted(estimator)
        if not hasattr(estimator, "predict_proba"):
            raise TypeError(
                f"estimator must have predict_proba; got {type(estimator).__name__}: use a "
                "classifier with probabilities, such as LogisticRegression, or wrap it in "
                "CalibratedClassifierCV."
            )
        check_count("top", top)
        if max_images is not None:
            check_count("max_images", max_images)
        probabilities = np.asarray(estimator.predict_proba(images))
        classes = np.asarray(estimator.classes_)
        if probabilities.ndim != 2 or classes.shape != probabilities.shape[1:]:
            raise ValueError(
                f"estimator must predict one class per image; {type(estimator).__name__} predicts "
                "several labels."
            )
        shown, truth = np.arange(len(probabilities)), None
        if y_true is not None:
            truth = _find_classes(classes, y_true, len(probabilities))
            shown = np.argsort(probabilities[np.arange(len(truth)), truth], kind="stable")
            max_images = 12 if max_images is None else max_images
        shown = shown[:max_images]
        predictions = []
        for index in shown:
            row = probabilities[index]
            order = np.argsort(-row, kind="stable")[:top].tolist()
            if truth is not None and truth[index] not in order:
                order.append(truth[index])
            predictions.append([(classes[k], float(row[k])) for k in order])
        truths = None if truth is None else list(classes[truth[shown]])
        display = cls(open_pictures(images, shown), predictions=predictions, y_true=truths)
        return display.plot(ax, n_cols=n_cols)

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
        """Plot the predictions of a pretrained network, with the categories of its weights.

        For other parameters of `predict_categories`, pass its result to `from_predictions`.

        Parameters
        ----------
        backbone : str
            As for `predict_categories`.
        images : sequence or array of n images
            As for `predict_categories`, except for flattened rows.
        weights : str, path or torchvision weights, default="DEFAULT"
            As for `predict_categories`.
        top : int, default=5
            Number of categories to show per image.
        ax : matplotlib Axes or sequence of Axes, default=None
            As for `plot`.
        n_cols : int, default=2
            As for `plot`.

        Returns
        -------
        display : PredictionDisplay
            The plotted display.
        """
        predictions = predict_categories(backbone, images, weights=weights, top=top)
        return cls.from_predictions(images, predictions, ax=ax, n_cols=n_cols)

    def plot(self, ax: Any = None, *, n_cols: int = 2) -> "PredictionDisplay":
        """Plot the images and their bars.

        Parameters
        ----------
        ax : matplotlib Axes or sequence of Axes, default=None
            A subplot to divide, or 2 * n Axes, those of an image and of its bars in turn. If None,
            a new figure is created.
        n_cols : int, default=2
            Number of images side by side.

        Returns
        -------
        self : PredictionDisplay
            The display itself.
        """
        count = len(self.images)
        height = 0.5 + 0.28 * max(5, *map(len, self.predictions))
        self.axes_: NDArray[Any]
        self.figure_, self.axes_ = find_pairs(
            ax, count, n_cols, size=(5, height), width_ratios=(4, 5)
        )
        truths = [None] * count if self.y_true is None else self.y_true
        for (left, right), image, pairs, truth in zip(
            self.axes_, self.images, self.predictions, truths, strict=True
        ):
            left.imshow(image)
            left.set_axis_off()
            if truth is not None:
                is_right = pairs[0][0] == truth
                color = GREEN if is_right else VERMILION
                left.set_title(f"true: {truth}", fontsize="medium", color=color, parse_math=False)
            _draw_bars(right, pairs, truth)
        return self


def _find_classes(classes: NDArray[Any], y_true: ArrayLike, count: int) -> NDArray[np.intp]:
    """Return the index of each label among the classes."""
    labels = np.asarray(y_true)
    if labels.shape != (count,):
        raise ValueError(f"y_true must have shape ({count},); got {labels.shape}.")
    known = np.isin(labels, classes)
    if not known.all():
        raise ValueError(
            f"y_true must hold classes of the classifier ({classes.tolist()}); got "
            f"{labels[~known].tolist()[0]!r}."
        )
    order = np.argsort(classes)
    return order[np.searchsorted(classes, labels, sorter=order)]


def _draw_bars(axis: Any, pairs: Sequence[tuple[Any, float]], truth: Any) -> None:
    indices = range(len(pairs))
    colors = [SKY if truth is None or name != truth else GREEN for name, _ in pairs]
    axis.barh(indices, [probability for _, probability in pairs], color=colors, alpha=0.6)
    axis.set_xlim(0, 1)
    axis.set_ylim(len(pairs) - 0.4, -0.6)
    # On the bars instead of to their left, where long names would leave no space for the image.
    labels = [_label(*pair) for pair in pairs]
    axis.set_yticks(indices, labels, ha="left", fontsize="small", parse_math=False)
    axis.tick_params(axis="y", length=0, pad=-4)
    axis.set_xticks([])
    axis.spines[["top", "right", "bottom"]].set_visible(False)


def _label(name: Any, probability: float) -> str:
    """Pad the probability to the width of 100.0%, so that the names are aligned."""
    return f"{probability:.1%}".rjust(6, "\N{FIGURE SPACE}") + f"  {name}"
