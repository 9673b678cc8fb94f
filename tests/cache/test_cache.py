"""Caches: rows under keys, the same in memory and on disk."""

import copy
import os
import pickle
import re
import time

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from sklearn.base import BaseEstimator, clone

from deepfeat._cache.cache import CacheInfo, FeatureCache
from deepfeat._cache.disk import FILE_NAME

JOB = b"job"
NAMESPACE, OTHER = b"namespace", b"other namespace"
IMAGES = [f"image {i}".encode() for i in range(6)]
WIDTH = 5
ROW_BYTES = WIDTH * 4


def test_rows_are_returned_by_key_in_the_requested_order(cache, put, rows_of):
    """Known images have their own rows, repeats included, and unknown ones NaN."""
    put(cache, IMAGES[:4])
    images = [IMAGES[2], b"unknown", IMAGES[0], IMAGES[2]]
    found, rows = cache.get_many(NAMESPACE, images)
    assert_array_equal(found, [True, False, True, True])
    assert found.dtype == bool
    assert rows.dtype == np.float32
    assert rows.flags.writeable
    assert_array_equal(rows[found], rows_of([IMAGES[2], IMAGES[0], IMAGES[2]]))
    assert_array_equal(rows[1], np.full(WIDTH, np.nan))


@pytest.mark.parametrize("images", [[], [b"unknown"]], ids=["no images", "unknown"])
def test_rows_are_none_if_nothing_is_found(cache, images, put):
    """Without a found image there is no matrix, since its width is unknown."""
    put(cache, IMAGES)
    found, rows = cache.get_many(NAMESPACE, images)
    assert_array_equal(found, np.zeros(len(images), dtype=bool))
    assert rows is None
    assert cache.get_many(OTHER, IMAGES)[1] is None


def test_few_rows_are_found_among_many(cache, put, found_in):
    """A lookup finds its rows, be they few or all, in any order."""
    images = [b"%d" % i for i in range(1_200)]
    put(cache, images[:700])
    put(cache, images[700:])
    assert found_in(cache, images[::-1]) == images[::-1]
    assert found_in(cache, [images[1_100], b"unknown", images[3]]) == [images[1_100], images[3]]


def test_namespaces_are_separate(cache, rows_of):
    """An image has one row per namespace, and each namespace has its own width."""
    narrow, wide = rows_of(IMAGES, 2), rows_of(IMAGES, 9, OTHER)
    cache.put_many(IMAGES, {NAMESPACE: narrow, OTHER: wide})
    assert_array_equal(cache.get_many(NAMESPACE, IMAGES)[1], narrow)
    assert_array_equal(cache.get_many(OTHER, IMAGES)[1], wide)


def test_has_counts_nothing(
    new_cache,
    put,
):
    """`has` agrees with `get_many`, and is neither a hit, a miss nor a use."""
    cache = new_cache(max_bytes=2 * ROW_BYTES)
    for image in IMAGES[:2]:
        put(cache, [image])
    images = [IMAGES[1], b"unknown", IMAGES[0], IMAGES[0]]
    assert_array_equal(cache.has(NAMESPACE, images), [True, False, True, True])
    assert not cache.has(OTHER, images).any()
    assert cache.has(NAMESPACE, IMAGES[:1]).all()
    put(cache, IMAGES[2:3])
    assert_array_equal(cache.has(NAMESPACE, IMAGES[:3]), [False, True, True])
    assert (cache.info().hits, cache.info().misses) == (0, 0)


def test_a_row_is_put_once(cache, put, found_in, rows_of):
    """Storing a row again, even within one call, changes nothing."""
    put(cache, IMAGES)
    before = cache.info()
    cache.put_many(IMAGES, {NAMESPACE: rows_of(IMAGES) + 1})
    assert cache.info() == before
    cache.put_many([b"twice", b"twice"], {NAMESPACE: np.array([[1.0] * WIDTH, [2.0] * WIDTH])})
    assert_array_equal(cache.get_many(NAMESPACE, [b"twice"])[1], [[1.0] * WIDTH])
    assert found_in(cache, IMAGES) == IMAGES


@pytest.mark.parametrize("step", [1, 2], ids=["contiguous", "strided"])
def test_rows_are_copied(cache, step, rows_of):
    """Changes of the matrices that were stored or returned do not reach the cache."""
    matrix = rows_of(IMAGES)[:, ::step]
    expected = matrix.copy()
    cache.put_many(IMAGES, {NAMESPACE: matrix})
    matrix[:] = -1
    cache.get_many(NAMESPACE, IMAGES)[1][:] = -2
    assert_array_equal(cache.get_many(NAMESPACE, IMAGES)[1], expected)


def test_a_namespace_has_one_width(cache, put, rows_of, found_in):
    """Rows of another width are refused, as is everything in the same call."""
    put(cache, IMAGES[:1])
    wrong = {OTHER: rows_of(IMAGES), NAMESPACE: rows_of(IMAGES, WIDTH + 1)}
    with pytest.raises(ValueError, match=r"^Namespace .* holds rows of 5 values; got rows of 6\."):
        cache.put_many(IMAGES, wrong)
    assert cache.info().rows == 1
    cache.clear()
    put(cache, IMAGES, WIDTH + 1)
    assert found_in(cache, IMAGES) == IMAGES


@pytest.mark.parametrize("shape", [(6,), (5, 2), (6, 0), (6, 2, 2)])
def test_a_matrix_has_one_row_per_image(cache, shape):
    """Any shape but (n, d) with d > 0 is refused, and the message gives both shapes."""
    with pytest.raises(
        ValueError, match=rf"^rows must .* shape \(6, d\), .*; got {re.escape(str(shape))}\.$"
    ):
        cache.put_many(IMAGES, {NAMESPACE: np.zeros(shape, np.float32)})


def test_info_counts(cache, rows_of):
    """Rows, bytes, namespaces, hits and misses are counted, repeats each time."""
    cache.put_many(IMAGES, {NAMESPACE: rows_of(IMAGES, 3), OTHER: rows_of(IMAGES, 7)})
    cache.get_many(NAMESPACE, [IMAGES[0], IMAGES[0], b"unknown"])
    assert cache.info() == CacheInfo(rows=12, bytes=6 * 40, namespaces=2, hits=2, misses=1)
    assert repr(cache.info()) == "CacheInfo(rows=12, bytes=240, namespaces=2, hits=2, misses=1)"


def test_clear_deletes_everything(cache, worker, put, found_in):
    """After `clear` no row, digest or claim is left."""
    stat = ("a.png", 10, 10**18, 10**18, 7, 1)
    put(cache, IMAGES)
    cache.remember_digests([stat], [b"digest"])
    worker(cache.claim, JOB, IMAGES)
    assert not cache.claim(JOB, IMAGES).any()
    cache.clear()
    assert cache.info().rows == cache.info().bytes == cache.info().namespaces == 0
    assert found_in(cache, IMAGES) == []
    assert cache.known_digests([stat]) == [None]
    assert cache.claim(JOB, IMAGES).all()


def test_the_limit_holds_after_each_write(new_cache, put, found_in):
    """However much is stored, at most `max_bytes` stay, and these are the newest."""
    cache = new_cache(max_bytes=3 * ROW_BYTES + 1)
    for image in IMAGES:
        put(cache, [image])
        assert cache.info().bytes <= cache.max_bytes
    assert found_in(cache, IMAGES) == IMAGES[-3:]
    cache.put_many([b"a", b"b"], {OTHER: np.ones((2, 100), np.float32)})
    assert cache.info().rows == 0


def test_the_least_recently_used_rows_go_first(new_cache, found_in, put):
    """Reading a row keeps it; rows that were not read since are dropped."""
    cache = new_cache(max_bytes=4 * ROW_BYTES)
    for image in IMAGES[:4]:
        put(cache, [image])
    found_in(cache, [IMAGES[0], IMAGES[2]])
    put(cache, IMAGES[4:])
    assert found_in(cache, IMAGES) == [IMAGES[0], IMAGES[2], IMAGES[4], IMAGES[5]]


def test_prune_keeps_the_most_recently_used_rows(cache, put, found_in):
    """`prune` returns how many rows it dropped, and keeps the newest."""
    for image in IMAGES:
        put(cache, [image])
    assert cache.prune(2 * ROW_BYTES) == 4
    assert cache.prune(2 * ROW_BYTES) == 0
    assert found_in(cache, IMAGES) == IMAGES[-2:]
    assert (cache.info().rows, cache.info().bytes) == (2, 2 * ROW_BYTES)


def test_max_bytes_is_checked():
    """A negative limit is refused."""
    with pytest.raises(ValueError, match=r"^max_bytes must be 0 or more; got -1\.$"):
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
    """Each finds the rows of the other; they are equal, hash alike and count together."""
    twin = copied(cache)
    put(cache, IMAGES[:3])
    put(twin, IMAGES[3:])
    assert found_in(cache, IMAGES) == found_in(twin, IMAGES) == IMAGES
    assert twin == cache
    assert len({twin, cache}) == 1
    assert (twin.info(), repr(twin)) == (cache.info(), repr(cache))


def test_stores_differ(tmp_path):
    """Two caches in memory are separate stores, and so are two directories."""
    caches = {FeatureCache(), FeatureCache(), FeatureCache(tmp_path), FeatureCache(tmp_path / "a")}
    assert len(caches) == 4
    assert FeatureCache() != "cache"


def test_one_directory_is_one_store(tmp_path, monkeypatch, put):
    """The spelling of a path does not matter, nor does a later change of directory."""
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
    """It is found by the same path, size, times, inode and device, and by no others."""
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
def test_a_fresh_file_is_not_remembered(cache, age, time_of):
    """A file that has just changed may change again within the same time stamp."""
    now = time.time_ns()
    times = [now - int(age * 1e9), now - 10**10]
    fresh = ("a.png", 10, *(times if time_of == "mtime" else times[::-1]), 7, 1)
    cache.remember_digests([fresh], [b"digest"])
    assert cache.known_digests([fresh]) == [None]


def test_a_file_must_be_settled_when_its_stat_is_taken(cache):
    """A file that was fresh then is not remembered just because reading it took long."""
    stat = settled_stat()
    cache.remember_digests([stat], [b"digest"], stat_time_ns=stat[2] + 10**9)
    assert cache.known_digests([stat]) == [None]
    cache.remember_digests([stat], [b"digest"], stat_time_ns=stat[2] + 3 * 10**9)
    assert cache.known_digests([stat]) == [b"digest"]


def test_a_directory_may_be_named_like_a_missing_home(tmp_path, monkeypatch):
    """A tilde stands for a home only at the start of a path, and only if that home exists."""
    monkeypatch.chdir(tmp_path)
    for path in ("~nobody-of-this-name", os.path.join(".", "~")):
        assert FeatureCache(path).path == os.path.realpath(tmp_path / path)
    assert FeatureCache(os.path.join("~", "rows")).path == os.path.realpath(
        os.path.expanduser("~/rows")
    )
