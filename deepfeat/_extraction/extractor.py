"""`DeepFeatureExtractor` and `list_layers`: features of layers for scikit-learn."""

import contextlib
import functools
import os
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.base import TransformerMixin
from sklearn.preprocessing import normalize
from sklearn.utils import Tags
from torch import Tensor, nn

from .._backbones.find import Backbone, find_backbone
from .._backbones.fingerprint import UnknownContentError
from .._backbones.preprocessing import Resize, as_picture
from .._backbones.state_files import Weights
from .._cache.cache import FeatureCache
from .._engine.batches import Batch
from .._engine.devices import Precision
from .._engine.threads import Workers, attempt
from .._images.records import ImageError, Record
from .._images.tables import find_records, tag_images
from .._layers.index import LayerIndex, LayerTable, ResolvedLayer
from .._layers.pooling import PooledLayer, Pooling, map_shape, pool_layer
from .._parameters import check_device, check_parameters
from .._progress import tqdm
from .._representation import Representation
from .readers import EngineName, check_engine, index_layers
from .rows import MEMORY, ExtractionSpec, read_maps, read_rows

# Under which layers are kept for a search, in addition to the requested one.
_SEARCHED_POOLINGS: tuple[Pooling, ...] = ("avg", "max", "cls")


def list_layers(
    backbone: str | nn.Module,
    *,
    preprocessing: Callable[[Image.Image], Tensor] | None = None,
    image_size: int | None = None,
) -> LayerTable:
    """List the layers of a backbone: names, shapes, sizes and costs. No weights are loaded.

    The layers are whole blocks (a residual block, not its convolutions) in the order of
    computation, and every parameter of the network belongs to one of them. Any module path inside
    a block can be read as well. "stage1", "stage2", ... is the last layer before each
    down-sampling.

    Parameters
    ----------
    backbone : str or torch.nn.Module
        As for `DeepFeatureExtractor`.
    preprocessing : callable, optional
        As for `DeepFeatureExtractor`; needed for a module.
    image_size : int, optional
        Side of the input in pixels; by default that of the default weights.

    Returns
    -------
    LayerTable
        A list of `Layer` entries (`name`, `aliases`, `kind`, `output_shape`, `n_features`,
        `parameters`, `multiply_adds`) that prints as a table; `pandas.DataFrame(table)` turns it
        into a data frame.

    Examples
    --------
    >>> from deepfeat import list_layers
    >>> layers = {layer.name: layer for layer in list_layers("vgg16")}
    >>> layers["relu5_3"].output_shape, layers["relu5_3"].aliases
    ((512, 14, 14), ('features.29', 'stage5'))
    >>> sum(layers[name].parameters for name in ("fc6", "fc7", "fc8"))
    123642856
    """
    return index_layers(
        find_backbone(backbone, preprocessing=preprocessing, image_size=image_size)
    ).table


class DeepFeatureExtractor(TransformerMixin, Representation):
    """Turn images into features of a pretrained convolutional network or vision transformer.

    Nothing is learned from X: `fit` checks the parameters and returns, and `transform` can be
    called without it.

    Parameters
    ----------
    backbone : str or torch.nn.Module, default="resnet50"
        One of `list_backbones()`, or a network of your own, which needs `preprocessing`.
    layer : str, int or list of these, default="penultimate"
        The layer to read, or several, whose columns are concatenated in that order. A name or
        alias of `list_layers(backbone)`, any module path, or an index into that list (-1 is the
        last). "penultimate" is what the classifier of the network takes (`relu7` of VGG16,
        `avgpool` of ResNets), or what the network returns if it does not have a classifier.
        AlexNet and VGG have Caffe's names (`conv5_3`, `relu5_3`, `pool5`, `fc6`, `relu6`); every
        backbone has `stage1`, `stage2`, ... A convolution is read before its ReLU.
    weights : str, path, torchvision weights or None, default="DEFAULT"
        "DEFAULT" or another name of torchvision's weights or tag of timm's, downloaded on first use
        (those of `resnet10_slim` come with deepfeat); the path of a `.pth` or `.safetensors` state
        dict, preprocessed like "DEFAULT"; or None for random weights. "DEFAULT" of a backbone of
        timm is the tag in its name.
    preprocessing : callable, default=None
        Turns an RGB PIL image into a float tensor of shape (C, H, W). By default the
        preprocessing of the weights; required if `backbone` is a module.
    pooling : {"avg", "max", "gem", "cls", "flatten"} or list of these, default="avg"
        How maps (C, H, W) and tokens (N, D) become one row of C or D features: mean, maximum,
        generalised mean (power 3) over the positions, the class token alone, or all values. Of
        several the columns are concatenated, layer by layer. Tokens before those of the patches,
        such as registers, are only part of "flatten". Vectors are not pooled, and given once.
    norm : {"l2", "l1", "max"} or None, default="l2"
        Norm by which each row is divided, separately for each layer and pooling.
    resize : {"weights", "squash", "pad"}, default="weights"
        "weights": the resizing and centre crop of the weights; "squash": the whole image,
        stretched to the input size; "pad": the whole image with its aspect ratio kept, padded with
        the mean colour.
    image_size : int, default=None
        Side of the network's input in pixels; by default that of the weights.
    image_shape : tuple of int, default=None
        (H, W) or (H, W, C) of the images if X is a table of shape (n, H * W * C), with one
        flattened image per row; one entry may be -1.
    batch_size : int, default=32
        Number of images per batch. Halved if memory runs out.
    device : str or torch.device, default="auto"
        "auto" takes CUDA, else MPS, else the CPU.
    precision : {"float32", "bfloat16", "float16"}, default="float32"
        Type in which the network computes (autocast). Features are always float32.
    engine : {"torch", "openvino"}, default="torch"
        What runs the network. "openvino" (extra `openvino`) is faster on most processors of Intel
        and AMD, and converts the network first, which takes some seconds: once in a process, or
        once for all if the environment variable `DEEPFEAT_OPENVINO_DIR` names a folder to keep it
        in. It runs parts of one size, on a CPU up to 8 images of 224 x 224 pixels, and one that is
        not full takes as long as a full one.
    num_workers : int or "auto", default="auto"
        Number of threads that read and prepare images while the network runs; 0 for none. "auto":
        as many as the process has processors, and at most 8 unless the device is CUDA.
    cache : "memory", path, FeatureCache or None, default="memory"
        Where rows are kept, before `norm`, so that an image goes through the network only once
        however often it comes: in this process, up to 1 GiB; in a directory, shared by all
        processes and later runs; in a `FeatureCache` of your own; or nowhere.
    prefetch : "stages", list of layers or None, default="stages"
        Layers that the pass over a new image keeps in addition to those requested. "stages": the
        ends of the last five stages and the last vectors, so that a search over these needs one
        pass; if it requests another layer, the second pass over an image keeps all layers that
        `list_layers` names, provided the cache has room for them. A list: these layers. None: each
        pass ends with the deepest layer requested, and keeps nothing else. These layers and the
        requested ones are kept pooled by "avg", "max" and "cls", too, if the cache has room;
        flattened maps are kept only if requested. Ignored without a cache.
    on_error : {"raise", "warn", "nan"}, default="raise"
        What to do if an image cannot be read: raise an error; or fill its row with NaN, with or
        without a warning, and give the reason in `errors_`.
    random_state : int, default=None
        Seed of the random weights if `weights` is None. None means 0, so that all processes draw
        the same weights.
    verbose : int, default=0
        1 shows a progress bar.

    Attributes
    ----------
    errors_ : dict of int to str
        Index in X of each image that could not be read, and the reason, from the last completed
        call of `transform` or `precompute`. If threads share an extractor, each call replaces it
        with its own errors.
    n_features_in_ : int
        Number of columns of X, if X was a table.
    feature_names_in_ : ndarray of str
        Names of the columns of X, if X was a table with names.

    See Also
    --------
    list_backbones : Names of backbones.
    list_layers : Names and shapes of a backbone's layers.

    Notes
    -----
    X may be a list or an array of paths, PIL images, encoded bytes, binary files, arrays or tensors
    of any size; a Series or one-column DataFrame of these; a dataset that has a length and gives
    images by index; one array or tensor of shape (n, H, W), (n, H, W, C) or (n, C, H, W); or, with
    `image_shape`, a table. Integers are read on a scale from 0 to the maximum of their type and
    floats from 0 to 1, whatever their values. A grey image becomes three equal channels, and
    transparent pixels are blended with white.

    References
    ----------
    Donahue et al. (2014), "DeCAF: A Deep Convolutional Activation Feature for Generic Visual
    Recognition"; Sharif Razavian et al. (2014), "CNN Features off-the-shelf: an Astounding
    Baseline for Recognition".

    Examples
    --------
    >>> from deepfeat import DeepFeatureExtractor
    >>> from sklearn.datasets import load_digits
    >>> images = load_digits().images[:4] / 16
    >>> extractor = DeepFeatureExtractor("resnet10_slim", "layer3")
    >>> extractor.fit_transform(images).shape
    (4, 128)
    >>> extractor.get_feature_names_out()[17]
    'layer3_0017'
    """

    __module__ = "deepfeat"  # so that pickles outlive moves

    def __init__(
        self,
        backbone: str | nn.Module = "resnet50",
        layer: str | int | list[str | int] = "penultimate",
        *,
        weights: Weights = "DEFAULT",
        preprocessing: Callable[[Image.Image], Tensor] | None = None,
        pooling: Pooling | list[Pooling] = "avg",
        norm: Literal["l2", "l1", "max"] | None = "l2",
        resize: Resize = "weights",
        image_size: int | None = None,
        image_shape: tuple[int, ...] | None = None,
        batch_size: int = 32,
        device: str | torch.device = "auto",
        precision: Precision = "float32",
        engine: EngineName = "torch",
        num_workers: Workers = "auto",
        cache: str | os.PathLike[str] | FeatureCache | None = "memory",
        prefetch: list[str | int] | str | None = "stages",
        on_error: Literal["raise", "warn", "nan"] = "raise",
        random_state: int | None = None,
        verbose: int = 0,
    ):
        self.backbone = backbone
        self.layer = layer
        self.weights = weights
        self.preprocessing = preprocessing
        self.pooling = pooling
        self.norm = norm
        self.resize = resize
        self.image_size = image_size
        self.image_shape = image_shape
        self.batch_size = batch_size
        self.device = device
        self.precision = precision
        self.engine = engine
        self.num_workers = num_workers
        self.cache = cache
        self.prefetch = prefetch
        self.on_error = on_error
        self.random_state = random_state
        self.verbose = verbose

    def fit(self, X: Any, y: Any = None) -> "DeepFeatureExtractor":
        """Check the parameters and the kind of X; nothing is learned.

        No weights are loaded, and no image is read.

        Parameters
        ----------
        X : sequence or array of n images
            See the notes of the class.
        y : object, optional
            Ignored.

        Returns
        -------
        self : DeepFeatureExtractor
            The extractor itself.

        Raises
        ------
        ValueError
            If a parameter is invalid, or X is empty, a single image, or of a shape that is not
            that of images or is ambiguous.
        LayerNotFoundError
            If the backbone does not have the layer.
        ModuleNotFoundError
            If the backbone is one of timm, or the engine is OpenVINO, and that is not installed.
        """
        index = index_layers(self._find_backbone())
        self._find_sections(index)
        list(self._find_prefetched(index))
        self._find_records(X, reset=True)
        self.errors_: dict[int, str] = {}
        return self

    def transform(self, X: Any) -> NDArray[np.float32]:
        """Extract the features of images.

        Parameters
        ----------
        X : sequence or array of n images
            See the notes of the class.

        Returns
        -------
        features : ndarray of shape (n, d), float32
            Row i belongs to image i; d is the total number of features of the layers after
            pooling.

        Raises
        ------
        ValueError
            If an image cannot be read and `on_error` is "raise"; else as `fit`.
        OSError
            If the weights cannot be downloaded.
        """
        backbone = self._find_backbone()
        index = index_layers(backbone)
        sections = self._find_sections(index)
        records = self._find_records(X, reset=False)
        features = np.full((len(records), sections[-1].columns.stop), np.nan, dtype=np.float32)
        errors: dict[int, str] = {}
        spec = self._plan(backbone, index, [section.pooled for section in sections])
        for batch in self._read(spec, records):
            errors |= self._find_reasons(batch.failures)
            indices = [record.index for record in batch.samples]
            for section in sections:
                if indices:
                    rows = self._scale(batch.rows[section.pooled.key])
                    features[indices, section.columns] = rows
            rows = features[indices]
            errors |= self._find_reasons(self._blank_non_finite(batch.samples, rows))
            features[indices] = rows
        self._set_errors(errors, records, stacklevel=4)  # past scikit-learn's wrapper
        return features

    def transform_maps(
        self, X: Any, *, out: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        """Extract the maps of a layer: its output at each position, neither pooled nor normalised.

        The tokens of patches are laid out on their grid, without those before them. Nothing is
        cached.

        Parameters
        ----------
        X : sequence or array of n images
            See the notes of the class.
        out : ndarray of shape (n, C, H, W), float32, optional
            An array to fill, such as a `numpy.memmap` for maps that do not fit into memory.

        Returns
        -------
        maps : ndarray of shape (n, C, H, W), float32
            Map i belongs to image i; `out` if it was given.

        Raises
        ------
        ValueError
            If `layer` names several or does not return maps or the tokens of patches, or if `out`
            is not a writeable array of that shape and type; otherwise as `transform`.
        OSError
            If the weights cannot be downloaded.

        Examples
        --------
        >>> from deepfeat import DeepFeatureExtractor
        >>> from sklearn.datasets import load_sample_images
        >>> photographs = load_sample_images().images
        >>> DeepFeatureExtractor("resnet10_slim", "layer3").transform_maps(photographs).shape
        (2, 128, 6, 6)
        """
        backbone = self._find_backbone()
        names = _as_list(self.layer)
        if len(names) != 1:
            raise ValueError(f"transform_maps reads one layer; got layer={self.layer!r}.")
        index = index_layers(backbone)
        layer = index.resolve(names[0])
        spec = self._plan(backbone, index, [])
        records = self._find_records(X, reset=False)
        shape = (len(records), *map_shape(layer))
        if out is None:
            out = np.empty(shape, dtype=np.float32)
        elif not isinstance(out, np.ndarray) or out.shape != shape or out.dtype != np.float32:
            got = f"{out.dtype} {out.shape}" if isinstance(out, np.ndarray) else type(out).__name__
            raise ValueError(f"out must be a float32 array of shape {shape}; got {got}.")
        elif not out.flags.writeable:
            raise ValueError("out must be writeable; got a read-only array.")
        errors: dict[int, str] = {}
        for batch in self._show_progress(backbone, records, read_maps(spec, layer, records)):
            errors |= self._find_reasons(batch.failures)
            out[[record.index for record, _ in batch.failures]] = np.nan
            if batch.samples:
                maps = batch.rows["maps"]
                errors |= self._find_reasons(self._blank_non_finite(batch.samples, maps))
                out[[record.index for record in batch.samples]] = maps
        self._set_errors(errors, records, stacklevel=3)
        return out

    def preview(self, X: Any) -> list[Image.Image]:
        """Show images as the network sees them: resized and cropped, not yet normalized.

        Parameters
        ----------
        X : sequence or array of n images
            See the notes of the class.

        Returns
        -------
        pictures : list of n PIL images
            At the network's input size. What your own `preprocessing` gives is stretched to the
            full range of brightness, and unless it has three channels, only the first is shown.

        Raises
        ------
        ValueError
            If an image cannot be read, regardless of `on_error`.

        Examples
        --------
        >>> from deepfeat import DeepFeatureExtractor
        >>> from sklearn.datasets import load_sample_images
        >>> photographs = load_sample_images().images
        >>> photographs[0].shape
        (427, 640, 3)
        >>> DeepFeatureExtractor("vgg16").preview(photographs)[0].size
        (224, 224)
        """
        prepare = self._find_backbone().preprocessing.prepare
        records = self._find_records(X, reset=False)
        pictures = []
        for record in records:
            prepared = attempt(lambda record: prepare(record.open()), record)
            if isinstance(prepared, Exception):
                raise record.error(prepared)
            pictures.append(as_picture(prepared))
        return pictures

    def precompute(
        self,
        X: Any,
        layers: str | int | list[str | int] | None = None,
        *,
        shard: tuple[int, int] = (0, 1),
    ) -> "DeepFeatureExtractor":
        """Fill the cache ahead of time, on several machines or GPUs at once if needed.

        Rows that are already there are not computed again, so an interrupted run can be resumed.

        Parameters
        ----------
        X : sequence or array of n images
            See the notes of the class.
        layers : str, int or list of these, optional
            Layers to keep. By default `layer` and the layers that `prefetch` adds.
        shard : tuple of int, default=(0, 1)
            (i, n) takes every n-th image, starting with the i-th.

        Returns
        -------
        self : DeepFeatureExtractor
            `errors_` tells which images could not be read.

        Raises
        ------
        ValueError
            If there is no cache, the shard is invalid, or what computes the rows cannot be
            digested; otherwise as `transform`.
        OSError
            If the disk of the cache is full or not writable. The message says how many images are
            done; calling again with the same images resumes there.
        """
        if self.cache is None:
            raise ValueError("precompute fills the cache, but cache is None: set cache=.")
        if not (isinstance(shard, (list, tuple)) and len(shard) == 2 and 0 <= shard[0] < shard[1]):
            raise ValueError(f"shard must be (i, n) with 0 <= i < n; got {shard!r}.")
        backbone = self._find_backbone()
        index = index_layers(backbone)
        self._check_kept(backbone)
        names = _as_list(self.layer if layers is None else layers)
        if not names:
            raise ValueError("layer must name at least one layer; got an empty list.")
        pooled = [pooled for name in names for pooled in self._pool(index.resolve(name))]
        spec = self._plan(backbone, index, pooled)
        if layers is None:
            spec = replace(spec, layers=spec.layers + spec.prefetched)
        records = self._find_records(X, reset=False)[shard[0] :: shard[1]]
        errors = self._keep(self._read(spec, records), len(records))
        self._set_errors(errors, records, stacklevel=3)
        return self

    def get_feature_names_out(self, input_features: Any = None) -> NDArray[np.object_]:
        """Return the names of the features: layer and number, such as "penultimate_0017".

        With several poolings: layer, pooling and number, such as "norm_cls_0017".

        Parameters
        ----------
        input_features : array of str, optional
            Checked against the columns that `fit` saw; has no other effect.

        Returns
        -------
        names : ndarray of shape (d,), object
            One name per column of `transform`.
        """
        self._check_input_features(input_features)
        names = []
        for pooled, _ in self._find_sections(index_layers(self._find_backbone())):
            count = pooled.n_features
            width = max(4, len(str(count - 1)))
            name = pooled.layer.name
            if len(list(self._pool(pooled.layer))) > 1:
                name = f"{name}_{pooled.pooling}"
            names += [f"{name}_{number:0{width}d}" for number in range(count)]
        return np.asarray(names, dtype=object)

    def __sklearn_is_fitted__(self) -> bool:
        return True  # there is nothing to learn

    def __sklearn_tags__(self) -> Tags:
        tags = tag_images(super().__sklearn_tags__(), self.image_shape)
        tags.requires_fit = False
        tags.transformer_tags.preserves_dtype = ["float32"]
        return tags

    def _find_backbone(self) -> Backbone:
        self._check_parameters()
        return find_backbone(
            self.backbone,
            self.weights,
            preprocessing=self.preprocessing,
            resize=self.resize,
            image_size=self.image_size,
            seed=self.random_state or 0,
        )

    def _find_sections(self, index: LayerIndex) -> list["_Section"]:
        """Resolve the layers, and give each pooling of each its columns."""
        layers: list[ResolvedLayer] = []
        sections: list[_Section] = []
        start = 0
        names = _as_list(self.layer)
        if not names:
            raise ValueError("layer must name at least one layer; got an empty list.")
        for layer in map(index.resolve, names):
            for other in layers:
                if (other.source, other.rectified) == (layer.source, layer.rectified):
                    raise ValueError(
                        f"layer has {other.name!r} and {layer.name!r}, which are the same layer: "
                        "give one of them."
                    )
            layers.append(layer)
            for pooled in self._pool(layer):
                stop = start + pooled.n_features
                sections.append(_Section(pooled, slice(start, stop)))
                start = stop
        return sections

    def _pool(self, layer: ResolvedLayer) -> Iterator[PooledLayer]:
        """Yield the poolings of a layer: of a vector one."""
        pooled = [pool_layer(layer, pooling) for pooling in _as_list(self.pooling)]
        yield from dict.fromkeys(pooled)

    def _find_records(self, X: Any, *, reset: bool) -> list[Record]:
        finite = self.on_error == "raise"
        return find_records(self, X, self.image_shape, reset=reset, ensure_all_finite=finite)

    def _plan(
        self, backbone: Backbone, index: LayerIndex, layers: list[PooledLayer]
    ) -> ExtractionSpec:
        poolings = _as_list(self.pooling)
        requested = [pooled.layer for pooled in layers]
        prefetched = list(self._find_prefetched(index))
        kept = [*requested, *prefetched] if self.prefetch is not None else []
        # If `prefetch` names layers, a search requests no others.
        listed = [index.resolve(layer.name) for layer in index.table]
        searched = listed if self.prefetch == "stages" else []
        return ExtractionSpec(
            backbone,
            tuple(layers),
            prefetched=tuple(_pool_small(prefetched, poolings)),
            repooled=tuple(_pool_small(kept, _SEARCHED_POOLINGS)),
            searched=tuple(_pool_small(searched, [*poolings, *_SEARCHED_POOLINGS])),
            engine=self.engine,
            device=self.device,
            precision=self.precision,
            batch_size=self.batch_size,
            num_workers=self.num_workers,
            verbose=self.verbose,
        )

    def _find_prefetched(self, index: LayerIndex) -> Iterable[ResolvedLayer]:
        if self.prefetch is None:
            return ()
        given = isinstance(self.prefetch, (list, tuple))
        return map(index.resolve, self.prefetch) if given else index.stages()

    def _read(self, spec: ExtractionSpec, records: list[Record]) -> Generator[Batch[Record]]:
        """Read the rows of records, with a progress bar."""
        yield from self._show_progress(
            spec.backbone, records, read_rows(spec, records, self._find_cache())
        )

    def _show_progress(
        self, backbone: Backbone, records: list[Record], batches: Iterable[Batch[Record]]
    ) -> Generator[Batch[Record]]:
        with tqdm(
            total=len(records), desc=backbone.name, unit="image", disable=not self.verbose
        ) as bar:
            for batch in batches:
                yield batch
                bar.update(len(batch.samples) + len(batch.failures))

    def _keep(self, batches: Generator[Batch[Record]], total: int) -> dict[int, str]:
        """Let the cache fill; return the reason for each image that has no row.

        Raises
        ------
        OSError
            As soon as the cache fails to keep a row.
        """
        cache = self._find_cache()
        assert cache is not None
        cache.retry()
        kept = 0
        errors: dict[int, str] = {}
        with contextlib.closing(batches):
            for batch in batches if cache.write_error is None else ():
                if cache.write_error is not None:
                    break
                errors |= self._find_reasons(batch.failures)
                kept += len(batch.samples)
        if cache.write_error is not None:
            raise OSError(
                f"{cache.write_error}. The rows of {kept} of {total} images have been kept. Free "
                "some space or choose another directory, and call precompute again: it resumes."
            )
        return errors

    def _find_cache(self) -> FeatureCache | None:
        if self.cache is None or isinstance(self.cache, FeatureCache):
            return self.cache
        if self.cache == "memory":
            return MEMORY
        return _cache_at(os.path.realpath(os.path.expanduser(self.cache)))

    def _check_kept(self, backbone: Backbone) -> None:
        """Raise if rows that are computed ahead of time would be lost."""
        try:
            backbone.fingerprint()
        except UnknownContentError as error:
            raise ValueError(
                f"The rows of {backbone.name} cannot be cached, so there is nothing to precompute: "
                f"{error}."
            ) from error

    def _find_reasons(self, failures: Iterable[tuple[Record, Exception]]) -> dict[int, str]:
        """Return the reasons by index in X, as `errors_` has them, or raise the first error."""
        reasons = {}
        for record, error in failures:
            named = record.error(error)
            if self.on_error == "raise":
                raise named
            reasons[record.index] = named.reason
        return reasons

    def _set_errors(self, errors: dict[int, str], records: list[Record], stacklevel: int) -> None:
        self.errors_ = dict(sorted(errors.items()))
        if errors and self.on_error == "warn":
            first = next(record for record in records if record.index in errors)
            warnings.warn(
                f"{len(errors)} of {len(records)} images could not be read: their rows are NaN, "
                f"and errors_ has the reasons. The first: {first}: {errors[first.index]}",
                UserWarning,
                stacklevel=stacklevel,
            )

    def _scale(self, rows: NDArray[np.float32]) -> NDArray[np.float32]:
        finite = np.isfinite(rows).all(axis=1)
        if self.norm is not None and finite.any():
            # In float64, in which the squares of float32 neither vanish nor overflow.
            rows[finite] = normalize(rows[finite].astype(np.float64), norm=self.norm, copy=False)
        return rows

    def _blank_non_finite(
        self, records: list[Record], values: NDArray[np.float32]
    ) -> list[tuple[Record, Exception]]:
        """Blank the values of images for which the network gave NaN or infinity, in place.

        Return these images as failures.
        """
        failures: list[tuple[Record, Exception]] = []
        finite = np.isfinite(values).all(axis=tuple(range(1, values.ndim)))
        for number in np.flatnonzero(~finite):
            hint = "; float16 ends at 65,504: try bfloat16" * (self.precision == "float16")
            reason = f"the network gave NaN or infinity at layer {self.layer!r}{hint}"
            values[number] = np.nan
            failures.append((records[number], ImageError(str(records[number]), reason)))
        return failures

    def _check_parameters(self) -> None:
        check_parameters(DeepFeatureExtractor, self.get_params(deep=False))
        check_device(self.device)
        check_engine(self.engine, self.device, self.precision)
        self._check_pooling()
        if not (self.prefetch in ("stages", None) or isinstance(self.prefetch, (list, tuple))):
            raise ValueError(
                f"prefetch must be 'stages', a list of layers or None; got {self.prefetch!r}."
            )
        is_location = isinstance(self.cache, (str, os.PathLike, FeatureCache)) and self.cache != ""
        if not (self.cache is None or is_location):
            raise ValueError(
                f"cache must be 'memory', a directory, a FeatureCache or None; got {self.cache!r}."
            )

    def _check_pooling(self) -> None:
        poolings = self.pooling if isinstance(self.pooling, (list, tuple)) else [self.pooling]
        allowed = get_args(Pooling)
        if not poolings or not all(isinstance(name, str) and name in allowed for name in poolings):
            raise ValueError(
                f"pooling must be {', '.join(map(repr, allowed))} or a list of these; got "
                f"{self.pooling!r}."
            )
        if len(set(poolings)) < len(poolings):
            raise ValueError(f"pooling must not name one twice; got {self.pooling!r}.")

    def _check_input_features(self, input_features: Any) -> None:
        if input_features is None:
            return
        seen = getattr(self, "feature_names_in_", None)
        if seen is not None and list(seen) != list(input_features):
            raise ValueError("input_features is not equal to feature_names_in_")
        count = getattr(self, "n_features_in_", None)
        if count is not None and count != len(input_features):
            raise ValueError(
                "input_features should have length equal to number of features "
                f"({count}), got {len(input_features)}"
            )


def _pool_small(
    layers: Iterable[ResolvedLayer], poolings: Sequence[Pooling]
) -> Iterator[PooledLayer]:
    """Yield the poolings that layers allow, but no flattened maps."""
    for layer in layers:
        for pooling in poolings:
            if pooling == "flatten" and len(layer.output_shape) > 1:
                continue
            try:
                pooled = pool_layer(layer, pooling)
            except ValueError:
                continue
            yield pooled


class _Section(NamedTuple):
    """The columns of one pooling of one layer."""

    pooled: PooledLayer
    columns: slice


def _as_list(given: Any) -> list[Any]:
    return list(given) if isinstance(given, (list, tuple)) else [given]


@functools.lru_cache(maxsize=16)
def _cache_at(path: str) -> FeatureCache:
    return FeatureCache(path)


# Here doctest finds the examples of a class that says it is in another module.
__test__ = {"DeepFeatureExtractor": DeepFeatureExtractor}
