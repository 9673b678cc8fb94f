"""Axes and texts: where every display is plotted, and that all of its texts can be read."""

import functools
import importlib
import itertools
import sys

import numpy as np
import pytest
from matplotlib import pyplot as plt
from matplotlib.text import Text
from PIL import Image

import deepfeat
from deepfeat import list_layers
from deepfeat.plotting import (
    ActivationMapDisplay,
    ArchitectureDisplay,
    LayerGridDisplay,
    LearningCurveDisplay,
    PredictionDisplay,
)

HISTORY = [
    {
        "epoch": epoch,
        "train_loss": 2 * 0.8**epoch,
        "train_score": 1 - 0.5 * 0.7**epoch,
        "validation_loss": 2 * 0.85**epoch + 0.2,
        "validation_score": 1 - 0.55 * 0.8**epoch,
    }
    for epoch in range(1, 11)
]
NAMES = ["black-and-gold garden spider", "dahlia", "daisy", "palace", "three-toed sloth"]


def make_activation_maps():
    maps = np.random.default_rng(0).random((6, 5, 5), dtype=np.float32)
    image = Image.new("RGB", (64, 64), "red")
    return ActivationMapDisplay(maps, image=image, layer="features.10", channels=range(6))


def make_predictions():
    images = [Image.new("RGB", (64, 48), "red")] * 3
    values = [[1, 0, 0, 0, 0], [0.5, 0.3, 0.1, 0.06, 0.04], [0.2] * 5]
    return PredictionDisplay(
        images, predictions=[list(zip(NAMES, row, strict=True)) for row in values]
    )


def make_architecture(name="vgg16"):
    return ArchitectureDisplay(list_layers(name), name=name)


def make_layer_grid():
    scores = np.linspace(0.5, 0.9, 33).reshape(3, 11)
    C = [1e-5, 1e-4, 5e-4, 1e-3, 5e-3, 1e-2, 1e-1, 1, 5, 10, 100]
    return LayerGridDisplay(scores, layers=["relu6", "relu7", "relu8"], C=C, best=(2, 10))


def make_learning_curve():
    return LearningCurveDisplay(HISTORY)


DISPLAYS = {  # with their numbers of Axes
    "maps": (make_activation_maps, 7),
    "predictions": (make_predictions, 6),
    "architecture": (make_architecture, 2),
    "grid": (make_layer_grid, 1),
    "curve": (make_learning_curve, 2),
}
EACH = pytest.mark.parametrize(("make_display", "count"), DISPLAYS.values(), ids=DISPLAYS)


def axes_of(display):
    return list(np.ravel(getattr(display, "axes_", getattr(display, "ax_", None))))


@EACH
def test_plot_creates_a_figure(make_display, count):
    """It returns the display, with the figure and the Axes as attributes."""
    display = make_display()
    assert display.plot() is display
    axes = axes_of(display)
    assert len(axes) == count
    assert plt.get_fignums() == [display.figure_.number]
    assert {axis.figure for axis in axes} == {display.figure_}


@EACH
def test_plot_uses_the_given_axes(make_display, count):
    """As many Axes as it needs are used as they are, in order."""
    figure, given = plt.subplots(count, squeeze=False)
    display = make_display().plot(given)
    assert axes_of(display) == list(given.ravel())
    assert display.figure_ is figure
    assert plt.get_fignums() == [figure.number]


@EACH
def test_plot_divides_a_single_subplot(make_display, count):
    """The display stays within the subplot, and the neighbour is not changed."""
    figure, (neighbour, given) = plt.subplots(1, 2, figsize=(20, 8))
    outer = given.get_position()
    display = make_display().plot(given)
    assert display.figure_ is figure
    assert not neighbour.has_data()
    assert len(axes_of(display)) == count
    for axes in axes_of(display):
        inner = axes.get_position(original=True)
        assert inner.x0 >= outer.x0 - 1e-9
        assert inner.x1 <= outer.x1 + 1e-9
        assert inner.y0 >= outer.y0 - 1e-9
        assert inner.y1 <= outer.y1 + 1e-9


@EACH
def test_axes_that_do_not_fit_are_refused(make_display, count):
    """Too many, none at all, or something else."""
    _, given = plt.subplots(count + 1, squeeze=False)
    with pytest.raises(
        ValueError, match=rf"must be ({count}|a single) Axes.*; got {count + 1} Axes"
    ):
        make_display().plot(given)
    with pytest.raises(ValueError, match="; got 0 Axes"):
        make_display().plot([])
    with pytest.raises(TypeError, match=r"must be matplotlib Axes; got str\."):
        make_display().plot(["axes"])


def test_axes_outside_a_grid_cannot_be_divided():
    """Axes that were placed manually have no grid to divide."""
    axes = plt.figure().add_axes((0, 0, 1, 1))
    with pytest.raises(ValueError, match=r"cannot be divided: pass 2 Axes.*pyplot\.subplots"):
        make_learning_curve().plot(axes)


def hidden_texts(axes):
    """Yield texts that exist but are not drawn: of Axes that are off, and of ticks out of view."""
    for axis in (axes.xaxis, axes.yaxis):
        if not axes.axison:
            yield from axis.findobj(Text)
        low, high = sorted(axis.get_view_interval())
        for label, tick in zip(axis.get_majorticklabels(), axis.get_majorticklocs(), strict=True):
            if not low <= tick <= high:
                yield label


def find_collisions(figure):
    """Draw a figure; return texts that are cut off, and pairs of texts that overlap."""
    figure.canvas.draw()
    hidden = {id(text) for axes in figure.axes for text in hidden_texts(axes)}
    boxes = [
        (text.get_text(), text.get_window_extent())
        for text in figure.findobj(Text)
        if text.get_text().strip() and text.get_visible() and id(text) not in hidden
    ]
    assert len(boxes) > 4
    within = figure.bbox.padded(1)
    cut = [
        text
        for text, box in boxes
        if not (within.contains(box.x0, box.y0) and within.contains(box.x1, box.y1))
    ]
    return cut + [
        (first, second)
        for (first, box), (second, other) in itertools.combinations(boxes, 2)
        if box.padded(-1).overlaps(other.padded(-1))
    ]


@pytest.mark.parametrize(
    "make_display",
    [
        *(make for make, _ in DISPLAYS.values()),
        *(
            functools.partial(make_architecture, name)
            for name in ("resnet152", "swin_t", "vit_b_16")
        ),
    ],
)
def test_no_text_collides_with_another(make_display):
    """All texts of a figure can be read, and none is cut off."""
    assert find_collisions(make_display().plot().figure_) == []


@EACH
def test_no_text_collides_in_a_subplot_of_good_size(make_display, count):
    """The space between the parts does not depend on the layout engine of a new figure."""
    figure, (_, given) = plt.subplots(1, 2, figsize=(22, 9))
    make_display().plot(given)
    assert find_collisions(figure) == []


class WithoutMatplotlib:
    """A finder that raises for matplotlib, in front of all other finders."""

    @staticmethod
    def find_spec(name, *_):
        if name == "matplotlib":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_matplotlib_is_only_needed_to_plot(monkeypatch):
    """Without it the displays can be imported; to plot raises an error that names the extra."""
    for name in list(sys.modules):
        if name.startswith(("matplotlib", "deepfeat.plotting")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(deepfeat, "plotting")
    monkeypatch.setattr(sys, "meta_path", [WithoutMatplotlib, *sys.meta_path])
    display = importlib.import_module("deepfeat.plotting").LearningCurveDisplay(HISTORY)
    with pytest.raises(ImportError, match=r"pip install .*'matplotlib>="):
        display.plot()
    assert display.history is HISTORY
