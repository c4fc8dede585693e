"""The optimal denoisers against the posterior mean summed over a fine grid."""

import numpy as np
import pytest
import scipy.stats
from analytic import (
    COVARIANCE,
    MEAN,
    MIXTURE_MEANS,
    MIXTURE_STD,
    MIXTURE_WEIGHTS,
    gaussian_denoiser,
    mixture_denoiser,
)

from sora_jax.diffusion.gaussian import Levels

AXIS = np.linspace(-4, 4, 401)
GRID = np.stack(np.meshgrid(AXIS, AXIS, indexing="ij"), -1)  # (401, 401, 2)


def mixture_density(x):
    parts = zip(MIXTURE_WEIGHTS, MIXTURE_MEANS, strict=True)
    return sum(w * scipy.stats.multivariate_normal(m, MIXTURE_STD**2 * np.eye(2)).pdf(x) for w, m in parts)


@pytest.mark.parametrize(("alpha", "sigma"), [(0.8, 0.6), (0.3, 0.7), (0.0, 1.0)])
@pytest.mark.parametrize(
    ("denoise", "density"),
    [(gaussian_denoiser, scipy.stats.multivariate_normal(MEAN, COVARIANCE).pdf), (mixture_denoiser, mixture_density)],
    ids=["gaussian", "mixture"],
)
def test_posterior_mean(denoise, density, alpha, sigma):
    x = np.array([[0.5, -0.2], [-0.4, 0.9]])
    said = denoise(x, Levels(*(np.array(v) for v in (0.0, alpha, sigma, 1.0))))
    for xt, x0, noise in zip(x, said.x0, said.noise, strict=True):
        weights = density(GRID) * np.exp(-((xt - alpha * GRID) ** 2).sum(-1) / (2 * sigma**2))
        expected = (weights[..., None] * GRID).sum((0, 1)) / weights.sum()
        np.testing.assert_allclose(x0, expected, atol=2e-4)
        np.testing.assert_allclose(noise, (xt - alpha * expected) / sigma, atol=5e-4)


def test_the_gaussians_noise_is_finite_where_there_is_none():
    said = gaussian_denoiser(np.array([[0.5, -0.2]]), Levels(*(np.array(v) for v in (0.0, 1.0, 0.0, 1.0))))
    np.testing.assert_allclose(said.x0, [[0.5, -0.2]], rtol=1e-5)
    np.testing.assert_allclose(said.noise, 0)
