"""Stores on disk: rows are whole or missing, whatever happens to the file and its processes."""

import contextlib
import functools
import os
import pickle
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
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from numpy.testing import assert_array_equal

from deepfeat._cache import cache as cache_module
from deepfeat._cache import disk as disk_module
from deepfeat._cache.cache import FeatureCache
from deepfeat._cache.disk import FILE_NAME, CacheFormatError

JOB = b"job"
NAMESPACE, OTHER = b"namespace", b"other namespace"
IMAGES = [f"image {i}".encode() for i in range(6)]


def reopen(cache):
    """Close the file and open it again, as a new process would."""
    path = cache.path
    cache._store.close()
    cache_module._stores.pop(cache._token, None)
    return FeatureCache(path)


def database_of(cache):
    return Path(cache.path, FILE_NAME)


def contents_of(cache):
    """Return the content of each file except the index of the log, which readers write, too."""
    files = [path for path in Path(cache.path).rglob("*") if path.is_file()]
    return {path: path.read_bytes() for path in files if "shm" not in path.name}


def change(cache, statement):
    """Change the database behind the cache's back."""
    with contextlib.closing(sqlite3.connect(database_of(cache))) as connection, connection:
        connection.execute(statement)


def test_a_pruned_file_shrinks(disk, put, found_in):
    """The space of dropped rows is returned to the disk."""
    images = [b"%d" % i for i in range(200)]
    put(disk, images, 10_000)
    disk.prune(10 * 40_000)
    assert found_in(disk, images) == images[-10:]
    assert sum(map(len, contents_of(disk).values())) < 1_000_000


def test_nothing_is_written_before_the_first_row(tmp_path, found_in):
    """Creating, copying and querying a cache leaves the disk as it was."""
    cache = pickle.loads(pickle.dumps(FeatureCache(tmp_path / "cache")))
    assert found_in(cache, IMAGES) == []
    assert cache.known_digests([("a", 1, 2, 3, 4, 5)]) == [None]
    assert cache.info().rows == 0
    assert not (tmp_path / "cache").exists()


def test_reading_writes_nothing(disk, put, found_in):
    """Looking up rows in a cache without a limit changes no byte of its files."""
    put(disk, IMAGES)
    before = contents_of(disk)
    assert found_in(disk, IMAGES) == IMAGES
    assert contents_of(disk) == before


def test_rows_outlive_their_process(disk, finish, start, found_in):
    """A process finds the rows that an earlier one stored."""
    finish(start("put(cache, IMAGES)", disk.path))
    assert found_in(disk, IMAGES) == IMAGES


def in_another_thread(function, *args):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function, *args).result()


def test_a_killed_writer_loses_only_unfinished_batches(disk, start, put, found_in):
    """Each finished batch is there, none is there in part, and the next run does the rest."""
    script = """
        for i in range(1_000):
            put(cache, [b"%d %d" % (i, j) for j in range(100)], 4_096, job=JOB)
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
        assert disk.claim(JOB, left).all()
        put(disk, left, 4_096, job=JOB)
        assert all(found_in(disk, batch) == batch for batch in batches)


@pytest.mark.slow
def test_two_writers_killed_repeatedly_lose_no_stored_row(disk, put, ask, start, found_in):
    """After each death, claims are free, all stored rows are there, and no row is wrong."""
    script = """
        begin, n = int(sys.argv[2]), 0
        while True:
            batch = [b"%d" % i for i in range(begin + n, begin + n + 20)]
            granted = cache.claim(JOB, batch)
            put(cache, [image for image, ok in zip(batch, granted) if ok], 512, job=JOB)
            n += 20
            say(n if granted.all() else "refused")
        """
    random_delays = random.Random(0)
    begins = {0: 0, 10**9: 0}  # number of images that each writer has stored
    for _ in range(60):
        writers = {begin: start(script, disk.path, begin + done) for begin, done in begins.items()}
        for writer in writers.values():
            assert writer.stdout.readline() == "20\n"  # the claims of the dead one are free
        time.sleep(random_delays.uniform(0, 0.05))
        for begin, writer in writers.items():
            writer.send_signal(signal.SIGKILL)
            begins[begin] += max([20, *map(int, writer.communicate()[0].split())])
    for begin, done in begins.items():
        for part in range(begin, begin + done, 1_000):
            images = [b"%d" % i for i in range(part, min(part + 1_000, begin + done))]
            assert found_in(disk, images) == images
    put(disk, [b"last"], 512, job=JOB)
    disk.claim(JOB, [b"last"])
    assert len(list(Path(disk.path, disk_module.LOCK_FOLDER).iterdir())) == 1
    assert ask(disk, "PRAGMA integrity_check") == [("ok",)]


def test_several_writers_start_at_once(tmp_path, start, found_in):
    """Processes that create a cache at the same moment share it, and lose no row."""
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
def busy(disk, put):
    """Another writer, in the middle of a transaction."""
    put(disk, IMAGES[:1])
    connection = sqlite3.connect(
        database_of(disk), isolation_level=None, check_same_thread=False, timeout=0
    )
    connection.execute("BEGIN IMMEDIATE")
    yield connection
    connection.close()


def test_a_writer_waits_for_another(disk, busy, put, found_in):
    """Reading goes on meanwhile, and rows are stored once the other writer is done."""
    timer = threading.Timer(0.3, busy.execute, ["COMMIT"])
    timer.start()
    assert found_in(disk, IMAGES) == IMAGES[:1]
    put(disk, IMAGES)
    timer.join()
    assert found_in(disk, IMAGES) == IMAGES


def test_a_writer_does_not_wait_for_ever(disk, busy, monkeypatch, put, found_in):
    """If another writer never finishes, one warning is issued and the cache is only read."""
    monkeypatch.setattr(disk_module, "BUSY_SECONDS", 0.05)
    disk = reopen(disk)
    with pytest.warns(RuntimeWarning, match=r"cannot be written \(database is locked\)") as warned:
        put(disk, IMAGES)
    assert len(warned) == 1
    assert warned[0].filename == put.__code__.co_filename
    busy.execute("COMMIT")
    put(disk, IMAGES)
    assert disk.claim(JOB, IMAGES).all()
    assert found_in(disk, IMAGES) == IMAGES[:1]


def test_parent_and_child_of_a_fork_share_a_cache(tmp_path, start, finish):
    """Forked while a thread writes, both keep reading and writing."""
    script = """
        import warnings
        warnings.simplefilter("ignore", DeprecationWarning)  # forking with threads is the point
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


def test_a_fork_inherits_no_connection(disk, finish, start):
    """SQLite's connections do not survive a fork: they are closed before it and reopened."""
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


def test_a_deleted_cache_starts_anew(disk, put, found_in):
    """If the directory is removed while in use, the next write creates it again."""
    put(disk, IMAGES[:3])
    shutil.rmtree(disk.path)
    assert found_in(disk, IMAGES) == []
    put(disk, IMAGES[3:])
    assert found_in(reopen(disk), IMAGES) == IMAGES[3:]


def flip(file, position, bits=4):
    with file.open("r+b") as stream:
        stream.seek(position)
        byte = stream.read(1)[0]
        stream.seek(position)
        stream.write(bytes([byte ^ bits]))


def test_a_flipped_bit_is_detected(disk, put, found_in, rows_of):
    """A warning is issued and the damaged row dropped; it can be stored again."""
    put(disk, IMAGES)
    disk._store.close()
    row = rows_of(IMAGES[2:3]).tobytes()
    flip(database_of(disk), database_of(disk).read_bytes().index(row) + 9)
    with pytest.warns(
        RuntimeWarning, match=r"^Dropped 1 damaged row\(s\) \(wrong checksum\)"
    ) as warned:
        assert found_in(disk, IMAGES) == [image for image in IMAGES if image != IMAGES[2]]
    assert len(warned) == 1
    assert warned[0].filename == found_in.__code__.co_filename
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
def test_damaged_rows_are_not_returned(disk, damage, put, found_in):
    """Rows that are cut, swapped or gone are dropped, and can be stored again."""
    put(disk, IMAGES)
    change(disk, damage)
    with pytest.warns(RuntimeWarning, match=r"damaged row\(s\)"):
        assert len(found_in(disk, IMAGES)) < 2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of rows in the same blocks
        put(disk, IMAGES)
        found_in(disk, IMAGES)
    put(disk, IMAGES)
    assert found_in(disk, IMAGES) == IMAGES


def test_damage_never_returns_a_wrong_row(disk, put, ask, found_in):
    """Whichever bit is flipped, rows are right or missing, or the damaged tables are refused."""
    images = [b"%032d" % i for i in range(40)]
    put(disk, images, 64)
    disk._store.close()
    query = "SELECT (SELECT page_size FROM pragma_page_size) * rootpage FROM sqlite_master"
    ((end_of_namespaces,),) = ask(disk, f"{query} WHERE name = 'contexts'")
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
                assert position < end_of_namespaces


def test_a_wrecked_file_is_left_alone(disk, put, found_in):
    """If nothing can be read, all rows are missing, and nothing is overwritten."""
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
with warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter("always")
    for image in images:
        put(cache, [image], 1_000, job=JOB)
assert [warning.category for warning in warned] == [RuntimeWarning], warned
say(warned[0].message)
there = found_in(cache, images)
assert there == images[:len(there)], there
assert 10 < len(there) < 900, len(there)
assert cache.claim(JOB, images).all()
say(len(there))
"""


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a file system cannot be mounted here")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_full_disk_ends_writing_only(small_disk, put, found_in, finish, start):
    """The rows that fit are found again, one warning is issued, and new space is used."""
    message, n_rows = finish(start(FILL, small_disk)).splitlines()
    assert "cannot be written (database or disk is full)" in message
    images = [b"%d" % i for i in range(int(n_rows))]
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    cache = FeatureCache(small_disk)
    put(cache, [b"new"], 1_000)
    assert found_in(cache, [*images, b"new"]) == [*images, b"new"]
    assert cache.info().rows == len(images) + 1


def test_a_limit_on_file_size_ends_writing_only(tmp_path, found_in, finish, start):
    """An error while writing ends nothing but writing; the rows before it stay."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2**21, 2**21))"
    message, n_rows = finish(start(limit + FILL, tmp_path / "cache")).splitlines()
    assert "cannot be written" in message
    images = [b"%d" % i for i in range(int(n_rows))]
    assert found_in(FeatureCache(tmp_path / "cache"), images) == images


def write_text(file):
    file.write_text("Dear diary, " * 20, encoding="utf-8")


def write_short_text(file):
    file.write_text("x", encoding="utf-8")


def write_other_database(file):
    """Leave a database as after a crash, with its newest rows still in the log."""
    script = f"""
        import os, signal, sqlite3
        connection = sqlite3.connect({str(file)!r})
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("CREATE TABLE diary (page TEXT)")
        connection.execute("INSERT INTO diary VALUES ('Dear diary')")
        connection.commit()
        os.kill(os.getpid(), signal.SIGKILL)
        """
    subprocess.run([sys.executable, "-c", textwrap.dedent(script)])
    assert file.with_name(f"{file.name}-wal").stat().st_size > 0


def write_other_format(file, change):
    with sqlite3.connect(file) as connection:
        connection.execute(f"PRAGMA application_id = {disk_module.APPLICATION_ID}")
        connection.execute(f"PRAGMA user_version = {disk_module.FORMAT + change}")
        connection.execute("CREATE TABLE novelties (page TEXT)")
    connection.close()


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (write_text, "is not a deepfeat cache"),
        (write_short_text, "is not a deepfeat cache"),
        (write_other_database, "is not a deepfeat cache"),
        (
            functools.partial(write_other_format, change=1),
            f"has format {disk_module.FORMAT + 1}, .* or use the release of deepfeat that",
        ),
        (
            functools.partial(write_other_format, change=-1),
            f"has format {disk_module.FORMAT - 1}, .* Delete it or choose another directory",
        ),
    ],
)
def test_a_foreign_file_is_refused_and_left_alone(tmp_path, write, message, found_in, put):
    """Whatever is called, the error says what is wrong, and no byte changes."""
    file = tmp_path / FILE_NAME
    write(file)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    cache = FeatureCache(tmp_path)
    for use in (
        lambda: found_in(cache, IMAGES),
        lambda: put(cache, IMAGES),
        lambda: cache.claim(JOB, IMAGES),
        lambda: cache.known_digests([("a.png", 10, 1, 1, 7, 1)]),
        cache.info,
        cache.clear,
        lambda: cache.prune(0),
    ):
        with pytest.raises(CacheFormatError, match=message):
            use()
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
def test_a_hostile_file_is_refused(disk, change, put, found_in):
    """Unexpected tables and impossible numbers are refused at once, with a remedy."""
    put(disk, IMAGES)
    disk._store.close()
    with contextlib.closing(sqlite3.connect(database_of(disk))) as connection:
        connection.executescript(change)
    cache = reopen(disk)
    for use in lambda: found_in(cache, IMAGES), lambda: put(cache, [b"new"]), cache.info:
        with pytest.raises(CacheFormatError, match="Delete it or choose another directory"):
            use()


@pytest.mark.parametrize("token", ["../../outside", "a" * 31, "A" * 32, "", 7])
def test_no_lock_name_leaves_the_folder(disk, token):
    """Whatever owners the file lists, no path outside the folder of locks is touched."""
    outside = Path(disk.path).parent / "outside.lock"
    outside.touch()
    in_another_thread(disk.claim, JOB, IMAGES)
    change(disk, f"INSERT INTO owners VALUES (99, {token!r}, 'host', 1, {time.time()})")
    change(disk, "UPDATE claims SET owner = 99")
    with pytest.raises(CacheFormatError, match="names an impossible process"):
        disk.claim(JOB, IMAGES)
    assert outside.exists()


@pytest.mark.parametrize("image", ["7", "1.5", "'text'", "x''"])
def test_update_skips_keys_that_are_not_bytes(disk, image, put, found_in):
    """Only digests are copied from a damaged cache."""
    put(disk, IMAGES)
    change(disk, f"UPDATE keys SET image = {image} WHERE image = x'{IMAGES[0].hex()}'")
    other = FeatureCache()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # about damaged rows
        other.update(disk)
    assert found_in(other, IMAGES) == IMAGES[1:]


def test_an_endless_query_is_ended(disk, monkeypatch, put, found_in):
    """A file may send SQLite in circles, so a transaction has a limited number of steps."""
    put(disk, [b"%d" % i for i in range(2_000)])
    monkeypatch.setattr(disk_module, "STEPS", (10_000, 1_000))
    cache = reopen(disk)
    assert found_in(cache, [b"1", b"2"]) == [b"1", b"2"]  # few images take few steps
    with pytest.raises(CacheFormatError, match="takes too long to read"):
        cache.update(cache)


@pytest.mark.parametrize("left", [0, 0.3, 0.9])
def test_a_process_survives_its_file_being_cut_short(disk, left, finish, start):
    """Rows are missing, with a warning, and none is wrong."""
    script = """
        import warnings
        images = [b"%d" % i for i in range(500)]
        put(cache, images, 1_000)
        # Move the log into the file; SQLite still knows the size of the file from the log.
        cache._store.opened[0][0].execute("PRAGMA wal_checkpoint(PASSIVE)")
        assert found_in(cache, images[:100]) == images[:100]
        file = sys.argv[1] + "/deepfeat-cache.sqlite"
        os.truncate(file, int(os.path.getsize(file) * float(sys.argv[2])))
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            cache._store.opened[0][0].execute("PRAGMA cache_size = 0")  # forget what was read
            there = found_in(cache, images)
            put(cache, images, 1_000)
        say(len(there) < 500, len(warned) > 0)
        """
    assert finish(start(script, disk.path, left)) == "True True\n"


def test_a_file_in_place_of_the_directory_is_refused(tmp_path, put):
    """The error says that a directory is needed."""
    (tmp_path / "file").write_text("Dear diary", encoding="utf-8")
    with pytest.raises(ValueError, match=r"must be a directory; .* is a file"):
        put(FeatureCache(tmp_path / "file"), IMAGES)
    assert (tmp_path / "file").read_text(encoding="utf-8") == "Dear diary"


# Root may write anywhere, so the reader becomes the user nobody. That user may be unable to read
# Python's own files, so all that is imported late must be imported before.
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
with warnings.catch_warnings(record=True) as warned:
    warnings.simplefilter("always")
    there = found_in(cache, [*IMAGES, b"new"])
    assert cache.claim(JOB, IMAGES).all()
    for _ in range(2):
        put(cache, [b"new"], job=JOB)
        cache.release(JOB, IMAGES)
        cache.remember_digests([("a", 1, 2, 3, 4, 5)], [b"digest"])
    assert found_in(cache, [*IMAGES, b"new"]) == there
    assert cache.info().rows == len(there)
say(len(warned), warned[0].category.__name__, "|".join(map(bytes.decode, there)), warned[0].message)
"""


@pytest.fixture
def read_only(start, finish):
    """Read a cache as a user who must not write to it; return the images found."""

    def read_only(folder):
        count, category, rest = finish(start(BECOME_NOBODY + READ, folder)).split(" ", 2)
        assert (count, category) == ("1", "RuntimeWarning")
        assert "cannot be written" in rest or "cannot be read" in rest
        return [image for image in [*IMAGES, b"new"] if image.decode() in rest]

    return read_only


@pytest.fixture
def locked(put):
    """The directory of a cache with rows, in which only root can write."""
    if not hasattr(os, "setuid"):
        pytest.skip("there are no other users to become")
    # Not `tmp_path`, to which other users have no access.
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "cache")
        Path(folder).chmod(0o755)
        if not all(parent.stat().st_mode & 0o001 for parent in path.parents):
            pytest.skip("others cannot reach the directory of temporary files")
        disk = FeatureCache(path)
        put(disk, IMAGES[:4])
        disk._store.close()
        path.chmod(0o555)
        database_of(disk).chmod(0o444)
        yield path
        path.chmod(0o755)


def test_a_read_only_directory_is_read(locked, read_only):
    """Rows are found, claims granted and one warning issued; no file appears."""
    before = contents_of(FeatureCache(locked))
    assert read_only(locked) == IMAGES[:4]
    assert contents_of(FeatureCache(locked)) == before


only_root_writes_there = pytest.mark.skipif(
    not hasattr(os, "getuid") or os.getuid() != 0, reason="only root writes where others may not"
)


@pytest.fixture
def start_writer(start):
    """Start a process that stores a row and stays alive."""

    def start_writer(folder):
        writer = start("put(cache, [b'new']); say('put'); time.sleep(60)", folder)
        assert writer.stdout.readline() == "put\n"
        return writer

    return start_writer


@only_root_writes_there
@pytest.mark.parametrize("alive", [True, False], ids=["writing", "killed"])
def test_a_reader_sees_the_log_of_a_writer(locked, alive, start_writer, kill, read_only):
    """Rows that a writer has not yet moved from the log into the file are found as well."""
    writer = start_writer(locked)
    try:
        if not alive:
            kill(writer)
        assert read_only(locked) == [*IMAGES[:4], b"new"]
    finally:
        kill(writer)


@only_root_writes_there
def test_a_log_without_its_index_is_ignored(locked, kill, start_writer, read_only):
    """If the log of a killed writer cannot be read, the rows of the file still are."""
    kill(start_writer(locked))
    database_of(FeatureCache(locked)).with_name(f"{FILE_NAME}-shm").unlink()
    assert read_only(locked) == IMAGES[:4]


def test_a_directory_that_cannot_be_created_is_an_empty_cache(locked, read_only):
    """Without a cache and a way to create one, all rows are missing, with one warning."""
    assert read_only(locked / "cache") == []


def test_a_read_only_file_system_is_read(disk, tmp_path, put, finish, start):
    """It behaves like a read-only directory, for all users."""
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


class CacheMachine(RuleBasedStateMachine):
    """A store in memory, one on disk and a dict to compare them with."""

    folders: Iterator[Path]

    def __init__(self):
        super().__init__()
        self.caches = [FeatureCache(), FeatureCache(next(self.folders))]
        self.rows: dict[tuple[bytes, bytes], float] = {}
        self.widths = {NAMESPACE: 2, OTHER: 3}

    namespaces = st.sampled_from([NAMESPACE, OTHER])
    images = st.lists(st.sampled_from([*IMAGES, b"", b"\0", b"\xff" * 32]), max_size=8)
    values = st.floats(width=32, allow_nan=False)

    @rule(namespaces=st.sets(namespaces), images=images, value=values)
    def put(self, namespaces, images, value):
        rows = {
            namespace: np.full((len(images), self.widths[namespace]), value, np.float32)
            for namespace in namespaces
        }
        for cache in self.caches:
            cache.put_many(images, rows)
        for namespace in namespaces:
            for image in images:
                self.rows.setdefault((namespace, image), value)

    @rule(namespace=namespaces, images=images)
    def get(self, namespace, images):
        expected = [self.rows.get((namespace, image)) for image in images]
        for cache in self.caches:
            found, rows = cache.get_many(namespace, images)
            assert_array_equal(found, np.array([value is not None for value in expected], bool))
            assert_array_equal(cache.has(namespace, images), found)
            assert (rows is None) == (not found.any())
            if rows is not None:
                filled = [np.nan if value is None else value for value in expected]
                width = self.widths[namespace]
                assert_array_equal(rows, np.repeat(np.float32(filled)[:, None], width, axis=1))

    @rule()
    def clear(self):
        for cache in self.caches:
            cache.clear()
        self.rows.clear()

    @rule(namespace=namespaces)
    def refuse(self, namespace):
        if any(namespace == held for held, _ in self.rows):
            for cache in self.caches:
                with pytest.raises(ValueError, match="holds rows of"):
                    cache.put_many([b"wide"], {namespace: np.ones((1, 9), np.float32)})

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def prune(self, data):
        # Neither store has been read since its rows were stored, in the order of the dict.
        limit = data.draw(st.sampled_from([0, self.size() // 2, self.size(), 10**9]))
        self.caches = [restart(cache, self.rows, self.widths) for cache in self.caches]
        while self.size() > limit:
            del self.rows[next(iter(self.rows))]
        for cache in self.caches:
            cache.prune(limit)

    @rule()
    def reopen(self):
        self.caches[1] = reopen(self.caches[1])

    def size(self):
        return sum(4 * self.widths[namespace] for namespace, _ in self.rows)

    @invariant()
    def counts_agree(self):
        namespaces = {namespace for namespace, _ in self.rows}
        for cache in self.caches:
            info = cache.info()
            assert (info.rows, info.bytes) == (len(self.rows), self.size())
            assert info.namespaces == len(namespaces)


def restart(cache, rows, widths):
    """Refill a cache, so that its rows are used in the order of the dict."""
    cache.clear()
    for (namespace, image), value in rows.items():
        cache.put_many([image], {namespace: np.full((1, widths[namespace]), value, np.float32)})
    return cache


def test_memory_disk_and_dict_agree(tmp_path):
    """Memory, disk and a dict hold the same rows after any operations in any order."""
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
