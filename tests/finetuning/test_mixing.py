"""Tests of CutMix: a bare loop with torchvision's own, weights, several labels, caching."""

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torchvision.transforms.v2 import CutMix

from deepfeat._finetuning import fitting as _fitting
from deepfeat._finetuning.mixing import mix
from deepfeat._finetuning.sources import Batch, Targets

RATES = {"learning_rate": 0.1, "backbone_learning_rate": 0.1}


@pytest.fixture
def learn_by_hand(start_of, make_plain, images, to_16_pixels):
    """Train in full batches as torchvision's manual has it, from the start of a classifier."""

    def learn_by_hand(epochs, alpha, targets, compute_loss):
        net = start_of(backbone=make_plain()).train().requires_grad_(True)
        inputs = torch.stack([to_16_pixels(Image.fromarray(pixels)) for pixels in images[0]])
        optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, nesterov=True)
        losses = []
        for epoch in range(1, epochs + 1):
            rng = np.random.default_rng([0, epoch])  # from which an epoch draws seed and order
            torch.manual_seed(int(rng.integers(2**62)))
            order = rng.permutation(8)
            count = 2 if targets.ndim == 1 else None
            mixed, soft = CutMix(alpha=alpha, num_classes=count)(inputs[order], targets[order])
            loss = compute_loss(net(mixed), soft)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return net, losses

    return learn_by_hand


@pytest.mark.parametrize("alpha", [0.2, 1.0])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_weights_are_those_of_a_bare_loop(
    alpha, smoothing, images, learn_by_hand, make_classifier, make_plain, state_of
):
    """With the soft labels of torchvision."""

    def compute_loss(logits, soft):
        return F.cross_entropy(logits, soft, label_smoothing=smoothing)

    with torch.random.fork_rng(devices=[]):
        net, losses = learn_by_hand(10, alpha, torch.tensor([0, 1] * 4), compute_loss)
    classifier = make_classifier(
        make_plain(), max_epochs=10, batch_size=8, augment=None, optimizer="sgd", weight_decay=0,
        schedule="constant", cutmix=alpha, label_smoothing=smoothing, **RATES,
    ).fit(*images)  # fmt: skip
    assert_allclose([epoch["train_loss"] for epoch in classifier.history_], losses, rtol=1e-4)
    for (path, value), expected in zip(
        state_of(classifier).items(), net.state_dict().values(), strict=True
    ):
        assert_allclose(value, expected, rtol=1e-3, atol=1e-4, err_msg=path)


def compute_weighted(logits, soft):
    """Cross-entropy with soft labels that have been multiplied by weights."""
    return -(soft * logits.log_softmax(1)).sum() / soft.sum()


def compute_logistic(logits, soft):
    """The logistic loss with soft counts of 0 and of 1."""
    zeros, ones = soft.chunk(2, dim=1)
    losses = -(ones * F.logsigmoid(logits) + zeros * F.logsigmoid(-logits))
    return losses.sum() / soft.sum()


SEVERAL = np.array([[1, 0], [0, 0], [1, 1], [0, 1], [1, 0], [0, 1], [1, 1], [0, 0]])
WEIGHTS = np.array([1.0, 0.5, 2.0, 0.25, 3.0, 1.0, 1.0, 4.0])


@pytest.mark.parametrize("multilabel", [False, True])
def test_weights_of_images_and_labels_are_mixed(
    multilabel, images, learn_by_hand, start_of, make_classifier, make_plain, state_of
):
    """As soft labels that were multiplied by them before."""
    X, y = images
    weights = torch.tensor(WEIGHTS)[:, None]
    by_class = torch.tensor([1.0, 5.0]).double()
    if multilabel:
        several = torch.tensor(SEVERAL).double()
        targets = torch.cat([(1 - several) * by_class[0], several * by_class[1]], 1) * weights
        labels, class_weight = SEVERAL, {0: 1.0, 1: 5.0}
    else:
        targets = F.one_hot(torch.tensor([0, 1] * 4)) * by_class * weights
        labels, class_weight = y, {"dark": 1.0, "light": 5.0}
    compute_loss = compute_logistic if multilabel else compute_weighted
    with torch.random.fork_rng(devices=[]):
        net, losses = learn_by_hand(1, 1.0, targets.float(), compute_loss)
    classifier = make_classifier(
        make_plain(), max_epochs=1, batch_size=8, augment=None, optimizer="sgd", weight_decay=0,
        schedule="constant", cutmix=1, class_weight=class_weight, **RATES,
    ).fit(X, labels, sample_weight=WEIGHTS)  # fmt: skip
    assert_allclose(classifier.history_[0]["train_loss"], losses[0], rtol=1e-5)
    start = start_of(labels, backbone=make_plain()).state_dict()
    steps = [
        torch.cat([
            (value - before).flatten()
            for value, before in zip(state.values(), start.values(), strict=True)
        ])
        for state in (state_of(classifier), net.state_dict())
    ]  # fmt: skip
    # `fit` scales weights to mean 1; of mixed images, the mean may differ from that.
    cosine = F.cosine_similarity(*steps, dim=0)
    assert_allclose(cosine, 1, atol=1e-6)


@pytest.fixture
def batch():
    """Four images, of which each has one value everywhere, with weights."""
    inputs = torch.arange(4.0).reshape(4, 1, 1, 1).expand(4, 3, 10, 10)
    return Batch(inputs, (Targets(torch.arange(4), torch.tensor([1.0, 2.0, 3.0, 4.0])),))


@pytest.mark.parametrize("seed", range(5))
def test_the_weights_of_both_images_are_their_shares_of_the_area(seed, batch):
    """Each image is pasted into another one; the rectangle is the same for all."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        mixed = mix(batch, 1.0)
    own, other = mixed.targets
    assert own.values.tolist() == [0, 1, 2, 3]
    assert sorted(other.values.tolist()) == [0, 1, 2, 3]
    before = torch.tensor([1.0, 2.0, 3.0, 4.0])
    for index in range(4):
        share = (mixed.inputs[index] == index).double().mean()
        pasted = (mixed.inputs[index] == other.values[index]).double().mean()
        assert_allclose(share + pasted, 1, rtol=1e-6)
        assert_allclose(own.weights[index], before[index] * share, rtol=1e-5, atol=1e-6)
        partner = before[other.values[index]]
        assert_allclose(other.weights[index], partner * pasted, rtol=1e-5, atol=1e-6)


def test_weights_may_differ_by_label():
    """A row of them is scaled as a whole."""
    weights = torch.arange(8.0).reshape(4, 2)
    mixed = mix(Batch(torch.rand(4, 3, 8, 8), (Targets(torch.zeros(4, 2), weights),)), 1.0)
    own, other = mixed.targets
    scale = own.weights[1, 0] / weights[1, 0]
    torch.testing.assert_close(own.weights, weights * scale)
    torch.testing.assert_close(other.weights, weights.roll(1, 0) * (1 - scale))


def test_a_single_image_stays_as_it_is():
    """There is no other one."""
    inputs = torch.rand(1, 3, 8, 8)
    mixed = mix(Batch(inputs, (Targets(torch.tensor([1]), torch.ones(1)),)), 1.0)
    torch.testing.assert_close(mixed.inputs, inputs)
    assert sum(targets.weights.item() for targets in mixed.targets) == pytest.approx(1)


@pytest.mark.parametrize("multilabel", [False, True])
def test_the_whole_network_sees_mixed_images(
    multilabel, images, make_classifier, make_plain, monkeypatch
):
    """Its frozen part is computed anew, except for validation images and for the head alone."""
    X, y = images
    labels = np.eye(8, 2, dtype=int) if multilabel else y
    cached = []
    cache = _fitting.cache_activations

    def note(source, *args, **kwargs):
        cached.append(len(source))
        return cache(source, *args, **kwargs)

    monkeypatch.setattr(_fitting, "cache_activations", note)
    params = {"unfreeze": "hidden", "max_epochs": 3, "head_epochs": 2, "augment": None}
    options = {"X_val": X[:3], "y_val": labels[:3]}
    mixed = make_classifier(make_plain(), cutmix=1.0, **params).fit(X, labels, **options)
    assert cached == [8, 3, 3]  # those of the head, and the validation images again
    cached.clear()
    plain = make_classifier(make_plain(), **params).fit(X, labels, **options)
    assert cached == [8, 3, 8, 3]
    losses = [[epoch["train_loss"] for epoch in fit.history_] for fit in (mixed, plain)]
    assert_allclose(losses[0][:2], losses[1][:2])
    assert (np.array(losses[0][2:]) != losses[1][2:]).all()


def test_two_fits_mix_the_same(images, make_classifier, state_of, assert_same_state):
    """With one seed, and without a trace in torch's own generator."""
    before = torch.get_rng_state()
    first, second = (make_classifier(cutmix=1.0, max_epochs=3).fit(*images) for _ in range(2))
    assert_same_state(state_of(first), state_of(second))
    torch.testing.assert_close(torch.get_rng_state(), before)


def test_mixed_batches_are_run_in_parts(images, make_classifier, monkeypatch, state_of):
    """When memory runs out: the parts are those of the mixed batch."""
    X, y = images
    whole = make_classifier(cutmix=1.0, batch_size=8, max_epochs=3).fit(X, y)
    linear = nn.Linear.forward

    def forward(self, inputs):
        if self.training and len(inputs) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return linear(self, inputs)

    monkeypatch.setattr(nn.Linear, "forward", forward)
    with pytest.warns(RuntimeWarning, match="parts of 4 images"):
        parts = make_classifier(cutmix=1.0, batch_size=8, max_epochs=3).fit(X, y)
    for value, expected in zip(state_of(parts).values(), state_of(whole).values(), strict=True):
        assert_allclose(value, expected, rtol=1e-3, atol=1e-4)
