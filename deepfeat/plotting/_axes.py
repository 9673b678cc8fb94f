"""Knows where a display draws: in a figure of its own, or in the axes that it is given."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from .._optional import import_optional

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

# Of Okabe and Ito (2008), "Color Universal Design": told apart with every kind of colour vision.
BLUE, VERMILION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
ORANGE, SKY = "#E69F00", "#56B4E9"
GREY = "#999999"


def find_axes(
    ax: Any,
    shape: tuple[int, int],
    cells: Sequence[Any],
    *,
    figsize: tuple[float, float],
    width_ratios: Sequence[float] | None = None,
    wspace: float | None = None,
) -> "tuple[Figure | SubFigure, list[Axes]]":
    """Return a figure and one axes for each of the cells of a grid.

    Parameters
    ----------
    ax : matplotlib Axes, sequence of these or None
        None makes a new figure. As many Axes as there are cells are taken as they are, in order;
        a single one is divided into the cells.
    shape : tuple of int
        Rows and columns of the grid.
    cells : sequence of index expressions
        What each axes covers of the grid, such as numpy.s_[0, 1] or numpy.s_[:, 0].
    figsize : tuple of float
        Inches of a new figure.
    width_ratios : sequence of float, optional
        Relative widths of the columns.
    wspace : float, optional
        Room between the parts of a single Axes, as a fraction of their width. A new figure makes
        room by itself.

    Raises
    ------
    TypeError
        If `ax` holds anything but Axes.
    ValueError
        If the Axes are too few or too many, or a single one cannot be divided.
    """
    pyplot = import_optional("matplotlib.pyplot", extra="plot")
    if ax is None:
        figure = pyplot.figure(figsize=figsize, layout="constrained")
        return figure, _add(figure, figure.add_gridspec(*shape, width_ratios=width_ratios), cells)
    given = list(np.asarray(ax, dtype=object).ravel())
    for item in given:
        if not isinstance(item, pyplot.Axes):
            raise TypeError(f"ax holds a {type(item).__name__}; matplotlib Axes are expected.")
    if len(given) == len(cells):
        return given[0].figure, given
    if len(given) != 1:
        several = f"{len(cells)} are expected, or a single one, which is divided"
        expected = several if len(cells) > 1 else "a single one is expected"
        raise ValueError(f"ax holds {len(given)} Axes; {expected}.")
    place = given[0].get_subplotspec()
    if place is None:
        raise ValueError(
            f"ax is no subplot and cannot be divided: pass {len(cells)} Axes, or one that "
            "pyplot.subplots made."
        )
    given[0].set_axis_off()
    figure = given[0].figure
    grid = place.subgridspec(*shape, width_ratios=width_ratios, wspace=wspace)
    return figure, _add(figure, grid, cells)


def _add(figure: "Figure | SubFigure", grid: Any, cells: Sequence[Any]) -> "list[Axes]":
    return [figure.add_subplot(grid[cell]) for cell in cells]
