"""Tests of finding a device."""

import pytest
import torch

from deepfeat._engine.devices import find_device

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("cuda", "mps", "expected"),
    [(True, False, "cuda:3"), (True, True, "cuda:3"), (False, True, "mps"), (False, False, "cpu")],
)
def test_auto_takes_the_best_device(monkeypatch, cuda, mps, expected):
    """CUDA comes before MPS and MPS before the CPU; of several GPUs the current one is taken."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert find_device("auto") == torch.device(expected)


def test_cuda_without_a_number_is_the_current_one(monkeypatch):
    """So "cuda" and "auto" name one device, and share a loaded network."""
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: torch.zeros(0))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert find_device("cuda") == torch.device("cuda", 3)
    assert find_device("cuda:1") == torch.device("cuda", 1)


@pytest.mark.parametrize("device", ["cpu", CPU], ids=["by name", "of torch"])
def test_a_device_that_is_there_is_taken(device):
    """A device may come by name or as torch's own."""
    assert find_device(device) == CPU


@pytest.mark.parametrize("device", ["cuda:99", "hpu", "meta", "gpu", "", None, 1.5])
def test_a_device_that_cannot_be_had_is_refused(device):
    """The error names the device, and stays short whatever torch has to say about it."""
    with pytest.raises(ValueError, match=r"cannot be used here: .") as caught:
        find_device(device)
    assert repr(str(device)) in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.gpu
def test_auto_is_cuda_where_there_is_one():
    """What "auto" gives can be computed on."""
    assert torch.ones(1, device=find_device("auto")).is_cuda
