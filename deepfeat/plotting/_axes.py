"""The axes that a display is plotted on, and its colours."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .._optional import import_optional
from ._checks import check_count

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

# From Okabe and Ito (2008), "Color Universal Design": distinct for all kinds of colour vision.
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
    """Return a figure, and one Axes for each cell of a grid.

    Parameters
    ----------
    ax : matplotlib Axes, sequence of Axes or None
        If None, a new figure is created. As many Axes as there are cells are used as they are, in
        order; a single one is divided into the cells.
    shape : tuple of int
        Rows and columns of the grid.
    cells : sequence of index expressions
        The part of the grid that each Axes covers, such as numpy.s_[0, 1] or numpy.s_[:, 0].
    figsize : tuple of float
        Width and height of a new figure, in inches.
    width_ratios : sequence of float, optional
        Relative widths of the columns.
    wspace : float, optional
        Space between the parts of a single Axes, as a fraction of their width. In a new figure
        the layout engine decides.

    Raises
    ------
    TypeError
        If `ax` holds anything but Axes.
    ValueError
        If there are too few or too many Axes, or a single one cannot be divided.
    """
    pyplot = import_optional("matplotlib.pyplot", extra="plot")
    if ax is None:
        figure = pyplot.figure(figsize=figsize, layout="constrained")
        return figure, _add(figure, figure.add_gridspec(*shape, width_ratios=width_ratios), cells)
    given = list(np.asarray(ax, dtype=object).ravel())
    for item in given:
        if not isinstance(item, pyplot.Axes):
            raise TypeError(f"ax must be matplotlib Axes; got {type(item).__name__}.")
    if len(given) == len(cells):
        return given[0].figure, given
    if len(given) != 1:
        single = "a single Axes"
        allowed = f"{len(cells)} Axes, or {single} to divide" if len(cells) > 1 else single
        raise ValueError(f"ax must be {allowed}; got {len(given)} Axes.")
    subplot = given[0].get_subplotspec()
    if subplot is None:
        raise ValueError(
            f"ax is not a subplot and cannot be divided: pass {len(cells)} Axes, or one that was "
            "created by pyplot.subplots."
        )
    given[0].set_axis_off()
    figure = given[0].figure
    grid = subplot.subgridspec(*shape, width_ratios=width_ratios, wspace=wspace)
    return figure, _add(figure, grid, cells)


def find_pairs(
    ax: Any,
    count: int,
    n_cols: int,
    *,
    size: tuple[float, float],
    width_ratios: tuple[float, float] = (1, 1),
    wspace: float | None = None,
) -> "tuple[Figure | SubFigure, NDArray[Any]]":
    """Return a figure, and the Axes of pairs, of shape (count, 2), with `n_cols` pairs per row.

    `size` is that of a pair, in inches; everything else is as for `find_axes`.
    """
    check_count("n_cols", n_cols)
    columns = min(n_cols, count)
    rows = math.ceil(count / columns)
    cells = []
    for index in range(count):
        row, column = divmod(index, columns)
        cells += [np.s_[row, 2 * column], np.s_[row, 2 * column + 1]]
    figure, axes = find_axes(
        ax,
        (rows, 2 * columns),
        cells,
        figsize=(size[0] * columns, size[1] * rows),
        width_ratios=width_ratios * columns,
        wspace=wspace,
    )
    return figure, np.array(axes, dtype=object).reshape(count, 2)


def _add(figure: "Figure | SubFigure", grid: Any, cells: Sequence[Any]) -> "list[Axes]":
    return [figure.add_subplot(grid[cell]) for cell in cells]
