"""Reading layers: one forward pass, as far as the deepest layer asked for."""

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
    """A forward pass that reads layers of a network and ends with the deepest of them.

    If a module is called more than once, its first call is read; of a tuple, its first element.
    The hooks are on a copy of the modules, which shares the weights: whatever happens, the network
    itself is never touched. One thread at a time can use a pass; a network can have many passes.

    Parameters
    ----------
    module : torch.nn.Module
        The network.
    layers : sequence of ResolvedLayer
        What to read.
    reduce : callable
        Turns a layer and its output into what is kept of it.
    optional : collection of str, optional
        Names of layers that are left out of a batch for which the network does not call them, or
        does not give one output per image.
    """

    def __init__(
        self,
        module: nn.Module,
        layers: Sequence[ResolvedLayer],
        reduce: Callable[[ResolvedLayer, Tensor], Tensor],
        optional: Collection[str] = (),
    ):
        self._module = share_weights(module)
        self._kept = _Kept(layers, reduce)
        self._optional = optional
        for path in self._kept.layers:
            hook = functools.partial(self._kept.keep, path)
            self._module.get_submodule(path).register_forward_hook(hook)

    def __call__(self, batch: Tensor) -> dict[str, Tensor]:
        """Run a batch; return what `reduce` makes of each output, by name.

        Raises
        ------
        ValueError
            If a layer that is not optional is not called, or does not give one output per image.
        """
        kept = self._kept
        kept.start()
        try:
            with suppress(_AllRead):
                self._module(batch)
            outputs = kept.outputs
        finally:
            kept.outputs = {}
        good = {name: output for name, output in outputs.items() if len(output) == len(batch)}
        for name in kept.names:
            if name not in good and name not in self._optional:
                fault = (
                    "does not give one output per image" if name in outputs else "gives no tensor"
                )
                raise ValueError(f"layer {name!r} {fault} in the forward pass.")
        return good


class _Kept:
    """What hooks keep of a forward pass. It knows nothing of the modules, which know it."""

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
        self.outputs: dict[str, Tensor] = {}

    def keep(self, path: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
        if path not in self.unread:
            return
        self.unread.remove(path)
        try:
            given = first_tensor(output)
        except TypeError:  # not what its trace has shown
            return
        for layer in self.layers[path]:
            self.outputs[layer.name] = _detached(self.reduce(layer, given), given)
        if not self.unread:
            raise _AllRead  # nothing after the deepest layer is needed


class _AllRead(Exception):
    """Leaves a forward pass once every layer asked for has been read."""


def _detached(kept: Tensor, output: Tensor) -> Tensor:
    """Copy what still shares memory with the output: an in-place ReLU may overwrite that next."""
    shared = kept.untyped_storage().data_ptr() == output.untyped_storage().data_ptr()
    return kept.clone() if shared else kept


def share_weights(module: nn.Module) -> nn.Module:
    """Copy the modules of a network, but none of its parameters and buffers.

    What is done to the copy, hooks for instance, is never seen by the network.
    """
    weights = itertools.chain(module.parameters(), module.buffers())
    return copy.deepcopy(module, {id(tensor): tensor for tensor in weights})


def prefer_channels_last(module: nn.Module, input_shape: tuple[int, ...]) -> nn.Module:
    """Lay a network's weights out with the channels last, which is faster, if it allows for that.

    Some code takes maps to lie in memory channel by channel (`x.view(len(x), -1)`). A trial run
    must give the same output, to rounding; else the network is returned as it is.
    """
    if not any(weight.ndim == 4 for weight in module.parameters()):
        return module
    changed = copy.deepcopy(module).to(memory_format=torch.channels_last)
    noise = torch.rand(1, *input_shape, generator=torch.Generator().manual_seed(0))
    noise = noise.to(make_blank(module, ()))
    try:
        with torch.no_grad():
            expected, found = list(find_tensors(module(noise))), list(find_tensors(changed(noise)))
    except Exception:  # also where it fails in any layout: then whoever runs it is told
        return module
    pairs = itertools.zip_longest(expected, found)
    return changed if expected and all(_is_close(one, other) for one, other in pairs) else module


def _is_close(one: Tensor | None, other: Tensor | None) -> bool:
    """Tell whether two outputs are the same, to rounding, as measured by the largest value."""
    if one is None or other is None or one.shape != other.shape:
        return False
    one, other = one.double(), other.double()
    finite = one[one.isfinite()].abs()
    scale = float(finite.max()) if finite.numel() else 0.0
    return torch.allclose(one, other, rtol=0, atol=1e-4 * scale, equal_nan=True)
