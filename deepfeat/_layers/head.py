"""The head of a network: where it classifies, and its number of outputs."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .trace import Call, Trace, first_tensor, make_blank, share_weights, trace_calls

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
    leaves = _list_leaves(calls)
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


def find_classifiers(module: nn.Module, trace: Trace) -> tuple[str, ...]:
    """Return the paths of the modules that turn features into logits; empty if there is none.

    timm's networks name them; in others it is the last layer with weights, if it is a linear one
    and the network returns one value per output of it.
    """
    calls = trace.calls
    if is_of_timm(module):
        with torch.device("meta"):  # so that nothing is drawn
            heads = reset_heads(share_weights(module), 2)
        return tuple(path for path in heads if path in calls)
    with_weights = [path for path in _list_leaves(calls) if calls[path].parameters]
    if not with_weights or trace.output is None or len(trace.output.shape) != 1:
        return ()
    n_outputs = count_linear_outputs(module.get_submodule(with_weights[-1]))
    return (with_weights[-1],) if n_outputs == trace.output.shape[0] else ()


def reset_heads(module: nn.Module, n_classes: int) -> tuple[str, ...]:
    """Give a network of timm other classifiers, in place; return their paths.

    A classifier is what timm says, with all else that it makes anew for it, such as a norm.
    """
    old = {id(parameter) for parameter in module.parameters()}
    module.reset_classifier(n_classes)  # type: ignore[operator]
    found = module.get_classifier()  # type: ignore[operator]
    is_several = isinstance(found, (tuple, list, nn.ModuleList))
    paths = {part: path for path, part in module.named_modules()}
    is_new = {name: id(value) not in old for name, value in module.named_parameters()}
    heads = [paths[head] for head in (found if is_several else [found]) if head in paths]
    return tuple(heads if len(heads) > 1 else (_widen(head, is_new) for head in heads))


def _widen(path: str, is_new: Mapping[str, bool]) -> str:
    """Return the largest module around a new one that has other new weights, and only new ones."""
    container = path.rpartition(".")[0]
    while container:
        inside = [name for name in is_new if name.startswith(f"{container}.")]
        others = [name for name in inside if not name.startswith(f"{path}.")]
        if not others or not all(is_new[name] for name in inside):
            break
        path, container = container, container.rpartition(".")[0]
    return path


def is_of_timm(module: nn.Module) -> bool:
    """Tell whether a network has the methods with which timm's networks show their head."""
    return all(
        callable(getattr(module, name, None))
        for name in ("get_classifier", "reset_classifier", "forward_features", "forward_head")
    )


def count_pre_logits(module: nn.Module, input_shape: tuple[int, ...]) -> int:
    """Count the features that a network of timm gives its classifiers."""
    with torch.no_grad():
        module = copy.deepcopy(module).eval()
        features = module.forward_features(make_blank(module, input_shape))  # type: ignore[operator]
        before: Tensor = module.forward_head(features, pre_logits=True)  # type: ignore[operator]
    return before.shape[1]


def count_linear_outputs(layer: nn.Module) -> int | None:
    """Count the outputs of a linear layer or a 1 x 1 convolution; None of any other layer."""
    if isinstance(layer, nn.Linear):
        return layer.out_features
    if isinstance(layer, nn.Conv2d) and layer.kernel_size == (1, 1):
        return layer.out_channels
    return None


def _list_leaves(calls: Mapping[str, Call]) -> list[str]:
    return [path for path in calls if not any(other.startswith(f"{path}.") for other in calls)]


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
