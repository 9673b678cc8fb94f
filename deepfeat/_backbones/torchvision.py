"""Networks of torchvision: building them, and loading their published weights."""

import functools
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torchvision import models
from torchvision.models import WeightsEnum

from . import resnet10_slim as _bundled
from .state_files import State, digest_once, parse_state, read_as_digested, weights_key

_SIZED = ("vit", "maxvit")  # built for one input size
_FILLS = (
    Tensor.normal_,
    Tensor.uniform_,
    nn.init.normal_,
    nn.init.uniform_,
    nn.init.kaiming_uniform_,
)
_loading = threading.Lock()


def known_weights(name: str) -> type[WeightsEnum]:
    if name == _bundled.NAME:
        return _bundled.ResNet10Slim_Weights
    known: type[WeightsEnum] = models.get_model_weights(name)
    return known


@functools.lru_cache(maxsize=8)
def make_skeleton(name: str, size: int, file_key: Any) -> nn.Module:
    if file_key is None:
        return _build(name, size, meta=True).to("meta")
    # The file decides on the number of classes.
    return _with_state(name, size, parse_state(file_key[0])).to("meta")


def load_shared(name: str, key: Any, seed: int, size: int, device: torch.device) -> nn.Module:
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
        state = read_as_digested(*key) if isinstance(key, tuple) else _download(name, key)
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
        if not digest_once(*weights_key(cached)).startswith(expected):
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
