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
MOST_BYTES = 2**48  # of one context: SQLite's files end there
BUSY_SECONDS = 60.0  # how long a writer waits for another one
BLOCK_BYTES = 2**15  # of rows that are stored as one: SQLite leaves part of its pages empty
CACHE_BYTES = 2**27  # of the file that a process holds in memory, at most
STEPS = 10**9, 10**7  # of SQLite, at most in a transaction and between two looks: about 20 s

APPLICATION_ID = 0x0DEEFEA7
FORMAT = 2

T = TypeVar("T")
Found = tuple[NDArray[np.bool_], NDArray[np.float32] | None]


class CacheFormatError(ValueError):
    """The file of a cache is foreign, was tampered with, or has a format that is not read here."""

    __module__ = "deepfeat"  # so that pickles outlive moves


class DiskStore:
    """One file, open once in a process; an error of its disk is told once and ends the writing."""

    def __init__(self, folder: str) -> None:
        self.lock = threading.RLock()
        self.hits = self.misses = 0
        self.file = Path(folder, FILE_NAME)
        self.write_error: str | None = None
        self.told: set[str] = set()
        self.steps = _Steps()
        self.opened: list[tuple[sqlite3.Connection, object]] = []  # at most one, with its file's id
        self.locks: list[ProcessLock] = []  # at most one
        self.thread_claims = ThreadClaims()
        weakref.finalize(self, _close_all, self.opened, self.locks)

    def get_many(self, context: bytes, images: list[bytes], *, touch: bool) -> Found:
        nothing = _Rows(np.zeros(len(images), dtype=bool), None, [], [])
        rows = self._read(lambda db: _read_rows(db, context, images), nothing)
        if rows.damaged:
            self._write(lambda db: _drop(db, context, rows.damaged), None)
            told = f"{self.file}: dropped {len(rows.damaged)} damaged rows (wrong checksum)."
            warnings.warn(told, RuntimeWarning, stacklevel=3)
        if touch and rows.blocks:
            self._write(lambda db: _touch(db, rows.blocks), None)
        return rows.found, rows.matrix

    def list_images(self) -> dict[bytes, list[bytes]]:
        """Return the images of each context."""
        query = "SELECT digest, image FROM keys JOIN contexts ON context = contexts.id"
        keys: list[tuple[bytes, bytes]] = []
        images: dict[bytes, list[bytes]] = {}
        for context, image in self._read(lambda db: db.execute(query).fetchall(), keys):
            if type(context) is type(image) is bytes:  # and not damaged
                images.setdefault(context, []).append(image)
        return images

    def find(self, context: bytes, images: list[bytes]) -> set[bytes]:
        """Return which images have a row."""
        query = (
            "SELECT image FROM keys WHERE context = (SELECT id FROM contexts WHERE digest = ?)"
            " AND image IN ({})"
        )
        stored: set[bytes] = set()
        return self._read(
            lambda db: {row[0] for row in _select(db, query, images, context)}, stored
        )

    def put_many(
        self,
        images: list[bytes],
        rows: Mapping[bytes, NDArray[np.float32]],
        bound: int | None,
        work: bytes | None,
    ) -> None:
        def put(db: sqlite3.Connection) -> None:
            for context, matrix in rows.items():
                _write_rows(db, context, images, matrix)
            if ended and self.locks:
                _release(db, self.locks[0], work, ended)
            if bound is not None:
                _prune(db, bound)

        with self.lock:
            ended = [] if work is None else self.thread_claims.find_held(work, images)
            self._write(put, None)
            if work is not None:
                self.thread_claims.release(work, images)

    def prune(self, bound: int) -> int:
        self.write_error = None  # the caller may also have freed disk space in other ways
        dropped = self._write(lambda db: _prune(db, bound), 0)
        if dropped:
            self._shrink()
        return dropped

    def claim(self, work: bytes, images: list[bytes]) -> NDArray[np.bool_]:
        with self.lock:
            granted = self.thread_claims.claim(work, images)
            ours = list(itertools.compress(images, granted))
            free = np.ones(len(ours), dtype=bool)
            free = self._write(lambda db: _claim(db, self._lock(), work, ours), free)
            self.thread_claims.release(work, list(itertools.compress(ours, ~free)))
            granted[granted] = free
        return granted

    def release(self, work: bytes, images: list[bytes]) -> None:
        with self.lock:
            ended = self.thread_claims.find_held(work, images)
            self.thread_claims.release(work, images)
            if ended and self.locks:
                self._write(lambda db: _release(db, self.locks[0], work, ended), None)

    def find_holders(self, work: bytes, images: list[bytes]) -> set[str]:
        """Describe the other threads and processes that hold images."""
        holders: set[str] = set()
        token = self.locks[0].token if self.locks else ""
        with self.lock:
            holders = self._read(lambda db: _find_holders(db, work, images, token), holders)
            return holders | self.thread_claims.find_holders(work, images)

    def known_digests(self, paths: list[bytes]) -> dict[bytes, tuple[bytes, bytes]]:
        """Return what is known of each path: the stamp of its file and its digest."""
        query = "SELECT path, stamp, digest FROM files WHERE path IN ({})"
        rows: list[tuple[bytes, bytes, bytes]] = []
        rows = self._read(lambda db: list(_select(db, query, paths)), rows)
        return {path: (stamp, digest) for path, stamp, digest in rows if type(digest) is bytes}

    def remember_digests(self, files: list[tuple[bytes, bytes, bytes]]) -> None:
        query = "INSERT OR REPLACE INTO files VALUES (?, ?, ?)"
        self._write(lambda db: db.executemany(query, files), None)

    def count(self) -> tuple[int, int, int]:
        """Return how many rows, bytes and contexts there are."""
        contexts: list[_Context] = []
        contexts = self._read(_list_contexts, contexts)
        return sum(one.held for one in contexts), sum(one.bytes for one in contexts), len(contexts)

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
        """Give up, after a fork, what belongs to the parent."""
        self.locks.clear()
        self.thread_claims.clear()

    def _lock(self) -> ProcessLock | None:
        """Return the lock by which others see that this process is alive; None if impossible."""
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
        """Run `task` in one transaction; return `otherwise` if there is no file, or on failure."""
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
                    raise _refuse(self.file, "takes too long to read") from error
                if not _is_of_the_disk(error):
                    raise
                trouble = f"cannot be {'read' if reads else 'written'} ({error})"
                self.write_error = f"{self.file} {trouble}"
        if trouble not in self.told:
            self.told.add(trouble)
            told = f"{self.write_error}; nothing more is stored in it."
            warnings.warn(told, RuntimeWarning, stacklevel=5)
        return otherwise

    def _open(self, *, create: bool) -> sqlite3.Connection | None:
        """Return the open database; None where there is no file and none is to be made."""
        file_id = _file_id(self.file)
        if self.opened and self.opened[0][1] == file_id:
            return self.opened[0][0]
        self.close()  # if one is open, its file was deleted
        if file_id is None:
            if not create:
                return None
            self._make_file()
        self.opened.append((_open_file(self.file, self.steps), _file_id(self.file)))
        return self.opened[0][0]

    def _make_file(self) -> None:
        """Make the file elsewhere and put it in its place when done, unless another was faster."""
        if self.file.parent.is_file():
            raise ValueError(f"{self.file.parent} is a file, and a cache wants a directory.")
        folder = self.file.with_name(LOCK_FOLDER)
        folder.mkdir(parents=True, exist_ok=True)
        lock = self._lock()  # under its name others remove what is left of a killed process
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
        """Give the space of deleted rows back, if it can be done now."""
        with self.lock, contextlib.suppress(sqlite3.DatabaseError):
            for db, _ in self.opened:
                self.steps.left = STEPS[0]
                # A script, because `execute` would do one page of it.
                db.executescript("PRAGMA incremental_vacuum; PRAGMA wal_checkpoint(TRUNCATE)")


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
    """How much more SQLite may do in a transaction: no honest file comes to the end of it."""

    left = 0

    def __call__(self) -> bool:
        self.left -= STEPS[1]
        return self.left < 0


def _open_file(file: Path, steps: _Steps) -> sqlite3.Connection:
    _check_header(file)
    try:
        return _connect(f"{file.as_uri()}?mode=rw", file, steps)
    except sqlite3.OperationalError:
        # A WAL database wants files beside it even to be read. Where they cannot be made, it can be
        # read without, as far as it is not in the log of a crashed writer.
        return _connect(f"{file.as_uri()}?immutable=1", file, steps)


def _connect(uri: str, file: Path, steps: _Steps) -> sqlite3.Connection:
    db = sqlite3.connect(
        uri, uri=True, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
    )
    try:
        # What is damaged may be text that cannot be decoded.
        db.text_factory = bytes
        db.set_progress_handler(steps, STEPS[1])
        # Not mapped into memory: where a file is cut short, that would end the process.
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
    """Refuse a file that is not ours by its first bytes: SQLite might change it by opening it."""
    with file.open("rb") as stream:
        header = stream.read(100).ljust(100, b"\0")
    version, application_id = struct.unpack_from(">I4xI", header, 60)
    if not header.startswith(b"SQLite format 3\0") or application_id != APPLICATION_ID:
        raise CacheFormatError(
            f"{file} is not a cache of deepfeat. Move it away, or choose another directory."
        )
    if version < FORMAT:
        raise CacheFormatError(
            f"{file} has format {version}, and this deepfeat reads format {FORMAT}."
            " Delete it, or choose another directory."
        )
    if version > FORMAT:
        raise CacheFormatError(
            f"{file} has format {version}, and this deepfeat reads format {FORMAT}."
            " Choose another directory, or the deepfeat that wrote it."
        )


def _check_schema(db: sqlite3.Connection, file: Path) -> None:
    """Refuse tables other than ours: a view or a trigger may run for ever, or lie."""
    expected = _expected_schema()
    if set(db.execute(_LIST_SCHEMA).fetchmany(len(expected) + 1)) != expected:
        raise _refuse(file, "has other tables than this deepfeat makes")


_LIST_SCHEMA = "SELECT type, name, tbl_name, sql FROM sqlite_master"


@functools.cache
def _expected_schema() -> set[tuple[object, ...]]:
    with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as db:
        db.text_factory = bytes
        db.executescript(_SCHEMA)
        return set(db.execute(_LIST_SCHEMA))


def _refuse(file: object, fault: str) -> CacheFormatError:
    return CacheFormatError(
        f"{file} {fault}: it is damaged or was tampered with. Delete it, or choose another"
        " directory."
    )


def _file_id(file: Path) -> object:
    """Tell a file from one that took its place; None where there is none."""
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
        if db.in_transaction:  # some errors have rolled it back already
            db.execute("ROLLBACK")
        raise


def _is_of_the_disk(error: Exception) -> bool:
    """Tell a disk that is full, read-only or damaged from a bug of ours."""
    # An error of SQLite may quote a damaged file, and then cannot be decoded.
    disk = isinstance(error, OSError | sqlite3.DatabaseError | UnicodeDecodeError)
    return disk and not isinstance(error, sqlite3.ProgrammingError)


class _Context(NamedTuple):
    """A context as the file has it."""

    id: int
    digest: bytes
    width: int
    held: int

    @property
    def bytes(self) -> int:
        return self.held * self.width * 4


def _list_contexts(db: sqlite3.Connection, digest: bytes | None = None) -> list[_Context]:
    """Return one context, or all that hold rows; refuse what no file can hold."""
    which = "held != 0" if digest is None else "digest = ?"
    query = f"SELECT id, digest, width, held FROM contexts WHERE {which}"
    contexts = [_Context(*row) for row in db.execute(query, () if digest is None else (digest,))]
    for one in contexts:
        numbers = type(one.width) is type(one.held) is int and type(one.digest) is bytes
        if not numbers or not (one.width > 0 <= one.held and one.bytes < MOST_BYTES):
            raise _refuse(_name_of(db), f"counts rows that it cannot hold ({one.held!r})")
    return contexts


def _name_of(db: sqlite3.Connection) -> str:
    return os.fsdecode(db.execute("PRAGMA database_list").fetchone()[2])


class _Rows(NamedTuple):
    """What is found of some images."""

    found: NDArray[np.bool_]
    matrix: NDArray[np.float32] | None
    blocks: list[int]  # that were read
    damaged: list[bytes]  # images whose rows are


def _read_rows(db: sqlite3.Connection, context: bytes, images: list[bytes]) -> _Rows:
    found = np.zeros(len(images), dtype=bool)
    contexts = _list_contexts(db, context)
    if not contexts:
        return _Rows(found, None, [], [])
    context_id, _, width, held = contexts[0]
    query = "SELECT image, block, place, checksum FROM keys WHERE context = ?"
    if held > 4 * len(images):
        keys = _select(db, f"{query} AND image IN ({{}})", images, context_id)
    else:  # to read them all is faster, and the more so the more there are
        keys = db.execute(query, (context_id,))
    index_of = {image: index for index, image in enumerate(images)}
    wanted: dict[int, list[tuple[int, bytes, int, int]]] = {}
    for image, block, place, checksum in keys:
        if image in index_of:
            wanted.setdefault(block, []).append((index_of[image], image, place, checksum))
    # What is damaged may have any type. In order, because to follow the file is twice as fast.
    blocks = sorted(block for block in wanted if type(block) is int)
    size, seed = 4 * width, zlib.crc32(context)
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
        for index, image, place, checksum in wanted[block]:
            start = place * size if type(place) is int else len(data)
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
    db: sqlite3.Connection, context: bytes, images: list[bytes], matrix: NDArray[np.float32]
) -> None:
    db.execute(
        "INSERT INTO contexts (digest, width) VALUES (?, ?)"
        " ON CONFLICT (digest) DO UPDATE SET width = excluded.width WHERE held = 0",
        (context, matrix.shape[1]),
    )
    ((context_id, _, width, _),) = _list_contexts(db, context)
    check_width(context, width, matrix)
    query = "SELECT image FROM keys WHERE context = ? AND image IN ({})"
    stored = {image for (image,) in _select(db, query, images, context_id)}
    new = {image: i for i, image in reversed(list(enumerate(images))) if image not in stored}
    keys = sorted(new.items(), key=lambda item: item[1])
    seed, now = zlib.crc32(context), time.time_ns()
    step = max(1, BLOCK_BYTES // (4 * width))
    for part in (keys[start : start + step] for start in range(0, len(keys), step)):
        rows = matrix[[index for _, index in part]].astype("<f4", copy=False)
        block = db.execute(
            "INSERT INTO blocks (context, used) VALUES (?, ?)", (context_id, now)
        ).lastrowid
        db.execute("INSERT INTO matrices VALUES (?, ?)", (block, rows.data))
        db.executemany(
            "INSERT INTO keys VALUES (?, ?, ?, ?, ?)",
            [
                (context_id, image, block, place, _checksum(seed, image, rows[place].data))
                for place, (image, _) in enumerate(part)
            ],
        )
    db.execute("UPDATE contexts SET held = held + ? WHERE id = ?", (len(keys), context_id))


def check_width(context: bytes, width: int, matrix: NDArray[np.float32]) -> None:
    """Raise if rows do not have the width of those that their context holds."""
    if matrix.shape[1] != width:
        raise ValueError(
            f"Context {context.hex()[:12]} holds rows of {width} values, not of {matrix.shape[1]}."
            " What makes rows wider or narrower belongs into the digest of the context."
        )


def _touch(db: sqlite3.Connection, blocks: list[int]) -> None:
    now = time.time_ns()
    db.executemany("UPDATE blocks SET used = ? WHERE id = ?", [(now, block) for block in blocks])


def _prune(db: sqlite3.Connection, bound: int) -> int:
    """Drop the blocks used longest ago until at most `bound` bytes of rows are left."""
    contexts = {one.id: one for one in _list_contexts(db)}
    excess = sum(one.bytes for one in contexts.values()) - bound
    if excess <= 0:
        return 0
    oldest = db.execute(
        "SELECT id, context, (SELECT count(*) FROM keys WHERE block = blocks.id) FROM blocks"
        " ORDER BY used, id"
    )
    doomed = []
    for block, context, count in oldest:
        doomed.append((block, context, count))
        excess -= count * 4 * contexts[context].width if context in contexts else 0
        if excess <= 0:
            break
    oldest.close()
    for block, context, count in doomed:
        db.execute("DELETE FROM keys WHERE block = ?", (block,))
        _drop_block(db, block)
        db.execute("UPDATE contexts SET held = held - ? WHERE id = ?", (count, context))
    return sum(count for *_, count in doomed)


def _drop(db: sqlite3.Connection, context: bytes, images: list[bytes]) -> None:
    """Drop the rows of some images, and blocks of which nothing is left."""
    for one in _list_contexts(db, context):
        query = "SELECT image, block FROM keys WHERE context = ? AND image IN ({})"
        keys = list(_select(db, query, images, one.id))
        db.executemany(
            "DELETE FROM keys WHERE context = ? AND image = ?", [(one.id, key) for key, _ in keys]
        )
        held = max(0, one.held - len(keys))
        db.execute("UPDATE contexts SET held = ? WHERE id = ?", (held, one.id))
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
    db: sqlite3.Connection, lock: ProcessLock | None, work: bytes, images: list[bytes]
) -> NDArray[np.bool_]:
    if lock is None:
        return np.ones(len(images), dtype=bool)
    mine = _sign(db, lock)
    query = "SELECT image, owner FROM claims WHERE work = ? AND image IN ({})"
    held = dict(_select(db, query, images, work))
    busy = {owner for owner in set(held.values()) - {mine} if _is_at_work(db, lock.folder, owner)}
    granted = [held.get(image) not in busy for image in images]
    db.executemany(
        "INSERT OR REPLACE INTO claims VALUES (?, ?, ?)",
        [(work, image, mine) for image in itertools.compress(images, granted)],
    )
    return np.array(granted, dtype=bool)


def _release(
    db: sqlite3.Connection, lock: ProcessLock, work: bytes | None, images: list[bytes]
) -> None:
    mine = _sign(db, lock)
    db.executemany(
        "DELETE FROM claims WHERE work = ? AND image = ? AND owner = ?",
        [(work, image, mine) for image in images],
    )


def _sign(db: sqlite3.Connection, lock: ProcessLock) -> int:
    """Note that this process makes progress; return its number among the owners."""
    select = "SELECT id FROM owners WHERE token = ?", (lock.token,)
    mine = db.execute(*select).fetchone()
    if mine is None:
        _forget_dead_owners(db, lock.folder)
        row = lock.token, lock.host, lock.pid, 0.0
        db.execute("INSERT INTO owners (token, host, pid, signed) VALUES (?, ?, ?, ?)", row)
        mine = db.execute(*select).fetchone()
    db.execute("UPDATE owners SET signed = ? WHERE id = ?", (time.time(), *mine))
    return int(mine[0])


def _is_at_work(db: sqlite3.Connection, folder: Path, owner: object) -> bool:
    """Tell whether the owner of claims lives, and has made progress in the last minutes."""
    query = "SELECT CAST(token AS TEXT), CAST(ifnull(signed, 0) AS REAL) FROM owners WHERE id = ?"
    token, signed = db.execute(query, (owner,)).fetchone() or (None, 0.0)
    return token is not None and is_recent(signed) and _is_alive(db, folder, token)


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
        raise _refuse(_name_of(db), "names a process that cannot be") from error


def _find_holders(db: sqlite3.Connection, work: bytes, images: list[bytes], token: str) -> set[str]:
    query = (
        "SELECT CAST(ifnull(host, '') AS TEXT), CAST(pid AS INTEGER) FROM claims JOIN owners"
        " ON owner = owners.id WHERE token != ? AND work = ? AND image IN ({})"
    )
    owners = _select(db, query, images, token, work)
    return {f"process {pid} on {host.decode(errors='replace')}" for host, pid in owners}


def _select(
    db: sqlite3.Connection, query: str, values: Sequence[Any], *first: Any
) -> Iterator[Any]:
    """Run a query that ends in `IN ({})`, some hundred values at a time: SQLite has a limit."""
    for start in range(0, len(values), 500):
        part = values[start : start + 500]
        yield from db.execute(query.format(",".join("?" * len(part))), (*first, *part))


def _checksum(seed: int, image: bytes, data: bytes | memoryview) -> int:
    # Over context (the seed) and image too: a damaged index must not show a row under other keys.
    return zlib.crc32(data, zlib.crc32(image, seed))


def _close_all(
    opened: list[tuple[sqlite3.Connection, object]], locks: Sequence[ProcessLock] = ()
) -> None:
    while opened:
        opened.pop()[0].close()
    for lock in locks:
        lock.release()
