"""Knows what a cache promises: rows come back whole or not at all, whatever befalls its disk."""

import contextlib
import copy
import errno
import functools
import inspect
import os
import pickle
import platform
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from numpy.testing import assert_array_equal
from sklearn.base import BaseEstimator, clone

from deepfeat._cache import cache as _cache
from deepfeat._cache import disk as _store
from deepfeat._cache import owners as _claims
from deepfeat._cache.cache import CacheInfo, FeatureCache, FileStat
from deepfeat._cache.disk import FILE_NAME, CacheFormatError

WORK = b"work"
CONTEXT, OTHER = b"context", b"other context"
IMAGES = [f"image {i}".encode() for i in range(6)]
WIDTH = 5
ROW_BYTES = WIDTH * 4


def rows_of(images, width=WIDTH, context=CONTEXT):
    """Make rows that tell whose they are."""
    seeds = np.array([zlib.crc32(context + image) for image in images], np.float32)
    return seeds[:, None] + np.arange(width, dtype=np.float32)


def put(cache, images, width=WIDTH, work=None):
    cache.put_many(images, {CONTEXT: rows_of(images, width)}, work)


def found_in(cache, images):
    """Return which of the images are found, having checked that their rows are right."""
    found, rows = cache.get_many(CONTEXT, images)
    there = [image for image, is_there in zip(images, found, strict=True) if is_there]
    if rows is not None:
        assert_array_equal(rows[found], rows_of(there, rows.shape[1]))
    return there


# What scripts in other processes start with. To import this module there would take seconds.
PREAMBLE = f"""
import os, signal, sys, threading, time, zlib
import numpy as np
from numpy.testing import assert_array_equal
from deepfeat._cache.cache import FeatureCache
WORK, CONTEXT, WIDTH, IMAGES = {WORK}, {CONTEXT}, {WIDTH}, {IMAGES}
{inspect.getsource(rows_of)}
{inspect.getsource(put)}
{inspect.getsource(found_in)}
def say(*words):
    print(*words, flush=True)

cache = FeatureCache(sys.argv[1])
"""


def start(script: str, *args: object, prefix: Sequence[str] = ()) -> subprocess.Popen[str]:
    """Start a script in another process, where each warning is an error."""
    python = [*prefix, sys.executable, "-W", "error", "-c"]
    return subprocess.Popen(
        [*python, PREAMBLE + textwrap.dedent(script), *map(str, args)],
        env={**os.environ, "PYTHONPATH": str(Path(_cache.__file__).parents[2])},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> str:
    """Return what a script said, once it ended well."""
    said, errors = process.communicate("go\n", timeout=60)
    assert process.returncode == 0, errors
    return said


def kill(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[Callable[[Path], subprocess.Popen[str]]]:
    """Start processes that claim all images and live on; end them after the test."""
    processes: list[subprocess.Popen[str]] = []

    def start_owner(folder: Path) -> subprocess.Popen[str]:
        process = start("say(cache.claim(WORK, IMAGES).all()); time.sleep(60)", folder)
        processes.append(process)
        assert process.stdout.readline() == "True\n"
        return process

    yield start_owner
    for process in processes:
        kill(process)


@pytest.fixture(params=["memory", "disk"])
def new_cache(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., FeatureCache]:
    """Make a cache of one kind; a test that asks for it runs once per kind."""
    path = tmp_path / "cache" if request.param == "disk" else None
    return lambda **kwargs: FeatureCache(path, **kwargs)


@pytest.fixture
def cache(new_cache: Callable[..., FeatureCache]) -> FeatureCache:
    return new_cache()


@pytest.fixture
def disk(tmp_path: Path) -> FeatureCache:
    return FeatureCache(tmp_path / "cache")


class Worker:
    """A thread that lives until told, and does what it is asked."""

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(1)

    def __call__(self, function: Callable[..., object], *args: object) -> object:
        return self.pool.submit(function, *args).result()


@pytest.fixture
def worker() -> Iterator[Worker]:
    worker = Worker()
    yield worker
    worker.pool.shutdown()


def reopen(cache: FeatureCache) -> FeatureCache:
    """Close the file, as if the process ended and another began."""
    path = cache.path
    cache._store.close()
    _cache._stores.pop(cache._token, None)
    return FeatureCache(path)


def database_of(cache: FeatureCache) -> Path:
    return Path(cache.path, FILE_NAME)


def contents_of(cache: FeatureCache) -> dict[Path, bytes]:
    """Return the content of each file, except the index of the log, which readers use as well."""
    files = [path for path in Path(cache.path).rglob("*") if path.is_file()]
    return {path: path.read_bytes() for path in files if "shm" not in path.name}


def ask(cache: FeatureCache, query: str) -> list[tuple[object, ...]]:
    """Look into the database behind the cache's back."""
    with contextlib.closing(sqlite3.connect(database_of(cache))) as connection:
        return connection.execute(query).fetchall()


def owner_of(cache: FeatureCache, token: str) -> int | None:
    """Return the number of the process that has a lock."""
    return dict(ask(cache, "SELECT token, pid FROM owners")).get(token)


def change(cache: FeatureCache, statement: str) -> None:
    """Change the database behind the cache's back."""
    with contextlib.closing(sqlite3.connect(database_of(cache))) as connection, connection:
        connection.execute(statement)


# Rows under keys


def test_rows_come_back_under_their_keys_in_the_order_asked(cache: FeatureCache) -> None:
    """Known images get their own rows, repeats included, and unknown ones NaN."""
    put(cache, IMAGES[:4])
    asked = [IMAGES[2], b"unknown", IMAGES[0], IMAGES[2]]
    found, rows = cache.get_many(CONTEXT, asked)
    assert_array_equal(found, [True, False, True, True])
    assert found.dtype == bool
    assert rows.dtype == np.float32
    assert rows.flags.writeable
    assert_array_equal(rows[found], rows_of([IMAGES[2], IMAGES[0], IMAGES[2]]))
    assert_array_equal(rows[1], np.full(WIDTH, np.nan))


@pytest.mark.parametrize("images", [[], [b"unknown"]], ids=["nothing asked", "unknown"])
def test_nothing_found_is_none(cache: FeatureCache, images: list[bytes]) -> None:
    """Where no image is found there is no matrix, since nobody knows its width."""
    put(cache, IMAGES)
    found, rows = cache.get_many(CONTEXT, images)
    assert_array_equal(found, np.zeros(len(images), dtype=bool))
    assert rows is None
    assert cache.get_many(OTHER, IMAGES)[1] is None


def test_few_rows_are_found_among_many(cache: FeatureCache) -> None:
    """A look-up finds its rows whether it asks for few or for all, in any order."""
    images = [b"%d" % i for i in range(1_200)]
    put(cache, images[:700])
    put(cache, images[700:])
    assert found_in(cache, images[::-1]) == images[::-1]
    assert found_in(cache, [images[1_100], b"unknown", images[3]]) == [images[1_100], images[3]]


def test_contexts_do_not_meet(cache: FeatureCache) -> None:
    """One image has one row in each context, of its own width."""
    narrow, wide = rows_of(IMAGES, 2), rows_of(IMAGES, 9, OTHER)
    cache.put_many(IMAGES, {CONTEXT: narrow, OTHER: wide})
    assert_array_equal(cache.get_many(CONTEXT, IMAGES)[1], narrow)
    assert_array_equal(cache.get_many(OTHER, IMAGES)[1], wide)


def test_to_ask_whether_a_row_is_there_counts_nothing(
    new_cache: Callable[..., FeatureCache],
) -> None:
    """`has` tells what `get_many` would find, and is neither a hit, a miss nor a use."""
    cache = new_cache(max_bytes=2 * ROW_BYTES)
    for image in IMAGES[:2]:
        put(cache, [image])
    asked = [IMAGES[1], b"unknown", IMAGES[0], IMAGES[0]]
    assert_array_equal(cache.has(CONTEXT, asked), [True, False, True, True])
    assert not cache.has(OTHER, asked).any()
    assert cache.has(CONTEXT, IMAGES[:1]).all()
    put(cache, IMAGES[2:3])
    assert_array_equal(cache.has(CONTEXT, IMAGES[:3]), [False, True, True])
    assert (cache.info().hits, cache.info().misses) == (0, 0)


def test_a_row_is_put_once(cache: FeatureCache) -> None:
    """To put again what is there, even in one call, changes nothing."""
    put(cache, IMAGES)
    before = cache.info()
    cache.put_many(IMAGES, {CONTEXT: rows_of(IMAGES) + 1})
    assert cache.info() == before
    cache.put_many([b"twice", b"twice"], {CONTEXT: np.array([[1.0] * WIDTH, [2.0] * WIDTH])})
    assert_array_equal(cache.get_many(CONTEXT, [b"twice"])[1], [[1.0] * WIDTH])
    assert found_in(cache, IMAGES) == IMAGES


@pytest.mark.parametrize("step", [1, 2], ids=["contiguous", "strided"])
def test_rows_are_kept_as_they_were_put(cache: FeatureCache, step: int) -> None:
    """What callers do to their matrices, before or after, does not reach the cache."""
    matrix = rows_of(IMAGES)[:, ::step]
    expected = matrix.copy()
    cache.put_many(IMAGES, {CONTEXT: matrix})
    matrix[:] = -1
    cache.get_many(CONTEXT, IMAGES)[1][:] = -2
    assert_array_equal(cache.get_many(CONTEXT, IMAGES)[1], expected)


def test_a_context_has_one_width(cache: FeatureCache) -> None:
    """Rows of another width are refused, together with all that came in the same call."""
    put(cache, IMAGES[:1])
    wrong = {OTHER: rows_of(IMAGES), CONTEXT: rows_of(IMAGES, WIDTH + 1)}
    with pytest.raises(ValueError, match=r"holds rows of 5 values, not of 6"):
        cache.put_many(IMAGES, wrong)
    assert cache.info().rows == 1
    cache.clear()
    put(cache, IMAGES, WIDTH + 1)
    assert found_in(cache, IMAGES) == IMAGES


@pytest.mark.parametrize("shape", [(6,), (5, 2), (6, 0), (6, 2, 2)])
def test_a_matrix_has_a_row_for_each_image(cache: FeatureCache, shape: tuple[int, ...]) -> None:
    """Anything else than (n, d) with d > 0 is refused, and the message tells the shapes."""
    with pytest.raises(ValueError, match=r"shape \(6, d\), got"):
        cache.put_many(IMAGES, {CONTEXT: np.zeros(shape, np.float32)})


def test_info_counts(cache: FeatureCache) -> None:
    """Rows, bytes, contexts, hits and misses are counted, repeats as often as they are asked."""
    cache.put_many(IMAGES, {CONTEXT: rows_of(IMAGES, 3), OTHER: rows_of(IMAGES, 7)})
    cache.get_many(CONTEXT, [IMAGES[0], IMAGES[0], b"unknown"])
    assert cache.info() == CacheInfo(rows=12, bytes=6 * 40, contexts=2, hits=2, misses=1)
    assert repr(cache.info()) == "CacheInfo(rows=12, bytes=240, contexts=2, hits=2, misses=1)"


def test_clear_forgets(cache: FeatureCache, worker: Worker) -> None:
    """After `clear` no row, digest or claim is left."""
    stat = ("a.png", 10, 10**18, 10**18, 7, 1)
    put(cache, IMAGES)
    cache.remember_digests([stat], [b"digest"])
    worker(cache.claim, WORK, IMAGES)
    assert not cache.claim(WORK, IMAGES).any()
    cache.clear()
    assert cache.info().rows == cache.info().bytes == cache.info().contexts == 0
    assert found_in(cache, IMAGES) == []
    assert cache.known_digests([stat]) == [None]
    assert cache.claim(WORK, IMAGES).all()


# Bounds


def test_the_bound_holds_after_each_write(new_cache: Callable[..., FeatureCache]) -> None:
    """However much is put, no more than `max_bytes` stays, and that is the newest."""
    cache = new_cache(max_bytes=3 * ROW_BYTES + 1)
    for image in IMAGES:
        put(cache, [image])
        assert cache.info().bytes <= cache.max_bytes
    assert found_in(cache, IMAGES) == IMAGES[-3:]
    cache.put_many([b"a", b"b"], {OTHER: np.ones((2, 100), np.float32)})
    assert cache.info().rows == 0


def test_the_rows_used_longest_ago_go_first(new_cache: Callable[..., FeatureCache]) -> None:
    """To read a row keeps it; what was not read since goes."""
    cache = new_cache(max_bytes=4 * ROW_BYTES)
    for image in IMAGES[:4]:
        put(cache, [image])
    found_in(cache, [IMAGES[0], IMAGES[2]])
    put(cache, IMAGES[4:])
    assert found_in(cache, IMAGES) == [IMAGES[0], IMAGES[2], IMAGES[4], IMAGES[5]]


def test_prune_leaves_what_was_used_last(cache: FeatureCache) -> None:
    """`prune` tells how many rows it dropped, and leaves the newest."""
    for image in IMAGES:
        put(cache, [image])
    assert cache.prune(2 * ROW_BYTES) == 4
    assert cache.prune(2 * ROW_BYTES) == 0
    assert found_in(cache, IMAGES) == IMAGES[-2:]
    assert (cache.info().rows, cache.info().bytes) == (2, 2 * ROW_BYTES)


def test_a_pruned_file_is_smaller(disk: FeatureCache) -> None:
    """The space of dropped rows goes back to the disk."""
    images = [b"%d" % i for i in range(200)]
    put(disk, images, 10_000)
    disk.prune(10 * 40_000)
    assert found_in(disk, images) == images[-10:]
    assert sum(map(len, contents_of(disk).values())) < 1_000_000


def test_a_bound_is_checked() -> None:
    """A negative bound is refused."""
    with pytest.raises(ValueError, match="max_bytes must be 0 or more, not -1"):
        FeatureCache(max_bytes=-1)


def test_memory_is_bounded_by_default(tmp_path: Path) -> None:
    """A cache in memory holds 1 GiB at most; one on disk is not bounded."""
    assert repr(FeatureCache()) == "FeatureCache(max_bytes=1073741824)"
    assert repr(FeatureCache(tmp_path)) == f"FeatureCache({str(tmp_path)!r}, max_bytes=None)"


# One store, however it is reached


class Extractor(BaseEstimator):
    def __init__(self, cache: FeatureCache | None = None) -> None:
        self.cache = cache


COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda cache: pickle.loads(pickle.dumps(cache)),
    "clone": lambda cache: clone(Extractor(cache)).cache,
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES.keys())
def test_a_copy_is_the_same_store(
    cache: FeatureCache, copied: Callable[[FeatureCache], FeatureCache]
) -> None:
    """What one puts the other finds; they are equal, have one hash and count together."""
    twin = copied(cache)
    put(cache, IMAGES[:3])
    put(twin, IMAGES[3:])
    assert found_in(cache, IMAGES) == found_in(twin, IMAGES) == IMAGES
    assert twin == cache
    assert len({twin, cache}) == 1
    assert (twin.info(), repr(twin)) == (cache.info(), repr(cache))


def test_stores_differ(tmp_path: Path) -> None:
    """Two caches in memory are two stores, and so are two directories."""
    caches = {FeatureCache(), FeatureCache(), FeatureCache(tmp_path), FeatureCache(tmp_path / "a")}
    assert len(caches) == 4
    assert FeatureCache() != "cache"


def test_one_directory_is_one_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A directory is the same however it is written, and stays so when the process moves."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "link").symlink_to("cache")
    cache = FeatureCache("cache")
    for path in tmp_path / "cache", "./cache", "~/cache", "link":
        assert FeatureCache(path) == cache
    monkeypatch.chdir("/")
    put(cache, IMAGES)
    assert (tmp_path / "cache" / FILE_NAME).exists()


def test_memory_is_given_back() -> None:
    """The rows of a cache that nobody holds any more are gone."""
    cache = FeatureCache()
    pickled, token = pickle.dumps(cache), cache._token
    put(cache, IMAGES)
    del cache
    assert token not in _cache._stores
    assert pickle.loads(pickled).info().rows == 0


def test_memory_begins_empty_in_another_process(tmp_path: Path) -> None:
    """There a pickled cache is one store too, and it lives from task to task."""
    cache = FeatureCache()
    put(cache, IMAGES)
    (tmp_path / "pickle").write_bytes(pickle.dumps(cache))
    script = """
        import pickle
        def task():
            with open(sys.argv[1], "rb") as file:
                cache = pickle.load(file)
            found = found_in(cache, IMAGES)
            put(cache, IMAGES[:2])
            return found
        say(task() == [], task() == IMAGES[:2])
        """
    assert finish(start(script, tmp_path / "pickle")) == "True True\n"


def test_nothing_is_written_before_the_first_row(tmp_path: Path) -> None:
    """To make, copy, ask and count leaves the disk as it was."""
    cache = pickle.loads(pickle.dumps(FeatureCache(tmp_path / "cache")))
    assert found_in(cache, IMAGES) == []
    assert cache.known_digests([("a", 1, 2, 3, 4, 5)]) == [None]
    assert cache.info().rows == 0
    assert not (tmp_path / "cache").exists()


def test_reading_writes_nothing(disk: FeatureCache) -> None:
    """To look up rows in an unbounded cache changes no byte of its files."""
    put(disk, IMAGES)
    before = contents_of(disk)
    assert found_in(disk, IMAGES) == IMAGES
    assert contents_of(disk) == before


def test_rows_outlive_the_process(disk: FeatureCache) -> None:
    """What one process put the next one finds."""
    finish(start("put(cache, IMAGES)", disk.path))
    assert found_in(disk, IMAGES) == IMAGES


# Claims


def in_another_thread(function: Callable[..., object], *args: object) -> object:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *args).result()


def test_a_claim_binds_others(cache: FeatureCache, worker: Worker) -> None:
    """What one thread claimed no other gets, in this work; the thread itself gets it again."""
    assert_array_equal(worker(cache.claim, WORK, IMAGES[:2]), [True, True])
    assert_array_equal(cache.claim(WORK, IMAGES[:3]), [False, False, True])
    assert_array_equal(worker(cache.claim, WORK, IMAGES[:3]), [True, True, False])
    assert_array_equal(cache.claim(b"other work", IMAGES[:2]), [True, True])


def test_a_claim_ends_with_its_row(cache: FeatureCache, worker: Worker) -> None:
    """`put_many` gives back the images that it stores, of the work that it names."""
    worker(cache.claim, WORK, IMAGES)
    worker(put, cache, IMAGES[:1])
    assert not cache.claim(WORK, IMAGES).any()
    worker(lambda: put(cache, IMAGES[:2], work=WORK))
    assert_array_equal(cache.claim(WORK, IMAGES[:3]), [True, True, False])


def test_a_claim_is_given_back_by_its_owner(cache: FeatureCache, worker: Worker) -> None:
    """`release` frees the thread's own claims, and neither it nor `put_many` those of others."""
    worker(cache.claim, WORK, IMAGES)
    cache.release(WORK, IMAGES)
    put(cache, IMAGES, work=WORK)
    assert not cache.claim(WORK, IMAGES).any()
    worker(cache.release, WORK, IMAGES[:1])
    assert_array_equal(cache.claim(WORK, IMAGES[:2]), [True, False])


def test_the_claims_of_a_dead_thread_are_free(cache: FeatureCache) -> None:
    """A thread that ended without its rows binds nobody."""
    in_another_thread(cache.claim, WORK, IMAGES)
    end = time.monotonic() + 10
    # Python is done with a thread a moment before the kernel is.
    while not cache.claim(WORK, IMAGES).all():
        assert time.monotonic() < end


@pytest.fixture
def wait(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Put the clock of claims forward."""
    clock = [time.time()]
    monkeypatch.setattr(time, "time", lambda: clock[0])

    def move(seconds: float) -> None:
        clock[0] += seconds

    return move


def test_an_owner_without_progress_loses_its_claims(
    cache: FeatureCache, worker: Worker, wait: Callable[[float], None]
) -> None:
    """A live owner that makes no progress is waited for some minutes, and no longer."""
    worker(cache.claim, WORK, IMAGES)
    wait(_claims.PATIENCE_SECONDS - 1)
    assert not cache.claim(WORK, IMAGES).any()
    wait(2)
    assert cache.claim(WORK, IMAGES).all()
    assert not worker(cache.claim, WORK, IMAGES).any()


@pytest.mark.parametrize("sign", ["claim", "put", "release"])
def test_progress_keeps_claims(
    cache: FeatureCache, worker: Worker, wait: Callable[[float], None], sign: str
) -> None:
    """An owner that goes on claiming or putting keeps all its claims."""
    signs = {
        "claim": lambda: cache.claim(WORK, [b"next"]),
        "put": lambda: put(cache, [b"next"], work=WORK),
        "release": lambda: cache.release(WORK, [b"next"]),
    }
    worker(cache.claim, WORK, IMAGES)
    for _ in range(3):
        wait(_claims.PATIENCE_SECONDS - 1)
        worker(signs[sign])
    assert not cache.claim(WORK, IMAGES).any()


@pytest.mark.parametrize("trace", ["none", "zombie"])
def test_the_claims_of_a_killed_process_are_taken_over_at_once(
    disk: FeatureCache, owner: Callable[[Path], subprocess.Popen[str]], trace: str
) -> None:
    """A live process keeps its claims; killed, it loses them, its body still there or not."""
    process = owner(Path(disk.path))
    assert not disk.claim(WORK, IMAGES).any()
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | (os.WNOWAIT if trace == "zombie" else 0))
    assert disk.claim(WORK, IMAGES).all()


def test_a_process_killed_in_another_pid_namespace_is_seen_to_be_dead(disk: FeatureCache) -> None:
    """As in a container, where its number says nothing here."""
    unshare = ["unshare", "--pid", "--fork", "--kill-child"]
    if (
        shutil.which("unshare") is None
        or subprocess.run([*unshare, "true"], capture_output=True).returncode
    ):
        pytest.skip("no pid namespace can be made here")
    script = "say(os.getpid(), cache.claim(WORK, IMAGES).all()); time.sleep(60)"
    process = start(script, disk.path, prefix=unshare)
    try:
        assert process.stdout.readline() == "1 True\n"
        assert not disk.claim(WORK, IMAGES).any()
    finally:
        kill(process)
    end = time.monotonic() + 10
    while not disk.claim(WORK, IMAGES).all():  # the child is killed a moment after its parent
        assert time.monotonic() < end


def test_a_stopped_process_is_waited_for_some_minutes(
    disk: FeatureCache,
    owner: Callable[[Path], subprocess.Popen[str]],
    wait: Callable[[float], None],
) -> None:
    """One that hangs, but lives, keeps its claims for so long, and loses them then."""
    owner(Path(disk.path)).send_signal(signal.SIGSTOP)
    wait(_claims.PATIENCE_SECONDS - 60)
    assert not disk.claim(WORK, IMAGES).any()
    wait(61)
    assert disk.claim(WORK, IMAGES).all()


def test_a_forked_child_neither_holds_nor_frees_the_claims_of_its_parent(
    disk: FeatureCache,
) -> None:
    """It is refused them while the parent lives; its exit frees nothing, its life keeps nothing."""
    script = """
        assert cache.claim(WORK, IMAGES).all()
        child = os.fork()
        if not child:
            refused = not cache.claim(WORK, IMAGES).any()
            say("refused" if refused else "granted")
            if sys.argv[2] == "exits":
                sys.exit()  # with all that a process does at its end
            time.sleep(60)
        if sys.argv[2] == "exits":
            os.waitpid(child, 0)
        say(child)
        time.sleep(60)
        """
    first = start(script, disk.path, "exits")
    assert first.stdout.readline() == "refused\n"
    first.stdout.readline()
    assert not disk.claim(WORK, IMAGES).any()
    kill(first)
    assert disk.claim(WORK, IMAGES).all()
    disk.release(WORK, IMAGES)
    second = start(script, disk.path, "lives")
    said = sorted([second.stdout.readline().strip(), second.stdout.readline().strip()])
    assert said[1] == "refused"
    second.kill()
    second.wait()
    try:
        assert disk.claim(WORK, IMAGES).all()
    finally:
        os.kill(int(said[0]), signal.SIGKILL)
        second.communicate()


def test_where_there_are_no_locks_there_are_no_claims_of_processes(
    disk: FeatureCache,
    owner: Callable[[Path], subprocess.Popen[str]],
    worker: Worker,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Work is done twice rather than not at all, while threads still share it."""
    owner(Path(disk.path))

    def refuse(lock: object, *args: object, **kwargs: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(_claims.FileLock, "acquire", refuse)
    assert worker(disk.claim, WORK, IMAGES).all()
    assert not disk.claim(WORK, IMAGES).any()
    put(disk, IMAGES, work=WORK)
    assert found_in(disk, IMAGES) == IMAGES


def test_what_dead_processes_left_is_removed(
    disk: FeatureCache, owner: Callable[[Path], subprocess.Popen[str]]
) -> None:
    """Their locks, owners, claims and half-made files go; those of the living stay."""
    folder = Path(disk.path, _store.LOCK_FOLDER)
    living = start("say(cache.claim(WORK, [b'living']).all()); sys.stdin.readline()", disk.path)
    assert living.stdout.readline() == "True\n"
    dead = owner(Path(disk.path))
    (lock,) = (path for path in folder.iterdir() if owner_of(disk, path.stem) == dead.pid)
    kill(dead)
    lock.with_suffix(".new").write_bytes(b"half made")
    lock.with_suffix(".new-wal").write_bytes(b"half made")
    disk.claim(b"other work", IMAGES)
    living_and_we = {living.pid, os.getpid()}
    assert {owner_of(disk, path.stem) for path in folder.iterdir()} == living_and_we
    query = "SELECT DISTINCT pid FROM claims JOIN owners ON owner = owners.id"
    assert {pid for (pid,) in ask(disk, query)} == living_and_we
    assert ask(disk, "SELECT count(*) FROM claims") == [(1 + len(IMAGES),)]
    finish(living)
    assert [owner_of(disk, path.stem) for path in folder.iterdir()] == [os.getpid()]


def test_a_file_is_made_whole_or_not_at_all(tmp_path: Path) -> None:
    """A maker that is killed half-way leaves nothing that stays."""
    script = """
        import sqlite3
        from deepfeat._cache import disk as _store
        _store.os.link = lambda *names: os.kill(os.getpid(), signal.SIGKILL)
        put(cache, IMAGES)
        """
    kill_itself = start(script, tmp_path)
    kill_itself.communicate()
    assert kill_itself.returncode == -signal.SIGKILL
    folder = tmp_path / _store.LOCK_FOLDER
    assert {path.suffix for path in folder.iterdir()} >= {".lock", ".new"}
    cache = FeatureCache(tmp_path)
    put(cache, IMAGES)
    assert found_in(cache, IMAGES) == IMAGES
    (lock,) = folder.iterdir()
    assert owner_of(cache, lock.stem) in (None, os.getpid())


def test_holders_are_named(
    disk: FeatureCache, owner: Callable[[Path], subprocess.Popen[str]], worker: Worker
) -> None:
    """Who waits is told which process and which thread it waits for."""
    assert disk.find_holders(WORK, IMAGES) == []
    process = owner(Path(disk.path))
    worker(disk.claim, WORK, [*IMAGES, b"more"])
    holders = disk.find_holders(WORK, [*IMAGES, b"more"])
    assert holders[0] == f"process {process.pid} on {platform.node()}"
    assert holders[1].startswith("thread 'ThreadPoolExecutor")
    assert holders[1].endswith("of this process")
    assert worker(disk.find_holders, WORK, [b"more"]) == []


def test_two_processes_are_never_granted_the_same(disk: FeatureCache) -> None:
    """Between them they are granted each image once, however they race."""
    script = """
        import random
        images = [b"%d" % i for i in range(600)]
        random.shuffle(images)
        sys.stdin.readline()
        for i in range(0, 600, 5):
            batch = images[i:i + 5]
            granted = cache.claim(WORK, batch)
            for image in np.array(batch)[granted]:
                say(image.decode())
        say("end")
        time.sleep(60)
        """
    processes = [start(script, disk.path) for _ in range(2)]
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    granted = []
    for process in processes:
        granted += list(iter(process.stdout.readline, "end\n"))
    for process in processes:
        kill(process)
    assert sorted(map(int, granted)) == list(range(600))


@pytest.fixture
def restless_threads() -> Iterator[None]:
    """Let threads take turns as often as can be."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("restless_threads")
def test_two_threads_are_never_granted_the_same(cache: FeatureCache) -> None:
    """Threads that claim the same images at the same moment are granted each image once."""
    images = [b"%d" % i for i in range(1_000)]
    together = threading.Barrier(4)

    def claim(_: int) -> np.ndarray:
        together.wait()
        granted = cache.claim(WORK, images)
        together.wait()  # all live until all have claimed
        return granted

    with ThreadPoolExecutor(4) as pool:
        assert_array_equal(np.sum(list(pool.map(claim, range(4))), axis=0), 1)


@pytest.mark.usefixtures("restless_threads")
def test_threads_share_the_work(cache: FeatureCache) -> None:
    """Four threads that claim, put and look again compute each image once and find all of them."""
    images = [b"%d" % i for i in range(200)]
    computed: list[bytes] = []
    together = threading.Barrier(4)

    def work(seed: int) -> list[bytes]:
        mine = random.Random(seed).sample(images, len(images))
        together.wait()
        for i in range(0, len(mine), 10):
            batch = mine[i : i + 10]
            granted = cache.claim(WORK, batch)
            todo = [image for image, is_mine in zip(batch, granted, strict=True) if is_mine]
            there = found_in(cache, todo)
            todo = [image for image in todo if image not in there]
            computed.extend(todo)
            put(cache, todo, work=WORK)
            cache.release(WORK, there)
        together.wait()
        return found_in(cache, images)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, range(4))) == [images] * 4
    assert sorted(computed) == sorted(images)


# Digests of files


def settled_stat(path: str = "a.png", inode: int = 7) -> FileStat:
    long_ago = time.time_ns() - 3 * 10**9
    return path, 10, long_ago, long_ago, inode, 1


@pytest.mark.parametrize("path", ["a.png", "ä.png", os.fsdecode(b"\xff.png")])
def test_a_digest_is_known_until_the_file_changes(cache: FeatureCache, path: str) -> None:
    """It is known under the same path, size, times, inode and device, and under no others."""
    path, *stamp = stat = settled_stat(path, inode=2**64 - 1)
    cache.remember_digests([stat, settled_stat("b.png")], [b"a's", b"b's"])
    changed = [("c.png", *stamp)]
    for i in range(len(stamp)):
        changed.append((path, *stamp[:i], stamp[i] - 1, *stamp[i + 1 :]))
    assert cache.known_digests([*changed, stat]) == [None] * 6 + [b"a's"]
    cache.remember_digests([changed[1]], [b"new"])
    assert cache.known_digests([stat, changed[1]]) == [None, b"new"]


@pytest.mark.parametrize("time_of", ["mtime", "ctime"])
@pytest.mark.parametrize("age", [0, 1.9, -60], ids=["now", "just now", "future"])
def test_a_fresh_file_is_not_trusted(cache: FeatureCache, age: float, time_of: str) -> None:
    """A file may change again within one time stamp, so a fresh one is not remembered."""
    now = time.time_ns()
    times = [now - int(age * 1e9), now - 10**10]
    fresh = ("a.png", 10, *(times if time_of == "mtime" else times[::-1]), 7, 1)
    cache.remember_digests([fresh], [b"digest"])
    assert cache.known_digests([fresh]) == [None]


def test_what_counts_is_when_the_stat_was_taken(cache: FeatureCache) -> None:
    """A file that was fresh when looked at is not trusted for being read slowly."""
    stat = settled_stat()
    cache.remember_digests([stat], [b"digest"], stat_time_ns=stat[2] + 10**9)
    assert cache.known_digests([stat]) == [None]
    cache.remember_digests([stat], [b"digest"], stat_time_ns=stat[2] + 3 * 10**9)
    assert cache.known_digests([stat]) == [b"digest"]


# Processes that share a disk


def test_a_killed_writer_loses_only_what_it_had_not_finished(disk: FeatureCache) -> None:
    """Each batch that was put is there, none is there in part, and the next run does the rest."""
    script = """
        for i in range(1_000):
            put(cache, [b"%d %d" % (i, j) for j in range(100)], 4_096, work=WORK)
            say(i)
        """
    for delay in 0.0, 0.004, 0.008:
        disk.clear()
        process = start(script, disk.path)
        for _ in range(3):
            last = int(process.stdout.readline())
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        last = max([last, *map(int, process.communicate()[0].split())])
        batches = [[b"%d %d" % (i, j) for j in range(100)] for i in range(last + 3)]
        there = [len(found_in(disk, batch)) for batch in batches]
        done = there.count(100)
        assert there == [100] * done + [0] * (len(batches) - done)
        assert done > last
        assert disk.info().rows == 100 * done
        left = [image for batch in batches for image in batch if not found_in(disk, [image])]
        assert disk.claim(WORK, left).all()
        put(disk, left, 4_096, work=WORK)
        assert all(found_in(disk, batch) == batch for batch in batches)


@pytest.mark.slow
def test_two_writers_killed_over_and_over_lose_nothing_that_was_put(disk: FeatureCache) -> None:
    """After each death the claims are free, all that was put is there, and no row is wrong."""
    script = """
        begin, n = int(sys.argv[2]), 0
        while True:
            batch = [b"%d" % i for i in range(begin + n, begin + n + 20)]
            granted = cache.claim(WORK, batch)
            put(cache, [image for image, ok in zip(batch, granted) if ok], 512, work=WORK)
            n += 20
            say(n if granted.all() else "refused")
        """
    random_delays = random.Random(0)
    begins = {0: 0, 10**9: 0}  # how many images each writer has put
    for _ in range(60):
        writers = {begin: start(script, disk.path, begin + done) for begin, done in begins.items()}
        for writer in writers.values():
            assert writer.stdout.readline() == "20\n"  # what the dead one had claimed is free
        time.sleep(random_delays.uniform(0, 0.05))
        for begin, writer in writers.items():
            writer.send_signal(signal.SIGKILL)
            begins[begin] += max([20, *map(int, writer.communicate()[0].split())])
    for begin, done in begins.items():
        for part in range(begin, begin + done, 1_000):
            images = [b"%d" % i for i in range(part, min(part + 1_000, begin + done))]
            assert found_in(disk, images) == images
    put(disk, [b"last"], 512, work=WORK)
    disk.claim(WORK, [b"last"])
    assert len(list(Path(disk.path, _store.LOCK_FOLDER).iterdir())) == 1
    assert ask(disk, "PRAGMA integrity_check") == [("ok",)]


def test_several_writers_begin_at_once(tmp_path: Path) -> None:
    """Processes that make one cache at the same moment make one, and lose no row."""
    script = """
        say("ready")
        for line in sys.stdin:
            folder, who = line.split()
            cache = FeatureCache(folder)
            for i in range(3):
                put(cache, [b"%s %d" % (who.encode(), i), b"all %d" % i], 500)
            say("done")
        """
    folders = [tmp_path / str(i) for i in range(25)]
    processes = {who: start(script, "unused") for who in "abc"}
    for process in processes.values():
        assert process.stdout.readline() == "ready\n"
    for folder in folders:
        for who, process in processes.items():
            process.stdin.write(f"{folder} {who}\n")
            process.stdin.flush()
        for process in processes.values():
            assert process.stdout.readline() == "done\n", process.communicate()
    for process in processes.values():
        process.communicate()
    images = [f"{who} {i}".encode() for who in [*processes, "all"] for i in range(3)]
    for folder in folders:
        cache = FeatureCache(folder)
        assert found_in(cache, images) == images
        assert cache.info().rows == len(images)


@pytest.fixture
def busy(disk: FeatureCache) -> Iterator[sqlite3.Connection]:
    """Another writer that is in the middle of a transaction."""
    put(disk, IMAGES[:1])
    connection = sqlite3.connect(
        database_of(disk), isolation_level=None, check_same_thread=False, timeout=0
    )
    connection.execute("BEGIN IMMEDIATE")
    yield connection
    connection.close()


def test_a_writer_waits_for_another(disk: FeatureCache, busy: sqlite3.Connection) -> None:
    """Readers go on meanwhile, and the row is put when the other is done."""
    timer = threading.Timer(0.3, busy.execute, ["COMMIT"])
    timer.start()
    assert found_in(disk, IMAGES) == IMAGES[:1]
    put(disk, IMAGES)
    timer.join()
    assert found_in(disk, IMAGES) == IMAGES


def test_a_writer_does_not_wait_for_ever(
    disk: FeatureCache, busy: sqlite3.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where another writer never ends, it is said once and the cache goes on without writing."""
    monkeypatch.setattr(_store, "BUSY_SECONDS", 0.05)
    disk = reopen(disk)
    with pytest.warns(RuntimeWarning, match=r"cannot be written \(database is locked\)") as told:
        put(disk, IMAGES)
    assert len(told) == 1
    assert told[0].filename == __file__
    busy.execute("COMMIT")
    put(disk, IMAGES)
    assert disk.claim(WORK, IMAGES).all()
    assert found_in(disk, IMAGES) == IMAGES[:1]


def test_a_fork_is_another_process(tmp_path: Path) -> None:
    """Parent and child, forked while a thread writes, both go on reading and writing."""
    script = """
        import warnings
        warnings.simplefilter("ignore", DeprecationWarning)  # to fork with threads is the point
        put(cache, IMAGES)
        memory = FeatureCache()
        put(memory, IMAGES)
        stop = threading.Event()
        def write():
            for i in range(10_000):
                put(cache, [b"thread %d" % i], 500)
                put(memory, [b"thread %d" % i], 500)
                if stop.is_set():
                    break
        thread = threading.Thread(target=write)
        thread.start()
        for i in range(20):
            time.sleep(0.005)
            child = os.fork()
            if not child:
                signal.alarm(20)  # a child that hangs must not outlive the test
                put(cache, [b"child %d" % i], 500)
                good = found_in(cache, IMAGES) == found_in(memory, IMAGES) == IMAGES
                os._exit(0 if good else 1)
            put(cache, [b"parent %d" % i], 500)
            status = os.waitpid(child, 0)[1]
            if status:
                break
        stop.set()
        thread.join()
        names = [b"%s %d" % (who, i) for who in (b"child", b"parent") for i in range(20)]
        say(status, found_in(cache, names) == names)
        """.replace("put(cache, IMAGES)", "put(cache, IMAGES, 500)").replace(
        "put(memory, IMAGES)", "put(memory, IMAGES, 500)"
    )
    process = start(script, tmp_path / "cache")
    try:
        assert finish(process) == "0 True\n"
    finally:
        process.kill()


def test_a_fork_takes_no_connection_along(disk: FeatureCache) -> None:
    """SQLite's connections do not survive a fork: they are closed before, and opened again."""
    script = """
        put(cache, IMAGES)
        before = cache._store.opened[0][0]
        child = os.fork()
        if not child:
            os._exit(len(cache._store.opened))
        say(os.waitpid(child, 0)[1])
        try:
            before.execute("SELECT 1")
        except Exception as error:
            say(error)
        say(found_in(cache, IMAGES) == IMAGES)
        """
    assert finish(start(script, disk.path)) == "0\nCannot operate on a closed database.\nTrue\n"


def test_a_fork_leaves_the_claims_in_memory_behind() -> None:
    """A child does not wait for rows that its parent will not bring to it."""
    script = """
        cache = FeatureCache()
        cache.claim(WORK, IMAGES)
        child = os.fork()
        if not child:
            os._exit(0 if cache.claim(WORK, IMAGES).all() else 1)
        say(os.waitpid(child, 0)[1])
        """
    assert finish(start(script, "unused")) == "0\n"


def test_a_deleted_cache_begins_anew(disk: FeatureCache) -> None:
    """Where the directory is removed while it is in use, the next row makes it again."""
    put(disk, IMAGES[:3])
    shutil.rmtree(disk.path)
    assert found_in(disk, IMAGES) == []
    put(disk, IMAGES[3:])
    assert found_in(reopen(disk), IMAGES) == IMAGES[3:]


# Faults of the disk


def flip(file: Path, position: int, bits: int = 4) -> None:
    with file.open("r+b") as stream:
        stream.seek(position)
        byte = stream.read(1)[0]
        stream.seek(position)
        stream.write(bytes([byte ^ bits]))


def test_a_flipped_byte_is_noticed(disk: FeatureCache) -> None:
    """The damaged row is said, dropped and put anew; the others are not touched."""
    put(disk, IMAGES)
    disk._store.close()
    row = rows_of(IMAGES[2:3]).tobytes()
    flip(database_of(disk), database_of(disk).read_bytes().index(row) + 9)
    with pytest.warns(RuntimeWarning, match=r"dropped 1 damaged rows") as told:
        assert found_in(disk, IMAGES) == [image for image in IMAGES if image != IMAGES[2]]
    assert len(told) == 1
    assert told[0].filename == __file__
    assert disk.info().rows == len(IMAGES) - 1
    put(disk, IMAGES)
    assert found_in(disk, IMAGES) == IMAGES


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE matrices SET data = substr(data, 5)",
        "UPDATE matrices SET data = data || data",
        "UPDATE matrices SET data = 'text'",
        "UPDATE matrices SET data = 7",
        "DELETE FROM matrices",
        "UPDATE keys SET checksum = checksum + 1",
        "UPDATE keys SET checksum = 'text'",
        "UPDATE keys SET block = 2",
        "UPDATE keys SET block = 'text'",
        "UPDATE keys SET block = x'00'",
        "UPDATE keys SET place = 5 - place",
        "UPDATE keys SET place = 0",
        "UPDATE keys SET place = -1",
        "UPDATE keys SET place = 1 << 62",
        "UPDATE keys SET place = 'text'",
        "UPDATE contexts SET width = 4",
        "UPDATE contexts SET width = 7",
        "UPDATE contexts SET width = 10",
    ],
)
def test_damaged_rows_are_not_returned(disk: FeatureCache, damage: str) -> None:
    """Rows that are cut, exchanged or gone are dropped, and can be put anew."""
    put(disk, IMAGES)
    change(disk, damage)
    with pytest.warns(RuntimeWarning, match="damaged rows"):
        assert len(found_in(disk, IMAGES)) < 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # what shared a row may be damaged now
        put(disk, IMAGES)
        found_in(disk, IMAGES)
    put(disk, IMAGES)
    assert found_in(disk, IMAGES) == IMAGES


def test_no_damage_shows_a_wrong_row(disk: FeatureCache) -> None:
    """Whichever byte is flipped, a row is right or missing, or damaged tables are refused."""
    images = [b"%032d" % i for i in range(40)]
    put(disk, images, 64)
    disk._store.close()
    query = "SELECT (SELECT page_size FROM pragma_page_size) * rootpage FROM sqlite_master"
    ((end_of_contexts,),) = ask(disk, f"{query} WHERE name = 'contexts'")
    whole = database_of(disk).read_bytes()
    used = [i for i, byte in enumerate(whole) if byte]
    for i, position in enumerate(random.Random(0).sample(used, 200)):
        database_of(disk).write_bytes(whole)
        flip(database_of(disk), position, (0x04, 0x80)[i % 2])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            try:
                found_in(reopen(disk), images)
            except CacheFormatError:
                assert position < end_of_contexts


def test_a_wrecked_file_is_said_once(disk: FeatureCache) -> None:
    """Where nothing can be read, all is missing; nothing is written over it."""
    put(disk, IMAGES)
    disk._store.close()
    file = database_of(disk)
    file.write_bytes(file.read_bytes()[:100] + b"wreck" * 9_000)
    with pytest.warns(RuntimeWarning, match="cannot be read"):
        assert found_in(disk, IMAGES) == []
    put(disk, IMAGES)
    assert found_in(disk, IMAGES) == []
    assert file.read_bytes()[100:] == b"wreck" * 9_000


FILL = """
import warnings
images = [b"%d" % i for i in range(1_000)]
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    for image in images:
        put(cache, [image], 1_000, work=WORK)
assert [warning.category for warning in told] == [RuntimeWarning], told
say(told[0].message)
there = found_in(cache, images)
assert there == images[:len(there)], there
assert 10 < len(there) < 900, len(there)
assert cache.claim(WORK, images).all()
say(len(there))
"""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a file system cannot be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_is_survived(small_disk: Path) -> None:
    """What fits is stored and found again, and one warning tells of the rest; room mends it."""
    told, n_rows = finish(start(FILL, small_disk)).splitlines()
    assert "cannot be written (database or disk is full)" in told
    images = [b"%d" % i for i in range(int(n_rows))]
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    cache = FeatureCache(small_disk)
    put(cache, [b"new"], 1_000)
    assert found_in(cache, [*images, b"new"]) == [*images, b"new"]
    assert cache.info().rows == len(images) + 1


def test_a_file_that_may_not_grow_is_survived(tmp_path: Path) -> None:
    """An error while writing stops the writing and nothing else; the rows before it stay."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2**21, 2**21))"
    told, n_rows = finish(start(limit + FILL, tmp_path / "cache")).splitlines()
    assert "cannot be written" in told
    images = [b"%d" % i for i in range(int(n_rows))]
    assert found_in(FeatureCache(tmp_path / "cache"), images) == images


def write_text(file: Path) -> None:
    file.write_text("Dear diary, " * 20, encoding="utf-8")


def write_short_text(file: Path) -> None:
    file.write_text("x", encoding="utf-8")


def write_other_database(file: Path) -> None:
    """Leave a database as a crash does: the newest rows in its log, for the next to open it."""
    script = f"""
        import sqlite3
        connection = sqlite3.connect({str(file)!r})
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("CREATE TABLE diary (page TEXT)")
        connection.execute("INSERT INTO diary VALUES ('Dear diary')")
        connection.commit()
        os.kill(os.getpid(), signal.SIGKILL)
        """
    start(script, "unused").communicate()
    assert file.with_name(f"{file.name}-wal").stat().st_size > 0


def write_other_format(file: Path, change: int) -> None:
    with sqlite3.connect(file) as connection:
        connection.execute(f"PRAGMA application_id = {_store.APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {_store.FORMAT + change}")
        connection.execute("CREATE TABLE novelties (page TEXT)")
    connection.close()


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (write_text, "is not a cache of deepfeat"),
        (write_short_text, "is not a cache of deepfeat"),
        (write_other_database, "is not a cache of deepfeat"),
        (
            functools.partial(write_other_format, change=1),
            f"has format {_store.FORMAT + 1}, .* another directory, or the deepfeat that wrote",
        ),
        (
            functools.partial(write_other_format, change=-1),
            f"has format {_store.FORMAT - 1}, .* Delete it, or choose another directory",
        ),
    ],
)
def test_a_foreign_file_is_refused_and_left_alone(
    tmp_path: Path, write: Callable[[Path], None], message: str
) -> None:
    """Whatever is asked of the cache, the error says what is wrong, and no byte changes."""
    file = tmp_path / FILE_NAME
    write(file)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    cache = FeatureCache(tmp_path)
    for ask in (
        lambda: found_in(cache, IMAGES),
        lambda: put(cache, IMAGES),
        lambda: cache.claim(WORK, IMAGES),
        lambda: cache.known_digests([settled_stat()]),
        cache.info,
        cache.clear,
        lambda: cache.prune(0),
    ):
        with pytest.raises(CacheFormatError, match=message):
            ask()
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


RECURSION = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n)"
HOSTILE = {
    "view for a table": f"""
        DROP TABLE contexts;
        CREATE VIEW contexts AS {RECURSION} SELECT i AS id, x'00' AS digest, 5 AS width, 1 AS held
        FROM n;
        """,
    "trigger": """
        CREATE TRIGGER slow AFTER INSERT ON keys BEGIN
            DELETE FROM files WHERE digest = (SELECT max(i) FROM (SELECT 1 AS i));
        END;
        """,
    "view beside the tables": f"CREATE VIEW more AS {RECURSION} SELECT i FROM n;",
    "other columns": "ALTER TABLE keys RENAME COLUMN place TO spot;",
    "generated column": "ALTER TABLE keys ADD COLUMN more AS (length(image));",
    "index on an expression": "CREATE INDEX more ON keys (length(image));",
    "table missing": "DROP TABLE claims;",
    "text for a width": "UPDATE contexts SET width = 'wide';",
    "no width": "UPDATE contexts SET width = 0;",
    "text for a count": "UPDATE contexts SET held = 'many';",
    "huge count": "UPDATE contexts SET held = 1 << 62;",
    "negative count": "UPDATE contexts SET held = -1;",
    "huge width": "UPDATE contexts SET width = 1 << 62;",
}


@pytest.mark.parametrize("change", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_hostile_file_is_refused(disk: FeatureCache, change: str) -> None:
    """Other tables than ours and numbers that cannot be are refused, with a remedy, and at once."""
    put(disk, IMAGES)
    disk._store.close()
    with contextlib.closing(sqlite3.connect(database_of(disk))) as connection:
        connection.executescript(change)
    cache = reopen(disk)
    for ask in lambda: found_in(cache, IMAGES), lambda: put(cache, [b"new"]), cache.info:
        with pytest.raises(CacheFormatError, match="Delete it, or choose another directory"):
            ask()


@pytest.mark.parametrize("token", ["../../outside", "a" * 31, "A" * 32, "", 7])
def test_no_name_of_a_lock_leads_elsewhere(disk: FeatureCache, token: object) -> None:
    """The folder of locks is left by no path, whatever the file says of who is alive."""
    outside = Path(disk.path).parent / "outside.lock"
    outside.touch()
    in_another_thread(disk.claim, WORK, IMAGES)
    change(disk, f"INSERT INTO owners VALUES (99, {token!r}, 'host', 1, {time.time()})")
    change(disk, "UPDATE claims SET owner = 99")
    with pytest.raises(CacheFormatError, match="names a process that cannot be"):
        disk.claim(WORK, IMAGES)
    assert outside.exists()


@pytest.mark.parametrize("image", ["7", "1.5", "'text'", "x''"])
def test_images_of_another_kind_are_not_taken_over(disk: FeatureCache, image: str) -> None:
    """`update` takes what are digests, and leaves the rest."""
    put(disk, IMAGES)
    change(disk, f"UPDATE keys SET image = {image} WHERE image = x'{IMAGES[0].hex()}'")
    other = FeatureCache()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of damaged rows
        other.update(disk)
    assert found_in(other, IMAGES) == IMAGES[1:]


def test_what_runs_for_ever_is_ended(disk: FeatureCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file may make SQLite walk in circles: a transaction has a bounded number of steps."""
    put(disk, [b"%d" % i for i in range(2_000)])
    monkeypatch.setattr(_store, "STEPS", (10_000, 1_000))
    cache = reopen(disk)
    assert found_in(cache, [b"1", b"2"]) == [b"1", b"2"]  # few steps are enough for few
    with pytest.raises(CacheFormatError, match="takes too long to read"):
        cache.update(cache)


@pytest.mark.parametrize("left", [0, 0.3, 0.9])
def test_a_file_cut_short_under_a_live_process_does_not_end_it(
    disk: FeatureCache, left: float
) -> None:
    """Rows that are gone are computed again, with a warning; none is wrong."""
    script = """
        import warnings
        images = [b"%d" % i for i in range(500)]
        put(cache, images, 1_000)
        # From the log into the file, whose size SQLite knows from the log all the same.
        cache._store.opened[0][0].execute("PRAGMA wal_checkpoint(PASSIVE)")
        assert found_in(cache, images[:100]) == images[:100]
        file = sys.argv[1] + "/deepfeat-cache.sqlite"
        os.truncate(file, int(os.path.getsize(file) * float(sys.argv[2])))
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            cache._store.opened[0][0].execute("PRAGMA cache_size = 0")  # forget what was read
            there = found_in(cache, images)
            put(cache, images, 1_000)
        say(len(there) < 500, len(told) > 0)
        """
    assert finish(start(script, disk.path, left)) == "True True\n"


def test_a_file_in_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    """The error tells that a directory is wanted."""
    (tmp_path / "file").write_text("Dear diary", encoding="utf-8")
    with pytest.raises(ValueError, match="is a file, and a cache wants a directory"):
        put(FeatureCache(tmp_path / "file"), IMAGES)
    assert (tmp_path / "file").read_text(encoding="utf-8") == "Dear diary"


# Root may write anywhere, so the reader becomes nobody. Python's own files may be closed to nobody,
# so all that is imported late must be imported before.
BECOME_NOBODY = """
import tempfile
with tempfile.TemporaryDirectory() as folder:
    put(FeatureCache(folder), IMAGES)
    found_in(FeatureCache(folder), IMAGES)
if os.getuid() == 0:
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
"""
READ = """
import warnings
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    there = found_in(cache, [*IMAGES, b"new"])
    assert cache.claim(WORK, IMAGES).all()
    for _ in range(2):
        put(cache, [b"new"], work=WORK)
        cache.release(WORK, IMAGES)
        cache.remember_digests([("a", 1, 2, 3, 4, 5)], [b"digest"])
    assert found_in(cache, [*IMAGES, b"new"]) == there
    assert cache.info().rows == len(there)
say(len(told), told[0].category.__name__, "|".join(map(bytes.decode, there)), told[0].message)
"""


def read_only(folder: Path) -> list[bytes]:
    """Read a cache as somebody who may not write; return the images found."""
    count, category, rest = finish(start(BECOME_NOBODY + READ, folder)).split(" ", 2)
    assert (count, category) == ("1", "RuntimeWarning")
    assert "cannot be written" in rest or "cannot be read" in rest
    return [image for image in [*IMAGES, b"new"] if image.decode() in rest]


@pytest.fixture
def locked() -> Iterator[Path]:
    """A directory of a cache with rows, in which nothing can be written but by root."""
    if not hasattr(os, "setuid"):
        pytest.skip("there are no other users to become")
    # Not `tmp_path`, which pytest closes to others.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "cache")
        Path(folder).chmod(0o755)
        if not all(parent.stat().st_mode & 0o001 for parent in path.parents):
            pytest.skip("others cannot come to the directory of temporary files")
        disk = FeatureCache(path)
        put(disk, IMAGES[:4])
        disk._store.close()
        path.chmod(0o555)
        database_of(disk).chmod(0o444)
        yield path
        path.chmod(0o755)


def test_a_read_only_directory_is_read(locked: Path) -> None:
    """Rows are found, all is granted, one warning says that nothing is stored, no file appears."""
    before = contents_of(FeatureCache(locked))
    assert read_only(locked) == IMAGES[:4]
    assert contents_of(FeatureCache(locked)) == before


only_root_writes_there = pytest.mark.skipif(
    not hasattr(os, "getuid") or os.getuid() != 0, reason="only root writes where others may not"
)


def start_writer(folder: Path) -> subprocess.Popen[str]:
    writer = start("put(cache, [b'new']); say('put'); time.sleep(60)", folder)
    assert writer.stdout.readline() == "put\n"
    return writer


@only_root_writes_there
@pytest.mark.parametrize("alive", [True, False], ids=["writing", "killed"])
def test_a_reader_sees_the_log_of_a_writer(locked: Path, alive: bool) -> None:
    """One who may only read finds also what a writer has put and not yet moved into the file."""
    writer = start_writer(locked)
    try:
        if not alive:
            kill(writer)
        assert read_only(locked) == [*IMAGES[:4], b"new"]
    finally:
        kill(writer)


@only_root_writes_there
def test_a_log_without_its_index_is_done_without(locked: Path) -> None:
    """Where the log of a killed writer cannot be read, the rows of the file still are."""
    kill(start_writer(locked))
    database_of(FeatureCache(locked)).with_name(f"{FILE_NAME}-shm").unlink()
    assert read_only(locked) == IMAGES[:4]


def test_a_directory_that_cannot_be_made_is_survived(locked: Path) -> None:
    """Where there is no cache and none can be made, all is missing and one warning says so."""
    assert read_only(locked / "cache") == []


def test_a_read_only_file_system_is_read(disk: FeatureCache, tmp_path: Path) -> None:
    """As a read-only directory, but for everybody."""
    put(disk, IMAGES[:4])
    disk._store.close()
    folder = tmp_path / "view"
    folder.mkdir()
    mount = ["mount", "--bind", disk.path, str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a file system cannot be mounted here")
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", str(folder)], check=True)
        count, _, rest = finish(start(READ, folder)).split(" ", 2)
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)
    assert count == "1"
    assert rest.startswith("|".join(map(bytes.decode, IMAGES[:4])) + " ")


# One model for all


class CacheMachine(RuleBasedStateMachine):
    """Whatever is done in whatever order, memory, disk and a plain dict hold the same rows."""

    folders: Iterator[Path]

    def __init__(self) -> None:
        super().__init__()
        self.caches = [FeatureCache(), FeatureCache(next(self.folders))]
        self.rows: dict[tuple[bytes, bytes], float] = {}
        self.widths = {CONTEXT: 2, OTHER: 3}

    contexts = st.sampled_from([CONTEXT, OTHER])
    images = st.lists(st.sampled_from([*IMAGES, b"", b"\0", b"\xff" * 32]), max_size=8)
    values = st.floats(width=32, allow_nan=False)

    @rule(contexts=st.sets(contexts), images=images, value=values)
    def put(self, contexts: set[bytes], images: list[bytes], value: float) -> None:
        rows = {
            context: np.full((len(images), self.widths[context]), value, np.float32)
            for context in contexts
        }
        for cache in self.caches:
            cache.put_many(images, rows)
        for context in contexts:
            for image in images:
                self.rows.setdefault((context, image), value)

    @rule(context=contexts, images=images)
    def get(self, context: bytes, images: list[bytes]) -> None:
        expected = [self.rows.get((context, image)) for image in images]
        for cache in self.caches:
            found, rows = cache.get_many(context, images)
            assert_array_equal(found, np.array([value is not None for value in expected], bool))
            assert_array_equal(cache.has(context, images), found)
            assert (rows is None) == (not found.any())
            if rows is not None:
                filled = [np.nan if value is None else value for value in expected]
                width = self.widths[context]
                assert_array_equal(rows, np.repeat(np.float32(filled)[:, None], width, axis=1))

    @rule()
    def clear(self) -> None:
        for cache in self.caches:
            cache.clear()
        self.rows.clear()

    @rule(context=contexts)
    def refuse(self, context: bytes) -> None:
        if any(context == held for held, _ in self.rows):
            for cache in self.caches:
                with pytest.raises(ValueError, match="holds rows of"):
                    cache.put_many([b"wide"], {context: np.ones((1, 9), np.float32)})

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def prune(self, data: st.DataObject) -> None:
        # Neither store was read since its rows were put, in the order of the dict.
        bound = data.draw(st.sampled_from([0, self.size() // 2, self.size(), 10**9]))
        self.caches = [restart(cache, self.rows, self.widths) for cache in self.caches]
        while self.size() > bound:
            del self.rows[next(iter(self.rows))]
        for cache in self.caches:
            cache.prune(bound)

    @rule()
    def reopen(self) -> None:
        self.caches[1] = reopen(self.caches[1])

    def size(self) -> int:
        return sum(4 * self.widths[context] for context, _ in self.rows)

    @invariant()
    def counts_agree(self) -> None:
        contexts = {context for context, _ in self.rows}
        for cache in self.caches:
            info = cache.info()
            assert (info.rows, info.bytes) == (len(self.rows), self.size())
            assert info.contexts == len(contexts)


def restart(
    cache: FeatureCache, rows: dict[tuple[bytes, bytes], float], widths: dict[bytes, int]
) -> FeatureCache:
    """Fill a cache anew, so that its rows were used in the order of the dict."""
    cache.clear()
    for (context, image), value in rows.items():
        cache.put_many([image], {context: np.full((1, widths[context]), value, np.float32)})
    return cache


def test_memory_disk_and_dict_agree(tmp_path: Path) -> None:
    """Whatever is done in whatever order, memory, disk and a plain dict hold the same rows."""
    from hypothesis.stateful import run_state_machine_as_test

    CacheMachine.folders = (tmp_path / str(i) for i in range(10**9))
    run_state_machine_as_test(
        CacheMachine,
        settings=settings(
            max_examples=25,
            stateful_step_count=20,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_a_directory_may_be_called_as_a_home_that_is_not_there(tmp_path, monkeypatch):
    """A tilde stands for a home only where there is that home, and at the beginning."""
    monkeypatch.chdir(tmp_path)
    for path in ("~nobody-of-this-name", os.path.join(".", "~")):
        assert FeatureCache(path).path == os.path.realpath(tmp_path / path)
    assert FeatureCache(os.path.join("~", "rows")).path == os.path.realpath(
        os.path.expanduser("~/rows")
    )
