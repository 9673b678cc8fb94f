"""Knows what the layers of a network are called, what they give, and how to read them."""

import difflib
import numbers
import re
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torchvision.models import VGG, AlexNet

from ._trace import Call, first_tensor, trace_calls

# Containers that hand their input from child to child; the layers of a network lie inside them.
_CHAINS = ("Sequential", "ModuleList", "AnyStage", "Encoder", "MaxVitBlock")
# In eval mode these give what they got, at most in another arrangement.
_NO_OPS = ("Dropout", "Identity", "StochasticDepth", "Permute", "Flatten")
_HEADS = ("classifier", "fc", "head", "heads")
_reading: weakref.WeakKeyDictionary[nn.Module, threading.Lock] = weakref.WeakKeyDictionary()


class LayerNotFoundError(ValueError):
    """The network has no layer of that name; the message lists close matches."""


@dataclass(frozen=True)
class Layer:
    """One layer of a network.

    Attributes
    ----------
    name : str
        The canonical name: Caffe's for AlexNet and VGG, else the module path.
    aliases : tuple of str
        Other names of the same output.
    kind : str
        The class of the module.
    output_shape : tuple of int
        Of one image: (C, H, W) of maps, (N, D) of tokens, (D,) of a vector.
    n_features : int
        Number of features after pooling.
    parameters : int
        Number of weights and biases.
    multiply_adds : int
        Multiply-adds for one image.
    """

    name: str
    aliases: tuple[str, ...]
    kind: str
    output_shape: tuple[int, ...]
    n_features: int
    parameters: int
    multiply_adds: int


class LayerTable(list[Layer]):
    """The layers of a network in the order of computation; `pandas.DataFrame` takes it as it is."""

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
    """Where a layer is read, and how its output is laid out."""

    name: str
    path: str
    output_shape: tuple[int, ...]
    channels_last: bool = False  # maps come as (H, W, C)
    class_token: bool = False  # the first token stands for the image
    rectified: bool = False  # ReLU is applied to what is read


class LayerIndex:
    """The layers of one network at one input size: list them, resolve their names.

    `calls` tells of every module that the network calls, in the order of return; `units` are the
    paths of the layers in `table`.

    Parameters
    ----------
    module : torch.nn.Module
        The network, on any device; it is left as it was. On the meta device nothing is computed.
    input_shape : tuple of int
        (C, H, W) of an image as the network takes it.
    """

    def __init__(self, module: nn.Module, input_shape: tuple[int, ...]):
        self.network = type(module).__name__
        self._class_token = _has_class_token(module)
        self.calls = trace_calls(module, input_shape)
        self._silent = {path for path, _ in module.named_modules()} - self.calls.keys() - {""}
        units = set(_units(module))
        paths = [path for path in self.calls if path in units]  # in the order of computation
        paths = [p for p in paths if not self.calls[p].kind.startswith(_NO_OPS)]
        self.units = tuple(paths)
        caffe = _caffe_names(module, paths)
        aliases = _container_aliases(paths, self.calls)
        for number, path in enumerate(_stages(paths, self.calls), start=1):
            if f"stage{number}" not in self.calls:  # ShuffleNet has modules of this name
                aliases[path].append(f"stage{number}")
        self._resolved: dict[str, ResolvedLayer] = {}
        self._kept = _kept_layers(caffe, paths, aliases)
        self.table = LayerTable()
        for path in paths:
            names = [caffe[path], path] if path in caffe else [path]
            self._add(path, self.calls[path], (*names, *aliases[path]))
        if "fc8" in caffe.values() and "relu8" not in caffe.values():
            self._add_relu8()
        for path, call in self.calls.items():
            self._resolved.setdefault(path, self._resolve_call(path, path, call))
        if not self._resolved:
            raise ValueError(
                f"{self.network} has no layers: it calls no module that gives a tensor."
            )

    def resolve(self, layer: str | int) -> ResolvedLayer:
        """Return the layer of a name, an alias, a module path or a place in the table."""
        if isinstance(layer, str):
            if layer in self._silent:
                raise LayerNotFoundError(
                    f"{self.network} does not call {layer!r} on its way forward, or gets no "
                    "tensor from it."
                )
            if layer in self._resolved:
                return self._resolved[layer]
            close = difflib.get_close_matches(layer, self._resolved)
            names = [entry.name for entry in self.table] or list(self._resolved)
            listed = ", ".join(map(repr, close or names[-3:]))
            raise LayerNotFoundError(
                f"{self.network} has no layer {layer!r}. "
                + (f"Close matches: {listed}." if close else f"Its last ones are {listed}.")
            )
        if not isinstance(layer, numbers.Integral) or isinstance(layer, bool):
            raise TypeError(f"layer is {layer!r}; a name or a whole number is expected.")
        if not -len(self.table) <= layer < len(self.table):
            raise LayerNotFoundError(
                f"{self.network} has {len(self.table)} layers, from {-len(self.table)} to "
                f"{len(self.table) - 1}; there is no layer {layer}."
            )
        return self._resolved[self.table[layer].name]

    def block(self, layer: str | int) -> tuple[str, ...]:
        """Return the paths of the modules that a name stands for as a block of the network.

        Of a container that is the container, where `resolve` gives the last layer inside; of
        "stage3" all layers after the second stage, up to the end of the third.
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
        """Return the layers worth keeping of one pass: few, small once pooled, and well known.

        These are AlexNet's and VGG's poolings, relu6, relu7 and fc8; of other networks the stages
        and the global pooling.
        """
        return tuple(self._resolved[path] for path in self._kept)

    def _add(self, path: str, call: Call, names: tuple[str, ...]) -> None:
        resolved = self._resolve_call(names[0], path, call)
        self._resolved.update((name, replace(resolved, name=name)) for name in names)
        self.table.append(
            Layer(
                names[0],
                names[1:],
                call.kind,
                call.shape,
                call.shape[-1] if len(call.shape) == 2 else call.shape[0],
                call.parameters,
                call.multiply_adds,
            )
        )

    def _add_relu8(self) -> None:
        """Add the ReLU of `fc8`, which is no module of these networks."""
        fc8 = self._resolved["fc8"]
        self._add(fc8.path, Call("ReLU", fc8.output_shape, False, 0, 0, -1), ("relu8",))
        self._resolved["relu8"] = replace(fc8, name="relu8", rectified=True)

    def _resolve_call(self, name: str, path: str, call: Call) -> ResolvedLayer:
        tokens = len(call.shape) == 2
        return ResolvedLayer(
            name, path, call.shape, call.channels_last, tokens and self._class_token
        )


def read_layers(
    module: nn.Module,
    layers: Sequence[ResolvedLayer],
    batch: Tensor,
    reduce: Callable[[ResolvedLayer, Tensor], Tensor],
) -> dict[str, Tensor]:
    """Run a batch as far as the deepest layer; return by name what `reduce` makes of each output.

    Of a module that is called more than once the first call is read. Of a tuple the first entry
    is. Hooks are gone afterwards, and one thread at a time reads a module.

    Raises
    ------
    ValueError
        If a layer is not called in the forward pass, or not for each image.
    """
    outputs: dict[str, Tensor] = {}
    unread: dict[str, list[ResolvedLayer]] = {}
    for layer in layers:
        unread.setdefault(layer.path, []).append(layer)

    def keep(path: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            for layer in unread.pop(path, ()):
                given = first_tensor(output)
                outputs[layer.name] = _detached(reduce(layer, given), given)
                if len(outputs[layer.name]) != len(batch):
                    raise ValueError(f"layer {layer.name!r} does not give one output an image.")
            if not unread:
                raise _AllRead  # nothing after the deepest layer is needed

        return hook

    with _reading.setdefault(module, threading.Lock()), ExitStack() as hooks:
        for path in list(unread):
            handle = module.get_submodule(path).register_forward_hook(keep(path))
            hooks.callback(handle.remove)
        with suppress(_AllRead):
            module(batch)
    if unread:
        raise ValueError(f"not called in the forward pass: {', '.join(sorted(unread))}.")
    return outputs


class _AllRead(Exception):
    """Leaves a forward pass once every layer asked for has been read."""


def _detached(kept: Tensor, output: Tensor) -> Tensor:
    """Copy what still shares memory with the output: an in-place ReLU may overwrite that next."""
    shared = kept.untyped_storage().data_ptr() == output.untyped_storage().data_ptr()
    return kept.clone() if shared else kept


def _has_class_token(module: nn.Module) -> bool:
    names = (name.rpartition(".")[2] for name, _ in module.named_parameters())
    return any(name in ("class_token", "cls_token") for name in names)


# Names ------------------------------------------------------------------------------------------


def _units(module: nn.Module, path: str = "") -> Iterator[str]:
    """Yield the paths of a network's layers: whole blocks, but never containers of blocks."""
    if path and type(module).__name__ not in _CHAINS:
        yield path
        return
    for name, child in module.named_children():
        yield from _units(child, f"{path}.{name}" if path else name)


def _caffe_names(module: nn.Module, paths: list[str]) -> dict[str, str]:
    """Name the layers of AlexNet and VGG as Caffe does: conv5_3, relu5_3, pool5, fc6, relu6."""
    if not isinstance(module, (AlexNet, VGG)):
        return {}
    names = {}
    block, conv, fc = 1, 0, 5
    for path in paths:
        layer = module.get_submodule(path)
        kind = type(layer).__name__
        if isinstance(layer, nn.Conv2d):
            conv += 1
        if isinstance(layer, nn.Linear):
            fc += 1
        place = f"{block}_{conv}" if isinstance(module, VGG) else f"{conv}"
        short = {"Conv2d": "conv", "BatchNorm2d": "bn", "ReLU": "relu", "Linear": "fc"}.get(kind)
        if short:
            names[path] = f"{short}{fc if path.startswith('classifier') else place}"
        elif isinstance(layer, nn.MaxPool2d):
            names[path] = f"pool{block if isinstance(module, VGG) else conv}"
            block, conv = block + 1, conv if isinstance(module, AlexNet) else 0
    return names


def _kept_layers(
    caffe: dict[str, str], paths: list[str], aliases: dict[str, list[str]]
) -> list[str]:
    if caffe:
        kept = ("pool", "relu6", "relu7", "fc8")
        return [path for path in paths if caffe.get(path, "").startswith(kept)]
    return [
        path
        for path in paths
        if path == "avgpool" or any(re.fullmatch(r"stage\d+", name) for name in aliases[path])
    ]


def _container_aliases(paths: list[str], calls: dict[str, Call]) -> dict[str, list[str]]:
    """Give a container's path to its last layer, where both put out the same."""
    aliases: dict[str, list[str]] = {path: [] for path in paths}
    for path in paths:
        container = path.rpartition(".")[0]
        while container:
            if container in calls and calls[container].output == calls[path].output:
                aliases[path].append(container)
            container = container.rpartition(".")[0]
    return aliases


def _stages(paths: list[str], calls: dict[str, Call]) -> list[str]:
    """Return the last layer before each down-sampling of the network's trunk."""
    stages: list[str] = []
    group: list[str] = []
    for path in paths:
        call = calls[path]
        if path.split(".")[0] in _HEADS or len(call.shape) == 1:
            break
        if group and _resolution(call) * 2 < _resolution(calls[group[-1]]):
            if _opens_down_sampler(group, path, calls):
                group.pop()
            stages += _last_learned(group, calls)
            group = []
        group.append(path)
    return stages + _last_learned(group, calls)


def _last_learned(group: list[str], calls: dict[str, Call]) -> list[str]:
    """Return the end of a group of one resolution, before what only pools there."""
    return [path for path in group if "Pool" not in calls[path].kind][-1:]


def _opens_down_sampler(group: list[str], path: str, calls: dict[str, Call]) -> bool:
    """Tell whether a group ends on the norm of the block that down-samples next (ConvNeXt)."""
    block = path.rpartition(".")[0]
    inside = [other for other in group if other.rpartition(".")[0] == block]
    return inside == group[-1:] != group and "Norm" in calls[group[-1]].kind


def _resolution(call: Call) -> int:
    return call.shape[0] if len(call.shape) == 2 else call.shape[-1] * call.shape[-2]


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
