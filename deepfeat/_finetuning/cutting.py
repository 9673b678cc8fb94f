"""Cuts: a network run in two parts, its frozen beginning and the rest."""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from .._layers.index import LayerIndex
from .._layers.trace import first_tensor, share_weights
from .freezing import Trained, is_touched, lies_in, set_train_mode

Fill: TypeAlias = Callable[..., Tensor]  # makes a tensor from one of its kind and a shape


class Cut:
    """A network that is run in two parts: its frozen beginning (prefix) and the rest (suffix).

    Both parts are copies of the modules that share the network's weights and follow its modes, so
    that the network itself is never touched, not even by an error. A cut is not thread-safe.

    Parameters
    ----------
    module : torch.nn.Module
        The network.
    input_shape : tuple of int
        (C, H, W) of a prepared image.
    boundary : str
        Path of the first module of the suffix.
    skipped : mapping of str to tuple of int
        Paths of the frozen layers before it, with the output shape of each for one image.
    """

    def __init__(
        self,
        module: nn.Module,
        input_shape: tuple[int, ...],
        boundary: str,
        skipped: Mapping[str, tuple[int, ...]],
    ):
        self.boundary = boundary
        self.skipped = skipped
        self._input_shape = input_shape
        self._prefix, self._suffix = share_weights(module), share_weights(module)
        self._pairs = [
            pair
            for part in (self._prefix, self._suffix)
            for pair in zip(module.modules(), part.modules(), strict=True)
        ]
        self._resumed = _Resumed()
        self._prefix.get_submodule(boundary).register_forward_pre_hook(_leave)
        end = self._suffix.get_submodule(boundary)
        end.register_forward_pre_hook(self._resumed.replace_input)
        for path, shape in skipped.items():
            layer = self._suffix.get_submodule(path)
            layer.forward = functools.partial(self._resumed.skip, shape)

    def run_prefix(self, batch: Tensor) -> Tensor:
        """Run the frozen beginning; return the input of the boundary."""
        self._follow_modes()
        try:
            self._prefix(batch)
        except _AtBoundary as reached:
            return reached.activations
        raise ValueError(f"{self.boundary!r} is not called in the forward pass.")

    def run_suffix(self, activations: Tensor, *, fill: Fill = Tensor.new_empty) -> Any:
        """Run the rest on the input of its boundary; return the output of the network.

        The frozen layers before it return uninitialised memory of the right shapes, or what `fill`
        makes. Whatever is computed from that is discarded when the boundary takes `activations`
        instead.
        """
        self._follow_modes()
        self._resumed.activations, self._resumed.fill = activations, fill
        try:
            return self._suffix(self._resumed.skip(self._input_shape))
        finally:
            self._resumed.activations = None

    def run(self, batch: Tensor, *, part: int) -> Any:
        """Run the frozen beginning on `part` images at a time, and the rest on the whole batch."""
        with torch.no_grad():
            activations = torch.cat(
                [self.run_prefix(images) for images in torch.split(batch, part)]
            )
        return self.run_suffix(activations)

    def _follow_modes(self) -> None:
        for original, copied in self._pairs:
            if copied.training != original.training:
                copied.training = original.training


class _Resumed:
    """The hooks that replace the frozen beginning in the suffix."""

    activations: Tensor | None = None
    fill: Fill

    def replace_input(self, _module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self._find_activations(), *inputs[1:])

    def skip(self, shape: tuple[int, ...], *_inputs: Any, **_options: Any) -> Tensor:
        activations = self._find_activations()
        return self.fill(activations, (len(activations), *shape))

    def _find_activations(self) -> Tensor:
        if self.activations is None:  # gradient checkpointing runs it again to go backwards
            raise RuntimeError("The frozen beginning of a network is run outside of run_suffix.")
        return self.activations


class _AtBoundary(Exception):
    """Raised to end a forward pass at the boundary, with the boundary's input."""

    def __init__(self, activations: Tensor):
        super().__init__()
        self.activations = activations


def _leave(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    raise _AtBoundary(inputs[0])


def find_cut(module: nn.Module, index: LayerIndex, trained: Trained, samples: Tensor) -> Cut | None:
    """Cut a network where its frozen beginning ends.

    Returns None if nothing is frozen before the trained part, or if the suffix needs more than the
    boundary's input, forwards or backwards, which trial runs on `samples`, a batch of prepared
    images, show. The network is left in eval mode.
    """
    found = _find_boundary(module, index, trained)
    if found is None:
        return None
    cut = Cut(module, tuple(samples.shape[1:]), *found)
    module.eval()
    # Trials with NaN leave nothing behind, not even in a module that counts in eval mode.
    buffers = {buffer: buffer.clone() for buffer in module.buffers()}
    try:
        return cut if _gives_the_same(cut, module, trained, samples) else None
    finally:
        module.eval().zero_grad()
        with torch.no_grad():
            for buffer, before in buffers.items():
                buffer.copy_(before)


def _gives_the_same(cut: Cut, module: nn.Module, trained: Trained, samples: Tensor) -> bool:
    """Tell whether a cut gives what the network does, and can go backwards."""
    with torch.no_grad():
        whole = first_tensor(module(samples))
        try:
            activations = cut.run_prefix(samples)
            # In reverse order, because the first axis may be that of tokens, not of images.
            parts = first_tensor(cut.run_suffix(activations.flip(0), fill=_nans_like))
        except Exception:  # a user's module may be built in any way
            return False
    is_same = (
        len(activations) == len(samples)
        and parts.shape == whole.shape
        and torch.allclose(parts.flip(0), whole, rtol=1e-4, atol=1e-5)
    )
    return is_same and _learns_alone(cut, module, trained, activations)


def _learns_alone(cut: Cut, module: nn.Module, trained: Trained, activations: Tensor) -> bool:
    """Tell whether the suffix can go backwards."""
    device = activations.device
    set_train_mode(module, trained)
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.enable_grad():
            first_tensor(cut.run_suffix(activations)).sum().backward()  # type: ignore[no-untyped-call]
    except Exception:
        return False
    return True


def _find_boundary(
    module: nn.Module, index: LayerIndex, trained: Trained
) -> tuple[str, dict[str, tuple[int, ...]]] | None:
    """Find the first module that is not frozen, and the output shapes of the layers before it."""
    skipped: dict[str, tuple[int, ...]] = {}
    for path, call in index.calls.items():
        if path in trained.active or (path in index.units and is_touched(module, path, trained)):
            unit = next((unit for unit in index.units if lies_in(path, [unit])), path)
            return (_widest(unit, index, trained), skipped) if skipped else None
        if path in index.units:
            skipped[path] = call.raw_shape
    return None


def _widest(path: str, index: LayerIndex, trained: Trained) -> str:
    """Return the largest trained container around a module, or else the module itself.

    The container may have parameters of its own, and dropouts, before its first layer.
    """
    containers = (path[:end] for end, letter in enumerate(path) if letter == ".")
    return next((path for path in containers if path in trained and path in index.calls), path)


def _nans_like(activations: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Fill with NaN, which shows wherever it is used; old memory may hold the right values."""
    return activations.new_full(shape, math.nan)
