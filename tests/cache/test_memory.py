"""Stores in memory: their limit, their lifetime, and what forks and pickles do to them."""

import pickle

from deepfeat._cache import cache as cache_module
from deepfeat._cache.cache import FeatureCache

IMAGES = [f"image {i}".encode() for i in range(6)]


def test_memory_is_bounded_by_default(tmp_path):
    """A cache in memory holds at most 1 GiB; a cache on disk has no limit."""
    assert repr(FeatureCache()) == "FeatureCache(max_bytes=1073741824)"
    assert repr(FeatureCache(tmp_path)) == f"FeatureCache({str(tmp_path)!r}, max_bytes=None)"


def test_memory_is_released(put):
    """The rows of a cache are gone once no reference to it is left."""
    cache = FeatureCache()
    pickled, token = pickle.dumps(cache), cache._token
    put(cache, IMAGES)
    del cache
    assert token not in cache_module._stores
    assert pickle.loads(pickled).info().rows == 0


def test_memory_starts_empty_in_another_process(tmp_path, put, finish, start):
    """A pickled cache is a single store there, too, and survives from task to task."""
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
    """A child does not wait for rows that its parent computes for itself."""
    script = """
        cache = FeatureCache()
        cache.claim(JOB, IMAGES)
        child = os.fork()
        if not child:
            os._exit(0 if cache.claim(JOB, IMAGES).all() else 1)
        say(os.waitpid(child, 0)[1])
        """
    assert finish(start(script, "unused")) == "0\n"
