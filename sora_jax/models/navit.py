"""NaViT (arXiv:2307.06304): a vision transformer over packed rows of images, or clips, of any size and aspect.

The tokens of several images lie in one row. Self-attention and the attention pooling are masked by segment ids, so
that an image gets what it would get alone. Positions along each axis are embedded apart and added (section 2.1):

    (1)  absolute:    phi(p),  p the index of the patch
    (2)  fractional:  phi(r),  r = p / side of the image, in patches

phi is a learned table; between its rows it is linear (Appendix B.1), which an index needs not but a fraction does, and
a time in seconds. The rows of a fractional table lie at r = 0, 1 / (n - 1), ..., 1: their number is our choice. The
paper compares the two kinds (section 3.4) and finds the sum the best way to combine the axes; both kinds in one sum are
ours.

Section 3 takes queries and keys that are normed and the omission of biases from ViT-22B (arXiv:2302.05442), and
attention pooling from arXiv:2106.04560. An image is pooled by one learned query that attends to its tokens, with an MLP
behind (as in big_vision: no residual around the attention). Queries and keys are normed for each head. Which biases
NaViT omits is not said: ViT-22B omits those of queries, keys, values and LayerNorms; here all of attention and of the
MLPs are left out. Deviations: the norm of queries and keys is RMSNorm, not LayerNorm; LayerNorms have biases. The GELU
is the tanh approximation, as in the JAX code of ViT.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from sora_jax.array_types import Array, Float, Int
from sora_jax.config import check
from sora_jax.models.attention import AttentionFn, xla_attention
from sora_jax.models.layers import Mlp, dense, layer_norm
from sora_jax.models.recognition import SegmentOutput
from sora_jax.models.transformer import (
    Context,
    CrossAttention,
    FeedForward,
    SelfAttention,
    Sublayer,
    scanned_blocks,
)
from sora_jax.patches.segments import segment_extent, segment_one_hot, without_padding

AXES = ("t", "y", "x")


@dataclasses.dataclass(frozen=True)
class NaViTConfig:
    """Size and computation of a `NaViT`; `NAVIT_SIZES` names the usual ones.

    Attributes:
        width: size of a token inside the model.
        depth: number of blocks.
        num_heads: attention heads, of the blocks and of the pooling; a divisor of `width`.
        mlp_dim: hidden size of the MLPs.
        num_classes: logits of an image.
        position_embedding: `absolute` (equation 1), `fractional` (equation 2) or `both`, added.
        max_grid: rows of the absolute tables along (t, y, x): positions of a patch must be below. Time is embedded
            where the first is above 1, however positions are embedded; at 1 the model is for images.
        num_fractions: rows of each fractional table.
        norm_eps: epsilon of every norm.
        dtype: of the computation; parameters, softmax and what comes out stay float32.
        remat: see `sora_jax.config.ModelConfig`.
        attention: name of a kernel (see `sora_jax.parallel.attention`).
    """

    kind: ClassVar[str] = "navit"

    width: int = 768
    depth: int = 12
    num_heads: int = 12
    mlp_dim: int = 3072
    num_classes: int = 1000
    position_embedding: Literal["absolute", "fractional", "both"] = "both"
    max_grid: tuple[int, int, int] = (1, 64, 64)
    num_fractions: int = 64
    norm_eps: float = 1e-6
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "dots", "full"] = "none"
    attention: Literal["auto", "xla", "blockwise", "splash"] = "auto"

    def __post_init__(self) -> None:
        for field in ("width", "depth", "num_heads", "mlp_dim", "num_classes"):
            check(getattr(self, field) >= 1, self, field, "at least 1")
        check(self.width % self.num_heads == 0, self, "num_heads", f"a divisor of width {self.width}")
        check(len(self.max_grid) == 3 and min(self.max_grid) >= 1, self, "max_grid", "positive (t, y, x)")
        check(self.num_fractions >= 2, self, "num_fractions", "at least 2")
        check(self.norm_eps > 0, self, "norm_eps", "positive")

    patch: ClassVar[None] = None  # images of any size are cut before they come
    example_shape: ClassVar[None] = None
    takes_any_size: ClassVar[Literal[True]] = True

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes whose positions are embedded."""
        return AXES if self.max_grid[0] > 1 else AXES[1:]

    def network(self, patch_dim: int, num_segments: int, attention_fn: AttentionFn = xla_attention) -> NaViT:
        """Returns the network for rows of `num_segments` at most, whose patches have `patch_dim` values."""
        return NaViT(self, patch_dim, num_segments, attention_fn)

    def forward_flops(self, patch_dim: int, *, real_tokens: float, examples: float, self_pairs: float) -> float:
        """Returns the useful operations of a forward pass, each image or clip alone and without padding.

        Args:
            patch_dim: values of a patch.
            real_tokens: patches.
            examples: images or clips.
            self_pairs: the sum of the squares of their lengths.
        """
        w, mlp = self.width, self.mlp_dim
        grid = sum(self.max_grid[3 - len(self.axes) :]) if self.position_embedding != "fractional" else 0
        fractions = len(self.axes) * self.num_fractions if self.position_embedding != "absolute" else 0
        a_token = 2 * patch_dim * w + 2 * (grid + fractions) * w
        a_token += self.depth * 2 * (4 * w * w + 2 * w * mlp)
        a_token += 2 * 2 * w * w + 2 * 2 * w  # keys and values of the pooling, and its one query
        an_image = 2 * 2 * w * w + 2 * 2 * w * mlp + 2 * w * self.num_classes
        a_pair = self.depth * 2 * 2 * w
        return real_tokens * a_token + examples * an_image + self_pairs * a_pair


NAVIT_SIZES: dict[str, NaViTConfig] = {
    "navit_nano": NaViTConfig(width=64, depth=2, num_heads=2, mlp_dim=256),
    "navit_ti": NaViTConfig(width=192, depth=12, num_heads=3, mlp_dim=768),
    "navit_s": NaViTConfig(width=384, depth=12, num_heads=6, mlp_dim=1536),
    "navit_b": NaViTConfig(),
    "navit_l": NaViTConfig(width=1024, depth=24, num_heads=16, mlp_dim=4096),
}


class PositionEmbedding(nn.Module):
    """Equations 1 and 2, summed over the axes.

    Attributes:
        config: kind and sizes of the tables.
    """

    config: NaViTConfig

    @nn.compact
    def __call__(
        self, positions: Float[Array, "batch length 3"], extent: Float[Array, "batch length 3"]
    ) -> Float[Array, "batch length width"]:
        """Returns (B, L, D) float32; NaN for a token that lies beyond an absolute table.

        Args:
            positions: (B, L, 3), (t, y, x).
            extent: (B, L, 3), size of the token's image or clip in the same units.
        """
        c = self.config
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), (None, "width"))
        total = jnp.zeros((*positions.shape[:2], c.width), jnp.float32)
        for axis in c.axes:
            n = AXES.index(axis)
            if c.position_embedding != "fractional":
                table = self.param(f"absolute_{axis}", init, (c.max_grid[n], c.width), jnp.float32)
                total += table_lookup(table, positions[..., n])
            if c.position_embedding != "absolute":
                table = self.param(f"fractional_{axis}", init, (c.num_fractions, c.width), jnp.float32)
                total += table_lookup(table, positions[..., n] / extent[..., n] * (c.num_fractions - 1))
        return total


class NaViT(nn.Module):
    """Features and logits of the images, or clips, of packed rows.

    Attributes:
        config: size and computation.
        patch_dim: P, values in a patch.
        num_segments: K, most segments of a row; no parameter depends on it.
        attention_fn: the kernel of self-attention; `sora_jax.parallel.attention` chooses it for devices.
    """

    config: NaViTConfig
    patch_dim: int
    num_segments: int
    attention_fn: AttentionFn = xla_attention

    @nn.compact
    def __call__(
        self,
        patches: Float[Array, "batch length values"],
        positions: Float[Array, "batch length 3"],
        segment_ids: Int[Array, "batch length"],
        extent: Float[Array, "batch segments 3"] | None = None,
    ) -> SegmentOutput:
        """Computes features and logits of each segment.

        Args:
            patches: (B, L, P).
            positions: (B, L, 3), (t, y, x) as `sora_jax.patches.positions` counts them. `check_positions` tells
                whether the model's tables reach so far; here a position beyond them gives NaN.
            segment_ids: (B, L), 1 ... K, 0 for padding. All that is said of a row with another one is NaN.
            extent: (B, K, 3), size of each segment in the units of `positions`, for equation 2. None: one more than
                its largest positions, which is too small where all of an image's last row or column was dropped.

        Returns:
            A `SegmentOutput`. What stands where padded, in any input, comes into nothing.

        Raises:
            ValueError: patches of another size than `patch_dim`.
        """
        c, num_segments = self.config, self.num_segments
        if patches.shape[-1] != self.patch_dim:
            raise ValueError(f"patches must have the model's {self.patch_dim} values, got {patches.shape[-1]}.")
        real = segment_ids > 0
        members = segment_one_hot(segment_ids, num_segments)  # (B, L, K)
        present = members.any(axis=1)  # (B, K)

        patches, positions = (without_padding(values, segment_ids) for values in (patches, positions))
        if extent is None:
            extents = segment_extent(positions, segment_ids)  # (B, L, 3)
        else:
            extents = jnp.einsum("blk,bka->bla", members, jnp.where(present[..., None], extent, 1), precision="highest")
            extents = jnp.where(real[..., None], extents, 1)
        x = dense(c.width, ("patch", "width"), name="patch_embedding", dtype=c.dtype)(patches.astype(c.dtype))
        x = (x + PositionEmbedding(c, name="position_embedding")(positions, extents)).astype(c.dtype)  # (B, L, D)

        heads = dict(num_heads=c.num_heads, eps=c.norm_eps, dtype=c.dtype, attention=self.attention_fn)
        heads |= dict(qk_norm="head", bias=False)
        mlp = functools.partial(FeedForward, c.mlp_dim, c.dtype, bias=False)
        sublayers = (
            Sublayer("self_attention", functools.partial(SelfAttention, **heads), affine=True, modulated=False),
            Sublayer("mlp", mlp, affine=True, modulated=False),
        )
        blocks = scanned_blocks(sublayers, depth=c.depth, eps=c.norm_eps, dtype=c.dtype, remat=c.remat, name="blocks")
        x, _ = blocks(x, Context(segment_ids=segment_ids))
        x = layer_norm(name="norm", eps=c.norm_eps, affine=True)(x).astype(c.dtype)

        # Pooling: query k of a row has the segment id k + 1, and one of a segment that the row lacks has no keys.
        init = nn.with_logical_partitioning(nn.initializers.normal(0.02), (None, "width"))
        query = self.param("pool_query", init, (1, c.width), jnp.float32).astype(c.dtype)
        query = jnp.broadcast_to(query, (x.shape[0], num_segments, c.width))
        query_ids = jnp.broadcast_to(jnp.arange(1, num_segments + 1), present.shape)
        context = Context(segment_ids=query_ids, text=x, text_segment_ids=segment_ids)
        # No block of keys is worth skipping for K queries, and a kernel built for a mesh takes only long ones.
        pooled = CrossAttention(**(heads | dict(attention=xla_attention)), name="pool")(query, context)  # (B, K, D)
        h = layer_norm(name="pool_norm", eps=c.norm_eps, affine=True)(pooled).astype(c.dtype)
        h = Mlp(c.mlp_dim, c.width, ("width", "mlp", "width"), c.dtype, bias=False, name="pool_mlp")(h)
        features = (pooled + h).astype(jnp.float32)
        logits = dense(c.num_classes, ("width", "classes"), name="head", dtype="float32", zero=True)(features)
        fits = (segment_ids <= num_segments).all(axis=1)[:, None, None]
        features, logits = (jnp.where(fits, y, jnp.nan) for y in (features, logits))
        return SegmentOutput(*(jnp.where(present[..., None], y, 0) for y in (features, logits)), present)

    def on_rows(self, patches: Array, positions: Array, segment_ids: Array, extents: Array) -> SegmentOutput:
        """Returns what the call does; every recognition network has this method."""
        return self(patches, positions, segment_ids, extents)

    def fresh_params(self, key: jax.Array) -> dict:
        """Returns what `init_params` does."""
        return init_params(self, key)


class ContrastiveHead(nn.Module):
    """Embeds images and their captions in one space (CLIP, arXiv:2103.00020, section 2.3).

    Captions are token states of a frozen encoder; their mean over a segment is projected, as a pooled image is. The
    scale starts at 1 / 0.07 and stays below 100 (section 2.5).

    Attributes:
        embedding_dim: E.
    """

    embedding_dim: int

    @nn.compact
    def __call__(
        self,
        features: Float[Array, "batch segments width"],
        text: Float[Array, "batch text_length text_dim"],
        text_segment_ids: Int[Array, "batch text_length"],
    ) -> tuple[Float[Array, "batch segments dim"], Float[Array, "batch segments dim"], Float[Array, ""]]:
        """Returns what `sora_jax.training.contrastive.contrastive_loss` takes.

        Args:
            features: (B, K, D), of `SegmentOutput`.
            text: (B, M, text_dim), caption tokens.
            text_segment_ids: (B, M), the segment of each caption token, 0 for padding.

        Returns:
            Embeddings of images and of captions, (B, K, E) float32 each, of length 1 or zero where there is nothing,
            and the scale of the logits.
        """
        members, text = segment_one_hot(text_segment_ids, features.shape[1]), without_padding(text, text_segment_ids)
        # A sum: at length 1 it is the mean.
        captions = jnp.einsum("bmk,bmd->bkd", members, text, precision="highest")  # (B, K, text_dim)
        axes = ("width", "embedding")
        image = dense(self.embedding_dim, axes, name="image_projection", dtype="float32", bias=False)(features)
        axes = ("text", "embedding")
        captions = dense(self.embedding_dim, axes, name="text_projection", dtype="float32", bias=False)(captions)
        log_scale = self.param("log_scale", nn.initializers.constant(math.log(1 / 0.07)), (), jnp.float32)
        return _unit(image), _unit(captions), jnp.exp(jnp.minimum(log_scale, math.log(100)))


def _unit(x: Float[Array, "*batch dim"]) -> Float[Array, "*batch dim"]:
    """Returns vectors scaled to length 1; zero stays zero, with a finite gradient."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(axis=-1, keepdims=True), 1e-12))


def table_lookup(
    table: Float[Array, "rows width"], index: Float[Array, "batch length"]
) -> Float[Array, "batch length width"]:
    """Returns rows of a table, linear between them; NaN where the index is below 0 or above the last row's.

    Args:
        table: (n, D).
        index: (B, L), in [0, n - 1].
    """
    rows = table.shape[0]
    weights = jnp.maximum(1 - jnp.abs(index[..., None] - jnp.arange(rows)), 0)  # (B, L, n), at most two above 0
    values = jnp.einsum("bln,nd->bld", weights, table, precision="highest")
    return jnp.where(((index >= 0) & (index <= rows - 1))[..., None], values, jnp.nan)


def check_positions(config: NaViTConfig, positions: Float[np.ndarray, "tokens 3"]) -> None:
    """Raises ValueError where an image or clip does not fit the tables of a model, naming both sizes.

    Fractional positions take any height and width. The model itself runs compiled and cannot raise.

    Args:
        config: of the model.
        positions: (n, 3), (t, y, x) of its patches.
    """
    size = tuple(float(value) + 1 for value in positions.max(axis=0))
    if config.position_embedding == "fractional" and config.max_grid[0] > 1:
        return
    limit = config.max_grid if config.position_embedding != "fractional" else (1, math.inf, math.inf)
    if any(s > most for s, most in zip(size, limit, strict=True)):
        wanted = " x ".join(f"{s:g}" for s in size)
        raise ValueError(
            f"an image or clip of {wanted} (t, y, x) is larger than NaViTConfig.max_grid "
            f"{' x '.join(map(str, config.max_grid))} allows for {config.position_embedding} positions."
        )


def param_count(config: NaViTConfig, patch_dim: int) -> int:
    """Returns the number of parameters of a `NaViT`, without allocating them."""
    shapes = abstract_params(NaViT(config, patch_dim, num_segments=1))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def init_params(model: NaViT, key: jax.Array) -> dict:
    """Returns freshly drawn parameters, boxed with their logical axes; a row of eight tokens suffices for shapes."""
    # They do not depend on the kernel, and one that is built for a mesh takes no single row.
    model = model.clone(attention_fn=xla_attention)
    patches, positions = jnp.zeros((1, 8, model.patch_dim)), jnp.zeros((1, 8, 3))
    return model.init(key, patches, positions, jnp.zeros((1, 8), jnp.int32))["params"]


def abstract_params(model: NaViT) -> dict:
    """Returns the shapes and logical axes of the parameters, without allocating them."""
    return jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))
