"""Knows which part of a network is trained, how the rest is frozen, and where the two meet."""

import functools
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from ._heads import AUXILIARY, auxiliary_of, drop_auxiliary
from ._layers import LayerIndex
from ._trace import Call, first_tensor, make_blank, share_weights

Unfreeze: TypeAlias = str | int | list[str | int] | None
Fill: TypeAlias = Callable[..., Tensor]  # of a tensor like it and a shape

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
        return _lies_in(path, self.head) or _lies_in(path, self.backbone)


class Cut:
    """A network that is run in two parts: its frozen beginning, and the rest.

    Both run through copies of the modules that share the network's weights and follow its modes;
    the network itself is never touched, whatever happens. One thread at a time uses a cut.

    Parameters
    ----------
    module : torch.nn.Module
        The network.
    input_shape : tuple of int
        (C, H, W) of an image as the network takes it.
    boundary : str
        Path of the first module of the rest.
    skipped : mapping of str to tuple of int
        The frozen layers before it, with the shape of what each gives for an image.
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
        """Run the frozen beginning: return what the boundary takes."""
        self._follow_modes()
        try:
            self._prefix(batch)
        except _AtBoundary as reached:
            return reached.activations
        raise ValueError(f"{self.boundary!r} is not called in the forward pass.")

    def run_suffix(self, activations: Tensor, *, fill: Fill = Tensor.new_empty) -> Any:
        """Run the rest on what its boundary takes: return what the network does.

        The frozen layers before give memory that nobody has filled, in the right shapes, or what
        `fill` makes. What the network makes of that between them is lost where the boundary takes
        `activations` instead.
        """
        self._follow_modes()
        self._resumed.activations, self._resumed.fill = activations, fill
        try:
            return self._suffix(self._resumed.skip(self._input_shape))
        finally:
            self._resumed.activations = None

    def run(self, batch: Tensor, *, part: int) -> Any:
        """Run the frozen beginning some images at a time, and the rest on all of them."""
        with torch.no_grad():
            activations = torch.cat([self.run_prefix(some) for some in torch.split(batch, part)])
        return self.run_suffix(activations)

    def _follow_modes(self) -> None:
        for original, copied in self._pairs:
            if copied.training != original.training:
                copied.training = original.training


class _Resumed:
    """What the hooks of a network's second part put in the place of its first."""

    activations: Tensor | None = None
    fill: Fill

    def replace_input(self, _module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (self.activations, *inputs[1:])

    def skip(self, shape: tuple[int, ...], *_inputs: Any, **_options: Any) -> Tensor:
        assert self.activations is not None
        return self.fill(self.activations, (len(self.activations), *shape))


class _AtBoundary(Exception):
    """Leaves a forward pass with what the boundary was to take."""

    def __init__(self, activations: Tensor):
        super().__init__()
        self.activations = activations


def _leave(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    raise _AtBoundary(inputs[0])


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


def leave_out_unfit(module: nn.Module, trained: Trained, input_shape: tuple[int, ...]) -> Trained:
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
        [value for name, value in named if _lies_in(name, trained.head)],
        [value for name, value in named if not _lies_in(name, trained.head)],
    )


def find_cut(
    module: nn.Module, index: LayerIndex, trained: Trained, input_shape: tuple[int, ...]
) -> Cut | None:
    """Find where the frozen beginning ends.

    None where nothing is frozen before the rest, or where the rest needs more of it than what
    the boundary takes: that is tried.
    """
    found = _find_boundary(module, index, trained)
    if found is None:
        return None
    cut = Cut(module, input_shape, *found)
    anywhere = next(module.parameters())
    noise = torch.rand(2, *input_shape, generator=torch.Generator().manual_seed(0))
    noise = noise.to(anywhere.device, anywhere.dtype)
    module.eval()
    with torch.no_grad():
        whole = first_tensor(module(noise))
        try:
            activations = cut.run_prefix(noise)
            # In another order: tokens may come first, and images second.
            parts = first_tensor(cut.run_suffix(activations.flip(0), fill=_nans_like))
        except Exception:  # a module of the user may be put together in any way
            return None
    is_same = parts.shape == whole.shape and torch.allclose(
        parts.flip(0), whole, rtol=1e-4, atol=1e-5
    )
    return cut if is_same and len(activations) == len(noise) else None


def _find_boundary(
    module: nn.Module, index: LayerIndex, trained: Trained
) -> tuple[str, dict[str, tuple[int, ...]]] | None:
    """Find the first module that is not frozen, and the shapes of the frozen layers before it."""
    skipped: dict[str, tuple[int, ...]] = {}
    for path, call in index.calls.items():
        if path in trained.active or (path in index.units and _is_touched(module, path, trained)):
            unit = next((unit for unit in index.units if _lies_in(path, [unit])), path)
            return (_widest(unit, index, trained), skipped) if skipped else None
        if path in index.units:
            skipped[path] = call.raw_shape
    return None


def _widest(path: str, index: LayerIndex, trained: Trained) -> str:
    """Return the largest trained container that begins with a module; what has none, as it is.

    It may have parameters of its own, and dropouts, before the first of its layers.
    """
    places = [place for place, letter in enumerate(path) if letter == "."]
    containers = (path[:place] for place in places)
    return next((one for one in containers if one in trained and one in index.calls), path)


def _nans_like(activations: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Fill with what shows wherever it is used; old memory may hold the right values."""
    return activations.new_full(shape, math.nan)


# Order ------------------------------------------------------------------------------------------


def _lies_in(path: str, modules: Iterable[str]) -> bool:
    """Tell whether a path is one of these modules, or of what they hold."""
    return any(not module or f"{path}.".startswith(f"{module}.") for module in modules)


def _place(calls: Mapping[str, Call], path: str) -> float:
    """Return when a module, or the first of what it holds, was called."""
    return next((place for place, other in enumerate(calls) if _lies_in(other, [path])), math.inf)


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
            is_between = not _lies_in(path, index.units)
            if feeds_trained and is_between and path not in trained:
                yield path
        elif path in index.units and index.calls[path].parameters:
            feeds_trained = _is_touched(module, path, trained)


def _is_touched(module: nn.Module, path: str, trained: Trained) -> bool:
    """Tell whether a module is trained, or something that it holds."""
    inside = module.get_submodule(path).named_parameters()
    return path in trained or any(f"{path}.{name}" in trained for name, _ in inside)
