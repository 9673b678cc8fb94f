"""`NeighborsDisplay`: images with their nearest neighbours."""

import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from sklearn.neighbors import NearestNeighbors

from ._axes import BLUE, find_axes
from ._checks import check_count, extract_rows
from ._pictures import open_pictures

_SIDE = 224  # pixels of a picture


class NeighborsDisplay:
    """Query images, each next to its nearest neighbours with their distances.

    It is recommended to use `from_extractor` or `from_neighbors`. All parameters are stored as
    attributes.

    Parameters
    ----------
    queries : list of n PIL images
        The query images.
    neighbors : list of n lists of k PIL images
        The neighbours of each query, the nearest first; None for none.
    distances : ndarray of shape (n, k)
        Their distances.
    indices : ndarray of shape (n, k)
        Their indices.

    Attributes
    ----------
    figure_ : matplotlib Figure
        Figure that contains the display.
    axes_ : ndarray of matplotlib Axes of shape (n, 1 + k)
        Axes of each query, followed by those of its neighbours.

    See Also
    --------
    EmbeddingDisplay : All images on a plane, with similar ones close to each other.

    Examples
    --------
    >>> import matplotlib.pyplot as plt
    >>> from deepfeat import DeepFeatureExtractor
    >>> from deepfeat.datasets import load_image_folder, write_sample_folder
    >>> from deepfeat.plotting import NeighborsDisplay
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as root:
    ...     photos = load_image_folder(write_sample_folder(root))
    ...     display = NeighborsDisplay.from_extractor(
    ...         DeepFeatureExtractor("resnet10_slim"), photos.data, [12, 35, 90])
    >>> display.distances.shape
    (3, 5)
    >>> plt.show()  # doctest: +SKIP
    """

    __module__ = "deepfeat.plotting"  # so that pickles outlive moves

    def __init__(
        self,
        queries: Sequence[Image.Image],
        *,
        neighbors: Sequence[Sequence[Image.Image | None]],
        distances: NDArray[Any],
        indices: NDArray[Any],
    ):
        self.queries = queries
        self.neighbors = neighbors
        self.distances = distances
        self.indices = indices

    @classmethod
    def from_extractor(
        cls,
        extractor: Any,
        images: Any,
        queries: Any,
        *,
        n_neighbors: int = 5,
        metric: str = "cosine",
        ax: Any = None,
    ) -> "NeighborsDisplay":
        """Find and plot the nearest neighbours of queries among images.

        Parameters
        ----------
        extractor : DeepFeatureExtractor or other transformer
            Turns images into rows of features with `transform`; a fitted pipeline of transformers
            does as well.
        images : sequence or array of n images
            As for `DeepFeatureExtractor`, except for flattened rows. The neighbours are among them.
        queries : sequence of int, or sequence or array of images
            Indices of images, each of which is not its own neighbour; or other images, as for
            `images`.
        n_neighbors : int, default=5
            Number of neighbours.
        metric : str, default="cosine"
            As for `sklearn.neighbors.NearestNeighbors`.
        ax : matplotlib Axes or sequence of Axes, default=None
            As for `plot`.

        Returns
        -------
        display : NeighborsDisplay
            The plotted display.

        Raises
        ------
        ValueError
            If there are fewer than `n_neighbors` neighbours, or an index or image is invalid.
        """
        check_count("n_neighbors", n_neighbors)
        rows = extract_rows(extractor, images)
        chosen = _as_indices(queries, len(rows))
        most = len(rows) - (chosen is not None)
        if n_neighbors > most:
            raise ValueError(
                f"n_neighbors must be at most {most}, the number of other images; got "
                f"{n_neighbors}."
            )
        search = NearestNeighbors(metric=metric).fit(rows)
        if chosen is None:
            pictures = open_pictures(queries, side=_SIDE, name="queries")
            distances, indices = search.kneighbors(extract_rows(extractor, queries), n_neighbors)
        else:
            pictures = open_pictures(images, chosen, side=_SIDE)
            found = search.kneighbors(rows[chosen], n_neighbors + 1)
            distances, indices = _leave_out(chosen, *found)
        return cls._open(pictures, images, distances, indices).plot(ax)

    @classmethod
    def from_neighbors(
        cls, queries: Any, images: Any, distances: ArrayLike, indices: ArrayLike, *, ax: Any = None
    ) -> "NeighborsDisplay":
        """Plot neighbours that have been found already, such as by an index of FAISS.

        Parameters
        ----------
        queries : sequence or array of n images
            As for `DeepFeatureExtractor`, except for flattened rows.
        images : sequence or array of images
            The images among which the neighbours were searched; only those found are opened.
        distances : array of shape (n, k)
            Distances of the neighbours, as `NearestNeighbors.kneighbors` returns them.
        indices : int array of shape (n, k)
            Indices of the neighbours; -1 for none, as in FAISS.
        ax : matplotlib Axes or sequence of Axes, default=None
            As for `plot`.

        Returns
        -------
        display : NeighborsDisplay
            The plotted display.

        Raises
        ------
        ValueError
            If the shapes do not match, an index is not one of an image, or an image cannot be read.
        """
        pictures = open_pictures(queries, side=_SIDE, name="queries")
        distances, indices = np.asarray(distances), np.asarray(indices)
        if distances.shape != indices.shape or indices.ndim != 2 or len(indices) != len(pictures):
            raise ValueError(
                f"distances and indices must both have shape ({len(pictures)}, k), with one row "
                f"per query; got {distances.shape} and {indices.shape}."
            )
        if indices.dtype.kind not in "iu" or not ((indices >= -1) & (indices < len(images))).all():
            raise ValueError(
                f"indices must be ints from 0 to {len(images) - 1}, or -1; got {indices.tolist()}."
            )
        return cls._open(pictures, images, distances, indices).plot(ax)

    @classmethod
    def _open(
        cls,
        queries: list[Image.Image],
        images: Any,
        distances: NDArray[Any],
        indices: NDArray[Any],
    ) -> "NeighborsDisplay":
        """Open the neighbours, each once."""
        needed = np.unique(indices[indices >= 0])
        opened = dict(zip(needed, open_pictures(images, needed, side=_SIDE), strict=True))
        neighbors = [[opened.get(index) for index in row] for row in indices]
        return cls(queries, neighbors=neighbors, distances=distances, indices=indices)

    def plot(self, ax: Any = None) -> "NeighborsDisplay":
        """Plot one row of pictures per query.

        Parameters
        ----------
        ax : matplotlib Axes or sequence of Axes, default=None
            A subplot to divide, or n * (1 + k) Axes. If None, a new figure is created.

        Returns
        -------
        self : NeighborsDisplay
            The display itself.
        """
        shape = (len(self.queries), 1 + self.indices.shape[1])
        cells = [np.s_[row, column] for row in range(shape[0]) for column in range(shape[1])]
        self.figure_, axes = find_axes(
            ax, shape, cells, figsize=(1.5 * shape[1], 1.75 * shape[0]), wspace=0.1
        )
        self.axes_: NDArray[Any] = np.array(axes, dtype=object).reshape(shape)
        for row, query, neighbors, distances in zip(
            self.axes_, self.queries, self.neighbors, self.distances, strict=True
        ):
            for axis in row:
                axis.set(xticks=[], yticks=[])
                axis.spines[:].set_visible(False)
            row[0].imshow(query)
            row[0].spines[:].set(visible=True, color=BLUE, linewidth=3)
            for axis, picture, distance in zip(row[1:], neighbors, distances, strict=True):
                if picture is None:
                    continue
                axis.imshow(picture)
                # Rounded, since duplicates are rarely at exactly zero.
                axis.set_title(f"{round(distance, 6):.3g}", fontsize="medium", pad=3)
        self.axes_[0, 0].set_title("query", fontsize="medium", pad=3, color=BLUE)
        return self


def _as_indices(queries: Any, count: int) -> NDArray[np.intp] | None:
    """Return queries as indices, or None if they are images."""
    # Not any sequence: a dataset would open its images to tell that they are no indices.
    if isinstance(queries, (list, tuple, range)):
        is_index = [isinstance(query, numbers.Integral) for query in queries]
        if not all(is_index) or not is_index:
            return None
    elif not (np.ndim(queries) == 1 and getattr(queries, "dtype", None) is not None):
        return None
    indices = np.asarray(queries)
    if indices.dtype.kind in "OUS":  # images in an array or a Series
        return None
    if indices.dtype.kind not in "iu" or not ((indices >= 0) & (indices < count)).all():
        raise ValueError(
            f"queries must be indices from 0 to {count - 1}, or images; got {indices.tolist()}."
        )
    return indices.astype(np.intp)


def _leave_out(
    chosen: NDArray[np.intp], distances: NDArray[Any], indices: NDArray[Any]
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Leave each query out of its neighbours; where duplicates displaced it, the farthest one."""
    keep = indices != chosen[:, None]
    keep[keep.all(axis=1), -1] = False
    shape = (len(chosen), indices.shape[1] - 1)
    return distances[keep].reshape(shape), indices[keep].reshape(shape)
