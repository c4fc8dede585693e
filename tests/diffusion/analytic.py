"""Distributions whose optimal denoiser is known: the truth that samplers and bounds are held against."""

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.diffusion.gaussian import expand
from sora_jax.diffusion.samplers import Denoised

MEAN = np.array([0.7, -0.4])
COVARIANCE = np.array([[0.5, 0.3], [0.3, 0.4]])


def gaussian_denoiser(x, level):
    """E[x_0 | x_t] for x_0 ~ N(MEAN, COVARIANCE): mean + alpha S (alpha^2 S + sigma^2 I)^-1 (x - alpha mean).

    The inverse is taken by eigenvectors, and eps as E[eps | x_t] = sigma (...)^-1 (x - alpha mean), so that both are
    right at alpha = 0 and at sigma = 0 too.
    """
    values, vectors = np.linalg.eigh(COVARIANCE)
    alpha, sigma = expand(level.alpha, x), expand(level.sigma, x)
    along = (x - alpha * MEAN) @ vectors / (alpha**2 * values + sigma**2)
    return Denoised(MEAN + (alpha * values * along) @ vectors.T, (sigma * along) @ vectors.T)


def exact_flow(x, now, to):
    """The probability-flow ODE's map for that Gaussian: along each eigenvector, distances to the mean keep their
    number of standard deviations."""
    values, vectors = np.linalg.eigh(COVARIANCE)

    def std(level):
        return np.sqrt(level.alpha**2 * values + level.sigma**2)

    z = (x - now.alpha * MEAN) @ vectors / std(now)
    return to.alpha * MEAN + (z * std(to)) @ vectors.T


MIXTURE_MEANS = np.array([[1.2, 0.0], [-0.8, 0.9], [-0.5, -1.1]])
MIXTURE_WEIGHTS = np.array([0.5, 0.3, 0.2])
MIXTURE_STD = 0.2


def mixture_denoiser(x, level):
    """E[x_0 | x_t] for a mixture of three round Gaussians: each one's own, by its share given x_t."""
    alpha, sigma = expand(level.alpha, x), expand(level.sigma, x)
    variance = alpha**2 * MIXTURE_STD**2 + sigma**2  # (..., 1)
    offsets = x[..., None, :] - alpha[..., None] * MIXTURE_MEANS  # (..., 3, 2)
    log_weights = jnp.log(MIXTURE_WEIGHTS) - (offsets**2).sum(-1) / (2 * variance)
    weights = jax.nn.softmax(log_weights, axis=-1)
    means = MIXTURE_MEANS + (alpha * MIXTURE_STD**2 / variance)[..., None] * offsets
    x0 = (weights[..., None] * means).sum(-2)
    return Denoised(x0, (x - alpha * x0) / sigma)


def mixture_samples(rng, count):
    """Draws (count, 2)."""
    which = rng.choice(3, count, p=MIXTURE_WEIGHTS)
    return MIXTURE_MEANS[which] + MIXTURE_STD * rng.standard_normal((count, 2))
