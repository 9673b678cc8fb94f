"""Weights files: their state dicts, and versions of a file."""

import hashlib
import io
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import load_file
from torch import Tensor
from torchvision.models import WeightsEnum

from .descriptions import Description

Weights: TypeAlias = str | os.PathLike[str] | WeightsEnum | None
State: TypeAlias = dict[str, Tensor]

FILE_SUFFIXES = (".pth", ".pt", ".tar", ".safetensors")


def is_weights_file(weights: Weights) -> bool:
    """Tell whether weights are the path of a file."""
    return isinstance(weights, os.PathLike) or (
        isinstance(weights, str) and weights.endswith(FILE_SUFFIXES)
    )


@dataclass(frozen=True)
class WeightsFile:
    """One version of a weights file.

    Images are prepared as for the published weights of the `description`, and the outputs named
    like theirs if there are as many.
    """

    path: Path
    stamp: tuple[int, ...]  # changes when the file does
    description: Description

    @classmethod
    def find(cls, path: str | os.PathLike[str], description: Description) -> "WeightsFile":
        """Find the present version of a file."""
        path = Path(path).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"There is no weights file {os.fspath(path)!r}.")
        status = path.stat()
        stamp = (status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino)
        # Links are not resolved: that to a file in a cache has a suffix, the file may not have one.
        return cls(path.absolute(), stamp, description)

    @property
    def digest(self) -> str:
        """SHA-256 of the content, computed once for each version."""
        version = self.path, self.stamp
        if version not in _digests:
            with self.path.open("rb") as file:
                _digests.setdefault(version, hashlib.file_digest(file, "sha256").hexdigest())
        return _digests[version]

    def peek(self) -> State:
        """Read the state dict for its names and shapes, leaving the rest on disk if possible."""
        return parse_state(self.path)

    def state(self) -> State:
        """Read the state dict from just those bytes that its digest is of.

        Raises
        ------
        OSError
            If the file was replaced since it was digested: rows of the new weights would be kept
            under the key of the old ones.
        """
        content = self.path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        if _digests.setdefault((self.path, self.stamp), digest) != digest:
            raise OSError(f"{self.path} was replaced while it was being read: call again.")
        return parse_state(self.path, content)


_digests: dict[tuple[Path, tuple[int, ...]], str] = {}


def parse_state(path: Path, content: bytes | None = None) -> State:
    """Read a state dict from a .safetensors file, or from a torch file without unpickling code.

    Without its content the weights are left on disk where that is possible.
    """
    if path.suffix == ".safetensors":
        try:
            return load_file(path) if content is None else load_safetensors(content)
        except Exception as error:  # the package raises an error type of its own
            raise ValueError(f"{path} is not a safetensors file: {error}.") from error
    try:
        mmap = content is None and zipfile.is_zipfile(path)
        source = path if content is None else io.BytesIO(content)
        loaded = torch.load(source, map_location="cpu", weights_only=True, mmap=mmap)
    except PermissionError:
        raise
    except Exception as error:  # what is damaged may raise anything
        raise ValueError(
            f"{path} is damaged or holds more than tensors, which is not loaded for safety: save "
            "module.state_dict() with torch.save."
        ) from error
    for key in ("state_dict", "model"):  # a training checkpoint
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    if not isinstance(loaded, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in loaded.items()
    ):
        raise ValueError(f"{path} does not hold a state dict (names of parameters to tensors).")
    return dict(loaded)
