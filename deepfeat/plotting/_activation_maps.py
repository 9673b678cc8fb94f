"""`ActivationMapDisplay`: the channels of a layer for one image."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from deepfeat import DeepFeatureExtractor, list_layers

from ._axes import find_axes
from ._checks import check_extractor


class ActivationMapDisplay:
    """Activation maps of a layer for one image, next to the image as the network sees it.

    It is recommended to use `from_extractor`. All parameters are stored as attributes.

    Parameters
    ----------
    maps : ndarray of shape (n, H, W)
        One map per channel.
    image : PIL image
        The input of the network.
    layer : str
        Name of the layer.
    channels : sequence of int
        Index of the channel of each map.

    Attributes
    ----------
    figure_ : matplotlib Figure
        Figure that contains the display.
    axes_ : ndarray of matplotlib Axes of shape (1 + n,)
        Axes of the input, followed by those of the maps.

    See Also
    --------
    deepfeat.list_layers : Names and output shapes of the layers.

    Examples
    --------
    >>> import matplotlib.pyplot as plt
    >>> from deepfeat import DeepFeatureExtractor
    >>> from deepfeat.plotting import ActivationMapDisplay
    >>> from sklearn.datasets import load_sample_image
    >>> extractor = DeepFeatureExtractor("resnet10_slim", "layer1", image_size=224)
    >>> display = ActivationMapDisplay.from_extractor(
    ...     extractor, load_sample_image("china.jpg"), channels=9)
    >>> display.maps.shape
    (9, 56, 56)
    >>> plt.show()  # doctest: +SKIP
    """

    __module__ = "deepfeat.plotting"  # so that pickles outlive moves

    def __init__(
        self,
        maps: NDArray[np.float32],
        *,
        image: Image.Image,
        layer: str,
        channels: Sequence[int],
    ):
        self.maps = maps
        self.image = image
        self.layer = layer
        self.channels = channels

    @classmethod
    def from_extractor(
        cls,
        extractor: DeepFeatureExtractor,
        image: Any,
        *,
        layer: str | int | None = None,
        channels: int | Sequence[int] = 16,
        ax: Any = None,
        cmap: str = "viridis",
        im_kw: dict[str, Any] | None = None,
    ) -> "ActivationMapDisplay":
        """Run an image through the network and plot the maps of a layer.

        Parameters
        ----------
        extractor : DeepFeatureExtractor
            Network, weights and preprocessing. Its `pooling`, `norm` and `cache` are ignored.
        image : path, PIL image, array, tensor or bytes
            A single image.
        layer : str or int, default=None
            The layer, one of `list_layers`; by default that of the extractor.
        channels : int or sequence of int, default=16
            Number of channels to show, starting with the first, or their indices.
        ax : matplotlib Axes or sequence of Axes, default=None
            As for `plot`.
        cmap : str, default="viridis"
            As for `plot`.
        im_kw : dict, default=None
            As for `plot`.

        Returns
        -------
        display : ActivationMapDisplay
            The plotted display.

        Raises
        ------
        ValueError
            If the layer does not return maps, does not have these channels, or is a list of layers.
        LayerNotFoundError
            If the network does not have the layer.
        """
        check_extractor(extractor)
        given = extractor.layer if layer is None else layer
        name, maps = _read_maps(extractor, image, given)
        shown = _choose_channels(channels, len(maps), name)
        display = cls(maps[shown], image=extractor.preview([image])[0], layer=name, channels=shown)
        return display.plot(ax, cmap=cmap, im_kw=im_kw)

    def plot(
        self, ax: Any = None, *, cmap: str = "viridis", im_kw: dict[str, Any] | None = None
    ) -> "ActivationMapDisplay":
        """Plot the input and the maps.

        Each map has its own colour scale, from its smallest to its largest value.

        Parameters
        ----------
        ax : matplotlib Axes or sequence of Axes, default=None
            A subplot to divide, or 1 + n Axes. If None, a new figure is created.
        cmap : str, default="viridis"
            Name of a matplotlib colour map.
        im_kw : dict, default=None
            Keyword arguments passed to `imshow` for the maps; `vmin` and `vmax` give all of them
            the same scale.

        Returns
        -------
        self : ActivationMapDisplay
            The display itself.
        """
        count = len(self.maps)
        columns = math.ceil(math.sqrt(count))
        rows = math.ceil(count / columns)
        # The input is a square as high as all maps, and takes `rows` columns to their left.
        cells = [np.s_[index // columns, rows + index % columns] for index in range(count)]
        side = max(2.5 / rows, min(1.2, 6 / rows))
        self.figure_, axes = find_axes(
            ax,
            (rows, rows + columns),
            [np.s_[:, :rows], *cells],
            figsize=(side * (rows + columns), side * rows + 0.4),
        )
        self.axes_: NDArray[Any] = np.array(axes, dtype=object)
        axes[0].imshow(self.image, cmap="gray")
        title = f"input, and {count} channel{'s' * (count > 1)}\nof {self.layer}"
        axes[0].set_title(title, fontsize="medium")
        for axis, channel, values in zip(axes[1:], self.channels, self.maps, strict=True):
            axis.imshow(values, **{"cmap": cmap} | (im_kw or {}))
            axis.set_title(f"{channel}", fontsize="x-small", pad=2)
        for axis in axes:
            axis.set_axis_off()
        return self


def _read_maps(
    extractor: DeepFeatureExtractor, image: Any, layer: Any
) -> tuple[str, NDArray[np.float32]]:
    """Return the name of a layer and its maps (C, H, W)."""
    if isinstance(layer, (list, tuple)):
        raise ValueError(f"layer must be a single layer; got {layer!r}.")
    # A new extractor instead of a clone, which would copy a user's network.
    params = extractor.get_params(deep=False) | {"layer": layer, "on_error": "raise"}
    (maps,) = type(extractor)(**params).transform_maps([image])
    if isinstance(layer, str):
        return layer, maps
    listed = list_layers(
        extractor.backbone,
        preprocessing=extractor.preprocessing,
        image_size=extractor.image_size,
    )
    return listed[layer].name, maps


def _choose_channels(channels: int | Sequence[int], count: int, layer: str) -> list[int]:
    if not isinstance(channels, Sequence | np.ndarray):
        if channels < 1:
            raise ValueError(f"channels must be at least 1; got {channels!r}.")
        return list(range(min(channels, count)))
    chosen = [int(channel) for channel in channels]
    wrong = [channel for channel in chosen if not 0 <= channel < count]
    if wrong or not chosen:
        raise ValueError(
            f"channels must be indices from 0 to {count - 1}, since layer {layer!r} has {count} "
            f"channels; got {channels!r}."
        )
    return chosen
