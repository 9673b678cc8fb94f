"""Networks with new heads, built from a backbone or from a state dict."""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .._backbones.find import Backbone
from .._extraction.readers import load_network
from .._layers.head import HeadLocation, find_head, is_of_timm
from .._layers.inference import prefer_channels_last
from .heads import AUXILIARY, Head, add_head, drop_auxiliary, reset_classifier


@dataclass(frozen=True)
class Network:
    """A network with a new head.

    `head` has the paths of the new layers; timm has a few networks with two. `n_outputs` is the
    number of outputs before they came.
    """

    module: nn.Module
    head: tuple[str, ...]
    n_outputs: int


def build_network(
    backbone: Backbone, head: Head, n_classes: int, device: torch.device, seed: int
) -> Network:
    """Load a backbone and give a copy of it a new head with random weights.

    Raises
    ------
    ValueError
        If the backbone cannot have such a head.
    OSError
        If the weights cannot be downloaded.
    """
    input_shape = backbone.preprocessing.input_shape
    location = _find_head(backbone.skeleton, head, input_shape)
    module = load_network(backbone, device)
    module = copy.deepcopy(module) if backbone.shared else module
    paths = _add_head(module, location, head, n_classes, seed)
    if not backbone.shared:  # a user's network may compute in ways that its modules do not show
        _check_head(module, head, input_shape)
    return Network(module, paths, _count_outputs(backbone.skeleton, location))


def rebuild_network(
    backbone: Backbone,
    head: Head,
    n_classes: int,
    n_outputs: int,
    state: dict[str, Tensor],
    *,
    pretrained: bool,
) -> Network:
    """Build a network from a state dict, on the CPU.

    Raises
    ------
    RuntimeError
        If the state dict belongs to another network.
    """
    module = backbone.build()
    if hasattr(module, "transform_input"):  # it rescales inputs for its weights
        module.transform_input = pretrained  # type: ignore[assignment]
    input_shape = backbone.preprocessing.input_shape
    # The skeleton may have the outputs of its weights instead of those of a new network.
    location = _find_head(copy.deepcopy(module).to("meta"), head, input_shape)
    if location is not None and n_outputs != location.n_outputs:  # of a file with other classes
        _add_head(module, None if is_of_timm(module) else location, "replace", n_outputs, 0)
        location = find_head(copy.deepcopy(module).to("meta"), input_shape)
    paths = _add_head(module, location, head, n_classes, 0)
    drop_auxiliary(module, _missing_auxiliary(state))
    loaded = module.state_dict()  # for its metadata, which MNASNet needs
    loaded.clear()
    loaded.update(state)
    module.load_state_dict(loaded, strict=True, assign=True)
    module = module.eval().requires_grad_(False)
    if backbone.shared:
        module = module.to(memory_format=torch.channels_last)
    else:
        module = prefer_channels_last(module, input_shape)
    return Network(module, paths, n_outputs)


def _find_head(
    skeleton: nn.Module, head: Head, input_shape: tuple[int, ...]
) -> HeadLocation | None:
    """Find the head of a network; None if timm itself replaces it."""
    if head == "replace" and is_of_timm(skeleton):
        return None
    return find_head(skeleton, input_shape)


def _add_head(
    module: nn.Module, location: HeadLocation | None, head: Head, n_classes: int, seed: int
) -> tuple[str, ...]:
    if location is None:
        return reset_classifier(module, n_classes, seed)
    return (add_head(module, location, head, n_classes, seed),)


def _count_outputs(skeleton: nn.Module, location: HeadLocation | None) -> int:
    count = skeleton.num_classes if location is None else location.n_outputs
    assert isinstance(count, int)
    return count


def _missing_auxiliary(state: dict[str, Tensor]) -> list[str]:
    return [name for name in AUXILIARY if not any(key.startswith(f"{name}.") for key in state)]


def _check_head(module: nn.Module, head: Head, input_shape: tuple[int, ...]) -> None:
    try:
        find_head(module, input_shape)
    except ValueError as error:
        raise ValueError(f"{head=} is not possible for {type(module).__name__}: {error}") from error
