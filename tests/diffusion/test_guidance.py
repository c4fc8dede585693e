"""Guidance by eye and against closed forms."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from analytic import COVARIANCE, MEAN, gaussian_denoiser

from sora_jax.diffusion.gaussian import discrete_levels, flow_levels
from sora_jax.diffusion.guidance import Multiplied, classifier_free, inpainting, limited_interval
from sora_jax.diffusion.samplers import SAMPLERS, sample_chunk, start
from sora_jax.diffusion.schedules import cosine_betas, flow_times


def up(x, t):
    return x + 3.0


def null(x, t):
    return x + 1.0


def test_classifier_free_by_eye():
    assert classifier_free(up, null, 2.5)(jnp.array(10.0), jnp.array(0.0)) == 16.0  # 11 + 2.5 * 2
    assert classifier_free(up, null, 1.0)(jnp.array(10.0), jnp.array(0.0)) == 13.0


def test_only_some_values_are_guided():
    network = classifier_free(up, null, 2.5, values=jnp.arange(4) < 2)
    np.testing.assert_allclose(network(jnp.full((2, 4), 10.0), 0.0), [[16, 16, 13, 13]] * 2)


def test_guidance_only_within_its_interval():
    network = limited_interval(classifier_free(up, null, 2.5), up, 0.3, 0.7)
    times = jnp.array([0.2, 0.3, 0.7, 0.8])
    np.testing.assert_allclose(network(jnp.zeros((4, 2)), times), [[3, 3], [6, 6], [6, 6], [3, 3]])
    with pytest.raises(ValueError, match=r"low <= high, got \(1.0, 0.0\)"):
        limited_interval(up, null, 1.0, 0.0)


def samples(denoise, sampler, levels, count=20_000):
    def noise(index):
        return jax.random.normal(jax.random.fold_in(jax.random.key(1), index), (count, 2))

    x = jax.random.normal(jax.random.key(0), (count, 2))
    chunk = jax.jit(lambda state: sample_chunk(denoise, state, levels, sampler, noise))
    return np.asarray(chunk(start(sampler, x, levels)).x, np.float64)


def linear_step(a, s, b, r):
    """Returns A and c of the mean A x + c of a reverse step of the Gaussian's chain, in float64."""
    beta = s**2 - (a / b) ** 2 * r**2
    gain = a * COVARIANCE @ np.linalg.inv(a**2 * COVARIANCE + s**2 * np.eye(2))
    of_xt, of_x0 = (a / b) * r**2 / s**2, b * beta / s**2
    return of_xt * np.eye(2) + of_x0 * gain, of_x0 * (MEAN - gain @ (a * MEAN)), beta * r**2 / s**2


def steps_of(levels):
    return itertools.pairwise(zip(np.float64(levels.alpha), np.float64(levels.sigma), strict=True))


def test_multiplication_by_a_second_distribution():
    """log r = slope . x moves each step's mean by variance slope; the chain's mean follows in closed form."""
    levels, slope = discrete_levels(cosine_betas(400)), np.array([0.3, 0.2])
    got = samples(gaussian_denoiser, Multiplied(lambda x: jnp.broadcast_to(slope, x.shape)), levels)
    mean, plain = np.zeros(2), np.zeros(2)
    for now, to in steps_of(levels):
        matrix, constant, variance = linear_step(*now, *to)
        mean, plain = matrix @ mean + constant + variance * slope, matrix @ plain + constant
    np.testing.assert_allclose(plain, MEAN, atol=0.01)
    assert np.abs(mean - plain).min() > 0.03  # more than the tolerance below
    np.testing.assert_allclose(got.mean(0), mean, atol=0.02)


def test_inpainting_keeps_what_is_known_and_draws_the_rest():
    """What is known enters each step at its noise level; the other value's mean follows by a linear recursion."""
    known, mask = np.array([0.0, 0.6]), np.array([False, True])

    def noise(level):
        number = (level.sigma * 1e4).astype(int)
        return jax.random.normal(jax.random.fold_in(jax.random.key(9), number), (20_000, 2))

    levels = flow_levels(flow_times(100))
    got = samples(inpainting(gaussian_denoiser, known, mask, noise), SAMPLERS["ancestral"], levels)
    np.testing.assert_allclose(got[:, 1], 0.6, atol=1e-3)
    mean = np.zeros(2)
    for (a, s), to in steps_of(levels):
        mean[1] = a * 0.6
        matrix, constant, _ = linear_step(a, s, *to)
        mean = matrix @ mean + constant
    assert mean[0] - MEAN[0] > 0.2  # drawn towards 1.45, the mean given the known value
    assert got[:, 0].mean() == pytest.approx(mean[0], abs=0.02)


@pytest.mark.parametrize("name", ["euler", "heun", "dpm++", "unipc"])
def test_any_sampler_inpaints(name):
    known, mask = np.array([0.0, 0.6]), np.array([False, True])
    denoise = inpainting(gaussian_denoiser, known, mask, lambda level: jnp.ones((50, 2)))
    got = samples(denoise, SAMPLERS[name], flow_levels(flow_times(20)), count=50)
    np.testing.assert_allclose(got[:, 1], 0.6, atol=1e-3)
