"""The trace of a forward pass: which modules are called, and what they return."""

import copy
import functools
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

# Functions that return their channels on axis 1, the first of each image.
_CHANNELS_FIRST = {
    *(F.conv1d, F.conv2d, F.conv3d),
    *(F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d),
    *(F.unfold, F.batch_norm, F.group_norm, F.instance_norm),
}
# Functions that return their channels on the last axis.
_CHANNELS_LAST = {F.linear, F.layer_norm, F.embedding}
# Functions that return grids of positions, which may become tokens.
_GRIDS = {F.conv1d, F.conv2d, F.conv3d, F.unfold}


@dataclass(frozen=True)
class Value:
    """The first tensor that a module takes or returns.

    `shape` is the shape for one image: (C, H, W) for maps, even if the tensor is (H, W, C); (N, D)
    for tokens; (C, L) for a sequence with its channels first. `source` is the path of the module
    that has returned the same values, at most rearranged; empty if none has.
    """

    shape: tuple[int, ...]
    channels_last: bool  # maps are (H, W, C); always true of tokens
    source: str


@dataclass(frozen=True)
class Call:
    """The first call of a module in a forward pass.

    `shape` is the shape for one image: (C, H, W) for maps, even if the module returns (H, W, C);
    (N, D) for tokens; (C, L) for a sequence with its channels first. `is_passthrough` is whether
    the module returned its input, at most rearranged.
    """

    kind: str
    shape: tuple[int, ...]
    channels_last: bool  # maps are returned as (H, W, C); always true of tokens
    parameters: int
    multiply_adds: int
    output: int  # the same number if two modules return the same tensor
    is_passthrough: bool = False
    input: Value | None = None  # None if it takes no tensor

    @property
    def raw_shape(self) -> tuple[int, ...]:
        """The shape as the module returns it."""
        if len(self.shape) == 3 and self.channels_last:
            return (*self.shape[1:], self.shape[0])
        return self.shape


@dataclass(frozen=True)
class Trace:
    """The first call of every module in a forward pass, in the order in which they return.

    `grids` holds the numbers of positions in the outputs of convolutions, with their shapes.
    `output` is what the network returns; None if that is not a tensor.
    """

    calls: dict[str, Call]
    grids: dict[int, tuple[int, ...]]
    output: Value | None


def trace_calls(module: nn.Module, input_shape: tuple[int, ...]) -> Trace:
    """Run one image through a copy of a network and record what every module returns."""
    # Inference mode does not keep the versions of tensors, which show changes made in place.
    with torch.inference_mode(False), torch.no_grad():
        # Without gradients, since FlopCounterMode fails on parameters that are passed to a module.
        module = copy.deepcopy(module).eval().requires_grad_(False)
        tracer, axes = _Tracer(module), _ChannelAxes()
        blank = make_blank(module, input_shape)
        axes.mark(blank, 1)
        try:
            with tracer.counter, axes:
                output = module(blank)
        except Exception as error:  # a module of the user may raise anything
            raise ValueError(
                f"{type(module).__name__} does not accept an image of shape {input_shape}: {error}"
            ) from error
        try:
            returned = _describe(first_tensor(output))
        except TypeError:
            returned = None
    return Trace(tracer.calls, axes.grids, returned)


def share_weights(module: nn.Module) -> nn.Module:
    """Copy the modules of a network, but share its parameters and buffers.

    Changes to the modules of the copy, such as hooks, do not affect the network.
    """
    weights = itertools.chain(module.parameters(), module.buffers())
    return copy.deepcopy(module, {id(tensor): tensor for tensor in weights})


def make_blank(module: nn.Module, input_shape: tuple[int, ...]) -> Tensor:
    """Make a batch of one black image, with the dtype and device of a network's weights."""
    reference = next(module.parameters(), torch.empty(0))
    return torch.zeros(1, *input_shape, dtype=reference.dtype, device=reference.device)


def first_tensor(output: Any) -> Tensor:
    first = output[0] if isinstance(output, (tuple, list)) and output else output
    if not isinstance(first, Tensor):
        raise TypeError(f"A module must return a tensor; got {type(output).__name__}.")
    return first


class _Tracer:
    """Hooks that record the calls of a network's modules during a forward pass."""

    def __init__(self, module: nn.Module):
        self.calls: dict[str, Call] = {}
        # Only its total is confined to one thread: it counts per module with global hooks.
        self.counter = FlopCounterMode(display=False)
        self._entered: dict[nn.Module, tuple[int, list[tuple[Tensor, int]], Value | None]] = {}
        self._numbers = itertools.count()
        self._latest: tuple[Tensor | None, int, int] = (None, 0, 0)
        for path, child in module.named_modules():
            if path:
                child.register_forward_pre_hook(self._enter, with_kwargs=True)
                child.register_forward_hook(functools.partial(self._leave, path))

    def _enter(self, called: nn.Module, inputs: Any, options: Any) -> None:
        tensors = [(tensor, tensor._version) for tensor in find_tensors((inputs, options))]
        first = _describe(tensors[0][0]) if tensors else None
        self._entered[called] = self.counter.get_total_flops(), tensors, first

    def _leave(self, path: str, called: nn.Module, _inputs: Any, output: Any) -> None:
        flops, inputs, taken = self._entered.pop(called)
        spent = (self.counter.get_total_flops() - flops) // 2
        if path in self.calls:
            call = self.calls[path]
            self.calls[path] = replace(call, multiply_adds=call.multiply_adds + spent)
        try:
            first = first_tensor(output)
        except TypeError:
            return
        number = self._number(first)
        if path in self.calls or first.ndim < 2:
            return
        # Flattening may copy, depending on the memory layout of its input.
        is_passthrough = type(called) in (nn.Flatten, nn.Unflatten) or _is_unchanged(inputs, first)
        if type(called) in (nn.Flatten, nn.Unflatten) and taken is not None:
            _ChannelAxes.mark_source(first, taken.source)
        elif not is_passthrough and not _ChannelAxes.source_of(first):
            _ChannelAxes.mark_source(first, path)
        value = _describe(first)
        self.calls[path] = Call(
            type(called).__name__,
            value.shape,
            value.channels_last,
            sum(parameter.numel() for parameter in called.parameters()),
            spent,
            number,
            is_passthrough,
            taken,
        )

    def _number(self, output: Tensor) -> int:
        """Return the number of an output; the previous one if it is the same, unchanged tensor."""
        latest, version, number = self._latest
        if output is not latest or output._version != version:
            number = next(self._numbers)
        self._latest = output, output._version, number
        return number


def _describe(tensor: Tensor) -> Value:
    shape = tuple(tensor.shape[1:])
    axis = _ChannelAxes.of(tensor)
    # If the axis is unknown, three dimensions are taken for tokens, four for (C, H, W) maps.
    is_last = axis in (None, 2) if tensor.ndim == 3 else tensor.ndim == 4 and axis == 3
    shape = (shape[2], *shape[:2]) if is_last and len(shape) == 3 else shape
    return Value(shape, is_last, _ChannelAxes.source_of(tensor))


def _is_unchanged(inputs: list[tuple[Tensor, int]], output: Tensor) -> bool:
    """Return whether an output is an input, or a view of one, that still has its version."""
    return any(
        tensor.numel() == output.numel()
        and _share_memory(tensor, output)
        and tensor._version == version
        for tensor, version in inputs
    )


class _ChannelAxes(TorchFunctionMode):
    """Tracks, through all functions, the axis of a tensor that holds the channels of an image.

    And, through views, the module that has returned a tensor.
    """

    def __init__(self) -> None:
        super().__init__()
        self.grids: dict[int, tuple[int, ...]] = {}

    @staticmethod
    def mark(tensor: Tensor, axis: int) -> None:
        tensor._channel_axis = axis  # type: ignore[attr-defined]

    @staticmethod
    def of(tensor: Tensor) -> int | None:
        return getattr(tensor, "_channel_axis", None)

    @staticmethod
    def mark_source(tensor: Tensor, path: str) -> None:
        tensor._source = path, tensor._version  # type: ignore[attr-defined]

    @staticmethod
    def source_of(tensor: Tensor) -> str:
        path, version = getattr(tensor, "_source", ("", None))
        return path if version == tensor._version else ""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for output in find_tensors(result):
            axis = self._find(func, args, kwargs, output)
            if axis is not None:
                self.mark(output, axis)
            if func in _GRIDS:
                self.grids[output.shape[2:].numel()] = tuple(output.shape[2:])
            self._follow_source(args, output)
        return result

    def _follow_source(self, args: Any, output: Tensor) -> None:
        for tensor in find_tensors(args):
            path = self.source_of(tensor)
            is_view = tensor.numel() == output.numel() and _share_memory(tensor, output)
            if path and tensor is not output and is_view:
                self.mark_source(output, path)

    def _find(self, func: Any, args: Any, kwargs: Any, output: Tensor) -> int | None:
        if func in _CHANNELS_FIRST:
            return 1
        if func in _CHANNELS_LAST:
            return output.ndim - 1
        known = [
            (tensor, axis)
            for tensor in find_tensors((args, kwargs))
            if (axis := self.of(tensor)) is not None
        ]
        known.sort(key=lambda pair: pair[0].ndim != output.ndim)
        return _follow(*known[0], output) if known else None


def _follow(source: Tensor, axis: int, output: Tensor) -> int | None:
    """Find the axis of the channels in the output of a function from that of its input."""
    size = source.shape[axis]
    if output.shape == source.shape and output.stride() == source.stride():
        return axis
    axes = [other for other in range(1, output.ndim) if output.shape[other] == size]
    if _share_memory(source, output):  # permuted, sliced or reshaped
        step = source.stride(axis)
        return next((other for other in axes if output.stride(other) == step), None)
    if output.shape == source.shape:
        return axis
    if output.numel() == source.numel():  # reshaped into a copy
        before = source.shape[:axis].numel()
        return next((other for other in axes if output.shape[:other].numel() == before), None)
    return axis if output.ndim == source.ndim else None


def _share_memory(one: Tensor, other: Tensor) -> bool:
    if one.layout != torch.strided or other.layout != torch.strided:
        return one is other
    # On the meta device all memory has the address 0.
    return bool(one.untyped_storage()._cdata == other.untyped_storage()._cdata)


def find_tensors(values: Any) -> Iterator[Tensor]:
    """Yield the tensors in arguments or results, including those in lists and dictionaries."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, (list, tuple, dict)):
        items: Iterable[Any] = values.values() if isinstance(values, dict) else values
        for value in items:
            yield from find_tensors(value)
