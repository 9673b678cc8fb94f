"""Trained classifiers in files, without pickle."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torchvision.models import WeightsEnum

_FORMAT = 1  # of files
_KEY, _DIGEST = "deepfeat", "digest"  # in the header of a file


@dataclass(frozen=True)
class SavedClassifier:
    """What a file holds of a classifier: its parameters, and what it has learned."""

    params: dict[str, Any]
    state: dict[str, Tensor]  # of the network
    n_outputs: int  # of the network before it got its head
    seed: int
    classes: NDArray[Any]
    multilabel: bool  # labels per image
    n_features_in: int | None
    feature_names_in: list[str]
    history: list[dict[str, Any]]
    best_validation_score: float | None


def save_classifier(path: str | os.PathLike[str], saved: SavedClassifier) -> None:
    """Write a classifier to a file.

    Raises
    ------
    ValueError
        If a parameter or a label cannot be held by JSON.
    FileNotFoundError
        If the folder of the file does not exist.
    """
    params = {name: _to_json(name, value) for name, value in saved.params.items()}
    labels = [_to_json("label", label) for label in saved.classes.tolist()]
    description = {
        "format": _FORMAT,
        "params": params,
        "n_outputs": saved.n_outputs,
        "seed": saved.seed,
        "classes": [str(saved.classes.dtype), labels],
        "multilabel": saved.multilabel,
        "columns": [saved.n_features_in, saved.feature_names_in],
        "history": saved.history,
        "best_validation_score": saved.best_validation_score,
    }
    write_network(path, saved.state, description)


def load_classifier(path: str | os.PathLike[str]) -> SavedClassifier:
    """Read a classifier from a file.

    Raises
    ------
    FileNotFoundError
        If the file does not exist.
    ValueError
        If it is damaged, was written by a later release, or holds something else.
    """
    state, description = read_network(path)
    with blame_file(path):
        found = description["format"]
    if found != _FORMAT:
        raise ValueError(
            f"{os.fspath(path)} has format {found}, but this release reads format {_FORMAT}: use "
            "the release of deepfeat that wrote it."
        )
    with blame_file(path):
        dtype, labels = description["classes"]
        n_features_in, feature_names_in = description["columns"]
        return SavedClassifier(
            params=_from_json(description["params"]),
            state=state,
            n_outputs=description["n_outputs"],
            seed=description["seed"],
            classes=np.array(labels, dtype=dtype),
            multilabel=description["multilabel"],
            n_features_in=n_features_in,
            feature_names_in=feature_names_in,
            history=description["history"],
            best_validation_score=description["best_validation_score"],
        )


@contextmanager
def blame_file(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn errors raised by the contents of a file into one that names the file."""
    try:
        yield
    except Exception as error:  # what a file holds may be of any type
        raise ValueError(
            f"{os.fspath(path)} does not hold what its header says: {type(error).__name__}: {error}"
        ) from error


class Fitted:
    """What a classifier has learned: its attributes in a pickle, the bytes of a file elsewhere.

    skops, which cannot hold a network, uses `__reduce__`; pickle and copy prefer `__reduce_ex__`.
    """

    def __init__(
        self,
        content: bytes = b"",
        attributes: Mapping[str, Any] = MappingProxyType({}),
        save: Callable[[Path], None] | None = None,
    ):
        self.content, self.attributes, self._save = content, attributes, save

    def load(self) -> SavedClassifier:
        """Read what a file with these bytes holds."""
        with tempfile.TemporaryDirectory(prefix="deepfeat-") as folder:
            path = Path(folder, "classifier.safetensors")
            path.write_bytes(self.content)
            return load_classifier(path)

    def __reduce__(self) -> tuple[Any, ...]:
        assert self._save is not None
        with tempfile.TemporaryDirectory(prefix="deepfeat-") as folder:
            path = Path(folder, "classifier.safetensors")
            self._save(path)
            return type(self), (path.read_bytes(),)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return type(self), (self.content, self.attributes)


# Tensors and their description ------------------------------------------------------------------


def write_network(
    path: str | os.PathLike[str], state: Mapping[str, Tensor], description: Mapping[str, Any]
) -> None:
    """Write a state dict to a safetensors file, with the description as JSON in its header.

    The header also has a digest of both. An existing file is replaced in one step: it is never lost
    or half-written.

    Raises
    ------
    FileNotFoundError
        If the folder of the file does not exist.
    OSError
        If the file cannot be written.
    """
    text = json.dumps(description)
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    target = Path(path).expanduser()
    if not target.parent.is_dir():
        raise FileNotFoundError(
            f"path must be in an existing folder; {os.fspath(target.parent)!r} does not exist."
        )
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.stem}-") as folder:
        draft = Path(folder, "draft")
        try:
            save_file(tensors, draft, metadata={_KEY: text, _DIGEST: _digest(text, tensors)})
        except SafetensorError as error:
            raise OSError(f"{os.fspath(target)} cannot be written: {error}") from error
        with draft.open("r+b") as file:  # a power failure may not replace it by an empty file
            os.fsync(file.fileno())
        draft.replace(target)


def read_network(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a state dict and its description.

    Raises
    ------
    FileNotFoundError
        If the file does not exist.
    ValueError
        If it is damaged or holds something else.
    """
    source = Path(path).expanduser()
    if not source.is_file():
        raise FileNotFoundError(f"path must be an existing file; got {os.fspath(path)!r}.")
    while True:
        before = source.stat()
        try:
            return _read(source)
        except ValueError:
            # safetensors opens a file twice, between which another process may replace it.
            if os.path.samestat(before, source.stat()):
                raise


def _read(source: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(source, framework="pt") as file:
            header = file.metadata() or {}
            names = file.keys()
            state = {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise ValueError(f"{source} is damaged or not a safetensors file: {error}") from error
    if not {_KEY, _DIGEST} <= header.keys():
        raise ValueError(
            f"{source} was not written by FineTuneClassifier.save: its header does not describe a "
            "classifier."
        )
    if header[_DIGEST] != _digest(header[_KEY], state):
        raise ValueError(f"{source} is damaged: its contents do not have the digest in its header.")
    with blame_file(source):
        description: dict[str, Any] = json.loads(header[_KEY])
    return state, description


def _digest(text: str, state: Mapping[str, Tensor]) -> str:
    """Digest a description and tensors on the CPU, whatever their order."""
    digest = hashlib.sha256(text.encode())
    for name, value in sorted(state.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


# Plain values -----------------------------------------------------------------------------------


def to_cpu(value: Any) -> Any:
    """Copy nested dicts and lists, with all tensors in them on the CPU."""
    if isinstance(value, Tensor):
        return value.cpu()
    if isinstance(value, dict):
        return {key: to_cpu(item) for key, item in value.items()}
    return [to_cpu(item) for item in value] if isinstance(value, list) else value


def to_plain(value: Any) -> Any:
    """Turn weights, paths and devices into strings, and NumPy numbers into those of Python.

    A RandomState is left out: what was drawn from it is saved as the seed.
    """
    if isinstance(value, np.random.RandomState):
        return None
    if isinstance(value, WeightsEnum):
        return value.name
    if isinstance(value, (os.PathLike, torch.device)):
        return str(value)
    return value.item() if isinstance(value, np.generic) else value


def _to_json(name: str, value: Any) -> Any:
    """Turn a parameter into something that JSON can hold."""
    value = to_plain(value)
    if isinstance(value, Mapping):  # its keys may be numbers, which JSON would turn into strings
        items = value.items()
        return {"items": [[_to_json(name, key), _to_json(name, item)] for key, item in items]}
    if isinstance(value, (list, tuple)):
        return [_to_json(name, item) for item in value]
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    raise ValueError(f"{name}={value!r} cannot be saved without pickle: use pickle or joblib.")


def _from_json(params: dict[str, Any]) -> dict[str, Any]:
    return {
        name: dict(value["items"]) if isinstance(value, dict) else value
        for name, value in params.items()
    }
