"""Layers that every model shares: dense layers and norms that name their logical axes, embeddings, modulation."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from sora_jax.array_types import Array, Float


def dense(
    features: int,
    axes: tuple[str, str],
    *,
    name: str,
    dtype: str,
    zero: bool = False,
    bias: bool = True,
    init: nn.initializers.Initializer | None = None,
) -> nn.Dense:
    """Returns a dense layer, which computes one product of all tokens.

    Args:
        features: size of the output.
        axes: logical axes of its kernel (input, output).
        name: of its parameters.
        dtype: of the computation.
        zero: starts with a zero kernel instead of Glorot's uniform one.
        bias: whether it has one.
        init: how its kernel starts, where that is neither zero nor Glorot's uniform one.
    """
    init = init or (nn.initializers.zeros_init() if zero else nn.initializers.xavier_uniform())
    return nn.Dense(
        features,
        use_bias=bias,
        dtype=dtype,
        kernel_init=nn.with_logical_partitioning(init, axes),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros_init(), axes[1:]),
        dot_general=_flat_dot_general,
        name=name,
    )


def _flat_dot_general(
    x: Array, kernel: Array, dimension_numbers: object, precision: object = None, **options: object
) -> Array:
    """Multiplies the last axis of `x` by a kernel (input, output) with all other axes as one.

    The gradient of the kernel then sums over one axis instead of several, which on a CPU is twice as fast.
    """
    del dimension_numbers  # those of `nn.Dense`: the last axis with the first
    lines = x.reshape(-1, x.shape[-1])
    out = jax.lax.dot_general(lines, kernel, (((1,), (0,)), ((), ())), precision=precision, **options)
    return out.reshape(*x.shape[:-1], kernel.shape[-1])


def conv(
    features: int,
    axes: tuple[str, str],
    *,
    name: str,
    dtype: str,
    stride: int = 1,
    padding: tuple[int, int] = (1, 1),
    zero: bool = False,
) -> nn.Conv:
    """Returns a 3x3 convolution with bias over images (B, H, W, C).

    Args:
        features: channels of the output.
        axes: logical axes of its kernel (input channels, output channels).
        name: of its parameters.
        dtype: of the computation.
        stride: along both sides.
        padding: zeros (before, behind) each side.
        zero: starts with a zero kernel instead of Glorot's uniform one.
    """
    init = nn.initializers.zeros_init() if zero else nn.initializers.xavier_uniform()
    return nn.Conv(
        features,
        kernel_size=(3, 3),
        strides=stride,
        padding=(padding, padding),
        dtype=dtype,
        kernel_init=nn.with_logical_partitioning(init, (None, None, *axes)),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros_init(), axes[1:]),
        name=name,
    )


def group_norm(*, name: str, num_groups: int, eps: float, zero: bool = False) -> nn.GroupNorm:
    """Returns a group norm (arXiv:1803.08494) over an image and a group of its channels, computed in float32.

    Args:
        name: of its parameters.
        num_groups: a divisor of the channels.
        eps: epsilon.
        zero: its scale starts at zero instead of one.
    """
    scale_init = nn.initializers.zeros_init() if zero else nn.initializers.ones_init()
    return nn.GroupNorm(
        num_groups=num_groups,
        epsilon=eps,
        dtype=jnp.float32,
        use_fast_variance=False,  # E[x^2] - E[x]^2 cancels where a group's mean is large
        scale_init=nn.with_logical_partitioning(scale_init, ("width",)),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros_init(), ("width",)),
        name=name,
    )


def layer_norm(*, name: str, eps: float, affine: bool) -> nn.LayerNorm:
    """Returns a layer norm over the width, computed in float32."""
    return nn.LayerNorm(
        epsilon=eps,
        use_fast_variance=False,  # E[x^2] - E[x]^2 cancels where a token's mean is large
        dtype=jnp.float32,
        use_bias=affine,
        use_scale=affine,
        scale_init=nn.with_logical_partitioning(nn.initializers.ones_init(), ("width",)),
        bias_init=nn.with_logical_partitioning(nn.initializers.zeros_init(), ("width",)),
        name=name,
    )


def rms_norm(*, name: str, axis: str, eps: float) -> nn.RMSNorm:
    """Returns an RMS norm (arXiv:1910.07467) over the last axis, whose logical name is `axis`, computed in float32."""
    init = nn.with_logical_partitioning(nn.initializers.ones_init(), (axis,))
    return nn.RMSNorm(epsilon=eps, dtype=jnp.float32, scale_init=init, name=name)


def modulate(
    x: Float[Array, "*batch width"], shift: Float[Array, "*batch width"], scale: Float[Array, "*batch width"]
) -> Float[Array, "*batch width"]:
    """Returns x (1 + scale) + shift (arXiv:2212.09748, Fig. 3)."""
    return x * (1 + scale) + shift


def sinusoidal_embedding(
    values: Float[Array, "*batch"], dim: int, period: float = 10_000.0, endpoint: bool = False
) -> Float[Array, "*batch dim"]:
    """Embeds numbers as cosines and sines of n = `dim / 2` frequencies, period^(-i / n) for i = 0 ... n - 1.

    Args:
        values: of any shape.
        dim: even; at least 4 with `endpoint`.
        period: sets the lowest frequency.
        endpoint: the lowest frequency is 1 / period itself, period^(-i / (n - 1)), as DDPM (arXiv:2006.11239) has it.

    Returns:
        (..., dim) float32: cosines, then sines.
    """
    count = dim // 2
    exponents = np.arange(count) / (count - 1 if endpoint else count)
    frequencies = np.exp(-math.log(period) * exponents).astype(np.float32)
    angles = values[..., None].astype(jnp.float32) * frequencies
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class Mlp(nn.Module):
    """Two dense layers with a GELU between.

    Attributes:
        hidden_dim: size between.
        out_dim: size of the output.
        axes: logical axes of input, hidden layer and output.
        dtype: of the computation.
        exact_gelu: GELU by the error function, as ViT has it, instead of its tanh approximation.
        bias: whether the layers have one.
    """

    hidden_dim: int
    out_dim: int
    axes: tuple[str, str, str]
    dtype: str
    exact_gelu: bool = False
    bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "*batch features"]) -> Float[Array, "*batch out"]:
        """Returns (..., out_dim)."""
        x = dense(self.hidden_dim, self.axes[:2], name="fc1", dtype=self.dtype, bias=self.bias)(x)
        # Kept for the backward pass is its input alone: computing it again is cheaper than keeping what it computes.
        gelu = functools.partial(jax.nn.gelu, approximate=not self.exact_gelu)
        x = jax.checkpoint(gelu, prevent_cse=False)(x)
        return dense(self.out_dim, self.axes[1:], name="fc2", dtype=self.dtype, bias=self.bias)(x)
