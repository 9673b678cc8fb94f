"""Networks with a name: built as a skeleton or with their weights, and shared by a process."""

import functools
import re
import threading
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeAlias

import torch
import torchvision
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torchvision.models import WeightsEnum

from .state_files import State, WeightsFile
from .torchvision import PublishedWeights

_WRAPPERS = re.compile(r"\b(?:module|_orig_mod)\.")  # of DataParallel and torch.compile
_FILLS = (
    Tensor.normal_,
    Tensor.uniform_,
    nn.init.normal_,
    nn.init.uniform_,
    nn.init.kaiming_uniform_,
)
_loading = threading.Lock()


@dataclass(frozen=True)
class RandomWeights:
    """Weights drawn from a seed; images are prepared as for the published weights `entry`."""

    seed: int
    entry: WeightsEnum

    categories: ClassVar[None] = None

    @property
    def digest(self) -> str:
        """A string that identifies these weights in every process."""
        return f"seed {self.seed}, torch {torch.__version__}, torchvision {torchvision.__version__}"


# A source of weights is hashable; if its file changes, it is no longer equal.
WeightsSource: TypeAlias = PublishedWeights | WeightsFile | RandomWeights


class Family(Hashable, Protocol):
    """Networks known by name: what the modules `torchvision` and `resnet10_slim` offer."""

    def list_names(self) -> list[str]:
        """List the names of the networks."""

    def known_weights(self, name: str) -> Mapping[str, PublishedWeights | WeightsFile]:
        """Return the weights of a network by their names, "DEFAULT" among them."""

    def is_sized(self, name: str) -> bool:
        """Tell whether a network is built for one input size."""

    def build(self, name: str, size: int | None, **options: Any) -> nn.Module:
        """Build a network with random weights; `num_classes` is an option that each one has."""

    def adapt(self, name: str, state: State) -> tuple[State, dict[str, Any]]:
        """Return a state dict with today's names, and the options to build its network with."""


@functools.lru_cache(maxsize=8)
def make_skeleton(
    family: Family, name: str, size: int | None, file: WeightsFile | None
) -> nn.Module:
    """Build a network on the meta device; a weights file determines the number of classes."""
    if file is not None:
        return _with_state(family, name, size, file.peek()).to("meta")
    return _build(family, name, size, meta=True).to("meta")


def load_shared(
    family: Family, name: str, size: int | None, source: WeightsSource, device: torch.device
) -> nn.Module:
    """Load a network in eval mode, or return the one that this process has already."""
    with _loading:  # threads that ask for one network at once share it too
        return _load_cached(family, name, size, source, device)


@functools.lru_cache(maxsize=8)
def count_outputs(skeleton: nn.Module) -> int:
    """Count the outputs of a network with a name."""
    _, value = _head_entry(skeleton)
    return len(value)


def _head_entry(network: nn.Module) -> tuple[str, Tensor]:
    """Return the last entry of the state dict: in every family, one of the head, by class."""
    *_, entry = network.state_dict().items()
    return entry


@functools.lru_cache(maxsize=4)
def _load_cached(
    family: Family, name: str, size: int | None, source: WeightsSource, device: torch.device
) -> nn.Module:
    with torch.inference_mode(False):  # the caller's would stick to tensors that others train
        if isinstance(source, RandomWeights):
            network = _build(family, name, size, seed=source.seed)
        else:
            network = _with_state(family, name, size, source.state())
        network = network.eval().requires_grad_(False)
        return network.to(memory_format=torch.channels_last).to(device)


def _build(
    family: Family,
    name: str,
    size: int | None,
    *,
    seed: int = 0,
    meta: bool = False,
    **options: Any,
) -> nn.Module:
    """Build a network with random weights, or with almost none (`meta`)."""
    with _Building(seed, meta):
        return family.build(name, size, **options)


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


def _with_state(family: Family, name: str, size: int | None, state: State) -> nn.Module:
    """Build a network around a state dict, checked strictly but for the number of classes."""
    state = {_WRAPPERS.sub("", key): value for key, value in state.items()}
    state, options = family.adapt(name, state)
    head, _ = _head_entry(_build(family, name, size, meta=True))
    if head in state and state[head].ndim:
        options["num_classes"] = len(state[head])
    network = _build(family, name, size, meta=True, **options)
    _check_keys(name, network.state_dict(), state)
    floats: Any = OrderedDict(
        (key, value.float() if value.is_floating_point() else value) for key, value in state.items()
    )
    floats._metadata = {"": {"version": network._version}}  # MNASNet insists on one
    network.load_state_dict(floats, strict=True, assign=True)
    return network


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
        raise ValueError(f"The weights file does not fit {name}: {'; '.join(faults)}.")
