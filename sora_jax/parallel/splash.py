"""Splash attention for TPUs: JAX's Pallas kernel over packed rows, each chip working on its own rows.

The kernel is a flash attention (arXiv:2205.14135) whose mask comes from segment ids, so no (L, L) array is ever in
memory. What it does not do is done here: it wants lengths that are multiples of its blocks, does not scale its
scores, and gives a query that no key matches the mean of all values instead of zeros.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel, splash_attention_mask
from jax.sharding import Mesh

from sora_jax.array_types import Array, Float, Int
from sora_jax.models.attention import AttentionFn
from sora_jax.parallel.rules import partition_spec

LANES = 128  # the kernel's blocks are multiples of it
LARGEST_BLOCK = 512  # 512 x 512 float32 scores are 1 MiB of a core's fast memory


def splash_attention(mesh: Mesh, *, interpret: bool = False) -> AttentionFn:
    """Returns the same attention as `sora_jax.models.attention.xla_attention`, for rows split over a TPU mesh.

    Args:
        mesh: the batch is split over its axes `data` and `fsdp`.
        interpret: run the kernel in Pallas' interpreter instead, on any platform; slow, for tests.

    Returns:
        A function of (q, k, v, query_ids, key_ids) whose number of rows is a multiple of the mesh's devices. The
        softmax is float32; the output has the dtype of `q`.

    Raises:
        ValueError: a mesh of other devices than TPUs, without `interpret`.
    """
    platform = mesh.devices.flat[0].platform
    if platform != "tpu" and not interpret:
        raise ValueError(f"attention splash needs a mesh of TPUs, got {platform}; attention auto works everywhere.")
    rows = partition_spec(("batch",))
    # The kernel does not say how its outputs vary over the mesh (`check_vma`); they are split like its inputs.
    return jax.shard_map(
        functools.partial(_attention_of_rows, interpret=interpret),
        mesh=mesh,
        in_specs=(rows,) * 5,
        out_specs=rows,
        check_vma=False,
    )


def _attention_of_rows(
    q: Float[Array, "batch queries heads head_dim"],
    k: Float[Array, "batch keys heads head_dim"],
    v: Float[Array, "batch keys heads head_dim"],
    query_ids: Int[Array, "batch queries"],
    key_ids: Int[Array, "batch keys"],
    *,
    interpret: bool,
) -> Float[Array, "batch queries heads head_dim"]:
    """Returns the attention of the rows of one device, (B, L, H, Dh)."""
    _, num_queries, num_heads, head_dim = q.shape
    q = (q.astype(jnp.float32) * head_dim**-0.5).astype(q.dtype)
    # Queries without keys are averages over all values here, and go to zero below. Their gradient is zero times
    # these averages, so no padding may make them infinite.
    v = jnp.where(key_ids[..., None, None] > 0, v, 0)
    has_key = ((query_ids[:, :, None] == key_ids[:, None, :]) & (key_ids > 0)[:, None, :]).any(axis=-1)  # (B, L)

    q, k, v = (_pad_length(x).swapaxes(1, 2) for x in (q, k, v))  # (B, H, L', Dh)
    ids = splash_attention_kernel.SegmentIds(_pad_length(query_ids), _pad_length(key_ids))
    kernel = _kernel(num_heads, q.shape[2], k.shape[2], interpret)
    out = jax.vmap(kernel)(q, k, v, ids).swapaxes(1, 2)[:, :num_queries]
    return jnp.where(has_key[..., None, None], out, 0)


def _kernel(
    num_heads: int, num_queries: int, num_keys: int, interpret: bool
) -> splash_attention_kernel.SplashAttentionKernel:
    """Returns the kernel of one row with padded lengths; its mask is left to the segment ids."""
    block_q, block_kv = _block_size(num_queries), _block_size(num_keys)
    mask = splash_attention_mask.MultiHeadMask(
        [splash_attention_mask.FullMask((num_queries, num_keys)) for _ in range(num_heads)]
    )
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
        interpret=interpret,
    )


def _pad_length(x: Array) -> Array:
    """Pads the second axis with zeros to a multiple of LANES."""
    return jnp.pad(x, ((0, 0), (0, -x.shape[1] % LANES), *((0, 0),) * (x.ndim - 2)))


def _block_size(length: int) -> int:
    """Returns the largest multiple of LANES up to LARGEST_BLOCK that divides a padded length."""
    return max(size for size in range(LANES, LARGEST_BLOCK + 1, LANES) if length % size == 0)
