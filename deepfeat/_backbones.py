"""Knows how a name or a module becomes a backbone: its network, weights and preprocessing."""

import copy
import difflib
import functools
import hashlib
import io
import os
import re
import threading
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torchvision
from PIL import Image
from safetensors.torch import load as load_safetensors
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torchvision import models
from torchvision.models import WeightsEnum

from . import _bundled
from ._fingerprint import fingerprint
from ._preprocessing import Preprocessing, Resize, preprocess_like, preprocess_with
from ._trace import prefer_channels_last

Weights: TypeAlias = str | os.PathLike[str] | WeightsEnum | None
State: TypeAlias = dict[str, Tensor]

_FILE_SUFFIXES = (".pth", ".pt", ".tar", ".safetensors")
_SIZED = ("vit", "maxvit")  # built for one input size
_FILLS = (
    Tensor.normal_,
    Tensor.uniform_,
    nn.init.normal_,
    nn.init.uniform_,
    nn.init.kaiming_uniform_,
)
_loading = threading.Lock()
_digests: dict[tuple[Path, tuple[int, ...]], str] = {}  # of weights files, by path and stamp


@dataclass(frozen=True)
class Backbone:
    """A network that need not be loaded yet, and its preprocessing.

    `skeleton` has the network's structure, without its weights; `load` gives the network itself
    in eval mode on a device. Where both are `shared` by the process they must not be changed.
    `fingerprint` digests the weights and the preprocessing, the same in every process; it raises
    `UnknownContentError` where they cannot be digested. `categories` names the outputs; None if
    they have no names.
    """

    name: str
    skeleton: nn.Module
    preprocessing: Preprocessing
    load: Callable[[torch.device], nn.Module]
    shared: bool
    fingerprint: Callable[[], bytes]
    categories: tuple[str, ...] | None


def list_backbones() -> list[str]:
    """List the names of all backbones: torchvision's classification models, and deepfeat's own.

    Its own is `resnet10_slim`, whose weights come with the package.

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
    return sorted([*models.list_models(module=models), _bundled.NAME])


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
        If there is no backbone or no weights of that name, a file does not fit, or the choices
        exclude each other.
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
        steps = preprocess_like(source.transforms(), resize, image_size)
    else:
        steps = preprocess_with(preprocessing)
    size = steps.input_shape[-1]
    key = _weights_key(entry)
    load = functools.partial(_load_shared, backbone, key, seed, size)
    digest = functools.partial(_fingerprint_named, backbone, key, seed, steps)
    skeleton = _skeleton(backbone, size, key if isinstance(key, tuple) else None)
    categories = _find_categories(backbone, entry, skeleton)
    return Backbone(backbone, skeleton, steps, load, True, digest, categories)


def is_weights_file(weights: Weights) -> bool:
    """Tell whether weights are the path of a file."""
    return isinstance(weights, os.PathLike) or (
        isinstance(weights, str) and weights.endswith(_FILE_SUFFIXES)
    )


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

    digest = functools.cache(functools.partial(fingerprint, (module, preprocessing)))

    def load(device: torch.device) -> nn.Module:
        if any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
            raise ValueError(
                f"{type(module).__name__} is on the meta device, without weights: use "
                'module.to_empty(device="cpu"), and load them.'
            )
        # A copy: the user's module keeps its mode, its device and its hooks.
        copied = copy.deepcopy(module).float().eval().requires_grad_(False)
        if digest.cache_info().currsize and fingerprint((module, preprocessing)) != digest():
            raise RuntimeError(
                f"{type(module).__name__} was changed by another thread while its rows were looked "
                "up: call again when it is done."
            )
        return prefer_channels_last(copied, steps.input_shape).to(device)

    steps = preprocess_with(preprocessing)
    return Backbone(type(module).__name__, module, steps, load, False, digest, None)


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
    if is_weights_file(weights):
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
    if name == _bundled.NAME:
        return _bundled.ResNet10Slim_Weights
    known: type[WeightsEnum] = models.get_model_weights(name)
    return known


def _weights_key(entry: WeightsEnum | Path | None) -> Any:
    """Make a key that changes when a weights file does."""
    if isinstance(entry, _bundled.ResNet10Slim_Weights):
        entry = Path(entry.url)
    if isinstance(entry, Path):
        status = entry.stat()
        stamp = (status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino)
        return entry.resolve(), stamp
    return entry


def _find_categories(
    name: str, entry: WeightsEnum | Path | None, skeleton: nn.Module
) -> tuple[str, ...] | None:
    """Name the outputs as the weights do; for a file with as many outputs, as the default ones."""
    if entry is None:
        return None
    if isinstance(entry, WeightsEnum):
        categories = entry.meta["categories"]
        return tuple(categories) if categories else None  # some VGG16 have no classifier's weights
    categories = _known_weights(name)["DEFAULT"].meta["categories"]
    *_, head = skeleton.state_dict().values()
    return tuple(categories) if len(categories) == len(head) else None


def _fingerprint_named(name: str, key: Any, seed: int, steps: Preprocessing) -> bytes:
    if isinstance(key, tuple):
        weights = _digest_once(*key)
    elif isinstance(key, WeightsEnum):
        weights = key.url  # torchvision writes a hash of the content into the name of the file
    else:
        weights = f"seed {seed}, torch {torch.__version__}, torchvision {torchvision.__version__}"
    return fingerprint((name, weights, steps.settings))


def _digest_once(path: Path, stamp: tuple[int, ...]) -> str:
    """Digest a weights file, once for each stamp that it has."""
    if (path, stamp) not in _digests:
        with path.open("rb") as file:
            _digests.setdefault((path, stamp), hashlib.file_digest(file, "sha256").hexdigest())
    return _digests[path, stamp]


def _read_as_digested(path: Path, stamp: tuple[int, ...]) -> State:
    """Read a state dict from just those bytes that its digest is of.

    Raises
    ------
    OSError
        If the file was replaced since it was digested: rows of the new weights would be kept under
        the key of the old ones.
    """
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if _digests.setdefault((path, stamp), digest) != digest:
        raise OSError(f"{path} was replaced while it was being read: call again.")
    return _parse_state(path, content)


@functools.lru_cache(maxsize=8)
def _skeleton(name: str, size: int, file_key: Any) -> nn.Module:
    if file_key is None:
        return _build(name, size, meta=True).to("meta")
    # The file decides on the number of classes.
    return _with_state(name, size, _parse_state(file_key[0])).to("meta")


def _load_shared(name: str, key: Any, seed: int, size: int, device: torch.device) -> nn.Module:
    if key is not None:
        seed = 0  # of no effect, and so of none on what is shared
    if not name.startswith(_SIZED):
        size = 0
    with _loading:  # threads that ask for one network at once share it too
        return _load_cached(name, key, seed, size, device)


@functools.lru_cache(maxsize=4)
def _load_cached(name: str, key: Any, seed: int, size: int, device: torch.device) -> nn.Module:
    with torch.inference_mode(False):  # the caller's would stick to tensors that others train
        if key is None:
            return _for_reading(_build(name, size, seed=seed), device)
        state = _read_as_digested(*key) if isinstance(key, tuple) else _download(name, key)
        return _for_reading(_with_state(name, size, state), device)


def _for_reading(module: nn.Module, device: torch.device) -> nn.Module:
    module = module.eval().requires_grad_(False)
    return module.to(memory_format=torch.channels_last).to(device)


def _build(name: str, size: int, *, seed: int = 0, meta: bool = False, **options: Any) -> nn.Module:
    """Build a model with random weights, or with almost none (`meta`)."""
    if name.startswith("vit"):
        options["image_size"] = size
    if name.startswith("maxvit"):
        options["input_size"] = (size, size)
    if name in ("googlenet", "inception_v3"):
        options.setdefault("init_weights", not meta)
    build: Callable[..., nn.Module] = functools.partial(models.get_model, name, weights=None)
    if name == _bundled.NAME:
        build = _bundled.SlimResNet
    try:
        with _Building(seed, meta):
            module: nn.Module = build(**options)
    except (AssertionError, ValueError) as error:
        raise ValueError(f"{name} cannot be built for images of side {size}: {error}") from error
    return module


class _Building(TorchFunctionMode):
    """Draw random weights from a generator of their own, or keep them on the meta device.

    In this thread alone: `torch.manual_seed` would seed the others and all devices too. Meta,
    because filling VGG16 takes seconds; not `torch.device("meta")`, under which RegNet cannot
    compute its widths.
    """

    def __init__(self, seed: int, meta: bool):
        super().__init__()
        self._generator = torch.Generator().manual_seed(seed)
        self._meta = meta

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and self._meta:
            kwargs["device"] = "meta"
        if func in _FILLS and not (args[0] if args else kwargs["tensor"]).is_meta:
            kwargs["generator"] = self._generator
        return func(*args, **kwargs)


def _download(name: str, weights: WeightsEnum) -> State:
    """Fetch a state dict with torchvision's own downloader, or from its cache."""
    cached = Path(torch.hub.get_dir()) / "checkpoints" / weights.url.rpartition("/")[2]
    if cached.is_file():  # torchvision checks the hash of a download, but not of what lies there
        expected = cached.stem.rpartition("-")[2]
        if not _digest_once(*_weights_key(cached)).startswith(expected):
            raise OSError(
                f"{cached} does not hold the weights {weights} of {name}: its SHA-256 does not "
                f"begin with {expected}. Put {weights.url} at {cached}, or give the path of such a "
                "file as weights=."
            )
    try:
        state: State = weights.get_state_dict(progress=True, check_hash=True)
    except Exception as error:  # the network, the disk and a damaged file may raise anything
        fault = f"read from {cached}" if cached.exists() else "downloaded"
        raise OSError(
            f"the weights {weights} of {name} could not be {fault} ({error}). Put {weights.url} "
            f"at {cached}, or give the path of such a file as weights=. The backbone "
            f"{_bundled.NAME!r} needs no network: its weights come with deepfeat."
        ) from error
    return state


def _parse_state(path: Path, content: bytes | None = None) -> State:
    """Read a state dict from a .safetensors file, or from a torch file without unpickling code.

    Without its content the weights are left on disk where that is possible.
    """
    if path.suffix == ".safetensors":
        try:
            return load_file(path) if content is None else load_safetensors(content)
        except Exception as error:  # the package raises an error type of its own
            raise ValueError(f"{path} is no safetensors file: {error}") from error
    try:
        mmap = content is None and zipfile.is_zipfile(path)
        source = path if content is None else io.BytesIO(content)
        loaded = torch.load(source, map_location="cpu", weights_only=True, mmap=mmap)
    except PermissionError:
        raise
    except Exception as error:  # what is damaged may raise anything
        raise ValueError(
            f"{path} is damaged or holds more than tensors, which is not loaded for safety: save "
            "module.state_dict() with torch.save."
        ) from error
    for key in ("state_dict", "model"):  # a training checkpoint
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in loaded.items()
    ):
        raise ValueError(f"{path} holds no state dict (names of parameters to tensors).")
    return dict(loaded)


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
    floats: Any = OrderedDict(
        (key, value.float() if value.is_floating_point() else value) for key, value in state.items()
    )
    floats._metadata = {"": {"version": module._version}}  # MNASNet insists on one
    module.load_state_dict(floats, strict=True, assign=True)
    return module


def _current_key(name: str, key: str) -> str:
    """Undo wrappers of modules, and what was renamed since torchvision published its files."""
    key = re.sub(r"\b(?:module|_orig_mod)\.", "", key)
    if name.startswith("densenet"):  # norm.1 for what is norm1 today
        key = re.sub(r"(denselayer\d+\.(?:norm|relu|conv))\.(\d)", r"\1\2", key)
    if name.startswith("vit"):
        key = key.replace(".mlp.linear_1.", ".mlp.0.").replace(".mlp.linear_2.", ".mlp.3.")
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
