"""Backbones: a name or a module becomes a network with its weights and preprocessing."""

import copy
import difflib
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.models import WeightsEnum

from . import resnet10_slim, torchvision
from .fingerprint import fingerprint
from .networks import (
    Family,
    RandomWeights,
    WeightsSource,
    count_outputs,
    load_shared,
    make_skeleton,
)
from .preprocessing import Preprocessing, Resize, preprocess_like, preprocess_with
from .state_files import FILE_SUFFIXES, Weights, WeightsFile, is_weights_file

_FAMILIES: tuple[Family, ...] = (torchvision, resnet10_slim)


@dataclass(frozen=True)
class Backbone:
    """A network that need not be loaded yet, and its preprocessing.

    `skeleton` has the network's structure, without its weights; `load` gives the network itself
    in eval mode on a device. If both are `shared` by the process they must not be changed.
    `fingerprint` digests the weights and the preprocessing, the same in every process; it raises
    `UnknownContentError` if they cannot be digested. `categories` names the outputs; None if they
    have no names.
    """

    name: str
    skeleton: nn.Module
    preprocessing: Preprocessing
    load: Callable[[torch.device], nn.Module]
    shared: bool
    fingerprint: Callable[[], bytes]
    categories: tuple[str, ...] | None


def list_backbones() -> list[str]:
    """List the names of all backbones: torchvision's classification models, and deepfeat's own.

    deepfeat's own is `resnet10_slim`, whose weights come with the package.

    Returns
    -------
    list of str
        Names that `DeepFeatureExtractor` and `list_layers` take as `backbone`.

    Examples
    --------
    >>> from deepfeat import list_backbones
    >>> [name for name in list_backbones() if name.startswith("vgg16")]
    ['vgg16', 'vgg16_bn']
    """
    return sorted(name for family in _FAMILIES for name in family.list_names())


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
    if preprocessing is None:
        steps = preprocess_like(source.entry.transforms(), resize, image_size)
    else:
        steps = preprocess_with(preprocessing)
    size = steps.input_shape[-1] if family.is_sized(backbone) else None
    file = source if isinstance(source, WeightsFile) else None
    skeleton = make_skeleton(family, backbone, size, file)
    return Backbone(
        name=backbone,
        skeleton=skeleton,
        preprocessing=steps,
        load=functools.partial(load_shared, family, backbone, size, source),
        shared=True,
        fingerprint=lambda: fingerprint((backbone, source.digest, steps.settings)),
        categories=_find_categories(source, skeleton),
    )


def _find_family(name: str) -> Family:
    for family in _FAMILIES:
        if name in family.list_names():
            return family
    close = ", ".join(map(repr, difflib.get_close_matches(name, list_backbones())))
    raise ValueError(
        f"There is no backbone {name!r}. "
        + (f"Close matches: {close}." if close else "list_backbones() lists them.")
    )


def _find_weights(family: Family, name: str, weights: Weights, seed: int) -> WeightsSource:
    """Find the source of weights; a file and random weights stand in for "DEFAULT"."""
    known = family.known_weights(name)
    if weights is None:
        return RandomWeights(seed, known["DEFAULT"].entry)
    if isinstance(weights, WeightsEnum):
        for source in known.values():
            if source.entry is weights:
                return source
        raise ValueError(f"{weights} are not weights of {name}.")
    if is_weights_file(weights):
        return WeightsFile.find(weights, known["DEFAULT"].entry)
    if not (isinstance(weights, str) and weights in known):
        raise ValueError(
            f"{name} has no weights {weights!r}. It has {', '.join(map(repr, known))}; "
            f"the path of a file ends in {', '.join(FILE_SUFFIXES)}."
        )
    return known[weights]


def _find_categories(source: WeightsSource, skeleton: nn.Module) -> tuple[str, ...] | None:
    names = source.categories
    return tuple(names) if names and len(names) == count_outputs(skeleton) else None


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
    return Backbone(type(module).__name__, module, steps, load, False, digest, None)
