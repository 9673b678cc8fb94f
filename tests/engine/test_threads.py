"""Tests of functions mapped over samples in threads."""

import os
import traceback
import weakref
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
import torch

from deepfeat._engine import threads
from deepfeat._engine.batches import run_in_batches
from deepfeat._engine.threads import map_in_threads


class Pixels:
    """Something large, which a sample that is prepared holds for a while."""


@pytest.mark.parametrize("num_workers", [0, 2])
def test_failures_hold_nothing_that_was_in_use_when_they_happened(num_workers):
    """Their traceback tells the lines, and lets go of the variables there, also of its causes."""
    in_use = weakref.WeakSet()

    def decode(pixels):
        inner = Pixels()
        in_use.add(inner)
        raise OSError(f"planted for {type(pixels).__name__}")

    def prepare(number):
        pixels = Pixels()
        in_use.add(pixels)
        try:
            decode(pixels)
        except OSError as error:
            raise KeyError(number) from error

    results = list(map_in_threads(prepare, range(20), num_workers, ahead=64))
    assert len(in_use) == 0
    for number, error in results:
        assert error.args == (number,)
        lines = "".join(traceback.format_exception(error))
        assert "decode(pixels)" in lines
        assert "planted for Pixels" in lines


# How many -----------------------------------------------------------------------------------------


@pytest.fixture
def started(monkeypatch):
    """Gather how many threads are started at a time, in place of which there are two."""
    counts = []

    def start(count, **options):
        counts.append(count)
        return ThreadPoolExecutor(2, **options)

    monkeypatch.setattr(threads, "ThreadPoolExecutor", start)
    return counts


def have_processors(monkeypatch, count):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(count)), raising=False)


@pytest.mark.parametrize("processors", [1, 3, 8, 20])
def test_auto_is_a_thread_per_processor(monkeypatch, started, processors):
    """Up to eight, unless another limit is given, or none."""
    have_processors(monkeypatch, processors)
    for options in ({}, {"limit": 2}, {"limit": None}):
        results = list(map_in_threads(abs, [-1, -2, -3], "auto", ahead=2, **options))
        assert results == [(-1, 1), (-2, 2), (-3, 3)]
    assert started == [min(processors, 8), min(processors, 2), processors]


def test_auto_counts_the_processors_of_the_process(monkeypatch, started):
    """Not those of the machine, where the system tells them apart; if it tells nothing, one."""
    monkeypatch.setattr(os, "cpu_count", lambda: 5)
    have_processors(monkeypatch, 3)
    list(map_in_threads(abs, [1], "auto", ahead=2))
    monkeypatch.delattr(os, "sched_getaffinity")
    list(map_in_threads(abs, [1], "auto", ahead=2))
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    list(map_in_threads(abs, [1], "auto", ahead=2))
    assert started == [3, 5, 1]


@pytest.mark.parametrize(
    ("device", "num_workers", "expected"),
    [
        ("cuda:1", "auto", 20),
        ("cpu", "auto", 8),
        ("mps", "auto", 8),
        ("cuda:1", 12, 12),
        ("cpu", 12, 12),
        ("cuda:1", 1, 1),
    ],
)
def test_those_of_a_gpu_have_all_processors(monkeypatch, started, device, num_workers, expected):
    """It waits for images that few threads prepare; a number that was asked for is taken."""
    have_processors(monkeypatch, 20)
    reader = SimpleNamespace(device=torch.device(device), prepare=abs, read=None)
    assert list(run_in_batches(reader, [], abs, num_workers=num_workers)) == []
    assert started == [expected]
