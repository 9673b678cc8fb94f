"""Knows what happens in one forward pass: which modules are called, and what they give."""

import copy
import functools
import itertools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

# These take maps with their channels first.
_CHANNELS_FIRST = (nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d)


@dataclass(frozen=True)
class Call:
    """The first call of a module in a forward pass."""

    kind: str
    shape: tuple[int, ...]  # of one image, (C, H, W) for maps
    channels_last: bool
    parameters: int
    multiply_adds: int
    output: int  # the same number where modules put out the same tensor


def trace_calls(module: nn.Module, input_shape: tuple[int, ...]) -> dict[str, Call]:
    """Run one image through a copy; note the first call of every module, in order of return."""
    # Versions of tensors, which tell what was changed in place, are not kept in inference mode.
    with torch.inference_mode(False), torch.no_grad():
        module = copy.deepcopy(module).eval()
        tracer = _Tracer(module)
        try:
            with tracer.counter:
                module(make_blank(module, input_shape))
        except Exception as error:  # a module of the user may raise anything
            raise ValueError(
                f"{type(module).__name__} does not take an image of shape {input_shape}: {error}"
            ) from error
    return tracer.calls


def make_blank(module: nn.Module, input_shape: tuple[int, ...]) -> Tensor:
    """Make a batch of one black image, of the type and on the device of a network's weights."""
    anywhere = next(module.parameters(), torch.empty(0))
    return torch.zeros(1, *input_shape, dtype=anywhere.dtype, device=anywhere.device)


class _Tracer:
    """Hooks that note the calls of a network's modules while an image runs through it."""

    def __init__(self, module: nn.Module):
        self.calls: dict[str, Call] = {}
        # Of its counts only the total is one thread's own: modules are told apart by hooks of all.
        self.counter = FlopCounterMode(display=False)
        self._entered: dict[nn.Module, tuple[int, bool]] = {}
        self._channels_last = False
        self._numbers = itertools.count()
        self._latest: tuple[Tensor | None, int, int] = (None, 0, 0)
        for path, child in module.named_modules():
            if path:
                child.register_forward_pre_hook(self._enter)
                child.register_forward_hook(functools.partial(self._leave, path))

    def _enter(self, called: nn.Module, _inputs: Any) -> None:
        self._entered[called] = self.counter.get_total_flops(), self._channels_last

    def _leave(self, path: str, called: nn.Module, inputs: Any, output: Any) -> None:
        flops, came_last = self._entered[called]
        spent = (self.counter.get_total_flops() - flops) // 2
        if path in self.calls:
            call = self.calls[path]
            self.calls[path] = replace(call, multiply_adds=call.multiply_adds + spent)
        try:
            first = first_tensor(output)
        except TypeError:
            return
        self._channels_last = _layout_after(called, inputs, first, came_last, self._channels_last)
        number = self._number(first)
        if path in self.calls or first.ndim < 2:
            return
        is_last = first.ndim == 4 and self._channels_last
        shape = tuple(first.shape[1:])
        self.calls[path] = Call(
            type(called).__name__,
            (shape[2], *shape[:2]) if is_last else shape,
            is_last,
            sum(parameter.numel() for parameter in called.parameters()),
            spent,
            number,
        )

    def _number(self, output: Tensor) -> int:
        """Give an output its number: the last one's if it is that very tensor, unchanged since."""
        latest, version, number = self._latest
        if output is not latest or output._version != version:
            number = next(self._numbers)
        self._latest = output, output._version, number
        return number


def _layout_after(
    called: nn.Module, inputs: Any, output: Tensor, came_last: bool, channels_last: bool
) -> bool:
    """Follow whether 4-D tensors run with their channels last (inside Swin and ConvNeXt)."""
    kind = type(called).__name__
    if kind == "Permute":
        return list(getattr(called, "dims", ()))[1:] == [2, 3, 1]
    if kind == "WindowPartition":
        return True
    if isinstance(called, nn.Linear) or type(called) is nn.LayerNorm:
        return channels_last or output.ndim == 4
    if isinstance(called, _CHANNELS_FIRST) or kind == "WindowDepartition":
        return False
    if inputs and getattr(inputs[0], "shape", None) == output.shape:
        return came_last  # a block may permute by functions, which are not seen here, and back
    return channels_last


def first_tensor(output: Any) -> Tensor:
    first = output[0] if isinstance(output, (tuple, list)) and output else output
    if not isinstance(first, Tensor):
        raise TypeError(f"a layer gave {type(output).__name__}, not a tensor")
    return first
