"""Tests of networks with new heads: built from a backbone, or from a state dict."""

import pytest
import torch
from numpy.testing import assert_array_equal
from torch import nn
from torchvision import models

from deepfeat import FineTuneClassifier

# From a backbone ----------------------------------------------------------------------------------


def test_the_network_of_the_user_stays_as_it_was(
    make_plain, make_classifier, make_images, assert_same_state
):
    """Weights, mode, gradients and hooks: a copy is trained."""
    net = make_plain(norm=True).train()
    net.fc.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    classifier = make_classifier(net).fit(*make_images())
    assert classifier.module_ is not net
    assert_same_state(net.state_dict(), before)
    assert net.training
    assert net.blocks.training
    assert [name for name, value in net.named_parameters() if not value.requires_grad] == [
        "fc.weight"
    ]
    assert all(value.grad is None for value in net.parameters())
    assert net.fc.out_features == 7


def test_a_named_network_is_not_shared_with_what_is_trained(
    make_images, make_classifier, seeded, state_of, assert_same_state
):
    """The next classifier, and the extractor, get the pretrained network."""
    X, y = make_images(4, 32)
    params = {"unfreeze": "all", "learning_rate": 0.1, "backbone_learning_rate": 0.1}
    make_classifier("squeezenet1_1", **params).fit(X, y)
    before = seeded(models.squeezenet1_1, weights=None).state_dict()
    again = dict(state_of(make_classifier("squeezenet1_1", unfreeze=None).fit(X, y)))
    for name in ("classifier.1.weight", "classifier.1.bias"):  # the new head
        del before[name], again[name]
    assert_same_state(again, before)


class PoolingByFunction(nn.Module):
    """Classify each position, and take the mean by a function, not a module."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 1)

    def forward(self, images):
        return self.conv(images).mean((2, 3))


def test_a_head_replaces_a_layer_before_pooling_by_function(make_images, make_classifier, seeded):
    """A 1 x 1 convolution is a classification layer too."""
    X, y = make_images()
    classifier = make_classifier(seeded(PoolingByFunction)).fit(X, y)
    assert classifier.module_.conv.out_channels == 2
    assert classifier.predict_proba(X).shape == (8, 2)


def test_a_head_cannot_be_appended_before_pooling_by_function(make_classifier, make_images, seeded):
    """It would come after feature maps."""
    with pytest.raises(
        ValueError, match=r"head='append' is not possible for PoolingByFunction: Poo"
    ):
        make_classifier(seeded(PoolingByFunction), head="append").fit(*make_images())


def test_a_network_of_two_branches_has_no_layer_to_replace(make_classifier, make_images, seeded):
    """One branch would have three outputs and the other five."""
    with pytest.raises(ValueError, match=r"head='replace' is not possible for Branches: Branches"):
        make_classifier(seeded(Branches)).fit(*make_images())


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(768, 5), nn.Linear(768, 5)

    def forward(self, images):
        return self.first(images.flatten(1)) + self.second(images.flatten(1))


# From a state dict --------------------------------------------------------------------------------


@pytest.mark.parametrize("unfreeze", [None, "inception4c", "all"])
def test_auxiliary_classifiers_are_rebuilt_where_there_are_any(
    tmp_path, unfreeze, make_images, make_classifier, assert_same_state, state_of
):
    """And can be trained again."""
    file = tmp_path / "classifier.safetensors"
    X, y = make_images(2, 32)
    classifier = make_classifier("googlenet", unfreeze=unfreeze, max_epochs=1).fit(X, y)
    classifier.save(file)
    again = FineTuneClassifier.load(file)
    assert_same_state(state_of(again), state_of(classifier))
    assert again.module_.aux_logits is classifier.module_.aux_logits is bool(unfreeze)
    again.partial_fit(X, y)
    assert again.n_iter_ == 2


@pytest.mark.parametrize("name", ["squeezenet1_1", "googlenet", "mnasnet0_5"])
@pytest.mark.parametrize("head", ["replace", "append"])
@pytest.mark.parametrize("n_outputs", [1000, 10])
def test_a_weights_file_is_not_needed_again(
    tmp_path, name, head, n_outputs, seeded, make_images, make_classifier
):
    """Nor its number of classes; GoogLeNet rescales its input for pretrained weights only."""
    options = {"init_weights": False} if name == "googlenet" else {}
    net = seeded(models.get_model, name, weights=None, num_classes=n_outputs, **options)
    weights, file = tmp_path / "weights.pth", tmp_path / "classifier.safetensors"
    torch.save(net.state_dict(), weights)
    X, y = make_images(4, 32)
    classifier = make_classifier(name, weights=weights, unfreeze=None, head=head, max_epochs=1)
    classifier.fit(X, y).save(file)
    weights.unlink()
    again = FineTuneClassifier.load(file)
    assert_array_equal(again.decision_function(X), classifier.decision_function(X))
    assert again.weights == str(weights)
