"""Tests of labelled images: class weights, sample weights, hold-out split."""

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose

RATES = {"learning_rate": 0.02, "backbone_learning_rate": 0.01}


# Weights ------------------------------------------------------------------------------------------


def test_class_weights_count_in_the_loss_like_sample_weights(
    images, make_classifier, assert_same_state, state_of
):
    """ "balanced" gives each class the same total weight."""
    X, y = images
    X, y = X[:6] + X[6:7], np.append(y[:6], "dark")
    params = {"max_epochs": 3, "batch_size": 7, "augment": None}
    dark = {"dark": 7 / (2 * 4), "light": 7 / (2 * 3)}
    by_class = make_classifier(class_weight="balanced", **params).fit(X, y)
    by_dict = make_classifier(class_weight=dark, **params).fit(X, y)
    by_sample = make_classifier(**params).fit(X, y, sample_weight=[dark[label] for label in y])
    none = make_classifier(**params).fit(X, y)
    assert_same_state(state_of(by_class), state_of(by_dict))
    for mine, other in zip(state_of(by_class).values(), state_of(by_sample).values(), strict=True):
        assert_allclose(mine, other, rtol=1e-5, atol=1e-6)
    assert not torch.equal(state_of(none)["fc.weight"], state_of(by_class)["fc.weight"])


def test_the_scale_of_sample_weights_does_not_matter(
    images, make_classifier, assert_same_state, state_of
):
    """Only their ratios matter."""
    plain = make_classifier().fit(*images)
    scaled = make_classifier().fit(*images, sample_weight=np.full(8, 128.0))
    assert_same_state(state_of(plain), state_of(scaled))


@pytest.mark.parametrize("augment", [None, "flip", "crop"])
def test_an_image_of_weight_zero_is_dropped(
    images, augment, make_plain, make_classifier, assert_same_state, state_of
):
    """It does not even count in the statistics of BatchNorm."""
    X, y = images
    params = {"augment": augment, "max_epochs": 3, "backbone": make_plain(norm=True)}
    without = make_classifier(**params).fit(X[:6], y[:6])
    weights = [1.0] * 6 + [0.0] * 2
    weighted = make_classifier(**params).fit(X, y, sample_weight=weights)
    assert_same_state(state_of(without), state_of(weighted))


def test_partial_fits_keep_the_scale_of_weights(
    images, make_classifier, state_of, assert_same_state
):
    """Half the weight of all classes is half the learning rate, for SGD; `fit` scales to mean 1."""
    X, y = images
    params = {"optimizer": "sgd", "augment": None, "weight_decay": 0}
    half = make_classifier(class_weight={"dark": 0.5, "light": 0.5}, **params, **RATES)
    rates = {name: rate / 2 for name, rate in RATES.items()}
    slow = make_classifier(**params, **rates)
    for classifier in (half, slow):
        classifier.partial_fit(X, y, classes=["dark", "light"])
    for mine, other in zip(state_of(half).values(), state_of(slow).values(), strict=True):
        assert_allclose(mine, other, rtol=1e-5, atol=1e-7)
    assert_same_state(
        state_of(half.fit(X, y)), state_of(make_classifier(**params, **RATES).fit(X, y))
    )
    with pytest.raises(ValueError, match="class_weight='balanced' is not supported by partial"):
        make_classifier(class_weight="balanced").partial_fit(X, y, classes=["dark", "light"])


@pytest.mark.parametrize(
    ("weights", "words"),
    [
        ("auto", "^class_weight must be a dict, 'balanced' or None; got 'auto'"),
        (3, "^class_weight must be a dict, .*; got 3"),
        ([1, 2], r"^class_weight must be a dict, .*; got \[1, 2\]"),
        ({"gray": 2}, "gray|not in class_weight"),
        ({"dark": -1}, "class_weight must have finite, non-negative weights; got {'dark'"),
        ({"dark": np.nan}, "class_weight must have finite, non-negative weights; got {'dark'"),
        (
            {"dark": 0, "light": 0},
            "class_weight must leave at least one image with a positive",
        ),
    ],
)
def test_class_weights_that_make_no_sense_are_refused(images, weights, words, make_classifier):
    """Rather than trained with."""
    with pytest.raises(ValueError, match=words):
        make_classifier(class_weight=weights).fit(*images)


# Hold-out split -----------------------------------------------------------------------------------


def test_a_stratified_part_is_held_out(make_images, to_16_pixels, make_classifier):
    """A quarter of each class, which is not trained on."""
    X, y = make_images(16)
    names = {image.tobytes(): label for image, label in zip(X, y, strict=True)}
    seen, checked = [], []

    def note(image):
        seen.append(np.asarray(image).tobytes())
        return image

    def prepare(image):
        if np.asarray(image).tobytes() in names:  # and not one on which a cut is tried
            checked.append(np.asarray(image).tobytes())
        return to_16_pixels(image)

    make_classifier(
        preprocessing=prepare,
        augment=note,
        early_stopping=True,
        validation_fraction=0.25,
        max_epochs=1,
    ).fit(X, y)
    assert sorted(names[pixels] for pixels in seen) == ["dark"] * 6 + ["light"] * 6
    held_out = set(checked) - set(seen)
    assert sorted(names[pixels] for pixels in held_out) == ["dark"] * 2 + ["light"] * 2


@pytest.mark.parametrize(
    ("y", "fraction", "words"),
    [
        (
            ["a"] * 7 + ["b"],
            0.25,
            "y must have at least 2 images per class.*; class .*'b'.* has 1. Pass X_val",
        ),
        (
            ["a", "b", "c", "d"] * 2,
            0.1,
            "at least 4 images, one per class, .*; 0.1 holds out 1 of 8 images",
        ),
        (
            ["a", "b"] * 4,
            0.95,
            "at least 2 images, one per class, .*; 0.95 holds out 8 of 8 images",
        ),
    ],
)
def test_early_stopping_needs_images_to_hold_out(images, y, fraction, words, make_classifier):
    """Unless it is given validation images."""
    X, _ = images
    params = {"early_stopping": True, "validation_fraction": fraction}
    with pytest.raises(ValueError, match=words):
        make_classifier(**params).fit(X, y)
    classifier = make_classifier(**params).fit(X, y, X_val=X[:1], y_val=y[:1])
    assert classifier.best_validation_score_ is not None


def test_an_image_of_weight_zero_is_not_held_out(
    make_images, assert_same_state, state_of, make_classifier
):
    """Its score would not count, and a score without any weight is undefined."""
    X, y = make_images(24)
    weights = np.zeros(24)
    weights[:8] = 1
    params = {"early_stopping": True, "validation_fraction": 0.25, "unfreeze": None}
    for seed in range(3):
        few = make_classifier(random_state=seed, **params).fit(X[:8], y[:8])
        many = make_classifier(random_state=seed, **params).fit(X, y, sample_weight=weights)
        assert_same_state(state_of(few), state_of(many))
        assert few.best_validation_score_ == many.best_validation_score_
