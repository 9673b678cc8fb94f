"""Claims of threads on images, and locks that show which processes are alive."""

from __future__ import annotations

import contextlib
import itertools
import os
import platform
import re
import threading
import time
import uuid
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

PATIENCE_SECONDS = 300.0  # without progress for this long, a live owner loses its claims
_LOCK_SECONDS = 10.0  # another process that sweeps may hold a new lock for a moment
_TOKEN = re.compile(r"[0-9a-f]{32}")


class ThreadClaims:
    """Claims of this process's threads on images; locking is up to the caller."""

    def __init__(self) -> None:
        self._progress: dict[threading.Thread, float] = {}
        self._owners: dict[tuple[bytes, bytes], threading.Thread] = {}

    def claim(self, job: bytes, images: Sequence[bytes]) -> NDArray[np.bool_]:
        """Claim the images that no other live thread holds; return which these are."""
        self._record_progress()
        this = threading.current_thread()
        busy = {
            thread
            for thread, timestamp in self._progress.items()
            if thread is not this and is_recent(timestamp)
        }
        granted = [self._owners.get((job, image)) not in busy for image in images]
        self._owners |= {(job, image): this for image in itertools.compress(images, granted)}
        return np.array(granted, dtype=bool)

    def find_held(self, job: bytes, images: Sequence[bytes]) -> list[bytes]:
        """Return the images that this thread holds."""
        this = threading.current_thread()
        return [image for image in images if self._owners.get((job, image)) is this]

    def release(self, job: bytes, images: Sequence[bytes]) -> None:
        """Release this thread's claims on images."""
        self._record_progress()
        for image in set(self.find_held(job, images)):
            del self._owners[job, image]

    def find_holders(self, job: bytes, images: Sequence[bytes]) -> set[str]:
        """Describe the other threads that hold images."""
        owners = {self._owners.get((job, image)) for image in images}
        others = owners - {None, threading.current_thread()}
        return {f"thread {thread.name!r} of this process" for thread in others if thread}

    def clear(self) -> None:
        """Forget all claims, for example after a fork, when they are the parent's."""
        self._progress.clear()
        self._owners.clear()

    def _record_progress(self) -> None:
        """Record that this thread makes progress; drop the claims of threads that have ended."""
        self._progress[threading.current_thread()] = time.time()
        dead = {thread for thread in self._progress if not thread.is_alive()}
        if dead:
            self._progress = {
                thread: timestamp
                for thread, timestamp in self._progress.items()
                if thread not in dead
            }
            self._owners = {
                key: thread for key, thread in self._owners.items() if thread not in dead
            }


class ProcessLock:
    """A file that this process keeps locked: the lock ends with the process, however it dies.

    Raises
    ------
    OSError
        If the file system does not support locks, or the folder cannot be written to.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.token = uuid.uuid4().hex
        self.path = folder / f"{self.token}.lock"
        self.host, self.pid = platform.node(), os.getpid()
        self._lock = _lock_at(self.path)
        try:
            self._lock.acquire(timeout=_LOCK_SECONDS)
        except BaseException:
            self.path.unlink(missing_ok=True)
            raise

    def release(self) -> None:
        """Unlock and remove the file."""
        with contextlib.suppress(OSError):
            self._lock.release()
            self.path.unlink(missing_ok=True)


def is_locked(folder: Path, token: str) -> bool:
    """Return whether the process that created a lock is alive."""
    if _TOKEN.fullmatch(token) is None:
        raise ValueError(f"token must be 32 hexadecimal digits; got {token!r}.")
    path = folder / f"{token}.lock"
    if not path.exists():
        return False
    lock = _lock_at(path)
    try:
        lock.acquire(blocking=False)
    except (Timeout, OSError):  # one that cannot be tried, such as another user's, counts as held
        return True
    lock.release()
    return False


def sweep(folder: Path) -> None:
    """Remove the files that processes left when they died."""
    for path in folder.glob("*.lock"):
        if _TOKEN.fullmatch(path.stem) and not is_locked(folder, path.stem):
            for leftover in folder.glob(f"{path.stem}.*"):
                with contextlib.suppress(OSError):
                    leftover.unlink()


def is_recent(timestamp: float) -> bool:
    """Return whether progress was made within the last `PATIENCE_SECONDS`."""
    return abs(time.time() - timestamp) < PATIENCE_SECONDS


def _lock_at(path: Path) -> FileLock:
    # Never a soft lock: the mere existence of a file would outlive its owner.
    return FileLock(path, thread_local=False, fallback_to_soft=False)
