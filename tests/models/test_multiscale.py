"""The multi-scale convolution: its layer against NumPy, its bumps, what it can see, and its errors."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from scipy import signal

from sora_jax.models.multiscale import MultiscaleConfig, MultiscaleConvolution, MultiscaleLayer, bumps

CONFIG = MultiscaleConfig(width=4, num_layers=1, num_scales=2, num_bumps=3, num_steps=11)


@functools.partial(jax.jit, static_argnums=0)
def forward(config, params, x, steps):
    return MultiscaleConvolution(config).apply({"params": params}, x, steps, deterministic=True)


def drawn(config, seed=0):
    """Parameters in which nothing is zero."""
    network = MultiscaleConvolution(config)
    boxed = jax.eval_shape(network.init, jax.random.key(0), jnp.zeros((1, 4, 4, config.in_channels)), jnp.zeros(1))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda a: rng.normal(0, 0.5, a.shape).astype(np.float32), nn.meta.unbox(boxed["params"]))


def images(*shape):
    return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def test_bumps_are_normalised_gaussians_whose_width_is_their_distance():
    steps = np.array([0.0, 2.0, 5.0, 10.0], np.float32)
    raw = np.exp(-((steps[:, None].astype(np.float64) - np.array([0, 5, 10])) ** 2) / (2 * 5.0**2))
    np.testing.assert_allclose(bumps(steps, 3, 11), raw / raw.sum(axis=1, keepdims=True), rtol=1e-5)


def test_a_layer_is_the_sum_of_convolutions_of_means():
    layer, x = MultiscaleLayer(1, 2, ("width", "channels"), "float32"), images(1, 4, 6, 1)
    params = nn.meta.unbox(layer.init(jax.random.key(0), x)["params"])
    params = jax.tree.map(lambda a: np.random.default_rng(2).normal(size=a.shape).astype(np.float32), params)
    expected = np.zeros((4, 6))
    for scale in (1, 2):
        p, small = params[f"scale_{scale}"], np.zeros((4 // scale, 6 // scale))
        for y, row in enumerate(small):
            for z in range(len(row)):
                small[y, z] = x[0, y * scale : (y + 1) * scale, z * scale : (z + 1) * scale, 0].mean()
        seen = signal.correlate2d(small, p["kernel"][:, :, 0, 0], mode="same") + p["bias"]
        expected += np.kron(seen, np.ones((scale, scale)))
    np.testing.assert_allclose(layer.apply({"params": params}, x)[0, :, :, 0], expected, atol=1e-5)


def test_a_fresh_network_puts_out_zeros_of_the_shape_it_says():
    network, x = MultiscaleConvolution(CONFIG), images(2, 4, 4, 1)
    params = nn.meta.unbox(network.init(jax.random.key(0), x, jnp.zeros(2))["params"])
    output = forward(CONFIG, params, x, np.array([0, 10]))
    assert output.shape == (2, 4, 4, 2) and output.dtype == jnp.float32 and not output.any()


def test_without_modulation_time_is_the_readout_alone():
    """Outputs at all steps lie in the span of those at J of them, with the bumps as coordinates."""
    config = MultiscaleConfig(width=4, num_layers=1, num_scales=2, num_bumps=3, num_steps=11, modulated=False)
    params, x = drawn(config), np.repeat(images(1, 4, 4, 1), 11, axis=0)
    output = np.asarray(forward(config, params, x, np.arange(11)), np.float64).reshape(11, -1)
    g = np.asarray(bumps(np.arange(11, dtype=np.float32), 3, 11), np.float64)
    assert np.abs(output[0] - output[10]).max() > 0.1
    y = np.linalg.solve(g[[0, 5, 10]], output[[0, 5, 10]])
    np.testing.assert_allclose(output, g @ y, atol=1e-4)

    modulated = drawn(CONFIG)
    output = np.asarray(forward(CONFIG, modulated, x, np.arange(11)), np.float64).reshape(11, -1)
    assert np.abs(output - g @ np.linalg.solve(g[[0, 5, 10]], output[[0, 5, 10]])).max() > 0.05


def test_examples_do_not_see_each_other():
    params, x, steps = drawn(CONFIG), images(2, 4, 4, 1), np.array([3, 8])
    both = forward(CONFIG, params, x, steps)
    swapped = forward(CONFIG, params, x[::-1], steps[::-1])
    np.testing.assert_allclose(both, swapped[::-1], rtol=1e-5, atol=1e-5)


def test_shapes_that_do_not_fit_are_named():
    params = drawn(CONFIG)
    with pytest.raises(ValueError, match=r"multiples of 2, got shape \(1, 4, 5, 1\)"):
        forward(CONFIG, params, images(1, 4, 5, 1), np.zeros(1))
    with pytest.raises(ValueError, match=r"one for each of 2 images, got shape \(1,\)"):
        forward(CONFIG, params, images(2, 4, 4, 1), np.zeros(1))


@pytest.mark.parametrize(("field", "value"), [("width", 0), ("num_scales", 0), ("num_bumps", 1), ("num_steps", 1)])
def test_a_config_names_what_is_wrong(field, value):
    with pytest.raises(ValueError, match=f"MultiscaleConfig.{field} must be at least"):
        MultiscaleConfig(**{field: value})
