"""Knows how to show a network: its layers in order, what each gives, where its parameters are."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from deepfeat import DeepFeatureExtractor, list_layers

from ._axes import BLUE, GREEN, GREY, ORANGE, PURPLE, SKY, VERMILION, find_axes
from ._checks import check_extractor

_COLORS = (BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY)


class ArchitectureDisplay:
    """Layers of a network from the input down: the size of their outputs, and their parameters.

    It is recommended to use `from_backbone` or `from_extractor`. All parameters are stored as
    attributes.

    Parameters
    ----------
    layers : LayerTable
        What `list_layers` returns.
    name : str
        Name of the network.

    Attributes
    ----------
    figure_ : matplotlib Figure
        Figure of the picture.
    axes_ : ndarray of matplotlib Axes of shape (2,)
        The outputs' axes and the parameters'.

    See Also
    --------
    deepfeat.list_layers : The same as a table.

    Examples
    --------
    >>> from deepfeat.plotting import ArchitectureDisplay
    >>> display = ArchitectureDisplay.from_backbone("squeezenet1_1")
    >>> display.axes_[1].get_title(loc="left")
    '1,235,496 parameters'
    """

    __module__ = "deepfeat.plotting"  # so that pickles outlive moves

    def __init__(self, layers: Sequence[Any], *, name: str):
        self.layers = layers
        self.name = name

    @classmethod
    def from_backbone(
        cls,
        backbone: Any,
        *,
        preprocessing: Callable[[Image.Image], Any] | None = None,
        image_size: int | None = None,
        ax: Any = None,
        merge_repeats: bool = True,
    ) -> "ArchitectureDisplay":
        """Draw the layers of a backbone. No weights are loaded.

        Parameters
        ----------
        backbone : str or torch.nn.Module
            As for `list_layers`.
        preprocessing : callable, default=None
            As for `list_layers`; needed for a module.
        image_size : int, default=None
            As for `list_layers`.
        ax : matplotlib Axes or sequence of these, default=None
            As for `plot`.
        merge_repeats : bool, default=True
            As for `plot`.

        Returns
        -------
        display : ArchitectureDisplay
            The display, drawn.
        """
        layers = list_layers(backbone, preprocessing=preprocessing, image_size=image_size)
        name = backbone if isinstance(backbone, str) else type(backbone).__name__
        return cls(layers, name=name).plot(ax, merge_repeats=merge_repeats)

    @classmethod
    def from_extractor(
        cls, extractor: DeepFeatureExtractor, *, ax: Any = None, merge_repeats: bool = True
    ) -> "ArchitectureDisplay":
        """Draw the layers of an extractor's backbone.

        Parameters
        ----------
        extractor : DeepFeatureExtractor
            Its backbone, preprocessing and image size are taken. The classes are those of the
            default weights.
        ax : matplotlib Axes or sequence of these, default=None
            As for `plot`.
        merge_repeats : bool, default=True
            As for `plot`.

        Returns
        -------
        display : ArchitectureDisplay
            The display, drawn.
        """
        check_extractor(extractor)
        return cls.from_backbone(
            extractor.backbone,
            preprocessing=extractor.preprocessing,
            image_size=extractor.image_size,
            ax=ax,
            merge_repeats=merge_repeats,
        )

    def plot(self, ax: Any = None, *, merge_repeats: bool = True) -> "ArchitectureDisplay":
        """Draw the layers from the input down.

        On the left a bar is as wide as a square of the layer's places: those of maps, of tokens or
        of a sequence; a vector has the width of a single place. On the right it is as long as the
        layer has parameters, and the legend sums them up by kind of layer.

        Parameters
        ----------
        ax : matplotlib Axes or sequence of these, default=None
            A subplot, which is divided; or two Axes; by default a new figure.
        merge_repeats : bool, default=True
            Whether layers of one kind and one output shape that follow each other share a row.

        Returns
        -------
        self : ArchitectureDisplay
            The display itself.
        """
        rows = list(_merge(self.layers) if merge_repeats else map(_as_row, self.layers))
        self.figure_, axes = find_axes(
            ax,
            (1, 2),
            [np.s_[0, 0], np.s_[0, 1]],
            figsize=(9, 1.4 + 0.2 * len(rows)),
            width_ratios=(2, 3),
        )
        self.axes_: NDArray[Any] = np.array(axes, dtype=object)
        colors = _color_kinds(rows)
        self._draw_outputs(axes[0], rows, colors)
        self._draw_parameters(axes[1], rows, colors)
        for axis in axes:
            axis.set_ylim(len(rows) - 0.4, -0.6)
            axis.set_xticks([])
            axis.tick_params(left=False)
            axis.spines[:].set_visible(False)
        return self

    def _draw_outputs(self, axis: Any, rows: "list[_Row]", colors: dict[str, str]) -> None:
        """Draw a bar as wide as the output, with its shape, for each row."""
        widths = [math.sqrt(row.places) for row in rows]
        places = range(len(rows))
        bar_colors = [colors[row.kind] for row in rows]
        axis.barh(places, widths, left=[-width / 2 for width in widths], color=bar_colors)
        axis.set_yticks(places, [row.label for row in rows], fontsize="small")
        edge = max(widths) / 2
        for place, row in zip(places, rows, strict=True):
            shape = " × ".join(map(str, row.output_shape))
            axis.text(1.1 * edge, place, shape, va="center", fontsize="small")
        axis.set_xlim(-edge, 2.6 * edge)
        axis.set_title(f"{self.name}: outputs", fontsize="medium", loc="left")

    def _draw_parameters(self, axis: Any, rows: "list[_Row]", colors: dict[str, str]) -> None:
        """Draw a bar as long as there are parameters, with their number, for each row."""
        counts = [row.parameters for row in rows]
        total = sum(counts)
        legend = {}
        for kind, color in colors.items():
            own = {place: row.parameters for place, row in enumerate(rows) if row.kind == kind}
            bars = axis.barh(list(own), list(own.values()), color=color)
            number = sum(own.values())
            # Without its underscore, which would keep a private class out of the legend.
            label = f"{kind.lstrip('_')}  {number:,} ({number / max(total, 1):.1%})"
            legend[label if number else "no parameters"] = bars
        for place, row in enumerate(rows):
            if row.parameters:
                axis.text(
                    row.parameters + 0.01 * max(counts),
                    place,
                    f"{row.parameters:,}",
                    va="center",
                    fontsize="small",
                )
        axis.set_yticks([])
        axis.set_xlim(0, 1.25 * max(*counts, 1))
        axis.set_title(f"{total:,} parameters", fontsize="medium", loc="left")
        axis.legend(legend.values(), legend.keys(), frameon=False, fontsize="small")


class _Row(NamedTuple):
    """One layer, or several alike that follow each other."""

    label: str
    kind: str
    output_shape: tuple[int, ...]
    places: int
    parameters: int


def _as_row(layer: Any) -> _Row:
    places = math.prod(layer.output_shape) // layer.n_features
    return _Row(layer.name, layer.kind, layer.output_shape, places, layer.parameters)


def _merge(layers: Sequence[Any]) -> list[_Row]:
    rows = []
    for _, group in itertools.groupby(layers, lambda layer: (layer.kind, layer.output_shape)):
        alike = [_as_row(layer) for layer in group]
        first, last = alike[0], alike[-1]
        if len(alike) > 1:
            label = f"{first.label}–{_ending(first.label, last.label)}"
            first = first._replace(label=label, parameters=sum(row.parameters for row in alike))
        rows.append(first)
    return rows


def _ending(first: str, last: str) -> str:
    """Return what the last of two names has of its own: 5 of layer3.0 and layer3.5."""
    stem = last.rstrip("0123456789")
    return last.removeprefix(stem) if first.rstrip("0123456789") == stem else last


def _color_kinds(rows: Sequence[_Row]) -> dict[str, str]:
    """Give a colour to each kind of layer that has parameters, the one with most first."""
    totals: dict[str, int] = {}
    for row in rows:
        totals[row.kind] = totals.get(row.kind, 0) + row.parameters
    learned = sorted((kind for kind in totals if totals[kind]), key=lambda kind: -totals[kind])
    colors = dict(zip(learned, itertools.chain(_COLORS, itertools.repeat("black")), strict=False))
    return colors | {kind: GREY for kind in totals if not totals[kind]}
