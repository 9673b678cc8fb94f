"""`SaliencyDisplay`: where in an image a fine-tuned network sees a class."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from sklearn.utils.validation import check_is_fitted

from deepfeat import DeepFeatureExtractor, FineTuneClassifier, list_layers

from .._optional import import_optional
from ._axes import find_pairs
from ._pictures import open_pictures


class SaliencyDisplay:
    """Images, each next to the regions that speak for its class, by Grad-CAM.

    It is recommended to use `from_estimator`. All parameters are stored as attributes.

    Parameters
    ----------
    images : list of n PIL images
        The inputs of the network.
    maps : ndarray of shape (n, H, W)
        How much each region of the layer's maps speaks for the class; not negative.
    titles : list of n str
        The class of each image, with its probability.

    Attributes
    ----------
    figure_ : matplotlib Figure
        Figure that contains the display.
    axes_ : ndarray of matplotlib Axes of shape (n, 2)
        Axes of each image, without and with the map.

    See Also
    --------
    PredictionDisplay : Images with their most probable classes.

    Notes
    -----
    Grad-CAM (Selvaraju et al., 2017, "Grad-CAM: Visual Explanations from Deep Networks via
    Gradient-based Localization") weights the maps of a layer by the mean gradient of the output of
    the class, and keeps what is positive. It is computed by Captum, which the extra `plot`
    installs.

    Examples
    --------
    >>> import matplotlib.pyplot as plt
    >>> from deepfeat import FineTuneClassifier
    >>> from deepfeat.datasets import load_image_folder, write_sample_folder
    >>> from deepfeat.plotting import SaliencyDisplay
    >>> from tempfile import TemporaryDirectory
    >>> classifier = FineTuneClassifier("resnet10_slim", max_epochs=3, random_state=0)
    >>> with TemporaryDirectory() as root:
    ...     photos = load_image_folder(write_sample_folder(root))
    ...     classifier = classifier.fit(photos.data, photos.target_names[photos.target])
    ...     display = SaliencyDisplay.from_estimator(classifier, photos.data[[25, 55, 98, 100]])
    >>> display.maps.shape
    (4, 3, 3)
    >>> plt.show()  # doctest: +SKIP
    """

    __module__ = "deepfeat.plotting"  # so that pickles outlive moves

    def __init__(self, images: Sequence[Image.Image], *, maps: NDArray[Any], titles: Sequence[str]):
        self.images = images
        self.maps = maps
        self.titles = titles

    @classmethod
    def from_estimator(
        cls,
        estimator: FineTuneClassifier,
        images: Any,
        *,
        target: Any = None,
        layer: str | int | None = None,
        ax: Any = None,
        n_cols: int = 2,
    ) -> "SaliencyDisplay":
        """Compute and plot Grad-CAM for images.

        Parameters
        ----------
        estimator : FineTuneClassifier
            A fitted classifier. It is not changed.
        images : sequence or array of n images
            As for the classifier.
        target : class label, default=None
            The class to look for in all images, one of the classifier's `classes_`; by default the
            most probable class of each image.
        layer : str or int, default=None
            A layer that returns maps, one of `list_layers`; by default the last one whose output
            has positions.
        ax : matplotlib Axes or sequence of Axes, default=None
            As for `plot`.
        n_cols : int, default=2
            As for `plot`.

        Returns
        -------
        display : SaliencyDisplay
            The plotted display.

        Raises
        ------
        NotFittedError
            If the classifier is not fitted.
        TypeError
            If it is not a `FineTuneClassifier`.
        ValueError
            If the layer does not return maps (as in a vision transformer), the target is not a
            class, or an image cannot be read.
        """
        if not isinstance(estimator, FineTuneClassifier):
            raise TypeError(
                f"estimator must be a FineTuneClassifier; got {type(estimator).__name__}. Of a "
                "search, pass best_estimator_."
            )
        check_is_fitted(estimator)
        probabilities = estimator.predict_proba(images)
        chosen = _find_targets(estimator.classes_, probabilities, target)
        extractor = estimator.to_extractor()
        pictures = open_pictures(images, image_shape=estimator.image_shape)
        maps = _compute_maps(extractor, pictures, chosen, layer)
        titles = [
            f"{estimator.classes_[k]}  {row[k]:.0%}"
            for k, row in zip(chosen, probabilities, strict=True)
        ]
        return cls(extractor.preview(pictures), maps=maps, titles=titles).plot(ax, n_cols=n_cols)

    def plot(
        self, ax: Any = None, *, n_cols: int = 2, cmap: str = "inferno", alpha: float = 0.5
    ) -> "SaliencyDisplay":
        """Plot each image, without and with its map.

        Each map has its own colour scale, from zero to its largest value.

        Parameters
        ----------
        ax : matplotlib Axes or sequence of Axes, default=None
            A subplot to divide, or 2 * n Axes, those of an image without and with its map in turn.
            If None, a new figure is created.
        n_cols : int, default=2
            Number of images side by side.
        cmap : str, default="inferno"
            Name of a matplotlib colour map.
        alpha : float, default=0.5
            Opacity of the maps, from 0 to 1.

        Returns
        -------
        self : SaliencyDisplay
            The display itself.
        """
        self.axes_: NDArray[Any]
        self.figure_, self.axes_ = find_pairs(
            ax, len(self.images), n_cols, size=(4, 2.3), wspace=0.05
        )
        for (left, right), image, values, title in zip(
            self.axes_, self.images, self.maps, self.titles, strict=True
        ):
            extent = (0, image.width, image.height, 0)
            for axis in (left, right):
                axis.imshow(image, extent=extent)
                axis.set_axis_off()
            right.imshow(
                values,
                extent=extent,
                cmap=cmap,
                alpha=alpha,
                vmin=0,
                vmax=values.max() or 1,
                interpolation="bilinear",
            )
            left.set_title(title, fontsize="medium", loc="left", parse_math=False)
        return self


def _find_targets(
    classes: NDArray[Any], probabilities: NDArray[Any], target: Any
) -> NDArray[np.intp]:
    """Return the index of the class to look for in each image."""
    if target is None:
        return np.asarray(probabilities.argmax(axis=1))
    found = np.flatnonzero([name == target for name in classes.tolist()])
    if np.ndim(target) or len(found) != 1:
        raise ValueError(f"target must be one of {classes.tolist()}; got {target!r}.")
    return np.repeat(found, len(probabilities))


def _compute_maps(
    extractor: DeepFeatureExtractor,
    pictures: Sequence[Image.Image],
    targets: NDArray[np.intp],
    layer: str | int | None,
) -> NDArray[np.float32]:
    """Compute Grad-CAM of each picture, for the network that an extractor has to itself."""
    captum = import_optional("captum.attr", extra="plot")
    network: Any = extractor.backbone
    prepare: Any = extractor.preprocessing
    name, module, shape = _find_layer(network, prepare, layer)
    calls: list[None] = []
    module.register_forward_hook(lambda *_: calls.append(None))
    cam = captum.LayerGradCam(network.eval(), module)
    maps = []
    for picture, target in zip(pictures, targets, strict=True):
        attributed = cam.attribute(
            prepare(picture)[None].requires_grad_(), int(target), relu_attributions=True
        )
        if len(calls) > 1:
            raise ValueError(
                f"layer must be a module that is called once; {name!r} of "
                f"{type(network).__name__} is called {len(calls)} times."
            )
        calls.clear()
        if tuple(attributed.shape[2:]) != shape:
            raise ValueError(
                f"layer must return maps with their channels first; {name!r} of "
                f"{type(network).__name__} does not."
            )
        maps.append(attributed[0, 0].detach().numpy())
    return np.stack(maps)


def _find_layer(
    network: Any, prepare: Any, layer: str | int | None
) -> tuple[str, Any, tuple[int, ...]]:
    """Return a layer's name and module, and the height and width of its maps."""
    table = list_layers(network, preprocessing=prepare)
    if layer is None:
        row = [table[0], *(row for row in table if math.prod(row.output_shape[1:]) > 1)][-1]
    elif isinstance(layer, int):
        row = table[layer]
    else:
        found = [row for row in table if layer in (row.name, *row.aliases)]
        if not found:
            names = ", ".join(row.name for row in table)
            raise ValueError(f"layer must be one of {names}; got {layer!r}.")
        row = found[0]
    if len(row.output_shape) != 3 or row.output_shape[1:] == (1, 1):
        raise ValueError(
            f"layer must return maps (C, H, W) with several positions; {row.name!r} of "
            f"{type(network).__name__} returns {row.output_shape}."
        )
    modules = dict(network.named_modules())
    paths = [name for name in (row.name, *row.aliases) if name in modules]
    if not paths:
        raise ValueError(f"layer must be the output of a module; {row.name!r} is not.")
    return row.name, modules[paths[0]], row.output_shape[1:]
