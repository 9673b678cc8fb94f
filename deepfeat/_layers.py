"""Knows what the layers of a network are called, what they give, and how to read them."""

import difflib
import functools
import math
import numbers
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torchvision.models import VGG, AlexNet
from torchvision.models.maxvit import MaxVitBlock
from torchvision.models.regnet import AnyStage
from torchvision.models.vision_transformer import Encoder

from ._trace import Call, Trace, first_tensor, share_weights, trace_calls

# The layers of a network lie inside these. What is derived from them is a block with a name.
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict, AnyStage, Encoder, MaxVitBlock)
_POOLINGS = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
    *(nn.LPPool1d, nn.LPPool2d, nn.FractionalMaxPool2d),
)
_NORMS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.LayerNorm),
    *(nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.RMSNorm, nn.LocalResponseNorm),
)
_HEADS = ("classifier", "fc", "head", "heads")
# Parameters that are tokens, as torchvision, timm, transformers and papers' own code name them.
_CLASS_TOKEN = re.compile(r"(cls|class)_?(token|emb|embedding)s?_?\d*")
_OTHER_TOKEN = re.compile(r"(dist|distillation|reg|register|storage)_?tokens?_?\d*")


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
        Of one image: (C, H, W) of maps, (N, D) of tokens, (C, L) of a sequence with its channels
        first, (D,) of a vector.
    n_features : int
        Number of features after pooling.
    parameters : int
        Number of weights and biases. A container's own, for instance a class token, count with
        its first layer, and what the forward pass leaves out, for instance an auxiliary
        classifier, counts with the last layer that has weights.
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
    channels_last: bool = False  # maps come as (H, W, C), tokens as (N, D)
    prefix_tokens: int = 0  # these come before the tokens of the patches
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
        trace = trace_calls(module, input_shape)
        self.calls = trace.calls
        self._tokens = _Tokens(module, trace)
        self._silent = {path for path, _ in module.named_modules()} - self.calls.keys() - {""}
        units = set(_units(module, self.calls))
        paths = [path for path in self.calls if path in units]  # in the order of computation
        paths = [path for path in paths if not self.calls[path].passes_on]
        self.units = tuple(paths)
        shares = _share_out(module, paths)
        caffe = _caffe_names(module, paths)
        aliases = _container_aliases(paths, self.calls)
        for number, path in enumerate(_stages(module, paths, self.calls), start=1):
            if f"stage{number}" not in self.calls:  # ShuffleNet has modules of this name
                aliases[path].append(f"stage{number}")
        self._resolved: dict[str, ResolvedLayer] = {}
        self._kept = _kept_layers(caffe, paths, aliases)
        self.table = LayerTable()
        for path in paths:
            names = [caffe[path], path] if path in caffe else [path]
            self._add(path, self.calls[path], (*names, *aliases[path]), shares[path])
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
        """Add the ReLU of `fc8`, which is no module of these networks."""
        fc8 = self._resolved["fc8"]
        self._add(fc8.path, Call("ReLU", fc8.output_shape, False, 0, 0, -1), ("relu8",), 0)
        self._resolved["relu8"] = replace(fc8, name="relu8", rectified=True)

    def _resolve_call(self, name: str, path: str, call: Call) -> ResolvedLayer:
        prefix, has_class_token = self._tokens.find(call)
        return ResolvedLayer(name, path, call.shape, call.channels_last, prefix, has_class_token)


def count_channels(layer: ResolvedLayer) -> int:
    """Count the channels of a layer, which are its features once its places are pooled."""
    is_tokens = len(layer.output_shape) == 2 and layer.channels_last
    return layer.output_shape[-1 if is_tokens else 0]


class LayerReader:
    """Reads layers of a network, batch by batch, as far as the deepest of them.

    If a module is called more than once, its first call is read; of a tuple, the first element.
    The hooks are on a copy of the modules, which shares the weights: whatever happens, the network
    itself is never touched. A reader serves one thread at a time, a network any number of readers.

    Parameters
    ----------
    module : torch.nn.Module
        The network.
    layers : sequence of ResolvedLayer
        What to read.
    reduce : callable
        Makes of a layer and its output what is kept of it.
    optional : collection of str, optional
        Names of layers that are left out of a batch for which the network does not call them, or
        does not give one output per image.
    """

    def __init__(
        self,
        module: nn.Module,
        layers: Sequence[ResolvedLayer],
        reduce: Callable[[ResolvedLayer, Tensor], Tensor],
        optional: Collection[str] = (),
    ):
        self._module = share_weights(module)
        self._kept = _Kept(layers, reduce)
        self._optional = optional
        for path in self._kept.layers:
            hook = functools.partial(self._kept.keep, path)
            self._module.get_submodule(path).register_forward_hook(hook)

    def __call__(self, batch: Tensor) -> dict[str, Tensor]:
        """Run a batch; return by name what `reduce` makes of each output.

        Raises
        ------
        ValueError
            If a layer that is not optional is not called, or does not give one output per image.
        """
        kept = self._kept
        kept.start()
        try:
            with suppress(_AllRead):
                self._module(batch)
            outputs = kept.outputs
        finally:
            kept.outputs = {}
        good = {name: output for name, output in outputs.items() if len(output) == len(batch)}
        for name in kept.names:
            if name not in good and name not in self._optional:
                fault = (
                    "does not give one output per image" if name in outputs else "gives no tensor"
                )
                raise ValueError(f"layer {name!r} {fault} in the forward pass.")
        return good


class _Kept:
    """What hooks keep of a forward pass. It knows nothing of the modules, which know it."""

    def __init__(
        self,
        layers: Sequence[ResolvedLayer],
        reduce: Callable[[ResolvedLayer, Tensor], Tensor],
    ):
        self.layers: dict[str, list[ResolvedLayer]] = {}
        for layer in layers:
            self.layers.setdefault(layer.path, []).append(layer)
        self.names = [layer.name for layer in layers]
        self.reduce = reduce
        self.start()

    def start(self) -> None:
        self.unread = set(self.layers)
        self.outputs: dict[str, Tensor] = {}

    def keep(self, path: str, _module: nn.Module, _inputs: Any, output: Any) -> None:
        if path not in self.unread:
            return
        self.unread.remove(path)
        try:
            given = first_tensor(output)
        except TypeError:  # not what its trace has shown
            return
        for layer in self.layers[path]:
            self.outputs[layer.name] = _detached(self.reduce(layer, given), given)
        if not self.unread:
            raise _AllRead  # nothing after the deepest layer is needed


def read_layers(
    module: nn.Module,
    layers: Sequence[ResolvedLayer],
    batch: Tensor,
    reduce: Callable[[ResolvedLayer, Tensor], Tensor],
) -> dict[str, Tensor]:
    """Read layers of a network for a single batch, as `LayerReader` does."""
    return LayerReader(module, layers, reduce)(batch)


class _AllRead(Exception):
    """Leaves a forward pass once every layer asked for has been read."""


def _detached(kept: Tensor, output: Tensor) -> Tensor:
    """Copy what still shares memory with the output: an in-place ReLU may overwrite that next."""
    shared = kept.untyped_storage().data_ptr() == output.untyped_storage().data_ptr()
    return kept.clone() if shared else kept


class _Tokens:
    """Tells the tokens of patches from those that a network puts before them.

    How many the latter can be is known from timm's `num_prefix_tokens` and from the parameters
    that are tokens. How many a layer has follows from its own number of tokens: that of a grid of
    patches, or so many more.
    """

    def __init__(self, module: nn.Module, trace: Trace):
        named = [(name.rpartition(".")[2], value) for name, value in module.named_parameters()]
        self._has_class_token = any(_CLASS_TOKEN.fullmatch(name) for name, _ in named)
        declared = (getattr(part, "num_prefix_tokens", 0) for part in module.modules())
        self._most = max(
            sum(
                value.numel() // value.shape[-1]
                for name, value in named
                if _CLASS_TOKEN.fullmatch(name) or _OTHER_TOKEN.fullmatch(name)
            ),
            *(number for number in declared if isinstance(number, int)),
        )
        counts = [call.shape[0] for call in trace.calls.values() if _gives_tokens(call)]
        self._grids: frozenset[int] | set[int] = trace.grids
        if not any(self._count_before(count) is not None for count in counts):
            self._grids = set(counts[:1])  # patches that are no grid of a convolution

    def find(self, call: Call) -> tuple[int, bool]:
        """Return how many tokens come before the patches, and whether the first is of the class."""
        if not _gives_tokens(call):
            return 0, False
        count = call.shape[0]
        before = self._count_before(count)
        if before is None:  # tokens without patches (the class tokens of CaiT's last blocks)
            return 0, self._has_class_token and count <= self._most
        return before, self._has_class_token and before > 0

    def _count_before(self, count: int) -> int | None:
        """Return the number of tokens before a grid; None where no grid explains the count."""
        likely = (0, *range(self._most, 0, -1))
        return next((before for before in likely if count - before in self._grids), None)


def _gives_tokens(call: Call) -> bool:
    return len(call.shape) == 2 and call.channels_last


# Names ------------------------------------------------------------------------------------------


def _units(module: nn.Module, calls: Mapping[str, Call], path: str = "") -> Iterator[str]:
    """Yield the paths of a network's layers: whole blocks, but never containers of blocks.

    What gives no tensor, or is never called itself, is a container as well.
    """
    if path in calls and type(module) not in _CONTAINERS:
        yield path
        return
    for name, child in module.named_children():
        yield from _units(child, calls, f"{path}.{name}" if path else name)


def _share_out(module: nn.Module, units: Sequence[str]) -> dict[str, int]:
    """Count the parameters of each layer, so that every parameter is counted once."""
    counts = dict.fromkeys(units, 0)
    left_out: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        unit = _owner(name, units)
        if unit is None:
            left_out.append(parameter)
        else:
            counts[unit] += parameter.numel()
    if counts:
        learned = [unit for unit in units if counts[unit]]
        last = learned[-1] if learned else units[-1]
        counts[last] += sum(parameter.numel() for parameter in left_out)
    return counts


def _owner(parameter: str, units: Sequence[str]) -> str | None:
    """Return the layer that a parameter counts with; None if its module has no layer at all."""
    holder = parameter.rpartition(".")[0]
    around = [unit for unit in units if f"{holder}.".startswith(f"{unit}.")]
    inside = [unit for unit in units if not holder or unit.startswith(f"{holder}.")]
    return next(iter(around + inside), None)


def _caffe_names(module: nn.Module, paths: list[str]) -> dict[str, str]:
    """Name the layers of AlexNet and VGG as Caffe does: conv5_3, relu5_3, pool5, fc6, relu6."""
    if not isinstance(module, (AlexNet, VGG)):
        return {}
    names = {}
    block, conv, fc = 1, 0, 5
    for path in paths:
        layer = module.get_submodule(path)
        if isinstance(layer, nn.Conv2d):
            conv += 1
        if isinstance(layer, nn.Linear):
            fc += 1
        place = f"{block}_{conv}" if isinstance(module, VGG) else f"{conv}"
        kinds = {nn.Conv2d: "conv", nn.BatchNorm2d: "bn", nn.ReLU: "relu", nn.Linear: "fc"}
        short = next((short for kind, short in kinds.items() if isinstance(layer, kind)), None)
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


def _stages(module: nn.Module, paths: list[str], calls: dict[str, Call]) -> list[str]:
    """Return the last layer before each down-sampling of the network's trunk."""
    stages: list[str] = []
    group: list[str] = []
    for path in paths:
        call = calls[path]
        if path.split(".")[0] in _HEADS or len(call.shape) == 1:
            break
        if group and _resolution(call) * 2 < _resolution(calls[group[-1]]):
            if _opens_down_sampler(module, group, path):
                group.pop()
            stages += _last_learned(module, group)
            group = []
        group.append(path)
    return stages + _last_learned(module, group)


def _last_learned(module: nn.Module, group: list[str]) -> list[str]:
    """Return the end of a group of one resolution, before what only pools there."""
    return [path for path in group if not isinstance(module.get_submodule(path), _POOLINGS)][-1:]


def _opens_down_sampler(module: nn.Module, group: list[str], path: str) -> bool:
    """Tell whether a group ends on the norm of the block that down-samples next (ConvNeXt)."""
    block = path.rpartition(".")[0]
    inside = [other for other in group if other.rpartition(".")[0] == block]
    is_norm = isinstance(module.get_submodule(group[-1]), _NORMS)
    return inside == group[-1:] != group and is_norm


def _resolution(call: Call) -> int:
    """Return the number of places: those of maps, tokens or a sequence."""
    places = call.raw_shape[:-1] if call.channels_last else call.raw_shape[1:]
    return math.prod(places)


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
