"""The two sources of training batches: images, and activations cached of them."""

import errno
import functools
import itertools
import math
import os
import shutil
import tempfile
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .._backbones.preprocessing import Preprocessing
from .._engine.batches import Batch as RowBatch
from .._engine.batches import run_in_batches, stack
from .._engine.devices import Outputs, Precision, limit_part, limit_workers, to_device
from .._engine.threads import Workers, attempt, map_in_threads
from .._extraction.readers import TorchReader
from .._images.decoding import RGB
from .augmentation import Augment, augment_image, draw_flips, mirror
from .cutting import Cut
from .labels import Dataset
from .objectives import Objective

Indices: TypeAlias = NDArray[np.intp]
View: TypeAlias = tuple[int, int]  # indices of a view and of its image

MEMORY_LIMIT = 2 * 2**30  # bytes of cached activations; larger ones go to a file


class Targets(NamedTuple):
    """What the network is to say of each image of a batch, and how much that counts."""

    values: Tensor  # as the objective encodes them
    weights: Tensor  # (n,) or (n, n_labels) float32


@dataclass(frozen=True)
class Batch:
    """Inputs of some images, on the device, and their targets: several if images are mixed."""

    inputs: Tensor
    targets: tuple[Targets, ...]

    def __len__(self) -> int:
        return len(self.inputs)

    def split(self, size: int) -> Iterator["Batch"]:
        """Yield parts of at most `size` images."""
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            targets = (Targets(values[part], weights[part]) for values, weights in self.targets)
            yield Batch(self.inputs[part], tuple(targets))


@dataclass(frozen=True)
class Source(ABC):
    """The batches of a dataset, and the network that runs on them."""

    dataset: Dataset
    objective: Objective
    augment: Augment
    device: torch.device
    seed: int

    def __len__(self) -> int:
        return len(self.dataset)

    def draw(self, indices: Indices, batch_size: int, epoch: int | None) -> Iterator[Batch]:
        """Yield the images at `indices` in batches; without augmentation if `epoch` is None.

        Augmentation depends on the seed, the epoch and the index of an image alone.

        Raises
        ------
        ImageError
            If an image cannot be read.
        """
        start = 0
        for inputs in self._draw_inputs(indices, batch_size, epoch):
            drawn = torch.from_numpy(indices[start : start + len(inputs)])
            yield Batch(inputs, (Targets(self._targets[drawn], self._weights[drawn]),))
            start += len(inputs)

    @abstractmethod
    def forward(self, inputs: Tensor) -> Any:
        """Return what the network gives for the inputs of a batch."""

    @abstractmethod
    def _draw_inputs(
        self, indices: Indices, batch_size: int, epoch: int | None
    ) -> Iterator[Tensor]:
        """Yield the inputs of batches, on the device."""

    @functools.cached_property
    def _targets(self) -> Tensor:
        return self.objective.encode(self.dataset.labels).to(self.device)

    @functools.cached_property
    def _weights(self) -> Tensor:
        return torch.from_numpy(self.dataset.weights.astype(np.float32)).to(self.device)


@dataclass(frozen=True)
class ImageSource(Source):
    """Images that are opened, augmented and prepared each time they are drawn.

    The `module` runs on them, in two parts if there is a `cut`.
    """

    preprocessing: Preprocessing
    num_workers: Workers
    module: nn.Module
    cut: Cut | None

    def forward(self, inputs: Tensor) -> Any:
        # Forwards, a CPU is fastest on few images at a time; other devices gain nothing.
        if self.cut is None or self.device.type != "cpu":
            return self.module(inputs)
        part = limit_part(len(inputs), self.preprocessing.input_shape, self.device)
        return self.cut.run(inputs, part=part)

    def _draw_inputs(
        self, indices: Indices, batch_size: int, epoch: int | None
    ) -> Iterator[Tensor]:
        all_records = self.dataset.records
        flips = draw_flips(self.augment, self.seed, epoch, len(self))
        records = [all_records[index] for index in indices]

        def prepare(index: int, pixels: RGB) -> Tensor:
            return self._augment(mirror(pixels) if flips[index] else pixels, index, epoch)

        def open_image(index: int) -> RGB:
            return all_records[index].open()

        def open_and_prepare(index: int) -> Tensor:
            return prepare(index, open_image(index))

        # The random numbers that a user's function draws have one order in a single thread only.
        in_turn = callable(self.augment) and epoch is not None
        work: Callable[[int], Any] = open_image if in_turn else open_and_prepare
        tensors: list[Tensor] = []
        # The threads get no name, in which the traceback of an error would keep them alive.
        for number, (index, result) in enumerate(
            map_in_threads(
                work,
                indices.tolist(),
                self.num_workers,
                ahead=2 * batch_size,
                limit=limit_workers(self.device),
            ),
            start=1,
        ):
            if in_turn and not isinstance(result, Exception):
                result = attempt(functools.partial(prepare, index), result)
            if isinstance(result, Exception):
                raise all_records[index].error(result)
            tensors.append(result)
            if len(tensors) == batch_size or number == len(indices):
                batch = stack(records[number - len(tensors) : number], tensors)
                yield self.preprocessing.normalize(to_device(batch, self.device))
                tensors = []

    def _augment(self, pixels: RGB, index: int, epoch: int | None) -> Tensor:
        if epoch is None:
            return self.preprocessing.prepare(pixels)
        pixels, is_cropped = augment_image(pixels, self.augment, (self.seed, epoch, index))
        prepare = self.preprocessing.prepare_whole if is_cropped else self.preprocessing.prepare
        return prepare(pixels)


@dataclass(frozen=True)
class ActivationSource(Source):
    """Activations at the cut of a network, cached for each view of each image.

    The part of the network after the `cut` runs on them. `activations` has shape (views, n, d),
    where the first view is the image as it is and the second its mirror image.
    """

    activations: NDArray[np.float32]
    shape: tuple[int, ...]  # of the activations of one image
    memory_format: torch.memory_format  # in whose order dropout draws
    cut: Cut

    def forward(self, inputs: Tensor) -> Any:
        return self.cut.run_suffix(inputs)

    def _draw_inputs(
        self, indices: Indices, batch_size: int, epoch: int | None
    ) -> Iterator[Tensor]:
        views = draw_flips(self.augment, self.seed, epoch, len(self)).astype(int)
        for start in range(0, len(indices), batch_size):
            drawn = indices[start : start + batch_size]
            rows = torch.from_numpy(self.activations[views[drawn], drawn])
            inputs = to_device(rows.reshape(len(drawn), *self.shape), self.device)
            yield inputs.contiguous(memory_format=self.memory_format)


def cache_activations(
    source: ImageSource,
    cut: Cut,
    *,
    views: int,
    precision: Precision,
    batch_size: int,
    report: Callable[[int], None],
    file: Path | None,
) -> ActivationSource | None:
    """Run the frozen beginning of a network once over each view of each image.

    The activations are kept in the file, if there is one, and found there by a later call; else in
    memory, up to `MEMORY_LIMIT`, or in a temporary file. Returns None, with a warning, if the disk
    does not have enough room. `report` is called with the number of images done.
    """
    records = source.dataset.records
    shape: tuple[int, ...] = ()
    memory_format = torch.contiguous_format

    def forward(batch: Tensor) -> Outputs:
        nonlocal shape, memory_format
        activations = cut.run_prefix(batch)
        shape = tuple(activations.shape[1:])
        if activations.ndim == 4 and not activations.is_contiguous():
            memory_format = torch.channels_last
        return {"": activations.float().flatten(1)}

    def open_view(sample: View) -> RGB:
        view, index = sample
        pixels = records[index].open()
        return mirror(pixels) if view else pixels

    reader = TorchReader(source.module, forward, source.preprocessing, source.device, precision)

    def run(samples: Iterable[View]) -> Iterator[RowBatch[View]]:
        for batch in run_in_batches(
            reader, samples, open_view, batch_size=batch_size, num_workers=source.num_workers
        ):
            for (_, index), error in batch.failures:
                raise records[index].error(error)
            yield batch

    cached: NDArray[np.float32] | None = None
    if file is not None and file.exists():
        ends = [(0, 0), (views - 1, len(source) - 1)]
        rows = np.concatenate([batch.rows[""] for batch in run(ends)])  # also finds the shape
        cached = _find_kept(file, (views, len(source), rows.shape[1]), rows)
    if cached is not None:
        report(views * len(source))
    else:
        try:
            for batch in run(itertools.product(range(views), range(len(source)))):
                rows = batch.rows[""]
                if cached is None:
                    cached = _allocate((views, len(source), rows.shape[1]), file)
                    if cached is None:
                        return None
                for sample, row in zip(batch.samples, rows, strict=True):
                    cached[sample] = row
                report(len(rows))
        except BaseException:
            _discard(cached)
            raise
        assert cached is not None  # there is at least one image
        if file is not None:
            _keep(cached, file)
    return ActivationSource(
        dataset=source.dataset,
        objective=source.objective,
        augment=source.augment,
        device=source.device,
        seed=source.seed,
        activations=cached,
        shape=shape,
        memory_format=memory_format,
        cut=cut,
    )


# Room for activations ---------------------------------------------------------------------------


def _allocate(shape: tuple[int, ...], file: Path | None) -> NDArray[np.float32] | None:
    """Make room for activations: in a draft of the file, in memory, or in a temporary file."""
    size = 4 * math.prod(shape)
    if file is not None:
        with suppress(OSError):  # they are not kept, then
            return _make_draft(file, shape)
    if size <= MEMORY_LIMIT:
        return np.empty(shape, dtype=np.float32)
    folder = tempfile.gettempdir()
    try:
        with tempfile.TemporaryFile(prefix="deepfeat-") as temporary:
            return _map(temporary, Path(folder), shape)
    except OSError as error:
        warnings.warn(
            f"The frozen part of the network is computed in each epoch: {folder} cannot hold "
            f"{size / 1e9:.1f} GB of its output ({error.strerror}). The environment variable "
            "TMPDIR names another folder.",
            UserWarning,
            stacklevel=2,
        )
        return None


def _make_draft(file: Path, shape: tuple[int, ...]) -> NDArray[np.float32]:
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=f"{file.name}-")
    os.close(handle)
    try:
        with open(name, "r+b") as draft:
            return _map(draft, file.parent, shape)
    except BaseException:
        os.unlink(name)
        raise


def _map(file: IO[bytes], folder: Path, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Map a file into memory, unless it would take more than half of the room in its folder.

    The room is reserved: a disk that fills up later would otherwise end the process.
    """
    size = 4 * math.prod(shape)
    if size > shutil.disk_usage(folder).free // 2:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
    return np.memmap(file, dtype=np.float32, mode="r+", shape=shape)


def _keep(cached: NDArray[np.float32], file: Path) -> None:
    """Turn a draft, if it is one, into the file that a later training finds."""
    if isinstance(cached, np.memmap) and cached.filename is not None:
        cached.flush()
        with suppress(OSError):  # the same training has ended elsewhere, and removed it
            Path(cached.filename).replace(file)


def _discard(cached: NDArray[np.float32] | None) -> None:
    """Remove a draft, if it is one."""
    if isinstance(cached, np.memmap) and cached.filename is not None:
        Path(cached.filename).unlink(missing_ok=True)


def _find_kept(
    file: Path, shape: tuple[int, ...], ends: NDArray[np.float32]
) -> NDArray[np.float32] | None:
    """Map activations that an interrupted training has kept.

    None unless they are whole, which shows in their number, and in the first and the last row.
    """
    try:
        kept = np.memmap(file, dtype=np.float32, mode="r", shape=shape)
    except (OSError, ValueError):
        return None
    found = np.stack([kept[0, 0], kept[-1, -1]])
    tolerance = 0.05 * np.abs(ends).max()  # for rounding in half precision
    is_whole = file.stat().st_size == kept.nbytes and np.allclose(found, ends, 0.05, tolerance)
    return kept if is_whole else None
