"""Distributions whose optimal denoiser is known, to hold samplers and bounds against.

(1)  x_0 ~ N(m, S):  E[x_0 | x_t] = m + alpha S (alpha^2 S + sigma^2 I)^-1 (x_t - alpha m)
(2)  x_0 ~ sum_k w_k N(m_k, s^2 I):  (1) of each part, weighted by w_k N(x_t; alpha m_k, (alpha^2 s^2 + sigma^2) I)

and E[eps | x_t] = (x_t - alpha E[x_0 | x_t]) / sigma, which for one Gaussian is written so that it holds at sigma = 0.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.array_types import Array, Float
from sora_jax.diffusion.gaussian import Levels, expand
from sora_jax.diffusion.samplers import Denoise, Denoised


def gaussian_denoiser(mean: Float[np.ndarray, " dim"], covariance: Float[np.ndarray, "dim dim"]) -> Denoise:
    """Returns the optimal denoise function of equation 1, for x of shape (..., dim)."""
    values, vectors = np.linalg.eigh(covariance)

    def denoise(x: Array, level: Levels) -> Denoised:
        alpha, sigma = expand(level.alpha, x), expand(level.sigma, x)
        along = (x - alpha * mean) @ vectors / (alpha**2 * values + sigma**2)
        return Denoised(mean + (alpha * values * along) @ vectors.T, (sigma * along) @ vectors.T)

    return denoise


def mixture_denoiser(
    weights: Float[np.ndarray, " parts"], means: Float[np.ndarray, "parts dim"], std: float
) -> Denoise:
    """Returns the optimal denoise function of equation 2, for x of shape (..., dim) and sigma > 0."""

    def denoise(x: Array, level: Levels) -> Denoised:
        alpha, sigma = expand(level.alpha, x), expand(level.sigma, x)
        variance = alpha**2 * std**2 + sigma**2  # (..., 1)
        offsets = x[..., None, :] - alpha[..., None] * means  # (..., parts, dim)
        share = jax.nn.softmax(jnp.log(weights) - (offsets**2).sum(-1) / (2 * variance), axis=-1)
        given = means + (alpha * std**2 / variance)[..., None] * offsets
        x0 = (share[..., None] * given).sum(-2)
        return Denoised(x0, (x - alpha * x0) / sigma)

    return denoise
