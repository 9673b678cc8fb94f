"""Knows which room of the package may import what, and that the door loads nothing heavy."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import deepfeat

PACKAGE = Path(__file__).parents[1] / "deepfeat"
MODULES = sorted(PACKAGE.rglob("*.py"))

FLOORS = {
    7: {"plotting", "distributed", "__main__"},
    6: {"__init__"},
    5: {"_classifier"},
    4: {"_categories", "_extractor"},
    3: {"_features", "_samples", "_training", "_networks"},
    2: {"_engine", "_freezing", "_inputs", "_labels", "_cache"},
    1: {"_images", "_backbones", "_heads", "_layers", "_store", "datasets"},
    0: {
        *("_archive", "_bundled", "_claims", "_decoding", "_files", "_fingerprint", "_optional"),
        *("_parameters", "_preprocessing", "_trace"),
    },
}
FLOOR_OF = {room: floor for floor, rooms in FLOORS.items() for room in rooms}
DOOR = "__init__"

# A guest uses what any user can, and, of the rooms, those alone that it has here: `_optional`
# tells which extra brings a package that not everybody has, which is what makes a room a guest; and
# a picture of an image is drawn by the code that reads the image, or it would show another one.
GUESTS = {
    "plotting": {"_optional", "_images"},
    "distributed": {"_optional"},
    "__main__": set(),
}

PUBLIC = {
    "CacheFormatError",
    "DeepFeatureExtractor",
    "FeatureCache",
    "FineTuneClassifier",
    "LayerNotFoundError",
    "__version__",
    "list_backbones",
    "list_layers",
    "predict_categories",
}

# What a room knows nothing of, as the packages that it would have to import.
STRANGERS = {
    "_images": {"torch", "torchvision"},
    "_decoding": {"torch", "torchvision"},
    "_cache": {"torch", "torchvision", "PIL"},
    "_claims": {"torch", "torchvision", "PIL"},
    "_store": {"torch", "torchvision", "PIL"},
    "_engine": {"sklearn"},
    "_freezing": {"sklearn", "PIL"},
    "_heads": {"sklearn", "PIL"},
    "_labels": {"torch", "torchvision", "PIL"},
    "_training": {"sklearn", "PIL"},
    "plotting": {"torch", "torchvision"},
}


class ArchitectureError(Exception):
    """A room imports what its floor does not allow."""


def room_of(path: Path) -> str:
    """Return the room of a file: a guest with many files has a folder of its own."""
    room = path.relative_to(PACKAGE).with_suffix("").parts[0]
    if path.parent != PACKAGE and room not in GUESTS:
        raise ArchitectureError(f"{room} is no guest, and has no folder")
    return room


def check_room(room: str, source: str, *, depth: int = 0) -> None:
    """Raise if the source of a room imports upwards, sideways or from a stranger.

    `depth` is that of its file in the room's folder: 0 where it has none.
    """
    if room not in FLOOR_OF:
        raise ArchitectureError(f"{room} stands on no floor")
    for package, target in imports_of(source, depth):
        if package in STRANGERS.get(room, ()):
            raise ArchitectureError(f"{room} knows nothing of {package}, but imports it")
        if package != "deepfeat":
            continue
        if room in GUESTS and target not in GUESTS[room] | {DOOR}:
            raise ArchitectureError(f"{room} is a guest: it imports deepfeat, not {target}")
        if FLOOR_OF[target] >= FLOOR_OF[room]:
            raise ArchitectureError(
                f"{room}, on floor {FLOOR_OF[room]}, imports {target}, on floor {FLOOR_OF[target]}"
            )


def imports_of(source: str, depth: int = 0) -> Iterator[tuple[str, str]]:
    """Yield the package of each import, and the room if the package is deepfeat.

    A relative import that does not leave the folder of a room is the room's own affair.
    """
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                paths = [alias.name for alias in names]
            case ast.ImportFrom(level=level) if 0 < level <= depth:
                continue
            case ast.ImportFrom(module=module, names=names, level=level):
                # `from . import _layers` may name a room, so the names belong to the path.
                start = ".".join(filter(None, ["deepfeat" if level else "", module]))
                paths = [f"{start}.{alias.name}" for alias in names]
            case _:
                continue
        for path in paths:
            package, *rest = path.split(".")
            yield package, rest[0] if rest and rest[0] in FLOOR_OF else DOOR


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_imports_go_strictly_down(path: Path) -> None:
    """Each room imports only rooms on the floors below its own, and no stranger."""
    depth = len(path.relative_to(PACKAGE).parts) - 1
    check_room(room_of(path), path.read_text(encoding="utf-8"), depth=depth)


@pytest.mark.parametrize(
    ("room", "planted"),
    [
        pytest.param("_layers", "from ._engine import read", id="up"),
        pytest.param("_layers", "from ._images import Record", id="sideways"),
        pytest.param("_extractor", "from . import _classifier", id="sideways-from-package"),
        pytest.param("_engine", "import deepfeat._extractor", id="up-absolute"),
        pytest.param("_engine", "from deepfeat import list_layers", id="through-the-door"),
        pytest.param("_backbones", "def f():\n    from ._engine import g", id="inside-a-function"),
        pytest.param("plotting", "from deepfeat._layers import resolve", id="guest-in-a-room"),
        pytest.param("plotting", "from .._engine import pool", id="guest-in-a-room-from-folder"),
        pytest.param("plotting", "import deepfeat.distributed", id="guest-at-a-guest"),
        pytest.param("distributed", "from ._images import Record", id="guest-of-another-room"),
        pytest.param("_images", "def f():\n    import torch.nn", id="images-know-no-torch"),
        pytest.param("_cache", "from torch import Tensor", id="cache-knows-no-torch"),
        pytest.param("_cache", "from PIL import Image", id="cache-knows-no-images"),
        pytest.param("_utils", "", id="on-no-floor"),
    ],
)
def test_a_planted_import_is_caught(room: str, planted: str) -> None:
    """A room with one wrong import added fails the check that its own text passes."""
    path = PACKAGE / f"{room}.py"
    source = path.read_text(encoding="utf-8") if path.exists() else ""
    with pytest.raises(ArchitectureError, match=room):
        check_room(room, f"{source}\n{planted}\n")


def test_a_guest_may_come_through_the_door() -> None:
    """Plotting and its like use what any user can import, and the rooms that are open to them."""
    check_room("plotting", "import deepfeat\nfrom deepfeat import list_layers")
    check_room("plotting", "from .._images import as_records\nfrom ._axes import find", depth=1)


def test_only_a_guest_has_a_folder() -> None:
    """A room is one file, so that what outgrows it is cut along a seam between rooms."""
    assert room_of(PACKAGE / "plotting" / "_axes.py") == "plotting"
    with pytest.raises(ArchitectureError, match="_engine"):
        room_of(PACKAGE / "_engine" / "pooling.py")


def test_the_door_loads_nothing_heavy(tmp_path: Path) -> None:
    """`import deepfeat` shows the public names without loading torch, torchvision or sklearn."""
    code = "import json, sys, deepfeat; print(json.dumps([dir(deepfeat), sorted(sys.modules)]))"
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=tmp_path,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    names, loaded = json.loads(run.stdout)
    assert set(names) == PUBLIC
    assert not {"torch", "torchvision", "sklearn"} & set(loaded)


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_every_name_at_the_door_opens(name: str) -> None:
    """What `dir(deepfeat)` shows can be had."""
    assert getattr(deepfeat, name) is not None
