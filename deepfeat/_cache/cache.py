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

MEMORY_BYTES = 2**30  # bound of a store in memory when none is given
RACY_NS = 2 * 10**9  # the coarsest time stamp of a file system in use (FAT)

FileStat = tuple[str, int, int, int, int, int]
"""Path, size, mtime_ns, ctime_ns, inode and device of a file, taken before its content was read."""


@dataclass(frozen=True)
class CacheInfo:
    """What a cache holds, and how it served this process.

    Attributes
    ----------
    rows : int
        Rows held, over all contexts.
    bytes : int
        Bytes of their values; keys and file structure come on top.
    contexts : int
        Contexts with at least one row.
    hits, misses : int
        Images found and not found by this process.
    """

    rows: int
    bytes: int
    contexts: int
    hits: int
    misses: int


class FeatureCache:
    """Rows of float32 features under (context, image), shared by all that name the same store.

    A context says how a row is made (weights, preprocessing, layer, ...), an image what it is made
    of; both are digests, any bytes. Copies, clones and unpickled objects are the same store; in
    another process, a store in memory begins empty. Nothing is opened before the first use.

    Parameters
    ----------
    path : str or path-like, optional
        Directory of the store, made when first written to. It must be on a local file system.
        By default the rows live in the memory of this process.
    max_bytes : int, optional
        Bound on the bytes of the rows; above it, the rows used longest ago are dropped after a
        write. By default 1 GiB in memory and no bound on disk.

    Notes
    -----
    On disk this is an SQLite database in WAL mode, a checksum with each row. A disk that is full
    or read-only gives one warning; the cache is then read, and written no more by this process.

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
    CacheInfo(rows=2, bytes=24, contexts=1, hits=1, misses=1)
    """

    __module__ = "deepfeat"  # so that pickles outlive moves

    def __init__(
        self, path: str | os.PathLike[str] | None = None, *, max_bytes: int | None = None
    ) -> None:
        if max_bytes is not None and max_bytes < 0:
            raise ValueError(f"max_bytes must be 0 or more, not {max_bytes}.")
        # An absolute path: a worker may run in another directory.
        self.path = None if path is None else os.path.realpath(os.path.expanduser(path))
        self.max_bytes = MEMORY_BYTES if path is None and max_bytes is None else max_bytes
        self._token = self.path or f"memory:{uuid.uuid4().hex}"
        self._store = _open_store(self.path, self._token)

    def get_many(
        self, context: bytes, images: Sequence[bytes]
    ) -> tuple[NDArray[np.bool_], NDArray[np.float32] | None]:
        """Look up the rows of `images` in one context.

        A row that fails its checksum is dropped with a `RuntimeWarning` and counts as not found.

        Parameters
        ----------
        context : bytes
            Digest of how the rows were made.
        images : sequence of bytes, length n
            Digests of the images; repeats are welcome.

        Returns
        -------
        found : bool array of shape (n,)
            Which images have a row.
        rows : float32 array of shape (n, d), or None
            Their rows in the order of `images`, NaN where not found; None if none is found.
        """
        place = {image: i for i, image in enumerate(dict.fromkeys(images))}
        found, rows = self._store.get_many(context, list(place), touch=self.max_bytes is not None)
        if len(place) < len(images):
            take = [place[image] for image in images]
            found, rows = found[take], None if rows is None else rows[take]
        with self._store.lock:
            self._store.hits += int(found.sum())
            self._store.misses += int((~found).sum())
        return found, rows

    def has(self, context: bytes, images: Sequence[bytes]) -> NDArray[np.bool_]:
        """Tell which of `images` have a row in one context, without reading or counting it.

        Parameters
        ----------
        context : bytes
            Digest of how the rows were made.
        images : sequence of bytes, length n
            Digests of the images.

        Returns
        -------
        stored : bool array of shape (n,)
            Which images have a row.
        """
        stored = self._store.find(context, list(images))
        return np.array([image in stored for image in images], dtype=bool)

    def put_many(
        self,
        images: Sequence[bytes],
        rows: Mapping[bytes, NDArray[np.float32]],
        work: bytes | None = None,
    ) -> None:
        """Store the rows of `images` in one or more contexts: all of them, or after a crash none.

        A row that is there already is kept as it is.

        Parameters
        ----------
        images : sequence of bytes, length n
            Digests of the images.
        rows : mapping of bytes to float32 array of shape (n, d)
            For each context, one row per image; d is the same for all rows of a context.
        work : bytes, optional
            The work under which this thread claimed the images. Its claims on them end in the same
            transaction.

        Raises
        ------
        ValueError
            If a matrix does not have one row per image, or a width other than its context has.
        """
        matrices = {context: _as_matrix(matrix, len(images)) for context, matrix in rows.items()}
        self._store.put_many(list(images), matrices, self.max_bytes, work)

    def update(self, other: FeatureCache) -> None:
        """Take in the rows of another cache, as one that was filled on another machine.

        Parameters
        ----------
        other : FeatureCache
            It is read, and stays as it is.
        """
        for context, images in other._store.list_images().items():
            for start in range(0, len(images), 1000):
                part = images[start : start + 1000]
                found, rows = other._store.get_many(context, part, touch=False)
                if rows is not None:
                    self.put_many(list(itertools.compress(part, found)), {context: rows[found]})

    def claim(self, work: bytes, images: Sequence[bytes]) -> NDArray[np.bool_]:
        """Ask which images this thread may compute now, so that no other does them too.

        An image is granted unless another live thread, here or in any process, holds it. A claim
        ends with `put_many`, `release`, the death of its owner, or 5 minutes in which its owner
        makes no progress (`claim`, `put_many` and `release` are progress). Where nothing can be
        written, or the file system has no locks, all is granted to each process.

        Look again with `get_many` after a grant: the row may have come between your look and your
        claim. Where refused, wait and look again.

        Parameters
        ----------
        work : bytes
            Digest of what is done with the images; claims of different works never meet.
        images : sequence of bytes, length n
            Digests of the images.

        Returns
        -------
        granted : bool array of shape (n,)
            Which images are this thread's to compute.
        """
        return self._store.claim(work, list(images))

    def release(self, work: bytes, images: Sequence[bytes]) -> None:
        """Give back claims of this thread without a row, as when an image cannot be read.

        Parameters
        ----------
        work : bytes
            As given to `claim`.
        images : sequence of bytes
            Digests of images that were granted.
        """
        self._store.release(work, list(images))

    def find_holders(self, work: bytes, images: Sequence[bytes]) -> list[str]:
        """Describe who else holds claims on images.

        Parameters
        ----------
        work : bytes
            As given to `claim`.
        images : sequence of bytes
            Digests of the images.

        Returns
        -------
        holders : list of str
            Such as "process 4711 on node3", sorted.
        """
        return sorted(self._store.find_holders(work, list(images)))

    @property
    def write_error(self) -> str | None:
        """Why this process stores nothing more; None if it does."""
        return self._store.write_error

    def retry(self) -> None:
        """Write again after an error, as when room was made on the disk; try it at once."""
        self._store.retry()

    def known_digests(self, stats: Sequence[FileStat]) -> list[bytes | None]:
        """Return the content digests of files that have not changed since they were remembered.

        Parameters
        ----------
        stats : sequence of (path, size, mtime_ns, ctime_ns, inode, device)
            The files as they are now.

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
        """Remember the content digests of files under their path, size, times, inode and device.

        A file changed less than 2 s before its stat is not remembered: it could change once more
        within the same time stamp. (Git calls this racily clean.)

        Parameters
        ----------
        stats : sequence of (path, size, mtime_ns, ctime_ns, inode, device)
            The files as they were before their content was read.
        digests : sequence of bytes
            Digests of their content.
        stat_time_ns : int, optional
            When `stats` were taken (`time.time_ns`), by default now. Give it where reading the
            content takes seconds.
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
        """Count what the store holds, and how often this process found what it asked for.

        Returns
        -------
        info : CacheInfo
            Rows, bytes, contexts, hits and misses.
        """
        rows, size, contexts = self._store.count()
        return CacheInfo(rows, size, contexts, self._store.hits, self._store.misses)

    def room(self) -> int:
        """Tell how many bytes of rows can be kept in all.

        Returns
        -------
        bytes : int
            `max_bytes`; without it, half of what is free on the disk.
        """
        if self.max_bytes is not None:
            return self.max_bytes
        folder = Path(self.path or "")
        while not folder.exists():
            folder = folder.parent
        return shutil.disk_usage(folder).free // 2

    def prune(self, max_bytes: int) -> int:
        """Drop the rows used longest ago until at most `max_bytes` are left.

        On disk, a use is a write, and with `max_bytes` given to the constructor also a read.

        Parameters
        ----------
        max_bytes : int
            Bound on the bytes of the rows.

        Returns
        -------
        dropped : int
            How many rows were dropped.
        """
        return self._store.prune(max_bytes)

    def clear(self) -> None:
        """Forget all rows, claims and file digests, for everyone who shares the store."""
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
    """Return this process's one store of that token."""
    with _stores_lock:
        store = _stores.get(token)
        if store is None:
            store = _stores[token] = MemoryStore() if path is None else DiskStore(path)
            if adopt:
                # A worker drops what it unpickled when its task is done; the next task will want
                # the rows again.
                _adopted[:] = [store]
        return store


def _before_fork() -> None:
    """Let all transactions end and close all files: SQLite's locks do not survive a fork."""
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
    """Leave the parent its claims: nobody else may hold or free them."""
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
        raise ValueError(f"Expected rows of shape ({n_images}, d), got {matrix.shape}.")
    return matrix


def _as_stamp(stat: FileStat) -> bytes:
    return b"%d %d %d %d %d" % stat[1:]  # not numbers: an inode can exceed SQLite's integers


# Here doctest finds the examples of a class that says it is in another module.
__test__ = {"FeatureCache": FeatureCache}
