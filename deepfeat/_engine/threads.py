"""Threads: a function mapped over samples, in order."""

import os
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import Literal, TypeAlias, TypeVar

CPU_LIMIT = 8  # threads beside a network that runs on the CPU, too; more do not pay off
Workers: TypeAlias = int | Literal["auto"]
T = TypeVar("T")
R = TypeVar("R")


def map_in_threads(
    function: Callable[[T], R],
    samples: Iterable[T],
    num_workers: Workers,
    *,
    ahead: int,
    limit: int | None = CPU_LIMIT,
) -> Iterator[tuple[T, R | Exception]]:
    """Map in threads, in order, at most `ahead` samples before the one that is taken.

    "auto" takes a thread per processor, up to `limit`. An exception that `function` raises for a
    sample is the result for that sample.
    """
    iterator = iter(samples)
    workers = (
        min(count_processors(), limit or sys.maxsize) if num_workers == "auto" else num_workers
    )
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


def count_processors() -> int:
    """Count the processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def attempt(function: Callable[[T], R], sample: T) -> R | Exception:
    """Call a function; an exception is returned, and keeps none of the function's variables."""
    try:
        return function(sample)
    except Exception as error:
        clear_frames(error)
        return error


def clear_frames(error: BaseException) -> None:
    """Keep the lines in which an error and its causes were raised, but not the variables there."""
    pending = [error]
    seen: list[BaseException] = []
    while pending:
        cause = pending.pop()
        if cause not in seen:
            seen.append(cause)
            traceback.clear_frames(cause.__traceback__)
            pending += filter(None, (cause.__cause__, cause.__context__))
