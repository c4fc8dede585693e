"""Attention block by block that leaves out the keys of other segments, forward and backward.

The online softmax of FlashAttention (arXiv:2205.14135, Algorithm 1; backward: Algorithm 4), in plain XLA. The
segments of a packed row lie side by side, so the keys that a block of queries needs are a short run of blocks: its
first and last are computed from the segment ids, and the loop over key blocks runs from one to the other.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from sora_jax.array_types import Array, Float, Int

BLOCK = 64  # tokens; a clip of a packed row is about as long, and larger blocks compute more of its neighbours
_LOWEST = jnp.finfo(jnp.float32).min


@jax.custom_vjp
def blockwise_attention(
    q: Float[Array, "batch queries heads head_dim"],
    k: Float[Array, "batch keys heads head_dim"],
    v: Float[Array, "batch keys heads head_dim"],
    query_ids: Int[Array, "batch queries"],
    key_ids: Int[Array, "batch keys"],
) -> Float[Array, "batch queries heads head_dim"]:
    """Computes the same as `sora_jax.models.attention.xla_attention`, with O(L) memory.

    Args:
        q: (B, L, H, Dh).
        k: (B, M, H, Dh).
        v: (B, M, H, Dh).
        query_ids: (B, L), segment of each query, 0 for padding. In any order; fast where segments lie side by side.
        key_ids: (B, M), segment of each key, 0 for padding.

    Returns:
        (B, L, H, Dh), of the dtype of `q`.
    """
    return _forward(q, k, v, query_ids, key_ids)[0]


def _forward(q: Array, k: Array, v: Array, query_ids: Array, key_ids: Array) -> tuple[Array, tuple]:
    """Returns the output and what the backward pass needs."""
    length = q.shape[1]
    qb, kb, vb = (_to_blocks(x) for x in (q, k, v))  # (B, blocks, H, BLOCK, Dh)
    qs, ks = _id_blocks(query_ids), _id_blocks(key_ids)  # (B, blocks, BLOCK)
    scale = q.shape[-1] ** -0.5

    def query_block(row: Array, block: Array) -> tuple[Array, Array]:
        q_i, s_i = qb[row, block], qs[row, block]

        def body(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            out, highest, total = carry
            scores, mask = _scores(q_i, kb[row, j], s_i, ks[row, j], scale)
            new = jnp.maximum(highest, scores.max(axis=-1))
            weights = jnp.where(mask, jnp.exp(scores - new[..., None]), 0)
            shrink = jnp.exp(highest - new)
            out = out * shrink[..., None] + _matmul(weights, vb[row, j])
            return out, new, total * shrink + weights.sum(axis=-1)

        heads_rows = q_i.shape[:2]
        start = (jnp.zeros(q_i.shape, jnp.float32), jnp.full(heads_rows, _LOWEST), jnp.zeros(heads_rows))
        out, highest, total = lax.fori_loop(*_needed(s_i, ks[row]), body, start)
        # A query without keys has total 0: its output is zero, and exp(score - log_total) stays finite.
        safe = jnp.where(total > 0, total, 1)
        return (out / safe[..., None]).astype(q.dtype), jnp.where(total > 0, highest + jnp.log(safe), 0)

    out, log_total = _over_blocks(query_block, *qs.shape[:2])
    return _from_blocks(out, length), (q, k, v, query_ids, key_ids, out, log_total)


def _backward(residuals: tuple, gradient: Array) -> tuple[Array, Array, Array, None, None]:
    """Returns the gradients of q, k and v."""
    q, k, v, query_ids, key_ids, out, log_total = residuals
    qb, kb, vb, gb = (_to_blocks(x) for x in (q, k, v, gradient))
    qs, ks = _id_blocks(query_ids), _id_blocks(key_ids)
    scale = q.shape[-1] ** -0.5
    delta = jnp.einsum("brhqd,brhqd->brhq", gb.astype(jnp.float32), out.astype(jnp.float32))

    def weights_and_score_gradient(row: Array, i: Array, j: Array) -> tuple[Array, Array]:
        scores, mask = _scores(qb[row, i], kb[row, j], qs[row, i], ks[row, j], scale)
        weights = jnp.where(mask, jnp.exp(scores - log_total[row, i][..., None]), 0)
        through_weights = _matmul(gb[row, i], vb[row, j].swapaxes(-1, -2))
        return weights, weights * (through_weights - delta[row, i][..., None]) * scale

    def query_block(row: Array, i: Array) -> Array:
        def body(j: Array, dq: Array) -> Array:
            return dq + _matmul(weights_and_score_gradient(row, i, j)[1], kb[row, j])

        zeros = jnp.zeros(qb.shape[2:], jnp.float32)
        return lax.fori_loop(*_needed(qs[row, i], ks[row]), body, zeros)

    def key_block(row: Array, j: Array) -> tuple[Array, Array]:
        def body(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            weights, ds = weights_and_score_gradient(row, i, j)
            dk = carry[0] + _matmul(ds.swapaxes(-1, -2), qb[row, i])
            return dk, carry[1] + _matmul(weights.swapaxes(-1, -2), gb[row, i])

        zeros = jnp.zeros(kb.shape[2:], jnp.float32)
        return lax.fori_loop(*_needed(ks[row, j], qs[row]), body, (zeros, zeros))

    dq = _over_blocks(query_block, *qs.shape[:2])
    dk, dv = _over_blocks(key_block, *ks.shape[:2])
    return (
        _from_blocks(dq, q.shape[1]).astype(q.dtype),
        _from_blocks(dk, k.shape[1]).astype(k.dtype),
        _from_blocks(dv, v.shape[1]).astype(v.dtype),
        None,
        None,
    )


blockwise_attention.defvjp(_forward, _backward)


def _scores(q: Array, k: Array, query_ids: Array, key_ids: Array, scale: float) -> tuple[Array, Array]:
    """Returns the masked scores (H, queries, keys) of a block, float32, and the mask (queries, keys)."""
    mask = (query_ids[:, None] == key_ids[None, :]) & (query_ids[:, None] > 0)
    return jnp.where(mask, _matmul(q, k.swapaxes(-1, -2)) * scale, _LOWEST), mask


def _matmul(a: Array, b: Array) -> Array:
    """Multiplies matrices in the dtype of `b` and adds up in float32."""
    return jnp.matmul(a.astype(b.dtype), b, preferred_element_type=jnp.float32)


def _needed(ids: Int[Array, " block"], other_ids: Int[Array, "blocks block"]) -> tuple[Array, Array]:
    """Returns the first and one past the last block of `other_ids` that can share a segment with the block `ids`."""
    lowest = jnp.where(ids > 0, ids, jnp.iinfo(jnp.int32).max).min()
    shared = ((other_ids >= lowest) & (other_ids <= ids.max())).any(axis=-1)
    index = jnp.arange(other_ids.shape[0])
    return jnp.where(shared, index, other_ids.shape[0]).min(), jnp.where(shared, index + 1, 0).max()


def _over_blocks(function: Callable[[Array, Array], Array], rows: int, blocks: int) -> Array:
    """Returns `function(row, block)` for all of them, stacked to (rows, blocks, ...)."""
    flat = lax.map(lambda n: function(n // blocks, n % blocks), jnp.arange(rows * blocks))
    return jax.tree.map(functools.partial(_split_first, rows), flat)


def _split_first(rows: int, x: Array) -> Array:
    """Reshapes (rows * blocks, ...) to (rows, blocks, ...)."""
    return x.reshape(rows, -1, *x.shape[1:])


def _to_blocks(x: Float[Array, "batch length heads head_dim"]) -> Float[Array, "batch blocks heads block head_dim"]:
    """Pads the length to a multiple of BLOCK and cuts it."""
    x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % BLOCK), (0, 0), (0, 0)))
    return x.reshape(x.shape[0], -1, BLOCK, *x.shape[2:]).swapaxes(2, 3)


def _from_blocks(x: Float[Array, "batch blocks heads block head_dim"], length: int) -> Array:
    """Undoes `_to_blocks`."""
    x = x.swapaxes(2, 3)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :length]


def _id_blocks(ids: Int[Array, "batch length"]) -> Int[Array, "batch blocks block"]:
    """Pads segment ids with 0 and cuts them."""
    ids = jnp.pad(ids, ((0, 0), (0, -ids.shape[1] % BLOCK)))
    return ids.reshape(ids.shape[0], -1, BLOCK)
