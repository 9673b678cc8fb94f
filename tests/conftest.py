"""How all tests run: on how many examples, and without a network."""

import io
import runpy
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

from deepfeat import FeatureCache

# Benchmarks are scripts; collecting doctests would import them.
collect_ignore = ["benchmarks"]

settings.register_profile("quick", derandomize=True, deadline=None, max_examples=25)
settings.register_profile("thorough", deadline=None, max_examples=1000, print_blob=True)
settings.load_profile("quick")


@pytest.fixture(autouse=True)
def no_network(request, monkeypatch):
    """Lead downloads nowhere, unless the test is marked `network`."""
    if request.node.get_closest_marker("network") is None:
        monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
        monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
        monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")


@pytest.fixture
def pillow_resizes(monkeypatch):
    """Resize with Pillow, as without AVX2, so that other programs' pixels can be compared with."""
    monkeypatch.setattr("deepfeat._backbones.preprocessing._has_native_resize", lambda: False)
    # In that of the process there may be rows of pixels that torch has resized.
    monkeypatch.setattr("deepfeat._extraction.extractor.MEMORY", FeatureCache())


@pytest.fixture(params=["Pillow", "torch"])
def resizer(request):
    """Resize with Pillow, and with torch where it has the kernels; a test runs once for each."""
    if request.param == "Pillow":
        request.getfixturevalue("pillow_resizes")
    return request.param


@pytest.fixture(scope="session")
def prepare_as_described():
    """Prepare a picture as the program of the docs does, which has read a description."""
    program = Path(__file__).parents[1] / "examples/deployment/predict.py"
    prepare = runpy.run_path(str(program))["prepare"]

    def prepare_as_described(image, described):
        file = io.BytesIO()
        image.save(file, "PNG")
        return prepare(file, described)

    return prepare_as_described


@pytest.fixture(scope="session")
def scene_labels():
    """The classes of `scene_paths`."""
    return np.array(["flat", "striped"] * 6)


@pytest.fixture(scope="session")
def scene_paths(tmp_path_factory, scene_labels):
    """Files of twelve small pictures, no two alike: grey and colour, JPEG and PNG, of any sides."""
    folder = tmp_path_factory.mktemp("scenes")
    rng = np.random.default_rng(0)
    paths = []
    for number, label in enumerate(scene_labels):
        height, width = rng.integers(40, 80, 2)
        pixels = rng.integers(0, 60, (height, width, 3)) + rng.integers(50, 145, 3)
        if label == "striped":
            pixels[:, np.arange(width) // 8 % 2 == 0] = rng.integers(0, 20, 3)
        image = Image.fromarray(pixels.astype(np.uint8))
        paths.append(str(folder / f"{number:02}.{'jpg' if number % 3 else 'png'}"))
        (image.convert("L") if number % 4 == 3 else image).save(paths[-1])
    return paths


def pytest_terminal_summary(terminalreporter):
    """Print the figures that tests measured, in whichever process that was."""
    for report in terminalreporter.getreports("passed") + terminalreporter.getreports("failed"):
        for name, value in report.user_properties:
            if name == "figure":
                terminalreporter.write_line(value)
