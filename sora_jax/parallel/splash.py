"""Splash attention for TPUs: JAX's Pallas kernel over packed rows, each chip working on its own rows.

The kernel is a flash attention (arXiv:2205.14135) whose mask comes from segment ids, so no (L, L) array is ever in
memory. What it does not do is done here: it wants lengths that are multiples of its blocks, does not scale its
scores, and gives a query that no key matches the mean of all values instead of zeros.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
from jax.sharding import Mesh

from sora_jax.array_types import Array, Float, Int
from sora_jax.models.attention import NO_KEYS, AttentionFn, check_causal
from sora_jax.parallel.rules import partition_spec

LANES = 128  # the kernel's blocks are multiples of it
LARGEST_BLOCK = 512  # 512 x 512 float32 scores are 1 MiB of a core's fast memory

SegmentIds = splash_attention_kernel.SegmentIds


class _Row(NamedTuple):
    """What the kernel of a row with padded lengths is made from."""

    num_heads: int
    num_queries: int
    num_keys: int
    causal: bool
    interpret: bool


def splash_attention(mesh: Mesh | None, *, interpret: bool = False) -> AttentionFn:
    """Returns the same attention as `sora_jax.models.attention.xla_attention`, for rows split over a TPU mesh.

    Any head size and length will do. It takes no bias: the scores never leave the kernel.

    Args:
        mesh: the batch is split over its axes `data` and `fsdp`, which divide the number of rows; None for one device.
        interpret: run the kernel in Pallas' interpreter instead, on any platform; slow, for tests.

    Raises:
        ValueError: a mesh of other devices than TPUs, without `interpret`.
    """
    if mesh is not None and not interpret and (platform := mesh.devices.flat[0].platform) != "tpu":
        raise ValueError(f"attention splash needs a mesh of TPUs, got {platform}; attention auto works everywhere.")

    def attend(
        q: Array,
        k: Array,
        v: Array,
        query_ids: Array,
        key_ids: Array,
        *,
        causal: bool = False,
        bias: Array | None = None,
        scale: float | None = None,
        with_logsumexp: bool = False,
    ) -> Array | tuple[Array, Array]:
        check_causal(causal, q.shape[1], k.shape[1])
        if bias is not None:
            raise ValueError("attention splash takes no bias; attention xla and blockwise do.")
        of_rows = functools.partial(
            _attention_of_rows, causal=causal, scale=scale, with_logsumexp=with_logsumexp, interpret=interpret
        )
        if mesh is not None:
            rows = partition_spec(("batch",))
            # The kernel does not say how its outputs vary over the mesh (`check_vma`): they are split like its inputs.
            of_rows = jax.shard_map(of_rows, mesh=mesh, in_specs=(rows,) * 5, out_specs=rows, check_vma=False)
        return of_rows(q, k, v, query_ids, key_ids)

    return attend


def _attention_of_rows(
    q: Float[Array, "batch queries heads head_dim"],
    k: Float[Array, "batch keys heads head_dim"],
    v: Float[Array, "batch keys heads head_dim"],
    query_ids: Int[Array, "batch queries"],
    key_ids: Int[Array, "batch keys"],
    *,
    causal: bool,
    scale: float | None,
    with_logsumexp: bool,
    interpret: bool,
) -> Array | tuple[Array, Array]:
    """Returns the attention of the rows of one device; see `sora_jax.models.attention.AttentionFn`."""
    _, num_queries, num_heads, head_dim = q.shape
    q = (q.astype(jnp.float32) * (head_dim**-0.5 if scale is None else scale)).astype(q.dtype)
    # Queries without keys are averages over all values here, and go to zero below. Their gradient is zero times
    # these averages, so no padding may make them infinite.
    v = jnp.where(key_ids[..., None, None] > 0, v, 0)
    matches = (query_ids[:, :, None] == key_ids[:, None, :]) & (key_ids > 0)[:, None, :]
    if causal:
        matches &= jnp.tri(num_queries, dtype=bool)
    has_key = matches.any(axis=-1)[..., None]  # (B, L, 1); the matrix is never in memory

    q, k, v = (_pad_length(x).swapaxes(1, 2) for x in (q, k, v))  # (B, H, L', Dh)
    ids = SegmentIds(_pad_length(query_ids), _pad_length(key_ids))
    row = _Row(num_heads, q.shape[2], k.shape[2], causal, interpret)
    if not with_logsumexp:
        out = jax.vmap(_kernel(row))(q, k, v, ids).swapaxes(1, 2)[:, :num_queries]
        return jnp.where(has_key[..., None], out, 0)
    out, total = (x.swapaxes(1, 2)[:, :num_queries] for x in _with_logsumexp(row, q, k, v, ids))
    return jnp.where(has_key[..., None], out, 0), jnp.where(has_key, total, NO_KEYS)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _with_logsumexp(row: _Row, q: Array, k: Array, v: Array, ids: SegmentIds) -> tuple[Array, Array]:
    """Returns the kernel's output, (B, H, L', Dh), and the log of its sums, (B, H, L') float32.

    JAX's kernel returns the latter but has no gradient then.
    """
    return _with_logsumexp_forward(row, q, k, v, ids)[0]


def _with_logsumexp_forward(
    row: _Row, q: Array, k: Array, v: Array, ids: SegmentIds
) -> tuple[tuple[Array, Array], tuple]:
    """Returns the outputs and what the backward pass needs."""
    out, (total,) = jax.vmap(_kernel(row, save_residuals=True))(q, k, v, ids)
    return (out, total), (q, k, v, ids, out, total)


def _with_logsumexp_backward(
    row: _Row, residuals: tuple, gradients: tuple[Array, Array]
) -> tuple[Array, Array, Array, None]:
    """Returns the gradients of q, k and v from JAX's backward kernels.

    These take the D_i of equation 1 of `sora_jax.models.blockwise_attention`, from which the gradient of the log of the
    sum is taken off.
    """
    kernel = _kernel(row)
    sizes, options = kernel.kwargs["block_sizes"], kernel.kwargs
    shared = {name: options[name] for name in ("is_mqa", "mask_value", "attn_logits_soft_cap", "mask_function")}
    shared |= {name: getattr(sizes, name) for name in ("q_layout", "k_layout", "v_layout")} | {
        "interpret": row.interpret
    }

    def backward(
        q: Array, k: Array, v: Array, ids: SegmentIds, out: Array, total: Array, dout: Array, dtotal: Array
    ) -> tuple[Array, Array, Array]:
        delta = jnp.einsum("hld,hld->hl", out.astype(jnp.float32), dout.astype(jnp.float32)) - dtotal
        arrays = (q, k, v, ids, None, total, dout, delta)
        _, dk, dv = splash_attention_kernel._splash_attention_bwd_dkv(
            *arrays,
            bq=sizes.block_q_dkv,
            bkv=sizes.block_kv_dkv,
            bkv_compute=sizes.block_kv_dkv_compute,
            mask_info=kernel.dkv_mask_info,
            use_fused_bwd_kernel=False,
            **shared,
        )
        dq = splash_attention_kernel._splash_attention_bwd_dq(
            *arrays, bq=sizes.block_q_dq, bkv=sizes.block_kv_dq, mask_info=kernel.dq_mask_info, **shared
        )
        return dq, dk, dv

    return *jax.vmap(backward)(*residuals, *gradients), None


_with_logsumexp.defvjp(_with_logsumexp_forward, _with_logsumexp_backward)


def _kernel(row: _Row, save_residuals: bool = False) -> splash_attention_kernel.SplashAttentionKernel:
    """Returns the kernel of one row with padded lengths; but for order, its mask is left to the segment ids."""
    block_q, block_kv = _block_size(row.num_queries), _block_size(row.num_keys)
    kind = splash_attention_mask.CausalMask if row.causal else splash_attention_mask.FullMask
    mask = splash_attention_mask.MultiHeadMask([kind((row.num_queries, row.num_keys)) for _ in range(row.num_heads)])
    return splash_attention_kernel.make_splash_mha(
        mask,
        block_sizes=splash_attention_kernel.BlockSizes(
            block_q=block_q,
            block_kv=block_kv,
            block_q_dkv=block_q,
            block_kv_dkv=block_kv,
            block_q_dq=block_q,
            block_kv_dq=block_kv,
        ),
        head_shards=1,
        q_seq_shards=1,
        save_residuals=save_residuals,
        interpret=row.interpret,
    )


def _pad_length(x: Array) -> Array:
    """Pads the second axis with zeros to a multiple of LANES."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % LANES), *((0, 0),) * (x.ndim - 2)))


def _block_size(length: int) -> int:
    """Returns the largest multiple of LANES up to LARGEST_BLOCK that divides a padded length."""
    return max(size for size in range(LANES, LARGEST_BLOCK + 1, LANES) if length % size == 0)
