"""The layers of a network: their names, shapes and costs."""

import difflib
import numbers
import re
from dataclasses import dataclass, replace

from torch import nn

from .names import (
    caffe_names,
    choose_stages,
    container_aliases,
    count_parameters,
    find_stages,
    find_units,
)
from .tokens import Tokens
from .trace import Call, trace_calls


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
    """The module that a layer is read from, and the layout of its output."""

    name: str
    path: str
    output_shape: tuple[int, ...]
    channels_last: bool = False  # maps are returned as (H, W, C), tokens as (N, D)
    prefix_tokens: int = 0  # the number of tokens before those of the patches
    class_token: bool = False  # whether the first token represents the whole image
    rectified: bool = False  # whether ReLU is applied to the output


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
        self._tokens = Tokens(module, trace)
        modules = {path for path, _ in module.named_modules() if path}
        self._without_tensor = modules - self.calls.keys()
        units = set(find_units(module, self.calls))
        paths = [path for path in self.calls if path in units]  # in the order of computation
        paths = [path for path in paths if not self.calls[path].is_passthrough]
        self.units = tuple(paths)
        parameters = count_parameters(module, paths)
        caffe = caffe_names(module, paths)
        aliases = container_aliases(paths, self.calls)
        for number, path in enumerate(find_stages(module, paths, self.calls), start=1):
            if f"stage{number}" not in self.calls:  # ShuffleNet has modules of this name
                aliases[path].append(f"stage{number}")
        self._resolved: dict[str, ResolvedLayer] = {}
        self._stages = choose_stages(caffe, paths, aliases)
        self.table = LayerTable()
        for path in paths:
            names = [caffe[path], path] if path in caffe else [path]
            self._add(path, self.calls[path], (*names, *aliases[path]), parameters[path])
        if "fc8" in caffe.values() and "relu8" not in caffe.values():
            self._add_relu8()
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
        stage = re.fullmatch(r"stage(\d+)", resolved.name)
        if stage is None:
            return (resolved.path,)
        number = int(stage[1])
        start = self.units.index(self.resolve(f"stage{number - 1}").path) + 1 if number > 1 else 0
        return self.units[start : self.units.index(resolved.path) + 1]

    def stages(self) -> tuple[ResolvedLayer, ...]:
        """Return the layers worth caching in any pass: few, small after pooling, and well known.

        These are the poolings, relu6, relu7 and fc8 of AlexNet and VGG, and the stages and the
        global pooling of other networks.
        """
        return tuple(self._resolved[path] for path in self._stages)

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

    def _resolve_call(self, name: str, path: str, call: Call) -> ResolvedLayer:
        prefix, has_class_token = self._tokens.find(call)
        return ResolvedLayer(name, path, call.shape, call.channels_last, prefix, has_class_token)


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
