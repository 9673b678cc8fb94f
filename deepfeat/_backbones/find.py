"""Backbones: a name or a module becomes a network with its weights and preprocessing."""

import copy
import difflib
import functools
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from PIL import Image
from torch import Tensor, nn
from torchvision import models
from torchvision.models import WeightsEnum

from . import resnet10_slim as _bundled
from .fingerprint import fingerprint
from .preprocessing import Preprocessing, Resize, preprocess_like, preprocess_with
from .state_files import FILE_SUFFIXES, Weights, digest_once, is_weights_file, weights_key
from .torchvision import known_weights, load_shared, make_skeleton


@dataclass(frozen=True)
class Backbone:
    """A network that need not be loaded yet, and its preprocessing.

    `skeleton` has the network's structure, without its weights; `load` gives the network itself
    in eval mode on a device. Where both are `shared` by the process they must not be changed.
    `fingerprint` digests the weights and the preprocessing, the same in every process; it raises
    `UnknownContentError` where they cannot be digested. `categories` names the outputs; None if
    they have no names.
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

    Its own is `resnet10_slim`, whose weights come with the package.

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
    return sorted([*models.list_models(module=models), _bundled.NAME])


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
        If there is no backbone or no weights of that name, a file does not fit, or the choices
        exclude each other.
    FileNotFoundError
        If `weights` is the path of a file that is not there.
    """
    if preprocessing is not None and (resize != "weights" or image_size is not None):
        raise ValueError(
            "preprocessing= replaces the weights' own: resize= and image_size= do not apply."
        )
    if isinstance(backbone, nn.Module):
        return _from_module(backbone, weights, preprocessing)
    if not isinstance(backbone, str):
        raise TypeError(
            f"backbone is a {type(backbone).__name__}; a name or a torch.nn.Module is expected."
        )
    _check_name(backbone)
    entry = _find_weights(backbone, weights)
    if preprocessing is None:
        source = entry if isinstance(entry, WeightsEnum) else known_weights(backbone)["DEFAULT"]
        steps = preprocess_like(source.transforms(), resize, image_size)
    else:
        steps = preprocess_with(preprocessing)
    size = steps.input_shape[-1]
    key = weights_key(entry)
    load = functools.partial(load_shared, backbone, key, seed, size)
    digest = functools.partial(_fingerprint_named, backbone, key, seed, steps)
    skeleton = make_skeleton(backbone, size, key if isinstance(key, tuple) else None)
    categories = _find_categories(backbone, entry, skeleton)
    return Backbone(backbone, skeleton, steps, load, True, digest, categories)


# Modules of the user ----------------------------------------------------------------------------


def _from_module(
    module: nn.Module, weights: Weights, preprocessing: Callable[[Image.Image], Tensor] | None
) -> Backbone:
    if weights != "DEFAULT":
        raise ValueError("weights= does not apply to a module, which brings its own.")
    if preprocessing is None:
        raise ValueError(
            "a module needs preprocessing=, from an RGB PIL image to the tensor that it takes: for "
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


# Weights ----------------------------------------------------------------------------------------


def _check_name(name: str) -> None:
    if name not in list_backbones():
        close = ", ".join(map(repr, difflib.get_close_matches(name, list_backbones())))
        raise ValueError(
            f"there is no backbone {name!r}. "
            + (f"Close matches: {close}." if close else "list_backbones() lists them.")
        )


def _find_weights(name: str, weights: Weights) -> WeightsEnum | Path | None:
    if weights is None:
        return None
    known = known_weights(name)
    if isinstance(weights, WeightsEnum):
        if weights not in known.__members__.values():
            raise ValueError(f"{weights} are no weights of {name}.")
        return weights
    if is_weights_file(weights):
        path = Path(weights).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"there is no weights file {os.fspath(path)!r}.")
        return path
    if weights not in known.__members__:
        raise ValueError(
            f"{name} has no weights {weights!r}. It has {', '.join(map(repr, known.__members__))}; "
            f"the path of a file ends in {', '.join(FILE_SUFFIXES)}."
        )
    return known[weights]


def _find_categories(
    name: str, entry: WeightsEnum | Path | None, skeleton: nn.Module
) -> tuple[str, ...] | None:
    """Name the outputs as the weights do; for a file with as many outputs, as the default ones."""
    if entry is None:
        return None
    if isinstance(entry, WeightsEnum):
        categories = entry.meta["categories"]
        return tuple(categories) if categories else None  # some VGG16 have no classifier's weights
    categories = known_weights(name)["DEFAULT"].meta["categories"]
    *_, head = skeleton.state_dict().values()
    return tuple(categories) if len(categories) == len(head) else None


def _fingerprint_named(name: str, key: Any, seed: int, steps: Preprocessing) -> bytes:
    if isinstance(key, tuple):
        weights = digest_once(*key)
    elif isinstance(key, WeightsEnum):
        weights = key.url  # torchvision writes a hash of the content into the name of the file
    else:
        weights = f"seed {seed}, torch {torch.__version__}, torchvision {torchvision.__version__}"
    return fingerprint((name, weights, steps.settings))
