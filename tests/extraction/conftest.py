"""Networks of timm with weights in a file, and a count of the images that enter a network."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn


@pytest.fixture
def count_images(monkeypatch):
    """Count the images that enter networks of a class in this process, as a list of batches."""

    def count_images(kind):
        seen = []
        forward = kind.forward

        def counted(self, x, *args, **options):
            if x.device.type != "meta":
                seen.append(len(x))
            return forward(self, x, *args, **options)

        monkeypatch.setattr(kind, "forward", counted)
        return seen

    return count_images


@pytest.fixture(scope="session")
def draw_timm():
    """Build a network of timm with random weights, of which none are all zero."""
    timm = pytest.importorskip("timm")

    def draw_timm(name, **options):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            net = timm.create_model(name, **options).eval()
            for value in net.parameters():
                if not value.any():
                    nn.init.uniform_(value, -0.1, 0.1)
        return net

    return draw_timm


@pytest.fixture
def write_timm(draw_timm, tmp_path):
    """Write the weights of a network of timm to a file; return both."""

    def write_timm(name, **options):
        net = draw_timm(name, **options)
        path = tmp_path / f"{name}.safetensors"
        save_file({key: value.contiguous() for key, value in net.state_dict().items()}, path)
        return net, path

    return write_timm


@pytest.fixture(scope="session")
def pictures():
    """Sixteen small images of noise, of two kinds in turn: dark and light."""
    noise = np.random.default_rng(0).integers(0, 128, (16, 24, 20, 3))
    return (noise + 100 * (np.arange(16) % 2)[:, None, None, None]).astype(np.uint8)
