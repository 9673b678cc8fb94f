"""EmbeddingDisplay: points, thumbnails and colours, compared with what was passed."""

import numpy as np
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
    assert len(np.unique(found, axis=0)) == min(n_classes, 20)


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
