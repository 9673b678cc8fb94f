"""Tests of weights files: formats, what is refused, and one version told from another."""

import functools
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.testing import assert_close

from deepfeat._backbones.find import find_backbone

exactly = functools.partial(assert_close, rtol=0, atol=0)
NAME = "squeezenet1_1"

# Formats ----------------------------------------------------------------------------------------


def wrap(state, prefix):
    return {prefix + key: value for key, value in state.items()}


FORMATS: dict[str, Callable[[dict[str, Tensor], Path], Path]] = {}


def file_format(write):
    """Add a way to write a state dict to a file in a folder, which returns nothing."""
    suffix = "safetensors" if "safetensors" in write.__name__ else "pth"

    def write_file(state, folder):
        path = folder / f"weights.{suffix}"
        write(state, path)
        return path

    FORMATS[write.__name__] = write_file


@file_format
def plain(state, path):
    torch.save(state, path)


@file_format
def legacy(state, path):
    torch.save(state, path, _use_new_zipfile_serialization=False)


@file_format
def safetensors(state, path):
    save_file(state, path)


@file_format
def safetensors_with_prefix(state, path):
    save_file(wrap(state, "module."), path)


@file_format
def prefix_of_data_parallel(state, path):
    torch.save(wrap(state, "module."), path)


@file_format
def prefix_inside(state, path):
    """The features alone were parallel, as in torch's example for AlexNet and VGG."""
    torch.save(
        {key.replace("features.", "features.module."): value for key, value in state.items()}, path
    )


@file_format
def prefix_of_compile(state, path):
    torch.save(wrap(state, "module._orig_mod."), path)


@file_format
def checkpoint(state, path):
    content = {"epoch": 90, "arch": "x", "best": 0.5, "state_dict": wrap(state, "module.")}
    torch.save(content, path)


@file_format
def checkpoint_of_torchvision(state, path):
    torch.save({"model": state, "optimizer": {"param_groups": []}}, path)


@file_format
def parameters(state, path):
    torch.save({key: nn.Parameter(value) for key, value in state.items()}, path)


@pytest.mark.parametrize("write", FORMATS.values(), ids=FORMATS)
def test_a_file_is_loaded_bit_for_bit(
    write,
    state,
    tmp_path,
    load,
):
    """Whatever the format of a state dict, the network has its weights and is ready to read."""
    path = write(state, tmp_path)
    for weights in (path, str(path)):
        module = load(NAME, weights)
        exactly(module.state_dict(), state)
        assert not module.training
        assert not [key for key, weight in module.named_parameters() if weight.requires_grad]
        assert module.features[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_a_path_may_have_any_suffix(state, tmp_path, load):
    """A path object is a path, however it ends; of strings the suffix tells."""
    path = tmp_path / "weights.bin"
    torch.save(state, path)
    exactly(load(NAME, path).state_dict(), state)
    with pytest.raises(ValueError, match=r"no weights '.*weights\.bin'"):
        load(NAME, str(path))


def test_a_float16_file_is_computed_in_float32(state, tmp_path, load):
    """Weights kept in half precision are widened, not the images narrowed."""
    half = {key: value.half() for key, value in state.items()}
    torch.save(half, tmp_path / "half.pth")
    module = load(NAME, tmp_path / "half.pth")
    assert {value.dtype for value in module.state_dict().values()} == {torch.float32}
    exactly(module.state_dict(), {key: value.float() for key, value in half.items()})


def test_mnasnet_loads_from_every_format(tmp_path, random_state, load):
    """MNASNet insists on a version, which a safetensors file does not have."""
    state = random_state("mnasnet0_5")
    for write in (FORMATS["plain"], FORMATS["safetensors"], FORMATS["prefix_of_data_parallel"]):
        exactly(load("mnasnet0_5", write(state, tmp_path)).state_dict(), state)


# Files that are refused -------------------------------------------------------------------------


class Bomb:
    """Leaves a trace of itself when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("legacy", [True, False])
def test_a_file_with_code_is_refused(legacy, state, tmp_path, load):
    """Code in a pickle is not run; the error says why the file is not loaded."""
    path, trace = tmp_path / "evil.pth", tmp_path / "trace"
    content = {"state_dict": state, "extra": Bomb(trace)}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=r"evil\.pth is damaged or holds more than tensors"):
        load(NAME, path)
    assert not trace.exists()
    torch.load(path, weights_only=False)  # the file is not harmless
    assert trace.exists()


def test_a_whole_module_is_refused(tmp_path):
    """A pickled module is code, and no state dict."""
    torch.save(nn.Linear(2, 2), tmp_path / "module.pth")
    with pytest.raises(ValueError, match=r"save module\.state_dict\(\) with torch\.save"):
        find_backbone(NAME, tmp_path / "module.pth")


@pytest.mark.parametrize("name", ["plain", "legacy", "safetensors"])
@pytest.mark.parametrize("part", [0, 1, 10, 100, 5000, -5000, -10])
def test_a_damaged_file_is_refused(name, part, state, tmp_path, load):
    """A file that was cut off anywhere has an error that names it."""
    path = FORMATS[name](state, tmp_path)
    path.write_bytes(path.read_bytes()[:part])
    with pytest.raises(ValueError, match=rf"{path.name} is (damaged|not a safetensors file)"):
        load(NAME, path)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize(
    "content", [b"<!DOCTYPE html>", b"weights\n" * 999, bytes(999), b"\x80\x02}q\x00."]
)
def test_another_file_is_refused(content, suffix, tmp_path, load):
    """A file of another kind under the name of weights has an error that names it."""
    path = tmp_path / f"weights.{suffix}"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"weights\.{suffix} "):
        load(NAME, path)


@pytest.mark.parametrize(
    "content",
    [
        [1, 2],
        torch.zeros(3),
        {"weights": [torch.zeros(3)]},
        {0: torch.zeros(3)},
        {"state_dict": {"model": 1}},
    ],
)
def test_what_is_no_state_dict_is_refused(content, tmp_path):
    """Tensors must come under the names of parameters."""
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth does not hold a state dict"):
        find_backbone(NAME, tmp_path / "other.pth")


# Versions ---------------------------------------------------------------------------------------


def test_a_file_that_changed_is_loaded_anew(state, tmp_path, load):
    """New content under an old name is noticed; the fingerprint changes with it."""
    path = tmp_path / "weights.pth"
    torch.save(state, path)
    old, old_print = load(NAME, path), find_backbone(NAME, path).fingerprint()
    changed = {key: value + 1 for key, value in state.items()}
    time.sleep(0.02)  # past the clock tick of file systems
    torch.save(changed, path)
    exactly(load(NAME, path).state_dict(), changed)
    exactly(old.state_dict(), state)
    assert find_backbone(NAME, path).fingerprint() != old_print
