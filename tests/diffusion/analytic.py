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


MIXTURE_MEAN = MIXTURE_WEIGHTS @ MIXTURE_MEANS
MIXTURE_COVARIANCE = (
    (MIXTURE_MEANS - MIXTURE_MEAN).T @ np.diag(MIXTURE_WEIGHTS) @ (MIXTURE_MEANS - MIXTURE_MEAN)
    + MIXTURE_STD**2 * np.eye(2)
)  # fmt: skip


def mixture_x0(x, alpha, sigma):
    """E[x_0 | x_t] of the mixture, float64, for x of shape (n, 2)."""
    variance = alpha**2 * MIXTURE_STD**2 + sigma**2
    offsets = x[:, None] - alpha * MIXTURE_MEANS  # (n, 3, 2)
    logits = np.log(MIXTURE_WEIGHTS) - (offsets**2).sum(-1) / (2 * variance)
    shares = np.exp(logits - logits.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    return (shares[..., None] * (MIXTURE_MEANS + alpha * MIXTURE_STD**2 / variance * offsets)).sum(1)


def mixture_flow(x, alpha, sigma, num_steps=400):
    """Where the probability-flow ODE of the mixture takes x from a level to data: by Runge-Kutta of order 4 in the
    angle a of x / r = cos(a) x_0 + sin(a) eps."""
    r, angle = np.hypot(alpha, sigma), np.arctan2(sigma, alpha)

    def slope(y, a):
        a = max(a, 1e-9)
        x0 = mixture_x0(y, np.cos(a), np.sin(a))
        return -np.sin(a) * x0 + np.cos(a) * (y - np.cos(a) * x0) / np.sin(a)

    y, h = x / r, -angle / num_steps
    for n in range(num_steps):
        a = angle + n * h
        k1 = slope(y, a)
        k2 = slope(y + h / 2 * k1, a + h / 2)
        k3 = slope(y + h / 2 * k2, a + h / 2)
        y = y + h / 6 * (k1 + 2 * k2 + 2 * k3 + slope(y + h * k3, a + h))
    return y
