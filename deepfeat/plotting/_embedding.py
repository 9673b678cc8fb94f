"""`EmbeddingDisplay`: images as thumbnails on a plane."""

import math
import re
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from sklearn.decomposition import PCA

from .._images.records import as_records
from .._optional import import_optional
from ._axes import GREY, find_axes
from ._checks import check_count, extract_rows
from ._pictures import open_pictures

_SIDE = 64  # pixels of a thumbnail
_MOST_COLORS = 20  # of classes that a palette tells apart
_MOST_ENTRIES = 60  # of a legend
_PER_SIDE = 13  # how many thumbnails fit side by side


class EmbeddingDisplay:
    """Images on a plane: a point for each, and thumbnails where there is space for them.

    It is recommended to use `from_extractor` or `from_embedding`. All parameters are stored as
    attributes.

    Parameters
    ----------
    embedding : ndarray of shape (n, 2)
        Coordinates of the images.
    thumbnails : dict of int to PIL image
        Thumbnails, by the index of their image.
    y : ndarray of shape (n,), default=None
        Classes of the images, or values, by which points and frames are coloured.

    Attributes
    ----------
    figure_ : matplotlib Figure
        Figure that contains the display.
    ax_ : matplotlib Axes
        Axes that contain the points.
    points_ : matplotlib PathCollection
        The points.

    See Also
    --------
    NeighborsDisplay : Some images with their nearest neighbours.

    Examples
    --------
    >>> import matplotlib.pyplot as plt
    >>> from deepfeat import DeepFeatureExtractor
    >>> from deepfeat.datasets import load_image_folder, write_sample_folder
    >>> from deepfeat.plotting import EmbeddingDisplay
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as root:
    ...     photos = load_image_folder(write_sample_folder(root))
    ...     display = EmbeddingDisplay.from_extractor(
    ...         DeepFeatureExtractor("resnet10_slim"), photos.data,
    ...         y=photos.target_names[photos.target])
    >>> display.embedding.shape
    (126, 2)
    >>> plt.show()  # doctest: +SKIP
    """

    __module__ = "deepfeat.plotting"  # so that pickles outlive moves

    def __init__(
        self,
        embedding: NDArray[Any],
        *,
        thumbnails: dict[int, Image.Image],
        y: NDArray[Any] | None = None,
    ):
        self.embedding = embedding
        self.thumbnails = thumbnails
        self.y = y

    @classmethod
    def from_extractor(
        cls,
        extractor: Any,
        images: Any,
        *,
        reducer: Any = None,
        y: ArrayLike | None = None,
        max_thumbnails: int = 100,
        ax: Any = None,
    ) -> "EmbeddingDisplay":
        """Extract features, reduce them to two dimensions and plot the images there.

        Parameters
        ----------
        extractor : DeepFeatureExtractor or other transformer
            Turns images into rows of features with `transform`; a fitted pipeline of transformers
            does as well.
        images : sequence or array of n images
            As for `DeepFeatureExtractor`, except for flattened rows.
        reducer : transformer, default=None
            Has `fit_transform` and returns two columns, such as `sklearn.manifold.TSNE()` or
            `umap.UMAP()`; None stands for `sklearn.decomposition.PCA(2)`. It is not cloned.
        y : array of shape (n,), default=None
            As for `from_embedding`.
        max_thumbnails : int, default=100
            As for `from_embedding`.
        ax : matplotlib Axes, default=None
            As for `plot`.

        Returns
        -------
        display : EmbeddingDisplay
            The plotted display.

        Raises
        ------
        ValueError
            If the reducer does not return two columns, or as for `from_embedding`.
        """
        reducer = PCA(2) if reducer is None else reducer
        embedding = reducer.fit_transform(extract_rows(extractor, images))
        return cls.from_embedding(images, embedding, y=y, max_thumbnails=max_thumbnails, ax=ax)

    @classmethod
    def from_embedding(
        cls,
        images: Any,
        embedding: ArrayLike,
        *,
        y: ArrayLike | None = None,
        max_thumbnails: int = 100,
        ax: Any = None,
    ) -> "EmbeddingDisplay":
        """Plot images at given coordinates.

        Parameters
        ----------
        images : sequence or array of n images
            As for `DeepFeatureExtractor`, except for flattened rows. Only those that are shown are
            opened.
        embedding : array of shape (n, 2)
            Coordinates of the images.
        y : array of shape (n,), default=None
            Classes of the images, or values (floats, or more than 20 different ints), by which
            points and frames are coloured. Those without one (None or NaN) are grey.
        max_thumbnails : int, default=100
            Number of thumbnails at most. Those that are shown do not overlap.
        ax : matplotlib Axes, default=None
            As for `plot`.

        Returns
        -------
        display : EmbeddingDisplay
            The plotted display.

        Raises
        ------
        ValueError
            If the numbers of images, rows and classes differ, coordinates are not finite, or an
            image cannot be read.
        """
        check_count("max_thumbnails", max_thumbnails, smallest=0)
        count = len(as_records(images))
        embedding = np.asarray(embedding, dtype=float)
        if embedding.shape != (count, 2) or not np.isfinite(embedding).all():
            raise ValueError(
                f"embedding must be finite and of shape ({count}, 2), with one row per image; got "
                f"shape {embedding.shape}."
            )
        labels = None if y is None else np.asarray(y)
        if labels is not None and labels.shape != (count,):
            raise ValueError(f"y must have shape ({count},); got {labels.shape}.")
        shown = _choose_apart(embedding, max_thumbnails)
        thumbnails = dict(zip(shown, open_pictures(images, shown, side=_SIDE), strict=True))
        return cls(embedding, thumbnails=thumbnails, y=labels).plot(ax)

    def plot(self, ax: Any = None, *, cmap: str | None = None) -> "EmbeddingDisplay":
        """Plot the points and the thumbnails.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            The Axes to plot on. If None, a new figure is created.
        cmap : str, default=None
            Name of a matplotlib colour map; by default "tab10" or "tab20" for classes and
            "viridis" for values.

        Returns
        -------
        self : EmbeddingDisplay
            The display itself.
        """
        self.figure_, (self.ax_,) = find_axes(ax, (1, 1), [np.s_[0, 0]], figsize=(8, 7))
        colors = self._color(cmap)
        self.points_ = self.ax_.scatter(
            self.embedding[:, 0], self.embedding[:, 1], s=12, c=colors, linewidths=0
        )
        offsetbox: Any = import_optional("matplotlib.offsetbox", extra="plot")
        # The points do not reach the edges of the Axes, and thumbnails have frames: 1.2.
        extent = self.ax_.get_window_extent()
        side = min(extent.width, extent.height) / self.figure_.dpi * 72 / _PER_SIDE / 1.2  # points
        for index, thumbnail in self.thumbnails.items():
            picture = offsetbox.OffsetImage(thumbnail, zoom=side / max(thumbnail.size))
            frame = {"edgecolor": colors[index], "linewidth": 2}
            self.ax_.add_artist(
                offsetbox.AnnotationBbox(
                    picture, self.embedding[index], pad=0, bboxprops=frame, zorder=3
                )
            )
        self.ax_.set(xticks=[], yticks=[])
        self.ax_.margins(0.06)
        self.ax_.spines[:].set_color("lightgrey")
        return self

    def _color(self, cmap: str | None) -> NDArray[Any]:
        """Return a colour for each image, and add a legend or a colour bar that explains them."""
        pyplot = import_optional("matplotlib.pyplot", extra="plot")
        colors = np.tile(pyplot.cm.colors.to_rgba(GREY), (len(self.embedding), 1))
        if self.y is None:
            return colors
        known = np.array([value is not None and value == value for value in self.y.tolist()])
        classes, codes = np.unique(self.y[known], return_inverse=True)
        if self.y.dtype.kind == "f" or (self.y.dtype.kind in "iu" and len(classes) > _MOST_COLORS):
            colors[known] = self._color_values(classes, cmap or "viridis")[codes]
        else:
            colors[known] = self._color_classes(classes, cmap)[codes]
        return colors

    def _color_values(self, values: NDArray[Any], cmap: str) -> NDArray[Any]:
        """Return a colour for each value, in ascending order, and add a colour bar."""
        pyplot = import_optional("matplotlib.pyplot", extra="plot")
        finite = values[np.isfinite(values)]
        scale = pyplot.Normalize(*finite[[0, -1]]) if len(finite) else None
        mapping = pyplot.cm.ScalarMappable(scale, cmap)
        self.figure_.colorbar(mapping, ax=self.ax_)
        return np.asarray(mapping.to_rgba(values))

    def _color_classes(self, classes: NDArray[Any], cmap: str | None) -> NDArray[Any]:
        """Return a colour for each class, and add a legend, unless there are very many."""
        pyplot = import_optional("matplotlib.pyplot", extra="plot")
        count = len(classes)
        few = "tab10" if count <= 10 else "tab20"
        palette = pyplot.get_cmap(cmap or (few if count <= _MOST_COLORS else "turbo"))
        steps = np.arange(count)
        is_list = palette.N <= _MOST_COLORS
        colors = palette(steps % palette.N if is_list else steps / max(1, count - 1))
        if count <= _MOST_ENTRIES:
            legend = self.ax_.legend(
                [self.ax_.scatter([], [], s=40, color=color) for color in colors],
                # A label that begins with an underscore would be left out.
                [re.sub("^_", "\N{ZERO WIDTH SPACE}_", str(name)) for name in classes],
                loc="upper left",
                bbox_to_anchor=(1, 1),
                frameon=False,
                ncols=math.ceil(count / 30),
            )
            for text in legend.get_texts():
                text.set_parse_math(False)
        return np.asarray(colors)


def _choose_apart(embedding: NDArray[Any], count: int) -> list[int]:
    """Choose up to `count` points whose thumbnails do not overlap, spread over all of them."""
    # In widths of a thumbnail.
    extent = np.ptp(embedding, axis=0)
    scaled = embedding / np.where(extent > 0, extent, 1) * _PER_SIDE
    chosen: list[int] = []
    for index in np.random.default_rng(0).permutation(len(embedding)):
        if len(chosen) == count:
            break
        if not chosen or np.abs(scaled[chosen] - scaled[index]).max(axis=1).min() > 1:
            chosen.append(int(index))
    return chosen
