"""One attention over packed rows, with several kernels behind it.

    (1)  o_i = sum_j softmax_j(q_i . k_j / sqrt(Dh)) v_j,  j over the keys of i's segment

Masks come from segment ids only. A query of segment 0 (padding), or whose segment has no key, yields zeros.
`xla` is the reference. `blockwise` computes the same without the (L, L) matrix and skips the key blocks that hold
none of a query block's segments, which is what makes packed rows cheap where no fused kernel exists (CPU). Where a row
is one segment there is nothing to skip, and `whole_row` takes the dense matrix while it is small.
`splash` (TPU) needs a mesh, is built in `sora_jax.parallel` and handed to the model.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from sora_jax.array_types import Array, Float, Int
from sora_jax.models.blockwise_attention import blockwise_attention
from sora_jax.patches.segments import segment_mask

AttentionFn = Callable[[Array, Array, Array, Array, Array], Array]
DENSE_KEYS = 1024  # 16 heads of as many queries and keys are 64 MiB of weights a row


def xla_attention(
    q: Float[Array, "batch queries heads head_dim"],
    k: Float[Array, "batch keys heads head_dim"],
    v: Float[Array, "batch keys heads head_dim"],
    query_ids: Int[Array, "batch queries"],
    key_ids: Int[Array, "batch keys"],
) -> Float[Array, "batch queries heads head_dim"]:
    """Computes equation 1 with the whole matrix of weights; softmax in float32.

    Args:
        q: (B, L, H, Dh).
        k: (B, M, H, Dh).
        v: (B, M, H, Dh).
        query_ids: (B, L), segment of each query, 0 for padding.
        key_ids: (B, M), segment of each key, 0 for padding.

    Returns:
        (B, L, H, Dh), of the dtype of `q`.
    """
    mask = segment_mask(query_ids, key_ids)  # (B, L, M)
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))  # (B, H, L, Dh): products and their gradients lie as they are
    scores = jnp.einsum("bhld,bhmd->bhlm", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    weights = jax.nn.softmax(jnp.where(mask[:, None], scores, jnp.finfo(jnp.float32).min), axis=-1)
    out = jnp.einsum("bhlm,bhmd->bhld", weights.astype(v.dtype), v)
    # The weights are zero where masked, but for queries without any key: theirs are all equal.
    return jnp.where(mask.any(axis=-1)[..., None, None], jnp.swapaxes(out, 1, 2), 0)


def whole_row_attention(
    q: Float[Array, "batch queries heads head_dim"],
    k: Float[Array, "batch keys heads head_dim"],
    v: Float[Array, "batch keys heads head_dim"],
    query_ids: Int[Array, "batch queries"],
    key_ids: Int[Array, "batch keys"],
) -> Float[Array, "batch queries heads head_dim"]:
    """Computes the same by the kernel that is faster on a CPU where rows hold one segment: no block can be left out.

    That is `xla_attention` up to `DENSE_KEYS` keys, and beyond, for the sake of memory, `blockwise_attention`.
    """
    kernel = xla_attention if k.shape[1] <= DENSE_KEYS else blockwise_attention
    return kernel(q, k, v, query_ids, key_ids)


def attention_kernel(name: str, packed: bool = True) -> AttentionFn:
    """Returns the kernel called `name`; `auto` picks by platform.

    Args:
        name: of the kernel. `auto` is `xla` but for CPUs, where it is `blockwise` or, for rows that are not packed,
            `whole_row`.
        packed: whether rows hold several segments; of use to `auto` only.

    Raises:
        ValueError: `splash`, which must be built for a mesh, or an unknown name.
    """
    if name == "auto" and jax.default_backend() == "cpu":
        return blockwise_attention if packed else whole_row_attention
    kernels = {"auto": xla_attention, "xla": xla_attention, "blockwise": blockwise_attention}
    if name not in kernels:
        raise ValueError(
            f"attention must be auto, xla or blockwise here, got {name!r}; splash is built for a mesh by "
            "sora_jax.parallel.splash and passed to the model as attention_fn."
        )
    return kernels[name]
