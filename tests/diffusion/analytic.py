"""A Gaussian and a mixture of Gaussians that several tests sample, and what is known of them."""

import numpy as np

from sora_jax.diffusion import exact

MEAN = np.array([0.7, -0.4])
COVARIANCE = np.array([[0.5, 0.3], [0.3, 0.4]])
gaussian_denoiser = exact.gaussian_denoiser(MEAN, COVARIANCE)

MIXTURE_MEANS = np.array([[1.2, 0.0], [-0.8, 0.9], [-0.5, -1.1]])
MIXTURE_WEIGHTS = np.array([0.5, 0.3, 0.2])
MIXTURE_STD = 0.2
mixture_denoiser = exact.mixture_denoiser(MIXTURE_WEIGHTS, MIXTURE_MEANS, MIXTURE_STD)


def exact_flow(x, now, to):
    """The probability-flow ODE's map for the Gaussian: along each eigenvector, distances to the mean keep their
    number of standard deviations."""
    values, vectors = np.linalg.eigh(COVARIANCE)

    def std(level):
        return np.sqrt(level.alpha**2 * values + level.sigma**2)

    z = (x - now.alpha * MEAN) @ vectors / std(now)
    return to.alpha * MEAN + (z * std(to)) @ vectors.T


def mixture_samples(rng, count):
    """Draws (count, 2)."""
    which = rng.choice(3, count, p=MIXTURE_WEIGHTS)
    return MIXTURE_MEANS[which] + MIXTURE_STD * rng.standard_normal((count, 2))
