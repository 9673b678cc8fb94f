"""Tests of weights files: formats, what is refused, and one version told from another."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from named_networks import NAME, exactly, load, random_state
from safetensors.torch import save_file
from torch import Tensor, nn

from deepfeat._backbones.find import find_backbone

# Formats ----------------------------------------------------------------------------------------


def wrap(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


FORMATS: dict[str, Callable[[dict[str, Tensor], Path], Path]] = {}


def file_format(write: Callable[[dict[str, Tensor], Path], Any]) -> None:
    """Add a way to write a state dict to a file in a folder, which returns nothing."""
    suffix = "safetensors" if "safetensors" in write.__name__ else "pth"

    def write_file(state: dict[str, Tensor], folder: Path) -> Path:
        path = folder / f"weights.{suffix}"
        write(state, path)
        return path

    FORMATS[write.__name__] = write_file


@file_format
def plain(state: dict[str, Tensor], path: Path) -> None:
    torch.save(state, path)


@file_format
def legacy(state: dict[str, Tensor], path: Path) -> None:
    torch.save(state, path, _use_new_zipfile_serialization=False)


@file_format
def safetensors(state: dict[str, Tensor], path: Path) -> None:
    save_file(state, path)


@file_format
def safetensors_with_prefix(state: dict[str, Tensor], path: Path) -> None:
    save_file(wrap(state, "module."), path)


@file_format
def prefix_of_data_parallel(state: dict[str, Tensor], path: Path) -> None:
    torch.save(wrap(state, "module."), path)


@file_format
def prefix_inside(state: dict[str, Tensor], path: Path) -> None:
    """The features alone were parallel, as in torch's example for AlexNet and VGG."""
    torch.save(
        {key.replace("features.", "features.module."): value for key, value in state.items()}, path
    )


@file_format
def prefix_of_compile(state: dict[str, Tensor], path: Path) -> None:
    torch.save(wrap(state, "module._orig_mod."), path)


@file_format
def checkpoint(state: dict[str, Tensor], path: Path) -> None:
    content = {"epoch": 90, "arch": "x", "best": 0.5, "state_dict": wrap(state, "module.")}
    torch.save(content, path)


@file_format
def checkpoint_of_torchvision(state: dict[str, Tensor], path: Path) -> None:
    torch.save({"model": state, "optimizer": {"param_groups": []}}, path)


@file_format
def parameters(state: dict[str, Tensor], path: Path) -> None:
    torch.save({key: nn.Parameter(value) for key, value in state.items()}, path)


@pytest.mark.parametrize("write", FORMATS.values(), ids=FORMATS)
def test_a_file_is_loaded_bit_for_bit(
    write: Callable[..., Path], state: dict[str, Tensor], tmp_path: Path
) -> None:
    """Whatever the format of a state dict, the network has its weights and is ready to read."""
    path = write(state, tmp_path)
    for weights in (path, str(path)):
        module = load(NAME, weights)
        exactly(module.state_dict(), state)
        assert not module.training
        assert not [key for key, weight in module.named_parameters() if weight.requires_grad]
        assert module.features[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_a_path_may_have_any_suffix(state: dict[str, Tensor], tmp_path: Path) -> None:
    """A path object is a path, however it ends; of strings the suffix tells."""
    path = tmp_path / "weights.bin"
    torch.save(state, path)
    exactly(load(NAME, path).state_dict(), state)
    with pytest.raises(ValueError, match=r"no weights '.*weights\.bin'"):
        load(NAME, str(path))


def test_a_float16_file_is_computed_in_float32(state: dict[str, Tensor], tmp_path: Path) -> None:
    """Weights kept in half precision are widened, not the images narrowed."""
    half = {key: value.half() for key, value in state.items()}
    torch.save(half, tmp_path / "half.pth")
    module = load(NAME, tmp_path / "half.pth")
    assert {value.dtype for value in module.state_dict().values()} == {torch.float32}
    exactly(module.state_dict(), {key: value.float() for key, value in half.items()})


def test_mnasnet_loads_from_every_format(tmp_path: Path) -> None:
    """MNASNet insists on a version, which a safetensors file does not have."""
    state = random_state("mnasnet0_5")
    for write in (FORMATS["plain"], FORMATS["safetensors"], FORMATS["prefix_of_data_parallel"]):
        exactly(load("mnasnet0_5", write(state, tmp_path)).state_dict(), state)


# Files that are refused -------------------------------------------------------------------------


class Bomb:
    """Leaves a trace of itself when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("legacy", [True, False])
def test_a_file_with_code_is_refused(
    legacy: bool, state: dict[str, Tensor], tmp_path: Path
) -> None:
    """Code in a pickle is not run; the error says why the file is not loaded."""
    path, trace = tmp_path / "evil.pth", tmp_path / "trace"
    content = {"state_dict": state, "extra": Bomb(trace)}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ValueError, match=r"evil\.pth is damaged or holds more than tensors"):
        load(NAME, path)
    assert not trace.exists()
    torch.load(path, weights_only=False)  # the file is not harmless
    assert trace.exists()


def test_a_whole_module_is_refused(tmp_path: Path) -> None:
    """A pickled module is code, and no state dict."""
    torch.save(nn.Linear(2, 2), tmp_path / "module.pth")
    with pytest.raises(ValueError, match=r"save module\.state_dict\(\) with torch\.save"):
        find_backbone(NAME, tmp_path / "module.pth")


@pytest.mark.parametrize("name", ["plain", "legacy", "safetensors"])
@pytest.mark.parametrize("part", [0, 1, 10, 100, 5000, -5000, -10])
def test_a_damaged_file_is_refused(
    name: str, part: int, state: dict[str, Tensor], tmp_path: Path
) -> None:
    """A file that was cut off anywhere has an error that names it."""
    path = FORMATS[name](state, tmp_path)
    path.write_bytes(path.read_bytes()[:part])
    with pytest.raises(ValueError, match=rf"{path.name} is (damaged|not a safetensors file)"):
        load(NAME, path)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@pytest.mark.parametrize(
    "content", [b"<!DOCTYPE html>", b"weights\n" * 999, bytes(999), b"\x80\x02}q\x00."]
)
def test_another_file_is_refused(content: bytes, suffix: str, tmp_path: Path) -> None:
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
def test_what_is_no_state_dict_is_refused(content: Any, tmp_path: Path) -> None:
    """Tensors must come under the names of parameters."""
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth does not hold a state dict"):
        find_backbone(NAME, tmp_path / "other.pth")


# Versions ---------------------------------------------------------------------------------------


def test_a_file_that_changed_is_loaded_anew(state: dict[str, Tensor], tmp_path: Path) -> None:
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
