"""Caches, rows that identify their image, and processes that share a cache."""

import contextlib
import inspect
import os
import sqlite3
import subprocess
import sys
import textwrap
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from deepfeat._cache import cache as cache_module
from deepfeat._cache.cache import FeatureCache
from deepfeat._cache.disk import FILE_NAME

JOB = b"job"
NAMESPACE, OTHER = b"namespace", b"other namespace"
IMAGES = [f"image {i}".encode() for i in range(6)]
WIDTH = 5


def rows_of(images, width=WIDTH, namespace=NAMESPACE):
    """Make rows that identify their image and namespace."""
    seeds = np.array([zlib.crc32(namespace + image) for image in images], np.float32)
    return seeds[:, None] + np.arange(width, dtype=np.float32)


@pytest.fixture(name="rows_of")
def _rows_of():
    return rows_of


def put(cache, images, width=WIDTH, job=None):
    cache.put_many(images, {NAMESPACE: rows_of(images, width)}, job)


@pytest.fixture(name="put")
def _put():
    return put


def found_in(cache, images):
    """Return the images that are found, after checking that their rows are right."""
    found, rows = cache.get_many(NAMESPACE, images)
    there = [image for image, is_there in zip(images, found, strict=True) if is_there]
    if rows is not None:
        assert_array_equal(rows[found], rows_of(there, rows.shape[1]))
    return there


@pytest.fixture(name="found_in")
def _found_in():
    return found_in


# The start of scripts for other processes, where importing this module would take seconds.
PREAMBLE = f"""
import os, signal, sys, threading, time, zlib
import numpy as np
from numpy.testing import assert_array_equal
from deepfeat._cache.cache import FeatureCache
JOB, NAMESPACE, WIDTH, IMAGES = {JOB}, {NAMESPACE}, {WIDTH}, {IMAGES}
{inspect.getsource(rows_of)}
{inspect.getsource(put)}
{inspect.getsource(found_in)}
def say(*words):
    print(*words, flush=True)

cache = FeatureCache(sys.argv[1])
"""


def start(script, *args, prefix=()):
    """Start a script in another process, where warnings are errors."""
    python = [*prefix, sys.executable, "-W", "error", "-c"]
    return subprocess.Popen(
        [*python, PREAMBLE + textwrap.dedent(script), *map(str, args)],
        env={**os.environ, "PYTHONPATH": str(Path(cache_module.__file__).parents[2])},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(name="start")
def _start():
    return start


def finish(process):
    """Return the output of a script, which must end without an error."""
    output, errors = process.communicate("go\n", timeout=60)
    assert process.returncode == 0, errors
    return output


@pytest.fixture(name="finish")
def _finish():
    return finish


def kill(process):
    process.kill()
    process.communicate()


@pytest.fixture(name="kill")
def _kill():
    return kill


@pytest.fixture(params=["memory", "disk"])
def new_cache(request, tmp_path):
    """Make a cache of one kind; tests with this fixture run once per kind."""
    path = tmp_path / "cache" if request.param == "disk" else None
    return lambda **kwargs: FeatureCache(path, **kwargs)


@pytest.fixture
def cache(new_cache):
    return new_cache()


@pytest.fixture
def disk(tmp_path):
    return FeatureCache(tmp_path / "cache")


class Worker:
    """A thread that runs functions and lives until the end of the test."""

    def __init__(self):
        self.pool = ThreadPoolExecutor(1)

    def __call__(self, function, *args):
        return self.pool.submit(function, *args).result()


@pytest.fixture
def worker():
    worker = Worker()
    yield worker
    worker.pool.shutdown()


def database_of(cache):
    return Path(cache.path, FILE_NAME)


def ask(cache, query):
    """Query the database behind the cache's back."""
    with contextlib.closing(sqlite3.connect(database_of(cache))) as connection:
        return connection.execute(query).fetchall()


@pytest.fixture(name="ask")
def _ask():
    return ask
