"""The variational bound on the log-likelihood of Gaussian diffusion, its terms, and lossy coding along them.

With levels T ... 1 noisy and level 0 clean, in nats:

(1)  -log p(x_0) <= L = L_T + sum_{t=2..T} L_{t-1} + L_0                                  arXiv:2006.11239, Eq. 5
(2)  L_T     = KL(q(x_T | x_0) || N(0, I))
(3)  L_{t-1} = KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)),  p's mean by its x_0 in q's place
(4)  L_0     = -log p(x_0 | x_1): a density, or for 8-bit values the mass of their bin      Eq. 13
(5)  K = -L / log 2, the bound of arXiv:1503.03585 in bits (Eq. 12-14; its edge terms are set otherwise there)
(6)  L_null = log-likelihood of N(0, I), the model that the data has after diffusion        arXiv:1503.03585, Table 1

Means are over nothing: each function gives one number an example, summed over its values.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sora_jax.array_types import Array, Bool, Float
from sora_jax.diffusion.gaussian import (
    SMALLEST_VARIANCE,
    Levels,
    corrupt,
    expand,
    learned_log_variance,
    posterior,
)
from sora_jax.diffusion.samplers import Denoise

LOG_2 = math.log(2)


def gaussian_kl(
    mean_q: Float[Array, "..."], log_variance_q: Array, mean_p: Array, log_variance_p: Array
) -> Float[Array, "..."]:
    """Returns KL(N(mean_q, variance_q) || N(mean_p, variance_p)) of each value, in nats."""
    ratio = log_variance_q - log_variance_p
    return 0.5 * (jnp.exp(ratio) - 1 - ratio + (mean_q - mean_p) ** 2 * jnp.exp(-log_variance_p))


def gaussian_log_density(x: Float[Array, "..."], mean: Array, log_variance: Array) -> Float[Array, "..."]:
    """Returns log N(x; mean, variance) of each value, in nats."""
    return -0.5 * (math.log(2 * math.pi) + log_variance + (x - mean) ** 2 * jnp.exp(-log_variance))


def discretized_log_likelihood(
    x: Float[Array, "..."], mean: Array, log_variance: Array, num_bins: int = 256
) -> Float[Array, "..."]:
    """Returns the log mass that a Gaussian gives the bin of each value, in nats (arXiv:2006.11239, Eq. 13).

    Args:
        x: in [-1, 1], one of `num_bins` evenly spaced values; the outermost bins are open.
        mean: of the Gaussian.
        log_variance: of it.
        num_bins: 256 for 8-bit pixels.
    """
    half = 1 / (num_bins - 1)
    scale = jnp.exp(-0.5 * log_variance)
    upper, lower = (x - mean + half) * scale, (x - mean - half) * scale
    # In the far tail the difference of two numbers near 1 is lost: take it on the other side of the Gaussian.
    flip = x > mean
    upper, lower = jnp.where(flip, -lower, upper), jnp.where(flip, -upper, lower)
    open_above = jnp.where(flip, x < -1 + half, x > 1 - half)
    open_below = jnp.where(flip, x > 1 - half, x < -1 + half)
    log_above = jnp.where(open_above, 0.0, jax.scipy.stats.norm.logcdf(upper))
    log_below = jnp.where(open_below, -jnp.inf, jax.scipy.stats.norm.logcdf(lower))
    gap = jnp.where(open_below, -jnp.inf, jnp.minimum(log_below - log_above, -1e-12))
    return log_above + jnp.log1p(-jnp.exp(gap))


class BoundTerms(NamedTuple):
    """The terms of equation 1, in nats an example.

    Attributes:
        prior: (B,), L_T.
        steps: (T, B), L_{T-1} ... L_0 in the order of sampling.
        squared_errors: (T, B), summed over values, of the x_0 (or the probability of a one) predicted at each level.
    """

    prior: Float[Array, " batch"]
    steps: Float[Array, "steps batch"]
    squared_errors: Float[Array, "steps batch"]

    @property
    def total(self) -> Float[Array, " batch"]:
        """L of each example."""
        return self.prior + self.steps.sum(axis=0)


def step_term(
    denoise: Denoise,
    x0: Float[Array, " batch *values"],
    noise: Float[Array, " batch *values"],
    now: Levels,
    to: Levels,
    variance: str = "small",
    discrete: bool = False,
    floor: Float[Array, ""] | None = None,
) -> tuple[Array, Array]:
    """Returns L_{t-1} (or L_0, where `to` is clean) of each value, in nats, and the squared error of the x_0 predicted.

    Args:
        denoise: of the network.
        x0: the data.
        noise: that makes x_t of it.
        now: level t.
        to: level t - 1.
        variance: of p: `small`, `large` or `learned`.
        discrete: x0 is 8-bit values in [-1, 1], and L_0 their mass rather than a density.
        floor: variance of p in the last step, whose `small` variance is 0, or the least one where it is learned.
            Default: beta, the only variance that this step itself has. The code of DDPM takes `last_floor`.

    Raises:
        ValueError: an unknown variance.
    """
    if variance not in ("small", "large", "learned"):
        raise ValueError(f"variance must be small, large or learned, got {variance!r}.")
    xt = corrupt(x0, noise, now.alpha, now.sigma)
    denoised, q = denoise(xt, now), posterior(now, to)
    last = to.sigma <= 0
    of_last = q.beta if floor is None else floor
    log_q = jnp.log(jnp.maximum(q.variance, SMALLEST_VARIANCE))
    if variance == "learned":
        log_p = learned_log_variance(denoised.range, now, to, jnp.where(last, of_last, SMALLEST_VARIANCE))
    else:
        fixed = jnp.where(last, of_last, q.variance if variance == "small" else q.beta)
        log_p = jnp.log(jnp.maximum(fixed, SMALLEST_VARIANCE))
        log_p = jnp.broadcast_to(expand(log_p, x0), x0.shape)
    means = [expand(q.xt, x0) * xt + expand(q.x0, x0) * x for x in (x0, denoised.x0)]
    divergence = gaussian_kl(means[0], expand(log_q, x0), means[1], log_p)
    decoder = discretized_log_likelihood if discrete else gaussian_log_density
    term = jnp.where(expand(last, x0), -decoder(x0, means[1], log_p), divergence)
    return term, (denoised.x0 - x0) ** 2


def last_floor(levels: Levels) -> Array | None:
    """Returns the variance that the code of DDPM and improved DDPM gives the last step: the posterior's of step 2.

    The last step's own posterior has none. A learned variance may not go below it, and with `small` and with `large`
    variances it is theirs. None where there is one step.
    """
    if len(levels.sigma) < 3:
        return None
    before, last = (Levels(*(jnp.asarray(a)[i] for a in levels)) for i in (-3, -2))
    return posterior(before, last).variance


def prior_term(x0: Float[Array, " batch *values"], first: Levels) -> Float[Array, " batch *values"]:
    """Returns L_T of each value (equation 2), in nats; `first` is the noisiest level."""
    return gaussian_kl(first.alpha * x0, 2 * jnp.log(first.sigma), jnp.zeros_like(x0), jnp.zeros(()))


def bound(
    denoise: Denoise,
    x0: Float[Array, " batch *values"],
    levels: Levels,
    key: jax.Array,
    *,
    variance: str = "small",
    discrete: bool = False,
    mask: Bool[Array, " batch *values"] | None = None,
    last_variance: str = "beta",
) -> BoundTerms:
    """Returns all terms of the bound, each with one draw of noise.

    Args:
        denoise: of the network.
        x0: (B, ...), the data.
        levels: (T + 1,), falling to a clean one.
        key: of the noise; step i takes fold_in(key, i).
        variance: of the reverse steps.
        discrete: x0 is 8-bit values in [-1, 1].
        mask: which values count (default: all).
        last_variance: of the last step where the variance is `small` or `large`: `beta`, that of its forward step, or
            `posterior`, what the code of DDPM takes (`last_floor`). Published bounds are with the latter; it is not the
            default because bounds that were written down with the former would change.

    Raises:
        ValueError: an unknown last variance.
    """
    if last_variance not in ("beta", "posterior"):
        raise ValueError(f"last_variance must be beta or posterior, got {last_variance!r}.")
    count = jnp.ones(x0.shape, bool) if mask is None else jnp.broadcast_to(mask, x0.shape)

    def per_example(values: Array) -> Array:
        return jnp.where(count, values, 0).reshape(len(x0), -1).sum(axis=1)

    levels = Levels(*(jnp.asarray(a) for a in levels))
    prior = prior_term(x0, Levels(*(a[0] for a in levels)))
    floor = last_floor(levels) if variance == "learned" or last_variance == "posterior" else None

    def body(_: None, step: tuple[Levels, Levels, Array]) -> tuple[None, tuple[Array, Array]]:
        now, to, index = step
        noise = jax.random.normal(jax.random.fold_in(key, index), x0.shape, x0.dtype)
        term, error = step_term(denoise, x0, noise, now, to, variance, discrete, floor)
        return None, (per_example(term), per_example(error))

    pairs = Levels(*(a[:-1] for a in levels)), Levels(*(a[1:] for a in levels))
    _, (terms, errors) = jax.lax.scan(body, None, (*pairs, jnp.arange(len(levels.sigma) - 1)))
    return BoundTerms(per_example(prior), terms, errors)


def bits(nats: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns nats as bits."""
    return nats / LOG_2


def null_bits(x0: Float[Array, " batch *values"]) -> Float[Array, " batch"]:
    """Returns the log-likelihood of each example under N(0, I) in bits (equation 6)."""
    return bits(gaussian_log_density(x0, 0.0, jnp.zeros(())).reshape(len(x0), -1).sum(axis=1))


class RateDistortion(NamedTuple):
    """Progressive lossy coding (arXiv:2006.11239, section 4.3), after each step from the noisiest on.

    Attributes:
        rate: (T,) bits a value sent so far.
        distortion: (T,) root mean squared error of the x_0 that the receiver then predicts, on a scale of [0, 255].
    """

    rate: Float[Array, " steps"]
    distortion: Float[Array, " steps"]


def rate_distortion(terms: BoundTerms, num_values: int) -> RateDistortion:
    """Returns the curve of the mean over examples; values are in [-1, 1].

    To predict x_0 at level t the receiver has x_t, for which L_T ... L_t were sent.

    Args:
        terms: of the bound.
        num_values: of an example.
    """
    sent = terms.prior + jnp.concatenate([jnp.zeros_like(terms.steps[:1]), jnp.cumsum(terms.steps[:-1], axis=0)])
    error = terms.squared_errors.mean(axis=1) / num_values
    return RateDistortion(bits(sent).mean(axis=1) / num_values, 127.5 * jnp.sqrt(error))
