"""The one transformer block: a list of residual sublayers, each a mixer, a norm and perhaps a modulation.

A modulated sublayer computes

    (1)  x + gate * mixer(modulate(norm(x), shift, scale))

and a plain one `x + mixer(norm(x))`. Shift, scale and gate depend on a token's noise level. They are computed once
for each level of a row and expanded to tokens inside the sublayer by a one-hot product. Where they come from is the
block's `modulation`:

    table       a conditioning shared by all blocks plus a table of the block's own    arXiv:2310.00426, section 2.3
    projection  a dense layer of the block's own, of what the level's embedding is     arXiv:2212.09748, section 3.2
    zero_projection  the same, which starts at zero: with gates, each block starts as the identity
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from sora_jax.array_types import Array, Float, Int
from sora_jax.models.attention import RowAttention
from sora_jax.models.layers import Mlp, dense, layer_norm, modulate, rms_norm
from sora_jax.patches.rotary import apply_rope

QKNorm = Literal["none", "width", "head"]
Modulation = Literal["table", "projection", "zero_projection"]


class Context(NamedTuple):
    """What the sublayers of a block know beside the tokens; what none of them needs is None.

    Attributes:
        segment_ids: (B, L), 0 for padding.
        angles: (B, L, Dh / 2), rotary angles of self-attention.
        text: (B, M, D), caption tokens.
        text_segment_ids: (B, M), 0 for padding.
        conditioning: (B, J, n, D) float32, n = three for each modulated sublayer, for each of a row's J levels.
        level_embedding: (B, J, D) float32, what blocks that project it themselves have in its place.
        level_one_hot: (B, L, J), each token's level.
    """

    segment_ids: Int[Array, "batch length"]
    angles: Float[Array, "batch length pairs"] | None = None
    text: Float[Array, "batch text_length width"] | None = None
    text_segment_ids: Int[Array, "batch text_length"] | None = None
    conditioning: Float[Array, "batch levels parts width"] | None = None
    level_embedding: Float[Array, "batch levels width"] | None = None
    level_one_hot: Float[Array, "batch length levels"] | None = None


class SelfAttention(nn.Module):
    """Attention among the tokens of a segment, with rotary positions where the context has angles.

    Attributes:
        num_heads: H.
        eps: of the norms.
        dtype: of the computation.
        attention: the kernel.
        qk_norm: RMSNorm of queries and keys over the whole `width` (Wan), over each `head` (ViT-22B, NaViT) or `none`.
        bias: whether the projections have one.
        fused_init: queries, keys and values start as parts of one Glorot-uniform kernel (D, 3 D), which has half the
            variance of one (D, D), as in code that computes them by one layer (DiT's).
    """

    num_heads: int
    eps: float
    dtype: str
    attention: RowAttention
    qk_norm: QKNorm = "width"
    bias: bool = True
    fused_init: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "batch length width"], context: Context) -> Float[Array, "batch length width"]:
        """Returns (B, L, D)."""
        init = nn.initializers.variance_scaling(0.5, "fan_avg", "uniform") if self.fused_init else None
        q, k, v = _project(x, x, self.num_heads, self.eps, self.dtype, self.qk_norm, self.bias, init)
        if context.angles is not None:
            q, k = apply_rope(q, context.angles), apply_rope(k, context.angles)
        out = self.attention(q, k, v, context.segment_ids, context.segment_ids).reshape(x.shape)
        return dense(x.shape[-1], ("heads_width", "width"), name="out", dtype=self.dtype, bias=self.bias)(out)


class CrossAttention(nn.Module):
    """Attention of a segment's tokens to the tokens of its caption, or to whatever else `Context.text` holds.

    Attributes:
        num_heads: H.
        eps: of the norms.
        dtype: of the computation.
        attention: the kernel.
        qk_norm: see `SelfAttention`.
        bias: whether the projections have one.
    """

    num_heads: int
    eps: float
    dtype: str
    attention: RowAttention
    qk_norm: QKNorm = "width"
    bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "batch length width"], context: Context) -> Float[Array, "batch length width"]:
        """Returns (B, L, D)."""
        q, k, v = _project(x, context.text, self.num_heads, self.eps, self.dtype, self.qk_norm, self.bias)
        out = self.attention(q, k, v, context.segment_ids, context.text_segment_ids)
        out = out.reshape(x.shape)
        return dense(x.shape[-1], ("heads_width", "width"), name="out", dtype=self.dtype, bias=self.bias)(out)


class FeedForward(nn.Module):
    """The MLP as a mixer.

    Attributes:
        hidden_dim: size between its layers.
        dtype: of the computation.
        exact_gelu: see `sora_jax.models.layers.Mlp`.
        bias: whether its layers have one.
    """

    hidden_dim: int
    dtype: str
    exact_gelu: bool = False
    bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "batch length width"], context: Context) -> Float[Array, "batch length width"]:
        """Returns (B, L, D); needs nothing of the context."""
        axes = ("width", "mlp", "width")
        return Mlp(self.hidden_dim, x.shape[-1], axes, self.dtype, self.exact_gelu, self.bias, name="mlp")(x)


@dataclasses.dataclass(frozen=True)
class Sublayer:
    """A residual sublayer of a block.

    Attributes:
        name: of its parameters.
        mixer: makes the mixer, which maps (tokens, context) to tokens.
        affine: whether its norm has a scale and a bias.
        modulated: whether its norm is modulated and its output gated.
        gated: whether a modulated one is gated; false leaves the gate out of equation 1.
    """

    name: str
    mixer: Callable[..., nn.Module]
    affine: bool
    modulated: bool
    gated: bool = True

    @property
    def num_parts(self) -> int:
        """Vectors that modulate it: shift, scale and gate."""
        return (2 + self.gated) * self.modulated


class Block(nn.Module):
    """A list of residual sublayers.

    Attributes:
        sublayers: in order.
        eps: of the norms.
        dtype: of the residual stream.
        modulation: where shifts, scales and gates come from.
    """

    sublayers: tuple[Sublayer, ...]
    eps: float
    dtype: str
    modulation: Modulation = "table"

    @nn.compact
    def __call__(self, x: Float[Array, "batch length width"], context: Context) -> tuple[Array, None]:
        """Returns (B, L, D) and None, as `nn.scan` wants it."""
        num_parts = sum(sublayer.num_parts for sublayer in self.sublayers)
        parts = self._parts(num_parts, x.shape[-1], context) if num_parts else None  # (B, J, num_parts, D)
        first = 0
        for sublayer in self.sublayers:
            mixer = sublayer.mixer(name=sublayer.name)
            h = layer_norm(name=f"{sublayer.name}_norm", eps=self.eps, affine=sublayer.affine)(x)
            if sublayer.modulated:
                own = parts[:, :, first : first + sublayer.num_parts].astype(self.dtype)
                shift, scale, *gate = expand_levels(own, context.level_one_hot)
                first += sublayer.num_parts
                out = mixer(modulate(h, shift, scale).astype(self.dtype), context)
                x = x + (gate[0] * out if sublayer.gated else out)
            else:
                x = x + mixer(h.astype(self.dtype), context)
        return x.astype(self.dtype), None

    def _parts(self, num_parts: int, width: int, context: Context) -> Float[Array, "batch levels parts width"]:
        """Returns the vectors that modulate the sublayers, for each level, float32."""
        if self.modulation == "table":
            init = nn.with_logical_partitioning(nn.initializers.zeros_init(), ("parts", "width"))
            return context.conditioning + self.param("modulation", init, (num_parts, width), jnp.float32)
        zero = self.modulation == "zero_projection"
        layer = dense(num_parts * width, ("width", "modulation"), name="modulation", dtype="float32", zero=zero)
        return layer(context.level_embedding).reshape(*context.level_embedding.shape[:2], num_parts, width)


def expand_levels(
    parts: Float[Array, "batch levels parts width"], level_one_hot: Float[Array, "batch length levels"]
) -> tuple[Array, ...]:
    """Gives each token the values of its level: a tuple of `parts` arrays (B, L, D).

    Where rows have one level, padding has its values too.
    """
    if parts.shape[1] == 1:  # nothing to choose
        shape = (*level_one_hot.shape[:2], parts.shape[3])
        return tuple(jnp.broadcast_to(parts[:, :, n], shape) for n in range(parts.shape[2]))
    one_hot = level_one_hot.astype(parts.dtype)
    # A product a part: one product of all parts is laid out anew, which on a CPU costs a sixth of the training step.
    return tuple(jnp.einsum("blj,bjd->bld", one_hot, parts[:, :, n]) for n in range(parts.shape[2]))


REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "full": jax.checkpoint_policies.nothing_saveable,
}


def scanned_blocks(
    sublayers: tuple[Sublayer, ...],
    *,
    depth: int,
    eps: float,
    dtype: str,
    remat: str,
    name: str,
    modulation: Modulation = "table",
) -> nn.Module:
    """Returns `depth` equal blocks as one scan over stacked parameters.

    The names of the parameters do not depend on `remat`, so it can be changed for an existing checkpoint.

    Args:
        sublayers: of each block.
        depth: number of blocks.
        eps: of the norms.
        dtype: of the residual stream.
        remat: `none`, or a key of `REMAT_POLICIES`.
        name: of the parameters, whose first axis is the block.
        modulation: of the modulated sublayers.
    """
    block = Block if remat == "none" else nn.remat(Block, policy=REMAT_POLICIES[remat], prevent_cse=False)
    scanned = nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=nn.broadcast,
        length=depth,
        metadata_params={nn.PARTITION_NAME: "layers"},
    )
    return scanned(sublayers=sublayers, eps=eps, dtype=dtype, modulation=modulation, name=name)


def _project(
    x: Array,
    source: Array,
    num_heads: int,
    eps: float,
    dtype: str,
    qk_norm: QKNorm = "width",
    bias: bool = True,
    init: nn.initializers.Initializer | None = None,
) -> tuple[Array, Array, Array]:
    """Returns normed queries of `x` and normed keys and values of `source`, each (B, ..., H, Dh)."""
    axes = ("width", "heads_width")
    q, k, v = (
        dense(x.shape[-1], axes, name=name, dtype=dtype, bias=bias, init=init)(y)
        for name, y in (("query", x), ("key", source), ("value", source))
    )
    axis = "head_dim" if qk_norm == "head" else "heads_width"
    names = ("query_norm", "key_norm") if qk_norm != "none" else ()
    norms = [rms_norm(name=name, axis=axis, eps=eps) for name in names]
    if qk_norm == "width":
        q, k = (norm(y) for norm, y in zip(norms, (q, k), strict=True))
    q, k, v = (y.reshape(*y.shape[:2], num_heads, -1) for y in (q, k, v))
    if qk_norm == "head":
        q, k = (norm(y) for norm, y in zip(norms, (q, k), strict=True))
    return q.astype(dtype), k.astype(dtype), v
