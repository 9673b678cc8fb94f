"""Networks made ready for inference: the same outputs, computed in less time."""

import copy
import functools
import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.overrides import TorchFunctionMode

from .trace import find_tensors, make_blank, share_weights

# What autocast gives weights of another type to; a subclass may do something else with them.
_CAST = nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear


@dataclass(frozen=True)
class InferenceNetwork:
    """A network for inference.

    `originals` are the convolutions, by path, that a norm has become part of, as they were before,
    and the modules that end with one.
    """

    module: nn.Module
    originals: Mapping[str, nn.Module] = field(default_factory=dict)


@dataclass(frozen=True)
class InferencePlan:
    """What can be done to a network without changing more than rounding.

    `pairs` are the paths of norms by those of the convolutions that they can be folded into,
    `containers` those of modules that return what such a convolution in them does, by its path.
    Weights are cast to `dtype`, unless that is None.
    """

    pairs: Mapping[str, str] = field(default_factory=dict)
    containers: Mapping[str, Iterable[str]] = field(default_factory=dict)
    dtype: torch.dtype | None = None

    def apply(self, network: nn.Module) -> InferenceNetwork:
        """Prepare a network, which is not changed; weights that stay as they are are shared."""
        if not self.pairs and self.dtype is None:
            return InferenceNetwork(network)
        copied, unchanged = share_weights(network), share_weights(network)
        originals = {}
        for conv, norm in self.pairs.items():
            for path in (conv, *self.containers.get(conv, ())):
                originals[path] = unchanged.get_submodule(path)
            folded = _fold(copied.get_submodule(conv), copied.get_submodule(norm))
            assert folded is not None  # as in the trial
            copied.set_submodule(conv, folded)
            copied.set_submodule(norm, _without_norm(copied.get_submodule(norm)))
        if self.dtype is not None:
            _cast_weights(copied, self.dtype)
        return InferenceNetwork(copied, originals)


def plan_inference(
    network: nn.Module,
    input_shape: tuple[int, ...],
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    dtype: torch.dtype = torch.float32,
) -> InferencePlan:
    """Plan to fold the norms of a network into its convolutions, and to cast weights once.

    What is folded depends on the network alone, and not on which layers are read, so that the rows
    of a layer do not depend on it either.

    Parameters
    ----------
    network : torch.nn.Module
        A network in eval mode.
    input_shape : tuple of int
        (C, H, W) of a prepared image.
    autocast : callable, optional
        Returns the context in which the network will run.
    dtype : torch.dtype, default=torch.float32
        The type of autocast, to which weights are cast.
    """
    if any(module.training for module in network.modules()):  # a trial would be seen by its norms
        return InferencePlan()
    trials = make_trials(network, input_shape)
    with torch.autocast(trials[0].device.type, enabled=False):  # the caller may have turned it on
        plan = _plan_folding(network, trials)
        folded = plan.apply(network)
        if plan.pairs and not _agree(network, folded.module, trials, unlike=folded.originals):
            plan, folded = InferencePlan(), InferenceNetwork(network)
    if dtype != torch.float32:
        cast = replace(plan, dtype=dtype)
        with autocast():  # which casts to the same values
            if _agree(folded.module, cast.apply(network).module, trials, tolerance=0):
                return cast
    return plan


def prefer_channels_last(module: nn.Module, input_shape: tuple[int, ...]) -> nn.Module:
    """Copy a network to the channels-last memory format, which is faster, if it allows that.

    Some code requires maps to be contiguous channel by channel (`x.view(len(x), -1)`). Unless a
    trial run gives the same output, up to rounding, the network itself is returned.
    """
    if not any(weight.ndim == 4 for weight in module.parameters()):
        return module
    changed = copy.deepcopy(module).to(memory_format=torch.channels_last)
    return changed if _agree(module, changed, make_trials(module, input_shape)[:1]) else module


def make_trials(module: nn.Module, input_shape: tuple[int, ...]) -> list[Tensor]:
    """Make batches on which networks are compared: of noise, of a dark image, of a light and noise.

    They have the dtype and the device of the network's weights, and the range of normalised images.
    """
    noise = torch.rand(1, *input_shape, generator=torch.Generator().manual_seed(0))
    batches = noise, noise - 2.5, torch.cat([noise + 1.5, noise])
    return [batch.to(make_blank(module, ())) for batch in batches]


def is_close(expected: Tensor | None, found: Tensor | None, tolerance: float = 1e-4) -> bool:
    """Return whether two outputs are equal up to rounding, relative to the largest value."""
    if expected is None or found is None or expected.shape != found.shape:
        return False
    if not expected.is_floating_point() or not expected.numel():
        return torch.equal(expected, found)
    difference, scale = float((expected - found).abs().max()), float(expected.abs().max())
    if math.isfinite(difference) and math.isfinite(scale):
        return difference <= tolerance * scale
    expected, found = expected.double(), found.double()
    finite = expected[expected.isfinite()].abs()
    scale = float(finite.max()) if finite.numel() else 0.0
    return torch.allclose(expected, found, rtol=0, atol=tolerance * scale, equal_nan=True)


def _agree(
    expected: nn.Module,
    found: nn.Module,
    batches: Iterable[Tensor],
    tolerance: float = 1e-4,
    unlike: Collection[str] = (),
) -> bool:
    """Try whether two networks give the same, up to rounding, and all their modules, but some."""
    try:
        with torch.no_grad():
            return all(
                _is_same(
                    _list_outputs(expected, batch), _list_outputs(found, batch), tolerance, unlike
                )
                for batch in batches
            )
    except Exception:  # a network that fails in any format raises when the caller runs it
        return False


def _list_outputs(network: nn.Module, batch: Tensor) -> list[tuple[str, Tensor]]:
    """Run a network; return what its modules return, with their paths, and what itself does."""
    outputs: list[tuple[str, Tensor]] = []

    def keep(path: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
        outputs.extend((path, tensor) for tensor in find_tensors(output))

    hooked = share_weights(network)
    for path, module in hooked.named_modules():
        module.register_forward_hook(functools.partial(keep, path))
    hooked(batch)
    return outputs


def _is_same(
    expected: list[tuple[str, Tensor]],
    found: list[tuple[str, Tensor]],
    tolerance: float,
    unlike: Collection[str],
) -> bool:
    return (
        bool(expected)
        and len(expected) == len(found)
        and all(
            path == other and (path in unlike or is_close(tensor, value, tolerance))
            for (path, tensor), (other, value) in zip(expected, found, strict=True)
        )
    )


# Norms --------------------------------------------------------------------------------------------


def _plan_folding(network: nn.Module, trials: list[Tensor]) -> InferencePlan:
    """Find the norms that convolutions can compute as well; exact up to rounding."""
    if not any(map(_is_norm, network.modules())):
        return InferencePlan()
    trial = _Trial(network)
    try:
        pairs = trial.run(trials)
    except Exception:  # a network that fails raises when the caller runs it
        return InferencePlan()
    # The original of a container runs on what the network gives it, which must be the same there.
    allowed = {
        conv: norm
        for conv, norm in pairs.items()
        if not any(_begins_folded(path, pairs) for path in trial.containers.get(conv, ()))
    }
    return InferencePlan(allowed, trial.containers)


def _begins_folded(container: str, pairs: Mapping[str, str]) -> bool:
    """Return whether a norm in a container is folded into a convolution outside of it."""
    inside = f"{container}."
    return any(
        norm.startswith(inside) and not conv.startswith(inside) for conv, norm in pairs.items()
    )


class _Trial(TorchFunctionMode):
    """Runs that find the norms that take what a convolution returns, and nothing else does.

    A convolution with the norm folded into it is tried on the way. `containers` has the paths of
    modules that return what a convolution in them does, by its path.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.containers: dict[str, dict[str, None]] = {}
        self._network = network
        self._folded: dict[str, nn.Module] = {}  # by the path of the norm
        self._pairs: dict[str, str] = {}
        self._refused: set[str] = set()  # convolutions
        self._calls: Counter[str] = Counter()  # of convolutions and norms
        self._uses: Counter[str] = Counter()  # of what convolutions return, and of their weights
        self._weights: dict[int, str] = {}  # paths of convolutions by the identity of their weights
        # By the identity of what a convolution returned, which is kept alive to stay unique.
        self._returned: dict[int, tuple[str, Tensor, Tensor]] = {}
        self._taken: dict[str, int] = {}

    def run(self, batches: list[Tensor]) -> dict[str, str]:
        """Return the paths of norms that can be folded, by those of their convolutions."""
        hooked = share_weights(self._network)
        names = Counter(module for _, module in hooked.named_modules(remove_duplicate=False))
        for path, module in hooked.named_modules():
            if isinstance(module, _ConvNd) and not module.transposed and names[module] == 1:
                module.register_forward_hook(self._keep(path))
                self._weights[id(module._parameters.get("weight"))] = path
            elif _is_norm(module) and names[module] == 1:
                module.register_forward_pre_hook(self._take(path))
                module.register_forward_hook(self._compare(path))
            else:
                module.register_forward_hook(self._pass_on(path))
        for batch in batches:
            with torch.no_grad(), self:
                hooked(batch)
            self._returned.clear()
        return {
            conv: norm
            for conv, norm in self._pairs.items()
            if conv not in self._refused
            # Each time, the convolution uses its weight, and the norm what it returns.
            and self._uses[conv] == 2 * len(batches)
            and self._calls[conv] == self._calls[norm] == len(batches)
        }

    def __torch_function__(
        self, function: Any, _types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        keys = {id(tensor) for tensor in find_tensors((args, kwargs or {}))}
        used = [self._returned[key][0] for key in keys & self._returned.keys()]
        used += [self._weights[key] for key in keys & self._weights.keys()]
        result = function(*args, **(kwargs or {}))
        if any(True for _ in find_tensors(result)):  # not for a shape, say
            self._uses.update(used)
        return result

    def _keep(self, path: str) -> Callable[..., None]:
        def keep(_module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            self._calls[path] += 1
            if isinstance(output, Tensor) and len(inputs) == 1:
                self._returned[id(output)] = path, inputs[0], output

        return keep

    def _take(self, path: str) -> Callable[..., None]:
        def take(_module: nn.Module, inputs: tuple[Any, ...]) -> None:
            self._calls[path] += 1
            if len(inputs) == 1 and id(inputs[0]) in self._returned:
                self._taken[path] = id(inputs[0])

        return take

    def _compare(self, path: str) -> Callable[..., None]:
        def compare(norm: nn.Module, _inputs: Any, output: Any) -> None:
            if path not in self._taken or not isinstance(output, Tensor):
                return
            conv, taken, _ = self._returned[self._taken.pop(path)]
            with torch._C.DisableTorchFunction():  # not to be counted
                folded = self._folded.get(path) or _fold(self._network.get_submodule(conv), norm)
                if folded is None or not is_close(output, _without_norm(norm)(folded(taken))):
                    self._refused.add(conv)
                    return
                self._folded[path] = folded
            if self._pairs.setdefault(conv, path) != path:
                self._refused.add(conv)

        return compare

    def _pass_on(self, path: str) -> Callable[..., None]:
        def pass_on(_module: nn.Module, _inputs: Any, output: Any) -> None:
            for tensor in find_tensors(output):
                if id(tensor) not in self._returned:
                    continue
                conv = self._returned[id(tensor)][0]
                if conv.startswith(f"{path}."):
                    self.containers.setdefault(conv, {})[path] = None
                else:  # which may be read, and would get what the norm returns
                    self._refused.add(conv)

        return pass_on


def _is_norm(module: nn.Module) -> bool:
    return isinstance(getattr(module, "running_var", None), Tensor)


def _fold(conv: nn.Module, norm: nn.Module) -> nn.Module | None:
    """Fold a norm into a copy of a convolution; None if they are not of the usual make."""
    weight, bias = (_to_double(conv._parameters.get(name)) for name in ("weight", "bias"))
    names = ("running_mean", "running_var", "weight", "bias")
    mean, variance, scale, shift = (_to_double(getattr(norm, name, None)) for name in names)
    if weight is None or mean is None or variance is None or len(mean) != len(weight):
        return None
    dtype = conv.get_parameter("weight").dtype
    folded = share_weights(conv)
    fused = fuse_conv_bn_weights(weight, bias, mean, variance, float(norm.eps), scale, shift)  # type: ignore[arg-type]
    for name, tensor in zip(("weight", "bias"), fused, strict=True):
        folded._parameters[name] = nn.Parameter(tensor.to(dtype), requires_grad=False)
    return folded


def _to_double(tensor: Any) -> Tensor | None:
    return tensor.detach().double() if isinstance(tensor, Tensor) else None


def _without_norm(norm: nn.Module) -> nn.Module:
    """Return what a norm does besides: its activation, if it has one."""
    return nn.Sequential(OrderedDict(norm.named_children()))


# Weights ------------------------------------------------------------------------------------------


def _cast_weights(network: nn.Module, dtype: torch.dtype) -> None:
    """Cast the weights that autocast would cast in each pass."""
    for module in network.modules():
        if type(module) in _CAST:
            for name, weight in module._parameters.items():
                if weight is not None and weight.dtype == torch.float32:
                    cast = nn.Parameter(weight.detach().to(dtype), requires_grad=False)
                    module._parameters[name] = cast
