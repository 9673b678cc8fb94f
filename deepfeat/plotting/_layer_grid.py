"""`LayerGridDisplay`: the scores of a search over layers and C."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.exceptions import NotFittedError

from ._axes import VERMILION, find_axes


class LayerGridDisplay:
    """Mean test scores of a search, with one row per layer and one column per value of C.

    It is recommended to use `from_search`. All parameters are stored as attributes.

    Parameters
    ----------
    scores : ndarray of shape (n_layers, n_C)
        Mean test scores; NaN for combinations without a candidate.
    layers : sequence of str
        Names of the rows.
    C : sequence of float
        Values of the columns.
    best : tuple of int
        Row and column of the best candidate.
    score_name : str, default="score"
        Name of the score.
    others : sequence of str, default=()
        Names of the other parameters that were searched, of whose values a cell has the best.

    Attributes
    ----------
    figure_ : matplotlib Figure
        Figure that contains the display.
    ax_ : matplotlib Axes
        Axes that contain the heat map.
    im_ : matplotlib AxesImage
        The heat map.
    text_ : ndarray of matplotlib Text of shape (n_layers, n_C)
        The scores in the cells; None for cells without a candidate.

    Examples
    --------
    >>> import matplotlib.pyplot as plt
    >>> from deepfeat import DeepFeatureExtractor
    >>> from deepfeat.plotting import LayerGridDisplay
    >>> from sklearn.datasets import load_digits
    >>> from sklearn.linear_model import LogisticRegression
    >>> from sklearn.model_selection import GridSearchCV
    >>> from sklearn.pipeline import make_pipeline
    >>> digits = load_digits()
    >>> extractor = DeepFeatureExtractor("resnet10_slim", image_size=32)
    >>> search = GridSearchCV(
    ...     make_pipeline(extractor, LogisticRegression()),
    ...     {
    ...         "deepfeatureextractor__layer": ["layer1", "layer2", "layer3", "layer4"],
    ...         "logisticregression__C": [0.1, 1, 10],
    ...     },
    ...     cv=2,
    ... )
    >>> search = search.fit(digits.images[:200] / 16, digits.target[:200])
    >>> LayerGridDisplay.from_search(search).scores.shape
    (4, 3)
    >>> plt.show()  # doctest: +SKIP
    """

    __module__ = "deepfeat.plotting"  # so that pickles outlive moves

    def __init__(
        self,
        scores: NDArray[np.float64],
        *,
        layers: Sequence[str],
        C: Sequence[float],
        best: tuple[int, int],
        score_name: str = "score",
        others: Sequence[str] = (),
    ):
        self.scores = scores
        self.layers = layers
        self.C = C
        self.best = best
        self.score_name = score_name
        self.others = others

    @classmethod
    def from_search(
        cls,
        search: Any,
        *,
        layer_param: str | None = None,
        C_param: str | None = None,
        score_name: str | None = None,
        ax: Any = None,
        cmap: str = "viridis",
        values_format: str = ".3f",
        colorbar: bool = True,
    ) -> "LayerGridDisplay":
        """Plot the results of a fitted search.

        If other parameters were searched, too, a cell has the best score over all their values.

        Parameters
        ----------
        search : GridSearchCV or another search with `cv_results_`
            The fitted search.
        layer_param : str, default=None
            Name of the parameter in the rows; by default the one whose name ends in `layer`.
        C_param : str, default=None
            Name of the parameter in the columns; by default the one whose name ends in `C`.
        score_name : str, default=None
            Name of the score, if `scoring` has several; by default the one that `refit` names.
        ax : matplotlib Axes, default=None
            As for `plot`.
        cmap : str, default="viridis"
            As for `plot`.
        values_format : str, default=".3f"
            As for `plot`.
        colorbar : bool, default=True
            As for `plot`.

        Returns
        -------
        display : LayerGridDisplay
            The plotted display.

        Raises
        ------
        NotFittedError
            If the search is not fitted.
        ValueError
            If a parameter or the score is not in the results, or must be chosen from several.
        """
        results = _check_results(search)
        score_name = _find_score(search, score_name)
        candidates = results["params"]
        layer_param = layer_param or _find_parameter(candidates, "layer", "layer_param")
        C_param = C_param or _find_parameter(candidates, "C", "C_param")
        means = dict(enumerate(results[f"mean_test_{score_name}"]))
        cells = {
            index: (_layer_label(params[layer_param]), params[C_param])
            for index, params in enumerate(candidates)
            if layer_param in params and C_param in params
        }
        if not cells:
            raise ValueError(f"No candidate has both {layer_param!r} and {C_param!r}.")
        layers = list(dict.fromkeys(layer for layer, _ in cells.values()))
        Cs = sorted({C for _, C in cells.values()})
        scores = np.full((len(layers), len(Cs)), np.nan)
        for index, (layer, C) in cells.items():
            cell = layers.index(layer), Cs.index(C)
            scores[cell] = np.fmax(scores[cell], means[index])
        best = cells[min(cells, key=lambda index: results[f"rank_test_{score_name}"][index])]
        display = cls(
            scores,
            layers=layers,
            C=Cs,
            best=(layers.index(best[0]), Cs.index(best[1])),
            score_name=score_name,
            others=_find_others(candidates, layer_param, C_param),
        )
        return display.plot(ax, cmap=cmap, values_format=values_format, colorbar=colorbar)

    def plot(
        self,
        ax: Any = None,
        *,
        cmap: str = "viridis",
        values_format: str = ".3f",
        colorbar: bool = True,
    ) -> "LayerGridDisplay":
        """Plot the heat map, with a frame around the best candidate.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            Axes to plot on. If None, a new figure is created.
        cmap : str, default="viridis"
            Name of a matplotlib colour map.
        values_format : str, default=".3f"
            Format specification of the scores in the cells.
        colorbar : bool, default=True
            Whether to add a colour bar.

        Returns
        -------
        self : LayerGridDisplay
            The display itself.
        """
        n_layers, n_C = self.scores.shape
        size = 2.6 + 0.62 * n_C, 1.3 + 0.45 * n_layers
        self.figure_, (self.ax_,) = find_axes(ax, (1, 1), [np.s_[0, 0]], figsize=size)
        self.im_ = self.ax_.imshow(self.scores, cmap=cmap, aspect="auto")
        self.text_: NDArray[Any] = np.full(self.scores.shape, None, dtype=object)
        colors = self.im_.to_rgba(self.scores)
        for (row, column), score in np.ndenumerate(self.scores):
            if np.isfinite(score):
                self.text_[row, column] = self.ax_.text(
                    column,
                    row,
                    format(score, values_format),
                    ha="center",
                    va="center",
                    fontsize="small",
                    fontweight="bold" if (row, column) == self.best else "normal",
                    color=_text_color(colors[row, column]),
                )
        self._frame_best()
        self.ax_.set_xticks(range(n_C), [f"{C:g}" for C in self.C])
        self.ax_.set_yticks(range(n_layers), self.layers)
        self.ax_.set(xlabel="C", ylabel="layer")
        label = "mean test " + self.score_name.removeprefix("neg_").replace("_", " ")
        if self.others:
            label += "\n(best " + " and ".join(self.others) + ")"
        if colorbar:
            self.figure_.colorbar(self.im_, ax=self.ax_, label=label)
        else:
            self.ax_.set_title(label, fontsize="medium")
        return self

    def _frame_best(self) -> None:
        from_left, from_top = self.best[1] - 0.5, self.best[0] - 0.5
        # White around the colour, so that the frame stands out from every colour of the map.
        for color, width in (("white", 5), (VERMILION, 2.5)):
            self.ax_.plot(
                from_left + np.array([0, 1, 1, 0, 0]),
                from_top + np.array([0, 0, 1, 1, 0]),
                color=color,
                linewidth=width,
                clip_on=False,
                solid_joinstyle="miter",
            )


def _check_results(search: Any) -> Mapping[str, Any]:
    """Return the results of a fitted search; raise for anything else."""
    results = getattr(search, "cv_results_", None)
    if results is not None and "params" in results:
        return dict(results)
    if results is None and hasattr(search, "refit") and hasattr(search, "estimator"):
        raise NotFittedError(f"This {type(search).__name__} is not fitted: call fit first.")
    raise TypeError(
        f"search must be a fitted search such as GridSearchCV; got {type(search).__name__}."
    )


def _find_others(candidates: Sequence[Mapping[str, Any]], *known: str) -> list[str]:
    """Return the short names of parameters that differ between candidates, except those known."""
    names = dict.fromkeys(name for params in candidates for name in params if name not in known)
    return [
        name.rpartition("__")[2]
        for name in names
        if len({repr(params.get(name)) for params in candidates}) > 1
    ]


def _find_score(search: Any, score_name: str | None) -> str:
    """Return the name of a score in the results: `score_name`, the only one, or refit's."""
    prefix = "mean_test_"
    names = [key.removeprefix(prefix) for key in search.cv_results_ if key.startswith(prefix)]
    if score_name is None:
        score_name = names[0] if len(names) == 1 else search.refit
    if score_name not in names:
        raise ValueError(f"score_name must be one of {names}; got {score_name!r}.")
    return score_name


def _find_parameter(candidates: Sequence[Mapping[str, Any]], word: str, argument: str) -> str:
    """Return the only searched parameter whose name ends in `word`."""
    searched = list(dict.fromkeys(name for params in candidates for name in params))
    found = [name for name in searched if name.split("__")[-1] == word]
    if len(found) != 1:
        problem = "Several searched parameters end" if found else "No searched parameter ends"
        raise ValueError(f"{problem} in {word!r}: set {argument} to one of {found or searched}.")
    return found[0]


def _layer_label(layer: Any) -> str:
    return " + ".join(map(str, layer)) if isinstance(layer, (list, tuple)) else str(layer)


def _text_color(color: NDArray[Any]) -> str:
    """Choose black or white, whichever is easier to read on a colour, by its luminance."""
    luminance = float(np.dot(color[:3], (0.299, 0.587, 0.114)))
    return "black" if luminance > 0.5 else "white"
