"""PredictionDisplay: the artists, compared with values computed by hand."""

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image
from sklearn.base import BaseEstimator
from sklearn.exceptions import NotFittedError
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer
from sklearn.svm import LinearSVC
from torchvision import models

from deepfeat.plotting import PredictionDisplay


@pytest.fixture(scope="module")
def classifier(digits):
    flatten = FunctionTransformer(lambda images: np.asarray(images).reshape(len(images), -1))
    return make_pipeline(flatten, LogisticRegression()).fit(*digits)


def test_bars_are_the_most_probable_classes(digits, classifier):
    """`top` bars from top to bottom, labelled with the class, as wide as its probability."""
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
        centres = [bar.get_y() + bar.get_height() / 2 for bar in right.patches]
        assert_allclose(centres, right.get_yticks())
        assert right.get_ylim()[0] > right.get_ylim()[1]  # the first one is on top
        assert_allclose(left.images[0].get_array()[..., 0], np.round(image * 255), atol=1)


def test_with_labels_the_worst_predictions_come_first(digits, classifier):
    """In order of the probability of the true class, which is named above and has its own bar."""
    images, labels = digits[0][:40], digits[1][:40].copy()
    labels[[3, 17]] = labels[[17, 3]]  # two wrong labels
    display = PredictionDisplay.from_estimator(
        classifier, images, y_true=labels, top=2, max_images=5
    )
    columns = [list(classifier.classes_).index(label) for label in labels]
    truth = classifier.predict_proba(images)[range(40), columns]
    worst = np.argsort(truth)[:5]
    assert {3, 17} <= set(worst)
    assert len(display.axes_) == 5
    for index, (left, right) in zip(worst, display.axes_, strict=True):
        assert_allclose(left.images[0].get_array()[..., 0], np.round(images[index] * 255), atol=1)
        assert left.get_title() == f"true: {labels[index]}"
        names = [tick.get_text().split(maxsplit=1)[1] for tick in right.get_yticklabels()]
        assert len(names) == 2 + (index in (3, 17))  # the true class is shown in any case
        colours = [bar.get_facecolor() for bar in right.patches]
        true = names.index(labels[index])
        assert right.patches[true].get_width() == pytest.approx(truth[index])
        assert colours.count(colours[true]) == 1


def test_a_dozen_of_many_labelled_images_is_shown(digits, classifier):
    """A display of a whole test set would not fit on any page."""
    shown = PredictionDisplay.from_estimator(classifier, digits[0], y_true=digits[1])
    assert len(shown.axes_) == 12
    unlabelled = PredictionDisplay.from_estimator(classifier, digits[0][:14])
    assert len(unlabelled.axes_) == 14
    assert len(PredictionDisplay.from_estimator(classifier, digits[0], max_images=3).axes_) == 3


def test_the_order_of_the_classes_does_not_matter(digits):
    """A classifier may have its classes in any order; equal probabilities keep that of images."""

    class Fixed(BaseEstimator):
        def fit(self, X, y):
            self.classes_ = ["z", "a", "m"]
            return self

        def predict_proba(self, X):
            return [[0.2, 0.7, 0.1], [0.2, 0.7, 0.1], [0.9, 0.05, 0.05]]

    display = PredictionDisplay.from_estimator(
        Fixed().fit([], []), digits[0][:3], y_true=["m", "m", "z"]
    )
    for number, (left, right) in enumerate(display.axes_):
        assert_allclose(left.images[0].get_array()[..., 0], digits[0][number] * 255, atol=1)
        widths = [bar.get_width() for bar in right.patches]
        assert widths == sorted([[0.2, 0.7, 0.1], [0.9, 0.05, 0.05]][number == 2], reverse=True)
    titles = [left.title.get_color() for left, _ in display.axes_]
    assert titles[0] == titles[1] != titles[2]  # two are wrong, one is right


def test_several_labels_per_image_are_refused(digits):
    """They have no single true class."""
    y = np.stack([digits[1] == "digit 0", digits[1] == "digit 1"], axis=1)
    flat = FunctionTransformer(lambda images: np.asarray(images).reshape(len(images), -1))
    several = make_pipeline(flat, KNeighborsClassifier()).fit(digits[0], y)
    with pytest.raises(ValueError, match=r"^estimator must predict one class per image; Pipeline"):
        PredictionDisplay.from_estimator(several, digits[0][:3])


@pytest.mark.parametrize("name", ["max_images", "top", "n_cols"])
def test_counts_are_at_least_one(digits, classifier, name):
    """Zero and negative numbers would drop images without a word."""
    with pytest.raises(ValueError, match=rf"^{name} must be an int of at least 1; got 0\.$"):
        PredictionDisplay.from_estimator(classifier, digits[0][:3], **{name: 0})


def test_class_names_are_not_read_as_mathematics(photograph):
    """Dollars and underscores are shown."""
    display = PredictionDisplay.from_predictions([photograph], [[("$\\frac$", 0.5)]])
    display.figure_.canvas.draw()


@pytest.mark.parametrize(
    ("y_true", "message"),
    [
        (["digit 0"], r"^y_true must have shape \(2,\); got \(1,\)\.$"),
        (["digit 0", "digit 11"], r"^y_true must hold classes of the classifier .* 'digit 11'"),
        ([0, 1], r"^y_true must hold classes of the classifier .*; got 0\.$"),
    ],
)
def test_labels_that_cannot_be_are_refused(digits, classifier, y_true, message):
    """Another number of them, or others than the classes."""
    with pytest.raises(ValueError, match=message):
        PredictionDisplay.from_estimator(classifier, digits[0][:2], y_true=y_true)


def test_a_backbone_predicts_its_own_categories(photograph, tmp_path):
    """Names and probabilities are those of torchvision's network, without a classifier."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = models.squeezenet1_1(weights=None).eval()
    torch.save(net.state_dict(), tmp_path / "net.pth")
    weights = models.SqueezeNet1_1_Weights.DEFAULT
    with torch.no_grad():
        (expected,) = net(weights.transforms()(photograph)[None]).softmax(dim=1).numpy()
    display = PredictionDisplay.from_backbone(
        "squeezenet1_1", [photograph], weights=tmp_path / "net.pth", top=3
    )
    bars = display.axes_[0, 1]
    ranked = np.argsort(-expected)[:3]
    assert_allclose([bar.get_width() for bar in bars.patches], expected[ranked], rtol=1e-4)
    labels = [tick.get_text().split(maxsplit=1)[1] for tick in bars.get_yticklabels()]
    assert labels == [weights.meta["categories"][index] for index in ranked]


def test_no_more_classes_than_there_are(digits, classifier):
    """A classifier of ten classes shows at most ten."""
    display = PredictionDisplay.from_estimator(classifier, digits[0][:1], top=100)
    assert len(display.axes_[0, 1].patches) == len(classifier.classes_)


def test_an_image_is_shown_upright_whatever_it_is(photograph, tmp_path):
    """A file with an EXIF orientation is shown upright, and not as it is stored."""
    exif = Image.Exif()
    exif[0x0112] = 6
    path = tmp_path / "turned.png"
    photograph.save(path, exif=exif)
    display = PredictionDisplay.from_predictions([path], [[("cat", 0.5)]])
    expected = np.asarray(photograph.transpose(Image.Transpose.ROTATE_270))
    assert_array_equal(display.axes_[0, 0].images[0].get_array(), expected)


@pytest.mark.parametrize(("count", "n_cols"), [(1, 2), (3, 2), (4, 3)])
def test_images_are_arranged_in_columns(photograph, count, n_cols):
    """Each image has its bars to the right, in a grid of `n_cols` columns."""
    display = PredictionDisplay.from_predictions(
        [photograph] * count, [[("cat", 0.6), ("dog", 0.4)]] * count, n_cols=n_cols
    )
    assert display.axes_.shape == (count, 2)
    for index, (left, right) in enumerate(display.axes_):
        row, column = divmod(index, min(n_cols, count))
        assert (left.get_subplotspec().rowspan.start) == row
        assert (left.get_subplotspec().colspan.start) == 2 * column
        assert (right.get_subplotspec().colspan.start) == 2 * column + 1


def test_a_classifier_without_probabilities_is_refused(digits, photograph):
    """So are an unfitted classifier, and predictions that do not match the images."""
    with pytest.raises(NotFittedError):
        PredictionDisplay.from_estimator(LogisticRegression(), digits[0])
    flat = digits[0].reshape(100, -1)
    with pytest.raises(TypeError, match=r"have predict_proba; got LinearSVC: .*LogisticRegression"):
        PredictionDisplay.from_estimator(LinearSVC().fit(flat, digits[1]), flat)
    with pytest.raises(ValueError, match=r"per image; got 2 for 1 images\."):
        PredictionDisplay.from_predictions([photograph], [[("cat", 1)], [("dog", 1)]])
