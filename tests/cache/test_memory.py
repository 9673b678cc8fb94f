"""Memory: rows in this process, given back when nobody holds them."""

import pickle

from deepfeat._cache import cache as _cache
from deepfeat._cache.cache import FeatureCache

IMAGES = [f"image {i}".encode() for i in range(6)]


def test_memory_is_bounded_by_default(tmp_path):
    """A cache in memory holds 1 GiB at most; one on disk is not bounded."""
    assert repr(FeatureCache()) == "FeatureCache(max_bytes=1073741824)"
    assert repr(FeatureCache(tmp_path)) == f"FeatureCache({str(tmp_path)!r}, max_bytes=None)"


def test_memory_is_given_back(put):
    """The rows of a cache that nobody holds any more are gone."""
    cache = FeatureCache()
    pickled, token = pickle.dumps(cache), cache._token
    put(cache, IMAGES)
    del cache
    assert token not in _cache._stores
    assert pickle.loads(pickled).info().rows == 0


def test_memory_begins_empty_in_another_process(tmp_path, put, finish, start):
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


def test_a_fork_leaves_the_claims_in_memory_behind(finish, start):
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
