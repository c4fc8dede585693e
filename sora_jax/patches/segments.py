"""Segments of packed rows: who may attend to whom, and means over segments. Segment id 0 is padding."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sora_jax.array_types import Array, Bool, Float, Int


def segment_mask(
    query_ids: Int[Array, "batch queries"], key_ids: Int[Array, "batch keys"]
) -> Bool[Array, "batch queries keys"]:
    """Returns which query may attend to which key: those of the same segment, and padding to nothing."""
    return (query_ids[:, :, None] == key_ids[:, None, :]) & (query_ids[:, :, None] > 0)


def segment_one_hot(
    segment_ids: Int[Array, "batch length"], num_segments: int
) -> Float[Array, "batch length segments"]:
    """Returns (B, L, K) float32 with a one where token l belongs to segment k + 1, zeros for padding."""
    return jax.nn.one_hot(segment_ids - 1, num_segments, dtype=jnp.float32)


def segment_mean(
    values: Float[Array, "batch length"],
    mask: Bool[Array, "batch length"],
    segment_ids: Int[Array, "batch length"],
    num_segments: int,
) -> tuple[Float[Array, "batch segments"], Bool[Array, "batch segments"]]:
    """Returns the mean of each segment's masked values.

    Args:
        values: (B, L).
        mask: (B, L), which tokens count.
        segment_ids: (B, L).
        num_segments: K.

    Returns:
        The means (B, K), zero where nothing counts, and (B, K) where anything does.
    """
    members = segment_one_hot(segment_ids, num_segments) * mask[..., None]
    count = members.sum(axis=1)
    total = jnp.einsum("bl,blk->bk", jnp.where(mask, values, 0), members)
    return total / jnp.maximum(count, 1), count > 0


def without_padding(
    values: Float[Array, "batch length values"], segment_ids: Int[Array, "batch length"]
) -> Float[Array, "batch length values"]:
    """Returns values that are 0 where padded, whatever stood there: times 0, NaN and infinity would come through."""
    return jnp.where(segment_ids[..., None] > 0, values, 0)


def segment_extent(
    positions: Float[Array, "batch length axes"], segment_ids: Int[Array, "batch length"]
) -> Float[Array, "batch length axes"]:
    """Returns, for each token, one more than the largest position of its segment: the size of a grid counted from 0.

    Args:
        positions: (B, L, A), 0 or above.
        segment_ids: (B, L), at most L.

    Returns:
        (B, L, A) float32; 1 for padding, NaN for an id above L.
    """

    def of_row(positions: Array, ids: Array) -> Array:
        largest = jnp.zeros((len(ids) + 1, positions.shape[-1]), jnp.float32).at[ids].max(positions, mode="drop")
        return largest.at[0].set(0).at[ids].get(mode="fill", fill_value=jnp.nan) + 1

    return jax.vmap(of_row)(positions, segment_ids)
