"""What recognition networks have in common: what they say of the segments of packed rows."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from sora_jax.array_types import Array, Bool, Float, Int
from sora_jax.patches.patchify import unpatchify


class SegmentOutput(NamedTuple):
    """What a network says of each segment; zeros where a row has fewer segments.

    Attributes:
        features: (B, K, D) float32, pooled; of a network without features of its own, the logits.
        logits: (B, K, num_classes) float32.
        present: (B, K) bool, whether the row has the segment k + 1.
    """

    features: Float[Array, "batch segments width"]
    logits: Float[Array, "batch segments classes"]
    present: Bool[Array, "batch segments"]


def whole_clips(
    patches: Float[Array, "batch length values"], size: tuple[int, int, int], patch: tuple[int, int, int], channels: int
) -> Float[Array, "batch frames height width channels"]:
    """Returns the clips of rows that hold one each, all of `size` (frames, height, width).

    Args:
        patches: (B, L, P), all of a clip's patches, in order.
        size: of the clips.
        patch: (t, h, w), how they are cut.
        channels: of a pixel.
    """
    return jax.vmap(lambda clip: unpatchify(clip, *size, patch, channels))(patches)


def one_segment(logits: Float[Array, "batch classes"], segment_ids: Int[Array, "batch length"]) -> SegmentOutput:
    """Returns the output of rows that hold one segment each, or none."""
    present = segment_ids[:, :1] > 0
    logits = jnp.where(present[..., None], logits[:, None], 0)
    return SegmentOutput(logits, logits, present)
