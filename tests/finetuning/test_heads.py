"""Tests of new heads: on every family of torchvision, and on networks that cannot have one."""

import copy

import pytest
import torch
from torch import nn
from torchvision import models

from deepfeat import list_backbones
from deepfeat._backbones.find import find_backbone
from deepfeat._finetuning.heads import AUXILIARY, add_head
from deepfeat._layers.head import find_head

# One small member of each family, its classification layer, and how many outputs follow that.
FAMILIES = {
    "alexnet": "classifier.6",
    "convnext_tiny": "classifier.2",
    "densenet121": "classifier",
    "efficientnet_b0": "classifier.1",
    "efficientnet_v2_s": "classifier.1",
    "googlenet": "fc",
    "inception_v3": "fc",
    "maxvit_t": "classifier.5",
    "mnasnet0_5": "classifier.1",
    "mobilenet_v2": "classifier.1",
    "mobilenet_v3_small": "classifier.3",
    "regnet_x_400mf": "fc",
    "regnet_y_400mf": "fc",
    "resnet18": "fc",
    "resnet10_slim": "fc",
    "resnext50_32x4d": "fc",
    "wide_resnet50_2": "fc",
    "shufflenet_v2_x0_5": "fc",
    "squeezenet1_1": "classifier.1",
    "swin_t": "head",
    "swin_v2_t": "head",
    "vgg11": "classifier.6",
    "vgg11_bn": "classifier.6",
    "vit_b_32": "heads.head",
}
SHAPE = (3, 16, 16)


def family_of(name):
    return name.rstrip("0123456789").partition("_")[0].rstrip("0123456789")


def logits_of(module, shape, count=2):
    """Run zeros through a network, on any device, also meta; return its output."""
    anywhere = next(module.parameters())
    with torch.no_grad():
        return module.eval()(torch.zeros(count, *shape, device=anywhere.device))


# Every family -----------------------------------------------------------------------------------


def skeleton_of(name):
    backbone = find_backbone(name, None)
    return copy.deepcopy(backbone.skeleton), backbone.preprocessing.input_shape


@pytest.mark.parametrize("name", FAMILIES)
def test_the_classification_layer_gives_way(name):
    """The new one has n outputs instead of 1000; all other layers stay."""
    module, shape = skeleton_of(name)
    before = {path: value.shape for path, value in module.state_dict().items()}
    place = find_head(module, shape)
    assert (place.layer, place.n_outputs) == (FAMILIES[name], before_outputs(module))
    assert add_head(module, place, "replace", 3, 0) == FAMILIES[name]
    assert logits_of(module, shape).shape == (2, 3)
    changed = {
        path.rpartition(".")[0]
        for path, value in module.state_dict().items()
        if value.shape != before.get(path)
    }
    auxiliary = {
        "googlenet": {"aux1.fc2", "aux2.fc2"},
        "inception_v3": {"AuxLogits.fc"},
    }
    assert changed == {FAMILIES[name]} | auxiliary.get(name, set())
    # The classification layer of MaxViT has no bias; that in its place has.
    assert module.state_dict().keys() - before.keys() <= {f"{FAMILIES[name]}.bias"}


def before_outputs(module):
    """Read the number of outputs off the last bias."""
    return len(list(module.state_dict().values())[-1])


@pytest.mark.parametrize("name", FAMILIES)
def test_a_layer_is_appended(name):
    """ReLU and a linear layer from all old outputs; all other layers stay."""
    module, shape = skeleton_of(name)
    shapes = sorted(tuple(value.shape) for value in module.state_dict().values())
    outputs = before_outputs(module)
    dropped = sorted(
        tuple(value.shape)
        for path, value in module.state_dict().items()
        if path.partition(".")[0] in AUXILIARY
    )
    path = add_head(module, find_head(module, shape), "append", 3, 0)
    new = module.get_submodule(path)
    assert (type(new), new.in_features, new.out_features) == (nn.Linear, outputs, 3)
    assert logits_of(module, shape).shape == (2, 3)
    after = sorted(tuple(value.shape) for value in module.state_dict().values())
    assert sorted([*after, *dropped]) == sorted([*shapes, (3, outputs), (3,)])


@pytest.mark.slow
@pytest.mark.parametrize("head", ["replace", "append"])
@pytest.mark.parametrize("name", list_backbones())
def test_every_backbone_takes_a_head(name, head):
    """From AlexNet to the largest transformers, on the meta device."""
    module, shape = skeleton_of(name)
    add_head(module, find_head(module, shape), head, 3, 0)
    assert logits_of(module, shape).shape == (2, 3)


def test_no_family_is_missing():
    """A new family in torchvision needs a line here."""
    families = {family_of(name) for name in list_backbones()}
    assert families == {family_of(name) for name in FAMILIES}


# What the head computes -------------------------------------------------------------------------


def test_an_appended_head_is_relu_and_a_matrix(make_plain):
    """On the output of the network."""
    net, images = make_plain().eval(), torch.rand(4, *SHAPE)
    expected = net(images).relu()
    path = add_head(net, find_head(net, SHAPE), "append", 3, 0)
    new = net.get_submodule(path)
    torch.testing.assert_close(net(images), expected @ new.weight.T + new.bias)


def test_pooling_at_the_end_comes_before_an_appended_head(seeded):
    """SqueezeNet classifies each position, and then pools."""
    net = seeded(models.squeezenet1_1, weights=None).eval()
    images = torch.rand(2, 3, 64, 64)
    expected = net(images).relu()
    path = add_head(net, find_head(net, (3, 64, 64)), "append", 3, 0)
    new = net.get_submodule(path)
    torch.testing.assert_close(net(images), expected @ new.weight.T + new.bias)


def test_new_weights_are_drawn_as_torch_draws_them(make_plain, assert_same_state):
    """Within the same bounds, from a generator with the given seed."""
    heads = []
    for seed in (0, 0, 1):
        net = make_plain()
        state = torch.get_rng_state()
        add_head(net, find_head(net, SHAPE), "replace", 500, seed)
        torch.testing.assert_close(torch.get_rng_state(), state, rtol=0, atol=0)
        heads.append(net.fc)
    assert_same_state(heads[0].state_dict(), heads[1].state_dict())
    assert not torch.equal(heads[0].weight, heads[2].weight)
    bound = 1 / 4  # of 16 inputs
    for values in (heads[0].weight, heads[0].bias):
        assert 0.97 * bound < values.abs().max() <= bound
        assert values.mean().abs() < 0.02
        assert abs(values.std().item() - bound / 3**0.5) < 0.01


def test_the_head_has_type_and_device_of_the_network(make_plain):
    """A network in double precision gets a head in double precision."""
    net = make_plain().double()
    add_head(net, find_head(net, SHAPE), "replace", 3, 0)
    assert net.fc.weight.dtype == torch.float64


# Auxiliary classifiers --------------------------------------------------------------------------

AUXILIARIES = {
    "all": {"aux1", "aux2"},
    "inception4a": {"aux1", "aux2"},
    "inception4b": {"aux2"},
    "inception4d": {"aux2"},
    "inception4e": set(),
    None: set(),
}


@pytest.mark.slow
@pytest.mark.parametrize("unfreeze", AUXILIARIES)
def test_auxiliary_classifiers_learn_where_what_they_teach_does(
    unfreeze, make_images, make_classifier
):
    """Others would have no effect, and are dropped."""
    X, y = make_images(4, 32)
    classifier = make_classifier("googlenet", unfreeze=unfreeze, max_epochs=1).fit(X, y)
    module = classifier.module_
    assert {name for name in ("aux1", "aux2") if getattr(module, name)} == AUXILIARIES[unfreeze]
    assert classifier.predict_proba(X).shape == (4, 2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "side", "layers"),
    [("googlenet", 64, ["aux1.fc2", "aux2.fc1"]), ("inception_v3", 299, ["AuxLogits.fc"])],
)
def test_auxiliary_classifiers_learn(name, side, layers, make_images, make_classifier):
    """With the whole network: their weights change, but they do not take part in predictions."""
    X, y = make_images(4, side)
    params = {"unfreeze": "all", "image_size": side, "augment": None, "batch_size": 2}
    one, two = (make_classifier(name, max_epochs=count, **params).fit(X, y) for count in (1, 2))
    for layer in layers:
        weights = [fit.module_.get_submodule(layer).weight for fit in (one, two)]
        assert not torch.equal(*weights)
    assert isinstance(two.module_(torch.rand(2, 3, side, side)), torch.Tensor)


# Networks that cannot have one -----------------------------------------------------------------


def chain(*layers):
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), *layers)


@pytest.mark.parametrize(
    ("net", "words"),
    [
        (chain(nn.Linear(4, 2), nn.Softmax(1)), "ends in Softmax: the network must return logits"),
        (chain(nn.Linear(4, 2), nn.LogSoftmax(1)), "ends in LogSoftmax: .* logits"),
        (chain(nn.Linear(4, 2), nn.Sigmoid()), "ends in Sigmoid: .* logits"),
        (nn.Sequential(nn.Conv2d(3, 4, 3)), r"got shape \(4, 14, 14\): .* torch.nn.Flatten\(\)"),
        (
            nn.Sequential(nn.Flatten(2), nn.Linear(256, 3)),
            r"must return one vector per image; got shape \(3, 3\)",
        ),
        (nn.Sequential(nn.Flatten()), "has no weights to train"),
        (chain(nn.BatchNorm1d(4)), r"ends in '3', a BatchNorm1d, .* Use head='append'"),
        (
            nn.Sequential(nn.Conv2d(3, 4, 16), nn.Flatten()),
            r"ends in '0', a Conv2d, which is not one with 4 outputs",
        ),
        (chain(nn.Linear(4, 4), nn.Unflatten(1, (2, 2)), nn.Flatten(), nn.PReLU()), "a PReLU"),
    ],
    ids=lambda value: None if isinstance(value, str) else type(value[-1]).__name__,
)
def test_a_network_without_a_place_for_a_head_is_refused(net, words, make_classifier, make_images):
    """With the reason, before training."""
    with pytest.raises(ValueError, match=words):
        make_classifier(net).fit(*make_images())


@pytest.mark.parametrize("last", [nn.BatchNorm1d(4), nn.PReLU(), nn.Identity(), nn.Dropout()])
def test_any_vector_can_have_a_head_appended(last, make_images, make_classifier, seeded):
    """Also features, of a network without a classification layer to replace."""
    X, y = make_images()
    classifier = make_classifier(seeded(chain, nn.Linear(4, 4), last), head="append").fit(X, y)
    assert classifier.predict_proba(X).shape == (8, 2)


class Softmax(nn.Module):
    """The last block of a network, unrelated to torch's module of that name."""

    def forward(self, scores):
        return 2 * scores


def test_what_is_called_softmax_need_not_be_one(seeded):
    """Layers are recognised by their class, or one derived from it, not by its name."""
    net = seeded(chain, nn.Linear(4, 2), Softmax())
    assert find_head(net, SHAPE).layer == "3"
    derived = type("Scores", (nn.Softmax,), {})(1)
    with pytest.raises(ValueError, match="ends in Scores: the network must return logits"):
        find_head(chain(nn.Linear(4, 2), derived), SHAPE)


class NetWithAux1(nn.Module):
    """A network with a hidden layer of that name."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 4, stride=4)
        self.aux1 = nn.Linear(4 * 4 * 4, 16)
        self.fc = nn.Linear(16, 7)

    def forward(self, batch):
        return self.fc(self.aux1(self.conv(batch).flatten(1)).relu())


def test_a_module_called_like_an_auxiliary_classifier_is_none(images, make_classifier):
    """Of a network that is neither GoogLeNet nor Inception."""
    net = NetWithAux1()
    classifier = make_classifier(net).fit(*images)
    assert classifier.module_.aux1 is not None
