"""Tests of cuts: the two parts of a network compute what the whole does, or it is not cut."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from deepfeat._finetuning.cutting import find_cut
from deepfeat._finetuning.freezing import set_train_mode


@pytest.fixture
def cut_of(prepare):
    """Freeze all of a network but some blocks, and cut it."""

    def cut_of(module, unfreeze, side=16):
        module, index, trained = prepare(module, unfreeze, side)
        noise = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0))
        samples = torch.cat([noise, torch.zeros(1, 3, side, side)])
        return module, find_cut(module, index, trained, samples)

    return cut_of


# The two parts ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("unfreeze", "boundary"),
    [
        (None, "drop"),
        ("fc", "drop"),
        ("hidden", "hidden"),
        ("blocks.2", "blocks.2"),
        ("blocks.2.1", "blocks.2"),
        (["blocks.1"], "blocks.1"),
        (["blocks.1.1", "hidden"], "blocks.1"),
        ("blocks", None),
        ("all", None),
    ],
    ids=str,
)
def test_a_network_is_cut_before_the_first_layer_that_changes(
    cut_of, unfreeze, boundary, make_plain
):
    """A dropout changes with each draw; if nothing before is frozen, there is no cut."""
    _, cut = cut_of(make_plain(dropout=0.5, norm=True), unfreeze)
    found = cut and cut.boundary
    # Whether a boundary is named by the block or by its first layer makes no difference.
    assert found == boundary or f"{found}.".startswith(f"{boundary}.")


def test_the_parts_give_what_the_whole_gives(cut_of, make_vit):
    """For other images, and another number of them, than in the trial run."""
    module, cut = cut_of(make_vit(), "encoder.layers.encoder_layer_1")
    images = torch.rand(5, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    module.eval()
    with torch.no_grad():
        activations = cut.run_prefix(images)
        assert activations.shape == (5, 17, 16)
        parts = cut.run_suffix(activations)
        torch.testing.assert_close(parts, module(images), rtol=1e-5, atol=1e-6)


def test_nothing_is_left_behind_on_the_network(cut_of, make_plain):
    """Neither hooks nor functions that replaced layers, not even after an error."""
    module, cut = cut_of(make_plain(), "hidden")
    images = torch.rand(2, 3, 16, 16)
    expected = module(images)
    activations = cut.run_prefix(images)
    with pytest.raises(RuntimeError):
        cut.run_suffix(activations[:, :1])
    cut.run_suffix(activations)
    for child in module.modules():
        assert "forward" not in vars(child)
        assert not child._forward_pre_hooks
        assert not child._forward_hooks
    torch.testing.assert_close(module(images), expected, rtol=0, atol=0)


def test_what_is_interrupted_leaves_nothing_behind(cut_of, monkeypatch, make_plain):
    """Ctrl-C may come between any two lines: the parts have their own modules."""
    module, cut = cut_of(make_plain(), "hidden")
    images = torch.rand(2, 3, 16, 16)
    expected = module(images)
    activations = cut.run_prefix(images)

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(nn.Linear, "forward", interrupt)
        with pytest.raises(KeyboardInterrupt):
            cut.run_suffix(activations)
        patch.setattr(nn.Conv2d, "forward", interrupt)
        with pytest.raises(KeyboardInterrupt):
            cut.run_prefix(images)
    torch.testing.assert_close(module(images), expected, rtol=0, atol=0)
    torch.testing.assert_close(cut.run_suffix(cut.run_prefix(images)), expected)
    assert not any(
        child._forward_pre_hooks or "forward" in vars(child) for child in module.modules()
    )


def test_the_parts_follow_the_modes_of_the_network(prepare, make_plain):
    """A dropout is active in the second part while the network is in train mode."""
    module, index, trained = prepare(make_plain(dropout=0.5), None)
    cut = find_cut(module, index, trained, torch.rand(2, 3, 16, 16))
    activations = cut.run_prefix(torch.rand(8, 3, 16, 16))
    module.eval()
    torch.testing.assert_close(cut.run_suffix(activations), cut.run_suffix(activations))
    set_train_mode(module, trained)
    assert not torch.equal(cut.run_suffix(activations), cut.run_suffix(activations))
    module.eval()
    torch.testing.assert_close(cut.run_suffix(activations), cut.run_suffix(activations))


# Networks that cannot be cut ----------------------------------------------------------------------


class Skipping(nn.Module):
    """Add the output of the first layer, scaled, to that of the third."""

    def __init__(self, measure=1.0):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.third = nn.Conv2d(4, 4, 3, padding=1)
        self.fc = nn.Linear(4, 5)
        self.measure = measure

    def forward(self, images):
        early = self.first(images).relu()
        late = self.third(self.second(early).relu())
        return self.fc((late + self.measure * early).mean((2, 3)))


class Sequence(nn.Module):
    """Have tokens first and images second, as torch's transformers do by default."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 8, 8)
        self.first = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)
        self.second = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)
        self.fc = nn.Linear(8, 5)

    def forward(self, images):
        tokens = self.patches(images).flatten(2).permute(2, 0, 1)
        return self.fc(self.second(self.first(tokens)).mean(0))


def blind(net):
    """Let all images look the same to a network."""
    nn.init.zeros_(net.patches.weight)
    return net


class ByName(nn.Module):
    """Pass the output of a layer as a keyword."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.second = Keyword()
        self.fc = nn.Linear(4, 5)

    def forward(self, images):
        return self.fc(self.second(maps=self.first(images)).mean((2, 3)))


class Keyword(nn.Conv2d):
    def __init__(self):
        super().__init__(4, 4, 3)

    def forward(self, *, maps):
        return super().forward(maps)


class Twice(nn.Module):
    """Use one layer twice."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.fc = nn.Linear(4, 5)

    def forward(self, images):
        return self.fc(self.second(self.second(self.first(images)).relu()).mean((2, 3)))


class Masking(nn.Module):
    """Leave out the pixels that are black, as if they were padding."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3, padding=1)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.fc = nn.Linear(4, 5)

    def forward(self, images):
        is_padding = (images <= 0).all(1, keepdim=True)
        maps = self.second(self.first(images).relu())
        return self.fc(maps.masked_fill(is_padding, -1.0).mean((2, 3)))


class Recomputing(nn.Module):
    """Compute the layers again to go backwards, in training alone, as those of timm can."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(3, 4, 3)
        self.second = nn.Conv2d(4, 4, 3, padding=1)
        self.fc = nn.Linear(4, 5)

    def compute(self, images):
        return self.second(self.first(images).relu())

    def forward(self, images):
        maps = self.compute(images)
        if self.second.training:
            maps = checkpoint(self.compute, images, use_reentrant=False)
        return self.fc(maps.mean((2, 3)))


IMPOSSIBLE = {
    "skip": (Skipping, "third"),
    "tokens first": (Sequence, "second"),
    "tokens first, images alike": (lambda: blind(Sequence()), "second"),
    "keywords": (ByName, "second"),
    "called twice": (Twice, "second"),
    "a mask of the input": (Masking, "second"),
    "computed again": (Recomputing, "second"),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_a_network_that_cannot_be_cut_is_not_cut(
    cut_of, case, seeded, make_images, make_classifier
):
    """And is trained as a whole."""
    make, unfreeze = IMPOSSIBLE[case]
    assert cut_of(seeded(make), unfreeze)[1] is None
    X, y = make_images()
    params = {"unfreeze": unfreeze, "max_epochs": 3}
    classifier = make_classifier(seeded(make), augment=None, **params).fit(X, y)
    assert len(classifier.history_) == 3


def test_the_trial_of_a_cut_leaves_no_trace(prepare, make_plain, assert_same_state):
    """Neither in the statistics of norms, nor in gradients or torch's generator."""
    module, index, trained = prepare(make_plain(dropout=0.5, norm=True), "blocks.1")
    before = {name: value.clone() for name, value in module.state_dict().items()}
    generator = torch.get_rng_state()
    assert find_cut(module, index, trained, torch.ones(2, 3, 16, 16)) is not None
    assert_same_state(module.state_dict(), before)
    assert all(parameter.grad is None for parameter in module.parameters())
    assert torch.equal(torch.get_rng_state(), generator)
    assert not any(child.training for child in module.modules())


def test_the_trial_of_a_cut_does_not_hang_on_what_memory_holds(cut_of, monkeypatch, seeded):
    """Old memory may hold anything, even the right values: only NaN shows that it was used."""
    monkeypatch.setattr(torch.Tensor, "new_empty", torch.Tensor.new_zeros)
    assert cut_of(seeded(Skipping, 1e-12), "third")[1] is None


def test_a_container_that_is_trained_begins_with_what_it_does_itself(cut_of, make_vit):
    """A transformer adds its positions before its first layer; else they would not be trained."""
    _, cut = cut_of(make_vit(), "encoder")
    assert cut.boundary == "encoder"
    assert list(cut.skipped) == ["conv_proj"]


def test_the_picture_of_the_input_may_be_prepared_in_any_way(
    make_classifier, to_16_pixels, make_images
):
    """The trial run takes noise of the shape that the preprocessing returns."""
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    classifier = make_classifier(net, preprocessing=to_16_pixels, unfreeze=None, max_epochs=3)
    assert len(classifier.fit(*make_images()).history_) == 3
