"""Pictures to read."""

import numpy as np
import pytest


@pytest.fixture
def colours():
    """Three uint8 pictures in RGB."""
    return np.random.default_rng(1).integers(0, 256, (3, 6, 7, 3), dtype=np.uint8)
