"""Folders of images, and a small copy of 15-Scene."""

import csv
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from deepfeat.datasets import _scene15

# As published by Lazebnik, Schmid and Ponce, in the order of the folder names.
SCENES = {
    "CALsuburb": 241,
    "MITcoast": 360,
    "MITforest": 328,
    "MIThighway": 260,
    "MITinsidecity": 308,
    "MITmountain": 374,
    "MITopencountry": 410,
    "MITstreet": 292,
    "MITtallbuilding": 356,
    "PARoffice": 215,
    "bedroom": 216,
    "industrial": 311,
    "kitchen": 210,
    "livingroom": 289,
    "store": 315,
}
# Also all different, and in the same order, but faster to create.
FEW = {name: 13 + sorted(SCENES.values()).index(count) for name, count in SCENES.items()}


@pytest.fixture(scope="session")
def published() -> dict[str, int]:
    """The classes of 15-Scene and their sizes."""
    return SCENES


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Replace the published dataset by one of a few hundred images."""
    monkeypatch.setattr(_scene15, "_SCENES", FEW)
    return FEW


@pytest.fixture(scope="session")
def touch() -> Callable[..., Path]:
    """Create empty files and their folders."""

    def touch(root: Path, *names: str) -> Path:
        for name in names:
            path = root / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        return root

    return touch


@pytest.fixture(scope="session")
def names_in() -> Callable[[Path, np.ndarray], list[str]]:
    """Return paths relative to a folder."""
    return lambda root, paths: [Path(path).relative_to(root).as_posix() for path in paths]


@pytest.fixture(scope="session")
def scene_files() -> Callable[..., list[str]]:
    """Return the names of the files of a dataset, by default the small one."""

    def scene_files(rename: Callable[[str], str] = str, scenes: dict[str, int] = FEW) -> list[str]:
        return [
            f"{rename(name)}/image_{number:04}.jpg"
            for name, count in scenes.items()
            for number in range(1, count + 1)
        ]

    return scene_files


@pytest.fixture(scope="session")
def is_training() -> Callable[[str], bool]:
    """A split with 5 training images per class that the library would not draw."""
    return lambda file: 7 < int(file[-8:-4]) <= 12


@pytest.fixture
def own_root(
    few: dict[str, int],
    tmp_path: Path,
    touch: Callable[..., Path],
    scene_files: Callable[..., list[str]],
) -> Path:
    """A folder with the small dataset, which a test may change."""
    return touch(tmp_path / "own", *scene_files())


@pytest.fixture(scope="session")
def write_split(is_training: Callable[[str], bool]) -> Callable[[Path, list[str]], None]:
    """Write a split file."""

    def write_split(path: Path, files: list[str]) -> None:
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["split", "class", "file"])
            writer.writerows(
                ["train" if is_training(name) else "test", *name.split("/")] for name in files
            )

    return write_split
