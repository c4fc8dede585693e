"""The multi-scale convolution of arXiv:1503.03585 (appendix D.2): small, without attention, with time as bumps.

A layer looks at the image at several scales at once and adds up what it sees:

(1)  multiscale(x) = sum_s up_s(conv_s(mean_pool_s(x))),   s = 1, 2, 4 ...

Behind the layers, dense layers on each pixel give for each value that is predicted J numbers y_j, the readout of time:

(2)  out(t) = sum_j y_j g_j(t),   g_j(t) = exp(-(t - tau_j)^2 / 2 w^2) / sum_k exp(-(t - tau_k)^2 / 2 w^2)

with centres tau_j spaced evenly over the steps and w their distance. On a schedule that is evenly spaced in log SNR
these are bumps in log SNR.

Beyond the paper: the layers are residual and SiLU stands for softplus; a layer's input is shifted and scaled by
functions of time that are themselves mixtures of the bumps, unless `modulated` is false; the readout sees the noised
image too, so that a share of it, which depends on time, passes as it is. What is put out is what the trainer asks for,
a prediction and the place of the variance between its bounds, rather than the paper's own mean and covariance.
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
from sora_jax.models.layers import conv, dense


@dataclasses.dataclass(frozen=True)
class MultiscaleConfig:
    """Size and computation of a `MultiscaleConvolution`.

    Attributes:
        in_channels: values of a pixel.
        out_channels: values that are predicted for a pixel; twice as many where the variance is learned.
        width: channels of the layers.
        num_layers: multi-scale convolutions behind the first, each in a residual branch.
        num_scales: scales 1, 2, 4 ... of a multi-scale convolution.
        num_dense: dense layers on each pixel before the readout.
        num_bumps: J of equation 2.
        num_steps: T, over whose steps 0 ... T - 1 the bumps are spread.
        modulated: the layers are conditioned on time, too.
        dtype: of the computation; parameters, time and the readout stay float32.
    """

    kind: ClassVar[str] = "multiscale"
    takes_images: ClassVar[Literal[True]] = True

    in_channels: int = 1
    out_channels: int = 2
    width: int = 32
    num_layers: int = 4
    num_scales: int = 3
    num_dense: int = 1
    num_bumps: int = 16
    num_steps: int = 500
    modulated: bool = True
    dtype: Literal["float32", "bfloat16"] = "float32"

    def network(self) -> MultiscaleConvolution:
        """Returns the network."""
        return MultiscaleConvolution(self)

    def __post_init__(self) -> None:
        for field in ("in_channels", "out_channels", "width", "num_layers", "num_scales", "num_dense"):
            check(getattr(self, field) >= 1, self, field, "at least 1")
        for field in ("num_bumps", "num_steps"):
            check(getattr(self, field) >= 2, self, field, "at least 2")

    @property
    def size_multiple(self) -> int:
        """What height and width of an image must be multiples of."""
        return 2 ** (self.num_scales - 1)


def bumps(steps: Float[Array, " batch"], num_bumps: int, num_steps: int) -> Float[Array, "batch bumps"]:
    """Returns g_j of equation 2: (B, J) float32, positive, of sum 1.

    Args:
        steps: (B,), 0 ... num_steps - 1.
        num_bumps: J, at least 2.
        num_steps: T, at least 2.
    """
    width = (num_steps - 1) / (num_bumps - 1)
    centres = width * jnp.arange(num_bumps, dtype=jnp.float32)
    return jax.nn.softmax(-(((steps[:, None] - centres) / width) ** 2) / 2, axis=-1)


class MultiscaleLayer(nn.Module):
    """Equation 1.

    Attributes:
        features: channels of the output.
        num_scales: scales 1, 2, 4 ...
        axes: logical axes of the kernels.
        dtype: of the computation.
        zero: starts with zero kernels.
    """

    features: int
    num_scales: int
    axes: tuple[str, str]
    dtype: str
    zero: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch height width features"]:
        """Returns (B, H, W, features); H and W must be multiples of the largest scale."""
        total = 0
        for n in range(self.num_scales):
            scale = 2**n
            h = einops.reduce(x, "b (h i) (w j) c -> b h w c", "mean", i=scale, j=scale)
            h = conv(self.features, self.axes, name=f"scale_{scale}", dtype=self.dtype, zero=self.zero)(h)
            total += einops.repeat(h, "b h w c -> b (h i) (w j) c", i=scale, j=scale)  # nearest
        return total


class MultiscaleConvolution(nn.Module):
    """Predicts, for each pixel of a noised image, what it is trained to.

    Attributes:
        config: size and computation.
    """

    config: MultiscaleConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "batch height width channels"],
        steps: Float[Array, " steps"] | Int[Array, " steps"],
        deterministic: bool = True,
    ) -> Float[Array, "batch height width out"]:
        """Computes the network's output; a fresh network puts out zeros.

        Args:
            x: (B, H, W, in_channels), noised images of about unit variance.
            steps: (B,), 0 for the least noisy step, up to `num_steps` less 1.
            deterministic: accepted like that of other networks; this one draws nothing.

        Returns:
            (B, H, W, out_channels) float32.

        Raises:
            ValueError: images or steps of another shape.
        """
        c = self.config
        if x.ndim != 4 or x.shape[-1] != c.in_channels or x.shape[1] % c.size_multiple or x.shape[2] % c.size_multiple:
            raise ValueError(
                f"x must be (B, H, W, {c.in_channels}) with H and W multiples of {c.size_multiple}, "
                f"got shape {tuple(x.shape)}."
            )
        if steps.shape != x.shape[:1]:
            raise ValueError(f"steps must be one for each of {len(x)} images, got shape {tuple(steps.shape)}.")
        time = bumps(steps.astype(jnp.float32), c.num_bumps, c.num_steps)  # (B, J)
        layer = functools.partial(MultiscaleLayer, c.width, c.num_scales, dtype=c.dtype)

        h = layer(("patch", "width"), name="layer_in")(x.astype(c.dtype))
        for n in range(c.num_layers):
            branch = h
            if c.modulated:
                both = dense(2 * c.width, ("features", "width"), name=f"time_{n}", dtype="float32")(time)
                shift, scale = jnp.split(both[:, None, None].astype(c.dtype), 2, axis=-1)  # (B, 1, 1, width)
                branch = branch * (1 + scale) + shift
            h = h + layer(("width", "channels"), name=f"layer_{n}")(jax.nn.silu(branch)) / c.num_layers**0.5
        for n in range(c.num_dense):
            h = jax.nn.silu(dense(2 * c.width, ("width", "mlp"), name=f"dense_{n}", dtype=c.dtype)(h))

        h = jnp.concatenate([h.astype(jnp.float32), x.astype(jnp.float32)], axis=-1)
        y = dense(c.num_bumps * c.out_channels, ("mlp", "patch"), name="readout", dtype="float32", zero=True)(h)
        y = einops.rearrange(y, "b h w (j c) -> b h w j c", j=c.num_bumps)
        return jnp.einsum("bhwjc,bj->bhwc", y, time)
