"""Networks made ready for inference: the same outputs, computed in less time."""

import copy
import itertools
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
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

    `convolutions` are those whose norm has become part of them, by path, as they were before.
    """

    module: nn.Module
    convolutions: Mapping[str, nn.Module] = field(default_factory=dict)


def prepare_for_inference(
    network: nn.Module,
    input_shape: tuple[int, ...],
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    dtype: torch.dtype = torch.float32,
) -> InferenceNetwork:
    """Fold the norms of a network into its convolutions, and cast weights once.

    The network itself is not changed; the copy shares the weights that stay as they are. What is
    folded depends on the network alone, and not on which layers are read, so that the rows of a
    layer do not depend on it either.

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
    noise = make_noise(network, 1, input_shape)
    folded = _fold_norms(network, noise)
    return folded if dtype == torch.float32 else _cast_weights(folded, noise, autocast, dtype)


def prefer_channels_last(module: nn.Module, input_shape: tuple[int, ...]) -> nn.Module:
    """Copy a network to the channels-last memory format, which is faster, if it allows that.

    Some code requires maps to be contiguous channel by channel (`x.view(len(x), -1)`). Unless a
    trial run gives the same output, up to rounding, the network itself is returned.
    """
    if not any(weight.ndim == 4 for weight in module.parameters()):
        return module
    changed = copy.deepcopy(module).to(memory_format=torch.channels_last)
    return changed if _agree(module, changed, make_noise(module, 1, input_shape)) else module


def make_noise(module: nn.Module, count: int, input_shape: tuple[int, ...]) -> Tensor:
    """Make a batch of noise, with the dtype and device of a network's weights."""
    noise = torch.rand(count, *input_shape, generator=torch.Generator().manual_seed(0))
    return noise.to(make_blank(module, ()))


def is_close(expected: Tensor | None, found: Tensor | None, tolerance: float = 1e-4) -> bool:
    """Return whether two outputs are equal up to rounding, relative to the largest value."""
    if expected is None or found is None or expected.shape != found.shape:
        return False
    expected, found = expected.double(), found.double()
    finite = expected[expected.isfinite()].abs()
    scale = float(finite.max()) if finite.numel() else 0.0
    return torch.allclose(expected, found, rtol=0, atol=tolerance * scale, equal_nan=True)


def _agree(expected: nn.Module, found: nn.Module, noise: Tensor, tolerance: float = 1e-4) -> bool:
    """Try whether two networks give the same outputs, up to rounding."""
    try:
        with torch.no_grad():
            ours, theirs = (list(find_tensors(network(noise))) for network in (expected, found))
    except Exception:  # a network that fails in any format raises when the caller runs it
        return False
    pairs = itertools.zip_longest(ours, theirs)
    return bool(ours) and all(is_close(one, other, tolerance) for one, other in pairs)


# Norms --------------------------------------------------------------------------------------------


def _fold_norms(network: nn.Module, noise: Tensor) -> InferenceNetwork:
    """Let convolutions compute what the norms after them would; exact up to rounding."""
    if not any(map(_is_norm, network.modules())):
        return InferenceNetwork(network)
    trial = _Trial(network)
    try:
        pairs = trial.run(noise)
    except Exception:  # a network that fails raises when the caller runs it
        return InferenceNetwork(network)
    copied = share_weights(network)
    originals = {}
    for conv, norm in pairs.items():
        originals[conv] = copied.get_submodule(conv)
        copied.set_submodule(conv, trial.folded[norm])
        copied.set_submodule(norm, _without_norm(copied.get_submodule(norm)))
    if not pairs or not _agree(network, copied, noise):
        return InferenceNetwork(network)
    return InferenceNetwork(copied, originals)


class _Trial(TorchFunctionMode):
    """A run that finds the norms that take what a convolution returns, and nothing else does.

    A convolution with the norm folded into it is tried on the way; `folded` has those that gave
    what the norm returned, by the path of the norm.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.folded: dict[str, nn.Module] = {}
        self._network = network
        self._pairs: dict[str, str] = {}
        self._calls: Counter[str] = Counter()  # of convolutions and norms
        self._uses: Counter[int] = Counter()  # by functions, of what convolutions return
        # By the identity of what a convolution returned, which is kept alive to stay unique.
        self._returned: dict[int, tuple[str, Tensor, Tensor]] = {}
        self._taken: dict[str, int] = {}

    def run(self, noise: Tensor) -> dict[str, str]:
        """Return the paths of norms that can be folded, by those of their convolutions."""
        hooked = share_weights(self._network)
        for path, module in hooked.named_modules():
            if isinstance(module, _ConvNd) and not module.transposed:
                module.register_forward_hook(self._keep(path))
            elif _is_norm(module):
                module.register_forward_pre_hook(self._take(path))
                module.register_forward_hook(self._compare(path))
        with torch.no_grad(), self:
            hooked(noise)
        uses = {path: self._uses[key] for key, (path, *_) in self._returned.items()}
        return {
            conv: norm
            for conv, norm in self._pairs.items()
            if uses[conv] == self._calls[conv] == self._calls[norm] == 1
        }

    def __torch_function__(
        self, function: Any, _types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        tensors = list(find_tensors((args, kwargs or {})))
        result = function(*args, **(kwargs or {}))
        if any(True for _ in find_tensors(result)):  # not for a shape, say
            self._uses.update({id(tensor) for tensor in tensors} & self._returned.keys())
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
            conv, taken, _ = self._returned[self._taken[path]]
            with torch._C.DisableTorchFunction():  # not to be counted
                folded = _fold(self._network.get_submodule(conv), norm)
                if folded is not None and is_close(output, _without_norm(norm)(folded(taken))):
                    self.folded[path] = folded
                    self._pairs[conv] = path

        return compare


def _is_norm(module: nn.Module) -> bool:
    return isinstance(getattr(module, "running_var", None), Tensor)


def _fold(conv: nn.Module, norm: nn.Module) -> nn.Module | None:
    """Fold a norm into a copy of a convolution; None if they are not of the usual make."""
    dtype = next(conv.parameters()).dtype
    weight, bias = (_to_double(conv._parameters.get(name)) for name in ("weight", "bias"))
    names = ("running_mean", "running_var", "weight", "bias")
    mean, variance, scale, shift = (_to_double(getattr(norm, name, None)) for name in names)
    if weight is None or mean is None or variance is None or len(mean) != len(weight):
        return None
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


def _cast_weights(
    network: InferenceNetwork,
    noise: Tensor,
    autocast: Callable[[], AbstractContextManager[Any]],
    dtype: torch.dtype,
) -> InferenceNetwork:
    """Cast the weights once that autocast would cast in each pass; the values are the same."""
    copied = share_weights(network.module)
    for module in copied.modules():
        if type(module) in _CAST:
            for name, weight in module._parameters.items():
                if weight is not None and weight.dtype == torch.float32:
                    cast = nn.Parameter(weight.detach().to(dtype), requires_grad=False)
                    module._parameters[name] = cast
    with autocast():
        same = _agree(network.module, copied, noise, tolerance=0)
    return InferenceNetwork(copied, network.convolutions) if same else network
