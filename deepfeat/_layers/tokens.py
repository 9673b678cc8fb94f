"""Tokens: those of patches, and those that a network puts before them."""

import re

from torch import nn

from .trace import Call, Trace

# Parameters that are tokens, as torchvision, timm, transformers and papers' own code name them.
_CLASS_TOKEN = re.compile(r"(cls|class)_?(token|emb|embedding)s?_?\d*")
_OTHER_TOKEN = re.compile(r"(dist|distillation|reg|register|storage)_?tokens?_?\d*")


class Tokens:
    """Tells the tokens of patches from those that a network puts before them.

    How many the latter can be is known from timm's `num_prefix_tokens` and from the parameters
    that are tokens. How many a layer has follows from its own number of tokens: that of a grid of
    patches, or so many more.
    """

    def __init__(self, module: nn.Module, trace: Trace):
        named = [(name.rpartition(".")[2], value) for name, value in module.named_parameters()]
        self._has_class_token = any(_CLASS_TOKEN.fullmatch(name) for name, _ in named)
        declared = (getattr(part, "num_prefix_tokens", 0) for part in module.modules())
        self._most = max(
            sum(
                value.numel() // value.shape[-1]
                for name, value in named
                if _CLASS_TOKEN.fullmatch(name) or _OTHER_TOKEN.fullmatch(name)
            ),
            *(number for number in declared if isinstance(number, int)),
        )
        counts = [call.shape[0] for call in trace.calls.values() if _gives_tokens(call)]
        self._grids: frozenset[int] | set[int] = trace.grids
        if not any(self._count_before(count) is not None for count in counts):
            self._grids = set(counts[:1])  # patches that are no grid of a convolution

    def find(self, call: Call) -> tuple[int, bool]:
        """Return how many tokens come before the patches, and whether the first is of the class."""
        if not _gives_tokens(call):
            return 0, False
        count = call.shape[0]
        before = self._count_before(count)
        if before is None:  # tokens without patches (the class tokens of CaiT's last blocks)
            return 0, self._has_class_token and count <= self._most
        return before, self._has_class_token and before > 0

    def _count_before(self, count: int) -> int | None:
        """Return the number of tokens before a grid; None where no grid explains the count."""
        likely = (0, *range(self._most, 0, -1))
        return next((before for before in likely if count - before in self._grids), None)


def _gives_tokens(call: Call) -> bool:
    return len(call.shape) == 2 and call.channels_last
