"""The architecture: the floors that imports respect, and the public names, which load lazily."""

import doctest
import importlib
import importlib.util
import inspect
import json
import os
import pickle
import pickletools
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import deepfeat
import deepfeat.plotting

ROOT = Path(__file__).parents[1]

PUBLIC = {
    "CacheFormatError",
    "DeepFeatureExtractor",
    "FeatureCache",
    "FineTuneClassifier",
    "ImageError",
    "LayerNotFoundError",
    "__version__",
    "datasets",
    "list_backbones",
    "list_layers",
    "plotting",
    "predict_categories",
}


@pytest.fixture
def copy_of_the_package(tmp_path):
    """A copy of the package and its contracts, in which to plant an import."""
    caches = shutil.ignore_patterns("__pycache__", "*.safetensors")
    shutil.copytree(ROOT / "deepfeat", tmp_path / "deepfeat", ignore=caches)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def lint_imports(folder):
    """Check the contracts of pyproject.toml for the package in a folder."""
    command = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports())"
    return subprocess.run(
        [sys.executable, "-c", command],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        stdout=subprocess.PIPE,
        text=True,
    )


def test_imports_respect_the_floors(copy_of_the_package):
    """Each room imports only from the floors below it, also inside functions."""
    run = lint_imports(copy_of_the_package)
    assert run.returncode == 0, run.stdout


@pytest.mark.parametrize(
    ("file", "planted"),
    [
        pytest.param("_layers/index.py", "from .._extraction import rows", id="up"),
        pytest.param("_layers/index.py", "from .._images import records", id="sideways"),
        pytest.param(
            "_engine/batches.py", "def f():\n    from .._layers import index", id="in-a-function"
        ),
        pytest.param("_extraction/rows.py", "import deepfeat._finetuning", id="up-again"),
        pytest.param("plotting/_axes.py", "from .._layers import index", id="guest-in-a-room"),
        pytest.param("_images/decoding.py", "def f():\n    import torch.nn", id="images-no-torch"),
        pytest.param("_cache/disk.py", "from PIL import Image", id="rows-no-images"),
        pytest.param("_utils.py", "", id="a-room-on-no-floor"),
    ],
)
def test_a_planted_import_is_caught(file, planted, copy_of_the_package):
    """An import that a contract forbids is reported with its module."""
    path = copy_of_the_package / "deepfeat" / file
    with path.open("a", encoding="utf-8") as stream:
        stream.write(f"\n{planted}\n")
    run = lint_imports(copy_of_the_package)
    assert run.returncode == 1
    assert f"deepfeat.{file.removesuffix('.py').replace('/', '.')}" in run.stdout


@pytest.fixture(scope="module")
def draw_rooms():
    """The script that draws the picture of the design page."""
    spec = importlib.util.spec_from_file_location("draw_rooms", ROOT / "docs/draw_rooms.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


def test_the_picture_of_the_design_is_that_of_the_code(draw_rooms):
    """If this fails, run docs/draw_rooms.py."""
    assert draw_rooms.PICTURE.read_text(encoding="utf-8") == draw_rooms.draw()


def test_the_design_names_every_file(draw_rooms):
    """Its table has one row per room, which names the files of that room."""
    text = (ROOT / "docs/design.md").read_text(encoding="utf-8")
    table = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", text, re.M))
    rooms = {room: files for room, files in draw_rooms.find_rooms().items() if files}
    assert table.keys() == rooms.keys()
    named = set(re.findall(r"`(\w+)`", table["plotting"]))
    assert named < set(rooms["plotting"])
    displays = set(rooms.pop("plotting")) - named
    assert len(displays) == len([name for name in deepfeat.plotting.__all__ if "Display" in name])
    for room, files in rooms.items():
        assert set(re.findall(r"`(\w+)`", table[room])) == set(files)


def test_importing_the_package_loads_nothing_heavy(tmp_path):
    """`import deepfeat` provides the public names without loading torch, torchvision or sklearn."""
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
def test_every_public_name_can_be_imported(name):
    """Each name in `dir(deepfeat)` is an attribute."""
    assert getattr(deepfeat, name) is not None


@pytest.mark.parametrize("package", ["deepfeat", "deepfeat.plotting"])
def test_public_classes_belong_to_a_public_module(package):
    """A pickle that only names `deepfeat` can be loaded after a class has moved."""
    module = importlib.import_module(package)
    values = (getattr(module, name) for name in module.__all__)
    classes = [value for value in values if inspect.isclass(value)]
    assert len(classes) >= 5
    assert {value.__module__ for value in classes} == {package}


@pytest.mark.parametrize("make", [deepfeat.DeepFeatureExtractor, deepfeat.FineTuneClassifier])
def test_a_pickle_of_parameters_names_no_room(make):
    """It contains the public class and plain values."""
    words = [word for _, word, _ in pickletools.genops(pickle.dumps(make())) if word]
    assert "deepfeat" in words
    assert not [word for word in words if isinstance(word, str) and word.startswith("deepfeat._")]


@pytest.mark.parametrize("name", deepfeat.__all__)
def test_no_example_of_a_public_class_is_lost(name):
    """doctest skips classes whose `__module__` is another module, unless `__test__` has them."""
    finder = doctest.DocTestFinder()
    tests = finder.find(getattr(deepfeat, name), name, module=False)
    written = [test.docstring for test in tests if test.examples]
    room = importlib.import_module(f"deepfeat.{deepfeat._ROOM_OF[name]}")
    found = [test.docstring for test in finder.find(room) if test.examples]
    assert [docstring for docstring in written if found.count(docstring) != 1] == []
