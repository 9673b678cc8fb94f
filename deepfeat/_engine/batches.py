"""A network run over many images in batches on a device."""

import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .devices import Precision, autocast, empty_cache, is_out_of_memory, limit_part, to_device
from .threads import T, Workers, map_in_threads

Outputs: TypeAlias = dict[str, Tensor]
Fetched: TypeAlias = tuple[Outputs, torch.cuda.Event | None]
_fitting: weakref.WeakKeyDictionary[nn.Module, dict[tuple[int, ...], int]] = (
    weakref.WeakKeyDictionary()
)


@dataclass(frozen=True)
class Batch(Generic[T]):
    """What came of some consecutive samples.

    `rows` gives one (m, d) float32 matrix a key, for the m samples that were read; `failures`
    pairs each of the others with its error.
    """

    samples: list[T]
    rows: dict[str, NDArray[np.float32]]
    failures: list[tuple[T, Exception]]


def run_in_batches(
    module: nn.Module,
    function: Callable[[Tensor], Outputs],
    samples: Iterable[T],
    prepare: Callable[[T], Tensor],
    *,
    device: torch.device,
    precision: Precision = "float32",
    batch_size: int = 32,
    num_workers: Workers = "auto",
) -> Iterator[Batch[T]]:
    """Prepare samples in threads, run `function` over batches of them, yield rows in order.

    `prepare` turns a sample into a tensor and `function` a batch of these, on the device, into
    outputs of shape (n, d), by key. While a batch runs, the next ones are prepared; on CUDA a
    batch is collected only when its successor runs already. Where memory runs out, the batch is
    halved, and the size that fitted is remembered for `module`.
    """
    launched: deque[tuple[list[T], Fetched, list[tuple[T, Exception]]]] = deque()
    for good, tensors, failures in _prepare_batches(samples, prepare, batch_size, num_workers):
        outputs: Outputs = {}
        if good:
            batch = stack(good, tensors)
            outputs = _run(module, function, batch, device, precision, batch_size)
        launched.append((good, _fetch(outputs, device), failures))
        if device.type != "cuda" or len(launched) > 1:
            yield _collect(*launched.popleft())
    while launched:
        yield _collect(*launched.popleft())


# Batches ----------------------------------------------------------------------------------------


def _prepare_batches(
    samples: Iterable[T],
    prepare: Callable[[T], Tensor],
    batch_size: int,
    num_workers: Workers,
) -> Iterator[tuple[list[T], list[Tensor], list[tuple[T, Exception]]]]:
    """Gather full batches of what could be prepared, and what could not be."""
    good: list[T] = []
    tensors: list[Tensor] = []
    failures: list[tuple[T, Exception]] = []
    for sample, result in map_in_threads(prepare, samples, num_workers, ahead=2 * batch_size):
        if isinstance(result, Exception):
            failures.append((sample, result))
            if len(failures) == batch_size:  # however many there are, few are held
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
                f"the images of a batch must have one shape, but {sample} was prepared as "
                f"{tuple(tensor.shape)}, and {samples[0]} as {tuple(tensors[0].shape)}."
            )
    return torch.stack(tensors)


def _run(
    module: nn.Module,
    function: Callable[[Tensor], Outputs],
    batch: Tensor,
    device: torch.device,
    precision: Precision,
    batch_size: int,
) -> Outputs:
    """Run a batch, in parts where that is faster or where memory runs out."""
    sizes = _fitting.setdefault(module, {})
    shape = tuple(batch.shape[1:])
    size = limit_part(sizes.get(shape, batch_size), shape, device)
    parts: list[Outputs] = []
    start = 0
    while start < len(batch):
        try:
            part = to_device(batch[start : start + size], device)
            with torch.inference_mode(), autocast(device, precision):
                parts.append(function(part))
            start += size
            continue
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if size == 1:
                raise MemoryError(f"{device} has no memory for a single image: {error}") from error
        # Only here, past the except clause, are the tensors of the failed forward freed.
        empty_cache(device)
        size = sizes[shape] = max(1, min(size, len(batch) - start) // 2)
        warnings.warn(
            f"{device} ran out of memory; going on with batches of {size}.",
            RuntimeWarning,
            stacklevel=2,
        )
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def _fetch(outputs: Outputs, device: torch.device) -> Fetched:
    """Copy outputs to the host; on CUDA only queue that, with an event that tells of its end."""
    if device.type != "cuda":
        return {key: output.cpu() for key, output in outputs.items()}, None
    # Queued now, the copy precedes the next batch: asked for later, it would wait for that too.
    fetched = {key: output.to("cpu", non_blocking=True) for key, output in outputs.items()}
    return fetched, torch.cuda.current_stream(device).record_event()


def _collect(good: list[T], fetched: Fetched, failures: list[tuple[T, Exception]]) -> Batch[T]:
    outputs, arrival = fetched
    if arrival is not None:
        arrival.synchronize()
    # Copies: on CUDA the outputs lie in pinned memory, which rows may not hold for long.
    return Batch(good, {key: output.numpy().copy() for key, output in outputs.items()}, failures)
