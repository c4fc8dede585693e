"""Rectified flow (arXiv:2209.03003, arXiv:2403.03206). t = 0 is data, t = 1 is noise.

(1)  x_t = (1 - t) x_0 + t eps                         the path
(2)  v   = d x_t / d t = eps - x_0                     its velocity
(3)  v   = (x_t - x_0) / t                             from (1) and (2)
"""

from __future__ import annotations

import jax.numpy as jnp

from sora_jax.array_types import Array, Float
from sora_jax.config import FlowConfig


def interpolate(
    x0: Float[Array, "*batch values"], noise: Float[Array, "*batch values"], t: Float[Array, "*batch"]
) -> Float[Array, "*batch values"]:
    """Returns x_t by equation 1; `t` has a value for each token."""
    t = t[..., None]
    return (1 - t) * x0 + t * noise


def velocity(x0: Float[Array, "*batch values"], noise: Float[Array, "*batch values"]) -> Float[Array, "*batch values"]:
    """Returns v by equation 2."""
    return noise - x0


def to_velocity(
    output: Float[Array, "*batch values"],
    xt: Float[Array, "*batch values"],
    t: Float[Array, "*batch"],
    config: FlowConfig,
) -> Float[Array, "*batch values"]:
    """Returns the velocity that a network's output stands for.

    With `x0` prediction (arXiv:2511.13720) it is equation 3 with t held at or above `config.min_time`, so that the loss
    of an almost clean patch stays bounded. (Samplers use x_0 itself and need no such bound.)

    Args:
        output: what the network put out.
        xt: its input.
        t: each token's time, in [0, 1].
        config: says what the network predicts.
    """
    if config.prediction == "velocity":
        return output
    return (xt - output) / jnp.maximum(t, config.min_time)[..., None]
