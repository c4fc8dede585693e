"""The image autoencoder: its size, posterior, attention and errors. Its numbers are checked in tests/convert."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from helpers.trees import random_tree

from sora_jax.models.autoencoder import image_vae
from sora_jax.models.autoencoder.image_vae import (
    CellAttention,
    GroupNorm,
    ImageVAE,
    ImageVAEConfig,
    abstract_params,
)
from sora_jax.models.autoencoder.protocol import Autoencoder, Posterior
from sora_jax.parallel.rules import partition_spec

CONFIG = ImageVAEConfig(latent_channels=2, widths=(4, 8), num_blocks=1, num_groups=2)
X = np.random.default_rng(1).uniform(-1, 1, (2, 8, 12, 3)).astype(np.float32)


@functools.partial(jax.jit, static_argnums=0)
def forward(config, params, x):
    return ImageVAE(config).apply({"params": params}, x)


@pytest.fixture(scope="module")
def params():
    return random_tree(abstract_params(ImageVAE(CONFIG)))


def test_stable_diffusions_has_84_million_parameters():
    shapes = nn.meta.unbox(abstract_params(ImageVAE(ImageVAEConfig())))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == 83_653_863
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    assert ImageVAEConfig().strides == (1, 8, 8) and ImageVAEConfig().scaling_factor == 0.18215


def test_it_is_an_autoencoder_whose_axes_can_be_split():
    model = ImageVAE(CONFIG)
    assert isinstance(model, Autoencoder)
    leaves = jax.tree.leaves(abstract_params(model), is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned))
    split = [partition_spec(leaf.names) for leaf in leaves]
    assert all(len(leaf.names) == leaf.value.ndim for leaf in leaves)
    unsplit = [leaf for leaf, spec in zip(leaves, split, strict=True) if leaf.value.ndim > 1 and not any(spec)]
    assert len(unsplit) == 2  # quant and post_quant, as small as the latents


def test_images_and_latents_have_their_shapes(params):
    posterior, decoded = forward(CONFIG, params, X)
    assert posterior.mean.shape == posterior.logvar.shape == (2, 4, 6, 2) and decoded.shape == X.shape
    assert {part.dtype for part in (*posterior, decoded)} == {jnp.dtype("float32")}
    assert np.isfinite(decoded).all() and np.asarray(decoded).std() > 0.01


def test_log_variances_are_clipped(params):
    bias = np.array([-50, 50, 50, -50], np.float32)  # two means, two log variances
    encoder = params["encoder"] | {"quant": {"kernel": params["encoder"]["quant"]["kernel"], "bias": bias}}
    posterior, _ = forward(CONFIG, params | {"encoder": encoder}, X)
    assert (posterior.logvar == np.array([20, -30], np.float32)).all()
    assert (np.abs(posterior.mean - bias[:2]) < 10).all()


def test_samples_of_a_posterior():
    mean, logvar = jnp.array([1.0, -2.0]), jnp.log(jnp.array([4.0, 0.25]))
    posterior = Posterior(mean, logvar)
    np.testing.assert_allclose(posterior.std, [2, 0.5], rtol=1e-6)
    keys = jax.random.split(jax.random.key(0), 4000)
    samples = jax.vmap(posterior.sample)(keys)
    np.testing.assert_allclose(samples.mean(0), mean, atol=0.1)
    np.testing.assert_allclose(samples.std(0), [2, 0.5], rtol=0.05)
    np.testing.assert_array_equal(posterior.sample(keys[0]), samples[0])


def test_attention_is_the_same_however_many_rows_ask_at_once(monkeypatch):
    rng = np.random.default_rng(0)
    x, attention = rng.normal(size=(2, 5, 4, 8)).astype(np.float32), CellAttention(CONFIG)
    params = random_tree(jax.eval_shape(attention.init, jax.random.key(0), x), 0, 0.5, seed=1)
    whole = attention.apply(params, x)
    for rows in (1, 2, 3):
        monkeypatch.setattr(image_vae, "_MAX_SCORES", rows * 5 * 4 * 4)
        np.testing.assert_allclose(attention.apply(params, x), whole, atol=1e-5)


def test_a_norm_takes_the_moments_it_is_given():
    x = np.random.default_rng(0).normal(3, 2, (2, 4, 5, 6)).astype(np.float32)
    affine = {"scale": np.arange(1, 7, dtype=np.float32), "bias": np.ones(6, np.float32)}
    norm, groups = GroupNorm(CONFIG), x.astype(np.float64).reshape(2, 4, 5, 2, 3)
    mean, var = groups.mean((1, 2, 4)), groups.var((1, 2, 4))

    def expected(mean, var):
        normed = (groups - mean[:, None, None, :, None]) / np.sqrt(var[:, None, None, :, None] + CONFIG.norm_eps)
        return normed.reshape(x.shape) * affine["scale"] + affine["bias"]

    np.testing.assert_allclose(norm.apply({"params": affine}, x), expected(mean, var), atol=1e-4)
    other = {"mean": (mean + 1).astype(np.float32), "var": (2 * var).astype(np.float32)}
    given = norm.apply({"params": affine, "moments": other}, x)
    np.testing.assert_allclose(given, expected(mean + 1, 2 * var), atol=1e-4)


def test_bfloat16_is_close(params):
    exact, rounded = (forward(config, params, X) for config in (CONFIG, dataclasses.replace(CONFIG, dtype="bfloat16")))
    for a, b in zip(jax.tree.leaves(exact), jax.tree.leaves(rounded), strict=True):
        assert b.dtype == jnp.float32
        assert 1e-4 < float(jnp.sqrt(((a - b) ** 2).mean() / (a**2).mean())) < 0.05


def test_shapes_that_do_not_fit_are_named():
    model = ImageVAE(CONFIG)
    for method, shape, words in (
        ("encode", (2, 8, 11, 3), "x must be (B, H, W, 3) with H and W multiples of 2, got shape (2, 8, 11, 3)"),
        ("encode", (2, 8, 12, 4), "got shape (2, 8, 12, 4)"),
        ("decode", (2, 4, 6, 3), "z must be (B, h, w, 2), got shape (2, 4, 6, 3)"),
    ):
        with pytest.raises(ValueError) as error:
            model.apply({"params": {}}, jnp.zeros(shape), method=method)
        assert words in str(error.value)


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("channels", 0, "at least 1"),
        ("latent_channels", 0, "at least 1"),
        ("num_blocks", 0, "at least 1"),
        ("num_groups", 0, "at least 1"),
        ("widths", (), "one or more levels"),
        ("widths", (128, 200), "one multiple of num_groups 32"),
        ("norm_eps", 0.0, "positive"),
        ("scaling_factor", 0.0, "positive"),
    ],
)
def test_config_errors_name_field_and_value(field, value, allowed):
    with pytest.raises(ValueError) as error:
        ImageVAEConfig(**{field: value})
    assert f"ImageVAEConfig.{field} must be" in str(error.value) and str(error.value).endswith(f"got {value!r}.")
    assert allowed in str(error.value)
