"""What a codec asks of an autoencoder's network, of images or of videos (`sora_jax.models.autoencoder.codec`)."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from sora_jax.array_types import Array, Float


class Posterior(NamedTuple):
    """A normal distribution over latents, diagonal: what an encoder says of an image or a clip.

    Attributes:
        mean: (..., latent_channels) float32.
        logvar: (..., latent_channels) float32, logarithm of the variance.
    """

    mean: Float[Array, "*batch latent"]
    logvar: Float[Array, "*batch latent"]

    @property
    def std(self) -> Float[Array, "*batch latent"]:
        """The standard deviation, exp(logvar / 2)."""
        return jnp.exp(0.5 * self.logvar)

    def sample(self, key: jax.Array) -> Float[Array, "*batch latent"]:
        """Returns mean + std * noise, with unit normal noise from `key` (arXiv:1312.6114, Eq. 10)."""
        return self.mean + self.std * jax.random.normal(key, self.mean.shape, self.mean.dtype)


@runtime_checkable
class Autoencoder(Protocol):
    """A linen module with two methods: `apply({"params": params}, x, method="encode")`, and the same of `decode`.

    Latents of both are unscaled: `posterior.sample(key) * config.scaling_factor` is what a diffusion model sees, and
    what it makes is divided by the factor before it is decoded.
    """

    config: Any

    def encode(self, x: Float[Array, "batch *size channels"]) -> Posterior:
        """Returns the posterior of images (B, H, W, C) or clips (B, T, H, W, C) with values in [-1, 1]."""
        ...

    def decode(self, z: Float[Array, "batch *size latent"]) -> Float[Array, "batch *full_size channels"]:
        """Returns the images or clips, float32, of unscaled latents; values may leave [-1, 1] a little."""
        ...
