"""Losses over packed rows. Every mean says what it is over; padding and known patches never count.

(1)  L_simple = |eps_theta - eps|^2, or the same of what else is predicted               arXiv:2006.11239, Eq. 14
(2)  L_hybrid = L_simple + share L_vlb, whose gradient reaches the variance alone        arXiv:2102.09672, Eq. 16
(3)  min-SNR: the weight of the squared error of x_0 is min(SNR, gamma), SNR = alpha^2 / sigma^2
                                                                                         arXiv:2303.09556, Eq. 9
(4)  flow: the squared error of the velocity                                             arXiv:2210.02747, Eq. 9

An error of x_0 is one of another prediction at the same x_t, times a factor (`error_factor`):

(5)  |d noise|^2 = SNR |d x_0|^2,   |d v|^2 = ((alpha^2 + sigma^2) / sigma)^2 |d x_0|^2,
     |d score|^2 = SNR / sigma^2 |d x_0|^2,   |d velocity|^2 = ((alpha + sigma) / sigma)^2 |d x_0|^2
"""

from __future__ import annotations

from typing import get_args

import jax
import jax.numpy as jnp

from sora_jax.array_types import Array, Bool, Float, Int
from sora_jax.config import FlowConfig
from sora_jax.diffusion import flow
from sora_jax.diffusion.gaussian import Levels, Prediction, from_x0_and_noise
from sora_jax.diffusion.likelihood import step_term
from sora_jax.diffusion.samplers import Denoise, Denoised
from sora_jax.patches.segments import segment_mean


def packed_mean(
    values: Float[Array, "batch length"],
    loss_mask: Bool[Array, "batch length"],
    segment_ids: Int[Array, "batch length"],
    num_segments: int,
    weighting: str,
) -> Float[Array, ""]:
    """Returns the mean over tokens (`token`) or over the means of clips (`clip`); 0 where nothing counts."""
    if weighting == "token":
        return jnp.where(loss_mask, values, 0).sum() / jnp.maximum(loss_mask.sum(), 1)
    means, present = segment_mean(values, loss_mask, segment_ids, num_segments)
    return means.sum() / jnp.maximum(present.sum(), 1)


def flow_loss(
    output: Float[Array, "batch length values"],
    xt: Float[Array, "batch length values"],
    t: Float[Array, "batch length"],
    x0: Float[Array, "batch length values"],
    noise: Float[Array, "batch length values"],
    loss_mask: Bool[Array, "batch length"],
    segment_ids: Int[Array, "batch length"],
    num_segments: int,
    config: FlowConfig,
) -> Float[Array, ""]:
    """Returns the conditional flow-matching loss (arXiv:2210.02747, Eq. 9), float32.

    It is the squared error of the velocity, averaged over the values of a patch and then as
    `config.loss_weighting` says.

    Args:
        output: what the network put out.
        xt: its input.
        t: each token's time, in [0, 1].
        x0: the clean patches.
        noise: the noise that made `xt` of them.
        loss_mask: the tokens that count; the others may be anything.
        segment_ids: the clip of each token, 0 for padding.
        num_segments: K.
        config: what the network predicts, and the weighting.
    """
    # What does not count may be anything, but times 0, NaN would come through.
    output, xt, x0, noise = (jnp.where(loss_mask[..., None], a, 0) for a in (output, xt, x0, noise))
    t = jnp.where(loss_mask, t, 1)
    predicted = flow.to_velocity(output.astype(jnp.float32), xt, t, config)
    error = jnp.square(predicted - flow.velocity(x0, noise)).mean(axis=-1)
    return packed_mean(error, loss_mask, segment_ids, num_segments, config.loss_weighting)


def error_factor(alpha: Float[Array, "..."], sigma: Float[Array, "..."], prediction: str) -> Array:
    """Returns by how much the squared error of a prediction is larger than that of x_0 (equation 5).

    Raises:
        ValueError: an unknown prediction.
    """
    snr = alpha**2 / sigma**2
    factors = {
        "x0": jnp.ones_like(snr),
        "noise": snr,
        "v": ((alpha**2 + sigma**2) / sigma) ** 2,
        "score": snr / sigma**2,
        "velocity": ((alpha + sigma) / sigma) ** 2,
    }
    if prediction not in factors:
        raise ValueError(f"prediction must be one of {', '.join(get_args(Prediction))}, got {prediction!r}.")
    return factors[prediction]


WEIGHTINGS = ("simple", "x0", "noise", "velocity", "min_snr")


def loss_weight(
    alpha: Float[Array, "..."], sigma: Float[Array, "..."], prediction: str, weighting: str, gamma: float = 5.0
) -> Array:
    """Returns the weight of a prediction's squared error.

    Args:
        alpha: of the level.
        sigma: of the level; above 0.
        prediction: what the network predicts.
        weighting: `simple` (1, whatever is predicted), the error of `x0`, `noise` or `velocity` through whatever is
            predicted, or `min_snr` (equation 3).
        gamma: of `min_snr`.

    Raises:
        ValueError: an unknown prediction or weighting.
    """
    if weighting not in WEIGHTINGS:
        raise ValueError(f"weighting must be one of {', '.join(WEIGHTINGS)}, got {weighting!r}.")
    factor = error_factor(alpha, sigma, prediction)
    if weighting == "simple":
        return jnp.ones_like(factor)
    wanted = jnp.minimum(alpha**2 / sigma**2, gamma) if weighting == "min_snr" else error_factor(
        alpha, sigma, weighting
    )  # fmt: skip
    return wanted / factor


def prediction_error(
    output: Float[Array, "*tokens values"],
    x0: Float[Array, "*tokens values"],
    noise: Float[Array, "*tokens values"],
    alpha: Float[Array, "*tokens"],
    sigma: Float[Array, "*tokens"],
    prediction: str,
    weighting: str = "simple",
    gamma: float = 5.0,
) -> Float[Array, "*tokens"]:
    """Returns the weighted squared error of each token, averaged over its values: equation 1 or 3.

    `packed_mean` makes a loss of it.

    Args:
        output: what the network put out.
        x0: the clean data.
        noise: that made its input.
        alpha: of each token's level.
        sigma: of each token's level; above 0.
        prediction: what the network predicts.
        weighting: see `loss_weight`.
        gamma: of `min_snr`.
    """
    target = from_x0_and_noise(x0, noise, alpha, sigma, prediction)
    error = jnp.square(output.astype(jnp.float32) - target).mean(axis=-1)
    return loss_weight(alpha, sigma, prediction, weighting, gamma) * error


def hybrid_error(
    denoise: Denoise,
    x0: Float[Array, " batch *values"],
    noise: Float[Array, " batch *values"],
    now: Levels,
    to: Levels,
    share: float = 0.001,
    discrete: bool = True,
    floor: Float[Array, ""] | None = None,
    prediction: Prediction = "noise",
) -> Float[Array, " batch *values"]:
    """Returns equation 2 for each value, of a network that learns its variance, in nats.

    The squared error of what is predicted trains the mean; the bound's term, in which the mean is held constant, trains
    the variance. improved DDPM multiplies `share` by T where, as here, the term is that of one drawn step, and its code
    takes the term in bits: a `share` that is 1 / log 2 times as large.

    Args:
        denoise: of the network, with a learned range.
        x0: the data.
        noise: that makes x_t of it.
        now: level t.
        to: level t - 1.
        share: of the bound.
        discrete: x0 is 8-bit values in [-1, 1].
        floor: see `sora_jax.diffusion.likelihood.step_term`.
        prediction: whose squared error it is; the paper's is the noise.
    """
    denoised: list[Denoised] = []

    def held(x: Array, level: Levels) -> Denoised:
        denoised.append(denoise(x, level))
        return denoised[0]._replace(x0=jax.lax.stop_gradient(denoised[0].x0))

    term, _ = step_term(held, x0, noise, now, to, "learned", discrete, floor)
    predicted, target = (
        from_x0_and_noise(clean, eps, now.alpha, now.sigma, prediction)
        for clean, eps in ((denoised[0].x0, denoised[0].noise), (x0, noise))
    )
    return jnp.square(predicted - target) + share * term
