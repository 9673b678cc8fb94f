"""Readers, which turn batches into rows, and how one is run over many samples."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .devices import Outputs, limit_workers
from .threads import T, Workers, map_in_threads

Fetched: TypeAlias = tuple[Outputs, torch.cuda.Event | None]


class Reader(Protocol):
    """What turns a batch into rows.

    `prepare` turns an image into a tensor, in a worker thread. `read` turns a batch of these into
    outputs of shape (n, d), by key, on the `device`.
    """

    device: torch.device

    def prepare(self, image: Any, /) -> Tensor: ...

    def read(self, batch: Tensor, /) -> Outputs: ...


@dataclass(frozen=True)
class Batch(Generic[T]):
    """What was read of some consecutive samples.

    `rows` has one (m, d) float32 matrix per key, for the m samples that were read; `failures`
    pairs each of the others with its error.
    """

    samples: list[T]
    rows: dict[str, NDArray[np.float32]]
    failures: list[tuple[T, Exception]]


def run_in_batches(
    reader: Reader,
    samples: Iterable[T],
    open_sample: Callable[[T], Any],
    *,
    batch_size: int = 32,
    num_workers: Workers = "auto",
) -> Iterator[Batch[T]]:
    """Open and prepare samples in threads, run a reader over batches of them, yield rows in order.

    While a batch runs, the next ones are prepared; on CUDA a batch is collected only once its
    successor is running.
    """

    def prepare(sample: T) -> Tensor:
        return reader.prepare(open_sample(sample))

    launched: deque[tuple[list[T], Fetched, list[tuple[T, Exception]]]] = deque()
    limit = limit_workers(reader.device)
    # The threads get no name, in which the traceback of an error would keep them alive.
    for good, tensors, failures in _gather_batches(
        map_in_threads(prepare, samples, num_workers, ahead=2 * batch_size, limit=limit),
        batch_size,
    ):
        # The outputs get no name, which would keep them on the device while the next batch runs.
        launched.append((good, _fetch(_read(reader, good, tensors), reader.device), failures))
        if reader.device.type != "cuda" or len(launched) > 1:
            yield _collect(*launched.popleft())
    while launched:
        yield _collect(*launched.popleft())


# Batches ----------------------------------------------------------------------------------------


def _gather_batches(
    results: Iterable[tuple[T, Tensor | Exception]], batch_size: int
) -> Iterator[tuple[list[T], list[Tensor], list[tuple[T, Exception]]]]:
    """Gather full batches of what could be prepared, and the failures among them."""
    good: list[T] = []
    tensors: list[Tensor] = []
    failures: list[tuple[T, Exception]] = []
    for sample, result in results:
        if isinstance(result, Exception):
            failures.append((sample, result))
            if len(failures) == batch_size:  # however many there are, only a few are held
                yield [], [], failures
                failures = []
            continue
        good.append(sample)
        tensors.append(result)
        if len(good) == batch_size:
            yield good, tensors, failures
            good, tensors, failures = [], [], []
    if good or failures:
        yield good, tensors, failures


def stack(samples: list[T], tensors: list[Tensor]) -> Tensor:
    for sample, tensor in zip(samples, tensors, strict=True):
        if tensor.shape != tensors[0].shape:
            raise ValueError(
                f"The images of a batch must have the same shape; got {tuple(tensor.shape)} for "
                f"{sample}, and {tuple(tensors[0].shape)} for {samples[0]}."
            )
    return torch.stack(tensors)


def _read(reader: Reader, samples: list[T], tensors: list[Tensor]) -> Outputs:
    return reader.read(stack(samples, tensors)) if samples else {}


def _fetch(outputs: Outputs, device: torch.device) -> Fetched:
    """Copy outputs to the host; on CUDA only queue the copy, with an event that marks its end."""
    if device.type != "cuda":
        return {key: output.cpu() for key, output in outputs.items()}, None
    # Queued now, the copy precedes the next batch; requested later, it would wait for that too.
    fetched = {key: output.to("cpu", non_blocking=True) for key, output in outputs.items()}
    return fetched, torch.cuda.current_stream(device).record_event()


def _collect(good: list[T], fetched: Fetched, failures: list[tuple[T, Exception]]) -> Batch[T]:
    outputs, arrival = fetched
    if arrival is not None:
        arrival.synchronize()
    # Copies: on CUDA the outputs are in pinned memory, which rows should not occupy for long.
    return Batch(good, {key: output.numpy().copy() for key, output in outputs.items()}, failures)
