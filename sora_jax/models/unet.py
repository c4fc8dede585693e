"""The U-Net of DDPM (arXiv:2006.11239, appendix B) and its loader.

Levels halve the image. Each has residual blocks that take in the timestep and, at some levels, attention among all
pixels behind each block. On the way up, every block also takes in what the way down put out at the same place:

    down  x_0 -> blocks -> stride 2 -> blocks -> ...       each x is pushed
    mid   block, attention, block
    up    ... -> blocks -> twice as large -> blocks        each x is joined with what is popped

The network is the `UNet2DModel` of diffusers as the published checkpoints `google/ddpm-*` configure it, so that their
weights load by renaming and transposing alone (`sora_jax.convert.ddpm`). A model is a directory of
`model.safetensors` and `config.json`, made by `experiments/convert_checkpoint.py ddpm`.

Initialisation is DDPM's: Glorot's, and zeros where a residual branch or the network ends (its code has 1e-10 there).
"""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar, Literal

import einops
import jax
import jax.numpy as jnp
from flax import linen as nn

from sora_jax.array_types import Array, Float, Int
from sora_jax.config import check
from sora_jax.models.attention import xla_attention
from sora_jax.models.layers import conv, dense, group_norm, sinusoidal_embedding


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """Size and computation of a `UNet`; the defaults are DDPM's for CIFAR-10 (32x32, attention at 16x16).

    Attributes:
        in_channels: values of a pixel.
        out_channels: values that are predicted for a pixel.
        width: channels of the first level.
        multipliers: channels of each level as multiples of `width`, finest level first.
        num_blocks: residual blocks of a level on the way down; on the way up it has one more.
        attention_levels: levels with attention, ascending, 0 for the finest. Between the ways there always is one.
        num_groups: of the group norms.
        norm_eps: epsilon of every norm.
        dropout: share of the values dropped in a residual block, in training.
        dtype: of the computation; parameters, norms, softmax and the embedding of time stay float32.
    """

    kind: ClassVar[str] = "unet"
    takes_images: ClassVar[Literal[True]] = True

    in_channels: int = 3
    out_channels: int = 3
    width: int = 128
    multipliers: tuple[int, ...] = (1, 2, 2, 2)
    num_blocks: int = 2
    attention_levels: tuple[int, ...] = (1,)
    num_groups: int = 32
    norm_eps: float = 1e-6
    dropout: float = 0.1
    dtype: Literal["float32", "bfloat16"] = "float32"

    def network(self) -> UNet:
        """Returns the network."""
        return UNet(self)

    def __post_init__(self) -> None:
        for field in ("in_channels", "out_channels", "num_blocks", "num_groups"):
            check(getattr(self, field) >= 1, self, field, "at least 1")
        check(self.width >= 4 and self.width % 2 == 0, self, "width", "even and at least 4")
        check(self.width % self.num_groups == 0, self, "num_groups", f"a divisor of width {self.width}")
        positive = len(self.multipliers) >= 1 and all(n >= 1 for n in self.multipliers)
        check(positive, self, "multipliers", "one number, at least 1, for each of one or more levels")
        levels = tuple(level for level in range(len(self.multipliers)) if level in self.attention_levels)
        last = len(self.multipliers) - 1
        check(self.attention_levels == levels, self, "attention_levels", f"ascending levels between 0 and {last}")
        check(self.norm_eps > 0, self, "norm_eps", "positive")
        check(0 <= self.dropout < 1, self, "dropout", "at least 0 and below 1")

    @property
    def size_multiple(self) -> int:
        """What height and width of an image must be multiples of."""
        return 2 ** (len(self.multipliers) - 1)


class ResidualBlock(nn.Module):
    """x + conv(dropout(silu(norm(conv(silu(norm(x))) + dense(time))))), with x projected where channels change.

    Attributes:
        features: channels of the output.
        config: of the network.
    """

    features: int
    config: UNetConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch height width channels"], time: Float[Array, "batch time"], deterministic: bool
    ) -> Float[Array, "batch height width features"]:
        """Returns (B, H, W, features)."""
        c, axes = self.config, ("width", "channels")
        norm = functools.partial(group_norm, num_groups=c.num_groups, eps=c.norm_eps)
        h = jax.nn.silu(norm(name="norm1")(x)).astype(c.dtype)
        h = conv(self.features, axes, name="conv1", dtype=c.dtype)(h)
        shift = dense(self.features, ("width", "modulation"), name="time_projection", dtype="float32")(
            time
        )  # (B, features)
        h = jax.nn.silu(norm(name="norm2")(h + shift[:, None, None])).astype(c.dtype)
        h = nn.Dropout(c.dropout, deterministic=deterministic)(h)
        h = conv(self.features, axes, name="conv2", dtype=c.dtype, zero=True)(h)
        if x.shape[-1] != self.features:
            x = dense(self.features, axes, name="shortcut", dtype=c.dtype)(x)
        return x + h


class PixelAttention(nn.Module):
    """x + attention among all pixels of norm(x), with one head as wide as a pixel.

    Attributes:
        config: of the network.
    """

    config: UNetConfig

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch height width channels"]:
        """Returns (B, H, W, C)."""
        c = self.config
        h = group_norm(name="norm", num_groups=c.num_groups, eps=c.norm_eps)(x).astype(c.dtype)
        h = einops.rearrange(h, "b h w c -> b (h w) 1 c")  # (B, L, 1, C)
        q, k, v = (
            dense(x.shape[-1], ("width", "heads_width"), name=name, dtype=c.dtype)(h)
            for name in ("query", "key", "value")
        )
        segment_ids = jnp.ones(h.shape[:2], jnp.int32)  # an image is one segment
        h = xla_attention(q, k, v, segment_ids, segment_ids).reshape(x.shape)
        return x + dense(x.shape[-1], ("heads_width", "width"), name="out", dtype=c.dtype, zero=True)(h)


class UNet(nn.Module):
    """Predicts, for each pixel of a noised image, what it is trained to (DDPM: the noise).

    Attributes:
        config: size and computation.
    """

    config: UNetConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch height width channels"],
        timesteps: Float[Array, " steps"] | Int[Array, " steps"],
        deterministic: bool = True,
    ) -> Float[Array, "batch height width out"]:
        """Computes the network's output.

        Args:
            x: (B, H, W, in_channels), noised images whose clean values are in [-1, 1].
            timesteps: (B,), 0 for the least noisy step, up to the number of steps less 1 (DDPM: 999).
            deterministic: without dropout; else `apply` needs the rng `dropout`.

        Returns:
            (B, H, W, out_channels) float32.

        Raises:
            ValueError: images or timesteps of another shape.
        """
        c = self.config
        self._check_shapes(x.shape, timesteps.shape)
        last = len(c.multipliers) - 1

        # Time in float32: it is small, and every pixel depends on it.
        time = sinusoidal_embedding(timesteps.astype(jnp.float32), c.width, endpoint=True)
        time = jnp.roll(time, c.width // 2, axis=-1)  # DDPM has sines first
        time = dense(4 * c.width, ("features", "width"), name="time_fc1", dtype="float32")(time)
        time = dense(4 * c.width, ("width", "conditioning"), name="time_fc2", dtype="float32")(jax.nn.silu(time))
        time = jax.nn.silu(time)  # (B, 4 width)

        def block(x: Array, level: int, name: str) -> Array:
            return ResidualBlock(c.width * c.multipliers[level], c, name=name)(x, time, deterministic)

        def resample(x: Array, name: str, **how: int | tuple[int, int]) -> Array:
            return conv(x.shape[-1], ("width", "channels"), name=name, dtype=c.dtype, **how)(x)

        x = conv(c.width, ("patch", "width"), name="conv_in", dtype=c.dtype)(x.astype(c.dtype))
        skips = [x]
        for level in range(last + 1):
            for n in range(c.num_blocks):
                x = block(x, level, f"down_{level}_block_{n}")
                if level in c.attention_levels:
                    x = PixelAttention(c, name=f"down_{level}_attention_{n}")(x)
                skips.append(x)
            if level < last:
                # TensorFlow's SAME padding of a stride of 2: a row and a column of zeros behind, none before.
                x = resample(x, f"down_{level}_downsample", stride=2, padding=(0, 1))
                skips.append(x)

        x = block(x, last, "mid_block_0")
        x = PixelAttention(c, name="mid_attention")(x)
        x = block(x, last, "mid_block_1")

        for level in reversed(range(last + 1)):
            for n in range(c.num_blocks + 1):
                x = block(jnp.concatenate([x, skips.pop()], axis=-1), level, f"up_{level}_block_{n}")
                if level in c.attention_levels:
                    x = PixelAttention(c, name=f"up_{level}_attention_{n}")(x)
            if level > 0:
                x = einops.repeat(x, "b h w c -> b (h i) (w j) c", i=2, j=2)  # nearest
                x = resample(x, f"up_{level}_upsample")

        x = jax.nn.silu(group_norm(name="norm_out", num_groups=c.num_groups, eps=c.norm_eps)(x))
        return conv(c.out_channels, ("width", "patch"), name="conv_out", dtype="float32", zero=True)(x)

    def _check_shapes(self, x: tuple[int, ...], timesteps: tuple[int, ...]) -> None:
        channels, multiple = self.config.in_channels, self.config.size_multiple
        if len(x) != 4 or x[-1] != channels or x[1] % multiple or x[2] % multiple:
            raise ValueError(
                f"x must be (B, H, W, {channels}) with H and W multiples of {multiple}, got shape {tuple(x)}."
            )
        if tuple(timesteps) != tuple(x[:1]):
            raise ValueError(f"timesteps must be one for each of {x[0]} images, got shape {tuple(timesteps)}.")


def init_params(model: UNet, key: jax.Array) -> dict:
    """Returns freshly drawn parameters, boxed with their logical axes."""
    size = model.config.size_multiple
    return model.init(key, jnp.zeros((1, size, size, model.config.in_channels)), jnp.zeros(1))["params"]


def abstract_params(model: UNet) -> dict:
    """Returns the shapes and logical axes of the parameters, without allocating them."""
    return jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))
