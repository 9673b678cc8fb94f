"""Tests of how estimators present themselves: their text, and links to the documentation."""

import numpy as np
import pytest
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.svm import LinearSVC
from torch import nn

import deepfeat
from deepfeat import DeepFeatureExtractor, FineTuneClassifier, _representation

SITE = "https://example.org/stable"


@pytest.fixture
def published(monkeypatch):
    """A documentation with an address, as an installed release has."""
    monkeypatch.setattr(_representation, "find_documentation", lambda: f"{SITE}/")


def test_long_texts_are_broken_into_lines():
    """At the width that scikit-learn breaks them at."""
    classifier = FineTuneClassifier(
        "resnet18", max_epochs=99, class_weight="balanced", head="append"
    )
    lines = repr(classifier).splitlines()
    assert len(lines) > 1
    assert all(len(line) <= 80 for line in lines)


@pytest.mark.parametrize("kind", [DeepFeatureExtractor, FineTuneClassifier])
def test_a_module_is_shown_by_the_name_of_its_class(kind):
    """Its layers would fill a page."""
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())
    assert repr(kind(module)) == f"{kind.__name__}(backbone=Sequential(...))"


def test_the_text_of_a_trained_extractor_is_short():
    """What `to_extractor` returns names the network and the size of its input."""
    X = np.random.default_rng(0).random((4, 32, 32, 3))
    classifier = FineTuneClassifier("resnet10_slim", image_size=32, max_epochs=1, head_epochs=0)
    extractor = classifier.fit(X, [0, 1, 0, 1]).to_extractor()
    assert "".join(repr(extractor).split()) == (
        "DeepFeatureExtractor(backbone=SlimResNet(...),"
        "preprocessing=Preprocessing(input_shape=(3,32,32)))"
    )


def test_parts_of_pipelines_and_searches_are_broken_into_lines():
    """As those of scikit-learn are."""
    extractor = DeepFeatureExtractor(
        "resnet18", ["layer1", "layer2", "layer3"], pooling=["avg", "max"], norm="max"
    )
    grid = {"deepfeatureextractor__norm": ["l2", None]}
    for whole in (
        make_pipeline(extractor, LinearSVC()),
        GridSearchCV(make_pipeline(extractor, LinearSVC()), grid),
        GridSearchCV(extractor, {"layer": [1]}),
    ):
        assert all(len(line) <= 82 for line in repr(whole).splitlines())
    assert "estimator=DeepFeatureExtractor(" in repr(whole)


def test_subclasses_are_shown_by_their_own_name_and_parameters():
    """A class of the user may have parameters of its own."""

    class Doubled(DeepFeatureExtractor):
        def __init__(self, backbone="resnet18", *, factor=2):
            super().__init__(backbone)
            self.factor = factor

    assert repr(clone(Doubled(factor=3))) == "Doubled(factor=3)"


@pytest.mark.parametrize("kind", [DeepFeatureExtractor, FineTuneClassifier])
def test_html_links_to_the_page_of_the_class(kind, published):
    """In a pipeline, too, where scikit-learn's own steps link to scikit-learn's."""
    address = f'href="{SITE}/_generated/deepfeat.{kind.__name__}.html"'
    assert address in kind()._repr_html_()
    assert address in make_pipeline(kind(), LinearSVC())._repr_html_()


def test_html_has_no_link_without_a_page(published):
    """Of a class of the user, there is no page."""

    class Own(DeepFeatureExtractor):
        pass

    assert "href=" not in Own()._repr_html_()


def test_html_has_no_link_without_a_documentation(monkeypatch):
    """As long as the package names no address."""
    monkeypatch.setattr(_representation, "find_documentation", lambda: "")
    assert "href=" not in DeepFeatureExtractor()._repr_html_()


@pytest.mark.parametrize(
    ("urls", "expected"),
    [
        (["Source, https://example.org/code", f"Documentation, {SITE}"], SITE),
        (["Source, https://example.org/code"], ""),
        (None, ""),
    ],
)
def test_the_address_is_that_in_the_metadata(urls, expected, monkeypatch):
    """Whoever publishes deepfeat writes it into pyproject.toml, once."""

    class Metadata:
        def get_all(self, name):
            assert name == "Project-URL"
            return urls

    monkeypatch.setattr(_representation.metadata, "metadata", lambda name: Metadata())
    assert _representation.find_documentation.__wrapped__() == expected


def test_modules_are_attributes_of_the_package():
    """`deepfeat.datasets` and `deepfeat.plotting` need no import of their own."""
    assert deepfeat.datasets.load_image_folder.__name__ == "load_image_folder"
    assert deepfeat.plotting.LayerGridDisplay.__name__ == "LayerGridDisplay"
