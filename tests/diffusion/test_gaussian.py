"""The Gaussian process against its definition, Bayes' rule and round trips."""

import itertools
from typing import get_args

import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.diffusion import gaussian
from sora_jax.diffusion.gaussian import Levels, Prediction, discrete_levels, flow_levels
from sora_jax.diffusion.schedules import linear_betas, respaced_betas, respaced_steps, zero_terminal_snr

RNG = np.random.default_rng(0)
X0, NOISE = RNG.standard_normal((2, 3, 4))
# Levels of tokens: discrete (alpha^2 + sigma^2 = 1), flow (alpha + sigma = 1), and neither.
ALPHA, SIGMA = np.array([0.6, 0.3, 1.2]), np.array([0.8, 0.7, 0.5])


@pytest.mark.parametrize(("source", "target"), list(itertools.permutations(get_args(Prediction), 2)))
def test_every_pair_of_predictions_round_trips(source, target):
    xt = gaussian.corrupt(X0, NOISE, ALPHA, SIGMA)
    truth = {p: gaussian.from_x0_and_noise(X0, NOISE, ALPHA, SIGMA, p) for p in (source, target)}
    np.testing.assert_allclose(gaussian.convert(truth[source], xt, ALPHA, SIGMA, source, target), truth[target],
                               rtol=1e-4, atol=1e-5)  # fmt: skip
    # Of a prediction that is wrong, too: it stands for some x0 and noise that give xt.
    wrong = truth[source] + 0.3
    there = gaussian.convert(wrong, xt, ALPHA, SIGMA, source, target)
    back = gaussian.convert(there, xt, ALPHA, SIGMA, target, source)
    np.testing.assert_allclose(back, wrong, rtol=1e-4, atol=1e-5)
    x0, noise = gaussian.to_x0_and_noise(wrong, xt, ALPHA, SIGMA, source)
    np.testing.assert_allclose(gaussian.corrupt(x0, noise, ALPHA, SIGMA), xt, rtol=1e-4, atol=1e-5)


def test_predictions_are_what_they_are_called():
    """velocity is the path's derivative, v that of the angle, the score the gradient of the log density."""
    h = 1e-6
    t, d = 0.3, 0.1  # this path is straight, so any difference will do
    path = (gaussian.corrupt(X0, NOISE, np.array(1 - t - d), np.array(t + d))
            - gaussian.corrupt(X0, NOISE, np.array(1 - t + d), np.array(t - d))) / (2 * d)  # fmt: skip
    args = (X0, NOISE, np.array(1 - t), np.array(t))
    np.testing.assert_allclose(gaussian.from_x0_and_noise(*args, "velocity"), path, atol=1e-5)
    angle = 0.9
    turned = [np.cos(angle + d) * X0 + np.sin(angle + d) * NOISE for d in (h, -h)]
    args = (X0, NOISE, np.array(np.cos(angle)), np.array(np.sin(angle)))
    np.testing.assert_allclose(gaussian.from_x0_and_noise(*args, "v"), (turned[0] - turned[1]) / (2 * h), rtol=1e-4)
    xt = np.cos(angle) * X0 + np.sin(angle) * NOISE
    score = -(xt - np.cos(angle) * X0) / np.sin(angle) ** 2  # of N(alpha x0, sigma^2)
    np.testing.assert_allclose(gaussian.from_x0_and_noise(*args, "score"), score, rtol=1e-5)


@pytest.mark.parametrize("pair", [(0.3, 0.8, 0.7, 0.55), (0.2, 0.8, 0.5, 0.5)])
def test_posterior_is_bayes_rule_on_a_grid(pair):
    """q(x_s | x_t, x_0) as the normalised product q(x_t | x_s) q(x_s | x_0), summed over a fine grid."""
    a_t, s_t, a_s, s_s = pair
    now, to = (Levels(*(np.array(v) for v in (0, a, s, 1))) for a, s in ((a_t, s_t), (a_s, s_s)))
    x0, xt = 0.7, -0.4
    grid = np.linspace(-8, 8, 200_001)
    ratio = a_t / a_s
    variance = s_t**2 - ratio**2 * s_s**2
    log = -((grid - a_s * x0) ** 2) / (2 * s_s**2) - (xt - ratio * grid) ** 2 / (2 * variance)
    weights = np.exp(log - log.max())
    weights /= weights.sum()
    mean = (weights * grid).sum()
    q = gaussian.posterior(now, to)
    assert float(q.xt * xt + q.x0 * x0) == pytest.approx(mean, abs=1e-6)
    assert float(q.variance) == pytest.approx((weights * (grid - mean) ** 2).sum(), rel=1e-5)
    assert float(q.beta) == pytest.approx(variance, rel=1e-6)


def test_posterior_of_neighbouring_steps_is_ddpms():
    """arXiv:2006.11239, Eq. 7, in float64 from betas alone."""
    betas = linear_betas(10, 0.01, 0.3)
    bar = np.cumprod(1 - betas)
    levels = discrete_levels(betas)
    before = np.append(1.0, bar[:-1])
    for t in range(1, 10):
        now, to = (Levels(*(a[i] for a in levels)) for i in (9 - t, 10 - t))
        q = gaussian.posterior(now, to)
        expected = np.array([
            np.sqrt(before[t]) * betas[t] / (1 - bar[t]),
            np.sqrt(1 - betas[t]) * (1 - before[t]) / (1 - bar[t]),
            (1 - before[t]) / (1 - bar[t]) * betas[t],
            betas[t],
        ])  # fmt: skip
        np.testing.assert_allclose([q.x0, q.xt, q.variance, q.beta], expected, rtol=2e-4)


def test_learned_variance_interpolates_in_the_logarithm():
    levels = discrete_levels(linear_betas(10, 0.01, 0.3))
    now, to = (Levels(*(a[i] for a in levels)) for i in (3, 4))
    q = gaussian.posterior(now, to)
    v = jnp.array([0.0, 0.5, 1.0])
    expected = [q.variance, np.sqrt(q.variance * q.beta), q.beta]
    np.testing.assert_allclose(jnp.exp(gaussian.learned_log_variance(v, now, to)), expected, rtol=1e-5)
    last = Levels(*(a[-1] for a in levels))
    before = Levels(*(a[-2] for a in levels))
    assert float(gaussian.learned_log_variance(v, before, last, floor=1e-3)[0]) == pytest.approx(np.log(1e-3))


def test_levels_of_a_sampler():
    betas = linear_betas(100, 1e-3, 0.1)
    steps = respaced_steps(100, 4, "linspace")
    levels = discrete_levels(respaced_betas(betas, steps), steps)
    bar = np.cumprod(1 - betas)
    assert levels.time.tolist() == [99, 66, 33, 0, 0]
    np.testing.assert_allclose(levels.alpha[:-1] ** 2, bar[steps[::-1]], rtol=1e-5)
    np.testing.assert_allclose(levels.alpha**2 + levels.sigma**2, 1, rtol=1e-6)
    assert (levels.alpha[-1], levels.sigma[-1]) == (1, 0)
    assert (discrete_levels(zero_terminal_snr(betas)).unit == 1).all()
    flow = flow_levels(np.array([1.0, 0.25, 0.0]))
    assert flow.alpha.tolist() == [0, 0.75, 1] and flow.sigma.tolist() == [1, 0.25, 0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: gaussian.expand(np.ones(2), X0), r"level of shape \(2,\) does not belong to .* \(3, 4\)"),
        (lambda: gaussian.to_x0_and_noise(X0[:2], X0, ALPHA, SIGMA, "noise"), r"shape of its input \(3, 4\), got"),
        (lambda: discrete_levels(linear_betas(3, 0.1, 0.2), np.arange(2)), "one for each of the 3 betas, got 2"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
