"""torchvision's classification networks: their names, published weights and how they are built."""

import functools
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn
from torchvision import models

from .descriptions import EnumDescription
from .networks import count_last_entry, load_strictly
from .resnet10_slim import NAME as NAME_WITHOUT_DOWNLOAD
from .state_files import State, WeightsFile


@dataclass(frozen=True)
class PublishedWeights:
    """Weights that torchvision publishes, downloaded when they are first used."""

    description: EnumDescription

    @property
    def digest(self) -> str:
        """The address, whose file name has a hash of the content."""
        url: str = self.description.entry.url
        return url

    def state(self) -> State:
        """Fetch the state dict with torchvision's own downloader, or from its cache."""
        entry = self.description.entry
        url, weights = entry.url, f"{entry} of {self.description.network}"
        cached = Path(torch.hub.get_dir()) / "checkpoints" / url.rpartition("/")[2]
        # torchvision checks the hash of a download, but not of a file from an earlier one.
        if cached.is_file():
            expected = cached.stem.rpartition("-")[2]
            if not WeightsFile.find(cached, self.description).digest.startswith(expected):
                raise OSError(
                    f"{cached} does not hold the weights {weights}: its SHA-256 does not begin "
                    f"with {expected}. Put {url} at {cached}, or give the path of such a file as "
                    "weights=."
                )
        try:
            state: State = entry.get_state_dict(progress=True, check_hash=True)
        except Exception as error:  # the network, the disk and a damaged file may raise anything
            fault = f"read from {cached}" if cached.exists() else "downloaded"
            raise OSError(
                f"The weights {weights} could not be {fault} ({error}). Put {url} at {cached}, or "
                "give the path of such a file as weights=. The backbone "
                f"{NAME_WITHOUT_DOWNLOAD!r} needs no network: its weights come with deepfeat."
            ) from error
        return state


def list_names() -> list[str]:
    names: list[str] = models.list_models(module=models)
    return names


def has_name(name: str) -> bool:
    return name in list_names()


def known_weights(name: str) -> dict[str, PublishedWeights]:
    known = models.get_model_weights(name).__members__
    return {word: PublishedWeights(EnumDescription(name, entry)) for word, entry in known.items()}


def describe(name: str) -> EnumDescription:
    return known_weights(name)["DEFAULT"].description


def version() -> str:
    return f"torchvision {torchvision.__version__}"


def is_sized(name: str) -> bool:
    return name.startswith(("vit", "maxvit"))


def build(name: str, size: tuple[int, int] | None, **options: Any) -> nn.Module:
    if size is not None and name.startswith("vit"):
        options["image_size"] = size[1]
    if size is not None and name.startswith("maxvit"):
        options["input_size"] = (size[1], size[1])
    if name in ("googlenet", "inception_v3"):
        options["init_weights"] = True
    try:
        network: nn.Module = models.get_model(name, weights=None, **options)
    except (AssertionError, ValueError) as error:
        side = size and size[1]
        raise ValueError(f"{name} cannot be built for images of side {side}: {error}") from error
    return network


def load(name: str, size: tuple[int, int] | None, state: State) -> nn.Module:
    options = {}
    if name in ("googlenet", "inception_v3"):
        # torchvision trained these on inputs scaled in another way, and rescales inside.
        options["transform_input"] = True
        options["aux_logits"] = any("aux" in key.lower() for key in state)
    state = {_current_key(name, key): value for key, value in state.items()}
    return load_strictly(name, functools.partial(build, name, size), state, **options)


def count_outputs(network: nn.Module) -> int:
    return count_last_entry(network)


def _current_key(name: str, key: str) -> str:
    """Undo renamings since torchvision published its files."""
    if name.startswith("densenet"):  # norm.1, today norm1
        key = re.sub(r"(denselayer\d+\.(?:norm|relu|conv))\.(\d)", r"\1\2", key)
    if name.startswith("vit"):
        key = key.replace(".mlp.linear_1.", ".mlp.0.").replace(".mlp.linear_2.", ".mlp.3.")
    return key
