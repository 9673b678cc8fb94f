"""Names of layers: Caffe's names, stages, and containers with the same output."""

import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

from torch import nn
from torchvision.models import VGG, AlexNet
from torchvision.models.maxvit import MaxVitBlock
from torchvision.models.regnet import AnyStage
from torchvision.models.vision_transformer import Encoder

from .trace import Call

# Classes that only contain layers; a class derived from one of them is a layer of its own.
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
_MOST_STAGES = 5  # as in VGG and ResNets; of transformers each block is a stage
_HEADS = ("classifier", "fc", "head", "heads")


def find_units(
    module: nn.Module, calls: Mapping[str, Call], declared: Sequence[str], path: str = ""
) -> Iterator[str]:
    """Yield the paths of a network's layers: whole blocks, but never containers of blocks.

    A module that does not return a tensor, or is not called itself, counts as a container, and so
    do a `declared` stage that returns what its blocks return and what is around such a stage.
    """
    children = {
        f"{path}.{name}" if path else name: child for name, child in module.named_children()
    }
    is_stage = path in declared and any(
        type(child) is nn.Sequential
        and name in calls
        and calls[name].output == calls[path].output
        and any(True for block in child for _ in block.children())
        for name, child in children.items()
    )
    is_opened = is_stage or any(stage.startswith(f"{path}.") for stage in declared)
    if path in calls and type(module) not in _CONTAINERS and not is_opened:
        yield path
        return
    for name, child in children.items():
        yield from find_units(child, calls, declared, name)


def declared_stages(module: nn.Module, calls: Mapping[str, Call]) -> list[str]:
    """Return the paths of the stages that timm's `feature_info` declares; empty if it does not."""
    declared = getattr(module, "feature_info", None)
    if not isinstance(declared, list):
        return []
    paths = [str(entry.get("module")) for entry in declared if isinstance(entry, dict)]
    return paths if all(path in calls for path in paths) else []


def count_parameters(module: nn.Module, units: Sequence[str]) -> dict[str, int]:
    """Count the parameters of each layer, such that every parameter is counted once."""
    counts = dict.fromkeys(units, 0)
    unassigned: list[nn.Parameter] = []
    for name, parameter in module.named_parameters():
        unit = _find_unit(name, units)
        if unit is None:
            unassigned.append(parameter)
        else:
            counts[unit] += parameter.numel()
    if counts:
        with_weights = [unit for unit in units if counts[unit]]
        last = with_weights[-1] if with_weights else units[-1]
        counts[last] += sum(parameter.numel() for parameter in unassigned)
    return counts


def _find_unit(parameter: str, units: Sequence[str]) -> str | None:
    """Return the layer that a parameter is counted with; None if its module has no layer."""
    owner = parameter.rpartition(".")[0]
    around = [unit for unit in units if f"{owner}.".startswith(f"{unit}.")]
    inside = [unit for unit in units if not owner or unit.startswith(f"{owner}.")]
    return next(iter(around + inside), None)


def caffe_names(module: nn.Module, paths: list[str]) -> dict[str, str]:
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
        position = f"{block}_{conv}" if isinstance(module, VGG) else f"{conv}"
        kinds = {nn.Conv2d: "conv", nn.BatchNorm2d: "bn", nn.ReLU: "relu", nn.Linear: "fc"}
        short = next((short for kind, short in kinds.items() if isinstance(layer, kind)), None)
        if short:
            names[path] = f"{short}{fc if path.startswith('classifier') else position}"
        elif isinstance(layer, nn.MaxPool2d):
            names[path] = f"pool{block if isinstance(module, VGG) else conv}"
            block, conv = block + 1, conv if isinstance(module, AlexNet) else 0
    return names


def choose_stages(
    caffe: dict[str, str], paths: list[str], aliases: dict[str, list[str]]
) -> list[str]:
    """Return the paths of the layers of `LayerIndex.stages`."""
    if caffe:
        stages = ("pool", "relu6", "relu7", "fc8")
        return [path for path in paths if caffe.get(path, "").startswith(stages)]
    ends = [
        path for path in paths if any(re.fullmatch(r"stage\d+", name) for name in aliases[path])
    ]
    return [path for path in paths if path == "avgpool" or path in ends[-_MOST_STAGES:]]


def container_aliases(paths: list[str], calls: dict[str, Call]) -> dict[str, list[str]]:
    """Make each container an alias of its last layer if both return the same output."""
    aliases: dict[str, list[str]] = {path: [] for path in paths}
    for path in paths:
        container = path.rpartition(".")[0]
        while container:
            if container in calls and calls[container].output == calls[path].output:
                aliases[path].append(container)
            container = container.rpartition(".")[0]
    return aliases


def find_stages(
    module: nn.Module, paths: list[str], calls: dict[str, Call], declared: Sequence[str]
) -> list[str]:
    """Return the last layer of each stage in the trunk of a network.

    These are the `declared` stages, if there are any, or else what ends before each downsampling;
    of tokens that are never downsampled, each block.
    """
    last_with = {calls[path].output: path for path in paths}
    ends = [last_with.get(calls[path].output) for path in declared]
    found = [end for end in ends if end is not None]
    if found and len(set(found)) == len(ends):
        return sorted(found, key=paths.index)
    stages: list[str] = []
    group: list[str] = []
    for path in paths:
        call = calls[path]
        if path.split(".")[0] in _HEADS or len(call.shape) == 1:
            break
        if group and _resolution(call) * 2 < _resolution(calls[group[-1]]):
            if _starts_downsampling(module, group, path):
                group.pop()
            stages += _last_before_pooling(module, group)
            group = []
        group.append(path)
    if not stages:
        blocks = _find_blocks_of_tokens(group, calls)
        if blocks:
            return blocks
    return stages + _last_before_pooling(module, group)


def _find_blocks_of_tokens(group: Sequence[str], calls: Mapping[str, Call]) -> list[str]:
    """Return the layers of the most common kind that return tokens, if there are several."""
    kinds = Counter(
        calls[path].kind
        for path in group
        if len(calls[path].shape) == 2 and calls[path].channels_last
    )
    if not kinds or kinds.most_common(1)[0][1] == 1:
        return []
    kind = kinds.most_common(1)[0][0]
    return [path for path in group if calls[path].kind == kind]


def _last_before_pooling(module: nn.Module, group: list[str]) -> list[str]:
    """Return the last layer of a group of one resolution, apart from poolings, as a list."""
    return [path for path in group if not isinstance(module.get_submodule(path), _POOLINGS)][-1:]


def _starts_downsampling(module: nn.Module, group: list[str], path: str) -> bool:
    """Return whether a group ends with the norm of the block that downsamples next (ConvNeXt)."""
    block = path.rpartition(".")[0]
    inside = [other for other in group if other.rpartition(".")[0] == block]
    is_norm = isinstance(module.get_submodule(group[-1]), _NORMS)
    return inside == group[-1:] != group and is_norm


def _resolution(call: Call) -> int:
    """Return the number of positions in maps, tokens or a sequence."""
    return math.prod(call.raw_shape[:-1] if call.channels_last else call.raw_shape[1:])
