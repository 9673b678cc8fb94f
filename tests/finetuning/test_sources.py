"""Tests of the two sources: cached activations train the same network as images do."""

import errno
import os

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose
from PIL import Image
from torch import nn

from deepfeat._backbones.preprocessing import preprocess_with
from deepfeat._extraction import readers
from deepfeat._finetuning import fitting as _fitting
from deepfeat._finetuning import networks as _networks
from deepfeat._finetuning import sources as _sources
from deepfeat._finetuning.augmentation import draw_flips
from deepfeat._finetuning.cutting import find_cut
from deepfeat._finetuning.labels import label_images
from deepfeat._finetuning.objectives import SingleLabel
from deepfeat._finetuning.sources import ImageSource, cache_activations
from deepfeat._images.records import as_records

RATES = {"learning_rate": 0.01, "backbone_learning_rate": 0.01}


@pytest.fixture
def without_cut(monkeypatch):
    """Fit a classifier whose images run through the whole network in every epoch."""

    def fit(classifier, *args, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr(_fitting, "find_cut", lambda *args: None)
            return classifier.fit(*args, **kwargs)

    return fit


@pytest.fixture
def cached(monkeypatch):
    """Note what `cache_activations` returned."""
    notes = []

    def cache(*args, **kwargs):
        notes.append(_sources.cache_activations(*args, **kwargs))
        return notes[-1]

    monkeypatch.setattr(_fitting, "cache_activations", cache)
    return notes


def assert_same_fit(first, second, rtol=1e-4, atol=1e-5):
    """Raise unless two fits have the same history and the same weights, to rounding."""
    assert len(first.history_) == len(second.history_)
    for mine, other in zip(first.history_, second.history_, strict=True):
        for key in mine.keys() - {"seconds", "images_per_second"}:
            if mine[key] is None:
                assert other[key] is None
            else:
                assert_allclose(mine[key], other[key], rtol=rtol, atol=atol, err_msg=key)
    for (path, value), expected in zip(
        first.module_.state_dict().items(), second.module_.state_dict().values(), strict=True
    ):
        assert_allclose(value, expected, rtol=rtol, atol=atol, err_msg=path)


# Batches ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", [False, True], ids=["images", "activations"])
@pytest.mark.parametrize("augment", [None, "flip"])
def test_a_batch_has_the_inputs_targets_and_weights_of_its_images(
    prepare, cache, augment, make_images, make_plain, to_16_pixels
):
    """From both sources, in the order of the indices."""
    X, y = make_images()
    weights = np.linspace(1, 2, 8)
    module, index, trained = prepare(make_plain(), "hidden")
    images = ImageSource(
        label_images(as_records(X), y, weights),
        objective=SingleLabel(np.array(["dark", "light"])),
        augment=augment,
        device=torch.device("cpu"),
        seed=0,
        preprocessing=preprocess_with(to_16_pixels),
        num_workers=0,
        module=module.eval(),
        cut=find_cut(module, index, trained, torch.rand(2, 3, 16, 16)),
    )
    source = images
    if cache:
        settings = {"views": 2, "precision": "float32", "batch_size": 5}
        source = cache_activations(
            images, images.cut, report=lambda count: None, file=None, **settings
        )
    indices = np.array([6, 1, 4, 3, 7])
    batches = list(source.draw(indices, 3, epoch=1))
    assert [len(batch) for batch in batches] == [3, 2]
    flips = draw_flips(augment, 0, 1, 8)[indices]
    assert flips.any() == (augment == "flip")
    tensors = [to_16_pixels(Image.fromarray(X[number])) for number in indices]
    expected = torch.stack(
        [tensor.flip(2) if flip else tensor for tensor, flip in zip(tensors, flips, strict=True)]
    )
    outputs = torch.cat([source.forward(batch.inputs) for batch in batches])
    torch.testing.assert_close(outputs, module(expected))
    targets = [one for batch in batches for one in batch.targets]
    assert torch.cat([one.values for one in targets]).tolist() == [0, 1, 0, 1, 1]
    assert_allclose(torch.cat([one.weights for one in targets]), weights[indices])
    parts = [part.targets[0] for part in batches[0].split(2)]
    assert [part.values.tolist() for part in parts] == [[0, 1], [0]]
    assert_allclose(torch.cat([part.weights for part in parts]), weights[indices[:3]])


# The frozen part is computed once ---------------------------------------------------------------

CASES = {
    "plain": (("plain", {"dropout": 0.5, "norm": True}), "blocks.2"),
    "plain, head alone": (("plain", {"dropout": 0.5, "norm": True}), None),
    "plain, a list": (("plain", {"norm": True}), ["blocks.1.1", "hidden"]),
    "vit": (("vit", {"dropout": 0.2}), "encoder.layers.encoder_layer_1"),
    "vit, with its positions": (("vit", {"dropout": 0.2}), "encoder"),
    "squeezenet1_1": ("squeezenet1_1", "stage4"),
    "squeezenet1_1, head alone": ("squeezenet1_1", None),
    "mobilenet_v2": ("mobilenet_v2", "features.17"),
    "resnet18": ("resnet18", "layer4"),
}
SLOW = {
    "densenet121": ("densenet121", "features.denseblock4"),
    "googlenet": ("googlenet", "inception4d"),
    "mnasnet0_5": ("mnasnet0_5", "layers.13"),
    "efficientnet_b0": ("efficientnet_b0", "features.8"),
    "shufflenet_v2_x0_5": ("shufflenet_v2_x0_5", "stage4"),
    "convnext_tiny": ("convnext_tiny", "features.7"),
    "swin_t": ("swin_t", "features.7"),
    "vgg11_bn": ("vgg11_bn", "fc7"),
    "alexnet": ("alexnet", "relu5"),
}


@pytest.fixture
def make_case(make_classifier, make_plain, make_vit):
    """Make the classifier of a case."""

    def make_case(case, **params):
        net, unfreeze = (CASES | SLOW)[case]
        if not isinstance(net, str):
            kind, options = net
            net = {"plain": make_plain, "vit": make_vit}[kind](**options)
        return make_classifier(net, unfreeze=unfreeze, **{"optimizer": "sgd"} | RATES | params)

    return make_case


@pytest.mark.parametrize("augment", [None, "flip"])
@pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_caching_changes_nothing(without_cut, cached, case, augment, make_images, make_case):
    """The same history and the same weights, with dropout, weights and validation images."""
    # On maps of one pixel BatchNorm makes much of rounding.
    side = {"alexnet": 64, "swin_t": 64, "densenet121": 96}.get(case, 32)
    X, y = make_images(7, side)
    X_val, y_val = make_images(3, side, seed=1)
    weights = np.linspace(0.5, 2, 7)
    params = {"max_epochs": 4, "augment": augment, "batch_size": 4}
    params |= {"image_size": side} if isinstance((CASES | SLOW)[case][0], str) else {}
    data = {"sample_weight": weights, "X_val": X_val, "y_val": y_val}
    with_it = make_case(case, **params).fit(X, y, **data)
    assert [source.activations.shape[:2] for source in cached] == [
        (2 if augment else 1, 7),
        (1, 3),
    ]
    without_it = without_cut(make_case(case, **params), X, y, **data)
    assert len(cached) == 2
    assert_same_fit(with_it, without_it, rtol=2e-3, atol=2e-4)


def test_other_activations_would_be_noticed(without_cut, make_images, make_case):
    """Those of other views train another network: flips matter to it."""
    X, y = make_images(7)
    plain, flipped = (
        make_case("plain", augment=augment, max_epochs=4).fit(X, y) for augment in (None, "flip")
    )
    with pytest.raises(AssertionError):
        assert_same_fit(plain, flipped, rtol=2e-3, atol=2e-4)


class Counting(nn.Conv2d):
    """Count the images that pass through."""

    seen = 0

    def forward(self, images):
        Counting.seen += len(images)
        return super().forward(images)


@pytest.mark.parametrize(
    ("augment", "epochs", "expected"),
    [
        (None, 2, 8 + 3),
        (None, 9, 8 + 3),
        ("flip", 3, 2 * 8 + 3),
        ("flip", 9, 2 * 8 + 3),
        # Caching would not pay off.
        (None, 1, 8 + 3),
        ("flip", 2, 2 * 8 + 3),
        # Views are unlimited, except those of validation images.
        ("crop", 3, 3 * 8 + 3),
        (Image.Image.copy, 3, 3 * 8 + 3),
    ],
)
def test_frozen_layers_see_each_view_of_an_image_once(
    augment, epochs, expected, make_images, make_plain, seeded, make_classifier
):
    """However many epochs there are: 8 training images and 3 validation images."""
    X, y = make_images()
    X_val, y_val = make_images(3, seed=1)
    net = make_plain()
    net.blocks[0][0] = seeded(Counting, 3, 6, 3, stride=2, padding=1)
    classifier = make_classifier(net, unfreeze="hidden", augment=augment, max_epochs=epochs)
    with pytest.MonkeyPatch.context() as patch:
        # A few more images run through the network to index it and to try the cut.
        patch.setattr(_fitting, "find_cut", uncounted(_fitting.find_cut))
        for room in (_fitting, readers):
            patch.setattr(room, "LayerIndex", uncounted(room.LayerIndex))
        patch.setattr(_networks, "find_head", uncounted(_networks.find_head))
        trial = uncounted(readers.prefer_channels_last)
        patch.setattr(readers, "prefer_channels_last", trial)
        Counting.seen = 0
        classifier.fit(X, y, X_val=X_val, y_val=y_val)
    assert Counting.seen == expected


def uncounted(function):
    def call(*args):
        before = Counting.seen
        result = function(*args)
        Counting.seen = before
        return result

    return call


def test_beyond_a_limit_activations_are_cached_in_a_file(
    monkeypatch, cached, make_images, make_case, assert_same_state, state_of
):
    """And train the same network."""
    X, y = make_images()
    in_memory = make_case("plain", max_epochs=4).fit(X, y)
    assert not isinstance(cached[0].activations, np.memmap)
    monkeypatch.setattr(_sources, "MEMORY_LIMIT", 0)
    in_file = make_case("plain", max_epochs=4).fit(X, y)
    assert isinstance(cached[1].activations, np.memmap)
    assert_same_state(state_of(in_memory), state_of(in_file))


def test_no_file_is_left_behind(monkeypatch, tmp_path, make_images, make_case):
    """Neither after training nor after an error."""
    monkeypatch.setattr(_sources, "MEMORY_LIMIT", 0)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    X, y = make_images()
    make_case("plain", max_epochs=4).fit(X, y)
    with pytest.raises(ValueError, match="The weights became"):
        make_case("plain", max_epochs=4, learning_rate=1e36).fit(X, y)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("when", ["it is full", "it fills up"])
def test_on_a_full_disk_nothing_is_cached(
    monkeypatch, cached, without_cut, when, make_images, make_case, assert_same_state, state_of
):
    """And training works without; a file whose room is not reserved would end the process."""
    monkeypatch.setattr(_sources, "MEMORY_LIMIT", 0)
    if when == "it is full":
        room = type("Usage", (), {"free": 1000})
        monkeypatch.setattr("shutil.disk_usage", lambda folder: room)
    else:

        def refuse(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr("os.posix_fallocate", refuse)
    X, y = make_images()
    with pytest.warns(UserWarning, match=r"cannot hold 0\.0 GB of its output \(No space left"):
        fitted = make_case("plain", max_epochs=4).fit(X, y)
    assert cached == [None]
    assert_same_state(
        state_of(fitted), state_of(without_cut(make_case("plain", max_epochs=4), X, y))
    )


def test_the_room_of_a_file_is_reserved(monkeypatch):
    """Not only its length set."""
    reserved = []
    memmap = np.memmap

    def note(file, **options):
        reserved.append(512 * os.fstat(file.fileno()).st_blocks)
        return memmap(file, **options)

    monkeypatch.setattr(_sources, "MEMORY_LIMIT", 0)
    monkeypatch.setattr(np, "memmap", note)
    activations = _sources._allocate((2, 1000, 100), None)
    assert activations.shape == (2, 1000, 100)
    assert reserved[0] >= activations.nbytes


def test_dropout_draws_the_same_on_cached_maps(without_cut, make_images, make_classifier):
    """It draws in the order in which they lie in memory: of named networks, channels last."""
    X, y = make_images()
    params = {"unfreeze": None, "augment": None, "max_epochs": 3, "image_size": 64, **RATES}
    first = make_classifier("squeezenet1_1", **params).fit(X, y)
    second = without_cut(make_classifier("squeezenet1_1", **params), X, y)
    assert_same_fit(first, second)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_activations_have_the_precision_of_the_training(
    without_cut, precision, make_images, make_case
):
    """The fit is as close to one without caching as these types allow."""
    X, y = make_images()
    params = {"precision": precision, "max_epochs": 4}
    first = make_case("plain", **params).fit(X, y)
    assert_same_fit(first, without_cut(make_case("plain", **params), X, y), rtol=0.1, atol=0.02)


def test_out_of_memory_activations_are_trained_on_in_parts(
    monkeypatch, make_images, make_classifier, make_plain
):
    """The rest of the network takes parts of a batch too."""
    X, y = make_images()
    params = {"augment": None, "max_epochs": 4, "batch_size": 8}
    linear = nn.Linear.forward

    def forward(self, inputs):
        if self.training and len(inputs) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return linear(self, inputs)

    classifier = make_classifier(make_plain(), unfreeze="hidden", **params)
    whole = make_classifier(make_plain(), unfreeze="hidden", **params).fit(X, y)
    monkeypatch.setattr(nn.Linear, "forward", forward)
    with pytest.warns(RuntimeWarning, match="parts of 4 images"):
        classifier.fit(X, y)
    assert_same_fit(classifier, whole, rtol=1e-3, atol=1e-4)
