"""Attention block by block that leaves out the keys of other segments, forward and backward.

The online softmax of FlashAttention (arXiv:2205.14135, Algorithm 1; backward: Algorithm 4), in plain XLA. The
segments of a packed row lie side by side, so the keys that a block of queries needs are a short run of blocks: its
first and last are computed from the segment ids, and the loop over key blocks runs from one to the other.

With P the weights, D_i = do_i . o_i and g the gradient of the log of the sum (equation 3 of
`sora_jax.models.attention`), the gradient of the scores is

    (1)  ds_ij = P_ij (do_i . v_j - D_i + g_i)
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sora_jax.array_types import Array, Float, Int
from sora_jax.models.attention import NO_KEYS, check_causal

BLOCK = 64  # tokens; a clip of a packed row is about as long, and larger blocks compute more of its neighbours


class _Options(NamedTuple):
    """What is known when tracing; see `blockwise_attention`."""

    causal: bool
    scale: float
    side_by_side: int


def blockwise_attention(
    q: Float[Array, "batch queries heads head_dim"],
    k: Float[Array, "batch keys heads head_dim"],
    v: Float[Array, "batch keys heads head_dim"],
    query_ids: Int[Array, "batch queries"],
    key_ids: Int[Array, "batch keys"],
    *,
    causal: bool = False,
    bias: Float[Array, "#batch heads queries keys"] | None = None,
    scale: float | None = None,
    with_logsumexp: bool = False,
    side_by_side: int = 1,
) -> (
    Float[Array, "batch queries heads head_dim"]
    | tuple[Float[Array, "batch queries heads head_dim"], Float[Array, "batch queries heads"]]
):
    """Computes the same as `sora_jax.models.attention.xla_attention`, with O(L) memory where there is no bias.

    Segments may stand in any order; it is fast where they lie side by side.

    Args:
        q: see `sora_jax.models.attention.AttentionFn`, as all that follows but the last.
        k: as above.
        v: as above.
        query_ids: as above.
        key_ids: as above.
        causal: as above.
        bias: as above. Its gradient is made for each row of the batch, then summed.
        scale: as above.
        with_logsumexp: as above.
        side_by_side: blocks that are computed at a time. One suits a CPU's cache; devices that do thousands of things
            at once want many, and then make as many turns as the block with the most keys.
    """
    check_causal(causal, q.shape[1], k.shape[1])
    options = _Options(causal, q.shape[-1] ** -0.5 if scale is None else scale, side_by_side)
    out, log_total = _attention(options, q, k, v, query_ids, key_ids, bias)
    return (out, log_total) if with_logsumexp else out


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(
    options: _Options, q: Array, k: Array, v: Array, query_ids: Array, key_ids: Array, bias: Array | None
) -> tuple[Array, Array]:
    """Returns (B, L, H, Dh) and the log of the sums, (B, L, H)."""
    return _forward(options, q, k, v, query_ids, key_ids, bias)[0]


def _forward(
    options: _Options, q: Array, k: Array, v: Array, query_ids: Array, key_ids: Array, bias: Array | None
) -> tuple[tuple[Array, Array], tuple]:
    """Returns the output and what the backward pass needs."""
    length = q.shape[1]
    qb, kb, vb = (_to_blocks(x) for x in (q, k, v))  # (B, blocks, H, BLOCK, Dh)
    qs, ks = _id_blocks(query_ids), _id_blocks(key_ids)  # (B, blocks, BLOCK)
    biases = _bias_blocks(bias)

    def query_block(row: Array, i: Array) -> tuple[Array, Array]:
        q_i, s_i = qb[row, i], qs[row, i]

        def body(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            out, highest, total = carry
            scores, mask = _scores(options, q_i, kb[row, j], s_i, ks[row, j], i, j, biases(row, i, j))
            new = jnp.maximum(highest, scores.max(axis=-1))
            weights = jnp.where(mask, jnp.exp(scores - new[..., None]), 0)
            shrink = jnp.exp(highest - new)
            out = out * shrink[..., None] + _matmul(weights, vb[row, j])
            return out, new, total * shrink + weights.sum(axis=-1)

        heads_rows = q_i.shape[:2]
        start = (jnp.zeros(q_i.shape, jnp.float32), jnp.full(heads_rows, NO_KEYS), jnp.zeros(heads_rows))
        out, highest, total = lax.fori_loop(*_needed_keys(options, s_i, ks[row], i), body, start)
        # A query without keys has total 0: its output is zero.
        safe = jnp.where(total > 0, total, 1)
        return (out / safe[..., None]).astype(q.dtype), jnp.where(total > 0, highest + jnp.log(safe), NO_KEYS)

    out, log_total = _over_blocks(options, query_block, *qs.shape[:2])
    whole = _from_blocks(out, length), _from_blocks(log_total[..., None], length)[..., 0]
    return whole, (q, k, v, query_ids, key_ids, bias, out, log_total)


def _backward(
    options: _Options, residuals: tuple, gradients: tuple[Array, Array]
) -> tuple[Array, Array, Array, None, None, Array | None]:
    """Returns the gradients of q, k, v and the bias."""
    q, k, v, query_ids, key_ids, bias, out, log_total = residuals
    qb, kb, vb, gb = (_to_blocks(x) for x in (q, k, v, gradients[0]))
    qs, ks = _id_blocks(query_ids), _id_blocks(key_ids)
    biases = _bias_blocks(bias)
    delta = jnp.einsum("brhqd,brhqd->brhq", gb.astype(jnp.float32), out.astype(jnp.float32))
    delta -= _to_blocks(gradients[1][..., None])[..., 0]

    def weights_and_score_gradient(row: Array, i: Array, j: Array) -> tuple[Array, Array]:
        scores, mask = _scores(options, qb[row, i], kb[row, j], qs[row, i], ks[row, j], i, j, biases(row, i, j))
        weights = jnp.where(mask, jnp.exp(scores - log_total[row, i][..., None]), 0)
        through_weights = _matmul(gb[row, i], vb[row, j].swapaxes(-1, -2))
        return weights, weights * (through_weights - delta[row, i][..., None])

    def query_block(row: Array, i: Array) -> tuple[Array, Array | None]:
        def body(j: Array, carry: tuple[Array, Array | None]) -> tuple[Array, Array | None]:
            dq, dbias = carry
            ds = weights_and_score_gradient(row, i, j)[1]
            dbias = None if dbias is None else dbias.at[j].set(ds)
            return dq + _matmul(ds * options.scale, kb[row, j]), dbias

        zeros = jnp.zeros(qb.shape[2:], jnp.float32)
        no_bias = None if bias is None else jnp.zeros((ks.shape[1], qb.shape[2], BLOCK, BLOCK), jnp.float32)
        return lax.fori_loop(*_needed_keys(options, qs[row, i], ks[row], i), body, (zeros, no_bias))

    def key_block(row: Array, j: Array) -> tuple[Array, Array]:
        def body(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
            weights, ds = weights_and_score_gradient(row, i, j)
            dk = carry[0] + _matmul((ds * options.scale).swapaxes(-1, -2), qb[row, i])
            return dk, carry[1] + _matmul(weights.swapaxes(-1, -2), gb[row, i])

        zeros = jnp.zeros(kb.shape[2:], jnp.float32)
        first, end = _needed(ks[row, j], qs[row])
        first = jnp.maximum(first, j) if options.causal else first
        return lax.fori_loop(first, end, body, (zeros, zeros))

    dq, dbias = _over_blocks(options, query_block, *qs.shape[:2])
    dk, dv = _over_blocks(options, key_block, *ks.shape[:2])
    return (
        _from_blocks(dq, q.shape[1]).astype(q.dtype),
        _from_blocks(dk, k.shape[1]).astype(k.dtype),
        _from_blocks(dv, v.shape[1]).astype(v.dtype),
        None,
        None,
        None if bias is None else _bias_gradient(dbias, bias),
    )


_attention.defvjp(_forward, _backward)


def _scores(
    options: _Options,
    q: Array,
    k: Array,
    query_ids: Array,
    key_ids: Array,
    i: Array,
    j: Array,
    bias: Array | None,
) -> tuple[Array, Array]:
    """Returns the masked scores (H, queries, keys) of blocks i and j, float32, and the mask (queries, keys)."""
    mask = (query_ids[:, None] == key_ids[None, :]) & (query_ids[:, None] > 0)
    if options.causal:
        place = jnp.arange(BLOCK)
        mask &= i * BLOCK + place[:, None] >= j * BLOCK + place
    scores = _matmul(q, k.swapaxes(-1, -2)) * options.scale
    return jnp.where(mask, scores if bias is None else scores + bias, NO_KEYS), mask


def _matmul(a: Array, b: Array) -> Array:
    """Multiplies matrices in the dtype of `b` and adds up in float32."""
    return jnp.matmul(a.astype(b.dtype), b, preferred_element_type=jnp.float32)


def _needed(ids: Int[Array, " block"], other_ids: Int[Array, "blocks block"]) -> tuple[Array, Array]:
    """Returns the first and one past the last block of `other_ids` that can share a segment with the block `ids`."""
    lowest = jnp.where(ids > 0, ids, jnp.iinfo(jnp.int32).max).min()
    shared = ((other_ids >= lowest) & (other_ids <= ids.max())).any(axis=-1)
    index = jnp.arange(other_ids.shape[0])
    return jnp.where(shared, index, other_ids.shape[0]).min(), jnp.where(shared, index + 1, 0).max()


def _needed_keys(
    options: _Options, ids: Int[Array, " block"], key_ids: Int[Array, "blocks block"], i: Array
) -> tuple[Array, Array]:
    """Returns the first and one past the last block of keys that the block i of queries can need."""
    first, end = _needed(ids, key_ids)
    return first, jnp.minimum(end, i + 1) if options.causal else end


def _over_blocks(options: _Options, function: Callable[[Array, Array], Array], rows: int, blocks: int) -> Array:
    """Returns `function(row, block)` for all of them, stacked to (rows, blocks, ...)."""
    batch_size = options.side_by_side if options.side_by_side > 1 else None
    flat = lax.map(lambda n: function(n // blocks, n % blocks), jnp.arange(rows * blocks), batch_size=batch_size)
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


def _bias_blocks(
    bias: Float[Array, "#batch heads queries keys"] | None,
) -> Callable[[Array, Array, Array], Array | None]:
    """Returns a function of (row, i, j) that gives the bias of blocks i and j, (H, BLOCK, BLOCK) float32."""
    if bias is None:
        return lambda row, i, j: None
    padding = ((0, 0), (0, 0), *((0, -side % BLOCK) for side in bias.shape[2:]))
    blocks = jnp.pad(bias, padding).reshape(*bias.shape[:2], -1, BLOCK, bias.shape[3] + padding[3][1])
    blocks = blocks.reshape(*blocks.shape[:4], -1, BLOCK).transpose(0, 2, 4, 1, 3, 5)  # (B or 1, i, j, H, BLOCK, BLOCK)
    return lambda row, i, j: blocks[row if len(blocks) > 1 else 0, i, j].astype(jnp.float32)


def _bias_gradient(
    dbias: Float[Array, "batch i j heads block block"], bias: Float[Array, "#batch heads queries keys"]
) -> Float[Array, "#batch heads queries keys"]:
    """Undoes `_bias_blocks`, summed over the rows that share a bias."""
    dbias = dbias if len(bias) > 1 else dbias.sum(axis=0, keepdims=True)
    dbias = dbias.transpose(0, 3, 1, 4, 2, 5)  # (B or 1, H, i, BLOCK, j, BLOCK)
    whole = dbias.reshape(*dbias.shape[:2], dbias.shape[2] * BLOCK, dbias.shape[4] * BLOCK)
    return whole[..., : bias.shape[2], : bias.shape[3]].astype(bias.dtype)
