"""Tests of what is learned from: images that are augmented, and activations that are kept."""

import functools
import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image, ImageOps
from small_networks import (
    assert_same_state,
    make_classifier,
    make_images,
    make_plain,
    make_vit,
    seeded,
    state_of,
    to_16_pixels,
)
from torch import nn

from deepfeat._extraction import readers
from deepfeat._finetuning import classifier as _classifier
from deepfeat._finetuning import networks as _networks
from deepfeat._finetuning import samples as _samples
from deepfeat._finetuning.samples import crop_at_random, draw_flips
from deepfeat._images.decoding import open_image

RATES = {"learning_rate": 0.01, "backbone_learning_rate": 0.01}


@pytest.fixture
def without_cut(monkeypatch):
    """Fit a classifier whose images run through the whole network in every epoch."""

    def fit(classifier, *args, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr(_classifier, "find_cut", lambda *args: None)
            return classifier.fit(*args, **kwargs)

    return fit


@pytest.fixture
def kept(monkeypatch):
    """Note what `keep_activations` returned."""
    notes = []

    def keep(*args, **kwargs):
        notes.append(_samples.keep_activations(*args, **kwargs))
        return notes[-1]

    monkeypatch.setattr(_classifier, "keep_activations", keep)
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
        state_of(first).items(), state_of(second).values(), strict=True
    ):
        assert_allclose(value, expected, rtol=rtol, atol=atol, err_msg=path)


# The frozen part is computed once ---------------------------------------------------------------

CASES = {
    "plain": (functools.partial(make_plain, dropout=0.5, norm=True), "blocks.2"),
    "plain, head alone": (functools.partial(make_plain, dropout=0.5, norm=True), None),
    "plain, a list": (functools.partial(make_plain, norm=True), ["blocks.1.1", "hidden"]),
    "vit": (functools.partial(make_vit, dropout=0.2), "encoder.layers.encoder_layer_1"),
    "vit, with its positions": (functools.partial(make_vit, dropout=0.2), "encoder"),
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


def make_case(case, **params):
    make, unfreeze = (CASES | SLOW)[case]
    net = make if isinstance(make, str) else make()
    return make_classifier(net, unfreeze=unfreeze, **{"optimizer": "sgd"} | RATES | params)


@pytest.mark.parametrize("augment", [None, "flip"])
@pytest.mark.parametrize(
    "case", [*CASES, *(pytest.param(case, marks=pytest.mark.slow) for case in SLOW)]
)
def test_what_is_kept_changes_nothing(without_cut, kept, case, augment):
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
    assert [one.activations.shape[:2] for one in kept] == [
        (2 if augment else 1, 7),
        (1, 3),
    ]
    without_it = without_cut(make_case(case, **params), X, y, **data)
    assert len(kept) == 2
    assert_same_fit(with_it, without_it, rtol=2e-3, atol=2e-4)


def test_what_is_kept_could_be_told_from_something_else(without_cut):
    """Activations of other views would not pass for these: flips matter to this network."""
    X, y = make_images(7)
    plain, flipped = (
        make_case("plain", augment=augment, max_epochs=4).fit(X, y) for augment in (None, "flip")
    )
    with pytest.raises(AssertionError):
        assert_same_fit(plain, flipped, rtol=2e-3, atol=2e-4)


class Counting(nn.Conv2d):
    """Count the images that come through."""

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
        # Keeping would not pay off.
        (None, 1, 8 + 3),
        ("flip", 2, 2 * 8 + 3),
        # There is no end of views, but of what the images to check on are.
        ("crop", 3, 3 * 8 + 3),
        (Image.Image.copy, 3, 3 * 8 + 3),
    ],
)
def test_frozen_layers_see_each_view_of_an_image_once(augment, epochs, expected):
    """However many epochs there are: 8 images to learn from, and 3 to check on."""
    X, y = make_images()
    X_val, y_val = make_images(3, seed=1)
    net = make_plain()
    net.blocks[0][0] = seeded(Counting, 3, 6, 3, stride=2, padding=1)
    classifier = make_classifier(net, unfreeze="hidden", augment=augment, max_epochs=epochs)
    with pytest.MonkeyPatch.context() as patch:
        # To find out about the network, and to try the cut, a few images run through it too.
        patch.setattr(_classifier, "find_cut", uncounted(_classifier.find_cut))
        for room in (_classifier, readers):
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


def test_beyond_a_limit_a_file_is_kept_and_gives_the_same(monkeypatch, kept):
    """The file goes with the array: none is left behind."""
    X, y = make_images()
    in_memory = make_case("plain", max_epochs=4).fit(X, y)
    assert not isinstance(kept[0].activations, np.memmap)
    monkeypatch.setattr(_samples, "MEMORY_LIMIT", 0)
    in_file = make_case("plain", max_epochs=4).fit(X, y)
    assert isinstance(kept[1].activations, np.memmap)
    assert_same_state(state_of(in_memory), state_of(in_file))


def test_no_file_is_left_behind(monkeypatch, tmp_path):
    """Neither after training nor after an error."""
    monkeypatch.setattr(_samples, "MEMORY_LIMIT", 0)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    X, y = make_images()
    make_case("plain", max_epochs=4).fit(X, y)
    with pytest.raises(ValueError, match="the weights became"):
        make_case("plain", max_epochs=4, learning_rate=1e36).fit(X, y)
    assert list(tmp_path.iterdir()) == []


def test_where_the_disk_is_full_nothing_is_kept(monkeypatch, kept, without_cut):
    """And training goes on without."""
    monkeypatch.setattr(_samples, "MEMORY_LIMIT", 0)
    room = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda folder: room)
    X, y = make_images()
    fitted = make_case("plain", max_epochs=4).fit(X, y)
    assert kept == [None]
    assert_same_state(
        state_of(fitted), state_of(without_cut(make_case("plain", max_epochs=4), X, y))
    )


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_what_is_kept_has_the_precision_of_the_training(without_cut, precision):
    """Near to what training without it gives, as these types have it."""
    X, y = make_images()
    params = {"precision": precision, "max_epochs": 4}
    first = make_case("plain", **params).fit(X, y)
    assert_same_fit(first, without_cut(make_case("plain", **params), X, y), rtol=0.1, atol=0.02)


def test_where_memory_runs_out_parts_of_what_is_kept_are_learned_from(monkeypatch):
    """The rest of the network takes parts of a batch of activations too."""
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


# Augmentation -----------------------------------------------------------------------------------


class Recording(nn.Module):
    """Note the batches that come, in train mode and in eval mode."""

    seen: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])

    def __init__(self):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.fc = nn.Linear(12, 5)

    def forward(self, images):
        Recording.seen[self.training].extend(images.detach().clone())
        return self.fc(self.pool(images).flatten(1))


@pytest.fixture
def seen():
    """What the network saw in validation, and in training."""
    Recording.seen = ([], [])
    return Recording.seen


def fit_recording(augment, X, y, **params):
    """Train a network that notes its input; forget what came before training."""
    params = {"max_epochs": 3, "unfreeze": "all"} | params
    return make_classifier(seeded(Recording), augment=augment, **params).fit(
        X, y, X_val=X[:2], y_val=y[:2]
    )


def as_bytes(tensors):
    return [tensor.contiguous().numpy().tobytes() for tensor in tensors]


def prepared(X, change=lambda image: image):
    return as_bytes(to_16_pixels(change(Image.fromarray(pixels))) for pixels in X)


@pytest.mark.parametrize("augment", [None, "flip", "crop", ImageOps.flip])
def test_images_are_augmented_for_training_alone(seen, augment):
    """Those that are checked on, and those that are predicted, are as they are."""
    X, y = make_images()
    classifier = fit_recording(augment, X, y)
    plain, mirrored = prepared(X), prepared(X, ImageOps.mirror)
    checked = as_bytes(seen[False])[-6:]
    assert checked == plain[:2] * 3
    learned = as_bytes(seen[True])
    assert len(learned) == 3 * 8
    if augment is None:
        assert set(learned) == set(plain)
    elif augment == "flip":
        assert set(learned) <= set(plain + mirrored)
        assert set(learned) & set(plain)
        assert set(learned) & set(mirrored)
    elif augment == "crop":
        assert len(set(learned) - set(plain + mirrored)) > 20
    else:
        assert set(learned) == set(prepared(X, ImageOps.flip))
    seen[False].clear()
    classifier.predict(X)
    assert as_bytes(seen[False]) == plain


@pytest.mark.parametrize("augment", ["flip", "crop"])
@pytest.mark.parametrize("num_workers", [2, "auto"])
def test_chance_is_the_same_in_any_number_of_threads(seen, augment, num_workers):
    """An image is cropped by seed, epoch and place, not by who comes first."""
    X, y = make_images(8, 24)
    fit_recording(augment, X, y)
    alone = as_bytes(seen[True])
    seen[True].clear()
    fit_recording(augment, X, y, num_workers=num_workers)
    assert as_bytes(seen[True]) == alone
    seen[True].clear()
    fit_recording(augment, X, y, random_state=1)
    assert sorted(as_bytes(seen[True])) != sorted(alone)


def test_a_crop_is_new_in_every_epoch(seen):
    """No two crops of one image are alike."""
    X, y = make_images(2, 64)
    fit_recording("crop", X, y, max_epochs=10)
    assert len(set(as_bytes(seen[True]))) == 20


def test_a_callable_gets_upright_pictures_one_after_the_other(scene_paths, scene_labels):
    """In the thread of the caller, where torch's own generator is seeded."""
    sizes, drawn, threads = [], [], set()

    def note(image):
        assert image.mode == "RGB"
        sizes.append(image.size)
        drawn.append(torch.rand(1).item())
        threads.add(threading.current_thread())
        return image

    def fit():
        drawn.clear()
        sizes.clear()
        make_classifier(augment=note, num_workers=3).fit(scene_paths, scene_labels)
        return list(drawn)

    assert fit() == fit()
    assert len(set(drawn)) == len(sizes) == 24
    assert threads == {threading.main_thread()}
    pictures = [open_image(path) for path in scene_paths]
    assert set(sizes) == {picture.size for picture in pictures}


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_augmentation_that_raises_names_the_image(scene_paths, scene_labels, num_workers):
    """As reading it would."""

    def fail(image):
        raise KeyError("planted")

    classifier = make_classifier(augment=fail, num_workers=num_workers)
    with pytest.raises(ValueError, match=r"\d\d\.(jpg|png).*planted"):
        classifier.fit(scene_paths, scene_labels)


def test_every_other_image_is_mirrored():
    """Half of them, others in each epoch, and none outside of training."""
    flips = np.array([draw_flips("flip", 0, epoch, 1000) for epoch in range(1, 21)])
    assert_allclose(flips.mean(), 0.5, atol=0.01)
    assert_allclose(flips.mean(axis=1), 0.5, atol=0.07)
    assert len(np.unique(flips, axis=0)) == 20
    assert_array_equal(draw_flips("flip", 0, 3, 1000), flips[2])
    assert (draw_flips("flip", 1, 3, 1000) != flips[2]).any()
    for augment, epoch in [(None, 1), ("flip", None), ("crop", None), (ImageOps.flip, 1)]:
        assert not draw_flips(augment, 0, epoch, 1000).any()


@given(st.integers(1, 300), st.integers(1, 300), st.integers(0, 2**32))
def test_a_crop_lies_inside_the_image(width, height, seed):
    """Of any size, it has a pixel at least, and 8 to 100 % of the area but for rounding."""
    rows, columns = np.mgrid[:height, :width]
    whole = Image.fromarray((np.stack([columns, rows, 0 * rows], -1) % 256).astype(np.uint8))
    crop = crop_at_random(whole, np.random.default_rng(seed))
    w, h = crop.size
    assert 1 <= w <= width
    assert 1 <= h <= height
    if crop.size != whole.size:
        assert (w + 1) * (h + 1) >= 0.08 * width * height
        assert (w - 0.5) / (h + 0.5) <= 4 / 3
        assert (w + 0.5) / (max(h, 1) - 0.5) >= 3 / 4
        left, top = np.asarray(crop)[0, 0, :2].astype(int)
        inside = np.asarray(whole)
        assert any(
            np.array_equal(np.asarray(crop), inside[t : t + h, x : x + w])
            for x in range(left, width, 256)
            for t in range(top, height, 256)
        )


def test_crops_are_spread_as_the_paper_says():
    """Areas evenly, ratios evenly on a logarithmic scale, places evenly."""
    whole = Image.fromarray(np.mgrid[:200, :200].transpose(1, 2, 0)[..., [0, 1, 1]].astype("u1"))
    crops = [crop_at_random(whole, np.random.default_rng(seed)) for seed in range(2000)]
    sizes = np.array([crop.size for crop in crops if crop.size != whole.size])
    areas, ratios = sizes.prod(axis=1) / 200**2, sizes[:, 0] / sizes[:, 1]
    assert 0.078 <= areas.min() < 0.1
    assert 0.9 < areas.max() <= 1
    assert 0.74 <= ratios.min() < 0.77
    assert 1.3 < ratios.max() <= 1.35
    assert_allclose(np.log(ratios).mean(), 0, atol=0.02)
    small = areas < 0.5  # larger ones must have a ratio that fits in
    assert_allclose(np.quantile(areas[small], [0.25, 0.5, 0.75]), [0.185, 0.29, 0.395], atol=0.02)
    starts = np.array([np.asarray(crop)[0, 0, :2] for crop in crops])
    ends = 199 - np.array([np.asarray(crop)[-1, -1, :2] for crop in crops])
    assert_allclose(starts.mean(axis=0), ends.mean(axis=0), atol=4)


def test_a_crop_takes_the_place_of_the_weights_own_crop(seen, monkeypatch):
    """Nothing else is cut off: a whole image is squashed, not cropped in the middle."""
    monkeypatch.setattr(_samples, "crop_at_random", lambda image, rng: image)
    monkeypatch.setattr(_samples, "draw_flips", lambda *args: np.zeros(99, dtype=bool))
    X, y = make_images(4, 64)
    X = [np.hstack([pixels, 255 - pixels]) for pixels in X]
    params = {"max_epochs": 1, "unfreeze": "all", "optimizer": "sgd"}
    by_crop = make_classifier("squeezenet1_1", augment="crop", **params).fit(X, y)
    squashed = make_classifier("squeezenet1_1", augment=None, resize="squash", **params).fit(X, y)
    middle = make_classifier("squeezenet1_1", augment=None, **params).fit(X, y)
    assert_same_state(state_of(by_crop), state_of(squashed))
    assert by_crop.history_[0]["train_loss"] != middle.history_[0]["train_loss"]
