"""The U-Net of DDPM: its size, its symmetries and its errors. Its numbers are checked in tests/convert."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from helpers.trees import random_tree

from sora_jax.models.layers import sinusoidal_embedding
from sora_jax.models.unet import ResidualBlock, UNet, UNetConfig, abstract_params, init_params
from sora_jax.provenance import flat_names

CONFIG = UNetConfig(width=8, multipliers=(1, 2), num_blocks=1, attention_levels=(1,), num_groups=4, dropout=0.5)
SHAPE, T = (3, 4, 8, 3), np.array([0, 37, 999])  # one shape for most tests, so that it is compiled once


def random_params(config, seed=0):
    return random_tree(abstract_params(UNet(config)), seed=seed)


def images(*shape, seed=1):
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


@functools.partial(jax.jit, static_argnums=0)
def forward(config, params, x, timesteps):
    return UNet(config).apply({"params": params}, x, timesteps)


@functools.partial(jax.jit, static_argnums=0)
def forward_with_dropout(config, params, x, timesteps, key):
    return UNet(config).apply({"params": params}, x, timesteps, deterministic=False, rngs={"dropout": key})


@pytest.fixture(scope="module")
def params():
    return random_params(CONFIG)


def test_the_network_for_cifar_has_35_7_million_parameters():
    shapes = nn.meta.unbox(abstract_params(UNet(UNetConfig())))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == 35_746_307
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}


def test_a_fresh_network_predicts_zero():
    config = UNetConfig(width=8, multipliers=(1,), num_blocks=1, attention_levels=(), num_groups=4)
    params = nn.meta.unbox(jax.jit(functools.partial(init_params, UNet(config)))(jax.random.key(0)))
    assert not forward(config, params, images(*SHAPE), T).any()
    assert params["mid_block_0"]["conv1"]["kernel"].std() == pytest.approx((2 / (9 * 16)) ** 0.5, rel=0.1)
    ends = [leaf for name, leaf in flat_names(params).items() if name.endswith(("conv2.kernel", "out.kernel"))]
    assert len(ends) == 7 and not any(leaf.any() for leaf in ends)


def test_an_image_does_not_depend_on_its_batch(params):
    x, others, times = images(*SHAPE), images(*SHAPE, seed=2), np.array([5, 37, 6])
    others[1] = x[1]
    out, beside_others = forward(CONFIG, params, x, T), forward(CONFIG, params, others, times)
    np.testing.assert_allclose(beside_others[1], out[1], atol=2e-5)
    assert np.abs(beside_others[0] - out[0]).max() > 0.1


def test_time_is_each_images_own(params):
    x = images(1, *SHAPE[1:]).repeat(3, axis=0)
    out = forward(CONFIG, params, x, T)
    assert min(np.abs(out[0] - out[1]).max(), np.abs(out[1] - out[2]).max()) > 0.02
    np.testing.assert_array_equal(forward(CONFIG, params, x, T.astype(np.float32)), out)
    assert np.abs(forward(CONFIG, params, x, T + 0.5) - out).max() > 1e-3


def test_height_and_width_are_alike(params):
    """Swapping the sides of image and kernels swaps those of the output, whatever the shape of the image."""
    x = images(*SHAPE)
    out = forward(CONFIG, params, x, T)
    assert out.shape == SHAPE and out.dtype == jnp.float32
    swapped = jax.tree.map(lambda leaf: leaf.swapaxes(0, 1) if leaf.ndim == 4 else leaf, params)
    np.testing.assert_allclose(forward(CONFIG, swapped, x.swapaxes(1, 2), T).swapaxes(1, 2), out, atol=2e-5)


def test_every_parameter_is_used(params):
    gradient = jax.jit(jax.grad(lambda params: (forward(CONFIG, params, images(*SHAPE), T) ** 2).sum()))(params)
    for name, leaf in flat_names(gradient).items():
        # A key's bias adds the same to all scores of a query, which softmax does not see.
        assert name.endswith("key.bias") or (np.abs(leaf) > 1e-6).any(), name


def test_dropout_is_drawn_where_it_is_asked(params):
    x, keys = images(*SHAPE), jax.random.split(jax.random.key(0))
    exact = forward(CONFIG, params, x, T)
    dropped = forward_with_dropout(CONFIG, params, x, T, keys[0])
    assert np.abs(dropped - exact).max() > 0.1
    np.testing.assert_array_equal(forward_with_dropout(CONFIG, params, x, T, keys[0]), dropped)
    assert np.abs(forward_with_dropout(CONFIG, params, x, T, keys[1]) - dropped).max() > 0.1


def test_dropout_stands_before_the_second_convolution(params):
    """Where that convolution changes nothing, its input is seen: a share of it is zero, the rest is as much greater."""
    config = dataclasses.replace(CONFIG, dropout=0.25)
    identity = np.zeros((3, 3, 16, 16), np.float32)
    identity[1, 1] = np.eye(16)
    values = params["mid_block_0"] | {"conv2": {"kernel": identity, "bias": np.zeros(16, np.float32)}}
    block, x, time = ResidualBlock(16, config), images(3, 4, 8, 16), images(3, 32, seed=2)
    exact = block.apply({"params": values}, x, time, True) - x
    dropped = block.apply({"params": values}, x, time, False, rngs={"dropout": jax.random.key(0)}) - x
    kept = np.abs(dropped) > 1e-6
    np.testing.assert_allclose(dropped, np.where(kept, exact / 0.75, 0), atol=2e-5)
    assert kept.mean() == pytest.approx(0.75, abs=0.05)


def test_bfloat16_is_close(params):
    x, half = images(*SHAPE), dataclasses.replace(CONFIG, dtype="bfloat16")
    exact, rounded = forward(CONFIG, params, x, T), forward(half, params, x, T)
    assert rounded.dtype == jnp.float32
    assert 1e-4 < float(jnp.sqrt(((rounded - exact) ** 2).mean() / (exact**2).mean())) < 0.05


def test_shapes_that_do_not_fit_are_named(params):
    with pytest.raises(ValueError, match=r"x must be \(B, H, W, 3\) with H and W multiples of 2, got shape \(3, 4, 5"):
        forward(CONFIG, params, images(3, 4, 5, 3), T)
    with pytest.raises(ValueError, match=r"got shape \(3, 5, 4, 3\)"):
        forward(CONFIG, params, images(3, 5, 4, 3), T)
    with pytest.raises(ValueError, match=r"got shape \(3, 4, 4, 1\)"):
        forward(CONFIG, params, images(3, 4, 4, 1), T)
    with pytest.raises(ValueError, match=r"timesteps must be one for each of 3 images, got shape \(1,\)"):
        forward(CONFIG, params, images(*SHAPE), T[:1])


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("in_channels", 0, "at least 1"),
        ("out_channels", 0, "at least 1"),
        ("num_blocks", 0, "at least 1"),
        ("num_groups", 0, "at least 1"),
        ("num_groups", 24, "a divisor of width 128"),
        ("width", 33, "even"),
        ("width", 2, "at least 4"),
        ("multipliers", (), "one or more levels"),
        ("multipliers", (1, 0), "at least 1"),
        ("attention_levels", (4,), "between 0 and 3"),
        ("attention_levels", (2, 1), "ascending"),
        ("attention_levels", (1, 1), "ascending"),
        ("norm_eps", 0.0, "positive"),
        ("dropout", 1.0, "below 1"),
        ("dropout", -0.1, "at least 0"),
    ],
)
def test_config_errors_name_field_and_value(field, value, allowed):
    with pytest.raises(ValueError) as error:
        UNetConfig(**{field: value})
    assert f"UNetConfig.{field} must be" in str(error.value) and str(error.value).endswith(f"got {value!r}.")
    assert allowed in str(error.value)


def test_frequencies_end_at_the_period():
    t = np.array([3.0, 700.0])
    with_endpoint = sinusoidal_embedding(t, 6, endpoint=True)
    angles = t[:, None] * np.array([1, 1e-2, 1e-4])
    np.testing.assert_allclose(with_endpoint, np.concatenate([np.cos(angles), np.sin(angles)], 1), atol=1e-4)
    angles = t[:, None] * np.array([1, 10 ** (-4 / 3), 10 ** (-8 / 3)])
    expected = np.concatenate([np.cos(angles), np.sin(angles)], 1)
    np.testing.assert_allclose(sinusoidal_embedding(t, 6), expected, atol=1e-4)
