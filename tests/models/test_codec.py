"""Codecs: clips to latents and back, a few frames at a time, by tiles, and on several devices."""

import dataclasses

import jax
import numpy as np
import pytest
from helpers.trees import random_tree

from sora_jax.models.autoencoder.codec import Codec, IdentityCodec, ImageCodec
from sora_jax.models.autoencoder.image_vae import ImageVAE, ImageVAEConfig, abstract_params

CONFIG = ImageVAEConfig(latent_channels=2, widths=(4, 8), num_blocks=1, num_groups=2, scaling_factor=0.5)
CLIP = np.random.default_rng(1).uniform(-1, 1, (5, 8, 12, 3)).astype(np.float32)


@pytest.fixture(scope="module")
def params():
    return random_tree(abstract_params(ImageVAE(CONFIG)), 0.05, 0.2)


@pytest.fixture(scope="module")
def codec(params):
    """Two frames at once, on one device."""
    return ImageCodec(CONFIG, params, jax.devices()[:1], most_pixels=2 * 8 * 12)


@pytest.fixture(scope="module")
def network(params):
    return lambda values, method: jax.tree.map(
        np.asarray, jax.jit(lambda x: ImageVAE(CONFIG).apply({"params": params}, x, method=method))(values)
    )


def test_a_clip_is_its_frames_whose_latents_are_scaled(codec, network):
    expected = network(CLIP, "encode")
    posterior = codec.posterior(CLIP)
    np.testing.assert_allclose(posterior.mean, expected.mean, atol=1e-5)
    np.testing.assert_allclose(posterior.logvar, expected.logvar, atol=1e-5)
    latents = codec.encode(CLIP)
    np.testing.assert_allclose(latents, 0.5 * expected.mean, atol=1e-5)
    assert latents.shape == (*codec.latent_size(*CLIP.shape[:3]), codec.channels) == (5, 4, 6, 2)
    np.testing.assert_allclose(codec.decode(latents), network(expected.mean, "decode"), atol=1e-4)
    together = codec.encode(np.stack([CLIP, CLIP[::-1]]))
    np.testing.assert_allclose(together, [latents, latents[::-1]], atol=1e-5)
    np.testing.assert_allclose(codec.decode(together)[1], codec.decode(latents)[::-1], atol=1e-4)


def test_latents_are_drawn_from_the_posterior(codec):
    posterior = codec.posterior(CLIP)
    drawn = np.stack([codec.encode(CLIP, jax.random.key(i)) for i in range(64)])
    distance = (drawn / 0.5 - posterior.mean) / np.exp(posterior.logvar / 2)
    assert abs(distance.mean()) < 0.02 and abs(distance.std() - 1) < 0.02
    np.testing.assert_array_equal(drawn[3], codec.encode(CLIP, jax.random.key(3)))


def test_few_functions_serve_all_durations(params, codec):
    codec = ImageCodec(CONFIG, params, jax.devices()[:1], most_pixels=4 * 8 * 12)
    for count in (1, 2, 3, 4, 5, 9, 12):
        assert codec.encode(np.concatenate([CLIP] * 3)[:count]).shape == (count, 4, 6, 2)
    assert codec._functions["encode", False]._cache_size() == 3  # one, two and four frames at once


def test_tiles_change_nothing(params):
    large = np.random.default_rng(2).uniform(-1, 1, (1, 20, 36, 3)).astype(np.float32)
    whole = ImageCodec(CONFIG, params, jax.devices()[:1])
    latents = whole.encode(large)
    pixels = whole.decode(latents)
    other = ImageCodec(CONFIG, params, jax.devices()[:1], most_pixels=20 * 36 - 1, tile=16)
    np.testing.assert_allclose(other.encode(large), latents, atol=2e-5)
    np.testing.assert_allclose(other.decode(latents), pixels, atol=2e-4)
    assert other._functions["decode", True]._cache_size() == 1
    assert other._functions["decode", False]._cache_size() == 0


def test_pixels_are_their_own_latents(codec):
    identity = IdentityCodec()
    np.testing.assert_array_equal(identity.decode(identity.encode(CLIP)), CLIP)
    assert identity.latent_size(5, 7, 9) == (5, 7, 9)
    assert all(isinstance(one, Codec) for one in (identity, codec))
    assert [one.valid_frames(7) for one in (identity, codec)] == [7, 7]
    assert (identity.kind, codec.kind, codec.strides, codec.scale) == ("identity", "image", (1, 2, 2), 0.5)


def test_what_cannot_be_is_named(params, codec):
    for call, words in (
        (lambda: codec.latent_size(1, 8, 9), r"positive multiples of the codec's strides \(1, 2, 2\), got \(1, 8, 9\)"),
        (lambda: codec.encode(CLIP[:, :7]), r"multiples of the codec's strides \(1, 2, 2\), got \(5, 7, 12\)"),
        (lambda: codec.encode(CLIP[..., :2]), r"clip must be \(T, H, W, 3\) or .*, got shape \(5, 8, 12, 2\)"),
        (lambda: codec.decode(CLIP), r"latents must be \(T, H, W, 2\) or .*, got shape \(5, 8, 12, 3\)"),
        (lambda: codec.valid_frames(0), "num_frames must be at least 1, got 0"),
        (lambda: ImageCodec(CONFIG, params, most_pixels=0), "most_pixels must be at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=words):
            call()


def test_a_dtype_is_that_of_the_computation(params, codec):
    half = ImageCodec(dataclasses.replace(CONFIG, dtype="bfloat16"), params, jax.devices()[:1])
    rough, exact = half.encode(CLIP), codec.encode(CLIP)
    assert rough.dtype == np.float32 and 1e-4 < np.abs(rough - exact).max() < 0.1
