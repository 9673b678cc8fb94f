"""The layers of a network: their names, shapes and costs."""

import difflib
import math
import numbers
import re
from dataclasses import dataclass, replace
from typing import Literal

from torch import nn

from .head import count_pre_logits, find_classifiers
from .names import (
    caffe_names,
    choose_stages,
    container_aliases,
    count_parameters,
    declared_stages,
    find_stages,
    find_units,
)
from .tokens import Tokens
from .trace import Call, Trace, Value, trace_calls

PENULTIMATE = "penultimate"


class LayerNotFoundError(ValueError):
    """The network does not have the requested layer; the message lists close matches."""

    __module__ = "deepfeat"  # so that pickles outlive moves


@dataclass(frozen=True)
class Layer:
    """One layer of a network.

    Attributes
    ----------
    name : str
        The canonical name: Caffe's for AlexNet and VGG, otherwise the module path.
    aliases : tuple of str
        Other names of the same output.
    kind : str
        The class of the module.
    output_shape : tuple of int
        Shape for one image: (C, H, W) for maps, (N, D) for tokens, (C, L) for a sequence with its
        channels first, (D,) for a vector.
    n_features : int
        Number of features after pooling.
    parameters : int
        Number of weights and biases. A container's own, such as a class token, are counted with
        its first layer; those of modules outside the forward pass, such as an auxiliary
        classifier, with the last layer that has weights.
    multiply_adds : int
        Multiply-adds per image.
    """

    name: str
    aliases: tuple[str, ...]
    kind: str
    output_shape: tuple[int, ...]
    n_features: int
    parameters: int
    multiply_adds: int


class LayerTable(list[Layer]):
    """The layers of a network, in the order of computation; `pandas.DataFrame` accepts it."""

    def __repr__(self) -> str:
        head = ("", "name", "aliases", "kind", "output", "features", "parameters", "multiply-adds")
        rows = [head, *(_cells(index, layer) for index, layer in enumerate(self))]
        widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if 0 < column < 5 else cell.rjust(width)
                for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        )


@dataclass(frozen=True)
class ResolvedLayer:
    """The module that a layer is read from, and the layout of its output.

    The path of the network itself is empty.
    """

    name: str
    path: str
    output_shape: tuple[int, ...]
    channels_last: bool = False  # maps are returned as (H, W, C), tokens as (N, D)
    prefix_tokens: int = 0  # the number of tokens before those of the patches
    class_token: bool = False  # whether the first token represents the whole image
    grid: tuple[int, ...] | None = None  # shape in which the tokens of the patches lie
    reads: Literal["output", "input", "pre-logits"] = "output"  # of the module
    rectified: bool = False  # whether ReLU is applied to the output

    @property
    def source(self) -> str:
        """A string that identifies the tensor that is read."""
        return self.path if self.reads == "output" else f"{self.reads} of {self.path}".rstrip()


class LayerIndex:
    """The layers of a network at one input size, which are listed and resolved by name.

    `calls` holds the first call of every module, in the order in which they return; `units` are
    the paths of the layers in `table`.

    Parameters
    ----------
    module : torch.nn.Module
        The network, on any device; it is not changed. On the meta device nothing is computed.
    input_shape : tuple of int
        (C, H, W) of a preprocessed image.
    """

    def __init__(self, module: nn.Module, input_shape: tuple[int, ...]):
        self.network = type(module).__name__
        trace = trace_calls(module, input_shape)
        self.calls = trace.calls
        self._tokens = Tokens(module, trace, input_shape)
        modules = {path for path, _ in module.named_modules() if path}
        self._without_tensor = modules - self.calls.keys()
        declared = declared_stages(module, self.calls)
        units = set(find_units(module, self.calls, declared))
        paths = [path for path in self.calls if path in units]  # in the order of computation
        paths = [path for path in paths if not self.calls[path].is_passthrough]
        self.units = tuple(paths)
        parameters = count_parameters(module, paths)
        caffe = caffe_names(module, paths)
        aliases = container_aliases(paths, self.calls)
        for number, path in enumerate(find_stages(module, paths, self.calls, declared), start=1):
            if f"stage{number}" not in self.calls:  # ShuffleNet has modules of this name
                aliases[path].append(f"stage{number}")
        classifiers = find_classifiers(module, trace)
        penultimate = self._find_penultimate(module, input_shape, trace, classifiers)
        if penultimate is not None and penultimate.source in aliases:
            aliases[penultimate.source].append(PENULTIMATE)
        self._resolved: dict[str, ResolvedLayer] = {}
        self._stages = choose_stages(caffe, paths, aliases)
        self.table = LayerTable()
        for path in paths:
            names = [caffe[path], path] if path in caffe else [path]
            self._add(path, self.calls[path], (*names, *aliases[path]), parameters[path])
        if "fc8" in caffe.values() and "relu8" not in caffe.values():
            self._add_relu8()
        if penultimate is not None:
            self._add_penultimate(penultimate, classifiers)
        for path, call in self.calls.items():
            self._resolved.setdefault(path, self._resolve_call(path, path, call))
        if not self._resolved:
            raise ValueError(
                f"{self.network} has no layers: it does not call any module that returns a tensor."
            )

    def resolve(self, layer: str | int) -> ResolvedLayer:
        """Return the layer with a given name, alias, module path or index in the table."""
        if isinstance(layer, str):
            if layer in self._without_tensor:
                raise LayerNotFoundError(
                    f"{self.network} does not call {layer!r} in its forward pass, or the module "
                    "does not return a tensor."
                )
            if layer in self._resolved:
                return self._resolved[layer]
            close = difflib.get_close_matches(layer, self._resolved)
            names = [entry.name for entry in self.table] or list(self._resolved)
            listed = ", ".join(map(repr, close or names[-3:]))
            raise LayerNotFoundError(
                f"{self.network} has no layer {layer!r}. "
                + (f"Close matches: {listed}." if close else f"Its last layers are {listed}.")
            )
        if not isinstance(layer, numbers.Integral) or isinstance(layer, bool):
            raise TypeError(f"layer must be a name or an integer; got {layer!r}.")
        if not -len(self.table) <= layer < len(self.table):
            raise LayerNotFoundError(
                f"{self.network} has {len(self.table)} layers, from {-len(self.table)} to "
                f"{len(self.table) - 1}; there is no layer {layer}."
            )
        return self._resolved[self.table[layer].name]

    def block(self, layer: str | int) -> tuple[str, ...]:
        """Return the paths of the modules that make up a block of the network.

        A container is a block by itself, where `resolve` gives its last layer if both have the
        same output; "stage3" is all layers after the second stage, up to the end of the third; any
        other layer is a block of one.
        """
        if isinstance(layer, str) and any(
            f"{path}.".startswith(f"{layer}.") for path in self.calls
        ):
            return (layer,)
        resolved = self.resolve(layer)
        if not resolved.path:
            raise LayerNotFoundError(
                f"{layer!r} of {self.network} is not a module, but what the network as a whole "
                "computes."
            )
        stage = re.fullmatch(r"stage(\d+)", resolved.name)
        if stage is None:
            return (resolved.path,)
        number = int(stage[1])
        start = self.units.index(self.resolve(f"stage{number - 1}").path) + 1 if number > 1 else 0
        return self.units[start : self.units.index(resolved.path) + 1]

    def stages(self) -> tuple[ResolvedLayer, ...]:
        """Return the layers worth caching in any pass: few, small after pooling, and well known.

        These are the poolings, relu6, relu7 and fc8 of AlexNet and VGG, and the last five stages
        and the global pooling of other networks; and the penultimate layer of all.
        """
        names = [*self._stages, PENULTIMATE]
        layers = [self._resolved[name] for name in names if name in self._resolved]
        return tuple({layer.source: layer for layer in layers}.values())

    @property
    def last_stage(self) -> str | None:
        """The name of the last stage; None if the network does not have stages."""
        stages = [int(name[5:]) for name in self._resolved if re.fullmatch(r"stage\d+", name)]
        return f"stage{max(stages)}" if stages else None

    def _add(self, path: str, call: Call, names: tuple[str, ...], parameters: int) -> None:
        resolved = self._resolve_call(names[0], path, call)
        self._resolved.update((name, replace(resolved, name=name)) for name in names)
        self.table.append(
            Layer(
                names[0],
                names[1:],
                call.kind,
                call.shape,
                count_channels(resolved),
                parameters,
                call.multiply_adds,
            )
        )

    def _add_relu8(self) -> None:
        """Add the ReLU of `fc8`, for which these networks have no module."""
        fc8 = self._resolved["fc8"]
        self._add(fc8.path, Call("ReLU", fc8.output_shape, False, 0, 0, -1), ("relu8",), 0)
        self._resolved["relu8"] = replace(fc8, name="relu8", rectified=True)

    def _find_penultimate(
        self,
        module: nn.Module,
        input_shape: tuple[int, ...],
        trace: Trace,
        classifiers: tuple[str, ...],
    ) -> ResolvedLayer | None:
        """Find what the classifier takes, or what the network returns if it has none.

        If another layer has returned the same, at most rearranged, it is that layer.
        """
        if PENULTIMATE in self.calls:  # a module of this name
            return None
        if len(classifiers) > 1:
            shape = (count_pre_logits(module, input_shape),)
            return ResolvedLayer(PENULTIMATE, "", shape, reads="pre-logits")
        path = classifiers[0] if classifiers else ""
        value = self.calls[path].input if classifiers else trace.output
        if value is None or not value.shape or not self.calls:
            return None
        if value.source in self.calls:
            call = self.calls[value.source]
            has_one_position = math.prod(call.shape[1:]) == 1 and len(call.shape) == 3
            if call.shape == value.shape or has_one_position:
                return self._resolve_call(PENULTIMATE, value.source, call)
        layer = self._resolve_call(PENULTIMATE, path, value)
        return replace(layer, reads="input" if classifiers else "output")

    def _add_penultimate(self, layer: ResolvedLayer, classifiers: tuple[str, ...]) -> None:
        """Add the penultimate layer before the classifier, unless it is in the table already."""
        if PENULTIMATE in self._resolved:
            return
        self._resolved[PENULTIMATE] = layer
        kind = self.calls[layer.path].kind if layer.path else self.network
        kind = kind if layer.reads == "output" else f"{layer.reads} of {kind}"
        entry = Layer(PENULTIMATE, (), kind, layer.output_shape, count_channels(layer), 0, 0)
        head = f"{classifiers[0]}." if classifiers else ""
        before = [number for number, unit in enumerate(self.units) if head.startswith(f"{unit}.")]
        self.table.insert(before[0] if before else len(self.table), entry)

    def _resolve_call(self, name: str, path: str, value: Call | Value) -> ResolvedLayer:
        prefix, has_class_token, grid = self._tokens.find(value)
        return ResolvedLayer(
            name, path, value.shape, value.channels_last, prefix, has_class_token, grid
        )


def count_channels(layer: ResolvedLayer) -> int:
    """Return the number of channels of a layer: its features after pooling over positions."""
    is_tokens = len(layer.output_shape) == 2 and layer.channels_last
    return layer.output_shape[-1 if is_tokens else 0]


def _cells(index: int, layer: Layer) -> tuple[str, ...]:
    return (
        str(index),
        layer.name,
        ", ".join(layer.aliases),
        layer.kind,
        " x ".join(map(str, layer.output_shape)),
        f"{layer.n_features:,}",
        f"{layer.parameters:,}",
        f"{layer.multiply_adds:,}",
    )
