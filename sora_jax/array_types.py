"""Shape aliases and the one batch format that data, models, training and generation share.

Shapes are written with these letters everywhere:

    B  rows of a batch            L  tokens (patches) of a row
    P  values of a patch          K  most segments (clips) of a row
    M  caption tokens of a row    D  width of a caption token
    J  noise levels of a row
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

Array = Any  # a jax.Array or a numpy.ndarray: these modules serve both
PyTree = Any

__all__ = ["TEXT_DTYPE", "Array", "Bool", "Float", "Int", "NumpyArray", "PackedBatch", "PyTree", "Shaped"]

NumpyArray = np.ndarray
TEXT_DTYPE = np.dtype(np.float16)
"""Of the token states of captions in a batch and wherever they are stored: training and sampling see the same."""


class PackedBatch(NamedTuple):
    """Rows into which several clips are packed, with their captions.

    Segment ids count the clips of a row from 1; 0 marks padding, and every mask is made from them.
    A row has a table of J noise levels: `level_ids` holds each token's column of it, and a column belongs to a segment
    and has a role (`sora_jax.patches.levels`). The levels themselves are drawn in training and moved in sampling.

    Attributes:
        patches: (B, L, P) float32, values in [-1, 1] for pixels; anything where padded.
        positions: (B, L, 3) float32, (t, y, x): t in seconds times the reference rate, y and x in patches.
        segment_ids: (B, L) int32, 1 ... K, 0 for padding.
        level_ids: (B, L) int32, 0 ... J - 1, 0 where padded.
        level_segments: (B, J) int32, the segment that each column belongs to, 0 where it is unused.
        level_roles: (B, J) int32, `ASKED`, `KNOWN` or `FREE`; anything where it is unused.
        loss_mask: (B, L) bool, the tokens that a loss is averaged over.
        text: (B, M, D) float16, token states of the captions.
        text_segment_ids: (B, M) int32, the segment that each caption token belongs to, 0 for padding.
        clip_ids: (B, K) int32, index of each segment's clip in its data set, -1 where there is none.
        labels: (B, K) int32, class of each segment, -1 where it has none.
        extents: (B, K, 3) float32, one more than the largest positions of the whole clip, of which patches may have
            been dropped; 0 where there is no segment.
    """

    patches: Float[Array, "batch length patch"]
    positions: Float[Array, "batch length 3"]
    segment_ids: Int[Array, "batch length"]
    level_ids: Int[Array, "batch length"]
    level_segments: Int[Array, "batch levels"]
    level_roles: Int[Array, "batch levels"]
    loss_mask: Bool[Array, "batch length"]
    text: Float[Array, "batch text_length text_dim"]
    text_segment_ids: Int[Array, "batch text_length"]
    clip_ids: Int[Array, "batch segments"]
    labels: Int[Array, "batch segments"]
    extents: Float[Array, "batch segments 3"]
