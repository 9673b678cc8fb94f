"""Claims of threads and processes on images, and what becomes of them when an owner dies."""

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

from deepfeat._cache import disk as disk_module
from deepfeat._cache import owners
from deepfeat._cache.cache import FeatureCache

JOB = b"job"
IMAGES = [f"image {i}".encode() for i in range(6)]


@pytest.fixture
def owner(tmp_path, start, kill):
    """Start processes that claim all images and stay alive until the end of the test."""
    processes: list[subprocess.Popen[str]] = []

    def start_owner(folder):
        process = start("say(cache.claim(JOB, IMAGES).all()); time.sleep(60)", folder)
        processes.append(process)
        assert process.stdout.readline() == "True\n"
        return process

    yield start_owner
    for process in processes:
        kill(process)


@pytest.fixture
def owner_of(ask):
    """Return the id of the process that holds a lock."""
    return lambda cache, token: dict(ask(cache, "SELECT token, pid FROM owners")).get(token)


def in_another_thread(function, *args):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *args).result()


def test_a_claim_excludes_others(cache, worker):
    """Within a job, a claimed image is refused to other threads, but not to its owner."""
    assert_array_equal(worker(cache.claim, JOB, IMAGES[:2]), [True, True])
    assert_array_equal(cache.claim(JOB, IMAGES[:3]), [False, False, True])
    assert_array_equal(worker(cache.claim, JOB, IMAGES[:3]), [True, True, False])
    assert_array_equal(cache.claim(b"other job", IMAGES[:2]), [True, True])


def test_a_claim_ends_with_its_row(cache, worker, put):
    """`put_many` releases the images that it stores, for the given job."""
    worker(cache.claim, JOB, IMAGES)
    worker(put, cache, IMAGES[:1])
    assert not cache.claim(JOB, IMAGES).any()
    worker(lambda: put(cache, IMAGES[:2], job=JOB))
    assert_array_equal(cache.claim(JOB, IMAGES[:3]), [True, True, False])


def test_a_claim_is_released_by_its_owner_only(cache, worker, put):
    """`release` ends the claims of this thread; neither it nor `put_many` ends those of others."""
    worker(cache.claim, JOB, IMAGES)
    cache.release(JOB, IMAGES)
    put(cache, IMAGES, job=JOB)
    assert not cache.claim(JOB, IMAGES).any()
    worker(cache.release, JOB, IMAGES[:1])
    assert_array_equal(cache.claim(JOB, IMAGES[:2]), [True, False])


def test_the_claims_of_a_dead_thread_end(cache):
    """A thread that has ended without storing its rows excludes nobody."""
    in_another_thread(cache.claim, JOB, IMAGES)
    end = time.monotonic() + 10
    # A result is there a moment before its thread has ended.
    while not cache.claim(JOB, IMAGES).all():
        assert time.monotonic() < end


@pytest.fixture
def wait(monkeypatch):
    """Advance the clock of claims."""
    clock = [time.time()]
    monkeypatch.setattr(time, "time", lambda: clock[0])

    def move(seconds):
        clock[0] += seconds

    return move


def test_an_owner_without_progress_loses_its_claims(cache, worker, wait):
    """Others wait for an owner without progress for a few minutes, and no longer."""
    worker(cache.claim, JOB, IMAGES)
    wait(owners.PATIENCE_SECONDS - 1)
    assert not cache.claim(JOB, IMAGES).any()
    wait(2)
    assert cache.claim(JOB, IMAGES).all()
    assert not worker(cache.claim, JOB, IMAGES).any()


@pytest.mark.parametrize("progress", ["claim", "put", "release"])
def test_progress_keeps_claims(cache, worker, wait, progress, put):
    """An owner that keeps claiming, storing or releasing keeps all its claims."""
    make_progress = {
        "claim": lambda: cache.claim(JOB, [b"next"]),
        "put": lambda: put(cache, [b"next"], job=JOB),
        "release": lambda: cache.release(JOB, [b"next"]),
    }[progress]
    worker(cache.claim, JOB, IMAGES)
    for _ in range(3):
        wait(owners.PATIENCE_SECONDS - 1)
        worker(make_progress)
    assert not cache.claim(JOB, IMAGES).any()


@pytest.mark.parametrize("trace", ["none", "zombie"])
def test_the_claims_of_a_killed_process_are_taken_over_at_once(disk, owner, trace):
    """A live process keeps its claims; a killed one loses them, even as a zombie."""
    process = owner(Path(disk.path))
    assert not disk.claim(JOB, IMAGES).any()
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | (os.WNOWAIT if trace == "zombie" else 0))
    assert disk.claim(JOB, IMAGES).all()


def test_a_process_killed_in_another_pid_namespace_is_recognised_as_dead(disk, start, kill):
    """As in a container, whose process ids mean nothing outside."""
    unshare = ["unshare", "--pid", "--fork", "--kill-child"]
    if (
        shutil.which("unshare") is None
        or subprocess.run([*unshare, "true"], capture_output=True).returncode
    ):
        pytest.skip("no pid namespace can be made here")
    script = "say(os.getpid(), cache.claim(JOB, IMAGES).all()); time.sleep(60)"
    process = start(script, disk.path, prefix=unshare)
    try:
        assert process.stdout.readline() == "1 True\n"
        assert not disk.claim(JOB, IMAGES).any()
    finally:
        kill(process)
    end = time.monotonic() + 10
    while not disk.claim(JOB, IMAGES).all():  # the child dies a moment after its parent
        assert time.monotonic() < end


def test_a_stopped_process_keeps_its_claims_for_some_minutes(disk, owner, wait):
    """A process that hangs, but lives, loses its claims after that time."""
    owner(Path(disk.path)).send_signal(signal.SIGSTOP)
    wait(owners.PATIENCE_SECONDS - 60)
    assert not disk.claim(JOB, IMAGES).any()
    wait(61)
    assert disk.claim(JOB, IMAGES).all()


def test_a_forked_child_neither_holds_nor_releases_the_claims_of_its_parent(disk, start, kill):
    """It is refused them while the parent lives; its exit releases none, its life keeps none."""
    script = """
        assert cache.claim(JOB, IMAGES).all()
        child = os.fork()
        if not child:
            refused = not cache.claim(JOB, IMAGES).any()
            say("refused" if refused else "granted")
            if sys.argv[2] == "exits":
                sys.exit()  # and run everything that runs at exit
            time.sleep(60)
        if sys.argv[2] == "exits":
            os.waitpid(child, 0)
        say(child)
        time.sleep(60)
        """
    first = start(script, disk.path, "exits")
    assert first.stdout.readline() == "refused\n"
    first.stdout.readline()
    assert not disk.claim(JOB, IMAGES).any()
    kill(first)
    assert disk.claim(JOB, IMAGES).all()
    disk.release(JOB, IMAGES)
    second = start(script, disk.path, "lives")
    child, answer = sorted(second.stdout.readline().strip() for _ in range(2))
    assert answer == "refused"
    second.kill()
    second.wait()
    try:
        assert disk.claim(JOB, IMAGES).all()
    finally:
        os.kill(int(child), signal.SIGKILL)
        second.communicate()


def test_without_locks_processes_do_not_exclude_each_other(
    disk, owner, worker, monkeypatch, put, found_in
):
    """Images are computed twice rather than never, while threads still share them."""
    owner(Path(disk.path))

    def refuse(lock, *args, **kwargs):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(owners.FileLock, "acquire", refuse)
    assert worker(disk.claim, JOB, IMAGES).all()
    assert not disk.claim(JOB, IMAGES).any()
    put(disk, IMAGES, job=JOB)
    assert found_in(disk, IMAGES) == IMAGES


def test_files_and_claims_of_dead_processes_are_removed(
    disk, owner, start, kill, finish, ask, owner_of
):
    """Their locks, owners, claims and half-written files go; those of live processes stay."""
    folder = Path(disk.path, disk_module.LOCK_FOLDER)
    living = start("say(cache.claim(JOB, [b'living']).all()); sys.stdin.readline()", disk.path)
    assert living.stdout.readline() == "True\n"
    dead = owner(Path(disk.path))
    (lock,) = (path for path in folder.iterdir() if owner_of(disk, path.stem) == dead.pid)
    kill(dead)
    lock.with_suffix(".new").write_bytes(b"half-written")
    lock.with_suffix(".new-wal").write_bytes(b"half-written")
    disk.claim(b"other job", IMAGES)
    alive = {living.pid, os.getpid()}
    assert {owner_of(disk, path.stem) for path in folder.iterdir()} == alive
    query = "SELECT DISTINCT pid FROM claims JOIN owners ON owner = owners.id"
    assert {pid for (pid,) in ask(disk, query)} == alive
    assert ask(disk, "SELECT count(*) FROM claims") == [(1 + len(IMAGES),)]
    finish(living)
    assert [owner_of(disk, path.stem) for path in folder.iterdir()] == [os.getpid()]


def test_a_file_is_created_whole_or_not_at_all(tmp_path, start, put, found_in, owner_of):
    """Whatever is left by a process killed on the way is removed."""
    script = """
        import sqlite3
        from deepfeat._cache import disk as disk_module
        disk_module.os.link = lambda *names: os.kill(os.getpid(), signal.SIGKILL)
        put(cache, IMAGES)
        """
    kill_itself = start(script, tmp_path)
    kill_itself.communicate()
    assert kill_itself.returncode == -signal.SIGKILL
    folder = tmp_path / disk_module.LOCK_FOLDER
    assert {path.suffix for path in folder.iterdir()} >= {".lock", ".new"}
    cache = FeatureCache(tmp_path)
    put(cache, IMAGES)
    assert found_in(cache, IMAGES) == IMAGES
    (lock,) = folder.iterdir()
    assert owner_of(cache, lock.stem) in (None, os.getpid())


def test_holders_are_named(disk, owner, worker):
    """The processes and threads that hold images are described, except for this thread."""
    assert disk.find_holders(JOB, IMAGES) == []
    process = owner(Path(disk.path))
    worker(disk.claim, JOB, [*IMAGES, b"more"])
    holders = disk.find_holders(JOB, [*IMAGES, b"more"])
    assert holders[0] == f"process {process.pid} on {platform.node()}"
    assert holders[1].startswith("thread 'ThreadPoolExecutor")
    assert holders[1].endswith("of this process")
    assert worker(disk.find_holders, JOB, [b"more"]) == []


def test_two_processes_are_never_granted_the_same_image(disk, start, kill):
    """However they race, each image is granted to one of them."""
    script = """
        import random
        images = [b"%d" % i for i in range(600)]
        random.shuffle(images)
        sys.stdin.readline()
        for i in range(0, 600, 5):
            batch = images[i:i + 5]
            granted = cache.claim(JOB, batch)
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
    """Make threads switch as often as possible."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


@pytest.mark.usefixtures("restless_threads")
def test_threads_are_never_granted_the_same_image(cache):
    """Of threads that claim an image at the same moment, one is granted it."""
    images = [b"%d" % i for i in range(1_000)]
    together = threading.Barrier(4)

    def claim(_):
        together.wait()
        granted = cache.claim(JOB, images)
        together.wait()  # stay alive until all have claimed
        return granted

    with ThreadPoolExecutor(4) as pool:
        assert_array_equal(np.sum(list(pool.map(claim, range(4))), axis=0), 1)


@pytest.mark.usefixtures("restless_threads")
def test_threads_share_a_job(cache, found_in, put):
    """Four threads that claim, look again and store compute each image once, and find all."""
    images = [b"%d" % i for i in range(200)]
    computed: list[bytes] = []
    together = threading.Barrier(4)

    def run(seed):
        mine = random.Random(seed).sample(images, len(images))
        together.wait()
        for i in range(0, len(mine), 10):
            batch = mine[i : i + 10]
            granted = cache.claim(JOB, batch)
            todo = [image for image, is_mine in zip(batch, granted, strict=True) if is_mine]
            there = found_in(cache, todo)
            todo = [image for image in todo if image not in there]
            computed.extend(todo)
            put(cache, todo, job=JOB)
            cache.release(JOB, there)
        together.wait()
        return found_in(cache, images)

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(run, range(4))) == [images] * 4
    assert sorted(computed) == sorted(images)
