"""Rows, claims and file digests in one SQLite file that several processes read and write."""

from __future__ import annotations

import contextlib
import functools
import itertools
import os
import sqlite3
import struct
import threading
import time
import uuid
import warnings
import weakref
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from .owners import ProcessLock, ThreadClaims, is_locked, is_recent, sweep

FILE_NAME = "deepfeat-cache.sqlite"
LOCK_FOLDER = "deepfeat-cache.locks"
MAX_BYTES = 2**48  # per namespace: an SQLite file cannot be larger
BUSY_SECONDS = 60.0  # how long a writer waits for another
BLOCK_BYTES = 2**15  # of rows stored as one blob: a blob per row would leave pages half empty
CACHE_BYTES = 2**27  # of the file held in memory by a process, at most
STEPS = 10**9, 10**7  # of SQLite: limit per transaction (about 20 s), interval between checks

APPLICATION_ID = 0x0DEEFEA7
FORMAT = 2

T = TypeVar("T")
Found = tuple[NDArray[np.bool_], NDArray[np.float32] | None]


class CacheFormatError(ValueError):
    """The file of a cache is foreign, was tampered with or has an unsupported format."""

    __module__ = "deepfeat"  # so that pickles outlive moves


class DiskStore:
    """Rows in one file, which a process opens once.

    A disk error is reported once, as a warning, and ends writing; the operation is skipped.
    """

    def __init__(self, folder: str) -> None:
        self.lock = threading.RLock()
        self.hits = self.misses = 0
        self.file = Path(folder, FILE_NAME)
        self.write_error: str | None = None
        self.warned: set[str] = set()
        self.steps = _Steps()
        self.opened: list[tuple[sqlite3.Connection, object]] = []  # at most one, and its file's id
        self.locks: list[ProcessLock] = []  # at most one
        self.thread_claims = ThreadClaims()
        weakref.finalize(self, _close_all, self.opened, self.locks)

    def get_many(self, namespace: bytes, images: list[bytes], *, touch: bool) -> Found:
        nothing = _Rows(np.zeros(len(images), dtype=bool), None, [], [])
        rows = self._read(lambda db: _read_rows(db, namespace, images), nothing)
        if rows.damaged:
            self._write(lambda db: _drop(db, namespace, rows.damaged), None)
            message = (
                f"Dropped {len(rows.damaged)} damaged row(s) (wrong checksum) from {self.file}."
            )
            warnings.warn(message, RuntimeWarning, stacklevel=3)
        if touch and rows.blocks:
            self._write(lambda db: _touch(db, rows.blocks), None)
        return rows.found, rows.matrix

    def list_images(self) -> dict[bytes, list[bytes]]:
        """Return the images of each namespace."""
        query = "SELECT digest, image FROM keys JOIN contexts ON context = contexts.id"
        keys: list[tuple[bytes, bytes]] = []
        images: dict[bytes, list[bytes]] = {}
        for namespace, image in self._read(lambda db: db.execute(query).fetchall(), keys):
            if type(namespace) is type(image) is bytes:  # not damaged
                images.setdefault(namespace, []).append(image)
        return images

    def find(self, namespace: bytes, images: list[bytes]) -> set[bytes]:
        """Return the images that have a row."""
        query = (
            "SELECT image FROM keys WHERE context = (SELECT id FROM contexts WHERE digest = ?)"
            " AND image IN ({})"
        )
        stored: set[bytes] = set()
        return self._read(
            lambda db: {row[0] for row in _select(db, query, images, namespace)}, stored
        )

    def put_many(
        self,
        images: list[bytes],
        rows: Mapping[bytes, NDArray[np.float32]],
        max_bytes: int | None,
        job: bytes | None,
    ) -> None:
        def put(db: sqlite3.Connection) -> None:
            for namespace, matrix in rows.items():
                _write_rows(db, namespace, images, matrix)
            if ended and self.locks:
                _release(db, self.locks[0], job, ended)
            if max_bytes is not None:
                _prune(db, max_bytes)

        with self.lock:
            ended = [] if job is None else self.thread_claims.find_held(job, images)
            self._write(put, None)
            if job is not None:
                self.thread_claims.release(job, images)

    def prune(self, max_bytes: int) -> int:
        self.write_error = None  # the caller may also have freed disk space in other ways
        dropped = self._write(lambda db: _prune(db, max_bytes), 0)
        if dropped:
            self._shrink()
        return dropped

    def claim(self, job: bytes, images: list[bytes]) -> NDArray[np.bool_]:
        with self.lock:
            granted = self.thread_claims.claim(job, images)
            ours = list(itertools.compress(images, granted))
            free = np.ones(len(ours), dtype=bool)
            free = self._write(lambda db: _claim(db, self._lock(), job, ours), free)
            self.thread_claims.release(job, list(itertools.compress(ours, ~free)))
            granted[granted] = free
        return granted

    def release(self, job: bytes, images: list[bytes]) -> None:
        with self.lock:
            ended = self.thread_claims.find_held(job, images)
            self.thread_claims.release(job, images)
            if ended and self.locks:
                self._write(lambda db: _release(db, self.locks[0], job, ended), None)

    def find_holders(self, job: bytes, images: list[bytes]) -> set[str]:
        """Describe the other threads and processes that hold images."""
        holders: set[str] = set()
        token = self.locks[0].token if self.locks else ""
        with self.lock:
            holders = self._read(lambda db: _find_holders(db, job, images, token), holders)
            return holders | self.thread_claims.find_holders(job, images)

    def known_digests(self, paths: list[bytes]) -> dict[bytes, tuple[bytes, bytes]]:
        """Return the stamp and the digest of the file at each known path."""
        query = "SELECT path, stamp, digest FROM files WHERE path IN ({})"
        rows: list[tuple[bytes, bytes, bytes]] = []
        rows = self._read(lambda db: list(_select(db, query, paths)), rows)
        return {path: (stamp, digest) for path, stamp, digest in rows if type(digest) is bytes}

    def remember_digests(self, files: list[tuple[bytes, bytes, bytes]]) -> None:
        query = "INSERT OR REPLACE INTO files VALUES (?, ?, ?)"
        self._write(lambda db: db.executemany(query, files), None)

    def count(self) -> tuple[int, int, int]:
        """Return the numbers of rows, bytes and namespaces."""
        namespaces: list[_Namespace] = []
        namespaces = self._read(_list_namespaces, namespaces)
        n_rows = sum(namespace.held for namespace in namespaces)
        size = sum(namespace.bytes for namespace in namespaces)
        return n_rows, size, len(namespaces)

    def clear(self) -> None:
        self.write_error = None
        self.thread_claims.clear()
        self._write(_clear, None)
        self._shrink()

    def retry(self) -> None:
        self.write_error = None
        self._write(lambda db: None, None)

    def close(self) -> None:
        """Close the file; the next use opens it again."""
        _close_all(self.opened)

    def forget_parent(self) -> None:
        """Give up what belongs to the parent, after a fork."""
        self.locks.clear()
        self.thread_claims.clear()

    def _lock(self) -> ProcessLock | None:
        """Return the lock that shows others that this process is alive; None if impossible."""
        if self.locks and self.locks[0].path.exists():
            return self.locks[0]
        self.locks.clear()
        with contextlib.suppress(OSError):
            folder = self.file.with_name(LOCK_FOLDER)
            self.locks.append(ProcessLock(folder))
            sweep(folder)
        return self.locks[0] if self.locks else None

    def _read(self, task: Callable[[sqlite3.Connection], T], otherwise: T) -> T:
        return self._transact("DEFERRED", task, otherwise)

    def _write(self, task: Callable[[sqlite3.Connection], T], otherwise: T) -> T:
        return otherwise if self.write_error else self._transact("IMMEDIATE", task, otherwise)

    def _transact(self, kind: str, task: Callable[[sqlite3.Connection], T], otherwise: T) -> T:
        """Run `task` in a transaction; return `otherwise` if there is no file or the disk fails."""
        reads = kind == "DEFERRED"
        with self.lock:
            try:
                self.steps.left = STEPS[0]
                db = self._open(create=not reads)
                if db is None:
                    return otherwise
                with _transaction(db, kind):
                    return task(db)
            except Exception as error:
                if self.steps.left < 0:
                    raise _make_error(self.file, "takes too long to read") from error
                if not _is_disk_error(error):
                    raise
                problem = f"cannot be {'read' if reads else 'written'} ({error})"
                self.write_error = f"The cache {self.file} {problem}"
        if problem not in self.warned:
            self.warned.add(problem)
            message = (
                f"{self.write_error}; nothing more is stored in it. "
                "Call FeatureCache.retry to resume."
            )
            warnings.warn(message, RuntimeWarning, stacklevel=5)
        return otherwise

    def _open(self, *, create: bool) -> sqlite3.Connection | None:
        """Return the open database; None if there is no file and `create` is False."""
        file_id = _file_id(self.file)
        if self.opened and self.opened[0][1] == file_id:
            return self.opened[0][0]
        self.close()  # if one is open, its file is gone or replaced
        if file_id is None:
            if not create:
                return None
            self._make_file()
        self.opened.append((_open_file(self.file, self.steps), _file_id(self.file)))
        return self.opened[0][0]

    def _make_file(self) -> None:
        """Create the file elsewhere and move it into place, unless another process was faster."""
        if self.file.parent.is_file():
            raise ValueError(
                f"The path of a cache must be a directory; {self.file.parent} is a file."
            )
        folder = self.file.with_name(LOCK_FOLDER)
        folder.mkdir(parents=True, exist_ok=True)
        lock = self._lock()  # if this process is killed, others remove the files named after it
        new = folder / f"{lock.token if lock else uuid.uuid4().hex}.new"
        try:
            with contextlib.closing(sqlite3.connect(new, isolation_level=None)) as db:
                db.executescript(_SCHEMA)
            try:
                os.link(new, self.file)
            except FileExistsError:
                pass
            except OSError:  # a file system without links
                new.replace(self.file)
        finally:
            new.unlink(missing_ok=True)

    def _shrink(self) -> None:
        """Return the space of deleted rows to the disk, if that is possible now."""
        with self.lock, contextlib.suppress(sqlite3.DatabaseError):
            for db, _ in self.opened:
                self.steps.left = STEPS[0]
                # A script, because `execute` would vacuum a single page.
                db.executescript("PRAGMA incremental_vacuum; PRAGMA wal_checkpoint(TRUNCATE)")


# In the file, a namespace is called a context, and a job is called work.
_SCHEMA = f"""
PRAGMA page_size = 8192;
PRAGMA auto_vacuum = INCREMENTAL;
BEGIN;
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {FORMAT};
CREATE TABLE contexts (
    id INTEGER PRIMARY KEY, digest BLOB NOT NULL UNIQUE, width INTEGER NOT NULL,
    held INTEGER NOT NULL DEFAULT 0
);
-- A few rows of a context each, which were put together and are dropped together.
CREATE TABLE blocks (id INTEGER PRIMARY KEY, context INTEGER NOT NULL, used INTEGER NOT NULL);
CREATE INDEX blocks_by_use ON blocks (used);
-- The values apart: to look up, to count or to mark as used touches no large page.
CREATE TABLE matrices (id INTEGER PRIMARY KEY, data BLOB NOT NULL);
CREATE TABLE keys (
    context INTEGER NOT NULL, image BLOB NOT NULL, block INTEGER NOT NULL, place INTEGER NOT NULL,
    checksum INTEGER NOT NULL, PRIMARY KEY (context, image)
) WITHOUT ROWID;
CREATE INDEX keys_by_block ON keys (block);
-- One row for a process, not for a claim: to sign it is to write one row, however much it claims.
CREATE TABLE owners (
    id INTEGER PRIMARY KEY, token TEXT NOT NULL UNIQUE, host TEXT NOT NULL, pid INTEGER NOT NULL,
    signed REAL NOT NULL
);
CREATE TABLE claims (
    work BLOB NOT NULL, image BLOB NOT NULL, owner INTEGER NOT NULL, PRIMARY KEY (work, image)
) WITHOUT ROWID;
CREATE TABLE files (
    path BLOB PRIMARY KEY, stamp BLOB NOT NULL, digest BLOB NOT NULL
) WITHOUT ROWID;
COMMIT;
PRAGMA journal_mode = WAL;
"""


class _Steps:
    """The steps left to SQLite in a transaction, which no honest file uses up."""

    left = 0

    def __call__(self) -> bool:
        self.left -= STEPS[1]
        return self.left < 0


def _open_file(file: Path, steps: _Steps) -> sqlite3.Connection:
    _check_header(file)
    try:
        return _connect(f"{file.as_uri()}?mode=rw", file, steps)
    except sqlite3.OperationalError:
        # Even to be read, a WAL database needs other files beside it. If these cannot be created,
        # it can be read without them, except for what is only in the log of a crashed writer.
        return _connect(f"{file.as_uri()}?immutable=1", file, steps)


def _connect(uri: str, file: Path, steps: _Steps) -> sqlite3.Connection:
    db = sqlite3.connect(
        uri, uri=True, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
    )
    try:
        # A damaged file may hold text that cannot be decoded.
        db.text_factory = bytes
        db.set_progress_handler(steps, STEPS[1])
        # Not mapped into memory: a file that is cut short would then kill the process.
        db.execute("PRAGMA mmap_size = 0")
        db.execute(f"PRAGMA cache_size = -{CACHE_BYTES // 1024}")
        db.execute("PRAGMA trusted_schema = OFF")
        db.execute("PRAGMA cell_size_check = ON")
        db.execute("PRAGMA synchronous = NORMAL")
        db.execute("PRAGMA secure_delete = OFF")
        _check_schema(db, file)
    except BaseException:
        db.close()
        raise
    return db


def _check_header(file: Path) -> None:
    """Refuse a foreign file by its first bytes: SQLite might change it by opening it."""
    with file.open("rb") as stream:
        header = stream.read(100).ljust(100, b"\0")
    version, application_id = struct.unpack_from(">I4xI", header, 60)
    if not header.startswith(b"SQLite format 3\0") or application_id != APPLICATION_ID:
        raise CacheFormatError(
            f"The file {file} is not a deepfeat cache. Move it away or choose another directory."
        )
    if version < FORMAT:
        raise CacheFormatError(
            f"The cache {file} has format {version}, but this release reads format {FORMAT}. "
            "Delete it or choose another directory."
        )
    if version > FORMAT:
        raise CacheFormatError(
            f"The cache {file} has format {version}, but this release reads format {FORMAT}. "
            "Choose another directory or use the release of deepfeat that wrote it."
        )


def _check_schema(db: sqlite3.Connection, file: Path) -> None:
    """Refuse unexpected tables: a view or a trigger might never end, or return wrong rows."""
    expected = _expected_schema()
    if set(db.execute(_LIST_SCHEMA).fetchmany(len(expected) + 1)) != expected:
        raise _make_error(file, "does not have the expected tables")


_LIST_SCHEMA = "SELECT type, name, tbl_name, sql FROM sqlite_master"


@functools.cache
def _expected_schema() -> set[tuple[object, ...]]:
    with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as db:
        db.text_factory = bytes
        db.executescript(_SCHEMA)
        return set(db.execute(_LIST_SCHEMA))


def _make_error(file: object, fault: str) -> CacheFormatError:
    return CacheFormatError(
        f"The cache {file} {fault}: it is damaged or was tampered with. Delete it or choose "
        "another directory."
    )


def _file_id(file: Path) -> object:
    """Identify a file, as distinct from one that replaces it; None if there is no file."""
    try:
        stat = file.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return stat.st_dev, stat.st_ino


@contextlib.contextmanager
def _transaction(db: sqlite3.Connection, kind: str) -> Iterator[None]:
    db.execute(f"BEGIN {kind}")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:  # some errors roll it back by themselves
            db.execute("ROLLBACK")
        raise


def _is_disk_error(error: Exception) -> bool:
    """Return whether the cause is a full, read-only or damaged disk rather than a bug."""
    # SQLite's messages may quote a damaged file, and cannot be decoded then.
    possible = isinstance(error, OSError | sqlite3.DatabaseError | UnicodeDecodeError)
    return possible and not isinstance(error, sqlite3.ProgrammingError)


class _Namespace(NamedTuple):
    """A namespace as recorded in the file."""

    id: int
    digest: bytes
    width: int
    held: int

    @property
    def bytes(self) -> int:
        return self.held * self.width * 4


def _list_namespaces(db: sqlite3.Connection, digest: bytes | None = None) -> list[_Namespace]:
    """Return one namespace, or all that have rows; refuse impossible numbers."""
    condition = "held != 0" if digest is None else "digest = ?"
    query = f"SELECT id, digest, width, held FROM contexts WHERE {condition}"
    rows = db.execute(query, () if digest is None else (digest,))
    namespaces = [_Namespace(*row) for row in rows]
    for namespace in namespaces:
        width, held = namespace.width, namespace.held
        is_typed = type(width) is type(held) is int and type(namespace.digest) is bytes
        if not is_typed or not (width > 0 <= held and namespace.bytes < MAX_BYTES):
            raise _make_error(_name_of(db), f"counts {held!r} rows of {width!r} values")
    return namespaces


def _name_of(db: sqlite3.Connection) -> str:
    return os.fsdecode(db.execute("PRAGMA database_list").fetchone()[2])


class _Rows(NamedTuple):
    """The rows found for some images."""

    found: NDArray[np.bool_]
    matrix: NDArray[np.float32] | None
    blocks: list[int]  # those that were read
    damaged: list[bytes]  # the images of damaged rows


def _read_rows(db: sqlite3.Connection, namespace: bytes, images: list[bytes]) -> _Rows:
    found = np.zeros(len(images), dtype=bool)
    namespaces = _list_namespaces(db, namespace)
    if not namespaces:
        return _Rows(found, None, [], [])
    namespace_id, _, width, held = namespaces[0]
    query = "SELECT image, block, place, checksum FROM keys WHERE context = ?"
    if held > 4 * len(images):
        keys = _select(db, f"{query} AND image IN ({{}})", images, namespace_id)
    else:  # to read all keys is faster than to select a large part of them
        keys = db.execute(query, (namespace_id,))
    index_of = {image: index for index, image in enumerate(images)}
    wanted: dict[int, list[tuple[int, bytes, int, int]]] = {}
    for image, block, position, checksum in keys:
        if image in index_of:
            wanted.setdefault(block, []).append((index_of[image], image, position, checksum))
    # Damaged keys may have any type. Sorted, because reading in file order is twice as fast.
    blocks = sorted(block for block in wanted if type(block) is int)
    size, seed = 4 * width, zlib.crc32(namespace)
    query = (
        "SELECT id, data FROM matrices WHERE typeof(data) = 'blob'"
        f" AND length(data) BETWEEN {size} AND {max(size, BLOCK_BYTES)} AND id IN ({{}})"
    )
    rows, hits = None, []
    for block, data in _select(db, query, blocks):
        if rows is None:
            rows = np.empty((len(images), width), "<f4")
            target = rows.data.cast("B")
        source = memoryview(data)
        for index, image, position, checksum in wanted[block]:
            start = position * size if type(position) is int else len(data)
            row = source[start : start + size]
            if checksum == _checksum(seed, image, row) and len(row) == size:
                target[index * size : (index + 1) * size] = row
                hits.append(index)
    found[hits] = True
    damaged = [image for part in wanted.values() for index, image, *_ in part if not found[index]]
    if rows is None or not hits:
        return _Rows(found, None, [], damaged)
    rows[~found] = np.nan
    return _Rows(found, rows.astype(np.float32, copy=False), blocks, damaged)


def _write_rows(
    db: sqlite3.Connection, namespace: bytes, images: list[bytes], matrix: NDArray[np.float32]
) -> None:
    db.execute(
        "INSERT INTO contexts (digest, width) VALUES (?, ?)"
        " ON CONFLICT (digest) DO UPDATE SET width = excluded.width WHERE held = 0",
        (namespace, matrix.shape[1]),
    )
    ((namespace_id, _, width, _),) = _list_namespaces(db, namespace)
    check_width(namespace, width, matrix)
    query = "SELECT image FROM keys WHERE context = ? AND image IN ({})"
    stored = {image for (image,) in _select(db, query, images, namespace_id)}
    new = {image: i for i, image in reversed(list(enumerate(images))) if image not in stored}
    keys = sorted(new.items(), key=lambda item: item[1])
    seed, now = zlib.crc32(namespace), time.time_ns()
    step = max(1, BLOCK_BYTES // (4 * width))
    for part in (keys[start : start + step] for start in range(0, len(keys), step)):
        rows = matrix[[index for _, index in part]].astype("<f4", copy=False)
        block = db.execute(
            "INSERT INTO blocks (context, used) VALUES (?, ?)", (namespace_id, now)
        ).lastrowid
        db.execute("INSERT INTO matrices VALUES (?, ?)", (block, rows.data))
        db.executemany(
            "INSERT INTO keys VALUES (?, ?, ?, ?, ?)",
            [
                (namespace_id, image, block, position, _checksum(seed, image, rows[position].data))
                for position, (image, _) in enumerate(part)
            ],
        )
    db.execute("UPDATE contexts SET held = held + ? WHERE id = ?", (len(keys), namespace_id))


def check_width(namespace: bytes, width: int, matrix: NDArray[np.float32]) -> None:
    """Raise if rows differ in width from those already in their namespace."""
    if matrix.shape[1] != width:
        raise ValueError(
            f"Namespace {namespace.hex()[:12]} holds rows of {width} values; got rows of "
            f"{matrix.shape[1]}. The digest of a namespace must cover everything that affects the "
            "width of its rows."
        )


def _touch(db: sqlite3.Connection, blocks: list[int]) -> None:
    now = time.time_ns()
    db.executemany("UPDATE blocks SET used = ? WHERE id = ?", [(now, block) for block in blocks])


def _prune(db: sqlite3.Connection, max_bytes: int) -> int:
    """Drop the least recently used blocks until at most `max_bytes` of rows are left."""
    namespaces = {namespace.id: namespace for namespace in _list_namespaces(db)}
    excess = sum(namespace.bytes for namespace in namespaces.values()) - max_bytes
    if excess <= 0:
        return 0
    blocks = db.execute(
        "SELECT id, context, (SELECT count(*) FROM keys WHERE block = blocks.id) FROM blocks"
        " ORDER BY used, id"
    )
    dropped = []
    for block, namespace_id, count in blocks:
        dropped.append((block, namespace_id, count))
        if namespace_id in namespaces:
            excess -= count * 4 * namespaces[namespace_id].width
        if excess <= 0:
            break
    blocks.close()
    for block, namespace_id, count in dropped:
        db.execute("DELETE FROM keys WHERE block = ?", (block,))
        _drop_block(db, block)
        db.execute("UPDATE contexts SET held = held - ? WHERE id = ?", (count, namespace_id))
    return sum(count for *_, count in dropped)


def _drop(db: sqlite3.Connection, namespace: bytes, images: list[bytes]) -> None:
    """Drop the rows of some images, and the blocks that are empty then."""
    for namespace_id, _, _, held in _list_namespaces(db, namespace):
        query = "SELECT image, block FROM keys WHERE context = ? AND image IN ({})"
        keys = list(_select(db, query, images, namespace_id))
        db.executemany(
            "DELETE FROM keys WHERE context = ? AND image = ?",
            [(namespace_id, image) for image, _ in keys],
        )
        left = max(0, held - len(keys))
        db.execute("UPDATE contexts SET held = ? WHERE id = ?", (left, namespace_id))
        for block in {block for _, block in keys}:
            if not db.execute("SELECT 1 FROM keys WHERE block = ?", (block,)).fetchone():
                _drop_block(db, block)


def _drop_block(db: sqlite3.Connection, block: int) -> None:
    db.execute("DELETE FROM blocks WHERE id = ?", (block,))
    db.execute("DELETE FROM matrices WHERE id = ?", (block,))


def _clear(db: sqlite3.Connection) -> None:
    for table in ("keys", "matrices", "blocks", "contexts", "claims", "owners", "files"):
        db.execute(f"DELETE FROM {table}")


def _claim(
    db: sqlite3.Connection, lock: ProcessLock | None, job: bytes, images: list[bytes]
) -> NDArray[np.bool_]:
    if lock is None:
        return np.ones(len(images), dtype=bool)
    mine = _record_progress(db, lock)
    query = "SELECT image, owner FROM claims WHERE work = ? AND image IN ({})"
    held = dict(_select(db, query, images, job))
    busy = {owner for owner in set(held.values()) - {mine} if _is_active(db, lock.folder, owner)}
    granted = [held.get(image) not in busy for image in images]
    db.executemany(
        "INSERT OR REPLACE INTO claims VALUES (?, ?, ?)",
        [(job, image, mine) for image in itertools.compress(images, granted)],
    )
    return np.array(granted, dtype=bool)


def _release(
    db: sqlite3.Connection, lock: ProcessLock, job: bytes | None, images: list[bytes]
) -> None:
    mine = _record_progress(db, lock)
    db.executemany(
        "DELETE FROM claims WHERE work = ? AND image = ? AND owner = ?",
        [(job, image, mine) for image in images],
    )


def _record_progress(db: sqlite3.Connection, lock: ProcessLock) -> int:
    """Record that this process makes progress; return its id among the owners."""
    select = "SELECT id FROM owners WHERE token = ?", (lock.token,)
    mine = db.execute(*select).fetchone()
    if mine is None:
        _forget_dead_owners(db, lock.folder)
        row = lock.token, lock.host, lock.pid, 0.0
        db.execute("INSERT INTO owners (token, host, pid, signed) VALUES (?, ?, ?, ?)", row)
        mine = db.execute(*select).fetchone()
    db.execute("UPDATE owners SET signed = ? WHERE id = ?", (time.time(), *mine))
    return int(mine[0])


def _is_active(db: sqlite3.Connection, folder: Path, owner: object) -> bool:
    """Return whether the owner of claims is alive and has recently made progress."""
    query = "SELECT CAST(token AS TEXT), CAST(ifnull(signed, 0) AS REAL) FROM owners WHERE id = ?"
    token, last_progress = db.execute(query, (owner,)).fetchone() or (None, 0.0)
    return token is not None and is_recent(last_progress) and _is_alive(db, folder, token)


def _forget_dead_owners(db: sqlite3.Connection, folder: Path) -> None:
    query = "SELECT id, CAST(ifnull(token, '') AS TEXT) FROM owners"
    for owner, token in db.execute(query).fetchall():
        if not _is_alive(db, folder, token):
            db.execute("DELETE FROM claims WHERE owner = ?", (owner,))
            db.execute("DELETE FROM owners WHERE id = ?", (owner,))


def _is_alive(db: sqlite3.Connection, folder: Path, token: bytes) -> bool:
    try:
        return is_locked(folder, token.decode("latin-1"))
    except ValueError as error:
        raise _make_error(_name_of(db), "names an impossible process") from error


def _find_holders(db: sqlite3.Connection, job: bytes, images: list[bytes], token: str) -> set[str]:
    query = (
        "SELECT CAST(ifnull(host, '') AS TEXT), CAST(pid AS INTEGER) FROM claims JOIN owners"
        " ON owner = owners.id WHERE token != ? AND work = ? AND image IN ({})"
    )
    owners = _select(db, query, images, token, job)
    return {f"process {pid} on {host.decode(errors='replace')}" for host, pid in owners}


def _select(
    db: sqlite3.Connection, query: str, values: Sequence[Any], *first: Any
) -> Iterator[Any]:
    """Run a query with `IN ({})` on 500 values at a time: SQLite limits their number."""
    for start in range(0, len(values), 500):
        part = values[start : start + 500]
        yield from db.execute(query.format(",".join("?" * len(part))), (*first, *part))


def _checksum(seed: int, image: bytes, data: bytes | memoryview) -> int:
    # Covers namespace (the seed) and image: a damaged index must not show a row under other keys.
    return zlib.crc32(data, zlib.crc32(image, seed))


def _close_all(
    opened: list[tuple[sqlite3.Connection, object]], locks: Sequence[ProcessLock] = ()
) -> None:
    while opened:
        opened.pop()[0].close()
    for lock in locks:
        lock.release()
