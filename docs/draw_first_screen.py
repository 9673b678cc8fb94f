"""The picture of the README: photographs, a search over layers and C, and a confusion matrix.

It runs the README's first piece of code with the network and the photographs that come with
deepfeat. `python docs/draw_first_screen.py` draws `docs/_static/first_screen.png` again.
"""

import contextlib
import re
import shutil
import sys
import tempfile
import warnings
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from sklearn.metrics import ConfusionMatrixDisplay
from sklearn.model_selection import cross_val_predict

from deepfeat.datasets import write_sample_folder
from deepfeat.plotting import LayerGridDisplay

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs/_static/first_screen.png"


def read_code():
    """Return the first piece of Python in the README, for the network that needs no download."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return re.search(r"```python\n(.*?)```", text, re.DOTALL)[1].replace(
        "resnet50", "resnet10_slim"
    )


def run_code():
    """Run the code in a folder with photographs; return its variables."""
    variables = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        write_sample_folder("photos")
        shutil.copy("photos/trees/20.png", "new.jpg")
        exec(compile(read_code(), "README.md", "exec"), variables)
        estimator, photos = variables["search"].best_estimator_, variables["photos"]
        variables["predicted"] = cross_val_predict(estimator, photos.data, variables["labels"])
        variables["pictures"] = [np.asarray(Image.open(path)) for path in photos.data]
    return variables


def draw(variables):
    """Draw the three parts side by side; return the figure."""
    figure = plt.figure(figsize=(11, 3.9), layout="constrained")
    left, middle, right = figure.subfigures(1, 3, width_ratios=[4, 4, 4.2])
    photos, labels = variables["photos"], variables["labels"]
    rows = left.subplots(len(photos.target_names), 4)
    for row, name in zip(rows, photos.target_names, strict=True):
        found = np.flatnonzero(labels == name)
        for axis, index in zip(row, found[:: len(found) // 4], strict=False):
            axis.imshow(variables["pictures"][index])
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        row[0].set_ylabel(name, rotation=0, ha="right", va="center")
    left.suptitle(f"{len(labels)} photographs")
    LayerGridDisplay.from_search(variables["search"], ax=middle.subplots())
    middle.suptitle("accuracy, five folds")
    ConfusionMatrixDisplay.from_predictions(
        labels, variables["predicted"], ax=right.subplots(), cmap="Blues", colorbar=False
    )
    right.axes[0].tick_params(axis="x", rotation=30)
    right.suptitle("the best candidate, five folds")
    return figure


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    path = Path(sys.argv[1] if len(sys.argv) > 1 else PICTURE).resolve()
    draw(run_code()).savefig(path, dpi=130)
