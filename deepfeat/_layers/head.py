"""The place in a network at which it classifies."""

import copy
from dataclasses import dataclass

import torch
from torch import nn

from .trace import first_tensor, make_blank, trace_calls

_PROBABILITIES = (nn.Softmax, nn.Softmax2d, nn.LogSoftmax, nn.Sigmoid, nn.LogSigmoid)


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
