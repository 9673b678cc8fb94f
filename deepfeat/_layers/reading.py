"""Reading of layers: a forward pass that ends at the deepest requested layer."""

import copy
import functools
import itertools
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from .index import ResolvedLayer
from .trace import find_tensors, first_tensor, make_blank


class ForwardPass:
    """A forward pass that reads layers of a network and stops after the deepest of them.

    If a module is called more than once, its first output is read; if an output is a tuple, its
    first element. The hooks are registered on a copy of the modules that shares their weights, so
    that the network itself never changes, not even when a pass is interrupted. Instances are not
    thread-safe, but every thread may have its own for the same network.

    Parameters
    ----------
    module : torch.nn.Module
        The network.
    layers : sequence of ResolvedLayer
        The layers to read.
    reduce : callable
        Function of a layer and its output that returns the tensor to keep, such as a pooled row
        per image.
    optional : collection of str, optional
        Names of layers that may be missing from the result: those that the network does not call
        for a batch, or that do not return one output per image.
    """

    def __init__(
        self,
        module: nn.Module,
        layers: Sequence[ResolvedLayer],
        reduce: Callable[[ResolvedLayer, Tensor], Tensor],
        optional: Collection[str] = (),
    ):
        self._module = share_weights(module)
        self._outputs = _Outputs(layers, reduce)
        self._optional = optional
        for path in self._outputs.layers:
            hook = functools.partial(self._outputs.record, path)
            self._module.get_submodule(path).register_forward_hook(hook)

    def __call__(self, batch: Tensor) -> dict[str, Tensor]:
        """Run a batch; return the reduced outputs by layer name.

        Raises
        ------
        ValueError
            If a layer that is not optional is not called, or does not return one output per image.
        """
        self._outputs.start()
        try:
            with suppress(_AllRead):
                self._module(batch)
            found = self._outputs.found
        finally:
            self._outputs.found = {}
        valid = {name: output for name, output in found.items() if len(output) == len(batch)}
        for name in self._outputs.names:
            if name not in valid and name not in self._optional:
                problem = "one output per image" if name in found else "a tensor"
                raise ValueError(f"Layer {name!r} does not return {problem} in the forward pass.")
        return valid


class _Outputs:
    """The outputs that hooks record in a forward pass.

    It does not refer to the modules, whose hooks refer to it, so that there is no reference cycle.
    """

    def __init__(
        self,
        layers: Sequence[ResolvedLayer],
        reduce: Callable[[ResolvedLayer, Tensor], Tensor],
    ):
        self.layers: dict[str, list[ResolvedLayer]] = {}
        for layer in layers:
            self.layers.setdefault(layer.path, []).append(layer)
        self.names = [layer.name for layer in layers]
        self.reduce = reduce
        self.start()

    def start(self) -> None:
        self.unread = set(self.layers)
        self.found: dict[str, Tensor] = {}

    def record(self, path: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
        if path not in self.unread:
            return
        self.unread.remove(path)
        try:
            tensor = first_tensor(output)
        except TypeError:  # unlike in the trace
            return
        for layer in self.layers[path]:
            self.found[layer.name] = _copy_if_shared(self.reduce(layer, tensor), tensor)
        if not self.unread:
            raise _AllRead


class _AllRead(Exception):
    """Ends a forward pass when every requested layer has been read."""


def _copy_if_shared(reduced: Tensor, output: Tensor) -> Tensor:
    """Copy a tensor that shares memory with an output, which an in-place ReLU may overwrite."""
    shared = reduced.untyped_storage().data_ptr() == output.untyped_storage().data_ptr()
    return reduced.clone() if shared else reduced


def share_weights(module: nn.Module) -> nn.Module:
    """Copy the modules of a network, but share its parameters and buffers.

    Changes to the modules of the copy, such as hooks, do not affect the network.
    """
    weights = itertools.chain(module.parameters(), module.buffers())
    return copy.deepcopy(module, {id(tensor): tensor for tensor in weights})


def prefer_channels_last(module: nn.Module, input_shape: tuple[int, ...]) -> nn.Module:
    """Copy a network to the channels-last memory format, which is faster, if it allows that.

    Some code requires maps to be contiguous channel by channel (`x.view(len(x), -1)`). Unless a
    trial run gives the same output, up to rounding, the network itself is returned.
    """
    if not any(weight.ndim == 4 for weight in module.parameters()):
        return module
    changed = copy.deepcopy(module).to(memory_format=torch.channels_last)
    noise = torch.rand(1, *input_shape, generator=torch.Generator().manual_seed(0))
    noise = noise.to(make_blank(module, ()))
    try:
        with torch.no_grad():
            expected, found = list(find_tensors(module(noise))), list(find_tensors(changed(noise)))
    except Exception:  # a network that fails in any format raises when the caller runs it
        return module
    pairs = itertools.zip_longest(expected, found)
    return changed if expected and all(itertools.starmap(_is_close, pairs)) else module


def _is_close(expected: Tensor | None, found: Tensor | None) -> bool:
    """Return whether two outputs are equal up to rounding, relative to the largest value."""
    if expected is None or found is None or expected.shape != found.shape:
        return False
    expected, found = expected.double(), found.double()
    finite = expected[expected.isfinite()].abs()
    scale = float(finite.max()) if finite.numel() else 0.0
    return torch.allclose(expected, found, rtol=0, atol=1e-4 * scale, equal_nan=True)
