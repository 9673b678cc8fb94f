"""Tests of freezing: the trained part changes, and the frozen part is the same to the bit."""

import pytest
import torch
from torch import nn
from torchvision import models

from deepfeat import LayerNotFoundError
from deepfeat._finetuning import training as _training
from deepfeat._finetuning.cutting import find_cut
from deepfeat._finetuning.freezing import (
    Trained,
    group_parameters,
    set_train_mode,
)

# Frozen means frozen ----------------------------------------------------------------------------

# What is trained, as paths that parameters and buffers begin with, is written down by hand.
VGG_END = ("features.22.", "features.23.", "features.25.", "features.26.", "classifier.")
DENSE_END = ("features.denseblock4.", "features.norm5.", "classifier.")
TRAINED = {
    ("resnet18", None): ("fc.",),
    ("resnet18", "layer4"): ("layer4.", "fc."),
    ("resnet18", "stage3"): ("layer2.", "layer3.", "layer4.", "fc."),
    ("resnet18", ("layer2",)): ("layer2.", "fc."),
    ("resnet18", ("bn1", "layer3.1")): ("bn1.", "layer3.1.", "fc."),
    ("resnet18", "layer4.0.conv2"): (
        "layer4.0.conv2.",
        "layer4.0.bn2.",
        "layer4.0.downsample.",
        "layer4.1.",
        "fc.",
    ),
    ("resnet18", -3): ("layer4.1.", "fc."),
    ("vgg11_bn", ("bn5_2",)): ("features.26.", "classifier.6."),
    ("densenet121", "features.denseblock4"): DENSE_END,
    ("densenet121", ("features.norm5",)): ("features.norm5.", "classifier."),
    ("mobilenet_v2", "features.17"): ("features.17.", "features.18.", "classifier."),
    ("mobilenet_v2", "stage5"): (*tuple(f"features.{i}." for i in range(14, 19)), "classifier."),
    ("mobilenet_v2", ("features.0", "features.18.1")): (
        "features.0.",
        "features.18.1.",
        "classifier.",
    ),
    ("mobilenet_v2", "features.17.conv.1.0"): (
        "features.17.conv.1.",
        "features.17.conv.2.",
        "features.17.conv.3.",
        "features.18.",
        "classifier.",
    ),
    ("mobilenet_v2", "all"): ("",),
}
# Wide layers make these slow, and each repeats on one network what another shows faster.
SLOW_TRAINED = {
    ("vgg11_bn", None): ("classifier.6.",),
    ("vgg11_bn", "conv5_1"): VGG_END,
    ("vgg11_bn", "pool4"): VGG_END,
    ("vgg11_bn", "stage5"): VGG_END,
    ("vgg11_bn", ("fc7",)): ("classifier.3.", "classifier.6."),
    ("vgg11_bn", "all"): ("",),
    ("densenet121", None): ("classifier.",),
    ("densenet121", "all"): ("",),
    ("resnet18", "all"): ("",),
}
BY_SGD = [("mobilenet_v2", "features.17"), ("resnet18", "layer4")]


def assert_frozen(before, after, trained):
    """Raise unless all of the trained part has changed, and nothing else."""
    assert after.keys() == before.keys()
    for name, value in after.items():
        if name.startswith(trained):
            if value.shape == before[name].shape:  # else it is the new head
                assert not torch.equal(value, before[name]), f"{name} was not trained"
        else:
            assert torch.equal(value, before[name]), f"{name} is not frozen"


@pytest.fixture
def check_frozen(seeded, make_images, make_classifier, state_of):
    """Fine-tune a torchvision network, and compare it with the same one before training."""

    def check_frozen(case, **params):
        name, unfreeze = case
        before = seeded(models.get_model, name, weights=None).state_dict()
        X, y = make_images(6, 32)
        unfreeze = list(unfreeze) if isinstance(unfreeze, tuple) else unfreeze
        params = {"weight_decay": 0.1, "batch_size": 3, "backbone_learning_rate": 1e-3} | params
        classifier = make_classifier(name, unfreeze=unfreeze, **params).fit(X, y)
        assert_frozen(before, state_of(classifier), (TRAINED | SLOW_TRAINED)[case])

    return check_frozen


@pytest.mark.parametrize(
    "case",
    [*TRAINED, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW_TRAINED)],
    ids=str,
)
def test_frozen_means_frozen(case, check_frozen):
    """Weights and statistics, with weight decay, dropout and cached activations."""
    check_frozen(case, augment=None, max_epochs=3)


@pytest.mark.parametrize("case", BY_SGD, ids=str)
def test_frozen_means_frozen_for_each_optimizer(case, check_frozen):
    """Also when each image runs through the whole network in every epoch."""
    check_frozen(case, augment="crop", optimizer="sgd")


def test_freezing_by_requires_grad_alone_would_not_pass(monkeypatch, check_frozen):
    """The statistics of BatchNorm drift in train mode: the law above sees that."""
    monkeypatch.setattr(_training, "set_train_mode", lambda module, trained: module.train())
    with pytest.raises(AssertionError, match=r"features.0.1.running_mean is not frozen"):
        check_frozen(("mobilenet_v2", "features.17"), augment="crop")


def test_a_frozen_parameter_without_weight_decay_would_not_pass(monkeypatch, check_frozen):
    """The law above sees a single weight that decays."""

    def freeze_gradients(module, trained):
        for _name, parameter in module.named_parameters():
            parameter.requires_grad_(True)
        module.features[3].conv[0][0].weight.data *= 1 - 1e-6

    monkeypatch.setattr("deepfeat._finetuning.fitting.freeze", freeze_gradients)
    with pytest.raises(AssertionError, match="is not frozen"):
        check_frozen(("mobilenet_v2", "features.17"), augment="crop")


VIT_TRAINED = {
    None: ("heads.",),
    "encoder.layers.encoder_layer_2": ("encoder.layers.encoder_layer_2.", "encoder.ln.", "heads."),
    "encoder.layers.encoder_layer_1": (
        "encoder.layers.encoder_layer_1.",
        "encoder.layers.encoder_layer_2.",
        "encoder.ln.",
        "heads.",
    ),
    "encoder": ("encoder.", "heads."),
    # The class token is the whole network's own, and comes after nothing that is frozen.
    "conv_proj": ("",),
    "encoder.layers": ("encoder.layers.", "encoder.ln.", "heads."),
    ("encoder.ln", "conv_proj"): ("encoder.ln.", "conv_proj.", "heads."),
    "encoder.layers.encoder_layer_2.mlp": (
        "encoder.layers.encoder_layer_2.mlp.",
        "encoder.ln.",
        "heads.",
    ),
    "all": ("",),
}


@pytest.mark.parametrize("augment", [None, "crop"])
@pytest.mark.parametrize("unfreeze", VIT_TRAINED, ids=str)
def test_frozen_means_frozen_in_a_transformer(
    unfreeze, augment, make_vit, make_images, make_classifier, state_of
):
    """Positions and the class token belong to the module that holds them."""
    vit = make_vit(dropout=0.1, attention_dropout=0.1)
    before = make_vit().state_dict()
    X, y = make_images(6)
    names = list(unfreeze) if isinstance(unfreeze, tuple) else unfreeze
    # SGD: AdamW would let noise move the biases of keys, whose gradients are zero but for rounding.
    params = {"max_epochs": 3, "augment": augment, "weight_decay": 0.1, "optimizer": "sgd"}
    make = make_classifier(vit, unfreeze=names, backbone_learning_rate=0.1, **params)
    assert_frozen(before, state_of(make.fit(X, y)), VIT_TRAINED[unfreeze])


@pytest.mark.slow
@pytest.mark.parametrize("unfreeze", [None, "encoder.layers.encoder_layer_11"])
def test_frozen_means_frozen_in_a_large_transformer(
    unfreeze, make_images, seeded, make_classifier, state_of
):
    """In those of torchvision too."""
    trained = ("heads.",) if unfreeze is None else (f"{unfreeze}.", "encoder.ln.", "heads.")
    X, y = make_images(4, 64)
    before = seeded(models.vit_b_32, weights=None, image_size=64).state_dict()
    classifier = make_classifier("vit_b_32", unfreeze=unfreeze, image_size=64, optimizer="sgd")
    assert_frozen(before, state_of(classifier.fit(X, y)), trained)


# Which names mean what --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("unfreeze", "trained"),
    [
        (None, ("fc",)),
        ("fc", ("fc",)),
        ("drop", ("fc",)),
        ("hidden", ("hidden", "fc")),
        ("blocks.2", ("blocks.2", "hidden", "fc")),
        ("blocks.1.1", ("blocks.1.1", "blocks.2", "hidden", "fc")),
        ("blocks.0", ("blocks", "hidden", "fc")),
        ("blocks", ("blocks", "hidden", "fc")),
        (0, ("blocks", "hidden", "fc")),
        (-1, ("fc",)),
        (["blocks.0"], ("blocks.0", "fc")),
        (["blocks.0.0", "hidden"], ("blocks.0.0", "hidden", "fc")),
        (("blocks.1",), ("blocks.1", "fc")),
        ([], ("fc",)),
        ("all", ("",)),
    ],
    ids=str,
)
def test_a_name_means_it_and_all_that_follows_and_a_list_just_these(
    prepare, unfreeze, trained, make_plain
):
    """Only their parameters require gradients."""
    module, _, _ = prepare(make_plain(norm=True), unfreeze)
    wanted = [name for name, value in module.named_parameters() if value.requires_grad]
    starts = tuple(f"{path}." if path else "" for path in trained)
    assert wanted == [name for name, _ in module.named_parameters() if name.startswith(starts)]


class Backwards(nn.Module):
    """Call modules in another order than they are defined in."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 5)
        self.second = nn.Conv2d(4, 4, 3)
        self.unused = nn.Linear(2, 2)
        self.first = nn.Conv2d(3, 4, 3)

    def forward(self, images):
        return self.fc(self.second(self.first(images).relu()).mean((2, 3)))


@pytest.mark.parametrize(
    ("unfreeze", "trained"),
    [("first", ["fc", "second", "first"]), ("second", ["fc", "second"]), (["first"], ["first"])],
    ids=str,
)
def test_what_follows_is_a_matter_of_computation_not_of_definition(prepare, unfreeze, trained):
    """Blocks follow each other in the order of their calls."""
    module, _, _ = prepare(Backwards(), unfreeze)
    children = {name.partition(".")[0] for name, p in module.named_parameters() if p.requires_grad}
    assert children - {"unused"} == {*trained, "fc"}


@pytest.mark.parametrize(
    ("unfreeze", "error", "words"),
    [
        ("blocks.3", LayerNotFoundError, r"no layer 'blocks.3'. Close matches: 'blocks.2'"),
        (["hidden", "hiden"], LayerNotFoundError, r"no layer 'hiden'. Close matches: 'hidden'"),
        ("ALL", LayerNotFoundError, "no layer 'ALL'"),
        (["all"], LayerNotFoundError, "no layer 'all'"),
        ("", LayerNotFoundError, "no layer ''"),
        (99, LayerNotFoundError, "there is no layer 99"),
        (1.5, ValueError, "layer must be a name or an integer; got"),
        (True, ValueError, "layer must be a name or an integer; got"),
        ([None], ValueError, "layer must be a name or an integer; got"),
        (
            ["blocks.0.2"],
            ValueError,
            r"unfreeze must name blocks with weights; 'blocks.0.2' does not have any to train",
        ),
    ],
    ids=str,
)
def test_a_wrong_name_says_what_there_is(unfreeze, error, words, make_classifier):
    """Also from `fit`, before any image is opened."""
    with pytest.raises(error, match=words):
        make_classifier(unfreeze=unfreeze).fit(["nowhere.png"] * 2, [0, 1])


def test_a_typo_in_a_named_backbone_is_found_before_weights_are_loaded(
    monkeypatch, make_classifier, make_images
):
    """The error does not wait for a download."""
    monkeypatch.setattr("deepfeat._backbones.torchvision.PublishedWeights.state", pytest.fail)
    with pytest.raises(LayerNotFoundError, match=r"Close matches: .*'layer4'"):
        make_classifier("resnet18", weights="DEFAULT", unfreeze="layer_4").fit(*make_images())


# Modes and groups -------------------------------------------------------------------------------


def test_what_is_frozen_is_in_eval_mode(prepare, make_plain):
    """Between two trained blocks as well, except for the dropout before a trained layer."""
    module, _, trained = prepare(make_plain(dropout=0.5, norm=True), ["blocks.1"])
    set_train_mode(module.train(), trained)
    modes = {path: child.training for path, child in module.named_modules()}
    assert {path for path, mode in modes.items() if mode} == {
        *("blocks.1", "blocks.1.0", "blocks.1.1", "blocks.1.2", "drop", "fc")
    }


@pytest.mark.parametrize(
    ("unfreeze", "active"),
    [
        (None, ["classifier.5"]),
        ("fc7", ["classifier.2", "classifier.5"]),
        (["fc7"], ["classifier.2", "classifier.5"]),
        (["fc6"], ["classifier.5"]),
        ("relu6", ["classifier.2", "classifier.5"]),
        (["conv5_2"], ["classifier.5"]),
    ],
    ids=str,
)
def test_a_dropout_acts_where_the_layer_after_it_is_trained(prepare, unfreeze, active):
    """Those of VGG lie between its linear layers."""
    with torch.device("meta"):
        vgg = models.vgg11(weights=None, init_weights=False)
    module, _, trained = prepare(vgg, unfreeze, 32)
    set_train_mode(module, trained)
    dropouts = {path for path, child in module.named_modules() if isinstance(child, nn.Dropout)}
    assert dropouts == {"classifier.2", "classifier.5"}
    assert {path for path in dropouts if module.get_submodule(path).training} == set(active)


class Masking(nn.Dropout):
    """A dropout by another name."""


@pytest.mark.parametrize(
    "kind",
    [*(nn.Dropout, nn.Dropout1d, nn.AlphaDropout, nn.FeatureAlphaDropout), Masking],
    ids=lambda kind: kind.__name__,
)
def test_any_dropout_before_a_new_head_acts(prepare, kind, seeded):
    """Of any kind, and of a class derived from one of torch's."""
    net = seeded(
        lambda: nn.Sequential(nn.Conv2d(3, 4, 4, 4), nn.Flatten(), kind(0.5), nn.Linear(64, 5))
    )
    module, index, trained = prepare(net, None)
    set_train_mode(module, trained)
    assert index.units == ("0", "3")
    assert module[2].training
    assert find_cut(module, index, trained, torch.rand(2, 3, 16, 16)).boundary == "2"


def test_the_head_has_a_group_of_its_own(prepare, make_plain):
    """Each trained parameter is in one group, and no frozen one is in any."""
    module, _, trained = prepare(make_plain(), "hidden")
    head, backbone = group_parameters(module, trained)
    assert [id(value) for value in head] == [id(value) for value in module.fc.parameters()]
    assert [id(value) for value in backbone] == [id(v) for v in module.hidden.parameters()]


@pytest.mark.parametrize(
    ("path", "is_trained"),
    [("a.b", True), ("a.b.c", True), ("a.bc", False), ("a", False), ("h", True), ("hh", False)],
)
def test_a_path_lies_in_a_module_not_in_one_of_a_longer_name(path, is_trained):
    """`layer10` does not lie in `layer1`."""
    assert (path in Trained(("h",), ("a.b",), ())) is is_trained


# What cannot be trained ---------------------------------------------------------------------------


def test_weights_shared_with_a_frozen_module_cannot_be_trained(images, make_plain, make_classifier):
    """They would be both trained and frozen."""
    net = make_plain()
    net.blocks[2][0].bias = net.blocks[1][0].bias
    with pytest.raises(
        ValueError, match=r"blocks\.2\.0\.bias is shared by a trained and a frozen module"
    ):
        make_classifier(net, unfreeze="blocks.2").fit(*images)


def test_auxiliary_classifiers_need_images_of_some_size(images, make_classifier):
    """That of Inception does not take images of 96 pixels: it is dropped, with a warning."""
    params = {"image_size": 96, "unfreeze": "Mixed_6e", "max_epochs": 1}
    classifier = make_classifier("inception_v3", **params)
    with pytest.warns(
        UserWarning,
        match="Images of shape .* too small for the auxiliary classifiers of Inception3",
    ):
        classifier.fit(*images)
    assert classifier.module_.AuxLogits is None
