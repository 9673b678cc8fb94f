"""Freezing: the trained part of a network, in train mode, and the frozen rest, in eval mode."""

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
    `active` those of the dropouts before a trained layer.
    """

    head: tuple[str, ...]
    backbone: tuple[str, ...]
    active: tuple[str, ...]

    @property
    def has_auxiliary(self) -> bool:
        """Tell whether auxiliary classifiers are trained."""
        return not AUXILIARY.keys().isdisjoint(self.head)

    def __contains__(self, path: str) -> bool:
        """Tell whether a module, parameter or buffer is trained."""
        return lies_in(path, self.head) or lies_in(path, self.backbone)


def find_blocks(index: LayerIndex, module: nn.Module, unfreeze: Unfreeze) -> tuple[str, ...]:
    """Return the paths of the modules to unfreeze in a network that has no new head yet.

    Raises
    ------
    LayerNotFoundError
        If the network does not have a block of that name.
    ValueError
        If a block in a list does not have weights.
    """
    if unfreeze is None:
        return ()
    if unfreeze == "all":
        return ("",)
    if unfreeze == "last_stage":
        if index.last_stage is None:
            raise ValueError(
                f"{index.network} does not have stages, of which unfreeze='last_stage' trains the "
                "last: name a block of list_layers, 'all' or None."
            )
        unfreeze = index.last_stage
    if not isinstance(unfreeze, (list, tuple)):
        start = _first_call(index.calls, index.block(unfreeze)[0])
        return tuple(_find_all_from(module, index.calls, start))
    blocks: list[str] = []
    for name in unfreeze:
        paths = index.block(name)
        if not any(True for path in paths for _ in module.get_submodule(path).parameters()):
            raise ValueError(
                f"unfreeze must name blocks with weights; {name!r} does not have any to train."
            )
        blocks += paths
    return tuple(blocks)


def find_trained(
    module: nn.Module, index: LayerIndex, blocks: tuple[str, ...], head: tuple[str, ...]
) -> Trained:
    """Find the trained part of a network with a new head: the head, and some blocks."""
    first = min((_first_call(index.calls, block) for block in blocks), default=math.inf)
    auxiliary = [
        name for name in auxiliary_of(module) if first <= _first_call(index.calls, AUXILIARY[name])
    ]
    trained = Trained((*head, *auxiliary), blocks, ())
    return replace(trained, active=tuple(_active_dropouts(module, index, trained)))


def drop_small_auxiliary(
    module: nn.Module, trained: Trained, input_shape: tuple[int, ...]
) -> Trained:
    """Drop auxiliary classifiers, with a warning, if the feature maps are too small for them."""
    if not trained.has_auxiliary:
        return trained
    module.eval().training = True  # the outermost module alone: it then calls them
    try:
        with torch.no_grad():
            module(make_blank(module, input_shape))
    except RuntimeError:
        warnings.warn(
            f"Images of shape {input_shape} are too small for the auxiliary classifiers of "
            f"{type(module).__name__}, which are dropped.",
            UserWarning,
            stacklevel=2,
        )
        return replace(trained, head=tuple(path for path in trained.head if path not in AUXILIARY))
    finally:
        module.eval()
    return trained


def freeze(module: nn.Module, trained: Trained) -> None:
    """Freeze all but the trained part.

    Raises
    ------
    ValueError
        If the trained and the frozen part share a parameter.
    """
    is_trained: dict[nn.Parameter, bool] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if is_trained.setdefault(parameter, name in trained) != (name in trained):
            raise ValueError(
                f"{name} is shared by a trained and a frozen module: unfreeze both or neither."
            )
        parameter.requires_grad_(name in trained)
        parameter.grad = None


def drop_idle_auxiliary(module: nn.Module, trained: Trained) -> None:
    """Drop auxiliary classifiers outside the trained part, in place."""
    drop_auxiliary(module, [name for name in auxiliary_of(module) if name not in trained.head])


def set_train_mode(module: nn.Module, trained: Trained) -> None:
    """Set the trained part to train mode; the frozen part stays in eval mode, buffers included."""
    module.eval()
    for path in (*trained.head, *trained.backbone, *trained.active):
        module.get_submodule(path).train()
    # GoogLeNet and Inception call auxiliary classifiers if their outermost module is in train mode.
    module.training = trained.has_auxiliary or "" in trained.backbone


def group_parameters(
    module: nn.Module, trained: Trained
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the parameters of the head, and the other trained parameters."""
    named = [(name, value) for name, value in module.named_parameters() if name in trained]
    return (
        [value for name, value in named if lies_in(name, trained.head)],
        [value for name, value in named if not lies_in(name, trained.head)],
    )


# Order ------------------------------------------------------------------------------------------


def lies_in(path: str, modules: Iterable[str]) -> bool:
    """Tell whether a path is one of these modules, or lies within one."""
    return any(not module or f"{path}.".startswith(f"{module}.") for module in modules)


def _first_call(calls: Mapping[str, Call], path: str) -> float:
    """Return the index of the first call within a module; infinity if there is none."""
    return next((index for index, other in enumerate(calls) if lies_in(other, [path])), math.inf)


def _find_all_from(
    module: nn.Module, calls: Mapping[str, Call], start: float, path: str = ""
) -> Iterator[str]:
    """Yield the paths of the largest modules whose first call is the one at `start` or later.

    A container's own parameters count as its beginning.
    """
    if start <= _first_call(calls, path) < math.inf:
        yield path
        return
    for name, child in module.named_children():
        yield from _find_all_from(child, calls, start, f"{path}.{name}" if path else name)


def _active_dropouts(module: nn.Module, index: LayerIndex, trained: Trained) -> Iterator[str]:
    """Yield the dropouts between two layers of which the second one is trained."""
    feeds_trained = False
    for path in reversed(index.calls):
        if isinstance(module.get_submodule(path), _DROPOUTS):
            is_between = not lies_in(path, index.units)
            if feeds_trained and is_between and path not in trained:
                yield path
        elif path in index.units and index.calls[path].parameters:
            feeds_trained = is_touched(module, path, trained)


def is_touched(module: nn.Module, path: str, trained: Trained) -> bool:
    """Tell whether a module, or a part of it, is trained."""
    inside = module.get_submodule(path).named_parameters()
    return path in trained or any(f"{path}.{name}" in trained for name, _ in inside)
