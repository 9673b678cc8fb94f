"""`ArchitectureDisplay`: the layers of a network, their outputs and their parameters."""

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
    """Layers of a network, from top to bottom: the size of their outputs, and their parameters.

    It is recommended to use `from_backbone` or `from_extractor`. All parameters are stored as
    attributes.

    Parameters
    ----------
    layers : LayerTable
        The layers, as returned by `list_layers`.
    name : str
        Name of the network.

    Attributes
    ----------
    figure_ : matplotlib Figure
        Figure that contains the display.
    axes_ : ndarray of matplotlib Axes of shape (2,)
        Axes of the outputs and of the parameters.

    See Also
    --------
    deepfeat.list_layers : The same information as a table.

    Examples
    --------
    >>> import matplotlib.pyplot as plt
    >>> from deepfeat.plotting import ArchitectureDisplay
    >>> display = ArchitectureDisplay.from_backbone("squeezenet1_1")
    >>> display.axes_[1].get_title(loc="left")
    '1,235,496 parameters'
    >>> plt.show()  # doctest: +SKIP
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
        """Plot the layers of a backbone, without loading weights.

        Parameters
        ----------
        backbone : str or torch.nn.Module
            As for `list_layers`.
        preprocessing : callable, default=None
            As for `list_layers`; required for a module.
        image_size : int, default=None
            As for `list_layers`.
        ax : matplotlib Axes or sequence of Axes, default=None
            As for `plot`.
        merge_repeats : bool, default=True
            As for `plot`.

        Returns
        -------
        display : ArchitectureDisplay
            The plotted display.
        """
        layers = list_layers(backbone, preprocessing=preprocessing, image_size=image_size)
        name = backbone if isinstance(backbone, str) else type(backbone).__name__
        return cls(layers, name=name).plot(ax, merge_repeats=merge_repeats)

    @classmethod
    def from_extractor(
        cls, extractor: DeepFeatureExtractor, *, ax: Any = None, merge_repeats: bool = True
    ) -> "ArchitectureDisplay":
        """Plot the layers of an extractor's backbone.

        Parameters
        ----------
        extractor : DeepFeatureExtractor
            Its backbone, preprocessing and image size are used. The classes are those of the
            default weights.
        ax : matplotlib Axes or sequence of Axes, default=None
            As for `plot`.
        merge_repeats : bool, default=True
            As for `plot`.

        Returns
        -------
        display : ArchitectureDisplay
            The plotted display.
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
        """Plot the layers, with the first at the top.

        On the left, the width of a bar is the square root of the number of positions in the
        output: those of maps, of tokens or of a sequence; a vector counts as a single position. On
        the right, its length is the number of parameters, and the legend has the total for each
        kind of layer.

        Parameters
        ----------
        ax : matplotlib Axes or sequence of Axes, default=None
            A subplot to divide, or two Axes. If None, a new figure is created.
        merge_repeats : bool, default=True
            Whether consecutive layers of the same kind and output shape share a row.

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
        widths = [math.sqrt(row.n_positions) for row in rows]
        indices = range(len(rows))
        bar_colors = [colors[row.kind] for row in rows]
        axis.barh(indices, widths, left=[-width / 2 for width in widths], color=bar_colors)
        axis.set_yticks(indices, [row.label for row in rows], fontsize="small")
        edge = max(widths) / 2
        for index, row in enumerate(rows):
            shape = " × ".join(map(str, row.output_shape))
            axis.text(1.1 * edge, index, shape, va="center", fontsize="small")
        axis.set_xlim(-edge, 2.6 * edge)
        axis.set_title(f"{self.name}: outputs", fontsize="medium", loc="left")

    def _draw_parameters(self, axis: Any, rows: "list[_Row]", colors: dict[str, str]) -> None:
        """Draw a bar as long as the number of parameters, and this number, for each row."""
        counts = [row.parameters for row in rows]
        total = sum(counts)
        legend = {}
        for kind, color in colors.items():
            own = {index: row.parameters for index, row in enumerate(rows) if row.kind == kind}
            bars = axis.barh(list(own), list(own.values()), color=color)
            subtotal = sum(own.values())
            # Matplotlib leaves labels with a leading underscore out of the legend.
            label = f"{kind.lstrip('_')}  {subtotal:,} ({subtotal / max(total, 1):.1%})"
            legend[label if subtotal else "no parameters"] = bars
        for index, row in enumerate(rows):
            if row.parameters:
                axis.text(
                    row.parameters + 0.01 * max(counts),
                    index,
                    f"{row.parameters:,}",
                    va="center",
                    fontsize="small",
                )
        axis.set_yticks([])
        axis.set_xlim(0, 1.25 * max(*counts, 1))
        axis.set_title(f"{total:,} parameters", fontsize="medium", loc="left")
        axis.legend(legend.values(), legend.keys(), frameon=False, fontsize="small")


class _Row(NamedTuple):
    """A layer, or several consecutive ones of the same kind and output shape."""

    label: str
    kind: str
    output_shape: tuple[int, ...]
    n_positions: int
    parameters: int


def _as_row(layer: Any) -> _Row:
    n_positions = math.prod(layer.output_shape) // layer.n_features
    return _Row(layer.name, layer.kind, layer.output_shape, n_positions, layer.parameters)


def _merge(layers: Sequence[Any]) -> list[_Row]:
    rows = []
    for _, group in itertools.groupby(layers, lambda layer: (layer.kind, layer.output_shape)):
        repeats = [_as_row(layer) for layer in group]
        first, last = repeats[0], repeats[-1]
        if len(repeats) > 1:
            label = f"{first.label}–{_ending(first.label, last.label)}"
            first = first._replace(label=label, parameters=sum(row.parameters for row in repeats))
        rows.append(first)
    return rows


def _ending(first: str, last: str) -> str:
    """Return the part of the last name that differs: 5 for layer3.0 and layer3.5."""
    stem = last.rstrip("0123456789")
    return last.removeprefix(stem) if first.rstrip("0123456789") == stem else last


def _color_kinds(rows: Sequence[_Row]) -> dict[str, str]:
    """Assign a colour to each kind of layer with parameters, starting with the most."""
    totals: dict[str, int] = {}
    for row in rows:
        totals[row.kind] = totals.get(row.kind, 0) + row.parameters
    kinds = sorted((kind for kind in totals if totals[kind]), key=lambda kind: -totals[kind])
    colors = dict(zip(kinds, itertools.chain(_COLORS, itertools.repeat("black")), strict=False))
    return colors | {kind: GREY for kind in totals if not totals[kind]}
