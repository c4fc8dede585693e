"""One attention over packed rows, with several kernels behind it.

    (1)  s_ij = scale q_i . k_j + bias_ij,  j over the keys of i's segment, and, where causal, j <= i
    (2)  o_i = sum_j softmax_j(s_ij) v_j
    (3)  z_i = log sum_j exp(s_ij)

Masks come from segment ids only. A query of segment 0 (padding), or one that no key is left for, yields zeros, and
`NO_KEYS` in equation 3. With equation 3, attention to a set of keys is put together from attention to its parts: their
outputs count by softmax(z), and the whole's z is the log of the sum of exp(z).

`AttentionFn` is what every kernel can be called like, and `xla_attention` the reference. `blockwise_attention` computes
the same without the (L, M) matrix and skips the key blocks that hold none of a query block's segments. `splash` (TPU)
is built for a mesh in `sora_jax.parallel`, where one function chooses among them all.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, Protocol, overload, runtime_checkable

import jax
import jax.numpy as jnp

from sora_jax.array_types import Array, Float, Int
from sora_jax.patches.segments import segment_mask

NO_KEYS = float(jnp.finfo(jnp.float32).min)
"""Equation 3 of a query without keys: in sums with others it counts for nothing, and unlike -inf never makes a NaN."""

RowAttention = Callable[[Array, Array, Array, Array, Array], Array]
"""Attention as the blocks of a model call it: of (q, k, v, query_ids, key_ids), with equation 2 alone."""


@runtime_checkable  # for the check of shapes in tests, which looks at every argument
class AttentionFn(Protocol):
    """What an attention kernel is called like; one that cannot do something raises a ValueError that says so.

    Args:
        q: (B, L, H, Dh).
        k: (B, M, H, Dh).
        v: (B, M, H, Dh).
        query_ids: (B, L), segment of each query, 0 for padding.
        key_ids: (B, M), segment of each key, 0 for padding.
        causal: whether a query leaves out the keys that stand behind it in the row, which is the order within each
            segment. There must be as many keys as queries: they are the same tokens.
        bias: (B or 1, H, L, M), finite, is added to the scores; None for none.
        scale: of the scores; None for 1 / sqrt(Dh).
        with_logsumexp: whether equation 3 is returned too. Gradients flow through it.

    Returns:
        (B, L, H, Dh) of the dtype of `q`, from a softmax in float32; with `with_logsumexp` also (B, L, H) float32.
    """

    @overload
    def __call__(
        self,
        q: Array,
        k: Array,
        v: Array,
        query_ids: Array,
        key_ids: Array,
        *,
        causal: bool = ...,
        bias: Array | None = ...,
        scale: float | None = ...,
        with_logsumexp: Literal[False] = ...,
    ) -> Array: ...

    @overload
    def __call__(
        self,
        q: Array,
        k: Array,
        v: Array,
        query_ids: Array,
        key_ids: Array,
        *,
        causal: bool = ...,
        bias: Array | None = ...,
        scale: float | None = ...,
        with_logsumexp: Literal[True],
    ) -> tuple[Array, Array]: ...


def xla_attention(
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
) -> (
    Float[Array, "batch queries heads head_dim"]
    | tuple[Float[Array, "batch queries heads head_dim"], Float[Array, "batch queries heads"]]
):
    """Computes equations 2 and 3 with the whole matrix of scores; see `AttentionFn`."""
    check_causal(causal, q.shape[1], k.shape[1])
    mask = segment_mask(query_ids, key_ids)  # (B, L, M)
    if causal:
        mask &= jnp.tri(q.shape[1], dtype=bool)
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))  # (B, H, L, Dh): products and their gradients lie as they are
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = jnp.einsum("bhld,bhmd->bhlm", q, k, preferred_element_type=jnp.float32) * scale
    if bias is not None:
        scores += bias
    scores = jnp.where(mask[:, None], scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1)
    out = jnp.einsum("bhlm,bhmd->bhld", weights.astype(v.dtype), v)
    # The weights are zero where masked, but for queries without any key: theirs are all equal.
    has_key = mask.any(axis=-1)[..., None]  # (B, L, 1)
    out = jnp.where(has_key[..., None], jnp.swapaxes(out, 1, 2), 0)
    if not with_logsumexp:
        return out
    total = jax.nn.logsumexp(scores, axis=-1)  # (B, H, L)
    return out, jnp.where(has_key, jnp.swapaxes(total, 1, 2), NO_KEYS)


def check_causal(causal: bool, num_queries: int, num_keys: int) -> None:
    """Raises ValueError where attention is to be causal between rows of different lengths."""
    if causal and num_queries != num_keys:
        raise ValueError(f"causal attention needs as many keys as queries, got {num_keys} and {num_queries}.")
