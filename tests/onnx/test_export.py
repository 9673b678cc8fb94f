"""`export`: files give what estimators do, say what they take, and are whole or not there."""

import errno
import json
import math
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.ensemble import RandomForestClassifier
from sklearn.exceptions import NotFittedError
from sklearn.feature_selection import SelectKBest
from sklearn.linear_model import LinearRegression, LogisticRegression, Ridge, RidgeClassifier
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler, Normalizer, StandardScaler, normalize
from sklearn.svm import LinearSVC
from torch import nn
from torchvision import models
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.transforms import ToTensor

import deepfeat
from deepfeat import DeepFeatureExtractor, ImageError, list_backbones
from deepfeat._backbones.resnet10_slim import ResNet10Slim_Weights
from deepfeat.onnx import _export as exporting
from deepfeat.onnx import export
from deepfeat.onnx._graphs import plan_export

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

WORDS = np.array(["dark", "grey", "light"] * 4)
NUMBERS = np.arange(12) % 3
TWO = np.array(["dark", "light", "light"] * 4)

# Files that give what estimators do -------------------------------------------------------------


@pytest.fixture(scope="session")
def make_estimators(pictures, make_extractor, make_classifier, make_net):
    """Make fitted estimators of every kind, by name, each with whether its network has a name."""
    named = {"backbone": "resnet10_slim"}
    layers = {"layer": ["layer1", "layer4"], "pooling": ["max", "gem"], "norm": "l1"}

    def pipe(*steps, **params):
        return make_pipeline(make_extractor(**params), *steps)

    def grid(head):
        search = {"linearsvc__C": [1e-6, 1]}
        return GridSearchCV(pipe(head, **named), search, cv=2, error_score="raise")

    makers = {
        "extractor": lambda: make_extractor(**named | layers),
        "transformers": lambda: pipe(Normalizer("max"), PCA(3, whiten=True)).fit(pictures),
        "two classes": lambda: pipe(StandardScaler(), LinearSVC()).fit(pictures, TWO),
        "three classes": lambda: pipe(
            *(Normalizer(), StandardScaler(), PCA(5), SelectKBest(k=4), LogisticRegression()),
            **named,
        ).fit(pictures, NUMBERS),
        "one target": lambda: pipe(MinMaxScaler(), Ridge()).fit(pictures, NUMBERS),
        "two targets": lambda: pipe(LinearRegression()).fit(
            pictures, np.stack([NUMBERS, NUMBERS == 1], axis=1)
        ),
        "search": lambda: grid(LinearSVC()).fit(pictures, WORDS),
        "fine-tuned, two classes": lambda: make_classifier().fit(pictures, TWO),
        "fine-tuned, three classes": lambda: make_classifier(make_net()).fit(pictures, WORDS),
        "of a trained network": lambda: make_pipeline(
            make_classifier().fit(pictures, WORDS).to_extractor().set_params(num_workers=0),
            RidgeClassifier(),
        ).fit(pictures, TWO == "light"),
    }
    own = ("transformers", "two classes", "one target", "two targets", "fine-tuned, three classes")
    return {name: (make, name not in own) for name, make in makers.items()}


KINDS = (
    *("extractor", "transformers", "two classes", "three classes", "one target", "two targets"),
    *("search", "fine-tuned, two classes", "fine-tuned, three classes", "of a trained network"),
)


@pytest.fixture(scope="session", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="session")
def exported(kind, make_estimators, pictures, as_floats, read_file, tmp_path_factory):
    """Export an estimator; return it, its file and the images as the file takes them."""
    make, has_name = make_estimators[kind]
    estimator, path = make(), tmp_path_factory.mktemp("exported") / "file.onnx"
    export(estimator, path, check=list(pictures))
    return estimator, read_file(path), pictures if has_name else as_floats(pictures)


@pytest.mark.parametrize("count", [1, 3, 5])
def test_a_file_gives_what_its_estimator_does(count, exported, pictures, assert_gives_the_same):
    """For any number of images, of which those of the trials are a few."""
    estimator, file, images = exported
    some = slice(4, 4 + count)
    assert_gives_the_same(file, estimator, pictures[some], images[some])


def test_a_file_says_what_it_takes_and_gives(kind, exported):
    """Names, types and shapes, of which the first side is any."""
    _, file, images = exported
    (taken,) = file.session.get_inputs()
    is_own = images.dtype == np.float32
    assert (taken.name, taken.type) == ("images", f"tensor({'float' if is_own else 'uint8'})")
    assert taken.shape[1:] == list(images.shape[1:])
    given = {output.name: output for output in file.session.get_outputs()}
    shapes = {
        "extractor": {"features": [2 * (32 + 128)]},
        "transformers": {"features": [3]},
        "two classes": {"label": [], "scores": []},
        "three classes": {"label": [], "scores": [3]},
        "one target": {"predictions": []},
        "two targets": {"predictions": [2]},
        "search": {"label": [], "scores": [3]},
        "fine-tuned, two classes": {"label": [], "scores": []},
        "fine-tuned, three classes": {"label": [], "scores": [3]},
        "of a trained network": {"label": [], "scores": []},
    }
    assert {name: output.shape[1:] for name, output in given.items()} == shapes[kind]
    for output in (taken, *given.values()):
        assert isinstance(output.shape[0], str)
    for name, output in given.items():
        assert output.type == ("tensor(int64)" if name == "label" else "tensor(float)")


def test_a_file_is_plain_onnx_of_one_opset(exported):
    """Operators of no other domain; valid, and with all weights in it."""
    _, file, _ = exported
    onnx.checker.check_model(file.model, full_check=True)
    assert [(entry.domain, entry.version) for entry in file.model.opset_import] == [("", 18)]
    assert {node.domain for node in file.model.graph.node} == {""}
    assert not file.model.functions
    for weight in file.model.graph.initializer:
        assert weight.data_location == onnx.TensorProto.DEFAULT


def test_a_file_tells_nothing_of_this_machine(exported):
    """Neither paths nor the notes in which torch has them."""
    _, file, _ = exported
    for path in (Path(deepfeat.__file__).parent, Path(torch.__file__).parent, Path.home()):
        assert os.fsencode(path) not in file.content
    for note in (b"site-packages", b"pkg.torch", b"namespace", b".py", b"Traceback", b"stack"):
        assert note not in file.content


def test_metadata_describes_the_estimator(kind, exported):
    """The version and the backbone in plain words, and the rest as JSON."""
    estimator, file, images = exported
    keys = {"deepfeat", "backbone", "layer", "classes", "preprocessing"}
    assert file.metadata.keys() == keys
    assert file.metadata["deepfeat"] == deepfeat.__version__
    is_own = images.dtype == np.float32
    name = "Sequential" if is_own else "resnet10_slim"
    assert file.metadata["backbone"] == ("SlimResNet" if kind == "of a trained network" else name)
    layers = {"extractor": ["layer1", "layer4"]}
    default = None if "fine-tuned" in kind else ["penultimate"]
    assert file.read("layer") == layers.get(kind, default)
    classes = getattr(estimator, "classes_", None)
    assert file.read("classes") == (None if classes is None else classes.tolist())
    if is_own:
        assert file.read("preprocessing") is None
        return
    preset = ResNet10Slim_Weights.DEFAULT.transforms()
    assert file.read("preprocessing") == {
        "resize": "stretch",
        "resize_size": [32, 32],
        "crop_size": [32, 32],
        "interpolation": "bilinear",
        "mean": list(preset.mean),
        "std": list(preset.std),
    }


@pytest.mark.parametrize(
    "classes", [["b", "a"], [7, -3], [True, False], [2.0, 0.0], ["ä", "'\"\\ 日本"]], ids=str
)
def test_classes_may_be_of_any_type(classes, pictures, make_extractor):
    """In the order of `classes_`, as JSON has them."""
    y = np.array(classes)[(TWO == "light") * 1]
    pipe = make_pipeline(make_extractor(), LinearSVC()).fit(pictures, y)
    named = json.loads(exporting._describe(plan_export(pipe))["classes"])
    assert named == sorted(classes)
    assert list(map(type, named)) == list(map(type, classes))


def test_a_program_needs_nothing_but_the_file(
    pictures, scene_paths, scene_labels, export_file, prepare_as_described, pillow_resizes
):
    """Pillow, NumPy, ONNX Runtime and the metadata are enough to classify a photograph."""
    for resize in ("weights", "pad"):
        extractor = DeepFeatureExtractor(
            "resnet10_slim", image_size=48, resize=resize, cache=None, num_workers=0
        )
        pipe = make_pipeline(extractor, LinearSVC(C=0.01)).fit(scene_paths, scene_labels)
        file = export_file(pipe, check=scene_paths[:3])
        steps = file.read("preprocessing")
        images = []
        for path in scene_paths:
            with Image.open(path) as image:
                images.append(prepare_as_described(image.convert("RGB"), steps))
        found = file.run(np.array(images))
        assert_allclose(found["scores"], pipe.decision_function(scene_paths), atol=1e-5)
        classes = np.array(file.read("classes"))
        assert_array_equal(classes[found["label"]], pipe.predict(scene_paths))


@pytest.mark.usefixtures("pillow_resizes")
def test_features_are_those_of_torchvision(
    scene_paths, tmp_path, read_file, prepare_as_described, assert_near
):
    """Its own transforms, its own tracer and a bare loop, without a line of the library."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = models.squeezenet1_1(weights=None).eval()
    torch.save(net.state_dict(), tmp_path / "weights.pth")
    read = {"features.5": "middle", "features.12": "last"}
    trace = create_feature_extractor(net, read, suppress_diff_warning=True)
    prepare = models.SqueezeNet1_1_Weights.DEFAULT.transforms()

    params = {"weights": tmp_path / "weights.pth", "cache": None, "num_workers": 0}
    extractor = DeepFeatureExtractor("squeezenet1_1", list(read), **params)
    export(extractor, tmp_path / "file.onnx")
    file = read_file(tmp_path / "file.onnx")
    expected, images = [], []
    for path in scene_paths[:3]:
        with Image.open(path) as image, torch.no_grad():
            image = image.convert("RGB")
            outputs = trace(prepare(image)[None])
            images.append(prepare_as_described(image, file.read("preprocessing")))
        rows = [outputs[name].mean((2, 3)).numpy() for name in ("middle", "last")]
        expected.append(np.concatenate(list(map(normalize, rows)), axis=1)[0])
    assert_near(file.run(np.array(images))["features"], np.array(expected))


# The number of images ---------------------------------------------------------------------------


class ByLength(nn.Module):
    """Take the number of images to be a number, as many networks do."""

    def __init__(self, net, forward):
        super().__init__()
        self.net = net
        self.calculate = forward
        self.end = nn.Identity()

    def forward(self, images):
        return self.end(self.calculate(self.net, images))


def reshape(net, images):
    return net[:3](images).mean((2, 3)).reshape(len(images), -1)


def one_by_one(net, images):
    return torch.cat([net(image[None]) for image in images])


def padded_alone(net, images):
    return net(images) if images.shape[0] > 1 else net(images.repeat(2, 1, 1, 1))[:1]


@pytest.mark.parametrize(("calculate", "count"), [(reshape, 4), (one_by_one, 1), (one_by_one, 3)])
def test_a_network_for_a_number_of_images_can_be_exported_for_it(
    calculate, count, pictures, as_floats, make_net, make_extractor, export_file,
    assert_gives_the_same,
):  # fmt: skip
    """It is not said to take any."""
    extractor = make_extractor(ByLength(make_net(), calculate), "end")
    file = export_file(extractor, batch=count)
    assert_gives_the_same(file, extractor, pictures[:count], as_floats(pictures[:count]))


@pytest.mark.parametrize("calculate", [reshape, one_by_one])
def test_a_network_for_a_number_of_images_is_refused_for_any(
    calculate, make_net, make_extractor, assert_refused
):
    """Its name is in the error."""
    extractor = make_extractor(ByLength(make_net(), calculate), "end")
    assert_refused(ValueError, r"^ByLength cannot be exported", extractor)


def test_a_network_may_treat_one_image_in_another_way(
    pictures, as_floats, make_net, make_extractor, export_file, assert_gives_the_same
):
    """What is exported for any number is what it does with several."""
    extractor = make_extractor(ByLength(make_net(), padded_alone), "end")
    file = export_file(extractor)
    for count in (1, 2):
        assert_gives_the_same(file, extractor, pictures[:count], as_floats(pictures[:count]))


@pytest.mark.parametrize(
    ("backbone", "batch"), [(None, 1), (None, np.int64(4)), ("resnet10_slim", 4)]
)
def test_a_file_for_a_number_of_images_takes_no_other(
    batch, backbone, pictures, as_floats, make_extractor, export_file, assert_gives_the_same
):
    """It says so."""
    extractor = make_extractor(backbone)
    images = as_floats(pictures) if backbone is None else pictures
    file = export_file(extractor, batch=batch, check=pictures[:5])
    (taken,) = file.session.get_inputs()
    assert taken.shape == [batch, *images.shape[1:]]
    assert [output.shape[0] for output in file.session.get_outputs()] == [batch]
    assert_gives_the_same(file, extractor, pictures[:batch], images[:batch])
    with pytest.raises(Exception, match="Got invalid dimensions for input: images"):
        file.run(images[: batch + 1])


# Refusals ---------------------------------------------------------------------------------------


@pytest.fixture
def assert_refused(tmp_path):
    """Raise unless an export raises and nothing in its folder changes."""

    def assert_refused(error, match, estimator, **options):
        folder = tmp_path / "models"
        folder.mkdir(exist_ok=True)
        path = folder / "model.onnx"
        with path.open("wb") as file:
            file.write(b"an older model")
        with pytest.raises(error, match=match):
            export(estimator, path, **options)
        assert list(folder.iterdir()) == [path]
        assert path.read_bytes() == b"an older model"

    return assert_refused


@pytest.fixture
def pipe(pictures, make_extractor):
    """A fitted pipeline with a network of one's own."""
    return make_pipeline(make_extractor(), StandardScaler(), LinearSVC()).fit(pictures, WORDS)


def test_a_step_that_cannot_be_exported_is_named(
    pictures, make_extractor, make_classifier, assert_refused
):
    """Wherever it is."""
    forest = make_pipeline(make_extractor(), RandomForestClassifier(2)).fit(pictures, WORDS)
    assert_refused(ValueError, "^RandomForestClassifier cannot be exported", forest)
    flat = pictures.reshape(12, -1).astype(float)
    second = make_pipeline(StandardScaler().fit(flat), make_extractor())
    refusal = "^estimator must be .*; got StandardScaler, then DeepFeatureExtractor"
    assert_refused(ValueError, refusal, second)
    assert_refused(NotFittedError, None, make_pipeline(make_extractor(), LinearSVC()))
    assert_refused(NotFittedError, None, make_classifier())


def test_several_labels_per_image_are_refused(pictures, make_extractor, assert_refused):
    """They have no index."""
    pipe = make_pipeline(make_extractor(), RidgeClassifier())
    pipe.fit(pictures, np.stack([NUMBERS == 1, NUMBERS > 0], axis=1).astype(int))
    assert_refused(ValueError, "^RidgeClassifier gives several labels per image", pipe)


@pytest.mark.parametrize("batch", [0, -1, 1.5, True, None, "any", "4", [1]])
def test_a_wrong_batch_is_refused(batch, pipe, assert_refused):
    """With what it may be."""
    refusal = r"^batch must be an int of at least 1 or 'dynamic'; got "
    assert_refused(ValueError, refusal, pipe, batch=batch)


@pytest.mark.parametrize("precision", ["bfloat16", "half", 16, None, np.float16])
def test_a_wrong_precision_is_refused(precision, pipe, assert_refused):
    """With what it may be."""
    refusal = r"^precision must be 'float32' or 'float16'; got "
    assert_refused(ValueError, refusal, pipe, precision=precision)


def test_a_folder_must_exist_and_a_file_not_be_one(pipe, tmp_path):
    """Paths may be strings."""
    with pytest.raises(FileNotFoundError, match=r"^path must be in an existing folder; '.*none'"):
        export(pipe, tmp_path / "none" / "model.onnx")
    for path in (tmp_path, str(tmp_path)):
        with pytest.raises(OSError, match=r"^path must be a regular file; got '.*'\.$"):
            export(pipe, path)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_writable_is_found_first(pipe, assert_refused, monkeypatch):
    """Before the network is run."""
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(exporting, "plan_export", None)
    assert_refused(PermissionError, "^path must be in a writable folder", pipe)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such modes and links")
def test_a_file_that_is_replaced_keeps_its_mode_and_its_links(pipe, tmp_path):
    """Only its content is another one."""
    path, link = tmp_path / "model.onnx", tmp_path / "link.onnx"
    path.write_bytes(b"an older model")
    path.chmod(0o640)
    link.symlink_to(path)
    export(pipe, link)
    assert link.is_symlink()
    assert path.stat().st_mode & 0o777 == 0o640
    onnx.checker.check_model(onnx.load(path))
    assert sorted(os.listdir(tmp_path)) == ["link.onnx", "model.onnx"]


def test_a_path_may_be_short(pipe, tmp_path, monkeypatch):
    """A name in the working folder, or one in the home of the user, where no file is left."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    export(pipe, "model.onnx")
    assert os.listdir(tmp_path) == ["model.onnx"]
    assert exporting._check_path("~/other.onnx") == tmp_path / "other.onnx"


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "onnxscript"])
def test_a_missing_package_is_named(package, pipe, assert_refused, monkeypatch):
    """With the extra that installs it, before the network is run."""
    monkeypatch.setitem(sys.modules, package, None)
    refusal = rf"^The package {package} is needed here, .* `pip install 'onnx>="
    assert_refused(ModuleNotFoundError, refusal, pipe)


def test_images_to_check_must_be_readable(pipe, pictures, tmp_path, assert_refused):
    """Each of them, and there must be some."""
    (tmp_path / "broken.png").write_bytes(b"no image")
    check = [pictures[0], str(tmp_path / "broken.png")]
    assert_refused(ImageError, r"\[1\] .*broken\.png", pipe, check=check)
    assert_refused(ValueError, "^check: X is empty", pipe, check=[])


def test_a_file_beyond_the_limit_of_the_format_is_refused(pipe, assert_refused, monkeypatch):
    """With what may help."""
    monkeypatch.setattr(exporting, "_LIMIT", 500)
    refusal = r"^Sequential cannot be exported: its weights take 0\.00 GB, .* Try precision='float"
    assert_refused(ValueError, refusal, pipe)
    monkeypatch.setattr(exporting, "_LIMIT", 100)
    refusal = r"cannot be larger than 2 GB\.$"
    assert_refused(ValueError, refusal, pipe[:1], precision="float16")


@pytest.mark.parametrize("method", ["write_bytes", "replace"])
def test_a_disk_that_is_full_is_left_as_it_was(method, pipe, assert_refused, monkeypatch):
    """Whether that is found while the file is written or when it is put in its place."""

    def fail(path, *_):
        path.touch()
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(Path, method, fail)
    assert_refused(OSError, "No space left", pipe)


def test_an_interruption_leaves_nothing(pipe, assert_refused, monkeypatch):
    """As Ctrl-C, while the file is tried."""

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(exporting, "run", interrupt)
    assert_refused(KeyboardInterrupt, None, pipe)


class Branches(nn.Module):
    """Decide in Python by what the images are."""

    def __init__(self, net, decide):
        super().__init__()
        self.net = net
        self.decide = decide

    def forward(self, images):
        values = self.net(images)
        return -values if self.decide(images) else values


@pytest.mark.parametrize(
    "decide",
    [
        lambda images: images.mean() > 0.5,
        lambda images: images.detach().numpy().mean() > 0.5,
    ],
)
def test_a_network_that_decides_by_its_images_is_refused(
    decide, make_net, make_extractor, assert_refused
):
    """Tracing would keep one of its ways."""
    extractor = make_extractor(Branches(make_net(), decide), "net.5")
    assert_refused(ValueError, "^Branches cannot be exported: .", extractor)


# A file checks itself ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("step", "method", "fault", "y", "problem"),
    [
        (StandardScaler, "transform", lambda rows: rows + 1, WORDS, "features differ by up to"),
        (LinearSVC, "decision_function", lambda scores: 2 * scores, TWO, "scores differ by up to"),
        (LinearSVC, "predict", np.flip, WORDS, "labels of 2 of 3 images differ"),
        (Ridge, "predict", lambda rows: rows[:, None], NUMBERS, "predictions differ by up to inf"),
    ],
)
def test_a_step_that_computes_something_else_is_found(
    step, method, fault, y, problem, pictures, make_extractor, assert_refused, monkeypatch
):
    """Whatever its attributes say."""
    pipe = make_pipeline(make_extractor(norm=None), step()).fit(pictures, y)
    right = getattr(step, method)
    monkeypatch.setattr(step, method, lambda self, X: fault(right(self, X)))
    refusal = (
        r"^Sequential cannot be exported: the file would not reproduce .* for noise, .*\. The "
    )
    assert_refused(ValueError, refusal + problem, pipe)


def test_images_to_check_find_what_noise_does_not(
    pictures, tmp_path, make_extractor, assert_refused, monkeypatch
):
    """They are those that a user will classify."""
    pipe = make_pipeline(make_extractor(norm=None), StandardScaler()).fit(pictures)
    check = np.full((1, 32, 32, 3), 90, dtype=np.uint8)
    grey, right = pipe[0].transform(check), StandardScaler.transform

    def transform(self, X):
        return right(self, X) + np.isclose(X, grey, atol=1e-6).all()

    monkeypatch.setattr(StandardScaler, "transform", transform)
    export(pipe, tmp_path / "file.onnx")
    refusal = r"for the images in check, so it was not written\. The features differ"
    assert_refused(ValueError, refusal, pipe, check=check)


@pytest.mark.parametrize(
    "fault",
    [
        lambda rows: rows * 1.001,
        lambda rows: rows * math.nan,
        lambda rows: rows[:, :1],
    ],
)
def test_a_fault_in_the_conversion_is_found(
    fault, pictures, make_extractor, monkeypatch, assert_refused
):
    """Whatever it is."""
    monkeypatch.setattr("deepfeat.onnx._graphs.convert_step", lambda step: fault)
    pipe = make_pipeline(make_extractor(norm=None), StandardScaler(with_mean=False, with_std=False))
    pipe.fit(pictures)
    assert_refused(ValueError, "The features differ by up to", pipe)


def test_images_to_check_must_have_the_size_that_a_file_takes(
    make_extractor, pictures, assert_refused
):
    """Preprocessing of the user may leave them at any size; the estimator does not mind."""
    extractor = make_extractor(preprocessing=ToTensor())
    extractor.transform(pictures[:2])
    assert_refused(ValueError, "must give images of one shape", extractor, check=pictures[:2])


# float16 ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fine-tuned, two classes", "search"], indirect=True)
def test_half_the_precision_is_half_the_size(
    kind, exported, pictures, export_file, assert_gives_the_same
):
    """It takes and gives the same types, and the same labels; values differ a little."""
    estimator, whole, images = exported
    file = export_file(estimator, precision="float16", check=pictures)
    assert 0.45 < len(file.content) / len(whole.content) < 0.55
    assert_gives_the_same(file, estimator, pictures, images, tolerance=1e-2)
    ports = [
        [(port.name, port.type, port.shape[1:]) for port in side]
        for session in (file.session, whole.session)
        for side in (session.get_inputs(), session.get_outputs())
    ]
    assert ports[:2] == ports[2:]
    assert file.metadata == whole.metadata
    onnx.checker.check_model(file.model, full_check=True)


def test_a_classifier_is_halved_only_if_it_is_checked(pipe, assert_refused):
    """Labels may change; features may not be told from others."""
    refusal = r"^check must be images if precision is 'float16', .*; got None\.$"
    assert_refused(ValueError, refusal, pipe, precision="float16")


def test_a_file_of_half_the_precision_that_changes_labels_is_refused(
    tmp_path, make_extractor, assert_refused
):
    """Near a boundary, though not so near that float32 could be wrong as well."""
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Flatten()).eval()
    nn.init.eye_(net[0].weight[:, :, 0, 0])
    nn.init.zeros_(net[0].bias)
    X = np.zeros((4, 32, 32, 3), dtype=np.uint8)
    X[::2] = 255
    pipe = make_pipeline(make_extractor(net, "1", norm=None), RidgeClassifier())
    pipe.fit(X, [0, 1, 0, 1])
    # Each coefficient is rounded to 1 in float16, which is 0.0005 less for all together.
    pipe[1].coef_ = np.full((1, 3072), 1 + 2.0**-11 - 2.0**-16)
    pipe[1].intercept_ = np.array([-3072 * (1 + 2.0**-12)])
    export(pipe, tmp_path / "whole.onnx", check=X)
    assert_array_equal(pipe.predict(X), [1, 0, 1, 0])
    refusal = r"for the images in check, so it was not written\. The labels of 2 of 4 images differ"
    assert_refused(ValueError, refusal, pipe, precision="float16", check=X)


def test_weights_that_float16_cannot_hold_stay_as_they_are():
    """Too large, too small or zero; so do small tensors, and integers."""
    onnxruntime = pytest.importorskip("onnxruntime")
    rng = np.random.default_rng(0)
    weights = {
        "large": rng.normal(size=(64, 32)).astype(np.float32),
        "beyond": np.full((32, 32), 1e5, dtype=np.float32),
        "tiny": rng.normal(size=(32, 32), scale=1e-7).astype(np.float32),
        "zeros": np.zeros((32, 32), dtype=np.float32),
        "small": rng.normal(size=(32, 31)).astype(np.float32),
        "whole": np.arange(2048).reshape(64, 32),
    }
    values = [onnx.numpy_helper.from_array(value, name) for name, value in weights.items()]
    make_node = onnx.helper.make_node
    nodes = [
        *(make_node("MatMul", ["x", "large"], ["a"]), make_node("MatMul", ["a", "beyond"], ["b"])),
        *(make_node("MatMul", ["b", "tiny"], ["c"]), make_node("Add", ["c", "zeros"], ["d"])),
        make_node("MatMul", ["d", "small"], ["y"]),
        make_node("Identity", ["whole"], ["z"]),
    ]
    floats = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        *(nodes, "graph", [onnx.helper.make_tensor_value_info("x", floats, [32, 64])]),
        outputs=[
            onnx.helper.make_tensor_value_info("y", floats, [32, 31]),
            onnx.helper.make_tensor_value_info("z", onnx.TensorProto.INT64, [64, 32]),
        ],
        initializer=values,
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)])
    model.ir_version = 9
    exporting._halve_weights(model.graph)
    onnx.checker.check_model(model, full_check=True)
    stored = {value.name: value.data_type for value in model.graph.initializer}
    assert stored == {
        "large.float16": onnx.TensorProto.FLOAT16,
        "beyond": floats,
        "tiny": floats,
        "zeros": floats,
        "small": floats,
        "whole": onnx.TensorProto.INT64,
    }
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    x = rng.normal(size=(32, 64)).astype(np.float32)
    y, z = session.run(None, {"x": x})
    halved = weights["large"].astype(np.float16).astype(np.float32)
    expected = x @ halved @ weights["beyond"] @ weights["tiny"] @ weights["small"]
    assert_allclose(y, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    assert_array_equal(z, weights["whole"])


# Whatever the surroundings ----------------------------------------------------------------------


def test_inference_mode_may_be_on(
    pictures, as_floats, make_net, make_extractor, make_classifier, export_file,
    assert_gives_the_same,
):  # fmt: skip
    """Also while networks were loaded or trained."""
    with torch.inference_mode():
        extractor = make_extractor("resnet10_slim", weights=None, random_state=3)
        expected = extractor.transform(pictures)  # loads the network
        assert_gives_the_same(export_file(extractor), extractor, pictures)
        classifier = make_classifier(make_net()).fit(pictures, WORDS)
        classifier.predict(pictures)
        file = export_file(classifier)
        assert torch.is_inference_mode_enabled()
    assert_gives_the_same(file, classifier, pictures, as_floats(pictures))
    assert_array_equal(extractor.transform(pictures), expected)


def test_autocast_may_be_on(pipe, pictures, as_floats, export_file, assert_gives_the_same):
    """It is not part of the file."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        file = export_file(pipe)
        assert torch.is_autocast_enabled("cpu")
    assert_gives_the_same(file, pipe, pictures, as_floats(pictures))
    types = {weight.data_type for weight in file.model.graph.initializer}
    assert onnx.TensorProto.FLOAT in types
    assert not types & {onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT16}


def test_threads_may_export_at_once(make_extractor, tmp_path, pictures, as_floats, read_file):
    """Each gets its own file."""
    extractors = [make_extractor(layer=layer) for layer in ("2", "5")]
    paths = [tmp_path / f"{number}.onnx" for number in range(2)]
    with ThreadPoolExecutor() as pool:
        list(pool.map(export, extractors, paths))
    for extractor, path in zip(extractors, paths, strict=True):
        found = read_file(path).run(as_floats(pictures))["features"]
        assert_allclose(found, extractor.transform(pictures), atol=1e-5)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad])
def test_gradients_stay_on_or_off(mode, pipe, assert_refused, monkeypatch):
    """Also if the export fails at its end."""

    def fail(*_):
        raise ValueError("at the end")

    monkeypatch.setattr(exporting, "_convert", fail)
    with mode():
        before = torch.is_grad_enabled()
        assert_refused(ValueError, "at the end", pipe)
        assert torch.is_grad_enabled() == before


PARAMS = [
    {"precision": "bfloat16"},
    {"engine": "openvino"},
    {"on_error": "nan"},
]


@pytest.mark.parametrize("params", PARAMS, ids=str)
def test_how_an_estimator_computes_does_not_matter(
    params, pipe, pictures, as_floats, export_file, assert_gives_the_same
):
    """A file gives what torch computes in float32, on the CPU."""
    if "engine" in params:
        pytest.importorskip("openvino")
    pipe.steps[0][1].set_params(**params)
    before = pipe.get_params()
    file = export_file(pipe, check=pictures)
    assert pipe.get_params() == before
    pipe[0].set_params(precision="float32", engine="torch")
    assert_gives_the_same(file, pipe, pictures, as_floats(pictures))


def test_a_cache_is_neither_read_nor_filled(
    pictures, as_floats, tmp_path, make_extractor, read_file, assert_near
):
    """On a disk or in memory."""
    extractor = make_extractor(cache=str(tmp_path / "cache"))
    expected = extractor.transform(pictures[:2])

    def read_cache():
        files = (path for path in (tmp_path / "cache").rglob("*") if path.is_file())
        return {path: path.read_bytes() for path in files}

    before = read_cache()
    assert before
    export(extractor, tmp_path / "file.onnx", check=pictures)
    after = {path: path.read_bytes() for path in (tmp_path / "cache").rglob("*") if path.is_file()}
    assert after == before
    assert_near(
        read_file(tmp_path / "file.onnx").run(as_floats(pictures[:2]))["features"], expected
    )


def test_steps_may_give_data_frames(
    pictures, as_floats, make_extractor, export_file, assert_gives_the_same
):
    """With names of columns, which are those that the steps were fitted with."""
    pytest.importorskip("pandas")
    pipe = make_pipeline(make_extractor(), StandardScaler(), LogisticRegression())
    pipe.set_output(transform="pandas").fit(pictures, WORDS)
    assert hasattr(pipe[-1], "feature_names_in_")
    file = export_file(pipe, check=pictures)
    assert_gives_the_same(file, pipe, pictures, as_floats(pictures))


def test_images_may_be_rows_of_a_table(
    pictures, as_floats, make_extractor, export_file, assert_gives_the_same
):
    """Then those in check are, too; the file takes images."""
    table = pictures.reshape(len(pictures), -1)
    extractor = make_extractor(image_shape=(32, 32, 3))
    pipe = make_pipeline(extractor, LinearSVC()).fit(table, WORDS)
    file = export_file(pipe, check=table)
    assert_gives_the_same(file, pipe, table, as_floats(pictures))


def test_an_estimator_may_be_exported_again(pipe, tmp_path):
    """Two files are the same to the byte."""
    contents = set()
    for name in ("first.onnx", "second.onnx"):
        export(pipe, tmp_path / name)
        contents.add((tmp_path / name).read_bytes())
    assert len(contents) == 1


# All networks -----------------------------------------------------------------------------------

IN_A_DEFAULT_RUN = ("squeezenet1_1",)


def find_side(name):
    sides = {"maxvit": 224, "swin": 64, "inception": 96, "alexnet": 64, "vit_h_14": 28}
    return next((side for start, side in sides.items() if name.startswith(start)), 32)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in IN_A_DEFAULT_RUN else pytest.mark.slow)
        for name in list_backbones()
    ],
)
@pytest.mark.timeout(1200)
def test_every_network_can_be_exported(name, tmp_path, read_file, assert_near):
    """With random weights, at a small size; but for those that are too large for the format."""
    side = find_side(name)
    extractor = DeepFeatureExtractor(
        name, weights=None, image_size=side, resize="squash", cache=None, num_workers=0,
        device="cpu", batch_size=2,
    )  # fmt: skip
    path = tmp_path / "file.onnx"
    if name in ("vit_h_14", "regnet_y_128gf"):
        with pytest.raises(
            ValueError, match=r"weights take 2\.[56]\d GB, .* Try precision='float16'"
        ):
            export(extractor, path)
        return
    export(extractor, path)
    noise = np.random.default_rng(1).integers(0, 256, (3, side, side, 3), dtype=np.uint8)
    noise[1] //= 3
    assert_near(read_file(path).run(noise)["features"], extractor.transform(noise))


TIMM = {
    "test_vit.r160_in1k": ("norm", 32),
    "test_convnext.r160_in1k": ("stage2", 32),
    "test_efficientnet.r160_in1k": ("penultimate", 32),
    "test_resnet.r160_in1k": ("penultimate", 32),
    "test_byobnet.r160_in1k": ("penultimate", 32),
    "test_nfnet.r160_in1k": ("penultimate", 32),
    "vit_tiny_patch16_224.augreg_in21k_ft_in1k": ("penultimate", 224),
    "vit_small_patch14_reg4_dinov2.lvd142m": ("penultimate", 56),
    "swin_tiny_patch4_window7_224.ms_in1k": ("penultimate", 224),
    "levit_128s.fb_dist_in1k": ("penultimate", 224),
    "xcit_nano_12_p8_224.fb_in1k": ("penultimate", 224),
    "mobilenetv4_conv_small.e2400_r224_in1k": ("penultimate", 64),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", TIMM)
def test_networks_of_timm_can_be_exported(name, tmp_path, read_file, assert_near):
    """Of several kinds, with random weights."""
    pytest.importorskip("timm")
    layer, side = TIMM[name]
    extractor = DeepFeatureExtractor(
        f"timm/{name}", layer, weights=None, image_size=side, resize="squash", cache=None,
        num_workers=0, device="cpu", batch_size=2,
    )  # fmt: skip
    export(extractor, tmp_path / "file.onnx")
    noise = np.random.default_rng(1).integers(0, 256, (3, side, side, 3), dtype=np.uint8)
    noise[1] //= 3
    found = read_file(tmp_path / "file.onnx").run(noise)["features"]
    assert_near(found, extractor.transform(noise))
