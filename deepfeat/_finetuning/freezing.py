"""Freezing: which part of a network is trained, and how the rest stays as it is."""

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import nn

from .._layers.index import LayerIndex
from .._layers.trace import Call, make_blank
from .heads import AUXILIARY, auxiliary_of, drop_auxiliary

Unfreeze: TypeAlias = str | int | list[str | int] | None

_DROPOUTS = (
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
    *(nn.AlphaDropout, nn.FeatureAlphaDropout),
)


@dataclass(frozen=True)
class Trained:
    """The trained part of a network.

    `head` has the paths of the new layers, `backbone` those of the other trained modules, and
    `active` those of the dropouts that act on the input of a trained layer.
    """

    head: tuple[str, ...]
    backbone: tuple[str, ...]
    active: tuple[str, ...]

    def __contains__(self, path: str) -> bool:
        """Tell whether a module, or a parameter or buffer, is trained."""
        return lies_in(path, self.head) or lies_in(path, self.backbone)


def find_blocks(names: LayerIndex, module: nn.Module, unfreeze: Unfreeze) -> tuple[str, ...]:
    """Return the paths of what `unfreeze` names in a network that has no new head yet.

    Raises
    ------
    LayerNotFoundError
        If a name is none of the network's.
    ValueError
        If a block in a list has no weights.
    """
    if unfreeze is None:
        return ()
    if unfreeze == "all":
        return ("",)
    if not isinstance(unfreeze, (list, tuple)):
        return tuple(_with_all_after(module, names.calls, names.block(unfreeze)[0]))
    blocks: list[str] = []
    for name in unfreeze:
        paths = names.block(name)
        if not any(True for path in paths for _ in module.get_submodule(path).parameters()):
            raise ValueError(f"unfreeze: {name!r} has no weights that could be trained.")
        blocks += paths
    return tuple(blocks)


def find_trained(
    module: nn.Module, index: LayerIndex, blocks: tuple[str, ...], head: str
) -> Trained:
    """Find what is trained of a network with a new head: that, and some blocks."""
    first = min((_place(index.calls, block) for block in blocks), default=math.inf)
    auxiliary = [
        name for name in auxiliary_of(module) if first <= _place(index.calls, AUXILIARY[name])
    ]
    trained = Trained((head, *auxiliary), blocks, ())
    return replace(trained, active=tuple(_active_dropouts(module, index, trained)))


def drop_small_auxiliary(
    module: nn.Module, trained: Trained, input_shape: tuple[int, ...]
) -> Trained:
    """Leave out auxiliary classifiers, with a warning, if they do not take maps so small."""
    if len(trained.head) == 1:
        return trained
    module.eval().training = True  # of the outermost module alone: it calls them, nothing learns
    try:
        with torch.no_grad():
            module(make_blank(module, input_shape))
    except RuntimeError:
        warnings.warn(
            f"images of shape {input_shape} are too small for the auxiliary classifiers of "
            f"{type(module).__name__}, which are left out.",
            UserWarning,
            stacklevel=2,
        )
        return replace(trained, head=trained.head[:1])
    finally:
        module.eval()
    return trained


def freeze(module: nn.Module, trained: Trained) -> None:
    """Freeze all that is not trained, and take away auxiliary classifiers that would be.

    Raises
    ------
    ValueError
        If a parameter belongs to both.
    """
    idle = [name for name in auxiliary_of(module) if name not in trained.head]
    drop_auxiliary(module, idle)
    is_trained: dict[nn.Parameter, bool] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if is_trained.setdefault(parameter, name in trained) != (name in trained):
            raise ValueError(
                f"{name} is shared between a module that is trained and one that is frozen: "
                "unfreeze both, or neither."
            )
        parameter.requires_grad_(name in trained)
        parameter.grad = None


def set_train_mode(module: nn.Module, trained: Trained) -> None:
    """Set the trained part to train mode; what is frozen stays in eval mode, buffers and all."""
    module.eval()
    for path in (*trained.head, *trained.backbone, *trained.active):
        module.get_submodule(path).train()
    # GoogLeNet and Inception ask their outermost module whether to call auxiliary classifiers.
    module.training = len(trained.head) > 1 or "" in trained.backbone


def group_parameters(
    module: nn.Module, trained: Trained
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the parameters of the head, and the other trained ones."""
    named = [(name, value) for name, value in module.named_parameters() if name in trained]
    return (
        [value for name, value in named if lies_in(name, trained.head)],
        [value for name, value in named if not lies_in(name, trained.head)],
    )


# Order ------------------------------------------------------------------------------------------


def lies_in(path: str, modules: Iterable[str]) -> bool:
    """Tell whether a path is one of these modules, or of what they hold."""
    return any(not module or f"{path}.".startswith(f"{module}.") for module in modules)


def _place(calls: Mapping[str, Call], path: str) -> float:
    """Return when a module, or the first of what it holds, was called."""
    return next((place for place, other in enumerate(calls) if lies_in(other, [path])), math.inf)


def _with_all_after(module: nn.Module, calls: Mapping[str, Call], path: str) -> list[str]:
    """Return the path of a module, and those of all modules that are called after it.

    Parameters of a container's own count as its beginning.
    """
    trained, is_whole = [path], True
    while path:
        parent = path.rpartition(".")[0]
        siblings = [
            f"{parent}.{name}" if parent else name
            for name, _ in module.get_submodule(parent).named_children()
        ]
        start = _place(calls, path)
        later = [one for one in siblings if start < _place(calls, one) < math.inf]
        is_whole = is_whole and not any(_place(calls, one) < start for one in siblings)
        trained = [parent] if is_whole else trained + later
        path = parent
    return trained


def _active_dropouts(module: nn.Module, index: LayerIndex, trained: Trained) -> Iterator[str]:
    """Yield the dropouts between two layers that act on what a trained one takes."""
    feeds_trained = False
    for path in reversed(index.calls):
        if isinstance(module.get_submodule(path), _DROPOUTS):
            is_between = not lies_in(path, index.units)
            if feeds_trained and is_between and path not in trained:
                yield path
        elif path in index.units and index.calls[path].parameters:
            feeds_trained = is_touched(module, path, trained)


def is_touched(module: nn.Module, path: str, trained: Trained) -> bool:
    """Tell whether a module is trained, or something that it holds."""
    inside = module.get_submodule(path).named_parameters()
    return path in trained or any(f"{path}.{name}" in trained for name, _ in inside)
