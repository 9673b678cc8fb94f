"""Weights, pictures, and no networks left from test to test."""

import contextlib
import pickle
import random
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import models

from deepfeat._backbones import networks as building
from deepfeat._backbones.find import find_backbone


@pytest.fixture(autouse=True)
def forget_networks():
    """Start and leave without networks in memory."""
    forget = building._load_cached.cache_clear
    forget()
    yield
    forget()


@pytest.fixture(scope="session")
def random_state():
    """Draw the weights of a network of torchvision."""

    def random_state(name, seed=0, **options):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return models.get_model(name, weights=None, **options).state_dict()

    return random_state


@pytest.fixture(scope="module")
def state(random_state):
    """Weights of a small network as a file would hold them."""
    return random_state("squeezenet1_1")


@pytest.fixture(scope="session")
def load():
    """Find a backbone and load its network on the CPU."""
    return lambda *args, **kwargs: find_backbone(*args, **kwargs).load(torch.device("cpu"))


@pytest.fixture(scope="session")
def pictures():
    """Images whose pixels are all different from their neighbours."""
    sizes = {"portrait": (97, 151), "landscape": (330, 201), "tiny": (5, 3)}
    return {
        name: Image.fromarray(
            np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        )
        for name, (width, height) in sizes.items()
    }


@pytest.fixture(scope="session")
def untouched_generators():
    """Check that the state of no global generator changes inside."""

    def states():
        states = [torch.get_rng_state(), *torch.cuda.get_rng_state_all()]
        others = (random.getstate(), np.random.get_state())  # noqa: NPY002
        return [*(state.numpy().tobytes() for state in states), *map(pickle.dumps, others)]

    @contextlib.contextmanager
    def untouched_generators():
        before = states()
        yield
        assert states() == before

    return untouched_generators


@pytest.fixture(scope="session")
def run_in_threads():
    """Run functions at the same time, to the end of all."""

    def run_in_threads(*works):
        threads = [threading.Thread(target=work) for work in works]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    return run_in_threads
