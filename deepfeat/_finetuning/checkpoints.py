"""Checkpoints: how far a training has come, in a file from which the same training goes on."""

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor

from .._backbones.fingerprint import fingerprint
from .._engine.threads import Workers, map_in_threads
from .._images.records import Record
from .labels import Dataset
from .saving import blame_file, read_network, write_network

State: TypeAlias = dict[Any, Any]  # nested dicts of tensors and of what JSON can hold
Keys: TypeAlias = tuple[str | int, ...]

_FORMAT = 1  # of files; one of another format is not found


class Checkpoint:
    """The files of one training: how far it has come, and the activations it has kept.

    Parameters
    ----------
    folder : str or path
        The folder of the files, which is created if it does not exist.
    key : str
        Digest of the data and the parameters.
    seed : int
        The seed of the training, unless its file has one.

    Attributes
    ----------
    path : Path
        The file of the training.
    seed : int
        The seed of the training.
    stage : int
        Index of the stage that the training has reached.

    Raises
    ------
    ValueError
        If the file is damaged.
    OSError
        If the folder cannot be created.
    """

    def __init__(self, folder: str | os.PathLike[str], key: str, seed: int):
        self._folder = Path(os.path.abspath(os.path.expanduser(folder)))
        self._folder.mkdir(parents=True, exist_ok=True)
        self._key = key
        self.path = self._folder / f"{key}.safetensors"
        self.seed, self.stage = seed, 0
        self._state: State | None = None
        if self.path.exists():
            try:
                self._read()
            except ValueError as error:
                raise ValueError(f"{error} Delete it to start the training over.") from error

    def _read(self) -> None:
        tensors, description = read_network(self.path)
        with blame_file(self.path):
            self.seed, self.stage = int(description["seed"]), int(description["stage"])
            named = ((keys, tensors[str(n)]) for n, keys in enumerate(description["tensors"]))
            self._state = _nest((*description["values"], *named))

    def enter(self, stage: int) -> None:
        """Begin a stage, if the training has not reached it yet."""
        if stage > self.stage:
            self.stage, self._state = stage, None

    def take_state(self) -> State | None:
        """Return, once, how far the stage had come by the file; None if it had not begun."""
        state, self._state = self._state, None
        return state

    def write(self, state: State) -> None:
        """Write how far the stage has come, in one step.

        Raises
        ------
        OSError
            If the file cannot be written.
        """
        leaves = list(_iterate_leaves(state))
        tensors = [(keys, leaf) for keys, leaf in leaves if isinstance(leaf, Tensor)]
        description = {
            "seed": self.seed,
            "stage": self.stage,
            "tensors": [keys for keys, _ in tensors],
            "values": [(keys, leaf) for keys, leaf in leaves if not isinstance(leaf, Tensor)],
        }
        # Copies: a file does not hold tensors that share memory, as tied weights do.
        copies = {str(n): leaf.detach().clone() for n, (_, leaf) in enumerate(tensors)}
        try:
            write_network(self.path, copies, description)
        except FileNotFoundError:  # the same training has ended elsewhere, and removed the draft
            write_network(self.path, copies, description)

    def name_activations(self, dataset: Dataset) -> Path:
        """Return the file for the activations of these images in this stage."""
        names = [(record.input_name, record.index) for record in dataset.records]
        content = fingerprint((self.stage, names))
        return self._folder / f"{self._key}-{content.hex()[:16]}.activations"

    def remove_activations(self) -> None:
        """Remove what is not needed once a stage has ended, drafts of killed processes included."""
        for path in self._folder.glob(f"{self._key}-*.activations*"):
            with suppress(OSError):
                path.unlink()
        for draft in self._folder.glob(f".{self._key}-*"):
            shutil.rmtree(draft, ignore_errors=True)


def make_key(
    origin: Any,
    params: dict[str, Any],
    seed: int | None,
    dataset: Dataset,
    validation: Dataset | None,
    num_workers: Workers,
) -> str:
    """Digest what a training depends on; `origin` is what its network begins with.

    Raises
    ------
    UnknownContentError
        If a parameter cannot be digested.
    ImageError
        If an image cannot be read.
    """
    parts = [part for part in (dataset, validation) if part is not None]
    images = [_describe(part, num_workers) for part in parts]
    return fingerprint((_FORMAT, origin, params, seed, images)).hex()[:32]


def _describe(dataset: Dataset, num_workers: Workers) -> tuple[Any, ...]:
    digests = []
    for record, result in map_in_threads(Record.digest, dataset.records, num_workers, ahead=64):
        if isinstance(result, Exception):
            raise record.error(result)
        digests.append(result)
    labels = dataset.labels if dataset.is_multilabel else dataset.labels.tolist()
    return digests, labels, dataset.weights


# Nested dicts -----------------------------------------------------------------------------------


def _iterate_leaves(value: Any, keys: Keys = ()) -> Iterator[tuple[Keys, Any]]:
    """Yield the values in nested dicts, each with the keys that lead to it."""
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _iterate_leaves(item, (*keys, key))
    else:
        yield keys, value


def _nest(leaves: Iterable[tuple[Iterable[str | int], Any]]) -> State:
    """Make nested dicts of values and the keys that lead to them."""
    nested: State = {}
    for (*keys, last), leaf in leaves:
        inner = nested
        for key in keys:
            inner = inner.setdefault(key, {})
        inner[last] = leaf
    return nested
