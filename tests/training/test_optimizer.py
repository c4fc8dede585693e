import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.config import OptimizerConfig
from sora_jax.training.optimizer import decay_mask, ema_update, learning_rate, make_optimizer


@pytest.mark.parametrize(
    ("count", "rate"),
    [
        (0, 0.25),  # a quarter of the way up
        (3, 1.0),  # the peak
        (4, 1.0),  # the cosine starts
        (9, 0.6),  # its middle: (1 + final) / 2
        (14, 0.2),  # its end
        (99, 0.2),  # and it stays there
    ],
)
def test_learning_rate_points(count, rate):
    config = OptimizerConfig(learning_rate=1.0, final_share=0.2, warmup_steps=4)
    np.testing.assert_allclose(learning_rate(config, num_steps=14)(jnp.int32(count)), rate, rtol=1e-6)


def test_no_warmup_starts_at_the_peak():
    config = OptimizerConfig(learning_rate=2.0, warmup_steps=0)
    np.testing.assert_allclose(learning_rate(config, num_steps=10)(jnp.int32(0)), 2.0)


def test_only_kernels_decay():
    params = {"a": {"kernel": 0, "bias": 0}, "norm": {"scale": 0}, "modulation": 0}
    assert decay_mask(params) == {"a": {"kernel": True, "bias": False}, "norm": {"scale": False}, "modulation": False}


def test_decay_and_first_step_of_adam():
    # The first AdamW step moves each value by rate * (sign(g) + decay * value) whatever the size of g.
    config = OptimizerConfig(learning_rate=0.5, warmup_steps=0, weight_decay=0.1, clip_norm=1.0, final_share=1.0)
    tx = make_optimizer(config, num_steps=10)
    params = {"kernel": jnp.array([2.0]), "bias": jnp.array([2.0])}
    updates, _ = tx.update({"kernel": jnp.array([3.0]), "bias": jnp.array([-4.0])}, tx.init(params), params)
    np.testing.assert_allclose(updates["kernel"], [-0.5 * (1 + 0.1 * 2)], rtol=1e-5)
    np.testing.assert_allclose(updates["bias"], [0.5], rtol=1e-5)


def test_gradient_is_clipped_by_its_global_norm():
    # eps = 1 makes the first step g / (|g| + 1), so the clipped gradient can be read off it: (3, 4) -> (0.6, 0.8).
    config = OptimizerConfig(learning_rate=1.0, warmup_steps=0, eps=1.0, weight_decay=0.0, clip_norm=1.0)
    tx = make_optimizer(config, num_steps=10)
    params = {"a": {"bias": jnp.zeros(1)}, "b": {"bias": jnp.zeros(1)}}
    updates, _ = tx.update({"a": {"bias": jnp.array([3.0])}, "b": {"bias": jnp.array([4.0])}}, tx.init(params), params)
    np.testing.assert_allclose(updates["a"]["bias"], [-0.6 / 1.6], rtol=1e-5)
    np.testing.assert_allclose(updates["b"]["bias"], [-0.8 / 1.8], rtol=1e-5)


def test_ema_against_its_closed_form():
    """ema_n is the sum of the parameters weighted by (1 - d_k) prod_{j > k} d_j, in float64."""
    values = np.random.default_rng(0).standard_normal(12)
    limit = 0.5  # reached at update 8: (1 + 8) / (10 + 8)
    decays = [0.1, 2 / 11, 3 / 12, 4 / 13, 5 / 14, 6 / 15, 7 / 16, 8 / 17, 0.5, 0.5, 0.5, 0.5]
    ema = {"w": jnp.float32(7.0)}
    for count, value in enumerate(values):
        ema = ema_update(ema, {"w": jnp.float32(value)}, jnp.int32(count), limit)
    weights = [(1 - d) * np.prod(decays[k + 1 :]) for k, d in enumerate(decays)]
    expected = 7.0 * np.prod(decays) + np.dot(weights, values)
    np.testing.assert_allclose(ema["w"], expected, rtol=1e-6)
