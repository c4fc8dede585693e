"""The hybrid stem of ViT: a ResNet whose features are cut into patches, in place of pixels (arXiv:2010.11929, 3.1).

As in the official JAX code it is BiT's ResNet (arXiv:1912.11370), not pre-activated: group norms of 32 groups for
batch norms, and standardised kernels (arXiv:1903.10520),

    (1)  k' = (k - mean k) / (std k + kernel_eps),  over all of a kernel but its output channel
    (2)  root:   max_pool(relu(norm(conv_7x7, stride 2)), 3x3, stride 2)
    (3)  unit:   relu(s + norm(conv_1x1 relu(norm(conv_3x3 relu(norm(conv_1x1 x))))))

s is x, or norm(conv_1x1 x) in the first unit of each stage. There the 3x3 convolution and s have stride 2, but in the
first stage. Padding is `SAME`: of an even side with stride 2, most zeros lie behind. Pooling pads with -inf.

timm differs in both epsilons: its norms have 1e-5, and it divides kernels by sqrt(var k + 1e-8), which is what equation
1 gives at 1e-8 for kernels whose deviation is far above 1e-4. With random kernels of deviation 0.1 the features of 26
layers differ by 7e-4 of their RMS if 1e-5 is kept: a norm sees groups of channels, and so their relative scales.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn

from sora_jax.array_types import Array, Float
from sora_jax.config import check
from sora_jax.models.layers import group_norm

NUM_GROUPS = 32


@dataclasses.dataclass(frozen=True)
class ResNetStemConfig:
    """Size of a `ResNetStem`; the default is that of R50+ViT-B/16.

    Attributes:
        stages: units of each stage; none for the root alone (R+ViT-Ti).
        width: channels of the root, a multiple of 32. The units of stage i have 4 width 2^i.
        norm_eps: epsilon of the group norms.
        kernel_eps: of equation 1.
    """

    stages: tuple[int, ...] = (3, 4, 9)
    width: int = 64
    norm_eps: float = 1e-6
    kernel_eps: float = 1e-5

    def __post_init__(self) -> None:
        check(all(units >= 1 for units in self.stages), self, "stages", "at least 1 each")
        check(self.width >= 1 and self.width % NUM_GROUPS == 0, self, "width", f"a positive multiple of {NUM_GROUPS}")
        for field in ("norm_eps", "kernel_eps"):
            check(getattr(self, field) > 0, self, field, "positive")

    @property
    def stride(self) -> int:
        """Pixels from one place of the features to the next."""
        return 4 * 2 ** max(len(self.stages) - 1, 0)

    @property
    def out_channels(self) -> int:
        """Channels of the features."""
        return self.width * self.stride if self.stages else self.width


class StandardizedConv(nn.Module):
    """Equation 1, then a convolution without bias and with `SAME` padding.

    Attributes:
        features: channels of the output.
        size: side of the kernel.
        kernel_eps: of equation 1.
        dtype: of the convolution; kernels are standardised in float32.
        stride: along both sides.
        in_axis: logical axis of the input channels.
    """

    features: int
    size: int
    kernel_eps: float
    dtype: str
    stride: int = 1
    in_axis: str = "width"

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch h w out"]:
        """Returns (B, ceil(H / stride), ceil(W / stride), features)."""
        init = nn.with_logical_partitioning(nn.initializers.lecun_normal(), (None, None, self.in_axis, "channels"))
        kernel = self.param("kernel", init, (self.size, self.size, x.shape[-1], self.features), jnp.float32)
        kernel = kernel - kernel.mean(axis=(0, 1, 2))
        kernel = kernel / (kernel.std(axis=(0, 1, 2)) + self.kernel_eps)
        return jax.lax.conv_general_dilated(
            x.astype(self.dtype),
            kernel.astype(self.dtype),
            (self.stride, self.stride),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )


class Unit(nn.Module):
    """Equation 3. The scale of its last norm starts at zero, so that at first a unit is relu(s).

    Attributes:
        features: channels inside; the output has four times as many.
        stride: along both sides.
        config: of the stem, for its epsilons.
        dtype: of the computation; norms are computed in float32.
    """

    features: int
    stride: int
    config: ResNetStemConfig
    dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch h w out"]:
        """Returns (B, H / stride, W / stride, 4 features), rounded up."""
        c = self.config

        def conv_norm(y: Array, name: str, features: int, size: int, stride: int = 1, zero: bool = False) -> Array:
            y = StandardizedConv(features, size, c.kernel_eps, self.dtype, stride, name=f"conv{name}")(y)
            return group_norm(name=f"gn{name}", num_groups=NUM_GROUPS, eps=c.norm_eps, zero=zero)(y)

        shortcut = x
        if self.stride != 1 or x.shape[-1] != 4 * self.features:
            shortcut = conv_norm(x, "_proj", 4 * self.features, 1, self.stride)
        y = jax.nn.relu(conv_norm(x, "1", self.features, 1))
        y = jax.nn.relu(conv_norm(y, "2", self.features, 3, self.stride))
        y = conv_norm(y, "3", 4 * self.features, 1, zero=True)
        return jax.nn.relu(shortcut + y).astype(self.dtype)


class Stage(nn.Module):
    """Units one after another, the first with a stride.

    Attributes:
        num_units: how many.
        features: see `Unit`.
        stride: of the first unit.
        config: of the stem, for its epsilons.
        dtype: of the computation.
    """

    num_units: int
    features: int
    stride: int
    config: ResNetStemConfig
    dtype: str

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch h w out"]:
        """Returns (B, H / stride, W / stride, 4 features), rounded up."""
        for i in range(self.num_units):
            x = Unit(self.features, self.stride if i == 0 else 1, self.config, self.dtype, name=f"unit{i + 1}")(x)
        return x


class ResNetStem(nn.Module):
    """Features of images; the names of the parameters are the official ones.

    Attributes:
        config: size.
        dtype: of the computation; parameters and norms stay float32.
    """

    config: ResNetStemConfig
    dtype: str

    @nn.compact
    def __call__(self, images: Float[Array, "batch height width channels"]) -> Float[Array, "batch h w out"]:
        """Returns (B, H / stride, W / stride, out_channels), rounded up, of `dtype`."""
        c = self.config
        x = StandardizedConv(c.width, 7, c.kernel_eps, self.dtype, 2, in_axis="patch", name="conv_root")(images)
        x = jax.nn.relu(group_norm(name="gn_root", num_groups=NUM_GROUPS, eps=c.norm_eps)(x)).astype(self.dtype)
        x = nn.max_pool(x, (3, 3), strides=(2, 2), padding="SAME")
        for i, units in enumerate(c.stages):
            stride = 1 if i == 0 else 2
            x = Stage(units, c.width * 2**i, stride, c, self.dtype, name=f"block{i + 1}")(x)
        return x
