"""Losses over packed rows. Every mean says what it is over; padding and known patches never count."""

from __future__ import annotations

import jax.numpy as jnp

from sora_jax.array_types import Array, Bool, Float, Int
from sora_jax.config import FlowConfig
from sora_jax.diffusion import flow
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
        loss_mask: the tokens that count.
        segment_ids: the clip of each token, 0 for padding.
        num_segments: K.
        config: what the network predicts, and the weighting.
    """
    predicted = flow.to_velocity(output.astype(jnp.float32), xt, t, config)
    error = jnp.square(predicted - flow.velocity(x0, noise)).mean(axis=-1)
    return packed_mean(error, loss_mask, segment_ids, num_segments, config.loss_weighting)
