"""Fixtures of the tests of backbones: weights, and no networks left from test to test."""

from collections.abc import Iterator

import pytest
from named_networks import NAME, random_state
from torch import Tensor

from deepfeat._backbones import networks as building


@pytest.fixture(autouse=True)
def forget_networks() -> Iterator[None]:
    """Start and leave without networks in memory."""
    forget = building._load_cached.cache_clear
    forget()
    yield
    forget()


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    """Weights of a small network as a file would hold them."""
    return random_state(NAME)
