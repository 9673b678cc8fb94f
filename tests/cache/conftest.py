"""Caches, rows that tell whose they are, and processes that share a cache."""

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

from deepfeat._cache import cache as _cache
from deepfeat._cache.cache import FeatureCache
from deepfeat._cache.disk import FILE_NAME

WORK = b"work"
CONTEXT, OTHER = b"context", b"other context"
IMAGES = [f"image {i}".encode() for i in range(6)]
WIDTH = 5


def rows_of(images, width=WIDTH, context=CONTEXT):
    """Make rows that tell whose they are."""
    seeds = np.array([zlib.crc32(context + image) for image in images], np.float32)
    return seeds[:, None] + np.arange(width, dtype=np.float32)


@pytest.fixture(name="rows_of")
def _rows_of():
    return rows_of


def put(cache, images, width=WIDTH, work=None):
    cache.put_many(images, {CONTEXT: rows_of(images, width)}, work)


@pytest.fixture(name="put")
def _put():
    return put


def found_in(cache, images):
    """Return which of the images are found, having checked that their rows are right."""
    found, rows = cache.get_many(CONTEXT, images)
    there = [image for image, is_there in zip(images, found, strict=True) if is_there]
    if rows is not None:
        assert_array_equal(rows[found], rows_of(there, rows.shape[1]))
    return there


@pytest.fixture(name="found_in")
def _found_in():
    return found_in


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


def start(script, *args, prefix=()):
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


@pytest.fixture(name="start")
def _start():
    return start


def finish(process):
    """Return what a script said, once it ended well."""
    said, errors = process.communicate("go\n", timeout=60)
    assert process.returncode == 0, errors
    return said


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
    """Make a cache of one kind; a test that asks for it runs once per kind."""
    path = tmp_path / "cache" if request.param == "disk" else None
    return lambda **kwargs: FeatureCache(path, **kwargs)


@pytest.fixture
def cache(new_cache):
    return new_cache()


@pytest.fixture
def disk(tmp_path):
    return FeatureCache(tmp_path / "cache")


class Worker:
    """A thread that lives until told, and does what it is asked."""

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
    """Look into the database behind the cache's back."""
    with contextlib.closing(sqlite3.connect(database_of(cache))) as connection:
        return connection.execute(query).fetchall()


@pytest.fixture(name="ask")
def _ask():
    return ask
