"""Knows how a trained network lies in a file: tensors, and a description, but no code."""

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

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
