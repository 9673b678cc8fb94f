"""Tests of the displays: what the artists hold, against values that are computed by hand."""

import functools
import importlib
import itertools
import sys
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib import pyplot as plt
from matplotlib.text import Text
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.svm import LinearSVC
from torch import nn
from torchvision import models, transforms
from torchvision.models.feature_extraction import create_feature_extractor

import deepfeat
from deepfeat import DeepFeatureExtractor, FineTuneClassifier, LayerNotFoundError, list_layers
from deepfeat.plotting import (
    ActivationMapDisplay,
    ArchitectureDisplay,
    LayerGridDisplay,
    LearningCurveDisplay,
    PredictionDisplay,
)

matplotlib.use("Agg")

HISTORY = [
    {
        "epoch": epoch,
        "train_loss": 2 * 0.8**epoch,
        "train_score": 1 - 0.5 * 0.7**epoch,
        "validation_loss": 2 * 0.85**epoch + 0.2,
        "validation_score": 1 - 0.55 * 0.8**epoch,
    }
    for epoch in range(1, 11)
]


@pytest.fixture(autouse=True)
def no_figure_is_left_open():
    """Close the figures of a test: matplotlib warns of many, and a warning is an error."""
    yield
    plt.close("all")


@pytest.fixture
def photograph():
    """A wide picture with something to see in each corner."""
    pixels = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((90, 60), Image.Resampling.BILINEAR)


def make(layer="stage1", **params):
    params = {"weights": None, "image_size": 64, "num_workers": 0} | params
    return DeepFeatureExtractor("squeezenet1_1", layer, **params)


def texts_of(axes):
    return [text.get_text() for text in axes.texts]


# Activation maps --------------------------------------------------------------------------------


def maps_by_hand(image, node):
    """Run an image through torchvision's network, as far as a node."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = models.squeezenet1_1(weights=None).eval()
    preset = models.SqueezeNet1_1_Weights.DEFAULT.transforms
    preprocess = preset(crop_size=64, resize_size=round(256 * 64 / 224))
    with torch.no_grad():
        return create_feature_extractor(net, {node: "out"})(preprocess(image)[None])["out"][0]


@pytest.mark.parametrize(
    ("layer", "node"),
    [("stage1", "features.1"), (0, "features.0"), ("classifier.1", "classifier.1")],
)
def test_the_maps_are_those_of_a_plain_forward_pass(photograph, layer, node):
    """Neither pooling nor norm nor the cache of the extractor shows."""
    extractor = make("stage3", pooling="max", norm="l2").fit([photograph])
    before = extractor.get_params()
    display = ActivationMapDisplay.from_extractor(extractor, photograph, layer=layer, channels=5)
    expected = maps_by_hand(photograph, node).numpy()[:5]
    scale = np.abs(expected).max()
    assert_allclose(display.maps / scale, expected / scale, atol=1e-5)
    for axes, values in zip(display.axes_[1:], expected, strict=True):
        assert_allclose(axes.images[0].get_array() / scale, values / scale, atol=1e-5)
    assert extractor.get_params() == before
    assert np.ptp(expected / scale, axis=0).max() > 1e-3  # channels that are mixed up would show


def test_the_input_is_shown_as_the_network_sees_it(photograph):
    """Beside the maps of a cropped image stands the cropped image."""
    display = ActivationMapDisplay.from_extractor(make(resize="squash"), photograph, channels=1)
    expected = photograph.resize((64, 64), Image.Resampling.BILINEAR)
    assert_array_equal(display.axes_[0].images[0].get_array(), np.asarray(expected))


def test_channels_are_chosen_and_named(photograph):
    """A number takes the first ones, as far as there are; a list takes those."""
    first = ActivationMapDisplay.from_extractor(make(), photograph, channels=3)
    every = ActivationMapDisplay.from_extractor(make(), photograph, channels=1000)
    chosen = ActivationMapDisplay.from_extractor(make(), photograph, channels=[60, 2])
    assert first.maps.shape[0] == 3
    assert every.maps.shape[0] == 64
    assert_array_equal(chosen.maps, every.maps[[60, 2]])
    assert [axes.get_title() for axes in chosen.axes_[1:]] == ["60", "2"]
    assert chosen.axes_[0].get_title() == "input, and 2 channels\nof stage1"


def test_a_network_of_ones_own_with_maps_of_two_sides(photograph):
    """Maps need not be square, nor the input RGB."""
    net = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False))
    nn.init.constant_(net[0].weight, 2)
    steps = [transforms.Grayscale(), transforms.Resize((20, 30)), transforms.ToTensor()]
    to_grey = transforms.Compose(steps)
    extractor = DeepFeatureExtractor(net, "0", preprocessing=to_grey)
    display = ActivationMapDisplay.from_extractor(extractor, photograph)
    assert_allclose(display.maps, [2 * to_grey(photograph)[0].numpy()] * 2, atol=1e-6)
    assert display.axes_[0].images[0].get_array().shape == (20, 30)


def test_one_scale_for_all_maps_where_it_is_asked_for(photograph):
    """What is in im_kw goes to matplotlib."""
    display = ActivationMapDisplay.from_extractor(
        make(), photograph, channels=2, cmap="cividis", im_kw={"vmin": 0, "vmax": 7}
    )
    for axes in display.axes_[1:]:
        assert axes.images[0].get_clim() == (0, 7)
        assert axes.images[0].get_cmap().name == "cividis"


@pytest.mark.parametrize(
    ("extractor", "words", "error", "message"),
    [
        (make(), {"layer": "stage99"}, LayerNotFoundError, "no layer 'stage99'.*'stage"),
        (make(["stage1", "stage2"]), {}, ValueError, "a single layer is expected"),
        (make(), {"layer": "features.3.squeeze"}, ValueError, "unlisted.*'features.0'"),
        (make(), {"channels": [64]}, ValueError, "has 64 channels, from 0 to 63"),
        (make(), {"channels": []}, ValueError, "has 64 channels"),
        (make(), {"channels": 0}, ValueError, "at least one"),
        (make_pipeline(make()), {}, TypeError, "is a Pipeline.*pipeline"),
        (
            DeepFeatureExtractor("alexnet", "relu7", weights=None),
            {},
            ValueError,
            r"'relu7' gives an output of shape \(4096,\).*'conv1', ..., 'avgpool'",
        ),
    ],
)
def test_what_has_no_maps_is_refused(photograph, extractor, words, error, message):
    """The message says what came, and which layers have maps."""
    with pytest.raises(error, match=message):
        ActivationMapDisplay.from_extractor(extractor, photograph, **words)


# Predictions ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    return data.images[:100] / 16, np.array([f"digit {target}" for target in data.target[:100]])


@pytest.fixture(scope="module")
def classifier(digits):
    flatten = FunctionTransformer(lambda images: np.asarray(images).reshape(len(images), -1))
    return make_pipeline(flatten, LogisticRegression()).fit(*digits)


def test_bars_are_the_most_probable_classes(digits, classifier):
    """As many as asked for, from the top down, by name, with the probability as width."""
    images = digits[0][:3]
    display = PredictionDisplay.from_estimator(classifier, images, top=4)
    for image, row, (left, right) in zip(
        images, classifier.predict_proba(images), display.axes_, strict=True
    ):
        ranked = sorted(zip(row, classifier.classes_, strict=True), reverse=True)[:4]
        assert_allclose([bar.get_width() for bar in right.patches], [p for p, _ in ranked])
        labels = [
            tick.get_text().replace("\N{FIGURE SPACE}", " ") for tick in right.get_yticklabels()
        ]
        assert labels == [f"{p:6.1%}  {name}" for p, name in ranked]
        places = [bar.get_y() + bar.get_height() / 2 for bar in right.patches]
        assert_allclose(places, right.get_yticks())
        assert right.get_ylim()[0] > right.get_ylim()[1]  # the first one is on top
        assert_allclose(left.images[0].get_array()[..., 0], np.round(image * 255), atol=1)


def test_a_backbone_predicts_its_own_categories(photograph, tmp_path):
    """Names and probabilities are those of torchvision's network, without a classifier."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = models.squeezenet1_1(weights=None).eval()
    torch.save(net.state_dict(), tmp_path / "net.pth")
    meant = models.SqueezeNet1_1_Weights.DEFAULT
    with torch.no_grad():
        (expected,) = net(meant.transforms()(photograph)[None]).softmax(dim=1).numpy()
    display = PredictionDisplay.from_backbone(
        "squeezenet1_1", [photograph], weights=tmp_path / "net.pth", top=3
    )
    bars = display.axes_[0, 1]
    ranked = np.argsort(-expected)[:3]
    assert_allclose([bar.get_width() for bar in bars.patches], expected[ranked], rtol=1e-4)
    labels = [tick.get_text().split(maxsplit=1)[1] for tick in bars.get_yticklabels()]
    assert labels == [meant.meta["categories"][place] for place in ranked]


def test_no_more_classes_than_there_are(digits, classifier):
    """A classifier of ten classes shows ten, whatever is asked for."""
    display = PredictionDisplay.from_estimator(classifier, digits[0][:1], top=100)
    assert len(display.axes_[0, 1].patches) == len(classifier.classes_)


def test_an_image_is_shown_upright_whatever_it_is(photograph, tmp_path):
    """A file that is rotated by EXIF is drawn as it is read, not as it lies in the file."""
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "turned.png"
    photograph.save(path, exif=exif)
    display = PredictionDisplay.from_predictions([path], [[("cat", 0.5)]])
    expected = np.asarray(photograph.transpose(Image.Transpose.ROTATE_270))
    assert_array_equal(display.axes_[0, 0].images[0].get_array(), expected)


@pytest.mark.parametrize(("count", "n_cols"), [(1, 2), (3, 2), (4, 3)])
def test_images_stand_in_rows(photograph, count, n_cols):
    """Each image has its bars to the right, in a grid of so many columns."""
    display = PredictionDisplay.from_predictions(
        [photograph] * count, [[("cat", 0.6), ("dog", 0.4)]] * count, n_cols=n_cols
    )
    assert display.axes_.shape == (count, 2)
    for number, (left, right) in enumerate(display.axes_):
        row, column = divmod(number, min(n_cols, count))
        assert (left.get_subplotspec().rowspan.start) == row
        assert (left.get_subplotspec().colspan.start) == 2 * column
        assert (right.get_subplotspec().colspan.start) == 2 * column + 1


def test_what_gives_no_probabilities_is_refused(digits, photograph):
    """An unfitted classifier, one without predict_proba, and predictions of other lengths."""
    with pytest.raises(NotFittedError):
        PredictionDisplay.from_estimator(LogisticRegression(), digits[0])
    flat = digits[0].reshape(100, -1)
    with pytest.raises(TypeError, match=r"LinearSVC has no predict_proba.*LogisticRegression"):
        PredictionDisplay.from_estimator(LinearSVC().fit(flat, digits[1]), flat)
    with pytest.raises(ValueError, match="2 predictions of 1 images"):
        PredictionDisplay.from_predictions([photograph], [[("cat", 1)], [("dog", 1)]])


# Architecture -----------------------------------------------------------------------------------


def test_the_parameters_of_vgg16_are_in_its_linear_layers():
    """The bars, the legend and the title say what counting the tensors of torchvision says."""
    with torch.device("meta"):
        net = models.vgg16(weights=None)
    linear = sum(
        value.numel()
        for module in net.modules()
        if isinstance(module, nn.Linear)
        for value in module.parameters()
    )
    total = sum(value.numel() for value in net.parameters())
    left, right = ArchitectureDisplay.from_backbone("vgg16").axes_
    assert right.get_title(loc="left") == f"{total:,} parameters"
    legend = [text.get_text() for text in right.get_legend().get_texts()]
    assert legend[0] == f"Linear  {linear:,} ({linear / total:.1%})"
    assert legend[1].startswith("Conv2d")
    assert linear == 123_642_856
    names = [tick.get_text() for tick in left.get_yticklabels()]
    assert names[:5] == ["conv1_1", "relu1_1", "conv1_2", "relu1_2", "pool1"]
    width_of = {names[round(bar.get_y() + 0.4)]: bar.get_width() for bar in right.patches}
    assert width_of["fc6"] == net.classifier[0].weight.numel() + 4096
    assert width_of["relu6"] == 0
    assert texts_of(left)[names.index("pool5")] == "512 × 7 × 7"
    right.figure.canvas.draw()
    for axes in (left, right):
        assert max(text.get_window_extent().x1 for text in axes.texts) <= axes.bbox.x1


@pytest.mark.parametrize(("name", "total"), [("vit_b_16", 86_567_656), ("googlenet", 13_004_888)])
def test_the_title_has_all_parameters(name, total):
    """Those of tokens, position embeddings and auxiliary classifiers included."""
    _, right = ArchitectureDisplay.from_backbone(name).axes_
    assert right.get_title(loc="left") == f"{total:,} parameters"


def test_outputs_are_as_wide_as_the_maps():
    """Side of the maps, square root of the tokens, one place for a vector."""
    left, _ = ArchitectureDisplay.from_backbone("vit_b_16", merge_repeats=False).axes_
    widths = [bar.get_width() for bar in left.patches]
    assert_allclose(widths[:2], [14, np.sqrt(197)])
    assert widths[-1] == 1
    assert_allclose([bar.get_x() for bar in left.patches], -np.array(widths) / 2)


def test_a_sequence_is_as_wide_as_a_square_of_its_places():
    """Not of its channels, which come first."""
    net = nn.Sequential(nn.Flatten(2), nn.Conv1d(3, 5, 4, 4))
    steps = transforms.Compose([transforms.Resize((8, 8)), transforms.ToTensor()])
    display = ArchitectureDisplay.from_backbone(net, preprocessing=steps)
    (bar,) = display.axes_[0].patches
    assert bar.get_width() == 4


def test_repeats_share_a_row():
    """Blocks of one kind and shape are merged, with their parameters; nothing is lost."""
    merged = ArchitectureDisplay.from_backbone("resnet50").axes_
    single = ArchitectureDisplay.from_backbone("resnet50", merge_repeats=False).axes_
    labels = [tick.get_text() for tick in merged[0].get_yticklabels()]
    assert labels[3:9] == [
        *("maxpool", "layer1.0–2", "layer2.0–3", "layer3.0–5", "layer4.0–2", "avgpool"),
    ]
    names = [tick.get_text() for tick in single[0].get_yticklabels()]
    assert names == [layer.name for layer in list_layers("resnet50")]
    with torch.device("meta"):
        layer3 = models.resnet50(weights=None).layer3
    counts = {labels[round(bar.get_y() + 0.4)]: bar.get_width() for bar in merged[1].patches}
    assert counts["layer3.0–5"] == sum(value.numel() for value in layer3.parameters())
    assert merged[1].get_title(loc="left") == single[1].get_title(loc="left")


def test_numbers_of_two_digits_are_named_whole():
    """features.9 to features.11 ends in 11, not in 1."""
    left, _ = ArchitectureDisplay.from_backbone("mobilenet_v2").axes_
    labels = [tick.get_text() for tick in left.get_yticklabels()]
    assert {"features.7–10", "features.11–13"} <= set(labels)


def test_the_network_of_an_extractor():
    """Its image size counts; a network of one's own is called by its class."""
    small = ArchitectureDisplay.from_extractor(make())
    assert texts_of(small.axes_[0])[0] == "64 × 31 × 31"
    assert small.name == "squeezenet1_1"
    own = DeepFeatureExtractor(nn.Sequential(nn.ReLU()), "0", preprocessing=transforms.ToTensor())
    display = ArchitectureDisplay.from_extractor(own)
    assert display.name == "Sequential"
    assert display.axes_[1].get_title(loc="left") == "0 parameters"
    with pytest.raises(TypeError, match="is a str"):
        ArchitectureDisplay.from_extractor("vgg16")


# Searches ---------------------------------------------------------------------------------------


def make_search(params, scores, **attributes):
    """Make what a fitted search looks like, with one mean score a candidate."""
    results = {
        "params": params,
        "mean_test_score": np.array(scores, dtype=float),
        "rank_test_score": np.argsort(np.argsort(-np.array(scores))) + 1,
    }
    return SimpleNamespace(cv_results_=results, refit=True, **attributes)


def grid(layers, Cs, **others):
    return [
        {"x__layer": layer, "svc__C": C, **dict(zip(others, values, strict=True))}
        for values in itertools.product(*others.values())
        for C in Cs
        for layer in layers
    ]


@pytest.fixture(scope="module")
def search(digits):
    """A real search, over a list of layers too."""
    images, labels = digits
    extractor = make(image_size=32)
    grid = {
        "deepfeatureextractor__layer": ["stage2", ["stage1", "stage2"]],
        "logisticregression__C": [10, 0.01, 1],
    }
    pipeline = make_pipeline(extractor, LogisticRegression())
    return GridSearchCV(pipeline, grid, cv=2).fit(images[:40], labels[:40])


def test_the_heat_map_holds_the_mean_scores(search):
    """Layers stand as given, C from small to large, and the frame is round the best."""
    display = LayerGridDisplay.from_search(search)
    layers, Cs = ["stage2", ["stage1", "stage2"]], [0.01, 1, 10]
    expected = np.empty((2, 3))
    for params, score in zip(
        search.cv_results_["params"], search.cv_results_["mean_test_score"], strict=True
    ):
        row = layers.index(params["deepfeatureextractor__layer"])
        expected[row, Cs.index(params["logisticregression__C"])] = score
    assert_array_equal(display.im_.get_array(), expected)
    assert np.ptp(expected) > 0
    axes = display.ax_
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["stage2", "stage1 + stage2"]
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["0.01", "1", "10"]
    best = search.best_params_
    place = (
        layers.index(best["deepfeatureextractor__layer"]),
        Cs.index(best["logisticregression__C"]),
    )
    assert display.best == place
    for line in axes.lines:
        assert_allclose([line.get_ydata().mean(), line.get_xdata().mean()], place, atol=0.2)
    written = [[text.get_text() for text in row] for row in display.text_]
    assert written == [[f"{score:.3f}" for score in row] for row in expected]


def test_a_cell_has_the_best_score_over_other_parameters():
    """Where more than layer and C was searched, and where a candidate failed."""
    params = grid(["a", "b"], [1, 2], **{"x__norm": ["l2", None]})
    scores = np.array([0.1, 0.9, 0.3, np.nan, 0.5, 0.2, 0.25, 0.8])
    display = LayerGridDisplay.from_search(make_search(params, scores))
    assert_array_equal(display.scores, [[0.5, 0.3], [0.9, 0.8]])
    assert display.best == (1, 0)


def test_a_cell_without_a_candidate_is_empty():
    """A random search does not fill the grid."""
    params = grid(["a", "b"], [1, 2])[:3]
    display = LayerGridDisplay.from_search(make_search(params, [0.1, 0.2, 0.3]))
    assert_array_equal(display.scores, [[0.1, 0.3], [0.2, np.nan]])
    assert display.text_[1, 1] is None


def test_parameters_are_named_where_several_would_do():
    """Two steps with a C: the message asks which, and the answer is taken."""
    params = [entry | {"other__C": 1} for entry in grid(["a", "b"], [1, 2])]
    search = make_search(params, [0.1, 0.2, 0.3, 0.4])
    with pytest.raises(ValueError, match=r"several.*'svc__C', 'other__C'.*C_param="):
        LayerGridDisplay.from_search(search)
    display = LayerGridDisplay.from_search(search, C_param="svc__C")
    assert display.scores.shape == (2, 2)
    with pytest.raises(ValueError, match="no candidate has both of 'x__layer' and 'svc__c'"):
        LayerGridDisplay.from_search(search, C_param="svc__c")


def test_the_score_is_named_where_there_are_several():
    """By default it is the one of refit."""
    search = make_search(grid(["a"], [1, 2]), [0.1, 0.2])
    results = search.cv_results_
    for name, scores in (("f1", [0.3, 0.4]), ("neg_log_loss", [-0.4, -0.5])):
        results[f"mean_test_{name}"] = np.array(scores)
        results[f"rank_test_{name}"] = np.argsort(np.argsort(-np.array(scores))) + 1
    del results["mean_test_score"], results["rank_test_score"]
    with pytest.raises(ValueError, match=r"\['f1', 'neg_log_loss'\]; name one"):
        LayerGridDisplay.from_search(search)
    search.refit = "f1"
    assert LayerGridDisplay.from_search(search).best == (0, 1)
    chosen = LayerGridDisplay.from_search(search, score_name="neg_log_loss")
    assert_array_equal(chosen.scores, [[-0.4, -0.5]])
    assert chosen.best == (0, 0)


def test_what_is_no_fitted_search_over_layers_is_refused(digits):
    """Unfitted, not a search at all, or a search of something else."""
    classifier = LogisticRegression()
    search = GridSearchCV(classifier, {"C": [1, 2]}, cv=2)
    with pytest.raises(NotFittedError, match="GridSearchCV is not fitted"):
        LayerGridDisplay.from_search(search)
    with pytest.raises(TypeError, match="is a LogisticRegression; a fitted search"):
        LayerGridDisplay.from_search(classifier)
    flat = digits[0].reshape(100, -1)
    with pytest.raises(ValueError, match=r"no parameter ends in 'layer'.*\['C'\].*layer_param="):
        LayerGridDisplay.from_search(search.fit(flat, digits[1]))


def test_scores_are_written_in_ink_that_shows():
    """Dark on light cells, light on dark ones."""
    display = LayerGridDisplay(np.array([[0.0, 1.0]]), layers=["a"], C=[1, 2], best=(0, 1)).plot(
        cmap="gray"
    )
    assert [text.get_color() for text in display.text_[0]] == ["white", "black"]


# Learning curves --------------------------------------------------------------------------------


def test_curves_are_the_history():
    """Loss to the left, score to the right, training and validation in each."""
    display = LearningCurveDisplay.from_estimator(SimpleNamespace(history_=HISTORY))
    left, right = display.axes_
    for axes, quantity, words in ((left, "loss", "loss"), (right, "score", "accuracy")):
        assert axes.get_ylabel() == words
        for line, part in zip(axes.lines, ("train", "validation"), strict=True):
            assert_array_equal(line.get_xdata(), range(1, 11))
            expected = [entry[f"{part}_{quantity}"] for entry in HISTORY]
            assert_array_equal(line.get_ydata(), expected)
    assert [text.get_text() for text in left.get_legend().get_texts()] == ["training", "validation"]


@pytest.mark.parametrize("early_stopping", [False, True])
def test_a_fitted_classifier_shows_its_epochs(digits, early_stopping):
    """Its history has the entries that are drawn, with and without validation images."""
    classifier = FineTuneClassifier(
        "squeezenet1_1",
        weights=None,
        unfreeze=None,
        image_size=32,
        max_epochs=2,
        num_workers=0,
        early_stopping=early_stopping,
        validation_fraction=0.3,
        random_state=0,
    ).fit(digits[0][:40], digits[1][:40])
    display = LearningCurveDisplay.from_estimator(classifier)
    assert len(display.lines_) == (4 if early_stopping else 2)
    for name, line in display.lines_.items():
        assert_array_equal(line.get_xdata(), [1, 2])
        assert_array_equal(line.get_ydata(), [entry[name] for entry in classifier.history_])


def test_without_validation_there_is_no_such_curve():
    """One epoch is drawn too, and its axis counts in whole epochs."""
    none = {"validation_loss": None, "validation_score": None}
    display = LearningCurveDisplay([HISTORY[0] | none]).plot()
    assert set(display.lines_) == {"train_loss", "train_score"}
    assert [len(axes.lines) for axes in display.axes_] == [1, 1]
    low, high = display.axes_[0].get_xlim()
    ticks = [tick for tick in display.axes_[0].get_xticks() if low <= tick <= high]
    assert ticks == [1]


def test_an_epoch_without_validation_is_a_gap():
    """partial_fit may come with validation data only now and then."""
    none = {"validation_loss": None, "validation_score": None}
    display = LearningCurveDisplay([HISTORY[0], HISTORY[1] | none, HISTORY[2]]).plot()
    values = display.lines_["validation_loss"].get_ydata()
    assert_array_equal(np.isnan(values), [False, True, False])


@pytest.mark.parametrize("estimator", [LogisticRegression(), SimpleNamespace(history_=[])])
def test_without_a_history_there_is_no_curve(estimator):
    """An unfitted classifier, or another one."""
    with pytest.raises(NotFittedError, match="no history_"):
        LearningCurveDisplay.from_estimator(estimator)


# Axes -------------------------------------------------------------------------------------------

NAMES = ["black-and-gold garden spider", "dahlia", "daisy", "palace", "three-toed sloth"]


def make_activation_maps():
    maps = np.random.default_rng(0).random((6, 5, 5), dtype=np.float32)
    image = Image.new("RGB", (64, 64), "red")
    return ActivationMapDisplay(maps, image=image, layer="features.10", channels=range(6))


def make_predictions():
    images = [Image.new("RGB", (64, 48), "red")] * 3
    values = [[1, 0, 0, 0, 0], [0.5, 0.3, 0.1, 0.06, 0.04], [0.2] * 5]
    return PredictionDisplay(
        images, predictions=[list(zip(NAMES, row, strict=True)) for row in values]
    )


def make_architecture(name="vgg16"):
    return ArchitectureDisplay(list_layers(name), name=name)


def make_layer_grid():
    scores = np.linspace(0.5, 0.9, 33).reshape(3, 11)
    C = [1e-5, 1e-4, 5e-4, 1e-3, 5e-3, 1e-2, 1e-1, 1, 5, 10, 100]
    return LayerGridDisplay(scores, layers=["relu6", "relu7", "relu8"], C=C, best=(2, 10))


def make_learning_curve():
    return LearningCurveDisplay(HISTORY)


DISPLAYS = {  # with the number of axes
    "maps": (make_activation_maps, 7),
    "predictions": (make_predictions, 6),
    "architecture": (make_architecture, 2),
    "grid": (make_layer_grid, 1),
    "curve": (make_learning_curve, 2),
}
EACH = pytest.mark.parametrize(("make_display", "count"), DISPLAYS.values(), ids=DISPLAYS)


def axes_of(display):
    return list(np.ravel(getattr(display, "axes_", getattr(display, "ax_", None))))


@EACH
def test_plot_draws_in_a_figure_of_its_own(make_display, count):
    """It returns the display, with the figure and the axes as attributes."""
    display = make_display()
    assert display.plot() is display
    axes = axes_of(display)
    assert len(axes) == count
    assert plt.get_fignums() == [display.figure_.number]
    assert {axis.figure for axis in axes} == {display.figure_}


@EACH
def test_plot_draws_in_the_axes_that_are_given(make_display, count):
    """As many as it needs are used as they are, in order."""
    figure, given = plt.subplots(count, squeeze=False)
    display = make_display().plot(given)
    assert axes_of(display) == list(given.ravel())
    assert display.figure_ is figure
    assert plt.get_fignums() == [figure.number]


@EACH
def test_plot_divides_a_single_subplot(make_display, count):
    """What is drawn stays in its place, and the neighbour is left alone."""
    figure, (neighbour, given) = plt.subplots(1, 2, figsize=(20, 8))
    place = given.get_position()
    display = make_display().plot(given)
    assert display.figure_ is figure
    assert not neighbour.has_data()
    assert len(axes_of(display)) == count
    for axes in axes_of(display):
        inner = axes.get_position(original=True)
        assert inner.x0 >= place.x0 - 1e-9
        assert inner.x1 <= place.x1 + 1e-9
        assert inner.y0 >= place.y0 - 1e-9
        assert inner.y1 <= place.y1 + 1e-9


@EACH
def test_axes_that_do_not_fit_are_refused(make_display, count):
    """Too many, none at all, or something else."""
    _, given = plt.subplots(count + 1, squeeze=False)
    with pytest.raises(ValueError, match=rf"holds {count + 1} Axes; ({count}|a single one)"):
        make_display().plot(given)
    with pytest.raises(ValueError, match="holds 0 Axes"):
        make_display().plot([])
    with pytest.raises(TypeError, match="holds a str"):
        make_display().plot(["axes"])


def test_axes_outside_a_grid_cannot_be_divided():
    """Axes that were placed by hand have no grid to divide."""
    axes = plt.figure().add_axes((0, 0, 1, 1))
    with pytest.raises(ValueError, match=r"cannot be divided: pass 2 Axes.*pyplot\.subplots"):
        make_learning_curve().plot(axes)


def hidden_texts(axes):
    """Yield texts that are there but not drawn: of axes that are off, of ticks out of sight."""
    for axis in (axes.xaxis, axes.yaxis):
        if not axes.axison:
            yield from axis.findobj(Text)
        low, high = sorted(axis.get_view_interval())
        for label, place in zip(axis.get_majorticklabels(), axis.get_majorticklocs(), strict=True):
            if not low <= place <= high:
                yield label


def find_collisions(figure):
    """Draw a figure; return texts that the edge cuts off, and pairs of texts that overlap."""
    figure.canvas.draw()
    hidden = {id(text) for axes in figure.axes for text in hidden_texts(axes)}
    boxes = [
        (text.get_text(), text.get_window_extent())
        for text in figure.findobj(Text)
        if text.get_text().strip() and text.get_visible() and id(text) not in hidden
    ]
    assert len(boxes) > 4
    within = figure.bbox.padded(1)
    cut = [
        text
        for text, box in boxes
        if not (within.contains(box.x0, box.y0) and within.contains(box.x1, box.y1))
    ]
    return cut + [
        (one, other)
        for (one, first), (other, second) in itertools.combinations(boxes, 2)
        if first.padded(-1).overlaps(second.padded(-1))
    ]


@pytest.mark.parametrize(
    "make_display",
    [
        *(make for make, _ in DISPLAYS.values()),
        *(
            functools.partial(make_architecture, name)
            for name in ("resnet152", "swin_t", "vit_b_16")
        ),
    ],
)
def test_no_text_collides_with_another(make_display):
    """Every word of a picture can be read, and none is cut off."""
    assert find_collisions(make_display().plot().figure_) == []


@EACH
def test_no_text_collides_in_a_subplot_of_good_size(make_display, count):
    """Room between the parts does not hang on the layout of a figure of our own."""
    figure, (_, given) = plt.subplots(1, 2, figsize=(22, 9))
    make_display().plot(given)
    assert find_collisions(figure) == []


class WithoutMatplotlib:
    """Finds no matplotlib, on behalf of all finders after it."""

    @staticmethod
    def find_spec(name, *_):
        if name == "matplotlib":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def test_matplotlib_is_needed_to_draw_alone(monkeypatch):
    """Without it the displays can be imported, and the error names the extra that brings it."""
    for name in list(sys.modules):
        if name.startswith(("matplotlib", "deepfeat.plotting")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr(deepfeat, "plotting")
    monkeypatch.setattr(sys, "meta_path", [WithoutMatplotlib, *sys.meta_path])
    display = importlib.import_module("deepfeat.plotting").LearningCurveDisplay(HISTORY)
    with pytest.raises(ImportError, match=r"pip install 'deepfeat\[plot\]'"):
        display.plot()
    assert display.history is HISTORY
