"""Rotary embeddings of grid coordinates.

A rotary embedding (arXiv:2104.09864) turns each pair of a head's channels by an angle proportional to a
coordinate, so that the product of a query and a key depends on the difference of their coordinates alone:

    (1)  <R(p) q, R(p') k> = <q, R(p' - p) k>

In three dimensions (arXiv:2503.20314, section 4.2.1) a head's Dh / 2 pairs are shared out among t, y and x.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from sora_jax.array_types import Array, Float


def rope_pairs(head_dim: int) -> tuple[int, int, int]:
    """Returns how many of a head's channel pairs turn with t, y and x.

    y and x get a third of the pairs each, rounded down, and t the rest: 22, 21 and 21 of the 64 pairs of a head
    of 128 channels, as in the Wan 2.1 models.
    """
    third = head_dim // 2 // 3
    return head_dim // 2 - 2 * third, third, third


def rope_angles(
    positions: Float[Array, "*batch length 3"], head_dim: int, theta: float
) -> Float[Array, "*batch length pairs"]:
    """Returns the angle that each channel pair of each token is turned by.

    An axis with n pairs has the frequencies theta^(-i / n), i = 0 ... n - 1.

    Args:
        positions: (..., L, 3), (t, y, x).
        head_dim: Dh, even and at least 6.
        theta: base of the frequencies.

    Returns:
        (..., L, Dh / 2) float32, in radians: pairs of t, then y, then x.
    """
    angles = [
        positions[..., axis, None].astype(jnp.float32)
        * theta ** (-np.arange(n, dtype=np.float64) / n).astype(np.float32)
        for axis, n in enumerate(rope_pairs(head_dim))
    ]
    return jnp.concatenate(angles, axis=-1)


def apply_rope(
    x: Float[Array, "*batch length heads head_dim"], angles: Float[Array, "*batch length pairs"]
) -> Float[Array, "*batch length heads head_dim"]:
    """Turns the channel pairs (2i, 2i + 1) of every head by `angles`, in float32.

    Args:
        x: (..., L, H, Dh), queries or keys.
        angles: (..., L, Dh / 2), in radians.

    Returns:
        (..., L, H, Dh), of the dtype of `x`.
    """
    cos, sin = jnp.cos(angles)[..., None, :], jnp.sin(angles)[..., None, :]  # (..., L, 1, Dh / 2)
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)
