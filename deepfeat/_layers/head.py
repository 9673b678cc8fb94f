"""The head of a network: where it classifies, and its number of outputs."""

import copy
from dataclasses import dataclass

import torch
from torch import nn

from .trace import first_tensor, make_blank, trace_calls

_PROBABILITIES = (nn.Softmax, nn.Softmax2d, nn.LogSoftmax, nn.Sigmoid, nn.LogSigmoid)


@dataclass(frozen=True)
class HeadLocation:
    """The modules with which a network classifies, and its number of outputs.

    `layer` is the path of the last module with weights, `end` that of the last module of all. They
    differ in SqueezeNet, for instance, which pools after its last convolution.
    """

    layer: str
    end: str
    n_outputs: int


def find_head(module: nn.Module, input_shape: tuple[int, ...]) -> HeadLocation:
    """Find the head of a network; nothing is computed if it is on the meta device.

    Raises
    ------
    ValueError
        If the network does not return one vector per image, has no weights, or returns
        probabilities.
    """
    network = type(module).__name__
    calls = trace_calls(module, input_shape).calls
    leaves = [path for path in calls if not any(other.startswith(f"{path}.") for other in calls)]
    with_weights = [path for path in leaves if calls[path].parameters]
    if not with_weights:
        raise ValueError(f"{network} has no weights to train.")
    if isinstance(module.get_submodule(leaves[-1]), _PROBABILITIES):
        raise ValueError(
            f"{network} ends in {calls[leaves[-1]].kind}: the network must return logits, which "
            "the loss itself converts to probabilities."
        )
    shape = _output_shape(module, input_shape)
    if len(shape) != 1:
        raise ValueError(
            f"{network} must return one vector per image; got shape {shape}: add pooling and "
            "torch.nn.Flatten() at its end."
        )
    return HeadLocation(with_weights[-1], leaves[-1], shape[0])


def _output_shape(module: nn.Module, input_shape: tuple[int, ...]) -> tuple[int, ...]:
    with torch.no_grad():
        output = copy.deepcopy(module).eval()(make_blank(module, input_shape))
    try:
        return tuple(first_tensor(output).shape[1:])
    except TypeError as error:
        raise ValueError(
            f"{type(module).__name__} must return a tensor of logits; got "
            f"{type(output).__name__}: wrap it in a module that returns the logits."
        ) from error
