"""Claims on images: which thread of this process computes which, and which process is alive."""

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

PATIENCE_SECONDS = 300.0  # a live owner without a sign of progress for so long loses its claims
_LOCK_SECONDS = 10.0  # a sweep of another process may hold a new lock for a moment
_TOKEN = re.compile(r"[0-9a-f]{32}")


class ThreadClaims:
    """The claims of the threads of this process on images; the caller sees to locking."""

    def __init__(self) -> None:
        self._signs: dict[threading.Thread, float] = {}
        self._owners: dict[tuple[bytes, bytes], threading.Thread] = {}

    def claim(self, work: bytes, images: Sequence[bytes]) -> NDArray[np.bool_]:
        """Tell which images no other live thread holds, and claim these for this one."""
        self._sign()
        this = threading.current_thread()
        busy = {
            thread for thread, sign in self._signs.items() if thread is not this and is_recent(sign)
        }
        granted = [self._owners.get((work, image)) not in busy for image in images]
        self._owners |= {(work, image): this for image in itertools.compress(images, granted)}
        return np.array(granted, dtype=bool)

    def find_held(self, work: bytes, images: Sequence[bytes]) -> list[bytes]:
        """Return those of the images that this thread holds."""
        this = threading.current_thread()
        return [image for image in images if self._owners.get((work, image)) is this]

    def release(self, work: bytes, images: Sequence[bytes]) -> None:
        """End the claims of this thread on images."""
        self._sign()
        for image in set(self.find_held(work, images)):
            del self._owners[work, image]

    def find_holders(self, work: bytes, images: Sequence[bytes]) -> set[str]:
        """Describe the other threads that hold images."""
        owners = {self._owners.get((work, image)) for image in images}
        others = owners - {None, threading.current_thread()}
        return {f"thread {thread.name!r} of this process" for thread in others if thread}

    def clear(self) -> None:
        """Forget all claims, as after a fork: they are the parent's."""
        self._signs.clear()
        self._owners.clear()

    def _sign(self) -> None:
        """Note that this thread makes progress, and forget the claims of threads that ended."""
        self._signs[threading.current_thread()] = time.time()
        dead = {thread for thread in self._signs if not thread.is_alive()}
        if dead:
            self._signs = {one: sign for one, sign in self._signs.items() if one not in dead}
            self._owners = {key: one for key, one in self._owners.items() if one not in dead}


class ProcessLock:
    """A file in a folder that this process keeps locked: the lock ends with it, however it dies.

    Raises
    ------
    OSError
        If the file system has no locks, or nothing can be written there.
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
    """Tell whether the process that made a lock is alive."""
    if _TOKEN.fullmatch(token) is None:
        raise ValueError(f"{token!r} is not the name of a lock.")
    path = folder / f"{token}.lock"
    if not path.exists():
        return False
    lock = _lock_at(path)
    try:
        lock.acquire(blocking=False)
    except (Timeout, OSError):  # a lock that may not be tried, as another user's, is believed
        return True
    lock.release()
    return False


def sweep(folder: Path) -> None:
    """Remove the files of processes that died without doing so."""
    for path in folder.glob("*.lock"):
        if _TOKEN.fullmatch(path.stem) and not is_locked(folder, path.stem):
            for left in folder.glob(f"{path.stem}.*"):
                with contextlib.suppress(OSError):
                    left.unlink()


def is_recent(sign: float) -> bool:
    """Tell whether a sign of progress is of the last minutes."""
    return abs(time.time() - sign) < PATIENCE_SECONDS


def _lock_at(path: Path) -> FileLock:
    # A soft lock, of a file's mere existence, would outlive its owner.
    return FileLock(path, thread_local=False, fallback_to_soft=False)
