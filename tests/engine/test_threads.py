"""Tests of functions mapped over samples in threads."""

import traceback
import weakref

import pytest

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
