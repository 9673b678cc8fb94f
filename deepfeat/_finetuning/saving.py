"""Trained classifiers in files, without pickle."""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torchvision.models import WeightsEnum

FORMAT = 1  # of files
# What a network in training comes from.
ORIGIN = ("backbone", "weights", "preprocessing", "head", "resize", "image_size")


def to_cpu(value: Any) -> Any:
    """Copy what holds tensors, with all of them on the CPU."""
    if isinstance(value, Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {key: to_cpu(item) for key, item in value.items()}
    return [to_cpu(item) for item in value] if isinstance(value, list) else value


def to_plain(value: Any) -> Any:
    """Return weights, paths, devices and numbers of NumPy as plain words and numbers."""
    if isinstance(value, WeightsEnum):
        return value.name
    if isinstance(value, (os.PathLike, torch.device)):
        return str(value)
    return value.item() if isinstance(value, np.generic) else value


def to_json(name: str, value: Any) -> Any:
    """Turn a parameter into what JSON can hold."""
    value = to_plain(value)
    if isinstance(value, Mapping):  # its keys may be numbers, which JSON would make strings of
        items = value.items()
        return {"items": [[to_json(name, key), to_json(name, item)] for key, item in items]}
    if isinstance(value, (list, tuple)):
        return [to_json(name, item) for item in value]
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    raise ValueError(
        f"{name}={value!r} cannot be held by a file without pickle: use pickle or joblib."
    )


def from_json(params: dict[str, Any]) -> dict[str, Any]:
    return {
        name: dict(value["items"]) if isinstance(value, dict) else value
        for name, value in params.items()
    }


_KEY = "deepfeat"  # in the header of the file


def write_network(
    path: str | os.PathLike[str], state: Mapping[str, Tensor], description: Mapping[str, Any]
) -> None:
    """Write a state dict to a safetensors file, whose header has the description as JSON.

    A file that is there already is replaced in one step: it is never lost or half-written.

    Raises
    ------
    FileNotFoundError
        If there is no such folder.
    """
    header = {_KEY: json.dumps(description)}
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    target = Path(path).expanduser()
    if not target.parent.is_dir():
        raise FileNotFoundError(f"there is no folder {os.fspath(target.parent)!r}.")
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".deepfeat-") as folder:
        draft = Path(folder, "draft")
        save_file(tensors, draft, metadata=header)
        draft.replace(target)


def read_network(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a state dict and its description.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it holds something else, or is damaged.
    """
    source = Path(path).expanduser()
    if not source.is_file():
        raise FileNotFoundError(f"there is no file {os.fspath(path)!r}.")
    try:
        with safe_open(source, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(_KEY, "null"))
            if not isinstance(header, dict):
                raise ValueError(
                    f"{source} was not written by FineTuneClassifier.save: its header does not "
                    "tell what network its weights belong to."
                )
            names = file.keys()
            return {name: file.get_tensor(name) for name in names}, header
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(f"{source} is damaged or no safetensors file: {error}") from error
