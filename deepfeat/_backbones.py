"""Knows how a name or a module becomes a backbone: its network, weights and preprocessing."""

import copy
import difflib
import functools
import os
import pickle
import re
import threading
import urllib.error
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torchvision import models
from torchvision.models import WeightsEnum
from torchvision.transforms import functional as F
from torchvision.transforms._presets import ImageClassification

from ._optional import import_optional

Resize: TypeAlias = Literal["weights", "squash", "pad"]
Weights: TypeAlias = str | os.PathLike[str] | WeightsEnum | None
State: TypeAlias = dict[str, Tensor]

_FILE_SUFFIXES = (".pth", ".pt", ".tar", ".safetensors")
_SIZED = ("vit", "maxvit")  # built for one input size
_loading = threading.Lock()


@dataclass(frozen=True)
class Preprocessing:
    """What is done to an image before it enters a network.

    `prepare` turns an RGB image into a tensor, image by image, in a worker thread; `normalize`
    finishes a batch of them, on the device, as float32 of shape (n, C, H, W).
    """

    prepare: Callable[[Image.Image], Tensor]
    normalize: Callable[[Tensor], Tensor]
    input_shape: tuple[int, ...]  # (C, H, W)


@dataclass(frozen=True)
class Backbone:
    """A network that need not be loaded yet, and its preprocessing.

    `skeleton` has the network's structure, without its weights; `load` gives the network itself
    in eval mode on a device. Where both are `shared` by the process they must not be changed.
    """

    name: str
    skeleton: nn.Module
    preprocessing: Preprocessing
    load: Callable[[torch.device], nn.Module]
    shared: bool


def list_backbones() -> list[str]:
    """List the names of all backbones: the classification models of torchvision.

    Returns
    -------
    list of str
        Names that `DeepFeatureExtractor` and `list_layers` take as `backbone`.

    Examples
    --------
    >>> from deepfeat import list_backbones
    >>> [name for name in list_backbones() if name.startswith("vgg16")]
    ['vgg16', 'vgg16_bn']
    """
    names: list[str] = models.list_models(module=models)
    return names


def find_backbone(
    backbone: str | nn.Module,
    weights: Weights = "DEFAULT",
    *,
    preprocessing: Callable[[Image.Image], Tensor] | None = None,
    resize: Resize = "weights",
    image_size: int | None = None,
    seed: int = 0,
) -> Backbone:
    """Find a backbone by name, or take a module as one, without loading any weights.

    Raises
    ------
    ValueError
        If there is no backbone or no weights of that name, or the choices exclude each other.
    FileNotFoundError
        If `weights` is the path of a file that is not there.
    """
    if preprocessing is not None and (resize != "weights" or image_size is not None):
        raise ValueError(
            "preprocessing= replaces the weights' own: resize= and image_size= do not apply."
        )
    if isinstance(backbone, nn.Module):
        return _from_module(backbone, weights, preprocessing)
    if not isinstance(backbone, str):
        raise TypeError(
            f"backbone is a {type(backbone).__name__}; a name or a torch.nn.Module is expected."
        )
    _check_name(backbone)
    entry = _find_weights(backbone, weights)
    if preprocessing is None:
        source = entry if isinstance(entry, WeightsEnum) else _known_weights(backbone)["DEFAULT"]
        steps = _from_preset(source.transforms(), resize, image_size)
    else:
        steps = _from_callable(preprocessing)
    size = steps.input_shape[-1]
    load = functools.partial(_load_shared, backbone, _weights_key(entry), seed, size)
    return Backbone(backbone, _skeleton(backbone, size), steps, load, True)


# Modules of the user ----------------------------------------------------------------------------


def _from_module(
    module: nn.Module, weights: Weights, preprocessing: Callable[[Image.Image], Tensor] | None
) -> Backbone:
    if weights != "DEFAULT":
        raise ValueError("weights= does not apply to a module, which brings its own.")
    if preprocessing is None:
        raise ValueError(
            "a module needs preprocessing=, from an RGB PIL image to the tensor that it takes: for "
            "instance torchvision.models.ResNet50_Weights.DEFAULT.transforms()."
        )

    def load(device: torch.device) -> nn.Module:
        # A copy: the user's module keeps its mode, its device and its hooks.
        return _for_reading(copy.deepcopy(module), device)

    return Backbone(type(module).__name__, module, _from_callable(preprocessing), load, False)


def _from_callable(prepare: Callable[[Image.Image], Tensor]) -> Preprocessing:
    sample = prepare(Image.new("RGB", (256, 256), "grey"))
    if not isinstance(sample, Tensor) or sample.ndim != 3 or not sample.is_floating_point():
        raise ValueError(
            "preprocessing must turn an RGB PIL image into a float tensor of shape (C, H, W); "
            f"it gave {_shape_words(sample)}."
        )
    return Preprocessing(prepare, _as_float32, tuple(sample.shape))


def _as_float32(batch: Tensor) -> Tensor:
    return batch.to(torch.float32, memory_format=torch.channels_last)


def _shape_words(sample: Any) -> str:
    if isinstance(sample, Tensor):
        return f"a tensor of {sample.dtype} and shape {tuple(sample.shape)}"
    return f"a {type(sample).__name__}"


# Preprocessing ----------------------------------------------------------------------------------


def _from_preset(
    preset: ImageClassification, resize: Resize, image_size: int | None
) -> Preprocessing:
    """Split the weights' own preprocessing into a part an image and a part a batch."""
    (crop_size,), (resize_size,) = set(preset.crop_size), set(preset.resize_size)
    size = image_size or crop_size
    fits: dict[Resize, Callable[..., Image.Image]] = {
        "weights": functools.partial(
            _resize_and_crop, short_side=round(resize_size * size / crop_size)
        ),
        "squash": _squash,
        "pad": functools.partial(_pad, fill=tuple(round(255 * mean) for mean in preset.mean)),
    }
    how = {"interpolation": preset.interpolation, "antialias": preset.antialias}
    prepare = functools.partial(_prepare, fit=functools.partial(fits[resize], size=size, **how))
    normalize = functools.partial(_normalize, mean=preset.mean, std=preset.std)
    return Preprocessing(prepare, normalize, (3, size, size))


def _prepare(image: Image.Image, fit: Callable[[Image.Image], Image.Image]) -> Tensor:
    """Fit an image to the input size, as 8-bit (H, W, C): a quarter of the bytes of floats."""
    return torch.from_numpy(np.array(fit(image)))


def _normalize(batch: Tensor, mean: list[float], std: list[float]) -> Tensor:
    """Turn 8-bit (n, H, W, C) into normalised float32 (n, C, H, W), channels last in memory."""
    floats = F.convert_image_dtype(batch.permute(0, 3, 1, 2), torch.float32)
    normalized: Tensor = F.normalize(floats, mean, std, inplace=True)
    return normalized


def _resize_and_crop(image: Image.Image, size: int, short_side: int, **how: Any) -> Image.Image:
    cropped: Image.Image = F.center_crop(F.resize(image, [short_side], **how), [size, size])
    return cropped


def _squash(image: Image.Image, size: int, **how: Any) -> Image.Image:
    squashed: Image.Image = F.resize(image, [size, size], **how)
    return squashed


def _pad(image: Image.Image, size: int, fill: tuple[int, ...], **how: Any) -> Image.Image:
    """Fit the whole image in, and pad with the mean colour, which is zero once normalised."""
    scale = size / max(image.size)
    width, height = (max(1, round(side * scale)) for side in image.size)
    canvas = Image.new("RGB", (size, size), fill)
    canvas.paste(
        F.resize(image, [height, width], **how), ((size - width) // 2, (size - height) // 2)
    )
    return canvas


# Weights ----------------------------------------------------------------------------------------


def _check_name(name: str) -> None:
    if name not in list_backbones():
        close = ", ".join(map(repr, difflib.get_close_matches(name, list_backbones())))
        raise ValueError(
            f"there is no backbone {name!r}. "
            + (f"Close matches: {close}." if close else "list_backbones() lists them.")
        )


def _find_weights(name: str, weights: Weights) -> WeightsEnum | Path | None:
    if weights is None:
        return None
    known = _known_weights(name)
    if isinstance(weights, WeightsEnum):
        if weights not in known.__members__.values():
            raise ValueError(f"{weights} are no weights of {name}.")
        return weights
    if isinstance(weights, os.PathLike) or str(weights).endswith(_FILE_SUFFIXES):
        path = Path(weights).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"there is no weights file {os.fspath(path)!r}.")
        return path
    if weights not in known.__members__:
        raise ValueError(
            f"{name} has no weights {weights!r}. It has {', '.join(map(repr, known.__members__))}; "
            f"the path of a file ends in {', '.join(_FILE_SUFFIXES)}."
        )
    return known[weights]


def _known_weights(name: str) -> type[WeightsEnum]:
    known: type[WeightsEnum] = models.get_model_weights(name)
    return known


def _weights_key(entry: WeightsEnum | Path | None) -> Any:
    """Make a key that changes when a weights file does."""
    if isinstance(entry, Path):
        status = entry.stat()
        return entry.resolve(), status.st_mtime_ns, status.st_size
    return entry


@functools.lru_cache(maxsize=8)
def _skeleton(name: str, size: int) -> nn.Module:
    return _build(name, size, meta=True).to("meta")


def _load_shared(name: str, key: Any, seed: int, size: int, device: torch.device) -> nn.Module:
    if key is not None:
        seed = 0  # of no effect, and so of none on what is shared
    if not name.startswith(_SIZED):
        size = 0
    with _loading:  # threads that ask for one network at once share it too
        return _load_cached(name, key, seed, size, device)


@functools.lru_cache(maxsize=4)
def _load_cached(name: str, key: Any, seed: int, size: int, device: torch.device) -> nn.Module:
    if key is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return _for_reading(_build(name, size), device)
    state = _read_file(key[0]) if isinstance(key, tuple) else _download(name, key)
    return _for_reading(_with_state(name, size, state), device)


def _for_reading(module: nn.Module, device: torch.device) -> nn.Module:
    module = module.eval().requires_grad_(False)
    return module.to(memory_format=torch.channels_last).to(device)


def _build(name: str, size: int, *, meta: bool = False, **options: Any) -> nn.Module:
    """Build a torchvision model with random weights, or with none at all (`meta`)."""
    if name.startswith("vit"):
        options["image_size"] = size
    if name.startswith("maxvit"):
        options["input_size"] = (size, size)
    if name in ("googlenet", "inception_v3"):
        options.setdefault("init_weights", not meta)
    with _parameters_on_meta() if meta else nullcontext():
        module: nn.Module = models.get_model(name, weights=None, **options)
    return module


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Keep new parameters of this thread off memory: filling VGG16's at random takes seconds.

    Not `torch.device("meta")`, under which RegNet cannot compute its widths.
    """
    here = threading.get_ident()

    def to_meta(_module: nn.Module, _name: str, parameter: nn.Parameter) -> nn.Parameter:
        if threading.get_ident() != here:
            return parameter
        return nn.Parameter(parameter.to("meta"), parameter.requires_grad)

    handle = register_module_parameter_registration_hook(to_meta)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()


def _download(name: str, weights: WeightsEnum) -> State:
    """Fetch a state dict with torchvision's own downloader, or from its cache."""
    try:
        state: State = weights.get_state_dict(progress=True, check_hash=True)
    except (urllib.error.URLError, OSError) as error:
        folder = Path(torch.hub.get_dir()) / "checkpoints"
        raise OSError(
            f"the weights {weights} of {name} could not be downloaded ({error}). Put "
            f"{weights.url} at {folder / weights.url.rpartition('/')[2]}, or give the path of "
            "such a file as weights=."
        ) from error
    except RuntimeError as error:
        raise OSError(f"the download of {weights} of {name} is damaged: {error}") from error
    return state


def _read_file(path: Path) -> State:
    """Read a state dict from a .safetensors file, or from a torch file without unpickling code."""
    if path.suffix == ".safetensors":
        load_file = import_optional("safetensors.torch", extra="safetensors").load_file
        try:
            return dict(load_file(path))
        except Exception as error:  # the package raises an error type of its own
            raise ValueError(f"{path} is no safetensors file: {error}") from error
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{path} is damaged or holds more than tensors, which is not loaded for safety: save "
            "module.state_dict() with torch.save."
        ) from error
    for key in ("state_dict", "model"):  # a training checkpoint
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not all(
        isinstance(value, Tensor) for value in content.values()
    ):
        raise ValueError(f"{path} holds no state dict (names of parameters to tensors).")
    return dict(content)


def _with_state(name: str, size: int, state: State) -> nn.Module:
    """Build a model around a state dict, checked strictly but for the number of classes."""
    state = {_current_key(name, key): value for key, value in state.items()}
    options: dict[str, Any] = {}
    if name in ("googlenet", "inception_v3"):
        # torchvision trained these on inputs scaled in another way, and rescales inside.
        options["transform_input"] = True
        options["aux_logits"] = any("aux" in key.lower() for key in state)
    head = list(_build(name, size, meta=True).state_dict())[-1]
    if head in state and state[head].ndim:
        options["num_classes"] = len(state[head])
    module = _build(name, size, meta=True, **options)
    _check_keys(name, module.state_dict(), state)
    floats = {
        key: value.float() if value.is_floating_point() else value for key, value in state.items()
    }
    module.load_state_dict(floats, strict=True, assign=True)
    return module


def _current_key(name: str, key: str) -> str:
    key = key.removeprefix("module.")
    if name.startswith("densenet"):  # files of old: norm.1 for what is norm1 today
        key = re.sub(r"(denselayer\d+\.(?:norm|relu|conv))\.(\d)", r"\1\2", key)
    return key


def _check_keys(name: str, expected: Mapping[str, Tensor], state: State) -> None:
    shapes = [
        f"{key} of shape {tuple(state[key].shape)}, not {tuple(value.shape)}"
        for key, value in expected.items()
        if key in state and state[key].shape != value.shape
    ]
    # Files from before BatchNorm counted its batches lack the count, which is not used in reading.
    missing = [
        key for key in expected if key not in state and not key.endswith("num_batches_tracked")
    ]
    unexpected = [key for key in state if key not in expected]
    faults = [
        f"{len(keys)} {words}: {', '.join(keys[:5])}{', ...' if len(keys) > 5 else ''}"
        for words, keys in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape", shapes),
        )
        if keys
    ]
    if faults:
        raise ValueError(f"the weights file does not fit {name}: {'; '.join(faults)}.")
