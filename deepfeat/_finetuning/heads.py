"""New heads: a classification layer that replaces the old one, or is appended."""

import math
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torchvision.models import GoogLeNet, Inception3

from .._backbones.networks import Building
from .._layers.head import HeadLocation, reset_heads

Head: TypeAlias = Literal["replace", "append"]

# The auxiliary classifiers that GoogLeNet and Inception train with, and whose output each takes.
AUXILIARY = {"aux1": "inception4a", "aux2": "inception4d", "AuxLogits": "Mixed_6e"}


def add_head(
    module: nn.Module, location: HeadLocation, head: Head, n_classes: int, seed: int
) -> str:
    """Give a network `n_classes` outputs, in place; return the path of its new layer.

    "replace" replaces the classification layer, and that of each auxiliary classifier. "append"
    adds ReLU and a new linear layer after the network's output, and drops auxiliary classifiers,
    which only know the old classes.

    Raises
    ------
    ValueError
        If the last layer is not a classification layer and so cannot be replaced.
    """
    generator = torch.Generator().manual_seed(seed)
    if head == "append":
        drop_auxiliary(module, list(AUXILIARY))
        end, layer = module.get_submodule(location.end), module.get_submodule(location.layer)
        reference = next(module.parameters())
        linear = nn.Linear(location.n_outputs, n_classes, device="meta")
        _fill(linear, reference, generator)
        if not reference.is_meta and not any(bool(value.any()) for value in layer.parameters()):
            _fill(layer, reference, generator)  # a new ViT's is all zero: no gradient passes ReLU
        steps = nn.Sequential(end, nn.ReLU(), linear)
        if location.end != location.layer:  # pooling at the end leaves maps of one pixel
            steps = nn.Sequential(end, nn.Flatten(), nn.ReLU(), linear)
        module.set_submodule(location.end, steps)
        return f"{location.end}.{len(steps) - 1}"
    _replace(module, location.layer, location.n_outputs, n_classes, generator)
    for name in auxiliary_of(module):
        layers = module.get_submodule(name).named_modules()
        linears = [path for path, layer in layers if isinstance(layer, nn.Linear)]
        _replace(module, f"{name}.{linears[-1]}", location.n_outputs, n_classes, generator)
    return location.layer


def reset_classifier(module: nn.Module, n_classes: int, seed: int) -> tuple[str, ...]:
    """Give a network of timm `n_classes` outputs, in place; return the paths of its new layers.

    timm knows more heads than can be told from the layers: several, with a norm, or none so far.
    """
    reference = next(module.parameters())
    with Building(seed):
        heads = reset_heads(module, n_classes)
    for head in heads:
        module.get_submodule(head).to(reference.device, reference.dtype)
    return heads


def auxiliary_of(module: nn.Module) -> list[str]:
    """Return the names of a network's auxiliary classifiers."""
    if not isinstance(module, (GoogLeNet, Inception3)):
        return []
    return [name for name in AUXILIARY if isinstance(getattr(module, name, None), nn.Module)]


def drop_auxiliary(module: nn.Module, names: list[str]) -> None:
    """Drop auxiliary classifiers, in place."""
    for name in set(names).intersection(auxiliary_of(module)):
        setattr(module, name, None)
    if hasattr(module, "aux_logits"):
        module.aux_logits = bool(auxiliary_of(module))  # type: ignore[assignment]


def _replace(
    module: nn.Module, path: str, n_outputs: int, n_classes: int, generator: torch.Generator
) -> None:
    old = module.get_submodule(path)
    new: nn.Module
    if isinstance(old, nn.Linear) and old.out_features == n_outputs:
        new = nn.Linear(old.in_features, n_classes, device="meta")
    elif isinstance(old, nn.Conv2d) and (*old.kernel_size, old.out_channels) == (1, 1, n_outputs):
        new = nn.Conv2d(old.in_channels, n_classes, 1, device="meta")
    else:
        raise ValueError(
            "head='replace' needs a classification layer to replace, but "
            f"{type(module).__name__} ends in {path!r}, a {type(old).__name__}, which is not one "
            f"with {n_outputs} outputs. Use head='append'."
        )
    _fill(new, next(old.parameters()), generator)
    module.set_submodule(path, new)


def _fill(layer: nn.Module, like: Tensor, generator: torch.Generator) -> None:
    """Draw weights as torch does, but from the generator given."""
    if like.is_meta:
        return
    layer.to_empty(device="cpu")
    weight, bias = layer.get_parameter("weight"), layer.get_parameter("bias")
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator)
    bound = 1 / math.sqrt(weight[0].numel())
    nn.init.uniform_(bias, -bound, bound, generator=generator)
    layer.to(like.device, like.dtype)
