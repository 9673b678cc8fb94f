"""Names of layers: Caffe's, stages, and the containers that share an output."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence

from torch import nn
from torchvision.models import VGG, AlexNet
from torchvision.models.maxvit import MaxVitBlock
from torchvision.models.regnet import AnyStage
from torchvision.models.vision_transformer import Encoder

from .trace import Call

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


# Names ------------------------------------------------------------------------------------------


def find_units(module: nn.Module, calls: Mapping[str, Call], path: str = "") -> Iterator[str]:
    """Yield the paths of a network's layers: whole blocks, but never containers of blocks.

    What gives no tensor, or is never called itself, is a container as well.
    """
    if path in calls and type(module) not in _CONTAINERS:
        yield path
        return
    for name, child in module.named_children():
        yield from find_units(child, calls, f"{path}.{name}" if path else name)


def share_out(module: nn.Module, units: Sequence[str]) -> dict[str, int]:
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
        place = f"{block}_{conv}" if isinstance(module, VGG) else f"{conv}"
        kinds = {nn.Conv2d: "conv", nn.BatchNorm2d: "bn", nn.ReLU: "relu", nn.Linear: "fc"}
        short = next((short for kind, short in kinds.items() if isinstance(layer, kind)), None)
        if short:
            names[path] = f"{short}{fc if path.startswith('classifier') else place}"
        elif isinstance(layer, nn.MaxPool2d):
            names[path] = f"pool{block if isinstance(module, VGG) else conv}"
            block, conv = block + 1, conv if isinstance(module, AlexNet) else 0
    return names


def kept_layers(
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


def container_aliases(paths: list[str], calls: dict[str, Call]) -> dict[str, list[str]]:
    """Give a container's path to its last layer, where both put out the same."""
    aliases: dict[str, list[str]] = {path: [] for path in paths}
    for path in paths:
        container = path.rpartition(".")[0]
        while container:
            if container in calls and calls[container].output == calls[path].output:
                aliases[path].append(container)
            container = container.rpartition(".")[0]
    return aliases


def find_stages(module: nn.Module, paths: list[str], calls: dict[str, Call]) -> list[str]:
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
