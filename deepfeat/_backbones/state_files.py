"""Files of weights: reading state dicts, and telling one version of a file from another."""

import hashlib
import io
import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import load_file
from torch import Tensor
from torchvision.models import WeightsEnum

from . import resnet10_slim as _bundled

Weights: TypeAlias = str | os.PathLike[str] | WeightsEnum | None
State: TypeAlias = dict[str, Tensor]

FILE_SUFFIXES = (".pth", ".pt", ".tar", ".safetensors")
_digests: dict[tuple[Path, tuple[int, ...]], str] = {}  # of weights files, by path and stamp


def is_weights_file(weights: Weights) -> bool:
    """Tell whether weights are the path of a file."""
    return isinstance(weights, os.PathLike) or (
        isinstance(weights, str) and weights.endswith(FILE_SUFFIXES)
    )


def weights_key(entry: WeightsEnum | Path | None) -> Any:
    """Make a key that changes when a weights file does."""
    if isinstance(entry, _bundled.ResNet10Slim_Weights):
        entry = Path(entry.url)
    if isinstance(entry, Path):
        status = entry.stat()
        stamp = (status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino)
        return entry.resolve(), stamp
    return entry


def digest_once(path: Path, stamp: tuple[int, ...]) -> str:
    """Digest a weights file, once for each stamp that it has."""
    if (path, stamp) not in _digests:
        with path.open("rb") as file:
            _digests.setdefault((path, stamp), hashlib.file_digest(file, "sha256").hexdigest())
    return _digests[path, stamp]


def read_as_digested(path: Path, stamp: tuple[int, ...]) -> State:
    """Read a state dict from just those bytes that its digest is of.

    Raises
    ------
    OSError
        If the file was replaced since it was digested: rows of the new weights would be kept under
        the key of the old ones.
    """
    content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if _digests.setdefault((path, stamp), digest) != digest:
        raise OSError(f"{path} was replaced while it was being read: call again.")
    return parse_state(path, content)


def parse_state(path: Path, content: bytes | None = None) -> State:
    """Read a state dict from a .safetensors file, or from a torch file without unpickling code.

    Without its content the weights are left on disk where that is possible.
    """
    if path.suffix == ".safetensors":
        try:
            return load_file(path) if content is None else load_safetensors(content)
        except Exception as error:  # the package raises an error type of its own
            raise ValueError(f"{path} is no safetensors file: {error}") from error
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
        raise ValueError(f"{path} holds no state dict (names of parameters to tensors).")
    return dict(loaded)
