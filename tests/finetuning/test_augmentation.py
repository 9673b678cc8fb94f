"""Tests of augmentation: random flips and crops, and the user's functions."""

import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image, ImageOps
from torch import nn
from torchvision import transforms

from deepfeat._finetuning import augmentation as _augmentation
from deepfeat._finetuning import sources as _sources
from deepfeat._finetuning.augmentation import crop_at_random, draw_flips
from deepfeat._images.decoding import open_image

# Flips and crops ----------------------------------------------------------------------------------


def test_every_other_image_is_mirrored():
    """Half of them, different ones in each epoch, and none outside of training."""
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
    """It has at least one pixel, and 8 to 100 % of the area up to rounding."""
    rows, columns = np.mgrid[:height, :width]
    whole = (np.stack([columns, rows, 0 * rows], -1) % 256).astype(np.uint8)
    crop = crop_at_random(whole, np.random.default_rng(seed))
    h, w = crop.shape[:2]
    assert 1 <= w <= width
    assert 1 <= h <= height
    if crop.shape != whole.shape:
        assert (w + 1) * (h + 1) >= 0.08 * width * height
        assert (w - 0.5) / (h + 0.5) <= 4 / 3
        assert (w + 0.5) / (max(h, 1) - 0.5) >= 3 / 4
        left, top = crop[0, 0, :2].astype(int)
        assert any(
            np.array_equal(crop, whole[t : t + h, x : x + w])
            for x in range(left, width, 256)
            for t in range(top, height, 256)
        )


def test_crops_are_spread_as_the_paper_says():
    """Areas uniformly, ratios uniformly on a logarithmic scale, positions uniformly."""
    whole = np.mgrid[:200, :200].transpose(1, 2, 0)[..., [0, 1, 1]].astype("u1")
    crops = [crop_at_random(whole, np.random.default_rng(seed)) for seed in range(2000)]
    sides = np.array([crop.shape[:2] for crop in crops if crop.shape != whole.shape])
    areas, ratios = sides.prod(axis=1) / 200**2, sides[:, 1] / sides[:, 0]
    assert 0.078 <= areas.min() < 0.1
    assert 0.9 < areas.max() <= 1
    assert 0.74 <= ratios.min() < 0.77
    assert 1.3 < ratios.max() <= 1.35
    assert_allclose(np.log(ratios).mean(), 0, atol=0.02)
    small = areas < 0.5  # larger ones must have a ratio that fits in
    assert_allclose(np.quantile(areas[small], [0.25, 0.5, 0.75]), [0.185, 0.29, 0.395], atol=0.02)
    starts = np.array([crop[0, 0, :2] for crop in crops])
    ends = 199 - np.array([crop[-1, -1, :2] for crop in crops])
    assert_allclose(starts.mean(axis=0), ends.mean(axis=0), atol=4)


# In training --------------------------------------------------------------------------------------


class Recording(nn.Module):
    """Record the batches seen in train mode and in eval mode."""

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
    """The images that the network saw in validation and in training."""
    Recording.seen = ([], [])
    return Recording.seen


@pytest.fixture
def fit_recording(seeded, make_classifier):
    """Train a network that records its input."""

    def fit_recording(augment, X, y, **params):
        params = {"max_epochs": 3, "unfreeze": "all"} | params
        return make_classifier(seeded(Recording), augment=augment, **params).fit(
            X, y, X_val=X[:2], y_val=y[:2]
        )

    return fit_recording


def as_bytes(tensors):
    return [tensor.contiguous().numpy().tobytes() for tensor in tensors]


@pytest.fixture
def prepared(to_16_pixels):
    def prepared(X, change=lambda image: image):
        return as_bytes(to_16_pixels(change(Image.fromarray(pixels))) for pixels in X)

    return prepared


@pytest.mark.parametrize("augment", [None, "flip", "crop", ImageOps.flip])
def test_images_are_augmented_for_training_alone(
    seen, augment, make_images, fit_recording, prepared
):
    """Validation images, and those that are predicted, are not."""
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
def test_chance_is_the_same_in_any_number_of_threads(
    seen, augment, num_workers, make_images, fit_recording
):
    """A crop depends on seed, epoch and index, not on which thread comes first."""
    X, y = make_images(8, 24)
    fit_recording(augment, X, y)
    alone = as_bytes(seen[True])
    seen[True].clear()
    fit_recording(augment, X, y, num_workers=num_workers)
    assert as_bytes(seen[True]) == alone
    seen[True].clear()
    fit_recording(augment, X, y, random_state=1)
    assert sorted(as_bytes(seen[True])) != sorted(alone)


def test_a_crop_is_new_in_every_epoch(seen, make_images, fit_recording):
    """No two crops of an image are equal."""
    X, y = make_images(2, 64)
    fit_recording("crop", X, y, max_epochs=10)
    assert len(set(as_bytes(seen[True]))) == 20


def test_a_crop_takes_the_place_of_the_weights_own_crop(
    seen, monkeypatch, make_images, make_classifier, assert_same_state, state_of
):
    """Nothing else is cropped: a whole image is squashed, not cropped in the middle."""
    monkeypatch.setattr(_augmentation, "crop_at_random", lambda image, rng: image)
    monkeypatch.setattr(_sources, "draw_flips", lambda *args: np.zeros(99, dtype=bool))
    X, y = make_images(4, 64)
    X = [np.hstack([pixels, 255 - pixels]) for pixels in X]
    params = {"max_epochs": 1, "unfreeze": "all", "optimizer": "sgd"}
    by_crop = make_classifier("squeezenet1_1", augment="crop", **params).fit(X, y)
    squashed = make_classifier("squeezenet1_1", augment=None, resize="squash", **params).fit(X, y)
    middle = make_classifier("squeezenet1_1", augment=None, **params).fit(X, y)
    assert_same_state(state_of(by_crop), state_of(squashed))
    assert by_crop.history_[0]["train_loss"] != middle.history_[0]["train_loss"]


# The user's functions ---------------------------------------------------------------------------


def paint(image):
    """Paint over an image."""
    image.paste("red", (0, 0, *image.size))
    return image


def test_a_callable_gets_upright_pictures_one_after_the_other(
    scene_paths, scene_labels, make_classifier
):
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
    assert set(sizes) == {picture.shape[1::-1] for picture in pictures}


@pytest.mark.parametrize("augment", ["flip", "crop", paint])
def test_images_are_not_changed_by_augmenting(augment, make_images, make_classifier):
    """Arrays are not copied before, but a function of the user may paint on what it gets."""
    X, y = make_images(8, 64)
    before = np.array(X)
    make_classifier(augment=augment).fit(X, y)
    assert_array_equal(X, before)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_augmentation_that_raises_names_the_image(
    scene_paths, scene_labels, num_workers, make_classifier
):
    """As an error in reading it does."""

    def fail(image):
        raise KeyError("planted")

    classifier = make_classifier(augment=fail, num_workers=num_workers)
    with pytest.raises(ValueError, match=r"\d\d\.(jpg|png).*planted"):
        classifier.fit(scene_paths, scene_labels)


def test_an_augmentation_must_return_images(images, make_classifier):
    """Grey images become RGB; anything else is an error that names the image."""
    grey = transforms.Grayscale()
    classifier = make_classifier("squeezenet1_0", unfreeze=None, augment=grey).fit(*images)
    assert classifier.n_iter_ == 2
    with pytest.raises(
        ValueError, match=r"X\[\d\] .*augment must return a PIL image; got a Tensor\. Leave"
    ):
        make_classifier(augment=transforms.ToTensor()).fit(*images)
