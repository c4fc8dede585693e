"""DiT: latent diffusion with a transformer, conditioned on timestep and class (arXiv:2212.09748).

    (1)  x_0 = patches E + sincos(y, x)                        fixed positions, the same for every size of image
    (2)  c   = time MLP(t) + label embedding(y)
    (3)  x_l = blocks of self-attention and MLP, conditioned in one of four ways (section 3.2):
           adaln_zero       norm(x) (1 + scale) + shift, the sublayer's output times gate; shift, scale and gate are a
                            projection of SiLU(c) by each block, which starts at zero
           adaln            the same without gate; the projection starts like any other
           cross_attention  attention to the two tokens (time MLP(t), label embedding(y)) behind self-attention
           in_context       these two tokens are put among those of the image, and removed after the last block
    (4)  out = linear(norm(x_L)), modulated by another projection of SiLU(c) in the first two; starts at zero

The model takes packed rows: a segment is an image with its own timestep and class, and what one gets does not depend
on its neighbours. Whatever depends on timestep and class is computed once a segment. `DiT.on_images` is the official
call on a batch of equal images.

Initialisation is that of the official code (facebookresearch/DiT), which has `adaln_zero` only. What it does not say
is chosen here: in the other three nothing but the last layers starts at zero; without adaLN all norms have learned
scales and biases, the last one too (with these choices the numbers of parameters are the paper's, table 4). Dropping
labels for classifier-free guidance is the caller's: it gives the null class, `num_classes`, in their place.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from sora_jax.array_types import Array, Float, Int
from sora_jax.config import check
from sora_jax.models.attention import AttentionFn, xla_attention
from sora_jax.models.layers import dense, layer_norm, modulate, sinusoidal_embedding
from sora_jax.models.transformer import (
    Context,
    CrossAttention,
    FeedForward,
    SelfAttention,
    Sublayer,
    expand_levels,
    scanned_blocks,
)
from sora_jax.patches.patchify import patchify, unpatchify
from sora_jax.patches.segments import segment_one_hot, without_padding

Conditioning = Literal["adaln_zero", "adaln", "cross_attention", "in_context"]


@dataclasses.dataclass(frozen=True)
class DiTConfig:
    """Size and computation of a `DiT`; `DIT_SIZES` names the published ones. The defaults are DiT-XL/2's at 256x256.

    Attributes:
        image_size: (height, width) of the images that it is trained on, in cells (of the latents, where there are
            latents). No parameter depends on it: the model takes any size.
        patch_size: side of a patch in cells.
        in_channels: values of a cell.
        width: size of a token inside the model, a multiple of 4.
        depth: number of blocks.
        num_heads: attention heads.
        mlp_dim: hidden size of the MLP.
        num_classes: classes; one more is the null class, where there is one.
        conditioning: on timestep and class, see the module.
        learned_variance: the output has twice the channels: the prediction, then the variance's place in its range
            (arXiv:2102.09672, section 3.1).
        frequency_dim: values that a timestep is embedded as, even.
        frequency_endpoint: the lowest of the timestep's frequencies is 1 / 10,000 itself, as in diffusers, which is
            not so in the official code.
        norm_eps: epsilon of every norm.
        dtype: of the computation; parameters, norms, softmax, conditioning and output stay float32.
        remat: what a block keeps for its backward pass: `none` keeps all, `dots` the matrix products, `full` nothing.
        attention: name of a kernel (see `sora_jax.parallel.attention`).
        num_label_rows: rows of the table of label embeddings: `num_classes` where there is no null class, and guidance
            is not possible; None for one more.
    """

    kind: ClassVar[str] = "dit_model"

    image_size: tuple[int, int] = (32, 32)
    patch_size: int = 2
    in_channels: int = 4
    width: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_dim: int = 4608
    num_classes: int = 1000
    conditioning: Conditioning = "adaln_zero"
    learned_variance: bool = True
    frequency_dim: int = 256
    frequency_endpoint: bool = False
    norm_eps: float = 1e-6
    dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "dots", "full"] = "none"
    attention: Literal["auto", "xla", "blockwise", "splash"] = "auto"
    num_label_rows: int | None = None

    def __post_init__(self) -> None:
        for field in ("patch_size", "in_channels", "width", "depth", "num_heads", "mlp_dim", "num_classes"):
            check(getattr(self, field) >= 1, self, field, "at least 1")
        whole = all(side >= 1 and side % self.patch_size == 0 for side in self.image_size)
        check(whole, self, "image_size", f"(height, width), positive multiples of patch_size {self.patch_size}")
        check(self.width % 4 == 0, self, "width", "a multiple of 4, for sines and cosines of two coordinates")
        check(self.width % self.num_heads == 0, self, "num_heads", f"a divisor of width {self.width}")
        check(self.frequency_dim >= 4 and self.frequency_dim % 2 == 0, self, "frequency_dim", "even, at least 4")
        check(self.norm_eps > 0, self, "norm_eps", "positive")
        allowed = (None, self.num_classes, self.num_classes + 1)
        check(self.num_label_rows in allowed, self, "num_label_rows", f"None, {allowed[1]} or {allowed[2]}")

    @property
    def has_null_class(self) -> bool:
        """Whether there is a class of no class, which guidance needs."""
        return self.num_label_rows != self.num_classes

    @property
    def out_channels(self) -> int:
        """Values of a cell that come out."""
        return self.in_channels * (2 if self.learned_variance else 1)

    @property
    def grid(self) -> tuple[int, int]:
        """Patches along height and width."""
        return self.image_size[0] // self.patch_size, self.image_size[1] // self.patch_size


_WIDTHS = {
    "s": dict(width=384, depth=12, num_heads=6, mlp_dim=1536),
    "b": dict(width=768, depth=12, num_heads=12, mlp_dim=3072),
    "l": dict(width=1024, depth=24, num_heads=16, mlp_dim=4096),
    "xl": dict(width=1152, depth=28, num_heads=16, mlp_dim=4608),
}
# Table 1 of the paper, for latents of 256x256 pixels.
DIT_SIZES: dict[str, DiTConfig] = {
    f"dit_{size}_{patch}": DiTConfig(patch_size=patch, **widths)
    for size, widths in _WIDTHS.items()
    for patch in (2, 4, 8)
}


class DiT(nn.Module):
    """Predicts noise (and the variance's place in its range) of packed rows of images.

    Attributes:
        config: size and computation.
        attention_fn: the kernel of self-attention; `sora_jax.parallel.attention` chooses it for devices.
    """

    config: DiTConfig
    attention_fn: AttentionFn = xla_attention

    @nn.compact
    def __call__(
        self,
        patches: Float[Array, "batch length values"],
        positions: Float[Array, "batch length 3"],
        segment_ids: Int[Array, "batch length"],
        timesteps: Float[Array, "batch segments"],
        labels: Int[Array, "batch segments"],
    ) -> Float[Array, "batch length out"]:
        """Computes the network's output for each patch.

        Args:
            patches: (B, L, patch_size^2 in_channels), values in the order y, x, channel; noised.
            positions: (B, L, 3), (t, y, x) in patches; t is not looked at.
            segment_ids: (B, L), 1 ... K, the image of each token; 0 for padding. The output of a token of another
                image is NaN.
            timesteps: (B, K), of each image, 0 (the least noisy) to 999; anything where a row has fewer.
            labels: (B, K), the class of each image; `num_classes`, or any number below 0, is the null class. Where
                there is no such class, the row's output is NaN (this runs compiled and cannot raise). Anything where a
                row has fewer.

        Returns:
            (B, L, patch_size^2 out_channels) float32, in the order y, x, channel (`split_output` takes it apart);
            zero where padded: what stands there, in any input, comes into nothing.
        """
        c = self.config
        num_segments, length = timesteps.shape[1], segment_ids.shape[1]
        patches, positions = (without_padding(values, segment_ids) for values in (patches, positions))
        one_hot = segment_one_hot(segment_ids, num_segments).astype(c.dtype)  # (B, L, K)
        present = one_hot.any(axis=1)
        timesteps, labels = jnp.where(present, timesteps, 0), jnp.where(present, labels, c.num_classes)
        adaptive = c.conditioning in ("adaln", "adaln_zero")

        x = dense(c.width, ("patch", "width"), name="patch_embedding", dtype=c.dtype)(patches.astype(c.dtype))
        x = x + sincos_positions(positions[..., 1:], c.width).astype(c.dtype)  # (B, L, D)
        time, label = self._embed(timesteps, labels)  # (B, K, D) each
        condition = jax.nn.silu(time + label) if adaptive else None
        tokens = jnp.stack([time, label], axis=2).reshape(len(x), -1, c.width).astype(c.dtype)  # (B, 2K, D)
        token_ids = jnp.broadcast_to(jnp.repeat(jnp.arange(1, num_segments + 1), 2), tokens.shape[:2])

        context = Context(segment_ids=segment_ids, level_embedding=condition, level_one_hot=one_hot)
        if c.conditioning == "in_context":
            x = jnp.concatenate([x, tokens], axis=1)
            context = Context(segment_ids=jnp.concatenate([segment_ids, token_ids], axis=1))
        elif c.conditioning == "cross_attention":
            context = Context(segment_ids=segment_ids, text=tokens, text_segment_ids=token_ids)
        modulation = "zero_projection" if c.conditioning == "adaln_zero" else "projection"
        blocks = scanned_blocks(
            self._sublayers(), depth=c.depth, eps=c.norm_eps, dtype=c.dtype, remat=c.remat,
            name="blocks", modulation=modulation,
        )  # fmt: skip
        x = blocks(x, context)[0][:, :length]

        x = layer_norm(name="head_norm", eps=c.norm_eps, affine=not adaptive)(x)
        if adaptive:
            parts = dense(2 * c.width, ("width", "modulation"), name="head_modulation", dtype="float32", zero=True)(
                condition
            )
            x = modulate(x, *expand_levels(parts.reshape(*timesteps.shape, 2, c.width), one_hot))
        out_dim = c.patch_size**2 * c.out_channels
        x = dense(out_dim, ("width", "patch"), name="head", dtype="float32", zero=True)(x)
        return without_padding(jnp.where(segment_ids[..., None] <= num_segments, x, jnp.nan), segment_ids)

    def on_images(
        self,
        x: Float[Array, "batch height width channels"],
        timesteps: Float[Array, " timesteps"],
        labels: Int[Array, " labels"],
    ) -> Float[Array, "batch height width out"]:
        """Computes the network's output for equal images, each a row of its own (the official code's call).

        Args:
            x: (B, H, W, in_channels), noised, of any H and W that patches fill.
            timesteps: (B,), see `__call__`.
            labels: (B,), see `__call__`.

        Returns:
            (B, H, W, out_channels) float32: the prediction, then, with `learned_variance`, the variance's place in
            [-1, 1].

        Raises:
            ValueError: images that patches do not fill or of other channels, or timesteps or labels that are not one
                for each image.
        """
        c = self.config
        batch, height, width, channels = x.shape
        if channels != c.in_channels or height % c.patch_size or width % c.patch_size:
            raise ValueError(
                f"x must be (B, H, W, {c.in_channels}) with H and W multiples of patch_size {c.patch_size}, got shape "
                f"{tuple(x.shape)}."
            )
        for name, values in (("timesteps", timesteps), ("labels", labels)):
            if tuple(values.shape) != (batch,):
                raise ValueError(f"{name} must be one for each of {batch} images, got shape {tuple(values.shape)}.")
        patch_size = (1, c.patch_size, c.patch_size)  # an image is a clip of one frame
        patches = jax.vmap(functools.partial(patchify, patch_size=patch_size))(x[:, None])  # (B, L, P)
        grid = (height // c.patch_size, width // c.patch_size)
        places = jnp.stack(jnp.meshgrid(jnp.arange(1), *map(jnp.arange, grid), indexing="ij"), axis=-1).reshape(-1, 3)
        positions = jnp.broadcast_to(places.astype(jnp.float32), (batch, *places.shape))
        segment_ids = jnp.ones(patches.shape[:2], jnp.int32)
        out = self(patches, positions, segment_ids, timesteps[:, None], labels[:, None])
        whole = functools.partial(
            unpatchify, num_frames=1, height=height, width=width, patch_size=patch_size, channels=c.out_channels
        )
        return jax.vmap(whole)(out)[:, 0]

    def _embed(
        self, timesteps: Float[Array, "batch segments"], labels: Int[Array, "batch segments"]
    ) -> tuple[Float[Array, "batch segments width"], Float[Array, "batch segments width"]]:
        """Returns the embeddings of equation 2 in float32: they are small, and every token depends on them."""
        c = self.config
        normal = nn.initializers.normal(0.02)
        h = sinusoidal_embedding(timesteps, c.frequency_dim, endpoint=c.frequency_endpoint)
        h = dense(c.width, ("features", "width"), name="time_fc1", dtype="float32", init=normal)(h)
        time = dense(c.width, ("width", "conditioning"), name="time_fc2", dtype="float32", init=normal)(jax.nn.silu(h))
        init = nn.with_logical_partitioning(normal, ("classes", "width"))
        num_rows = c.num_classes + c.has_null_class
        table = self.param("label_embedding", init, (num_rows, c.width), jnp.float32)
        labels = jnp.where(labels < 0, c.num_classes, labels)
        return time, jnp.take(table, labels, axis=0, mode="fill", fill_value=jnp.nan)

    def _sublayers(self) -> tuple[Sublayer, ...]:
        """Returns the sublayers of a block."""
        c = self.config
        adaptive = c.conditioning in ("adaln", "adaln_zero")
        options = dict(affine=not adaptive, modulated=adaptive, gated=c.conditioning == "adaln_zero")
        heads = dict(num_heads=c.num_heads, eps=c.norm_eps, dtype=c.dtype, qk_norm="none")
        attention = functools.partial(SelfAttention, **heads, attention=self.attention_fn, fused_init=True)
        mixers = {"self_attention": attention}
        if c.conditioning == "cross_attention":
            # Two keys an image: no block of them is worth skipping, and a kernel built for a mesh takes only long rows.
            mixers["cross_attention"] = functools.partial(CrossAttention, **heads, attention=xla_attention)
        mixers["mlp"] = functools.partial(FeedForward, c.mlp_dim, c.dtype)
        return tuple(Sublayer(name, mixer, **options) for name, mixer in mixers.items())


def sincos_positions(places: Float[Array, "*batch 2"], width: int) -> Float[Array, "*batch width"]:
    """Returns the fixed embedding of places, as the official code has it (there after MAE, arXiv:2111.06377).

    A coordinate p has the D / 4 angles p 10000^(-4 i / D), i = 0 ... D / 4 - 1. The embedding is the sines and then
    the cosines of x, which stands first, and then those of y.

    Args:
        places: (..., 2), (y, x) in patches.
        width: D, a multiple of 4.

    Returns:
        (..., D) float32.
    """
    cosines, sines = jnp.split(sinusoidal_embedding(places, width // 2), 2, axis=-1)  # (..., 2, D / 4) each
    by_axis = jnp.concatenate([sines, cosines], axis=-1)[..., ::-1, :]  # x, then y
    return by_axis.reshape(*places.shape[:-1], width)


def split_output(
    output: Float[Array, "*batch out"], config: DiTConfig
) -> tuple[Float[Array, "*batch values"], Float[Array, "*batch values"]]:
    """Takes the output for patches apart into prediction and variance's place, each in the order of the patches.

    Args:
        output: (..., patch_size^2 * 2 in_channels), of a model with `learned_variance`.
        config: of the model.

    Returns:
        Two arrays (..., patch_size^2 in_channels): the prediction, and the place of the variance in [-1, 1].
    """
    cells = output.reshape(*output.shape[:-1], config.patch_size**2, 2, config.in_channels)
    return tuple(cells[..., n, :].reshape(*output.shape[:-1], -1) for n in range(2))


def num_params(config: DiTConfig) -> int:
    """Returns the number of trained parameters of a `DiT`, without allocating them."""
    shapes = abstract_params(DiT(config))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def num_table_params(config: DiTConfig) -> int:
    """Returns the size of the fixed table of positions, which the official code counts among its parameters.

    Here there is no table: positions are computed.
    """
    return math.prod(config.grid) * config.width


def init_params(model: DiT, key: jax.Array) -> dict:
    """Returns freshly drawn parameters, boxed with their logical axes; a row of eight tokens suffices for shapes."""
    # They do not depend on the kernel, and one that is built for a mesh takes no single row.
    model = model.clone(attention_fn=xla_attention)
    patch_dim = model.config.patch_size**2 * model.config.in_channels
    patches, positions = jnp.zeros((1, 8, patch_dim)), jnp.zeros((1, 8, 3))
    labels = jnp.zeros((1, 1), jnp.int32)
    return model.init(key, patches, positions, jnp.ones((1, 8), jnp.int32), jnp.zeros((1, 1)), labels)["params"]


def abstract_params(model: DiT) -> dict:
    """Returns the shapes and logical axes of the parameters, without allocating them."""
    return jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))
