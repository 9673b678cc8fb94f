"""Tests of the README: its code runs as it is written, but for the network and the photographs."""

import re
import shutil
from pathlib import Path

import pytest

import deepfeat
from deepfeat import DeepFeatureExtractor, FineTuneClassifier

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
LINES = [line for line in re.findall(r"`([^`\n]+)`", README) if ".f" in line and "(" in line]


def bundle(code):
    """Let code run without a download."""
    return code.replace("resnet50", "resnet10_slim")


@pytest.fixture
def in_a_folder(tmp_path, monkeypatch):
    """A folder with photographs, written by the README's own code."""
    monkeypatch.chdir(tmp_path)
    (write,) = [block for block in BLOCKS if "write_sample_folder" in block]
    exec(write, {})
    shutil.copy("photos/sky/05.png", "new.jpg")


@pytest.fixture
def photos():
    return deepfeat.datasets.load_image_folder("photos")


def test_the_first_piece_of_code_classifies_a_folder(in_a_folder, capsys):
    """It prints an accuracy, the best candidate and a class name."""
    exec(bundle(BLOCKS[0]), {})
    accuracy, _, predicted = capsys.readouterr().out.partition("\n")
    assert re.match(r"9\d\.\d% in five folds, with \{.*'stage\d'", accuracy)
    assert predicted.strip() == "['sky']"


@pytest.mark.parametrize("number", range(2))
def test_each_line_of_code_in_the_list_runs(number, in_a_folder, photos):
    """Fine-tuning, with fewer epochs, and similar photographs."""
    (line,) = LINES[number : number + 1]

    class Shorter(FineTuneClassifier):
        def fit(self, X, y):
            self.set_params(max_epochs=1, head_epochs=0)
            return super().fit(X, y)

    variables = {
        "FineTuneClassifier": Shorter,
        "NeighborsDisplay": deepfeat.plotting.NeighborsDisplay,
        "extractor": DeepFeatureExtractor("resnet10_slim"),
        "photos": photos,
        "labels": photos.target_names[photos.target],
    }
    assert eval(bundle(line), variables) is not None


def test_the_list_has_no_other_lines():
    """A new line needs a test."""
    assert [line.partition("(")[0] for line in LINES] == [
        "FineTuneClassifier",
        "NeighborsDisplay.from_extractor",
    ]
