"""Tokens: those of the patches of an image, and the prefix tokens before them."""

import re

from torch import nn

from .trace import Call, Trace

# The names of token parameters in torchvision, timm, transformers and the code of papers.
_CLASS_TOKEN = re.compile(r"(cls|class)_?(token|emb|embedding)s?_?\d*")
_OTHER_TOKEN = re.compile(r"(dist|distillation|reg|register|storage)_?tokens?_?\d*")


class Tokens:
    """The prefix tokens of each layer: a class token, registers and the like.

    Their largest possible number is given by timm's `num_prefix_tokens` and by the parameters that
    are tokens. Their number in one layer follows from the total number of its tokens, which
    exceeds the number of patches by that of the prefix tokens.
    """

    def __init__(self, module: nn.Module, trace: Trace):
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
        counts = [call.shape[0] for call in trace.calls.values() if _returns_tokens(call)]
        self._grids: frozenset[int] | set[int] = trace.grids
        if not any(self._count_prefix(count) is not None for count in counts):
            self._grids = set(counts[:1])  # patches that do not come from a convolution

    def find(self, call: Call) -> tuple[int, bool]:
        """Return the number of prefix tokens, and whether the first token is a class token."""
        if not _returns_tokens(call):
            return 0, False
        count = call.shape[0]
        prefix = self._count_prefix(count)
        if prefix is None:  # tokens without patches (the class tokens of CaiT's last blocks)
            return 0, self._has_class_token and count <= self._max_prefix
        return prefix, self._has_class_token and prefix > 0

    def _count_prefix(self, count: int) -> int | None:
        """Return the number of tokens before those of a grid; None if no grid fits the count."""
        candidates = (0, *range(self._max_prefix, 0, -1))  # the most likely first
        return next((prefix for prefix in candidates if count - prefix in self._grids), None)


def _returns_tokens(call: Call) -> bool:
    return len(call.shape) == 2 and call.channels_last
