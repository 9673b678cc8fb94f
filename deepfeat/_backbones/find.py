"""Backbones: a name or a module becomes a network with its weights and preprocessing."""

import copy
import difflib
import fnmatch
import functools
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.models import WeightsEnum

from . import resnet10_slim, timm, torchvision
from .descriptions import EnumDescription
from .fingerprint import fingerprint
from .networks import (
    Family,
    RandomWeights,
    WeightsSource,
    build_blank,
    load_shared,
    make_skeleton,
)
from .preprocessing import Preprocessing, Resize, preprocess_with
from .state_files import FILE_SUFFIXES, Weights, WeightsFile, is_weights_file

_FAMILIES: tuple[Family, ...] = (torchvision, resnet10_slim, timm)


@dataclass(frozen=True)
class Backbone:
    """A network that need not be loaded yet, and its preprocessing.

    `skeleton` has the network's structure, without its weights; `build` builds it anew without
    them; `load` gives the network itself in eval mode on a device. If skeleton and network are
    `shared` by the process they must not be changed.
    `fingerprint` digests the weights and the preprocessing, the same in every process; it raises
    `UnknownContentError` if they cannot be digested, and OSError if they cannot be downloaded and
    must be for that. `categories` names the outputs; None if they have no names.
    """

    name: str
    skeleton: nn.Module
    preprocessing: Preprocessing
    build: Callable[[], nn.Module]
    load: Callable[[torch.device], nn.Module]
    shared: bool
    fingerprint: Callable[[], bytes]
    categories: tuple[str, ...] | None


def list_backbones(pattern: str | None = None) -> list[str]:
    """List the names of backbones: torchvision's classification models, deepfeat's own and timm's.

    deepfeat's own is `resnet10_slim`, whose weights come with the package.

    Parameters
    ----------
    pattern : str, optional
        Shell-style wildcards that the names match, such as "resnet*" or "timm/*dinov2*". The names
        of timm begin with "timm/" and end with the tag of their weights. By default all names but
        those of timm.

    Returns
    -------
    list of str
        Names that `DeepFeatureExtractor`, `FineTuneClassifier` and `list_layers` take as
        `backbone`.

    Raises
    ------
    ModuleNotFoundError
        If the pattern begins with "timm/" and timm is not installed.

    Examples
    --------
    >>> from deepfeat import list_backbones
    >>> list_backbones("vgg16*")
    ['vgg16', 'vgg16_bn']
    """
    if pattern is None:
        return sorted(
            name for family in (torchvision, resnet10_slim) for name in family.list_names()
        )
    start = re.split(r"[*?[]", pattern, maxsplit=1)[0]
    families: list[Family] = [torchvision, resnet10_slim]
    if start.startswith(timm.PREFIX) or (timm.PREFIX.startswith(start) and timm.is_installed()):
        families.append(timm)
    names = [name for family in families for name in family.list_names()]
    return sorted(name for name in names if fnmatch.fnmatchcase(name, pattern))


def find_backbone(
    backbone: str | nn.Module,
    weights: Weights = "DEFAULT",
    *,
    preprocessing: Callable[[Image.Image], Tensor] | None = None,
    resize: Resize = "weights",
    image_size: int | None = None,
    seed: int = 0,
) -> Backbone:
    """Find a backbone by name, or take a module as one, without loading any weights.

    Raises
    ------
    ValueError
        If there is no backbone or no weights of that name, a file does not fit, or the parameters
        exclude each other.
    FileNotFoundError
        If `weights` is the path of a file that does not exist.
    """
    if preprocessing is not None and (resize != "weights" or image_size is not None):
        raise ValueError(
            "preprocessing= replaces the weights' own: resize= and image_size= do not apply."
        )
    if isinstance(backbone, nn.Module):
        return _from_module(backbone, weights, preprocessing)
    if not isinstance(backbone, str):
        raise TypeError(
            f"backbone must be a name or a torch.nn.Module; got a {type(backbone).__name__}."
        )
    family = _find_family(backbone)
    source = _find_weights(family, backbone, weights, seed)
    network = source.description.network
    if preprocessing is None:
        steps = source.description.preprocess(resize, image_size)
    else:
        steps = preprocess_with(preprocessing)
    *_, height, width = steps.input_shape
    size = (height, width) if family.is_sized(network) else None
    file = source if isinstance(source, WeightsFile) else None
    skeleton = make_skeleton(family, network, size, file)
    return Backbone(
        name=backbone,
        skeleton=skeleton,
        preprocessing=steps,
        build=functools.partial(build_blank, family, network, size),
        load=functools.partial(load_shared, family, size, source),
        shared=True,
        fingerprint=lambda: fingerprint((network, source.digest, steps.settings)),
        categories=_find_categories(source, family.count_outputs(skeleton)),
    )


def _find_family(name: str) -> Family:
    for family in _FAMILIES:
        if family.has_name(name):
            return family
    is_of_timm = name.startswith(timm.PREFIX)
    listed = list_backbones(f"{timm.PREFIX}*" if is_of_timm else None)
    close = ", ".join(map(repr, difflib.get_close_matches(name, listed)))
    everything = f"list_backbones('{timm.PREFIX}*')" if is_of_timm else "list_backbones()"
    hint = "" if is_of_timm else f" Names of timm begin with {timm.PREFIX!r}."
    raise ValueError(
        f"There is no backbone {name!r}. "
        + (f"Close matches: {close}." if close else f"{everything} lists them.")
        + hint
    )


def _find_weights(
    family: Family, name: str, weights: Weights, seed: int
) -> WeightsSource | RandomWeights:
    """Find the source of weights; a file and random weights stand in for "DEFAULT"."""
    if weights is None:
        return RandomWeights(seed, family.describe(name), family.version())
    if not isinstance(weights, WeightsEnum) and is_weights_file(weights):
        return WeightsFile.find(weights, family.describe(name))
    known = family.known_weights(name)
    if isinstance(weights, WeightsEnum):
        for source in known.values():
            if source.description == EnumDescription(name, weights):
                return source
        raise ValueError(f"{weights} are not weights of {name}.")
    if not (isinstance(weights, str) and weights in known):
        raise ValueError(
            f"{name} has no weights {weights!r}. "
            + (f"It has {', '.join(map(repr, known))}" if known else "None are published")
            + f"; the path of a file ends in {', '.join(FILE_SUFFIXES)}."
        )
    return known[weights]


def _find_categories(
    source: WeightsSource | RandomWeights, n_outputs: int
) -> tuple[str, ...] | None:
    if isinstance(source, RandomWeights):
        return None
    names = source.description.categories
    return tuple(names) if names and len(names) == n_outputs else None


# Modules of the user ----------------------------------------------------------------------------


def _from_module(
    module: nn.Module, weights: Weights, preprocessing: Callable[[Image.Image], Tensor] | None
) -> Backbone:
    if weights != "DEFAULT":
        raise ValueError("weights= does not apply to a module, which has its own.")
    if preprocessing is None:
        raise ValueError(
            "A module needs preprocessing=, from an RGB PIL image to the tensor that it takes: for "
            "instance torchvision.models.ResNet50_Weights.DEFAULT.transforms()."
        )

    digest = functools.cache(functools.partial(fingerprint, (module, preprocessing)))

    def load(device: torch.device) -> nn.Module:
        if any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers())):
            raise ValueError(
                f"{type(module).__name__} is on the meta device, without weights: use "
                'module.to_empty(device="cpu"), and load them.'
            )
        # A copy: the user's module keeps its mode, its device and its hooks.
        copied = copy.deepcopy(module).float().eval().requires_grad_(False)
        if digest.cache_info().currsize and fingerprint((module, preprocessing)) != digest():
            raise RuntimeError(
                f"{type(module).__name__} was changed by another thread while its rows were looked "
                "up: call again when it is done."
            )
        return copied.to(device)

    steps = preprocess_with(preprocessing)
    return Backbone(
        name=type(module).__name__,
        skeleton=module,
        preprocessing=steps,
        build=functools.partial(copy.deepcopy, module),
        load=load,
        shared=False,
        fingerprint=digest,
        categories=None,
    )
