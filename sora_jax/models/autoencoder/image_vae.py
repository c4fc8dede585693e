"""The image autoencoder of latent diffusion (arXiv:2112.10752) as Stable Diffusion and DiT have it, and its loader.

A variational autoencoder (arXiv:1312.6114): the encoder halves the image at each level but the last and gives mean and
log variance of each latent cell, the decoder mirrors it. Neither has skips, so both are a list of layers:

    encoder  conv_in, levels of residual blocks and a stride of 2, mid block, out, quant
    decoder  post_quant, conv_in, mid block, levels of residual blocks and an upsampling, out
    mid      residual block, attention among all cells, residual block

The network is the `AutoencoderKL` of diffusers as `stabilityai/sd-vae-ft-mse` and `-ema` configure it, so that their
weights load by renaming and transposing alone (`sora_jax.convert.sd_vae`). A model is a directory of
`model.safetensors` and `config.json`, made by `experiments/convert_checkpoint.py sd-vae`.

Every group norm takes its moments over the whole image, unless the collection `moments` holds others; and it shows its
input in the collection `intermediates`. `sora_jax.models.autoencoder.tiling` works by these two.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import ClassVar, Literal

import einops
import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from sora_jax.array_types import Array, Float
from sora_jax.config import check
from sora_jax.models.attention import xla_attention
from sora_jax.models.autoencoder.protocol import Posterior
from sora_jax.models.layers import conv, dense

LOGVAR_RANGE = (-30.0, 20.0)
"""What the log variance of a posterior is clipped to, as in latent diffusion's code."""

_MAX_SCORES = 2**24  # of an image's attention, at once: 64 MiB in float32, all those of an image of 512 x 512


@dataclasses.dataclass(frozen=True)
class ImageVAEConfig:
    """Size and computation of an `ImageVAE`; the defaults are Stable Diffusion's (83,653,863 parameters).

    Attributes:
        channels: values of a pixel.
        latent_channels: values of a latent cell.
        widths: channels of each level, finest level first; each but the last halves the image.
        num_blocks: residual blocks of a level of the encoder; the decoder's have one more.
        num_groups: of the group norms.
        norm_eps: epsilon of every norm.
        scaling_factor: a diffusion model is trained on latents times this number.
        dtype: of the computation; parameters, norms, softmax and the layers that put out stay float32.
    """

    kind: ClassVar[str] = "image_vae"

    channels: int = 3
    latent_channels: int = 4
    widths: tuple[int, ...] = (128, 256, 512, 512)
    num_blocks: int = 2
    num_groups: int = 32
    norm_eps: float = 1e-6
    scaling_factor: float = 0.18215
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        for field in ("channels", "latent_channels", "num_blocks", "num_groups"):
            check(getattr(self, field) >= 1, self, field, "at least 1")
        divisible = len(self.widths) >= 1 and all(n >= 1 and n % self.num_groups == 0 for n in self.widths)
        check(divisible, self, "widths", f"one multiple of num_groups {self.num_groups} for each of one or more levels")
        check(self.norm_eps > 0, self, "norm_eps", "positive")
        check(self.scaling_factor > 0, self, "scaling_factor", "positive")

    @property
    def strides(self) -> tuple[int, int, int]:
        """(1, s, s): pixels along the sides of the square that a latent cell stands for, one frame."""
        return (1, 2 ** (len(self.widths) - 1), 2 ** (len(self.widths) - 1))


class GroupNorm(nn.Module):
    """A group norm (arXiv:1803.08494) in float32 over a group of channels and the whole image.

    Where the image is a tile of a larger one, the moments of that one are given in the collection `moments`: `mean`
    and `var`, (B, groups) float32.

    Attributes:
        config: of the network.
    """

    config: ImageVAEConfig

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch height width channels"]:
        """Returns (B, H, W, C) of the config's dtype."""
        c, num_channels = self.config, x.shape[-1]
        scale_init = nn.with_logical_partitioning(nn.initializers.ones_init(), ("width",))
        bias_init = nn.with_logical_partitioning(nn.initializers.zeros_init(), ("width",))
        scale = self.param("scale", scale_init, (num_channels,))
        bias = self.param("bias", bias_init, (num_channels,))
        self.sow("intermediates", "input", x)
        groups = einops.rearrange(x.astype(jnp.float32), "b h w (g c) -> b h w g c", g=c.num_groups)
        if self.has_variable("moments", "mean"):
            mean, var = (self.get_variable("moments", name)[:, None, None, :, None] for name in ("mean", "var"))
        else:
            mean = groups.mean((1, 2, 4), keepdims=True)
            var = jnp.square(groups - mean).mean((1, 2, 4), keepdims=True)
        normed = (groups - mean) * lax.rsqrt(var + c.norm_eps)
        return (normed.reshape(x.shape) * scale + bias).astype(c.dtype)


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with x projected where channels change.

    Attributes:
        features: channels of the output.
        config: of the network.
    """

    features: int
    config: ImageVAEConfig
    NORMS: ClassVar[tuple[str, ...]] = ("norm1", "norm2")

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch height width features"]:
        """Returns (B, H, W, features)."""
        c, axes = self.config, ("width", "channels")
        h = jax.nn.silu(GroupNorm(c, name="norm1")(x))
        h = conv(self.features, axes, name="conv1", dtype=c.dtype)(h)
        h = jax.nn.silu(GroupNorm(c, name="norm2")(h))
        h = conv(self.features, axes, name="conv2", dtype=c.dtype)(h)
        if x.shape[-1] != self.features:
            x = dense(self.features, axes, name="shortcut", dtype=c.dtype)(x)
        return x + h


class CellAttention(nn.Module):
    """x + attention among all cells of norm(x), with one head as wide as a cell.

    A row of cells after another asks, so that the scores of a large image are never held together.

    Attributes:
        config: of the network.
    """

    config: ImageVAEConfig

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch height width channels"]:
        """Returns (B, H, W, C)."""
        c, (batch, height, width, features) = self.config, x.shape
        h = GroupNorm(c, name="norm")(x)
        q, k, v = (
            dense(features, ("width", "heads_width"), name=name, dtype=c.dtype)(h) for name in ("query", "key", "value")
        )
        k, v = (einops.rearrange(part, "b h w c -> b (h w) 1 c") for part in (k, v))
        ids = jnp.ones((batch, height * width), jnp.int32)  # an image is one segment

        def attend(row: Float[Array, "batch width features"]) -> Float[Array, "batch width 1 features"]:
            return xla_attention(row[:, :, None], k, v, ids[:, :width], ids)

        rows_at_once = max(1, min(height, _MAX_SCORES // (height * width * width)))
        h = lax.map(attend, einops.rearrange(q, "b h w c -> h b w c"), batch_size=rows_at_once)
        h = einops.rearrange(h, "h b w 1 c -> b h w c")
        return x + dense(features, ("heads_width", "width"), name="out", dtype=c.dtype)(h)


class Downsample(nn.Module):
    """A convolution with a stride of 2 and zeros behind each side, none before.

    Attributes:
        config: of the network.
    """

    config: ImageVAEConfig

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch h w channels"]:
        """Returns (B, H / 2, W / 2, C)."""
        layer = functools.partial(conv, x.shape[-1], ("width", "channels"), name="conv", dtype=self.config.dtype)
        return layer(stride=2, padding=(0, 1))(x)


class Upsample(nn.Module):
    """Every cell four times, then a convolution.

    Attributes:
        config: of the network.
    """

    config: ImageVAEConfig

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch h w channels"]:
        """Returns (B, 2 H, 2 W, C)."""
        x = einops.repeat(x, "b h w c -> b (h i) (w j) c", i=2, j=2)  # nearest
        return conv(x.shape[-1], ("width", "channels"), name="conv", dtype=self.config.dtype)(x)


class Out(nn.Module):
    """conv(silu(norm(x))), the convolution in float32.

    Attributes:
        features: channels of the output.
        config: of the network.
    """

    features: int
    config: ImageVAEConfig
    NORMS: ClassVar[tuple[str, ...]] = ("norm",)

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch height width features"]:
        """Returns (B, H, W, features) float32."""
        x = jax.nn.silu(GroupNorm(self.config, name="norm")(x))
        return conv(self.features, ("width", "patch"), name="conv", dtype="float32")(x)


def _mid_layers(config: ImageVAEConfig) -> list[nn.Module]:
    width = config.widths[-1]
    return [
        ResidualBlock(width, config, name="mid_block_0"),
        CellAttention(config, name="mid_attention"),
        ResidualBlock(width, config, name="mid_block_1"),
    ]


def encoder_layers(config: ImageVAEConfig) -> list[nn.Module]:
    """Returns the layers from images to the 2 x latent_channels values of the posterior, in order."""
    layers = [conv(config.widths[0], ("patch", "width"), name="conv_in", dtype=config.dtype)]
    for level, width in enumerate(config.widths):
        blocks = [ResidualBlock(width, config, name=f"down_{level}_block_{n}") for n in range(config.num_blocks)]
        layers += blocks
        if level < len(config.widths) - 1:
            layers.append(Downsample(config, name=f"down_{level}_downsample"))
    moments = 2 * config.latent_channels
    out = [
        Out(moments, config, name="out"),
        dense(moments, ("patch", "patch"), name="quant", dtype="float32"),
    ]
    return [*layers, *_mid_layers(config), *out]


def decoder_layers(config: ImageVAEConfig) -> list[nn.Module]:
    """Returns the layers from latents to images, in order; levels are counted from the finest, as in the encoder."""
    layers = [
        dense(config.latent_channels, ("patch", "patch"), name="post_quant", dtype="float32"),
        conv(config.widths[-1], ("patch", "width"), name="conv_in", dtype=config.dtype),
        *_mid_layers(config),
    ]
    for level, width in reversed(list(enumerate(config.widths))):
        blocks = [ResidualBlock(width, config, name=f"up_{level}_block_{n}") for n in range(config.num_blocks + 1)]
        layers += blocks
        if level > 0:
            layers.append(Upsample(config, name=f"up_{level}_upsample"))
    return [*layers, Out(config.channels, config, name="out")]


class Stack(nn.Module):
    """Layers one after another.

    Attributes:
        layers: makes them.
        config: of the network.
    """

    layers: Callable[[ImageVAEConfig], list[nn.Module]]
    config: ImageVAEConfig

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch h w out"]:
        """Returns what the last layer puts out."""
        for layer in self.layers(self.config):
            x = layer(x)
        return x


class ImageVAE(nn.Module):
    """Images to posteriors over latents and latents to images; an `Autoencoder`.

    Attributes:
        config: size and computation.
    """

    config: ImageVAEConfig

    def setup(self) -> None:
        """Makes encoder and decoder."""
        self.encoder = Stack(encoder_layers, self.config)
        self.decoder = Stack(decoder_layers, self.config)

    def encode(self, x: Float[Array, "batch height width channels"]) -> Posterior:
        """Returns the posterior over the latents of images.

        Args:
            x: (B, H, W, channels), values in [-1, 1].

        Returns:
            Mean and log variance, (B, H / s, W / s, latent_channels) float32, of unscaled latents; the log variance is
            clipped to `LOGVAR_RANGE`.

        Raises:
            ValueError: images of another shape.
        """
        check_image_shape(x.shape, self.config)
        return to_posterior(self.encoder(x))

    def decode(
        self, z: Float[Array, "batch height width latent"]
    ) -> Float[Array, "batch image_height image_width channels"]:
        """Returns the images of latents.

        Args:
            z: (B, h, w, latent_channels), unscaled.

        Returns:
            (B, h s, w s, channels) float32; of images in [-1, 1] it may leave that range a little.

        Raises:
            ValueError: latents of another shape.
        """
        check_latent_shape(z.shape, self.config)
        return self.decoder(z)

    def __call__(
        self, x: Float[Array, "batch height width channels"]
    ) -> tuple[Posterior, Float[Array, "batch height width channels"]]:
        """Returns the posterior of images, and the images of its mean."""
        posterior = self.encode(x)
        return posterior, self.decode(posterior.mean)


def to_posterior(values: Float[Array, "batch height width moments"]) -> Posterior:
    """Returns the posterior that the encoder's last layer puts out: means, then log variances, which are clipped."""
    mean, logvar = jnp.split(values, 2, axis=-1)
    return Posterior(mean, jnp.clip(logvar, *LOGVAR_RANGE))


def check_image_shape(shape: tuple[int, ...], config: ImageVAEConfig) -> None:
    """Raises ValueError unless `shape` is (B, H, W, channels) with sides that `config.strides` divide."""
    multiple = config.strides[-1]
    if len(shape) != 4 or shape[-1] != config.channels or shape[1] % multiple or shape[2] % multiple:
        raise ValueError(
            f"x must be (B, H, W, {config.channels}) with H and W multiples of {multiple}, got shape {tuple(shape)}."
        )


def check_latent_shape(shape: tuple[int, ...], config: ImageVAEConfig) -> None:
    """Raises ValueError unless `shape` is (B, h, w, latent_channels)."""
    if len(shape) != 4 or shape[-1] != config.latent_channels:
        raise ValueError(f"z must be (B, h, w, {config.latent_channels}), got shape {tuple(shape)}.")


def init_params(model: ImageVAE, key: jax.Array) -> dict:
    """Returns freshly drawn parameters, boxed with their logical axes."""
    size = model.config.strides[-1]
    return model.init(key, jnp.zeros((1, size, size, model.config.channels)))["params"]


def abstract_params(model: ImageVAE) -> dict:
    """Returns the shapes and logical axes of the parameters, without allocating them."""
    return jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))
