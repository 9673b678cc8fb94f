"""A cached extractor against one without a cache, while everything that decides on rows changes."""

import os
import shutil
import sys
import tempfile
import time
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule
from PIL import Image
from torch import nn

from deepfeat import DeepFeatureExtractor, FeatureCache
from deepfeat._cache import cache as _cache

FILES = 4
PICTURES = np.random.default_rng(0).integers(0, 256, (6, 12, 12, 3), dtype=np.uint8)
LONG_AGO = 10**18  # in ns: what an archive gives to all its files

CODE = """
import torch
from torch import nn
from torchvision.transforms import functional as F

side = 8
table = {"gain": 1.0}


def times(factor):
    def wrap(function):
        def wrapped(x):
            return factor * function(x)
        return wrapped
    return wrap


@times(1.0)
def scale(x):
    return x * table["gain"]


def shift(x, by=0.0):
    return x + by


class Part(nn.Module):
    sign = 1.0

    def forward(self, x):
        return shift(scale(x)) * self.sign


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.part = Part()
        self.act = nn.ELU()

    def forward(self, x):
        return self.act(self.part(self.conv(x)))


def prepare(image):
    return F.pil_to_tensor(image.resize((side, side))) / 255
"""

numbers = st.floats(0.5, 2).map(lambda number: round(number, 1))


class Changes(RuleBasedStateMachine):
    """Files, arrays, modules and functions that change in place between calls of `transform`."""

    def __init__(self):
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        # Files are trusted by their dates after 2 s; so that no step waits so long:
        self.patch.setattr(_cache, "RACY_NS", 2 * 10**7)
        self.folder = Path(tempfile.mkdtemp())
        self.paths = [self.folder / f"{number}.bmp" for number in range(FILES)]
        for number, path in enumerate(self.paths):
            self.write(path, number, LONG_AGO)
        self.arrays = [PICTURES[number].copy() for number in range(2)]
        self.code = types.ModuleType("code_of_a_user")
        sys.modules[self.code.__name__] = self.code
        exec(CODE, vars(self.code))
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.net = self.code.Net()
        self.caches = [FeatureCache(), FeatureCache(self.folder / "cache")]

    def teardown(self):
        self.patch.undo()
        sys.modules.pop(self.code.__name__, None)
        shutil.rmtree(self.folder)

    def write(self, path, picture, mtime_ns):
        Image.fromarray(PICTURES[picture]).save(path)
        os.utime(path, ns=(mtime_ns, mtime_ns))

    @rule(number=st.integers(0, FILES - 1), picture=st.integers(0, 5), is_old=st.booleans())
    def rewrite_a_file(self, number, picture, is_old):
        """Its size and inode stay, and with `is_old` so does its time."""
        path = self.paths[number]
        self.write(path, picture, path.stat().st_mtime_ns if is_old else time.time_ns())

    @rule(number=st.integers(0, FILES - 1), picture=st.integers(0, 5))
    def replace_a_file(self, number, picture):
        """By another one of the same size and time, as from an archive."""
        new = self.folder / "new.bmp"
        self.write(new, picture, LONG_AGO)
        os.replace(new, self.paths[number])

    @rule(number=st.integers(0, FILES - 1), picture=st.integers(0, 5))
    def remove_a_file_and_unpack_it_again(self, number, picture):
        """A file system may give the same inode again."""
        self.paths[number].unlink()
        self.write(self.paths[number], picture, LONG_AGO)

    @rule(one=st.integers(0, FILES - 1), other=st.integers(0, FILES - 1))
    def swap_two_files(self, one, other):
        if one != other:
            third = self.folder / "third.bmp"
            self.paths[one].rename(third)
            self.paths[other].rename(self.paths[one])
            third.rename(self.paths[other])

    @rule(number=st.integers(0, 1), picture=st.integers(0, 5))
    def change_an_array(self, number, picture):
        self.arrays[number][:] = PICTURES[picture]

    @rule(factor=numbers)
    def train_further(self, factor):
        with torch.no_grad():
            self.net.conv.weight.mul_(factor)

    @rule(gain=numbers)
    def change_a_global_in_place(self, gain):
        self.code.table["gain"] = gain

    @rule(side=st.integers(6, 9))
    def assign_a_global(self, side):
        self.code.side = side

    @rule(sign=numbers)
    def change_a_class(self, sign):
        self.code.Part.sign = sign

    @rule(sign=numbers)
    def change_an_object(self, sign):
        self.net.part.sign = sign

    @rule(by=numbers)
    def change_a_default(self, by):
        self.code.shift.__defaults__ = (by,)

    @rule(factor=numbers)
    def change_a_closure(self, factor):
        cells = zip(self.code.scale.__code__.co_freevars, self.code.scale.__closure__, strict=True)
        dict(cells)["factor"].cell_contents = factor

    @rule(slope=numbers)
    def reload_a_method(self, slope):
        """As IPython's autoreload does: the class stays, its functions are new."""
        text = f"def forward(self, x): return shift(scale(x)) * self.sign * {slope}"
        exec(text, namespace := vars(self.code))
        self.code.Part.forward = namespace.pop("forward")

    @rule(activation=st.sampled_from([nn.ELU, nn.ReLU, nn.Tanh]))
    def exchange_a_layer(self, activation):
        self.net.act = activation()

    @rule(
        cache=st.integers(0, 1),
        layer=st.sampled_from(["conv", "part", "act"]),
        chosen=st.permutations(range(FILES + 2)).flatmap(
            lambda order: st.integers(1, len(order)).map(lambda count: order[:count])
        ),
        pooling=st.sampled_from(["avg", "max"]),
    )
    def transform(self, cache, layer, chosen, pooling):
        time.sleep(0.025)  # until files are trusted by their dates
        items = [*map(str, self.paths), *self.arrays]
        X = [items[number] for number in chosen]

        def extract(cache):
            extractor = DeepFeatureExtractor(
                self.net,
                layer,
                preprocessing=self.code.prepare,
                pooling=pooling,
                norm=None,
                cache=cache,
                num_workers=0,
            )
            return extractor.transform(X)

        rows = extract(self.caches[cache])
        np.testing.assert_allclose(rows, extract(None), rtol=1e-4, atol=1e-5)


thorough = settings().max_examples > 100
TestChanges = Changes.TestCase
TestChanges.settings = settings(
    settings(),
    max_examples=20 if thorough else 8,
    stateful_step_count=500 if thorough else 30,
    deadline=None,
    # A failure is read from its last steps; to shorten hundreds of them takes many minutes.
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
)
