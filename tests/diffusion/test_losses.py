"""Weighted errors against each other, and the hybrid loss's gradients."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.diffusion import gaussian, losses
from sora_jax.diffusion.gaussian import Levels, discrete_levels
from sora_jax.diffusion.likelihood import step_term
from sora_jax.diffusion.samplers import denoiser
from sora_jax.diffusion.schedules import linear_betas

RNG = np.random.default_rng(0)
X0, NOISE, WRONG = RNG.standard_normal((3, 2, 3, 4)).astype(np.float32)
ALPHA = np.array([[0.6, 0.3, 0.9], [0.8, 1.2, 0.1]], np.float32)
SIGMA = np.array([[0.8, 0.7, 0.1], [0.6, 0.5, 0.9]], np.float32)
PREDICTIONS = ("x0", "noise", "v", "score", "velocity")


@pytest.mark.parametrize(("first", "second"), list(itertools.combinations(PREDICTIONS, 2)))
@pytest.mark.parametrize("weighting", ["x0", "noise", "velocity", "min_snr"])
def test_a_weighting_is_the_same_through_whatever_is_predicted(first, second, weighting):
    """Two networks that say the same in other words have the same loss."""
    xt = gaussian.corrupt(X0, NOISE, ALPHA, SIGMA)
    values = []
    for prediction in (first, second):
        output = gaussian.convert(WRONG, xt, ALPHA, SIGMA, "x0", prediction)
        values.append(losses.prediction_error(output, X0, NOISE, ALPHA, SIGMA, prediction, weighting))
    np.testing.assert_allclose(*values, rtol=2e-3)


def test_weights_by_eye():
    alpha, sigma = np.array([0.8, 0.6]), np.array([0.6, 0.8])  # SNR 16/9 and 9/16
    np.testing.assert_allclose(losses.loss_weight(alpha, sigma, "noise", "simple"), [1, 1])
    np.testing.assert_allclose(losses.loss_weight(alpha, sigma, "x0", "min_snr", 1.0), [1, 9 / 16], rtol=1e-6)
    np.testing.assert_allclose(losses.loss_weight(alpha, sigma, "noise", "min_snr", 1.0), [9 / 16, 1], rtol=1e-6)
    # min(SNR, gamma) / (SNR + 1) for v (arXiv:2303.09556, section 3.4)
    np.testing.assert_allclose(losses.loss_weight(alpha, sigma, "v", "min_snr", 1.0), [9 / 25, 9 / 25], rtol=1e-6)


def test_simple_is_the_mean_squared_error_of_what_is_predicted():
    got = losses.prediction_error(WRONG, X0, NOISE, ALPHA, SIGMA, "noise")
    np.testing.assert_allclose(got, ((WRONG - NOISE) ** 2).mean(-1), rtol=1e-5)


def test_the_bound_trains_the_variance_alone():
    levels = discrete_levels(linear_betas(10, 0.01, 0.3))
    now, to = (Levels(*(a[i] for a in levels)) for i in (4, 5))
    x0 = jnp.asarray(RNG.integers(0, 256, (2, 5)) / 127.5 - 1, jnp.float32)
    noise = jnp.asarray(RNG.standard_normal((2, 5)), jnp.float32)
    parts = jnp.asarray(RNG.standard_normal((2, 2, 5)), jnp.float32)

    def network(parts):
        return denoiser(lambda x, t: jnp.concatenate([parts[0], parts[1]], axis=-1), "noise", learned_range=True)

    def hybrid(parts, share):
        return losses.hybrid_error(network(parts), x0, noise, now, to, share).sum()

    def bound(parts):
        return step_term(network(parts), x0, noise, now, to, "learned", discrete=True)[0].sum()

    gradient, of_bound = jax.grad(hybrid)(parts, 0.1), jax.grad(bound)(parts)
    np.testing.assert_allclose(gradient[0], 2 * (parts[0] - noise), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(gradient[1], 0.1 * of_bound[1], rtol=1e-4, atol=1e-6)
    assert np.abs(of_bound).min() > 1e-6
    np.testing.assert_allclose(hybrid(parts, 0.1), ((parts[0] - noise) ** 2).sum() + 0.1 * bound(parts), rtol=1e-5)


@pytest.mark.parametrize(
    ("prediction", "weighting", "message"),
    [("noise", "snr", "weighting must be one of simple, .* got 'snr'"), ("eps", "x0", "prediction must be one of")],
)
def test_bad_input_is_named(prediction, weighting, message):
    with pytest.raises(ValueError, match=message):
        losses.loss_weight(ALPHA, SIGMA, prediction, weighting)
