import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.config import FlowConfig
from sora_jax.diffusion import flow, losses


def test_path_runs_from_data_to_noise_with_its_velocity():
    rng = np.random.default_rng(0)
    x0, noise = rng.normal(size=(2, 5, 3))
    np.testing.assert_allclose(flow.interpolate(x0, noise, np.zeros(5)), x0)
    np.testing.assert_allclose(flow.interpolate(x0, noise, np.ones(5)), noise)
    t, h = rng.uniform(size=5), 1e-6
    difference = (flow.interpolate(x0, noise, t + h) - flow.interpolate(x0, noise, t - h)) / (2 * h)
    np.testing.assert_allclose(difference, flow.velocity(x0, noise), atol=1e-6)


def test_x0_and_velocity_predictions_agree():
    rng = np.random.default_rng(1)
    x0, noise = rng.normal(size=(2, 5, 3))
    t = rng.uniform(0.1, 1, size=5)
    xt = flow.interpolate(x0, noise, t)
    config = FlowConfig(prediction="x0", min_time=0.05)
    np.testing.assert_allclose(flow.to_velocity(x0, xt, t, config), noise - x0, atol=1e-5)
    np.testing.assert_allclose(flow.to_velocity(noise - x0, xt, t, FlowConfig()), noise - x0)
    assert np.isfinite(flow.to_velocity(x0, xt, 0 * t, config)).all()


def test_token_and_clip_weighting_by_eye():
    values = jnp.array([[1.0, 1.0, 1.0, 5.0, 99.0, 99.0]])
    ids = jnp.array([[1, 1, 1, 2, 2, 0]])
    mask = jnp.array([[1, 1, 1, 1, 0, 0]], bool)
    assert losses.packed_mean(values, mask, ids, 3, "token") == 2.0  # (1 + 1 + 1 + 5) / 4
    assert losses.packed_mean(values, mask, ids, 3, "clip") == 3.0  # (1 + 5) / 2
    for weighting in ("token", "clip"):
        assert losses.packed_mean(values, 0 * mask > 0, ids, 3, weighting) == 0.0


def test_flow_loss_against_numpy():
    rng = np.random.default_rng(2)
    output, x0, noise = rng.normal(size=(3, 1, 4, 2))
    t = rng.uniform(0.2, 0.9, size=(1, 4))
    xt = (1 - t[..., None]) * x0 + t[..., None] * noise
    ids, mask = np.array([[1, 1, 2, 0]]), np.array([[1, 1, 1, 0]], bool)
    # With x0 prediction the error of the velocity is the error of x0 over t.
    expected = (((output - x0) / t[..., None]) ** 2).mean(-1)[mask].mean()
    args = (jnp.asarray(v, jnp.float32) for v in (output, xt, t, x0, noise))
    loss = losses.flow_loss(*args, mask, ids, 2, FlowConfig(prediction="x0"))
    assert float(loss) == pytest.approx(expected, rel=1e-5)
