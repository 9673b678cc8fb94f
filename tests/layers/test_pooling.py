"""Pooling: the output of a layer becomes one row per image."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from deepfeat._layers.index import ResolvedLayer
from deepfeat._layers.pooling import count_features, pool

POOLINGS = ("avg", "max", "gem", "cls", "flatten")


def pool_by_hand(maps, pooling):
    """Pool (n, C, H, W) by the formulas of the papers."""
    flat = maps.reshape(*maps.shape[:2], -1).astype(np.float64)
    if pooling == "max":
        return flat.max(axis=2)
    if pooling == "gem":
        return (np.maximum(flat, 1e-6) ** 3).mean(axis=2) ** (1 / 3)
    return flat.mean(axis=2) if pooling == "avg" else flat.reshape(len(maps), -1)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("pooling", ["avg", "max", "gem", "flatten"])
def test_maps_are_pooled_over_their_positions(rng, pooling, channels_last):
    """Wherever the channel axis is, a row has one value per channel, or all channel by channel."""
    maps = rng.normal(size=(2, 3, 4, 5)).astype(np.float32)
    layer = ResolvedLayer("maps", "maps", (3, 4, 5), channels_last=channels_last)
    output = torch.from_numpy(np.moveaxis(maps, 1, -1) if channels_last else maps)
    assert_allclose(pool(layer, output, pooling), pool_by_hand(maps, pooling), rtol=1e-5)


@pytest.mark.parametrize("prefix", [0, 1, 3])
@pytest.mark.parametrize("pooling", ["avg", "max", "gem"])
def test_tokens_are_pooled_without_those_before_the_patches(rng, pooling, prefix):
    """A class token and registers are not positions in the image."""
    tokens = rng.normal(size=(2, 6, 4)).astype(np.float32)
    layer = ResolvedLayer("tokens", "tokens", (6, 4), channels_last=True, prefix_tokens=prefix)
    expected = pool_by_hand(np.moveaxis(tokens[:, prefix:], 1, 2)[..., None], pooling)
    assert_allclose(pool(layer, torch.from_numpy(tokens), pooling), expected, rtol=1e-5)
    assert count_features(layer, pooling) == 4


@pytest.mark.parametrize("pooling", ["avg", "max", "gem"])
def test_sequences_are_pooled_over_their_length(rng, pooling):
    """The output of a Conv1d, (C, L), has its channels first."""
    sequences = rng.normal(size=(2, 6, 4)).astype(np.float32)
    layer = ResolvedLayer("conv", "conv", (6, 4))
    expected = pool_by_hand(sequences[..., None], pooling)
    assert_allclose(pool(layer, torch.from_numpy(sequences), pooling), expected, rtol=1e-5)
    assert count_features(layer, pooling) == 6


def test_the_class_token_is_the_first(rng):
    """The pooling "cls" returns only this token, "flatten" all of them."""
    tokens = rng.normal(size=(2, 6, 4)).astype(np.float32)
    layer = ResolvedLayer(
        "tokens", "tokens", (6, 4), channels_last=True, prefix_tokens=2, class_token=True
    )
    assert_array_equal(pool(layer, torch.from_numpy(tokens), "cls"), tokens[:, 0])
    assert_array_equal(pool(layer, torch.from_numpy(tokens), "flatten"), tokens.reshape(2, 24))


@pytest.mark.parametrize("pooling", POOLINGS)
def test_vectors_are_not_changed(rng, pooling):
    """There is nothing to pool."""
    vectors = rng.normal(size=(3, 7)).astype(np.float32)
    layer = ResolvedLayer("fc", "fc", (7,))
    assert_array_equal(pool(layer, torch.from_numpy(vectors), pooling), vectors)
    assert count_features(layer, pooling) == 7


def test_a_single_value_per_image_is_a_column():
    """A network may return one score per image, without a second dimension."""
    layer = ResolvedLayer("score", "score", ())
    assert count_features(layer, "flatten") == 1
    assert_array_equal(pool(layer, torch.tensor([1.0, 2.0]), "flatten"), [[1], [2]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_pooling_computes_in_float32(dtype):
    """In float16 the sum over positions, and the third power, would overflow."""
    layer = ResolvedLayer("maps", "maps", (1, 64, 64))
    maps = torch.full((1, 1, 64, 64), 2048.0, dtype=dtype)
    for pooling in ("avg", "max", "gem"):
        assert pool(layer, maps, pooling).dtype == torch.float32
        assert_allclose(pool(layer, maps, pooling), [[2048]], rtol=1e-5)


def test_pooling_leaves_the_output_alone(rng):
    """The network still computes with it."""
    output = torch.from_numpy(rng.normal(size=(2, 3, 4, 5)).astype(np.float32))
    before = output.clone()
    layer = ResolvedLayer("maps", "maps", (3, 4, 5))
    for pooling in ("avg", "max", "gem", "flatten"):
        pool(layer, output, pooling)
    assert_array_equal(output, before)


def test_gem_of_negative_values_is_not_nan():
    """Values below 1e-6 are raised to 1e-6, so that the root is defined."""
    layer = ResolvedLayer("maps", "maps", (1, 2, 2))
    assert_allclose(pool(layer, torch.full((1, 1, 2, 2), -5.0), "gem"), [[1e-6]], rtol=1e-3)


sides = st.integers(2, 5)


@st.composite
def layers(draw):
    """Draw a layer of maps, tokens, vectors, scores or any other shape."""
    shape = tuple(draw(st.lists(sides, max_size=4)))
    is_tokens = len(shape) == 2 and draw(st.booleans())
    return ResolvedLayer(
        "layer",
        "layer",
        shape,
        channels_last=is_tokens or (len(shape) == 3 and draw(st.booleans())),
        prefix_tokens=is_tokens and draw(st.integers(0, shape[0] - 1)),
        class_token=is_tokens and draw(st.booleans()),
    )


@given(layers(), st.sampled_from(POOLINGS), st.integers(1, 3))
def test_the_number_of_features_is_known_beforehand(layer, pooling, n_images):
    """`count_features` refuses a pooling, or returns the width of the rows that `pool` returns."""
    shape = layer.output_shape
    moved = layer.channels_last and len(shape) == 3
    output = torch.ones(n_images, *(shape[1:] + shape[:1] if moved else shape))
    try:
        count = count_features(layer, pooling)
    except ValueError:
        return
    assert pool(layer, output, pooling).shape == (n_images, count)


@given(layers())
def test_flatten_suits_any_layer(layer):
    """Every output can be flattened."""
    assert count_features(layer, "flatten") == math.prod(layer.output_shape)


@pytest.mark.parametrize("layer", [(3, 4, 5), (6, 4)], ids=["maps", "tokens without class token"])
def test_cls_needs_a_class_token(layer):
    """The error describes the layer, and lists the poolings that are possible."""
    with pytest.raises(ValueError, match=r"'conv' \(output shape .* 'avg', 'max', 'gem' or 'fl"):
        count_features(ResolvedLayer("conv", "conv", layer), "cls")


def test_anything_but_maps_and_tokens_can_only_be_flattened():
    """Five dimensions have no agreed meaning."""
    with pytest.raises(ValueError, match=r"must be 'flatten' .*'video' .*\(2, 3, 4, 5\)\); got 'a"):
        count_features(ResolvedLayer("video", "video", (2, 3, 4, 5)), "avg")
