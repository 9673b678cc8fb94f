"""Tests of the scripts that reproduce the report: their tables against explicit pipelines."""

import csv
import importlib
import itertools
import os
import runpy
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from PIL import Image
from sklearn.pipeline import make_pipeline
from sklearn.svm import LinearSVC
from torchvision import models

from deepfeat import DeepFeatureExtractor, FineTuneClassifier
from deepfeat.datasets import _scene15 as datasets

SCRIPTS = Path(__file__).parents[1] / "examples/report"
NET = "resnet10_slim"
QUICK = Path("report-quick")  # where quick trials write, in the current folder
NOTE = "quick trial: the results are meaningless"
CLASSES = ["bright", "dark", "soft"]
Rows = list[dict[str, str]]
Run = Callable[..., Rows]


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Class folders of twelve small images each, more than --quick uses."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for label, high in {"dark": 200, "bright": 256, "soft": 230}.items():
        (root / label).mkdir()
        for number in range(12):
            pixels = rng.integers(0, high, (40, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / label / f"{number:02}.png")
    return root


@pytest.fixture
def scenes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Class folders of a smaller dataset in place of 15-Scene, with its fixed split."""
    root = tmp_path / "scenes"
    counts = {"sea": 103, "sky": 104}
    split = ["split,class,file"]
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            grey = 40 * (name == "sky") + number
            Image.new("L", (9, 9), grey).save(root / name / f"{number}.png")
            split.append(f"{'test' if number >= 100 else 'train'},{name},{number}.png")
    (tmp_path / "scene15_split.csv").write_text("\n".join(split))
    monkeypatch.setattr(datasets, "_SCENES", counts)
    return root


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The parts that the scripts share."""
    monkeypatch.syspath_prepend(SCRIPTS)
    monkeypatch.delitem(sys.modules, "_report", raising=False)
    with mpl.rc_context(), plt.ioff():
        mpl.use("agg")
        yield importlib.import_module("_report")
    plt.close("all")


@pytest.fixture
def run(report: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a report script and read the table that it writes; `names` are its globals."""

    def run(script: str, *arguments: object) -> Rows:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
        run.names = runpy.run_path(str(SCRIPTS / f"{script}.py"), run_name="__main__")
        args = run.names["args"]
        return read(args.out / f"{script}{'-quick' if args.quick else ''}.csv")

    return run


def read(table: Path) -> Rows:
    """Read a table that a script has written."""
    with table.open(newline="") as file:
        return list(csv.DictReader(file))


def few(photos: Path) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Split as --quick does: ten images per class, every other one for training."""
    folders = sorted(path for path in photos.iterdir())
    paths = [[str(path) for path in sorted(folder.iterdir())[:10]] for folder in folders]
    labels = np.repeat([folder.name for folder in folders], 5)
    train = np.concatenate([images[::2] for images in paths])
    test = np.concatenate([images[1::2] for images in paths])
    return train, labels, test, labels


def figures(out: Path) -> set[str]:
    """Return the names of the figures in a folder, none of which may be blank."""
    for path in out.glob("*.png"):
        with Image.open(path) as image:
            assert np.ptp(np.asarray(image.convert("L"))) > 100, path
        assert is_marked(path) == path.stem.endswith("-quick"), path
    return {path.name for path in out.glob("*.png")}


def is_marked(figure: Path) -> bool:
    """Tell whether the red of the note on quick trials is at the top of a figure."""
    with Image.open(figure) as image:
        top = np.asarray(image.convert("RGB"))[:60]
    return np.count_nonzero((top == (178, 34, 34)).all(axis=-1)) > 5000


def test_table3_is_that_of_an_explicit_pipeline(run: Run, photos: Path) -> None:
    """It has the report's SVM on the layer before the scores, next to the report's results."""
    rows = run("table3", "--quick", "--data", photos)
    X, y, X_test, y_test = few(photos)
    extractor = DeepFeatureExtractor(NET, "avgpool", image_size=96)
    pipe = make_pipeline(extractor, LinearSVC(C=1, random_state=0)).fit(X, y)
    assert list(run.names["pipe"].classes_) == CLASSES
    accuracy = f"{100 * pipe.score(X_test, y_test):.2f}"
    assert rows[0] == {
        "backbone": NET,
        "layer": "avgpool",
        "accuracy %": accuracy,
        "report %": "",
    }
    assert [(row["backbone"], row["layer"], row["report %"]) for row in rows[1:]] == [
        ("alexnet", "relu7", "87.14"),
        ("vgg16", "relu7", "88.81"),
        ("vgg19", "relu7", "88.91"),
        ("resnet34", "avgpool", "90.52"),
        ("resnet50", "avgpool", "91.02"),
        ("resnet152", "avgpool", "92.26"),
    ]
    assert {row["accuracy %"] for row in rows[1:]} == {""}
    assert figures(QUICK) == {"table3-quick.png"}


def test_given_weights_are_used(run: Run, photos: Path, tmp_path: Path) -> None:
    """A network of the report has a single row, with our accuracy and the report's."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        torch.save(models.alexnet().state_dict(), tmp_path / "net=1.pth")
    weights = tmp_path / "net=1.pth"
    given = run(
        *("table3", "--quick", "--data", photos, "--backbones", "alexnet"),
        *("--weights", f"alexnet={weights}"),
    )
    X, y, X_test, y_test = few(photos)
    extractor = DeepFeatureExtractor("alexnet", weights=weights, image_size=96)
    pipe = make_pipeline(extractor, LinearSVC(C=1, random_state=0)).fit(X, y)
    assert given[0]["accuracy %"] == f"{100 * pipe.score(X_test, y_test):.2f}"
    assert given[0]["report %"] == "87.14"
    assert [row["backbone"] for row in given].count("alexnet") == 1


@pytest.mark.filterwarnings("ignore:Liblinear failed to converge")
def test_tables_1_and_2_are_those_of_explicit_pipelines(run: Run, photos: Path) -> None:
    """Cells are checked, and the best of each row next to the report's result."""
    best = run("table1_2", "--quick", "--data", photos, "--backbones", NET)
    assert set(run.names["y"]) == set(CLASSES)
    X, y, X_test, y_test = few(photos)
    for table, norm in {"1": None, "2": "l2"}.items():
        rows = read(QUICK / f"table{table}_{NET}-quick.csv")
        assert [row["layer"] for row in rows] == ["stage4", "stage5", "fc"]
        assert len(rows[0]) == 1 + 11
        for layer, c in (("stage4", "0.1"), ("fc", "5")):
            extractor = DeepFeatureExtractor(NET, layer, norm=norm, image_size=96)
            pipe = make_pipeline(extractor, LinearSVC(C=float(c), random_state=0)).fit(X, y)
            (row,) = [row for row in rows if row["layer"] == layer]
            assert row[c] == f"{100 * pipe.score(X_test, y_test):.2f}"
        for row in rows:
            layer = row.pop("layer")
            (found,) = [
                entry for entry in best if (entry["table"], entry["layer"]) == (table, layer)
            ]
            assert float(found["accuracy %"]) == max(map(float, row.values()))
            assert row[found["best C"]] == found["accuracy %"]
    assert [row["report %"] for row in best[6:]] == [
        *("90.85", "88.98", "87.34"),
        *("90.82", "88.81", "87.37"),
    ]
    assert figures(QUICK) == {f"table1_2_{NET}-quick.png"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Liblinear failed to converge")
def test_tables_1_and_2_run_with_vgg16_and_random_weights(run: Run) -> None:
    """They have the report's layers, on patches that need no data."""
    rows = run("table1_2", "--quick")
    assert [(row["backbone"], row["layer"], row["report %"]) for row in rows] == [
        ("vgg16", "relu6", "90.85"),
        ("vgg16", "relu7", "88.98"),
        ("vgg16", "relu8", "87.34"),
        ("vgg16", "relu6", "90.82"),
        ("vgg16", "relu7", "88.81"),
        ("vgg16", "relu8", "87.37"),
    ]
    assert all(row["accuracy %"] for row in rows)


def test_the_appended_layer_is_that_of_an_explicit_classifier(run: Run, photos: Path) -> None:
    """Its learning curve is drawn, too."""
    rows = run("replace_svm", "--quick", "--data", photos)
    X, y, X_test, y_test = few(photos)
    classifier = FineTuneClassifier(
        NET, unfreeze=None, head="append", max_epochs=2, image_size=96, random_state=0
    ).fit(X, y)
    assert list(run.names["classifier"].classes_) == CLASSES
    # On so few images, wrong classifiers may reach the same accuracy: compare losses.
    losses, expected = (
        [epoch["train_loss"] for epoch in fitted.history_]
        for fitted in (run.names["classifier"], classifier)
    )
    assert_allclose(losses, expected, rtol=1e-4)
    assert rows == [
        {
            "backbone": NET,
            "accuracy %": f"{100 * classifier.score(X_test, y_test):.2f}",
            "report %": "",
        },
        {"backbone": "vgg16", "accuracy %": "", "report %": "85.56"},
    ]
    assert figures(QUICK) == {"replace_svm-quick.png", f"replace_svm_{NET}-quick.png"}


def test_table4_is_that_of_explicit_classifiers(run: Run, photos: Path) -> None:
    """There is one classifier per block from which it is trained."""
    rows = run("table4", "--quick", "--data", photos)
    assert list(run.names["classifier"].classes_) == CLASSES
    X, y, X_test, y_test = few(photos)
    blocks = ["layer4", "layer3", "layer2", "all"]
    for block, row in zip(blocks, rows, strict=False):
        recipe = {"max_epochs": 2, "head_epochs": 0, "backbone_learning_rate": 1e-4}
        classifier = FineTuneClassifier(
            NET, unfreeze=block, image_size=96, random_state=0, **recipe
        ).fit(X, y)
        assert row == {
            "backbone": NET,
            "unfrozen from": block,
            "accuracy %": f"{100 * classifier.score(X_test, y_test):.2f}",
            "report %": "",
        }
    assert [row["unfrozen from"] for row in rows] == blocks * 4
    assert [row["report %"] for row in rows[4:]] == [
        *("92.56", "92.56", "92.70", "92.10"),
        *("93.03", "93.20", "93.37", "91.50"),
        *("92.50", "93.60", "92.60", "92.46"),
    ]
    assert figures(QUICK) == {"table4-quick.png"}


def test_figures_are_drawn(run: Run, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They show the architecture, the first convolution and ReLU, and predictions."""
    rows = run("figures", "--quick", "--data", photos, "--backbones", NET)
    assert [row["backbone"] for row in rows] == [NET]
    assert figures(QUICK) == {
        f"architecture_{NET}-quick.png",
        f"maps_{NET}_conv1-quick.png",
        f"maps_{NET}_relu-quick.png",
        f"predictions_{NET}-quick.png",
    }
    captions = ["china.jpg", "flower.jpg", *CLASSES]
    assert [axes.get_title() for axes in run.names["display"].axes_[:, 0]] == captions
    printed = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in printed if "%" in line] == captions


@pytest.mark.slow
def test_the_parameters_of_vgg16_are_those_of_the_report(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    """The script counts them; with random weights, it predicts nothing."""
    rows = run("figures", "--quick", "--backbones", "vgg16")
    assert rows[0]["of these fully connected"] == rows[0]["report"] == "123642856"
    assert rows[0]["parameters"] == str(sum(map(torch.numel, models.vgg16().parameters())))
    assert "random weights" in capsys.readouterr().out
    assert figures(QUICK) == {
        "architecture_vgg16-quick.png",
        "maps_vgg16_conv1_1-quick.png",
        "maps_vgg16_relu1_1-quick.png",
    }


def test_without_quick_all_images_of_15_scene_are_used(
    run: Run, scenes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Here a smaller dataset replaces it, with its fixed split and a random one."""
    rows = run("table3", "--data", scenes, "--backbones", NET)
    assert "15-Scene, fixed split: 200 training and 7 test images" in capsys.readouterr().out
    accuracy = float(rows[0]["accuracy %"]) / 100
    assert accuracy * 7 == pytest.approx(round(accuracy * 7), abs=1e-3)
    assert figures(Path("report")) == {"table3.png"}
    run("table3", "--data", scenes, "--backbones", NET, "--split", "random")
    assert "15-Scene, random split: 200 training" in capsys.readouterr().out


def test_a_quick_trial_leaves_results_alone(
    run: Run, photos: Path, scenes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It writes other files, even to the same folder, and says that it is one."""
    run("table3", "--data", scenes, "--backbones", NET, "--out", "both")
    results = {path: path.read_bytes() for path in Path("both").iterdir()}
    assert {path.name for path in results} == {"table3.csv", "table3.png"}
    assert NOTE not in capsys.readouterr().out
    run("table3", "--quick", "--data", photos, "--out", "both")
    assert NOTE in capsys.readouterr().out
    assert NOTE in [text.get_text() for text in run.names["figure"].texts]
    assert {path: path.read_bytes() for path in results} == results
    assert figures(Path("both")) == {"table3.png", "table3-quick.png"}
    assert Path("both/table3-quick.csv").exists()


@pytest.mark.parametrize(
    ("accuracies", "limits"),
    [
        (["87.14", "93.60"], (85, 95)),
        (["85.00", "95.00"], (85, 95)),
        (["82.38", "90.22"], (80, 95)),
        (["100.00", "92.26"], (85, 100)),
        (["0.00", ""], (0, 95)),
    ],
)
def test_accuracies_are_dots_between_85_and_95_percent(
    report: ModuleType, accuracies: list[str], limits: tuple[int, int]
) -> None:
    """The axis is widened for others, and there are no bars, which would have to begin at zero."""
    rows = [{"net": "a", "accuracy %": text, "report %": "91.02"} for text in accuracies]
    (axes,) = report.draw_rows(rows, "title").axes
    assert axes.get_xlim() == limits
    assert not axes.patches
    assert axes.get_xticks()[0] == limits[0]
    here, there = axes.lines
    assert list(here.get_xdata()) == [float(text) for text in accuracies if text]
    assert list(there.get_xdata()) == [91.02, 91.02]


def test_words_of_a_figure_do_not_overlap(report: ModuleType) -> None:
    """With as many rows as Table 4, and a long title."""
    row = {"net": "resnet152", "from": "layer2", "accuracy %": "100.00", "report %": "92.60"}
    figure = report.draw_rows([row] * 16, "LinearSVC (C = 1) on penultimate features, L2 norm")
    figure.canvas.draw()
    (axes,) = figure.axes
    words = [axes.title, *axes.get_xticklabels(), *axes.get_yticklabels(), *axes.texts]
    assert len(words) >= 1 + 4 + 16 + 2 * 17
    for one, other in itertools.combinations(words, 2):
        assert not one.get_window_extent().overlaps(other.get_window_extent()), (one, other)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--weights", "net.pth"], "--weights must have the form NAME=PATH; got net.pth."),
        (["--weights", "net="], "--weights must have the form NAME=PATH; got net=."),
        (["--weights", "vgg19=x.pth"], "--weights must name networks in --backbones; got vgg19."),
        (["--split", "own"], "invalid choice: 'own'"),
    ],
)
def test_unclear_arguments_are_refused(
    run: Run, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    """They are checked before anything is loaded."""
    with pytest.raises(SystemExit):
        run("table3", "--quick", "--backbones", NET, *arguments)
    assert message in capsys.readouterr().err


@pytest.mark.real
@pytest.mark.timeout(3600)
@pytest.mark.skipif("DEEPFEAT_DATA" not in os.environ, reason="DEEPFEAT_DATA is not set")
def test_table3_on_real_data(run: Run, record_property: Callable[[str, object], None]) -> None:
    """Real weights reach the accuracy that the library promises."""
    folder = Path(os.environ["DEEPFEAT_DATA"]).resolve()
    least = {"mobilenet_v2": 90, "squeezenet1_1": 87}
    weights = [f"{name}={folder / 'weights' / name}.pth" for name in least]
    rows = run(
        *("table3", "--data", folder / "scene15", "--backbones", *least, "--weights", *weights)
    )
    for row in rows[:2]:
        record_property("figure", f"Table 3, {row['backbone']}: {row['accuracy %']} %")
        assert float(row["accuracy %"]) >= least[row["backbone"]]
