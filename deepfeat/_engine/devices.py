"""Devices: finding them, their precision, and how much they run at once."""

import math
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from .threads import CPU_LIMIT

Outputs: TypeAlias = dict[str, Tensor]
Precision: TypeAlias = Literal["float32", "bfloat16", "float16"]

# On a CPU, the maps of larger batches do not fit into its caches and are loaded again for every
# layer: 8 images at a time ran 1.2 to 1.5 times as fast as 32 on VGG16, ResNet-50 and MobileNetV2.
_CPU_VALUES = 8 * 3 * 224 * 224


def find_device(device: str | torch.device) -> torch.device:
    """Turn "auto" into the best device of this machine; check that any other can be used."""
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


def limit_part(size: int, shape: tuple[int, ...], device: torch.device) -> int:
    """Return how many images to run forward at a time: up to `size`, and on a CPU only a few."""
    return size if device.type != "cpu" else min(int(size), max(1, _CPU_VALUES // math.prod(shape)))


def limit_workers(device: torch.device) -> int | None:
    """Return how many threads prepare images at most; those of a GPU have all processors."""
    return None if device.type == "cuda" else CPU_LIMIT


def run_in_parts(
    function: Callable[[Tensor], Outputs],
    batch: Tensor,
    device: torch.device,
    fitting: dict[tuple[int, ...], int],
) -> Outputs:
    """Run a function over a batch, in parts where that is faster or where memory runs out.

    `fitting` remembers how many samples of a shape fit into memory at once.

    Raises
    ------
    MemoryError
        If the device has no memory for a single sample.
    """
    shape = tuple(batch.shape[1:])
    size = limit_part(fitting.get(shape, len(batch)), shape, device)
    parts: list[Outputs] = []
    start, is_retry = 0, False
    while start < len(batch):
        try:
            parts.append(function(to_device(batch[start : start + size], device)))
            start += size
            continue
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            if size == 1 and is_retry:
                raise MemoryError(f"{device} has no memory for a single image: {error}") from error
        # Only here, past the except clause, are the tensors of the failed forward freed.
        empty_cache(device)
        is_retry = True
        size = fitting[shape] = max(1, min(size, len(batch) - start) // 2)
        warnings.warn(
            f"{device} ran out of memory; continuing with batches of {size}.",
            RuntimeWarning,
            stacklevel=2,
        )
    return {key: torch.cat([part[key] for part in parts]) for key in parts[0]}


def to_device(batch: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda":
        # From pinned memory, the copy is queued behind the batch before, and not waited for.
        return batch.pin_memory().to(device, non_blocking=True)
    return batch.to(device)


def autocast(device: torch.device, precision: Precision) -> AbstractContextManager[Any]:
    if precision == "float32":
        return torch.autocast(device.type, enabled=False)  # the caller may have turned it on
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
