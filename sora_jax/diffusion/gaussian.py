"""Gaussian diffusion: what is known of x_t, of the step before it, and what a network may predict.

A noise level is a pair (alpha, sigma), and

(1)  q(x_t | x_0) = N(alpha_t x_0, sigma_t^2 I),          x_t = alpha_t x_0 + sigma_t eps
(2)  alpha = sqrt(alpha_bar), sigma = sqrt(1 - alpha_bar)  discrete diffusion (variance preserving)
(3)  alpha = 1 - t, sigma = t                              rectified flow; t = 0 is data, t = 1 is noise

For a step from level t to a less noisy s, with r = alpha_t / alpha_s and b = sigma_t^2 - r^2 sigma_s^2 (beta_t in
DDPM's notation, where s = t - 1):

(4)  q(x_s | x_t, x_0) = N(r sigma_s^2 / sigma_t^2 x_t + alpha_s b / sigma_t^2 x_0,  b sigma_s^2 / sigma_t^2 I)
                                                           arXiv:2006.11239, Eq. 6-7; arXiv:2107.00630, Eq. 25-27
(5)  log variance = v log b + (1 - v) log(b sigma_s^2 / sigma_t^2),  v in [0, 1]      arXiv:2102.09672, Eq. 15

What a network predicts, each from (1):

(6)  noise eps;   x0;   v = alpha eps - sigma x_0 (arXiv:2202.00512);   score = -eps / sigma;
     velocity = eps - x_0 (d x_t / d t of (3))

Levels broadcast over trailing axes: a level of shape (B, L) belongs to tokens (B, L, P).
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import jax.numpy as jnp
import numpy as np

from sora_jax.array_types import Array, Float, Shaped
from sora_jax.diffusion.schedules import alpha_bar

Prediction = Literal["noise", "x0", "v", "score", "velocity"]
SMALLEST_VARIANCE = 1e-20  # so that its logarithm is finite


class Levels(NamedTuple):
    """Noise levels, for a sampler from the noisiest to the cleanest.

    Attributes:
        time: what the network sees of a level, a step of discrete diffusion or a flow time; one for all or one a level.
        alpha: share of the data.
        sigma: standard deviation of the noise.
        unit: `Heun` integrates x / unit, unit > 0: 1 for x itself, alpha for EDM's ODE d x / d (sigma / alpha) = eps.
    """

    time: Array
    alpha: Float[Array, "*levels"]
    sigma: Float[Array, "*levels"]
    unit: Float[Array, "*levels"]


def discrete_levels(betas: Float[np.ndarray, " steps"], steps: Shaped[np.ndarray, " kept"] | None = None) -> Levels:
    """Returns the levels of equation 2 that a sampler visits, float32: len(betas) noisy ones, then data.

    Args:
        betas: of the process (of the respaced one, where steps are left out).
        steps: what the network is conditioned on at each, in the order of `betas` (default: 0 ... T - 1).

    Returns:
        Levels of shape (T + 1,), falling to alpha = 1 and sigma = 0, where no network is asked.
    """
    ab = np.append(alpha_bar(betas)[::-1], 1.0)
    steps = np.arange(len(ab) - 1) if steps is None else np.asarray(steps)
    if len(steps) != len(ab) - 1:
        raise ValueError(f"steps must be one for each of the {len(ab) - 1} betas, got {len(steps)}.")
    parts = (np.append(steps[::-1], 0), np.sqrt(ab), np.sqrt(1 - ab), np.ones_like(ab))
    return Levels(*(a.astype(np.float32) for a in parts))


def flow_levels(times: Float[Array, "*times"]) -> Levels:
    """Returns the levels of equation 3 at falling times (`sora_jax.diffusion.schedules.flow_times`)."""
    return Levels(times, 1 - times, times, times * 0 + 1)


def expand(level: Shaped[Array, "..."], x: Shaped[Array, "..."]) -> Array:
    """Gives a level trailing axes, so that it broadcasts against `x`, whose first axes it has.

    Raises:
        ValueError: it has other axes.
    """
    level = jnp.asarray(level)
    if level.ndim > x.ndim or any(n not in (1, m) for n, m in zip(level.shape, x.shape, strict=False)):
        raise ValueError(f"a level of shape {level.shape} does not belong to an array of shape {x.shape}.")
    return level.reshape(level.shape + (1,) * (x.ndim - level.ndim))


def corrupt(
    x0: Float[Array, "*shape"], noise: Float[Array, "*shape"], alpha: Float[Array, "..."], sigma: Float[Array, "..."]
) -> Float[Array, "*shape"]:
    """Returns x_t by equation 1."""
    return expand(alpha, x0) * x0 + expand(sigma, x0) * noise


def to_x0_and_noise(
    output: Float[Array, "..."],
    xt: Float[Array, "*shape"],
    alpha: Float[Array, "..."],
    sigma: Float[Array, "..."],
    prediction: Prediction,
) -> tuple[Array, Array]:
    """Returns the clean data and the noise that a prediction stands for (equations 1 and 6).

    Where an `x0` is predicted and there is no noise (sigma = 0), the noise is given as 0. Where `noise` or a `score` is
    predicted and there is nothing but noise (alpha = 0), the data cannot be recovered and is not finite.

    Args:
        output: what the network put out.
        xt: its input.
        alpha: of its level.
        sigma: of its level.
        prediction: what `output` is.

    Raises:
        ValueError: an unknown prediction, or an output of another shape than the input.
    """
    if output.shape != xt.shape:
        raise ValueError(f"a prediction must have the shape of its input {xt.shape}, got {output.shape}.")
    alpha, sigma = expand(alpha, xt), expand(sigma, xt)
    if prediction == "x0":
        return output, noise_of(xt, output, alpha, sigma)
    if prediction in ("noise", "score"):
        noise = output if prediction == "noise" else -sigma * output
        return (xt - sigma * noise) / alpha, noise
    if prediction == "v":
        total = alpha**2 + sigma**2
        return (alpha * xt - sigma * output) / total, (sigma * xt + alpha * output) / total
    if prediction == "velocity":
        return (xt - sigma * output) / (alpha + sigma), (xt + alpha * output) / (alpha + sigma)
    raise ValueError(f"prediction must be one of {', '.join(get_args(Prediction))}, got {prediction!r}.")


def root(variance: Array) -> Array:
    """Returns the square root of a variance, 0 where rounding made it negative; its derivative at 0 is 0."""
    positive = variance > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, variance, 1)), 0)


def noise_of(xt: Array, x0: Array, alpha: Array, sigma: Array) -> Array:
    """Returns (x_t - alpha x_0) / sigma, and 0 where sigma is 0; all broadcast."""
    return jnp.where(sigma > 0, (xt - alpha * x0) / jnp.where(sigma > 0, sigma, 1), 0)


def from_x0_and_noise(
    x0: Float[Array, "*shape"],
    noise: Float[Array, "*shape"],
    alpha: Float[Array, "..."],
    sigma: Float[Array, "..."],
    prediction: Prediction,
) -> Array:
    """Returns what a network that predicts `prediction` has to put out (equation 6): the target of its training."""
    alpha, sigma = expand(alpha, x0), expand(sigma, x0)
    if prediction == "x0":
        return x0
    if prediction == "noise":
        return noise
    if prediction == "score":
        return -noise / sigma
    if prediction == "v":
        return alpha * noise - sigma * x0
    if prediction == "velocity":
        return noise - x0
    raise ValueError(f"prediction must be one of {', '.join(get_args(Prediction))}, got {prediction!r}.")


def convert(
    output: Float[Array, "*shape"],
    xt: Float[Array, "*shape"],
    alpha: Float[Array, "..."],
    sigma: Float[Array, "..."],
    source: Prediction,
    target: Prediction,
) -> Array:
    """Returns the prediction `target` that says the same as `output`, a prediction `source`."""
    if source == target:
        return output
    x0, noise = to_x0_and_noise(output, xt, alpha, sigma, source)
    return from_x0_and_noise(x0, noise, alpha, sigma, target)


class Posterior(NamedTuple):
    """q(x_s | x_t, x_0) of equation 4, as coefficients of the level's shape.

    Attributes:
        xt: coefficient of x_t in the mean.
        x0: coefficient of x_0 in the mean.
        variance: of the posterior, the smallest that a reverse step can have (`small`).
        beta: b, the variance of the forward step and the largest that a reverse step can have (`large`).
    """

    xt: Array
    x0: Array
    variance: Array
    beta: Array


def posterior(now: Levels, to: Levels) -> Posterior:
    """Returns equation 4 for a step from the level `now` to the less noisy level `to`.

    Its derivatives are finite, too, where a level does not move and where alpha or sigma is 0.
    """
    ratio = now.alpha / jnp.where(to.alpha > 0, to.alpha, 1)
    beta = now.sigma**2 - ratio**2 * to.sigma**2
    variance = jnp.where(now.sigma > 0, now.sigma, 1) ** 2
    return Posterior(
        xt=ratio * to.sigma**2 / variance,
        x0=to.alpha * beta / variance,
        variance=beta * to.sigma**2 / variance,
        beta=beta,
    )


def learned_log_variance(
    v: Float[Array, "*shape"], now: Levels, to: Levels, floor: float | Array | None = None
) -> Float[Array, "*shape"]:
    """Returns the log variance of equation 5.

    Args:
        v: the network's interpolation, 0 for the posterior's variance and 1 for beta.
        now: level of x_t.
        to: level of x_s.
        floor: of the posterior's variance, which is 0 at the last step (default: 1e-20, so that the logarithm is
            finite); improved DDPM takes that of the step before.
    """
    p = posterior(now, to)
    small = jnp.maximum(p.variance, SMALLEST_VARIANCE if floor is None else floor)
    beta = jnp.maximum(p.beta, SMALLEST_VARIANCE)
    return v * expand(jnp.log(beta), v) + (1 - v) * expand(jnp.log(small), v)
