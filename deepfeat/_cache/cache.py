"""`FeatureCache`: rows of features shared by threads, copies and processes."""

from __future__ import annotations

import itertools
import os
import shutil
import threading
import time
import uuid
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .disk import DiskStore
from .memory import MemoryStore

MEMORY_BYTES = 2**30  # default limit of a store in memory
RACY_NS = 2 * 10**9  # the coarsest time stamps of a file system in use (FAT)

FileStat = tuple[str, int, int, int, int, int]
"""Path, size, mtime_ns, ctime_ns, inode and device of a file, taken before reading its content."""


@dataclass(frozen=True)
class CacheInfo:
    """Size of a cache, and its hits and misses in this process.

    Attributes
    ----------
    rows : int
        Number of rows, over all namespaces.
    bytes : int
        Size of their values, without keys and the overhead of the file.
    namespaces : int
        Number of namespaces with at least one row: one per network, preprocessing, layer, pooling,
        precision and engine.
    hits, misses : int
        Number of rows that this process has looked for and found, or not found. Each layer and each
        pooling of an image is a row, so a list of them counts an image several times, although it
        goes through the network once.
    """

    rows: int
    bytes: int
    namespaces: int
    hits: int
    misses: int


class FeatureCache:
    """Rows of float32 features, keyed by namespace and image and shared by all users of a store.

    A namespace identifies how rows are computed (weights, preprocessing, layer, ...), and an image
    what they are computed from; both are digests, given as bytes of any length. Copies, clones and
    unpickled objects share one store, except that a store in memory starts empty in another
    process. Nothing is opened before the first use.

    Parameters
    ----------
    path : str or path-like, optional
        Directory of the store, created by the first write. It must be on a local file system.
        By default, rows are kept in the memory of this process.
    max_bytes : int, optional
        Maximum size of all rows. After a write that exceeds it, the least recently used rows are
        dropped. By default, 1 GiB in memory and no limit on disk.

    Notes
    -----
    On disk, the store is an SQLite database in WAL mode, with a checksum for each row. If the disk
    is full or read-only, one warning is issued; this process then still reads from the cache, but
    no longer writes to it. `retry` resumes writing.

    Examples
    --------
    >>> import numpy as np
    >>> from deepfeat import FeatureCache
    >>> cache = FeatureCache()
    >>> cache.put_many([b"cat", b"dog"], {b"relu7": np.ones((2, 3), np.float32)})
    >>> found, rows = cache.get_many(b"relu7", [b"dog", b"owl"])
    >>> found
    array([ True, False])
    >>> rows
    array([[ 1.,  1.,  1.],
           [nan, nan, nan]], dtype=float32)
    >>> cache.info()
    CacheInfo(rows=2, bytes=24, namespaces=1, hits=1, misses=1)
    """

    __module__ = "deepfeat"  # so that pickles outlive moves

    def __init__(
        self, path: str | os.PathLike[str] | None = None, *, max_bytes: int | None = None
    ) -> None:
        if max_bytes is not None and max_bytes < 0:
            raise ValueError(f"max_bytes must be 0 or more; got {max_bytes}.")
        # Absolute, since a worker may run in another directory.
        self.path = None if path is None else os.path.realpath(os.path.expanduser(path))
        self.max_bytes = MEMORY_BYTES if path is None and max_bytes is None else max_bytes
        self._token = self.path or f"memory:{uuid.uuid4().hex}"
        self._store = _open_store(self.path, self._token)

    def get_many(
        self, namespace: bytes, images: Sequence[bytes]
    ) -> tuple[NDArray[np.bool_], NDArray[np.float32] | None]:
        """Look up the rows of `images` in a namespace.

        A row that fails its checksum is dropped with a `RuntimeWarning` and counts as not found.

        Parameters
        ----------
        namespace : bytes
            Digest of how the rows were computed.
        images : sequence of bytes, length n
            Digests of the images, possibly repeated.

        Returns
        -------
        found : bool array of shape (n,)
            Which images have a row.
        rows : float32 array of shape (n, d), or None
            One row per image, in the order of `images`, NaN if it was not found; None if no image
            was found.
        """
        index_of = {image: i for i, image in enumerate(dict.fromkeys(images))}
        found, rows = self._store.get_many(
            namespace, list(index_of), touch=self.max_bytes is not None
        )
        if len(index_of) < len(images):
            take = [index_of[image] for image in images]
            found, rows = found[take], None if rows is None else rows[take]
        with self._store.lock:
            self._store.hits += int(found.sum())
            self._store.misses += int((~found).sum())
        return found, rows

    def has(self, namespace: bytes, images: Sequence[bytes]) -> NDArray[np.bool_]:
        """Return which of `images` have a row in a namespace.

        The rows are not read, and the lookup counts neither as a use nor as a hit or miss.

        Parameters
        ----------
        namespace : bytes
            Digest of how the rows were computed.
        images : sequence of bytes, length n
            Digests of the images.

        Returns
        -------
        stored : bool array of shape (n,)
            Which images have a row.
        """
        stored = self._store.find(namespace, list(images))
        return np.array([image in stored for image in images], dtype=bool)

    def put_many(
        self,
        images: Sequence[bytes],
        rows: Mapping[bytes, NDArray[np.float32]],
        job: bytes | None = None,
    ) -> None:
        """Store the rows of `images` in one or more namespaces: all of them, or none after a crash.

        A row that already exists is left unchanged.

        Parameters
        ----------
        images : sequence of bytes, length n
            Digests of the images.
        rows : mapping of bytes to float32 array of shape (n, d)
            For each namespace, one row per image; d is the same for all rows of a namespace.
        job : bytes, optional
            Job for which this thread claimed the images. Its claims on them end in the same
            transaction.

        Raises
        ------
        ValueError
            If a matrix does not have one row per image, or its width differs from that of the rows
            already in its namespace.
        """
        matrices = {
            namespace: _as_matrix(matrix, len(images)) for namespace, matrix in rows.items()
        }
        self._store.put_many(list(images), matrices, self.max_bytes, job)

    def update(self, other: FeatureCache) -> None:
        """Add the rows of another cache, for example one that was filled on another machine.

        Parameters
        ----------
        other : FeatureCache
            Cache to copy rows from.
        """
        for namespace, images in other._store.list_images().items():
            for start in range(0, len(images), 1000):
                part = images[start : start + 1000]
                found, rows = other._store.get_many(namespace, part, touch=False)
                if rows is not None:
                    self.put_many(list(itertools.compress(part, found)), {namespace: rows[found]})

    def claim(self, job: bytes, images: Sequence[bytes]) -> NDArray[np.bool_]:
        """Claim images for this thread, so that no other thread or process computes them too.

        An image is granted unless another live thread, in this or any other process, holds it. A
        claim ends with `put_many`, with `release`, with the death of its owner, or after 5 minutes
        in which its owner makes no progress (`claim`, `put_many` and `release` count as progress).
        If nothing can be written, or the file system does not support locks, processes do not
        exclude each other.

        After a grant, look the image up again with `get_many`: its row may have been stored between
        your lookup and your claim. After a refusal, wait and look it up again.

        Parameters
        ----------
        job : bytes
            Digest of what is computed from the images; claims for different jobs do not conflict.
        images : sequence of bytes, length n
            Digests of the images.

        Returns
        -------
        granted : bool array of shape (n,)
            Which images this thread may compute.
        """
        return self._store.claim(job, list(images))

    def release(self, job: bytes, images: Sequence[bytes]) -> None:
        """Release claims of this thread without storing rows, as for images that cannot be read.

        Parameters
        ----------
        job : bytes
            Job passed to `claim`.
        images : sequence of bytes
            Digests of the granted images.
        """
        self._store.release(job, list(images))

    def find_holders(self, job: bytes, images: Sequence[bytes]) -> list[str]:
        """Describe the other threads and processes that hold claims on images.

        Parameters
        ----------
        job : bytes
            Job passed to `claim`.
        images : sequence of bytes
            Digests of the images.

        Returns
        -------
        holders : list of str
            Sorted descriptions, such as "process 4711 on node3".
        """
        return sorted(self._store.find_holders(job, list(images)))

    @property
    def write_error(self) -> str | None:
        """Why this process no longer writes to the store; None if it does."""
        return self._store.write_error

    def retry(self) -> None:
        """Resume writing after an error, for example once there is free space on the disk.

        This is tried at once: see `write_error`.
        """
        self._store.retry()

    def known_digests(self, stats: Sequence[FileStat]) -> list[bytes | None]:
        """Return the content digests of files that have not changed since they were remembered.

        Parameters
        ----------
        stats : sequence of (path, size, mtime_ns, ctime_ns, inode, device)
            Current state of the files.

        Returns
        -------
        digests : list of bytes or None
            None for a file that is unknown or has changed.
        """
        seen = self._store.known_digests([os.fsencode(path) for path, *_ in stats])
        known = [seen.get(os.fsencode(path), (b"", b"")) for path, *_ in stats]
        return [
            digest if stamp == _as_stamp(stat) else None
            for stat, (stamp, digest) in zip(stats, known, strict=True)
        ]

    def remember_digests(
        self,
        stats: Sequence[FileStat],
        digests: Sequence[bytes],
        *,
        stat_time_ns: int | None = None,
    ) -> None:
        """Remember the content digests of files by their path, size, times, inode and device.

        A file that was changed less than 2 s before `stats` were taken is not remembered, since it
        could change again within the same time stamp. (Git calls such a file racily clean.)

        Parameters
        ----------
        stats : sequence of (path, size, mtime_ns, ctime_ns, inode, device)
            State of the files before their content was read.
        digests : sequence of bytes
            Digests of their content.
        stat_time_ns : int, optional
            When `stats` were taken, as returned by `time.time_ns`; by default, now. Pass it if
            reading the content takes seconds.
        """
        newest = (time.time_ns() if stat_time_ns is None else stat_time_ns) - RACY_NS
        settled = [
            (os.fsencode(stat[0]), _as_stamp(stat), digest)
            for stat, digest in zip(stats, digests, strict=True)
            if max(stat[2:4]) < newest
        ]
        if settled:
            self._store.remember_digests(settled)

    def info(self) -> CacheInfo:
        """Return the size of the store, and the hits and misses of this process.

        Returns
        -------
        info : CacheInfo
            Numbers of rows, bytes, namespaces, hits and misses.
        """
        rows, size, namespaces = self._store.count()
        return CacheInfo(rows, size, namespaces, self._store.hits, self._store.misses)

    def room(self) -> int:
        """Return how many bytes of rows the store has room for in all.

        Returns
        -------
        bytes : int
            `max_bytes`; if it is None, half of the free space on the disk.
        """
        if self.max_bytes is not None:
            return self.max_bytes
        folder = Path(self.path or "")
        while not folder.exists():
            folder = folder.parent
        return shutil.disk_usage(folder).free // 2

    def prune(self, max_bytes: int) -> int:
        """Drop the least recently used rows until at most `max_bytes` are left.

        On disk, reading a row counts as a use only if the cache was created with `max_bytes`;
        writing it always does.

        Parameters
        ----------
        max_bytes : int
            Maximum size of the remaining rows.

        Returns
        -------
        dropped : int
            Number of rows that were dropped.
        """
        return self._store.prune(max_bytes)

    def clear(self) -> None:
        """Delete all rows, claims and file digests, for everyone who shares the store."""
        self._store.clear()

    def __repr__(self) -> str:
        where = "" if self.path is None else f"{self.path!r}, "
        return f"FeatureCache({where}max_bytes={self.max_bytes})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FeatureCache) and self._token == other._token

    def __hash__(self) -> int:
        return hash(self._token)

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_store"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._store = _open_store(self.path, self._token, adopt=True)


Store = MemoryStore | DiskStore
_stores: weakref.WeakValueDictionary[str, Store] = weakref.WeakValueDictionary()
_stores_lock = threading.Lock()
_adopted: list[Store] = []
_forking: list[Store] = []


def _open_store(path: str | None, token: str, *, adopt: bool = False) -> Store:
    """Return the store of a token, of which this process has only one."""
    with _stores_lock:
        store = _stores.get(token)
        if store is None:
            store = _stores[token] = MemoryStore() if path is None else DiskStore(path)
            if adopt:
                # Keep it alive: a worker drops what it unpickled once its task is done, and the
                # next task needs the rows again.
                _adopted[:] = [store]
        return store


def _before_fork() -> None:
    """Wait for all transactions and close all files: SQLite's locks do not survive a fork."""
    _stores_lock.acquire()
    _forking[:] = _stores.values()
    for store in _forking:
        store.lock.acquire()
        store.close()


def _after_fork() -> None:
    for store in _forking:
        store.lock.release()
    _forking.clear()
    _stores_lock.release()


def _after_fork_in_child() -> None:
    """Leave its claims to the parent: the child must neither hold nor release them."""
    for store in _forking:
        store.forget_parent()
    _after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_before_fork, after_in_parent=_after_fork, after_in_child=_after_fork_in_child
    )


def _as_matrix(matrix: NDArray[Any], n_images: int) -> NDArray[np.float32]:
    matrix = np.ascontiguousarray(matrix, dtype=np.float32)
    if matrix.ndim != 2 or len(matrix) != n_images or not matrix.shape[1]:
        raise ValueError(
            f"rows must have matrices of shape ({n_images}, d), one row per image, with d > 0; "
            f"got {matrix.shape}."
        )
    return matrix


def _as_stamp(stat: FileStat) -> bytes:
    return b"%d %d %d %d %d" % stat[1:]  # text: an inode can exceed SQLite's integers


# Doctest skips a class whose `__module__` is another one, unless it is listed here.
__test__ = {"FeatureCache": FeatureCache}
