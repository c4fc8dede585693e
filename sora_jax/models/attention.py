"""One attention over packed rows, with several kernels behind it.

    (1)  o_i = sum_j softmax_j(q_i . k_j / sqrt(Dh)) v_j,  j over the keys of i's segment

Masks come from segment ids only. A query of segment 0 (padding), or whose segment has no key, yields zeros.
`xla` is the reference. `blockwise` computes the same without the (L, L) matrix and skips the key blocks that hold
none of a query block's segments, which is what makes long rows cheap where no fused kernel exists (CPU).
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
    mask = segment_mask(query_ids, key_ids)[:, None]  # (B, 1, L, M)
    scores = jnp.einsum("blhd,bmhd->bhlm", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    scores = jnp.where(mask, scores, jnp.finfo(jnp.float32).min)
    weights = jnp.where(mask, jax.nn.softmax(scores, axis=-1), 0)
    return jnp.einsum("bhlm,bmhd->blhd", weights.astype(v.dtype), v)


def attention_kernel(name: str) -> AttentionFn:
    """Returns the kernel called `name`; `auto` is `blockwise` on a CPU and `xla` elsewhere.

    Raises:
        ValueError: `splash`, which must be built for a mesh, or an unknown name.
    """
    if name == "auto":
        name = "blockwise" if jax.default_backend() == "cpu" else "xla"
    kernels = {"xla": xla_attention, "blockwise": blockwise_attention}
    if name not in kernels:
        raise ValueError(
            f"attention must be auto, xla or blockwise here, got {name!r}; splash is built for a mesh by "
            "sora_jax.parallel.splash and passed to the model as attention_fn."
        )
    return kernels[name]
