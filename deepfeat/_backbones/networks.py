"""Networks with a name: built as a skeleton or with their weights, and shared by a process."""

import functools
import math
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .descriptions import Description
from .state_files import State, WeightsFile

_WRAPPERS = re.compile(r"\b(?:module|_orig_mod)\.")  # of DataParallel and torch.compile
_FILLS = (
    *(Tensor.normal_, Tensor.uniform_, Tensor.exponential_),
    *(nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_),
)
_DRAWS = (torch.rand, torch.randn, torch.randint, torch.randperm)
_loading = threading.Lock()


class WeightsSource(Hashable, Protocol):
    """Where weights come from; if its file changes, a source is no longer equal."""

    @property
    def description(self) -> Description:
        """What is known of the weights without loading them."""

    @property
    def digest(self) -> str:
        """A string that identifies the weights in every process."""

    def state(self) -> State:
        """Return the state dict."""


@dataclass(frozen=True)
class RandomWeights:
    """Weights drawn from a seed; images are prepared as for the published weights."""

    seed: int
    description: Description
    version: str  # of what draws them

    @property
    def digest(self) -> str:
        """A string that identifies these weights in every process."""
        return f"seed {self.seed}, torch {torch.__version__}, {self.version}"


class Family(Hashable, Protocol):
    """Networks known by name: what the modules `torchvision`, `resnet10_slim` and `timm` offer.

    A `size` is (H, W) of the images; None unless the network is built for one size.
    """

    def list_names(self) -> list[str]:
        """List the names of the networks."""

    def has_name(self, name: str) -> bool:
        """Tell whether this is the name of a network."""

    def known_weights(self, name: str) -> Mapping[str, WeightsSource]:
        """Return the weights of a network by their names, "DEFAULT" among them if there are any."""

    def describe(self, name: str) -> Description:
        """Describe weights that are drawn or in a file."""

    def version(self) -> str:
        """Return the package that builds the networks, and its version."""

    def is_sized(self, name: str) -> bool:
        """Tell whether a network is built for one input size."""

    def build(self, name: str, size: tuple[int, int] | None) -> nn.Module:
        """Build a network with random weights."""

    def load(self, name: str, size: tuple[int, int] | None, state: State) -> nn.Module:
        """Build a network around a state dict, which determines the number of classes."""

    def count_outputs(self, network: nn.Module) -> int:
        """Count the outputs of a network."""


@functools.lru_cache(maxsize=8)
def make_skeleton(
    family: Family, name: str, size: tuple[int, int] | None, file: WeightsFile | None
) -> nn.Module:
    """Build a network on the meta device; a weights file determines the number of classes."""
    if file is not None:
        return family.load(name, size, file.peek()).to("meta")
    with Building(None, meta=True):
        return family.build(name, size).to("meta")


def build_blank(family: Family, name: str, size: tuple[int, int] | None) -> nn.Module:
    """Build a network without weights, but with the buffers that no state dict has."""
    with Building(None):
        return family.build(name, size)


def load_shared(
    family: Family,
    size: tuple[int, int] | None,
    source: WeightsSource | RandomWeights,
    device: torch.device,
) -> nn.Module:
    """Load a network in eval mode, or return the one that this process has already."""
    with _loading:  # threads that ask for one network at once share it too
        return _load_cached(family, size, source, device)


@functools.lru_cache(maxsize=4)
def _load_cached(
    family: Family,
    size: tuple[int, int] | None,
    source: WeightsSource | RandomWeights,
    device: torch.device,
) -> nn.Module:
    name = source.description.network
    with torch.inference_mode(False):  # the caller's would stick to tensors that others train
        if isinstance(source, RandomWeights):
            with Building(source.seed):
                network = family.build(name, size)
        else:
            network = family.load(name, size, source.state())
        network = network.eval().requires_grad_(False)
        return network.to(memory_format=torch.channels_last).to(device)


# Building ---------------------------------------------------------------------------------------


class Building(TorchFunctionMode):
    """Build networks with random weights from a generator of their own, or with NaN.

    In this thread alone: `torch.manual_seed` would seed the others and all devices too.

    Parameters
    ----------
    seed : int or None
        Seed of the weights; if it is None, they are NaN: drawing those of VGG16 takes seconds.
    meta : bool, default=False
        Whether weights are on the meta device. Not `torch.device("meta")`, under which RegNet
        cannot compute its widths.
    """

    def __init__(self, seed: int | None, *, meta: bool = False):
        super().__init__()
        self._generator = torch.Generator().manual_seed(seed or 0)
        self._is_filled = seed is not None
        self._meta = meta

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func in (torch.empty, torch.zeros, torch.ones) and self._meta:
            kwargs["device"] = "meta"
        if func in _FILLS and not self._is_filled:
            weights = args[0] if args else kwargs["tensor"]
            weights.detach().fill_(math.nan)
            return weights
        if func in _FILLS or func in _DRAWS:
            kwargs["generator"] = self._generator
        return func(*args, **kwargs)


def strip_wrappers(state: State) -> State:
    """Return a state dict without the names that DataParallel and torch.compile put before."""
    return {_WRAPPERS.sub("", key): value for key, value in state.items()}


def load_strictly(
    name: str, build: Callable[..., nn.Module], state: State, **options: Any
) -> nn.Module:
    """Build a network around a state dict, checked strictly but for the number of classes."""
    state = strip_wrappers(state)
    with Building(None, meta=True):
        head, _ = _last_entry(build())
        if head in state and state[head].ndim:
            options["num_classes"] = len(state[head])
        network = build(**options)
    _check_keys(name, network.state_dict(), state)
    floats: Any = OrderedDict(
        (key, value.float() if value.is_floating_point() else value) for key, value in state.items()
    )
    floats._metadata = {"": {"version": network._version}}  # MNASNet insists on one
    network.load_state_dict(floats, strict=True, assign=True)
    return network


def count_last_entry(network: nn.Module) -> int:
    """Count the outputs of a network whose state dict ends with the head, by class."""
    _, value = _last_entry(network)
    return len(value)


def _last_entry(network: nn.Module) -> tuple[str, Tensor]:
    *_, entry = network.state_dict().items()
    return entry


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
