"""SoraTransformer: a text-conditioned diffusion transformer over packed spacetime patches.

Its shape is that of the open Wan 2.1 text-to-video models (arXiv:2503.20314, section 4.2): patch embedding; a
time MLP whose projection modulates all blocks, each with a table of its own; blocks of self-attention (QK RMSNorm,
3-D rotary positions), cross-attention to the caption and an MLP; a modulated head. What is ours is packing: a row
holds several clips, and each of a clip's patches has its own noise level. A clip's output does not depend on its
neighbours. Ours too is the grid embedding, which tells a token where in its clip it lies, in patches and as a share
of the clip (absolute and fractional positions, arXiv:2307.06304, section 3.2).

Initialisation is adaLN-Zero's (arXiv:2212.09748, section 3.2): gates, and the head, start at zero.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from sora_jax.array_types import Array, Float, Int
from sora_jax.config import check
from sora_jax.models.attention import AttentionFn, xla_attention
from sora_jax.models.layers import Mlp, dense, layer_norm, modulate, sinusoidal_embedding
from sora_jax.models.transformer import (
    Context,
    CrossAttention,
    FeedForward,
    SelfAttention,
    Sublayer,
    expand_levels,
    scanned_blocks,
)
from sora_jax.patches.rotary import rope_angles
from sora_jax.patches.segments import segment_extent, without_padding

# Noise levels in [0, 1] are embedded as the timesteps in [0, 1000] that the open models were trained with.
TIMESTEPS = 1000.0

# Of the grid embedding: 32 values a coordinate, cosines and sines of 16 wavelengths from 2 pi to about 470.
GRID_FREQUENCIES = 32
GRID_PERIOD = 100.0


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Size and computation of a `SoraTransformer`; `sora_jax.models.sora.SORA_SIZES` names the usual ones.

    Attributes:
        width: size of a token inside the model.
        depth: number of blocks.
        num_heads: attention heads; `width / num_heads` must be an even number of at least 6.
        mlp_dim: hidden size of the MLP.
        text_dim: size of a caption token state (384 for MiniLM, 4096 for UMT5-XXL).
        frequency_dim: size of the sinusoidal embedding of the noise level.
        grid_embedding: adds an embedding of where a patch lies in its clip to its token. Rotary positions alone tell
            tokens of pure noise apart by nothing but the noise; the Wan models do without and learn it at scale.
        rope_theta: base of the rotary frequencies.
        norm_eps: epsilon of every norm.
        dtype: of the computation; parameters and softmax stay float32.
        remat: what a block keeps for its backward pass: `none` keeps all, `dots` the matrix products, `full` nothing.
        attention: name of a kernel (see `sora_jax.parallel.attention`).
    """

    width: int = 256
    depth: int = 8
    num_heads: int = 4
    mlp_dim: int = 1024
    text_dim: int = 384
    frequency_dim: int = 256
    grid_embedding: bool = True
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-6
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "dots", "full"] = "none"
    attention: Literal["auto", "xla", "blockwise", "splash"] = "auto"

    def __post_init__(self) -> None:
        for field in ("width", "depth", "num_heads", "mlp_dim", "text_dim"):
            check(getattr(self, field) >= 1, self, field, "at least 1")
        check(self.width % self.num_heads == 0, self, "num_heads", f"a divisor of width {self.width}")
        head = self.width // self.num_heads
        check(head % 2 == 0 and head >= 6, self, "num_heads", f"such that width {self.width} / num_heads is even, >= 6")
        check(self.frequency_dim >= 2 and self.frequency_dim % 2 == 0, self, "frequency_dim", "even and at least 2")
        check(self.rope_theta > 1, self, "rope_theta", "above 1")
        check(self.norm_eps > 0, self, "norm_eps", "positive")


SORA_SIZES: dict[str, ModelConfig] = {
    "sora_nano": ModelConfig(width=64, depth=2, num_heads=2, mlp_dim=256),
    "sora_micro": ModelConfig(width=256, depth=6, num_heads=4, mlp_dim=1024),
    "sora_s": ModelConfig(width=384, depth=12, num_heads=6, mlp_dim=1536),
    "sora_b": ModelConfig(width=768, depth=12, num_heads=12, mlp_dim=3072),
    "sora_l": ModelConfig(width=1024, depth=24, num_heads=16, mlp_dim=4096),
    "sora_xl": ModelConfig(width=1152, depth=28, num_heads=16, mlp_dim=4608),
    "wan_1_3b": ModelConfig(width=1536, depth=30, num_heads=12, mlp_dim=8960, text_dim=4096, grid_embedding=False),
    "wan_14b": ModelConfig(width=5120, depth=40, num_heads=40, mlp_dim=13824, text_dim=4096, grid_embedding=False),
}


class SoraTransformer(nn.Module):
    """Predicts velocities (or clean patches) of packed rows.

    Attributes:
        config: size and computation.
        patch_dim: P, values in a patch.
        attention_fn: the kernel of self- and cross-attention; `sora_jax.parallel.attention` chooses it for devices.
    """

    config: ModelConfig
    patch_dim: int
    attention_fn: AttentionFn = xla_attention

    @nn.compact
    def __call__(
        self,
        patches: Float[Array, "batch length values"],
        positions: Float[Array, "batch length 3"],
        segment_ids: Int[Array, "batch length"],
        levels: Float[Array, "batch levels"],
        level_ids: Int[Array, "batch length"],
        text: Float[Array, "batch text_length text_dim"],
        text_segment_ids: Int[Array, "batch text_length"],
    ) -> Float[Array, "batch length values"]:
        """Computes the network's output for each patch.

        Args:
            patches: (B, L, P), noised to each token's level.
            positions: (B, L, 3), (t, y, x).
            segment_ids: (B, L), the clip of each token, 0 for padding.
            levels: (B, J) float32 in [0, 1], the noise levels that occur in a row; anything where no token has one.
            level_ids: (B, L), each token's column of `levels`. The output of a token that names another is NaN.
            text: (B, M, text_dim), caption tokens.
            text_segment_ids: (B, M), the clip of each caption token, 0 for padding.

        Returns:
            (B, L, P) float32, zero where padded: what stands there, in any input, comes into nothing.
        """
        c = self.config
        patches, positions = (without_padding(values, segment_ids) for values in (patches, positions))
        text = without_padding(text, text_segment_ids)
        real = segment_ids > 0
        level_one_hot = jax.nn.one_hot(level_ids, levels.shape[1], dtype=c.dtype) * real[..., None].astype(c.dtype)
        levels = jnp.where(level_one_hot.any(axis=1), levels, 0)

        x = dense(c.width, ("patch", "width"), name="patch_embedding", dtype=c.dtype)(patches.astype(c.dtype))
        if c.grid_embedding:
            place = grid_coordinates(positions, segment_ids)  # (B, L, 5)
            place = sinusoidal_embedding(place, GRID_FREQUENCIES, period=GRID_PERIOD)  # (B, L, 5, GRID_FREQUENCIES)
            place = place.reshape(*segment_ids.shape, -1).astype(c.dtype)
            x = x + dense(c.width, ("features", "width"), name="grid_embedding", dtype=c.dtype)(place)
        text = Mlp(c.width, c.width, ("text", "width", "text_width"), c.dtype, name="text_embedding")(
            text.astype(c.dtype)
        )

        # Conditioning in float32: it is small, and every token depends on it.
        h = sinusoidal_embedding(levels * TIMESTEPS, c.frequency_dim)  # (B, J, frequency_dim)
        h = dense(c.width, ("features", "width"), name="time_fc1", dtype="float32")(h)
        time = dense(c.width, ("width", "conditioning"), name="time_fc2", dtype="float32")(jax.nn.silu(h))  # (B, J, D)
        conditioning = dense(6 * c.width, ("width", "modulation"), name="time_projection", dtype="float32", zero=True)(
            jax.nn.silu(time)
        )
        context = Context(
            segment_ids=segment_ids,
            angles=rope_angles(positions, c.width // c.num_heads, c.rope_theta),
            text=text,
            text_segment_ids=text_segment_ids,
            conditioning=conditioning.reshape(*levels.shape, 6, c.width),
            level_one_hot=level_one_hot,
        )

        heads = dict(num_heads=c.num_heads, eps=c.norm_eps, dtype=c.dtype, attention=self.attention_fn)
        sublayers = (
            Sublayer("self_attention", functools.partial(SelfAttention, **heads), affine=False, modulated=True),
            Sublayer("cross_attention", functools.partial(CrossAttention, **heads), affine=True, modulated=False),
            Sublayer("mlp", functools.partial(FeedForward, c.mlp_dim, c.dtype), affine=False, modulated=True),
        )
        blocks = scanned_blocks(sublayers, depth=c.depth, eps=c.norm_eps, dtype=c.dtype, remat=c.remat, name="blocks")
        x, _ = blocks(x, context)

        init = nn.with_logical_partitioning(nn.initializers.zeros_init(), ("parts", "width"))
        table = self.param("head_modulation", init, (2, c.width), jnp.float32)
        shift, scale = expand_levels(time[:, :, None] + table, context.level_one_hot)
        x = modulate(layer_norm(name="head_norm", eps=c.norm_eps, affine=False)(x), shift, scale)
        x = dense(self.patch_dim, ("width", "patch"), name="head", dtype="float32", zero=True)(x)
        known = (level_ids >= 0) & (level_ids < levels.shape[1])
        return without_padding(jnp.where(known[..., None], x, jnp.nan), segment_ids)


def grid_coordinates(
    positions: Float[Array, "batch length 3"], segment_ids: Int[Array, "batch length"]
) -> Float[Array, "batch length 5"]:
    """Returns where tokens lie in their clips, (B, L, 5) float32, in the units that the grid embedding takes.

    These are t, y and x as they are, and the middle of the patch as a share of the clip's height and width, times 8.

    Args:
        positions: (B, L, 3), (t, y, x).
        segment_ids: (B, L), 0 for padding.
    """
    extent = segment_extent(positions[..., 1:], segment_ids)
    return jnp.concatenate([positions, 8 * (positions[..., 1:] + 0.5) / extent], axis=-1)


def param_count(config: ModelConfig, patch_dim: int) -> int:
    """Returns the number of parameters of a `SoraTransformer`, without allocating them."""
    shapes = abstract_params(SoraTransformer(config, patch_dim))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def init_params(model: SoraTransformer, key: jax.Array) -> dict:
    """Returns freshly drawn parameters, boxed with their logical axes; rows of eight tokens suffice for shapes."""
    # They do not depend on the kernel, and one that is built for a mesh takes no single row.
    model = model.clone(attention_fn=xla_attention)
    row = jnp.zeros((1, 8), jnp.int32)
    zeros = functools.partial(jnp.zeros, dtype=jnp.float32)
    text = zeros((1, 8, model.config.text_dim))
    return model.init(key, zeros((1, 8, model.patch_dim)), zeros((1, 8, 3)), row, zeros((1, 2)), row, text, row)[
        "params"
    ]


def abstract_params(model: SoraTransformer) -> dict:
    """Returns the shapes and logical axes of the parameters, without allocating them."""
    return jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))
