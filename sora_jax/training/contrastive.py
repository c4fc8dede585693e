"""Losses of images and clips in packed rows: contrastive, against captions, and classification. Absent segments of a
row count nothing.

The contrastive loss (CLIP, arXiv:2103.00020, Fig. 3) of N pairs of unit embeddings u_i, v_i and a scale s:

    (1)  s_ij = s <u_i, v_j>
    (2)  L = 1 / (2 N) sum_i [log sum_j exp(s_ij) - s_ii] + [log sum_j exp(s_ji) - s_ii]

Packed rows hold many images, so that the N x N matrix outgrows memory. The chunked form (arXiv:2307.06304, section
2.3) computes (2) for `chunk` rows of it at a time, forward and backward, with O(chunk N) memory. Over devices each
computes the rows and the columns of its own pairs, for which only embeddings are gathered.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jax import lax

from sora_jax.array_types import Array, Bool, Float, Int


def contrastive_loss(
    image: Float[Array, "*pairs width"],
    text: Float[Array, "*pairs width"],
    present: Bool[Array, "*pairs"],
    logit_scale: Float[Array, ""],
    *,
    chunk: int | None = None,
    axis_name: str | tuple[str, ...] | None = None,
) -> Float[Array, ""]:
    """Returns equation 2, the mean over the pairs that are present and over both directions; 0 without any pair.

    Args:
        image: (..., E) embeddings of images or clips, of length 1.
        text: (..., E) embeddings of their captions, of length 1.
        present: (...) bool, the pairs that exist; a pair that does not is no negative either, and may be anything.
        logit_scale: s, positive: the inverse of the temperature.
        chunk: rows of the matrix that are held at a time (None: all). It changes memory alone.
        axis_name: under `jax.shard_map`, the mesh axes that the pairs are split over. Their embeddings are gathered,
            and the loss is that of all pairs, the same on each device.

    Raises:
        ValueError: a chunk below 1.
    """
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk must be at least 1 or None, got {chunk}.")
    width = image.shape[-1]
    u, v = (x.reshape(-1, width).astype(jnp.float32) for x in (logit_scale * image, text))  # (N, E)
    mask = present.reshape(-1)
    u, v = (jnp.where(mask[:, None], x, 0) for x in (u, v))  # times 0, NaN would come through
    all_u, all_v, all_mask = (u, v, mask) if axis_name is None else lax.all_gather((u, v, mask), axis_name, tiled=True)
    loss = _log_sum_exp(u, all_v, all_mask, chunk) + _log_sum_exp(v, all_u, all_mask, chunk) - 2 * (u * v).sum(axis=-1)
    total, count = jnp.where(mask, loss, 0).sum() / 2, mask.sum()
    total, count = (total, count) if axis_name is None else lax.psum((total, count), axis_name)
    return total / jnp.maximum(count, 1)


def _log_sum_exp(a: Array, b: Array, present: Array, chunk: int | None) -> Array:
    """Returns log sum_j exp(<a_i, b_j>) over the j that are present, (N,), for rows a (N, E) and columns b (M, E)."""

    @jax.checkpoint  # the backward pass computes a chunk's logits again, or it would keep those of all
    def rows(a: Array) -> Array:
        logits = jnp.einsum("ne,me->nm", a, b, precision="highest")
        return jax.nn.logsumexp(jnp.where(present, logits, jnp.finfo(jnp.float32).min), axis=-1)

    count, chunk = len(a), len(a) if chunk is None else min(chunk, len(a))
    chunks = jnp.pad(a, ((0, -count % chunk), (0, 0))).reshape(-1, chunk, a.shape[-1])
    return lax.map(rows, chunks).reshape(-1)[:count]


def classification_loss(
    logits: Float[Array, "*segments classes"],
    labels: Int[Array, "*segments"],
    present: Bool[Array, "*segments"],
    *,
    kind: str = "softmax",
    label_smoothing: float = 0.0,
) -> Float[Array, ""]:
    """Returns the mean cross-entropy of the segments that are present, in nats; 0 without any.

    Args:
        logits: (..., C); anything where absent.
        labels: (...), the class of each segment; anything where absent. The loss of a class that is not one of the C
            is NaN (this runs compiled and cannot raise).
        present: (...) bool.
        kind: `softmax`, or `sigmoid`: the sum of C binary cross-entropies, as arXiv:2307.06304 trains on JFT.
        label_smoothing: share of the target that is spread over all classes (arXiv:1512.00567, section 7).

    Raises:
        ValueError: an unknown kind, or a share outside [0, 1).
    """
    if kind not in ("softmax", "sigmoid"):
        raise ValueError(f"kind must be softmax or sigmoid, got {kind!r}.")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must be in [0, 1), got {label_smoothing}.")
    logits = jnp.where(present[..., None], logits, 0)
    targets = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), label_smoothing)
    if kind == "softmax":
        loss = optax.softmax_cross_entropy(logits, targets)
    else:
        loss = optax.sigmoid_binary_cross_entropy(logits, targets).sum(axis=-1)
    loss = jnp.where((labels >= 0) & (labels < logits.shape[-1]), loss, jnp.nan)
    return jnp.where(present, loss, 0).sum() / jnp.maximum(present.sum(), 1)
