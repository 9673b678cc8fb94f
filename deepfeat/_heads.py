"""Knows how a network gets a new head: its classification layer replaced, or one appended."""

import copy
import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor, nn
from torchvision.models import GoogLeNet, Inception3

from ._trace import first_tensor, make_blank, trace_calls

Head: TypeAlias = Literal["replace", "append"]

_PROBABILITIES = (nn.Softmax, nn.Softmax2d, nn.LogSoftmax, nn.Sigmoid, nn.LogSigmoid)

# GoogLeNet and Inception classify at these modules too while they learn, as a side job.
AUXILIARY = {"aux1": "inception4a", "aux2": "inception4d", "AuxLogits": "Mixed_6e"}


@dataclass(frozen=True)
class HeadPlace:
    """Where a network classifies.

    `layer` is the path of its last module with weights and `end` that of its last module of all:
    SqueezeNet pools after its last convolution. `n_outputs` is the length of what it puts out.
    """

    layer: str
    end: str
    n_outputs: int


def find_head(module: nn.Module, input_shape: tuple[int, ...]) -> HeadPlace:
    """Find where a network classifies; on the meta device nothing is computed for it.

    Raises
    ------
    ValueError
        If the network does not put out one vector an image, has no weights, or ends in
        probabilities.
    """
    network = type(module).__name__
    calls = trace_calls(module, input_shape).calls
    leaves = [path for path in calls if not any(other.startswith(f"{path}.") for other in calls)]
    learned = [path for path in leaves if calls[path].parameters]
    if not learned:
        raise ValueError(f"{network} has no weights that could be trained.")
    if isinstance(module.get_submodule(leaves[-1]), _PROBABILITIES):
        raise ValueError(
            f"{network} ends in {calls[leaves[-1]].kind}: the network must put out logits, which "
            "the loss turns into probabilities by itself."
        )
    shape = _output_shape(module, input_shape)
    if len(shape) != 1:
        raise ValueError(
            f"{network} puts out {shape} for an image, and one vector is needed: add pooling and "
            "torch.nn.Flatten() at its end."
        )
    return HeadPlace(learned[-1], leaves[-1], shape[0])


def add_head(module: nn.Module, place: HeadPlace, head: Head, n_classes: int, seed: int) -> str:
    """Give a network `n_classes` outputs, in place; return the path of its new layer.

    "replace" puts a new layer in the place of the classification layer, and in that of each
    auxiliary classifier. "append" lets ReLU and a new linear layer follow what the network put
    out, and leaves out auxiliary classifiers, which know the old classes alone.

    Raises
    ------
    ValueError
        If the last layer is none that classifies.
    """
    generator = torch.Generator().manual_seed(seed)
    if head == "append":
        drop_auxiliary(module, list(AUXILIARY))
        end, layer = module.get_submodule(place.end), module.get_submodule(place.layer)
        anywhere = next(module.parameters())
        linear = nn.Linear(place.n_outputs, n_classes, device="meta")
        _fill(linear, anywhere, generator)
        if not anywhere.is_meta and not any(bool(value.any()) for value in layer.parameters()):
            _fill(layer, anywhere, generator)  # a new ViT's is all zero: ReLU would keep it so
        steps = nn.Sequential(end, nn.ReLU(), linear)
        if place.end != place.layer:  # what pools at the end leaves maps of one pixel
            steps = nn.Sequential(end, nn.Flatten(), nn.ReLU(), linear)
        module.set_submodule(place.end, steps)
        return f"{place.end}.{len(steps) - 1}"
    _replace(module, place.layer, place.n_outputs, n_classes, generator)
    for name in auxiliary_of(module):
        layers = module.get_submodule(name).named_modules()
        linears = [path for path, layer in layers if isinstance(layer, nn.Linear)]
        _replace(module, f"{name}.{linears[-1]}", place.n_outputs, n_classes, generator)
    return place.layer


def auxiliary_of(module: nn.Module) -> list[str]:
    """Return the names of a network's auxiliary classifiers."""
    if not isinstance(module, (GoogLeNet, Inception3)):
        return []
    return [name for name in AUXILIARY if isinstance(getattr(module, name, None), nn.Module)]


def drop_auxiliary(module: nn.Module, names: list[str]) -> None:
    """Take auxiliary classifiers away, in place."""
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
            f"{type(module).__name__} ends in {path!r}, a {type(old).__name__}, which is no "
            f"classification layer with {n_outputs} outputs: nothing can take its place. Use "
            "head='append'."
        )
    _fill(new, next(old.parameters()), generator)
    module.set_submodule(path, new)


def _fill(layer: nn.Module, like: Tensor, generator: torch.Generator) -> None:
    """Draw weights as torch does, but from a generator of their own."""
    if like.is_meta:
        return
    layer.to_empty(device="cpu")
    weight, bias = layer.get_parameter("weight"), layer.get_parameter("bias")
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator)
    bound = 1 / math.sqrt(weight[0].numel())
    nn.init.uniform_(bias, -bound, bound, generator=generator)
    layer.to(like.device, like.dtype)


def _output_shape(module: nn.Module, input_shape: tuple[int, ...]) -> tuple[int, ...]:
    with torch.no_grad():
        output = copy.deepcopy(module).eval()(make_blank(module, input_shape))
    try:
        return tuple(first_tensor(output).shape[1:])
    except TypeError as error:
        raise ValueError(
            f"{type(module).__name__} puts out a {type(output).__name__}, and a tensor of logits "
            "is needed: wrap it in a module that returns these."
        ) from error
