"""A cache: rows under keys, alike in memory and on disk."""

import copy
import os
import pickle
import time

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from sklearn.base import BaseEstimator, clone

from deepfeat._cache.cache import CacheInfo, FeatureCache
from deepfeat._cache.disk import FILE_NAME

WORK = b"work"
CONTEXT, OTHER = b"context", b"other context"
IMAGES = [f"image {i}".encode() for i in range(6)]
WIDTH = 5
ROW_BYTES = WIDTH * 4


def test_rows_come_back_under_their_keys_in_the_order_asked(cache, put, rows_of):
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
def test_nothing_found_is_none(cache, images, put):
    """Where no image is found there is no matrix, since nobody knows its width."""
    put(cache, IMAGES)
    found, rows = cache.get_many(CONTEXT, images)
    assert_array_equal(found, np.zeros(len(images), dtype=bool))
    assert rows is None
    assert cache.get_many(OTHER, IMAGES)[1] is None


def test_few_rows_are_found_among_many(cache, put, found_in):
    """A look-up finds its rows whether it asks for few or for all, in any order."""
    images = [b"%d" % i for i in range(1_200)]
    put(cache, images[:700])
    put(cache, images[700:])
    assert found_in(cache, images[::-1]) == images[::-1]
    assert found_in(cache, [images[1_100], b"unknown", images[3]]) == [images[1_100], images[3]]


def test_contexts_do_not_meet(cache, rows_of):
    """One image has one row in each context, of its own width."""
    narrow, wide = rows_of(IMAGES, 2), rows_of(IMAGES, 9, OTHER)
    cache.put_many(IMAGES, {CONTEXT: narrow, OTHER: wide})
    assert_array_equal(cache.get_many(CONTEXT, IMAGES)[1], narrow)
    assert_array_equal(cache.get_many(OTHER, IMAGES)[1], wide)


def test_to_ask_whether_a_row_is_there_counts_nothing(
    new_cache,
    put,
):
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


def test_a_row_is_put_once(cache, put, found_in, rows_of):
    """To put again what is there, even in one call, changes nothing."""
    put(cache, IMAGES)
    before = cache.info()
    cache.put_many(IMAGES, {CONTEXT: rows_of(IMAGES) + 1})
    assert cache.info() == before
    cache.put_many([b"twice", b"twice"], {CONTEXT: np.array([[1.0] * WIDTH, [2.0] * WIDTH])})
    assert_array_equal(cache.get_many(CONTEXT, [b"twice"])[1], [[1.0] * WIDTH])
    assert found_in(cache, IMAGES) == IMAGES


@pytest.mark.parametrize("step", [1, 2], ids=["contiguous", "strided"])
def test_rows_are_kept_as_they_were_put(cache, step, rows_of):
    """What callers do to their matrices, before or after, does not reach the cache."""
    matrix = rows_of(IMAGES)[:, ::step]
    expected = matrix.copy()
    cache.put_many(IMAGES, {CONTEXT: matrix})
    matrix[:] = -1
    cache.get_many(CONTEXT, IMAGES)[1][:] = -2
    assert_array_equal(cache.get_many(CONTEXT, IMAGES)[1], expected)


def test_a_context_has_one_width(cache, put, rows_of, found_in):
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
def test_a_matrix_has_a_row_for_each_image(cache, shape):
    """Anything else than (n, d) with d > 0 is refused, and the message tells the shapes."""
    with pytest.raises(ValueError, match=r"shape \(6, d\), got"):
        cache.put_many(IMAGES, {CONTEXT: np.zeros(shape, np.float32)})


def test_info_counts(cache, rows_of):
    """Rows, bytes, contexts, hits and misses are counted, repeats as often as they are asked."""
    cache.put_many(IMAGES, {CONTEXT: rows_of(IMAGES, 3), OTHER: rows_of(IMAGES, 7)})
    cache.get_many(CONTEXT, [IMAGES[0], IMAGES[0], b"unknown"])
    assert cache.info() == CacheInfo(rows=12, bytes=6 * 40, contexts=2, hits=2, misses=1)
    assert repr(cache.info()) == "CacheInfo(rows=12, bytes=240, contexts=2, hits=2, misses=1)"


def test_clear_forgets(cache, worker, put, found_in):
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


def test_the_bound_holds_after_each_write(new_cache, put, found_in):
    """However much is put, no more than `max_bytes` stays, and that is the newest."""
    cache = new_cache(max_bytes=3 * ROW_BYTES + 1)
    for image in IMAGES:
        put(cache, [image])
        assert cache.info().bytes <= cache.max_bytes
    assert found_in(cache, IMAGES) == IMAGES[-3:]
    cache.put_many([b"a", b"b"], {OTHER: np.ones((2, 100), np.float32)})
    assert cache.info().rows == 0


def test_the_rows_used_longest_ago_go_first(new_cache, found_in, put):
    """To read a row keeps it; what was not read since goes."""
    cache = new_cache(max_bytes=4 * ROW_BYTES)
    for image in IMAGES[:4]:
        put(cache, [image])
    found_in(cache, [IMAGES[0], IMAGES[2]])
    put(cache, IMAGES[4:])
    assert found_in(cache, IMAGES) == [IMAGES[0], IMAGES[2], IMAGES[4], IMAGES[5]]


def test_prune_leaves_what_was_used_last(cache, put, found_in):
    """`prune` tells how many rows it dropped, and leaves the newest."""
    for image in IMAGES:
        put(cache, [image])
    assert cache.prune(2 * ROW_BYTES) == 4
    assert cache.prune(2 * ROW_BYTES) == 0
    assert found_in(cache, IMAGES) == IMAGES[-2:]
    assert (cache.info().rows, cache.info().bytes) == (2, 2 * ROW_BYTES)


def test_a_bound_is_checked():
    """A negative bound is refused."""
    with pytest.raises(ValueError, match="max_bytes must be 0 or more, not -1"):
        FeatureCache(max_bytes=-1)


class Extractor(BaseEstimator):
    def __init__(self, cache=None):
        self.cache = cache


COPIES = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda cache: pickle.loads(pickle.dumps(cache)),
    "clone": lambda cache: clone(Extractor(cache)).cache,
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES.keys())
def test_a_copy_is_the_same_store(cache, copied, put, found_in):
    """What one puts the other finds; they are equal, have one hash and count together."""
    twin = copied(cache)
    put(cache, IMAGES[:3])
    put(twin, IMAGES[3:])
    assert found_in(cache, IMAGES) == found_in(twin, IMAGES) == IMAGES
    assert twin == cache
    assert len({twin, cache}) == 1
    assert (twin.info(), repr(twin)) == (cache.info(), repr(cache))


def test_stores_differ(tmp_path):
    """Two caches in memory are two stores, and so are two directories."""
    caches = {FeatureCache(), FeatureCache(), FeatureCache(tmp_path), FeatureCache(tmp_path / "a")}
    assert len(caches) == 4
    assert FeatureCache() != "cache"


def test_one_directory_is_one_store(tmp_path, monkeypatch, put):
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


def settled_stat(path="a.png", inode=7):
    long_ago = time.time_ns() - 3 * 10**9
    return path, 10, long_ago, long_ago, inode, 1


@pytest.mark.parametrize("path", ["a.png", "ä.png", os.fsdecode(b"\xff.png")])
def test_a_digest_is_known_until_the_file_changes(cache, path):
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
def test_a_fresh_file_is_not_trusted(cache, age, time_of):
    """A file may change again within one time stamp, so a fresh one is not remembered."""
    now = time.time_ns()
    times = [now - int(age * 1e9), now - 10**10]
    fresh = ("a.png", 10, *(times if time_of == "mtime" else times[::-1]), 7, 1)
    cache.remember_digests([fresh], [b"digest"])
    assert cache.known_digests([fresh]) == [None]


def test_what_counts_is_when_the_stat_was_taken(cache):
    """A file that was fresh when looked at is not trusted for being read slowly."""
    stat = settled_stat()
    cache.remember_digests([stat], [b"digest"], stat_time_ns=stat[2] + 10**9)
    assert cache.known_digests([stat]) == [None]
    cache.remember_digests([stat], [b"digest"], stat_time_ns=stat[2] + 3 * 10**9)
    assert cache.known_digests([stat]) == [b"digest"]


def test_a_directory_may_be_called_as_a_home_that_is_not_there(tmp_path, monkeypatch):
    """A tilde stands for a home only where there is that home, and at the beginning."""
    monkeypatch.chdir(tmp_path)
    for path in ("~nobody-of-this-name", os.path.join(".", "~")):
        assert FeatureCache(path).path == os.path.realpath(tmp_path / path)
    assert FeatureCache(os.path.join("~", "rows")).path == os.path.realpath(
        os.path.expanduser("~/rows")
    )
