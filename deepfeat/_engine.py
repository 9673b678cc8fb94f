"""Knows how to run a network over many images in batches on a device, and to pool what it gives."""

import math
import os
import traceback
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import islice
from typing import Any, Generic, Literal, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ._layers import ResolvedLayer, count_channels

Pooling: TypeAlias = Literal["avg", "max", "gem", "cls", "flatten"]
Precision: TypeAlias = Literal["float32", "bfloat16", "float16"]
Outputs: TypeAlias = dict[str, Tensor]
Fetched: TypeAlias = tuple[Outputs, torch.cuda.Event | None]
Workers: TypeAlias = int | Literal["auto"]
T = TypeVar("T")
R = TypeVar("R")

# On a CPU the maps of larger batches than this leave its caches and are paged in anew for every
# layer: 8 images at a time ran 1.2 to 1.5 times as fast as 32 on VGG16, ResNet-50 and MobileNetV2.
_CPU_VALUES = 8 * 3 * 224 * 224
_GEM_POWER = 3.0
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


def find_device(device: str | torch.device) -> torch.device:
    """Turn "auto" into the best device of this machine; check that any other can be had."""
    if isinstance(device, str) and device == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(0, device=found).cpu()
    except (RuntimeError, AssertionError, ImportError, TypeError) as error:
        reason = str(error).partition("\n")[0].partition(". ")[0]  # of MPS it has 7,777 characters
        raise ValueError(f"device {str(device)!r} cannot be used here: {reason}") from error
    if found.type == "cuda" and found.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return found


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


def pool(layer: ResolvedLayer, output: Tensor, pooling: Pooling) -> Tensor:
    """Turn the output of a layer into one float32 row per image.

    Maps (n, C, H, W) are pooled over H and W, tokens (n, N, D) over those of patches, sequences
    (n, C, L) over L; vectors (n, D) stay. "gem" is the generalised mean of Radenovic et al. (2019),
    "Fine-tuning CNN Image Retrieval with No Human Annotation", with power 3: values below 1e-6
    count as 1e-6.
    """
    output = output.float()
    if output.ndim == 4 and layer.channels_last:
        output = output.movedim(-1, 1)
    if pooling == "flatten" or output.ndim == 2:
        return output.reshape(len(output), -1)
    if pooling == "cls":
        return output[:, 0]
    if output.ndim == 3 and layer.channels_last:
        output = output[:, layer.prefix_tokens :].movedim(-1, 1)
    places = tuple(range(2, output.ndim))
    if pooling == "max":
        return output.amax(places)
    if pooling == "gem":
        return output.clamp(min=1e-6).pow(_GEM_POWER).mean(places).pow(1 / _GEM_POWER)
    return output.mean(places)


def count_features(layer: ResolvedLayer, pooling: Pooling) -> int:
    """Tell how many features a layer has after pooling.

    Raises
    ------
    ValueError
        If the layer cannot be pooled so.
    """
    shape = layer.output_shape
    if pooling == "flatten" or len(shape) == 1:
        return math.prod(shape)
    if pooling == "cls" and not layer.class_token:
        raise ValueError(
            f"pooling='cls' needs a class token, but layer {layer.name!r} (output shape {shape}) "
            "does not have one: use 'avg', 'max', 'gem' or 'flatten'."
        )
    if len(shape) not in (2, 3):
        raise ValueError(
            f"layer {layer.name!r} of output shape {shape} can be pooled by 'flatten' alone."
        )
    return count_channels(layer)


def map_in_threads(
    function: Callable[[T], R], samples: Iterable[T], num_workers: Workers, *, ahead: int
) -> Iterator[tuple[T, R | Exception]]:
    """Map in threads, in order, no more than `ahead` samples before the one that is taken.

    What `function` raises for a sample is its result.
    """
    iterator = iter(samples)
    workers = _count_workers() if num_workers == "auto" else num_workers
    if workers == 0:
        yield from ((sample, attempt(function, sample)) for sample in iterator)
        return
    threads = ThreadPoolExecutor(workers, thread_name_prefix="deepfeat")
    try:
        futures: deque[tuple[T, Future[R | Exception]]] = deque()
        while True:
            for sample in islice(iterator, ahead - len(futures)):
                futures.append((sample, threads.submit(attempt, function, sample)))
            if not futures:
                return
            sample, future = futures.popleft()
            yield sample, future.result()
    finally:
        threads.shutdown(cancel_futures=True)


def limit_part(size: int, shape: tuple[int, ...], device: torch.device) -> int:
    """Return how many images to run at a time forwards: up to `size`, and on a CPU few."""
    return size if device.type != "cpu" else min(int(size), max(1, _CPU_VALUES // math.prod(shape)))


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


def _count_workers() -> int:
    """Count the processors that this process may use: no more than 8 are worth a thread."""
    if hasattr(os, "sched_getaffinity"):
        return min(8, len(os.sched_getaffinity(0)))
    return min(8, os.cpu_count() or 1)


def attempt(function: Callable[[T], R], sample: T) -> R | Exception:
    """Call a function; what it raises is its result, and holds nothing that the function held."""
    try:
        return function(sample)
    except Exception as error:
        _clear_frames(error)
        return error


def _clear_frames(error: BaseException) -> None:
    """Keep the lines in which an error and its causes were raised, and not the variables there."""
    pending = [error]
    seen: list[BaseException] = []
    while pending:
        cause = pending.pop()
        if cause not in seen:
            seen.append(cause)
            traceback.clear_frames(cause.__traceback__)
            pending += filter(None, (cause.__cause__, cause.__context__))


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


def to_device(batch: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda":
        # From pinned memory the copy is queued behind the batch before, not waited for.
        return batch.pin_memory().to(device, non_blocking=True)
    return batch.to(device)


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    if precision == "float32":
        return torch.autocast(device.type, enabled=False)  # the caller's may be on
    return torch.autocast(device.type, dtype=getattr(torch, precision))


def is_out_of_memory(error: BaseException) -> bool:
    """Recognise what CUDA and its libraries, MPS and the CPU's allocator raise."""
    words = str(error).lower()
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(
        phrase in words
        for phrase in ("out of memory", "not enough memory", "can't allocate", "alloc_failed")
    )


def empty_cache(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).empty_cache()


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
