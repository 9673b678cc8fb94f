"""Rows, claims and file digests in one SQLite file that several processes read and write."""

from __future__ import annotations

import contextlib
import itertools
import os
import sqlite3
import struct
import tempfile
import threading
import time
import warnings
import weakref
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

FILE_NAME = "deepfeat-cache.sqlite"
LEASE_SECONDS = 900.0  # claims of an owner that gives no sign of life for so long are free
BUSY_SECONDS = 60.0  # how long a writer waits for another one

APPLICATION_ID = 0x0DEEFEA7
FORMAT = 1

T = TypeVar("T")
Found = tuple[NDArray[np.bool_], NDArray[np.float32] | None]


class CacheFormatError(ValueError):
    """The file in the cache directory is foreign, or of a format that is not read here."""


class Owner(NamedTuple):
    """A thread, told by when it started from later ones that get its number."""

    host: str
    pid: int
    thread: int
    started: str


class DiskStore:
    """One file, open once in a process; what its disk refuses is told once and left undone."""

    def __init__(self, folder: str) -> None:
        self.lock = threading.RLock()
        self.hits = self.misses = 0
        self.file = Path(folder, FILE_NAME)
        self.writable = True  # until a transaction fails
        self.told: set[str] = set()
        self.opened: list[tuple[sqlite3.Connection, object]] = []  # at most one, with its file's id
        weakref.finalize(self, _close_all, self.opened)

    def get_many(self, context: bytes, images: list[bytes], *, touch: bool) -> Found:
        nothing: tuple[Found, list[bytes]] = (np.zeros(len(images), dtype=bool), None), []
        (found, rows), damaged = self._read(lambda db: _read_rows(db, context, images), nothing)
        if damaged:
            self._write(lambda db: _drop(db, [(context, image) for image in damaged]), None)
            told = f"{self.file}: dropped {len(damaged)} damaged rows (wrong checksum)."
            warnings.warn(told, RuntimeWarning, stacklevel=3)
        if touch and rows is not None:
            used = list(itertools.compress(images, found))
            self._write(lambda db: _touch(db, context, used), None)
        return found, rows

    def list_images(self) -> dict[bytes, list[bytes]]:
        """Return the images of each context."""
        query = "SELECT digest, image FROM keys JOIN contexts ON context = contexts.id"
        keys: list[tuple[bytes, bytes]] = []
        images: dict[bytes, list[bytes]] = {}
        for context, image in self._read(lambda db: db.execute(query).fetchall(), keys):
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
        owner: Owner,
    ) -> None:
        def put(db: sqlite3.Connection) -> None:
            for context, matrix in rows.items():
                _write_rows(db, context, images, matrix)
            if work is not None:
                _release(db, work, images, owner)
            if bound is not None:
                _prune(db, bound)

        self._write(put, None)

    def prune(self, bound: int) -> int:
        self.writable = True  # who asks for this may have made room by other means, too
        dropped = self._write(lambda db: _prune(db, bound), 0)
        if dropped:
            self._shrink()
        return dropped

    def claim(
        self, work: bytes, images: list[bytes], owner: Owner, is_alive: Callable[[Owner], bool]
    ) -> NDArray[np.bool_]:
        all_granted = np.ones(len(images), dtype=bool)
        return self._write(lambda db: _claim(db, work, images, owner, is_alive), all_granted)

    def release(self, work: bytes, images: list[bytes], owner: Owner) -> None:
        self._write(lambda db: _release(db, work, images, owner), None)

    def known_digests(self, paths: list[bytes]) -> dict[bytes, tuple[str, bytes]]:
        """Return what is known of each path: the stat of its file, as text, and its digest."""
        query = "SELECT path, stat, digest FROM files WHERE path IN ({})"
        rows: list[tuple[bytes, str, bytes]] = []
        rows = self._read(lambda db: list(_select(db, query, paths)), rows)
        return {path: (stat, digest) for path, stat, digest in rows}

    def remember_digests(self, files: list[tuple[bytes, str, bytes]]) -> None:
        query = "INSERT OR REPLACE INTO files VALUES (?, ?, ?)"
        self._write(lambda db: db.executemany(query, files), None)

    def count(self) -> tuple[int, int, int]:
        """Return how many rows, bytes and contexts there are."""
        query = "SELECT held, held * width * 4 FROM contexts WHERE held > 0"
        counts: list[tuple[int, int]] = []
        counts = self._read(lambda db: db.execute(query).fetchall(), counts)
        return sum(rows for rows, _ in counts), sum(size for _, size in counts), len(counts)

    def clear(self) -> None:
        self.writable = True
        self._write(_clear, None)
        self._shrink()

    def close(self) -> None:
        """Close the file; the next use opens it again."""
        _close_all(self.opened)

    def _read(self, task: Callable[[sqlite3.Connection], T], otherwise: T) -> T:
        return self._transact("DEFERRED", task, otherwise)

    def _write(self, task: Callable[[sqlite3.Connection], T], otherwise: T) -> T:
        return self._transact("IMMEDIATE", task, otherwise) if self.writable else otherwise

    def _transact(self, kind: str, task: Callable[[sqlite3.Connection], T], otherwise: T) -> T:
        """Run `task` in one transaction; return `otherwise` if there is no file, or on failure."""
        reads = kind == "DEFERRED"
        with self.lock:
            try:
                db = self._open(create=not reads)
                if db is None:
                    return otherwise
                with _transaction(db, kind):
                    return task(db)
            except Exception as error:
                if not _is_of_the_disk(error):
                    raise
                self.writable = False
                trouble = f"cannot be {'read' if reads else 'written'} ({error})"
        if trouble not in self.told:
            self.told.add(trouble)
            told = f"{self.file} {trouble}; nothing more is stored in it."
            warnings.warn(told, RuntimeWarning, stacklevel=5)
        return otherwise

    def _open(self, *, create: bool) -> sqlite3.Connection | None:
        """Return the open database; None where there is no file and none is to be made."""
        file_id = _file_id(self.file)
        if self.opened and self.opened[0][1] == file_id:
            return self.opened[0][0]
        self.close()  # if one is open, its file was deleted
        if file_id is None and not create:
            return None
        self.opened.append((_open_file(self.file), _file_id(self.file)))
        return self.opened[0][0]

    def _shrink(self) -> None:
        """Give the space of deleted rows back, if it can be done now."""
        with self.lock, contextlib.suppress(sqlite3.DatabaseError):
            for db, _ in self.opened:
                # A script, because `execute` would do one page of it.
                db.executescript("PRAGMA incremental_vacuum; PRAGMA wal_checkpoint(TRUNCATE)")


_SCHEMA = f"""
PRAGMA auto_vacuum = INCREMENTAL;
BEGIN;
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {FORMAT};
CREATE TABLE contexts (
    id INTEGER PRIMARY KEY, digest BLOB NOT NULL UNIQUE, width INTEGER NOT NULL,
    held INTEGER NOT NULL DEFAULT 0
);
-- The keys apart from the rows: to look up, to count or to mark as used touches no large page.
CREATE TABLE keys (
    context INTEGER NOT NULL, image BLOB NOT NULL, id INTEGER NOT NULL, used INTEGER NOT NULL,
    PRIMARY KEY (context, image)
) WITHOUT ROWID;
CREATE INDEX keys_by_use ON keys (used, id);
CREATE TABLE rows (id INTEGER PRIMARY KEY, checksum INTEGER NOT NULL, data BLOB NOT NULL);
CREATE TRIGGER key_added AFTER INSERT ON keys BEGIN
    UPDATE contexts SET held = held + 1 WHERE id = NEW.context;
END;
CREATE TRIGGER key_dropped AFTER DELETE ON keys BEGIN
    UPDATE contexts SET held = held - 1 WHERE id = OLD.context;
    DELETE FROM rows WHERE id = OLD.id;
END;
-- One lease an owner, not one a claim: to renew it is to write one row, however much it claims.
CREATE TABLE leases (
    id INTEGER PRIMARY KEY, host TEXT, pid INTEGER, thread INTEGER, started TEXT,
    until REAL NOT NULL, UNIQUE (host, pid, thread, started)
);
CREATE TABLE claims (
    work BLOB NOT NULL, image BLOB NOT NULL, lease INTEGER NOT NULL, PRIMARY KEY (work, image)
) WITHOUT ROWID;
CREATE TABLE files (
    path BLOB PRIMARY KEY, stat TEXT NOT NULL, digest BLOB NOT NULL
) WITHOUT ROWID;
COMMIT;
PRAGMA journal_mode = WAL;
"""


def _open_file(file: Path) -> sqlite3.Connection:
    if file.parent.is_file():
        raise ValueError(f"{file.parent} is a file, and a cache wants a directory.")
    if not file.exists():
        _make_file(file)
    _check_format(file)
    try:
        return _connect(f"{file.as_uri()}?mode=rw", mapped=2**40)
    except sqlite3.OperationalError:
        # A WAL database wants files beside it even to be read. Where they cannot be made, it can be
        # read without, as far as it is not in the log of a crashed writer. Not mapped: should
        # somebody write after all, that makes errors or wrong checksums, but no crash.
        return _connect(f"{file.as_uri()}?immutable=1", mapped=0)


def _make_file(file: Path) -> None:
    """Make the file elsewhere and put it in its place when done, unless another was faster."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{file.name}-", dir=file.parent) as folder:
        new = Path(folder, "new")
        with contextlib.closing(sqlite3.connect(new)) as db:
            db.executescript(_SCHEMA)
        try:
            os.link(new, file)
        except FileExistsError:
            pass
        except OSError:  # a file system without links
            new.replace(file)


def _connect(uri: str, mapped: int) -> sqlite3.Connection:
    db = sqlite3.connect(
        uri, uri=True, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
    )
    try:
        db.execute(f"PRAGMA mmap_size = {mapped}")
        db.execute("PRAGMA synchronous = NORMAL")
        db.execute("PRAGMA secure_delete = OFF")
        db.execute("SELECT 1 FROM contexts")
    except BaseException:
        db.close()
        raise
    return db


def _check_format(file: Path) -> None:
    """Refuse a file that is not ours by its first bytes: SQLite might change it by opening it."""
    with file.open("rb") as stream:
        header = stream.read(100).ljust(100, b"\0")
    version, application_id = struct.unpack_from(">I4xI", header, 60)
    if not header.startswith(b"SQLite format 3\0") or application_id != APPLICATION_ID:
        raise CacheFormatError(
            f"{file} is not a cache of deepfeat. Move it away, or choose another directory."
        )
    if version != FORMAT:
        raise CacheFormatError(
            f"{file} has format {version}, and this deepfeat reads format {FORMAT}."
            " Choose another directory, or the deepfeat that wrote it."
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
    # SQLite may quote a damaged file, which then is no text.
    disk = isinstance(error, OSError | sqlite3.DatabaseError | UnicodeDecodeError)
    return disk and not isinstance(error, sqlite3.ProgrammingError)


def _read_rows(
    db: sqlite3.Connection, context: bytes, images: list[bytes]
) -> tuple[Found, list[bytes]]:
    """Return what is found, and the images whose rows are damaged."""
    found = np.zeros(len(images), dtype=bool)
    query = "SELECT id, held FROM contexts WHERE digest = ?"
    context_id, held = db.execute(query, (context,)).fetchone() or (None, 0)
    # Cast, as the data below: what is damaged may have any type.
    query = "SELECT image, CAST(ifnull(id, 0) AS INTEGER) FROM keys WHERE context = ?"
    if held > 4 * len(images):
        keys = _select(db, f"{query} AND image IN ({{}})", images, context_id)
    else:  # to read them all is faster, and the more so the more there are
        keys = db.execute(query, (context_id,))
    place = {image: i for i, image in enumerate(images)}
    row_ids = {image: row_id for image, row_id in keys if image in place}
    places = {row_id: place[image] for image, row_id in row_ids.items()}
    rows, seed = None, zlib.crc32(context)
    query = "SELECT id, checksum, CAST(data AS BLOB) FROM rows WHERE id IN ({})"
    # Sorted, because to follow the order of the file is twice as fast.
    for row_id, checksum, data in _select(db, query, sorted(places)):
        i = places[row_id]
        if checksum != _checksum(seed, images[i], data):
            continue
        if rows is None:
            rows = np.empty((len(images), len(data) // 4), "<f4")
            view, size = rows.data.cast("B"), len(data)
        view[i * size : (i + 1) * size] = data
        found[i] = True
    damaged = [image for image in row_ids if not found[place[image]]]
    if rows is None:
        return (found, None), damaged
    rows[~found] = np.nan
    return (found, rows.astype(np.float32, copy=False)), damaged


def _write_rows(
    db: sqlite3.Connection, context: bytes, images: list[bytes], matrix: NDArray[np.float32]
) -> None:
    db.execute(
        "INSERT INTO contexts (digest, width) VALUES (?, ?)"
        " ON CONFLICT (digest) DO UPDATE SET width = excluded.width WHERE held = 0",
        (context, matrix.shape[1]),
    )
    query = "SELECT id, width FROM contexts WHERE digest = ?"
    context_id, width = db.execute(query, (context,)).fetchone()
    check_width(context, width, matrix)
    query = "SELECT image FROM keys WHERE context = ? AND image IN ({})"
    stored = {image for (image,) in _select(db, query, images, context_id)}
    seed, now = zlib.crc32(context), time.time_ns()
    for image, row in zip(images, matrix.astype("<f4", copy=False), strict=True):
        if image not in stored:
            stored.add(image)
            row_id = db.execute(
                "INSERT INTO rows (checksum, data) VALUES (?, ?)",
                (_checksum(seed, image, row.data), row.data),
            ).lastrowid
            db.execute("INSERT INTO keys VALUES (?, ?, ?, ?)", (context_id, image, row_id, now))


def check_width(context: bytes, width: int, matrix: NDArray[np.float32]) -> None:
    """Raise if rows do not have the width of those that their context holds."""
    if matrix.shape[1] != width:
        raise ValueError(
            f"Context {context.hex()[:12]} holds rows of {width} values, not of {matrix.shape[1]}."
            " What makes rows wider or narrower belongs into the digest of the context."
        )


def _touch(db: sqlite3.Connection, context: bytes, images: list[bytes]) -> None:
    now = time.time_ns()
    db.executemany(
        "UPDATE keys SET used = ?"
        " WHERE context = (SELECT id FROM contexts WHERE digest = ?) AND image = ?",
        [(now, context, image) for image in images],
    )


def _prune(db: sqlite3.Connection, bound: int) -> int:
    """Drop the rows used longest ago until at most `bound` bytes are left."""
    (excess,) = db.execute("SELECT total(held * width * 4) - ? FROM contexts", (bound,)).fetchone()
    oldest = db.execute(
        "SELECT width * 4, digest, image FROM keys JOIN contexts ON context = contexts.id"
        " ORDER BY used, keys.id"
    )
    doomed = []
    while excess > 0:
        size, *key = oldest.fetchone()
        excess -= size
        doomed.append(key)
    oldest.close()
    _drop(db, doomed)
    return len(doomed)


def _drop(db: sqlite3.Connection, keys: Sequence[Sequence[bytes]]) -> None:
    db.executemany(
        "DELETE FROM keys WHERE context = (SELECT id FROM contexts WHERE digest = ?) AND image = ?",
        keys,
    )


def _clear(db: sqlite3.Connection) -> None:
    for table in ("keys", "contexts", "claims", "leases", "files"):
        db.execute(f"DELETE FROM {table}")


def _claim(
    db: sqlite3.Connection,
    work: bytes,
    images: list[bytes],
    owner: Owner,
    is_alive: Callable[[Owner], bool],
) -> NDArray[np.bool_]:
    mine = _renew_lease(db, owner)
    query = "SELECT id, host, pid, thread, started FROM leases WHERE until > ? AND id != ?"
    leases = db.execute(query, (time.time(), mine))
    live = {lease for lease, *other in leases if is_alive(Owner(*other))}
    query = "SELECT image, lease FROM claims WHERE work = ? AND image IN ({})"
    held = dict(_select(db, query, images, work))
    granted = [held.get(image) not in live for image in images]
    db.executemany(
        "INSERT OR REPLACE INTO claims VALUES (?, ?, ?)",
        [(work, image, mine) for image in itertools.compress(images, granted)],
    )
    return np.array(granted, dtype=bool)


def _release(db: sqlite3.Connection, work: bytes, images: list[bytes], owner: Owner) -> None:
    mine = _renew_lease(db, owner)
    db.executemany(
        "DELETE FROM claims WHERE work = ? AND image = ? AND lease = ?",
        [(work, image, mine) for image in images],
    )


def _renew_lease(db: sqlite3.Connection, owner: Owner) -> int:
    db.execute(
        "INSERT INTO leases (host, pid, thread, started, until) VALUES (?, ?, ?, ?, ?)"
        " ON CONFLICT (host, pid, thread, started) DO UPDATE SET until = excluded.until",
        (*owner, time.time() + LEASE_SECONDS),
    )
    query = "SELECT id FROM leases WHERE (host, pid, thread, started) = (?, ?, ?, ?)"
    return int(db.execute(query, owner).fetchone()[0])


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


def _close_all(opened: list[tuple[sqlite3.Connection, object]]) -> None:
    while opened:
        opened.pop()[0].close()
