"""Tokens: those of the patches of an image, and the prefix tokens before them."""

import copy
import itertools
import math
import re

import torch
from torch import nn

from .trace import Call, Trace, Value, first_tensor

# The names of token parameters in torchvision, timm, transformers and the code of papers.
_CLASS_TOKEN = re.compile(r"(cls|class)_?(token|emb|embedding)s?_?\d*")
_OTHER_TOKEN = re.compile(r"(dist|distillation|reg|register|storage)_?tokens?_?\d*")


class Tokens:
    """The prefix tokens of each layer: a class token, registers and the like.

    Their largest possible number is given by timm's `num_prefix_tokens` and by the parameters that
    are tokens. Their number in one layer follows from the total number of its tokens, which
    exceeds the number of patches by that of the prefix tokens.
    """

    def __init__(self, module: nn.Module, trace: Trace, input_shape: tuple[int, ...]):
        named = [(name.rpartition(".")[2], value) for name, value in module.named_parameters()]
        self._has_class_token = any(_CLASS_TOKEN.fullmatch(name) for name, _ in named)
        declared = (getattr(part, "num_prefix_tokens", 0) for part in module.modules())
        self._max_prefix = max(
            sum(
                value.numel() // value.shape[-1]
                for name, value in named
                if _CLASS_TOKEN.fullmatch(name) or _OTHER_TOKEN.fullmatch(name)
            ),
            *(number for number in declared if isinstance(number, int)),
        )
        counts = [call.shape[0] for call in trace.calls.values() if _are_tokens(call)]
        self._grids = trace.grids
        if not any(self._count_prefix(count) is not None for count in counts):
            # Patches that do not come from a convolution.
            self._grids = {count: _shape_grid(count, input_shape) for count in counts[:1]}
        self._is_reordered = any(
            _reorders(module.get_submodule(path), call) for path, call in trace.calls.items()
        )

    def find(self, value: Value | Call) -> tuple[int, bool, tuple[int, ...] | None]:
        """Return the number of prefix tokens, whether the first is a class token, and the grid.

        The grid is the shape (H, W) in which the other tokens lie; None if that is not known.
        """
        if not _are_tokens(value):
            return 0, False, None
        count = value.shape[0]
        prefix = self._count_prefix(count)
        if prefix is None:  # tokens without patches (the class tokens of CaiT's last blocks)
            return 0, self._has_class_token and count <= self._max_prefix, None
        grid = None if self._is_reordered else self._grids[count - prefix]
        return prefix, self._has_class_token and prefix > 0, grid

    def _count_prefix(self, count: int) -> int | None:
        """Return the number of tokens before those of a grid; None if no grid fits the count."""
        candidates = (0, *range(self._max_prefix, 0, -1))  # the most likely first
        return next((prefix for prefix in candidates if count - prefix in self._grids), None)


def _are_tokens(value: Value | Call) -> bool:
    return len(value.shape) == 2 and value.channels_last


def _reorders(module: nn.Module, call: Call) -> bool:
    """Tell whether a module returns its tokens in another order (Hiera, by windows).

    Only modules without weights are tried, on tokens of one value each.
    """
    is_tried = (
        _are_tokens(call)
        and call.input is not None
        and call.input.shape == call.shape
        and not call.is_passthrough
        and not type(module).__module__.startswith("torch.nn.")
        and not any(True for _ in itertools.chain(module.parameters(), module.buffers()))
    )
    if not is_tried:
        return False
    tokens = torch.linspace(0, 1, call.shape[0])[None, :, None].expand(1, *call.shape)
    try:
        found = first_tensor(copy.deepcopy(module).eval()(tokens.clone()))[0, :, 0]
    except Exception:  # it may take more than one tensor
        return False
    order = found.argsort(stable=True)
    return torch.equal(found[order], tokens[0, :, 0]) and not torch.equal(found, tokens[0, :, 0])


def _shape_grid(count: int, input_shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape (H, W) of so many patches of an image; if there is none, (count,)."""
    if len(input_shape) != 3:
        return (count,)
    _, height, width = input_shape
    rows = max(1, round(math.sqrt(count * height / width)))
    is_grid = count % rows == 0 and rows * width == count // rows * height
    return (rows, count // rows) if is_grid else (count,)
