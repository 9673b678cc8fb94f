"""Claims: which thread and which process computes what, and what happens when it dies."""

import errno
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from deepfeat._cache import disk as _store
from deepfeat._cache import owners as _claims
from deepfeat._cache.cache import FeatureCache

WORK = b"work"
IMAGES = [f"image {i}".encode() for i in range(6)]


@pytest.fixture
def owner(tmp_path, start, kill):
    """Start processes that claim all images and live on; end them after the test."""
    processes: list[subprocess.Popen[str]] = []

    def start_owner(folder):
        process = start("say(cache.claim(WORK, IMAGES).all()); time.sleep(60)", folder)
        processes.append(process)
        assert process.stdout.readline() == "True\n"
        return process

    yield start_owner
    for process in processes:
        kill(process)


@pytest.fixture
def owner_of(ask):
    """Return the number of the process that has a lock."""
    return lambda cache, token: dict(ask(cache, "SELECT token, pid FROM owners")).get(token)


def in_another_thread(function, *args):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *args).result()


def test_a_claim_binds_others(cache, worker):
    """What one thread claimed no other gets, in this work; the thread itself gets it again."""
    assert_array_equal(worker(cache.claim, WORK, IMAGES[:2]), [True, True])
    assert_array_equal(cache.claim(WORK, IMAGES[:3]), [False, False, True])
    assert_array_equal(worker(cache.claim, WORK, IMAGES[:3]), [True, True, False])
    assert_array_equal(cache.claim(b"other work", IMAGES[:2]), [True, True])


def test_a_claim_ends_with_its_row(cache, worker, put):
    """`put_many` gives back the images that it stores, of the work that it names."""
    worker(cache.claim, WORK, IMAGES)
    worker(put, cache, IMAGES[:1])
    assert not cache.claim(WORK, IMAGES).any()
    worker(lambda: put(cache, IMAGES[:2], work=WORK))
    assert_array_equal(cache.claim(WORK, IMAGES[:3]), [True, True, False])


def test_a_claim_is_given_back_by_its_owner(cache, worker, put):
    """`release` frees the thread's own claims, and neither it nor `put_many` those of others."""
    worker(cache.claim, WORK, IMAGES)
    cache.release(WORK, IMAGES)
    put(cache, IMAGES, work=WORK)
    assert not cache.claim(WORK, IMAGES).any()
    worker(cache.release, WORK, IMAGES[:1])
    assert_array_equal(cache.claim(WORK, IMAGES[:2]), [True, False])


def test_the_claims_of_a_dead_thread_are_free(cache):
    """A thread that ended without its rows binds nobody."""
    in_another_thread(cache.claim, WORK, IMAGES)
    end = time.monotonic() + 10
    # Python is done with a thread a moment before the kernel is.
    while not cache.claim(WORK, IMAGES).all():
        assert time.monotonic() < end


@pytest.fixture
def wait(monkeypatch):
    """Put the clock of claims forward."""
    clock = [time.time()]
    monkeypatch.setattr(time, "time", lambda: clock[0])

    def move(seconds):
        clock[0] += seconds

    return move


def test_an_owner_without_progress_loses_its_claims(cache, worker, wait):
    """A live owner that makes no progress is waited for some minutes, and no longer."""
    worker(cache.claim, WORK, IMAGES)
    wait(_claims.PATIENCE_SECONDS - 1)
    assert not cache.claim(WORK, IMAGES).any()
    wait(2)
    assert cache.claim(WORK, IMAGES).all()
    assert not worker(cache.claim, WORK, IMAGES).any()


@pytest.mark.parametrize("sign", ["claim", "put", "release"])
def test_progress_keeps_claims(cache, worker, wait, sign, put):
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
def test_the_claims_of_a_killed_process_are_taken_over_at_once(disk, owner, trace):
    """A live process keeps its claims; killed, it loses them, its body still there or not."""
    process = owner(Path(disk.path))
    assert not disk.claim(WORK, IMAGES).any()
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | (os.WNOWAIT if trace == "zombie" else 0))
    assert disk.claim(WORK, IMAGES).all()


def test_a_process_killed_in_another_pid_namespace_is_seen_to_be_dead(disk, start, kill):
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
    disk,
    owner,
    wait,
):
    """One that hangs, but lives, keeps its claims for so long, and loses them then."""
    owner(Path(disk.path)).send_signal(signal.SIGSTOP)
    wait(_claims.PATIENCE_SECONDS - 60)
    assert not disk.claim(WORK, IMAGES).any()
    wait(61)
    assert disk.claim(WORK, IMAGES).all()


def test_a_forked_child_neither_holds_nor_frees_the_claims_of_its_parent(
    disk,
    start,
    kill,
):
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
    disk,
    owner,
    worker,
    monkeypatch,
    put,
    found_in,
):
    """Work is done twice rather than not at all, while threads still share it."""
    owner(Path(disk.path))

    def refuse(lock, *args, **kwargs):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(_claims.FileLock, "acquire", refuse)
    assert worker(disk.claim, WORK, IMAGES).all()
    assert not disk.claim(WORK, IMAGES).any()
    put(disk, IMAGES, work=WORK)
    assert found_in(disk, IMAGES) == IMAGES


def test_what_dead_processes_left_is_removed(disk, owner, start, kill, finish, ask, owner_of):
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


def test_a_file_is_made_whole_or_not_at_all(tmp_path, start, put, found_in, owner_of):
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


def test_holders_are_named(disk, owner, worker):
    """Who waits is told which process and which thread it waits for."""
    assert disk.find_holders(WORK, IMAGES) == []
    process = owner(Path(disk.path))
    worker(disk.claim, WORK, [*IMAGES, b"more"])
    holders = disk.find_holders(WORK, [*IMAGES, b"more"])
    assert holders[0] == f"process {process.pid} on {platform.node()}"
    assert holders[1].startswith("thread 'ThreadPoolExecutor")
    assert holders[1].endswith("of this process")
    assert worker(disk.find_holders, WORK, [b"more"]) == []


def test_two_processes_are_never_granted_the_same(disk, start, kill):
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
def restless_threads():
    """Let threads take turns as often as can be."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("restless_threads")
def test_two_threads_are_never_granted_the_same(cache):
    """Threads that claim the same images at the same moment are granted each image once."""
    images = [b"%d" % i for i in range(1_000)]
    together = threading.Barrier(4)

    def claim(_):
        together.wait()
        granted = cache.claim(WORK, images)
        together.wait()  # all live until all have claimed
        return granted

    with ThreadPoolExecutor(4) as pool:
        assert_array_equal(np.sum(list(pool.map(claim, range(4))), axis=0), 1)


@pytest.mark.usefixtures("restless_threads")
def test_threads_share_the_work(cache, found_in, put):
    """Four threads that claim, put and look again compute each image once and find all of them."""
    images = [b"%d" % i for i in range(200)]
    computed: list[bytes] = []
    together = threading.Barrier(4)

    def work(seed):
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
