"""EmbeddingDisplay: points, thumbnails and colours, compared with what was passed."""

import numpy as np
import pandas as pd
import pytest
from matplotlib import colors, offsetbox
from matplotlib import pyplot as plt
from numpy.testing import assert_allclose
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.preprocessing import FunctionTransformer

from deepfeat.plotting import EmbeddingDisplay


def flatten(images):
    return np.asarray(images).reshape(len(images), -1)


@pytest.fixture
def images(digits):
    return digits[0]


@pytest.fixture
def grid():
    """A hundred points, ten by ten."""
    return np.stack(np.meshgrid(np.arange(10.0), np.arange(10.0)), axis=-1).reshape(-1, 2)


def find_boxes(display):
    """Return the thumbnails, in pixels of the figure, after drawing."""
    display.figure_.canvas.draw()
    found = display.ax_.findobj(offsetbox.AnnotationBbox)
    return [box.get_window_extent() for box in found]


@pytest.mark.parametrize("reducer", [None, TSNE(random_state=0, init="pca")])
def test_points_are_where_the_reducer_puts_them(images, reducer):
    """PCA is the default; any other with two columns does as well."""
    display = EmbeddingDisplay.from_extractor(FunctionTransformer(flatten), images, reducer=reducer)
    expected = (reducer or PCA(2)).fit_transform(flatten(images))
    assert_allclose(display.points_.get_offsets(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [None, (2, 2), (1, 3), (1, 1)])
def test_thumbnails_lie_on_their_points_and_do_not_overlap(images, shape):
    """Each shows its image, and as many are shown as there is space for, whatever the Axes."""
    points = np.random.default_rng(1).normal(size=(100, 2))
    ax = None if shape is None else plt.figure(figsize=(6, 5)).subplots(*shape, squeeze=False)[0, 0]
    display = EmbeddingDisplay.from_embedding(images, points, ax=ax)
    assert 15 < len(display.thumbnails) < 100
    boxes = find_boxes(display)
    for index, (number, thumbnail) in enumerate(display.thumbnails.items()):
        assert_allclose(np.asarray(thumbnail)[..., 0], images[number] * 255, atol=1)
        box = boxes[index]
        centre = display.ax_.transData.transform(points[number])
        assert_allclose([(box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2], centre, atol=1.5)
        others = boxes[:index]
        assert not any(box.padded(-2).overlaps(other) for other in others)


def test_thumbnails_are_as_many_as_allowed(images, grid):
    """Zero leaves the points."""
    assert len(EmbeddingDisplay.from_embedding(images, grid, max_thumbnails=7).thumbnails) == 7
    assert not EmbeddingDisplay.from_embedding(images, grid, max_thumbnails=0).thumbnails
    assert len(EmbeddingDisplay.from_embedding(images, grid).thumbnails) == 100


def test_only_the_images_that_are_shown_are_opened(images, grid, tmp_path):
    """A folder of a million photographs has only so many thumbnails."""
    chosen = EmbeddingDisplay.from_embedding(images, grid, max_thumbnails=3).thumbnails
    mixed = [images[i] if i in chosen else tmp_path / "missing.png" for i in range(100)]
    EmbeddingDisplay.from_embedding(mixed, grid, max_thumbnails=3)
    with pytest.raises(ValueError, match=r"missing\.png"):
        EmbeddingDisplay.from_embedding(mixed, grid, max_thumbnails=4)


@pytest.mark.parametrize("n_classes", [3, 10, 15, 25])
def test_classes_have_colours_and_a_legend(images, grid, n_classes):
    """A point has the colour of its class in the legend."""
    y = np.array([f"class {k % n_classes:02}" for k in range(100)])
    display = EmbeddingDisplay.from_embedding(images, grid, y=y, max_thumbnails=0)
    legend = display.ax_.get_legend()
    names = [text.get_text() for text in legend.get_texts()]
    assert names == sorted(set(y))
    found = [handle.get_facecolor()[0] for handle in legend.legend_handles]
    point_colors = display.points_.get_facecolors()
    assert_allclose(point_colors, [found[names.index(name)] for name in y])
    assert len(np.unique(found, axis=0)) == n_classes


def test_values_have_a_colour_bar(images, grid):
    """Floats are values, such as the targets of a regression."""
    display = EmbeddingDisplay.from_embedding(images, grid, y=np.linspace(-1, 3, 100))
    bar = display.figure_.axes[1]
    assert_allclose(bar.get_ylim(), (-1, 3))
    found = display.points_.get_facecolors()
    assert not np.allclose(found[0], found[-1])
    assert display.ax_.get_legend() is None


def test_points_without_classes_are_grey(images, grid):
    """All alike."""
    display = EmbeddingDisplay.from_embedding(images, grid)
    (grey,) = np.unique(display.points_.get_facecolors(), axis=0)
    assert len(set(colors.to_rgb(grey))) == 1


def test_a_point_may_be_alone(images):
    """A single image, or several at one point, show one thumbnail."""
    assert len(EmbeddingDisplay.from_embedding(images[:1], [[3, 4]]).thumbnails) == 1
    assert len(EmbeddingDisplay.from_embedding(images[:5], np.ones((5, 2))).thumbnails) == 1


@pytest.mark.parametrize(
    ("embedding", "params", "message"),
    [
        (
            np.zeros((100, 3)),
            {},
            r"^embedding must be finite and of shape \(100, 2\), .*\(100, 3\)",
        ),
        (np.zeros((99, 2)), {}, r"^embedding must be finite and of shape \(100, 2\)"),
        (np.full((100, 2), np.nan), {}, r"^embedding must be finite"),
        (np.zeros((100, 2)), {"y": [1, 2]}, r"^y must have shape \(100,\); got \(2,\)\.$"),
    ],
)
def test_other_shapes_are_refused(images, embedding, params, message):
    """The error says what was expected and what came."""
    with pytest.raises(ValueError, match=message):
        EmbeddingDisplay.from_embedding(images, embedding, **params)


def test_frames_have_the_colours_of_their_points(images, grid):
    """By class."""
    y = np.array(["a", "b"])[np.arange(100) % 2]
    display = EmbeddingDisplay.from_embedding(images, grid, y=y, max_thumbnails=20)
    frames = [box.patch.get_edgecolor() for box in display.ax_.findobj(offsetbox.AnnotationBbox)]
    expected = display.points_.get_facecolors()[list(display.thumbnails)]
    assert len(np.unique(expected, axis=0)) == 2
    assert_allclose(frames, expected)


@pytest.mark.parametrize("missing", [np.nan, None])
def test_images_without_a_class_or_value_are_grey(images, grid, missing):
    """The others have colours as without them."""
    values = np.arange(100.0).astype(object if missing is None else float)
    names = np.array([f"class {k % 3}" for k in range(100)], dtype=object)
    for y in (values, names):
        y[[0, 7]] = missing
        display = EmbeddingDisplay.from_embedding(images, grid, y=y, max_thumbnails=0)
        found = display.points_.get_facecolors()
        assert len({*found[0, :3], *found[7, :3]}) == 1
        assert len(np.unique(found, axis=0)) == 1 + len(set(y[1:7]) | set(y[8:]))
        plt.close("all")


def test_many_different_ints_are_values(images, grid):
    """A legend of a hundred entries would not fit; twenty are classes."""
    values = EmbeddingDisplay.from_embedding(images, grid, y=np.arange(100))
    assert len(values.figure_.axes) == 2
    classes = EmbeddingDisplay.from_embedding(images, grid, y=np.arange(100) % 20)
    assert len(classes.ax_.get_legend().get_texts()) == 20


def test_any_name_is_shown_as_it_is(images, grid):
    """Neither are underscores hidden nor dollars read as mathematics."""
    names = ["_background", "$10_", "$20_$"]
    y = np.array(names)[np.arange(100) % 3]
    display = EmbeddingDisplay.from_embedding(images, grid, y=y, max_thumbnails=0)
    display.figure_.canvas.draw()
    shown = [text.get_text() for text in display.ax_.get_legend().get_texts()]
    assert [name.lstrip("\N{ZERO WIDTH SPACE}") for name in shown] == sorted(names)


def test_thumbnails_and_classes_can_be_passed_with_an_extractor(images, grid):
    """As for `from_embedding`; features may be a DataFrame."""
    _, ax = plt.subplots()
    flat = FunctionTransformer(lambda images: pd.DataFrame(flatten(images)))
    display = EmbeddingDisplay.from_extractor(
        flat, images, y=np.arange(100) % 2, max_thumbnails=5, ax=ax
    )
    assert display.ax_ is ax
    assert len(display.thumbnails) == 5
    assert len(display.ax_.get_legend().get_texts()) == 2


@pytest.mark.parametrize("count", [-1, None, 2.5])
def test_the_number_of_thumbnails_is_a_count(images, grid, count):
    """Of at least zero."""
    with pytest.raises(ValueError, match=r"^max_thumbnails must be an int of at least 0; got "):
        EmbeddingDisplay.from_embedding(images, grid, max_thumbnails=count)


def test_no_images_are_refused():
    """The error says so."""
    with pytest.raises(ValueError, match=r"^X is empty"):
        EmbeddingDisplay.from_embedding([], np.zeros((0, 2)))
