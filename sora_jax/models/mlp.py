"""Two small networks for data that are short vectors: an RBF network and a multi-layer perceptron.

The RBF network is that of the Swiss roll in Sohl-Dickstein et al. 2015 (arXiv:1503.03585, appendix D.1): one hidden
layer of normalised radial basis functions, shared by all steps, and a readout for each step:

(1)  h_k = softmax over k of -|x - c_k|^2 / (2 w_k^2),   output = h R_t

The perceptron knows the step by what multiplies and shifts its hidden layers, a linear function of an embedding e(t):

(2)  y_0 = [x, (1 + g(t)) [cos(x F), sin(x F)]]                             Fourier features, arXiv:2006.10739
(3)  y_1 = silu((W_1 y_0) (1 + a_1(t)) + b_1(t)),   y_n = y_{n-1} + silu((W_n y_{n-1}) (1 + a_n(t)) + b_n(t))

The features let it tell positions finer than a plain perceptron can: where data lies within s of a curve, frequencies
up to about 1 / (2 pi s) cycles are of use. The gate g(t) can close the high ones where the noise hides them. F is
trained; it starts in random directions, with lengths spaced geometrically.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn

from sora_jax.array_types import Array, Float, Int
from sora_jax.config import check
from sora_jax.models.layers import dense, modulate, sinusoidal_embedding

_TIME_SCALE, _TIME_PERIOD = 64.0, 256.0  # the embedding turns by 64 rad (10 times) to 1/4 rad in the whole process


@dataclasses.dataclass(frozen=True)
class RBFConfig:
    """Size of an `RBF`; the defaults are the paper's, with a learned variance (mean and variance of two values).

    Attributes:
        in_channels: values of an example.
        out_channels: values that are predicted for it.
        num_units: radial basis functions.
        num_steps: T, each with a readout of its own.
    """

    kind: ClassVar[str] = "rbf"
    takes_images: ClassVar[Literal[False]] = False

    in_channels: int = 2
    out_channels: int = 4
    num_units: int = 16
    num_steps: int = 40

    def network(self) -> RBF:
        """Returns the network."""
        return RBF(self)

    def __post_init__(self) -> None:
        for field in ("in_channels", "out_channels", "num_units", "num_steps"):
            check(getattr(self, field) >= 1, self, field, "at least 1")


@dataclasses.dataclass(frozen=True)
class MLPConfig:
    """Size of an `MLP`.

    Attributes:
        in_channels: values of an example.
        out_channels: values that are predicted for it.
        width: of the hidden layers.
        depth: number of hidden layers.
        num_steps: T; the network is conditioned on how far through the process a step is.
        time_dim: size of the embedding of the step.
        num_frequencies: Fourier features of the input, each a cosine and a sine (0: none).
        frequency_range: (lowest, highest) of them at the start, in cycles per unit of the input.
    """

    kind: ClassVar[str] = "mlp"
    takes_images: ClassVar[Literal[False]] = False

    in_channels: int = 2
    out_channels: int = 2
    width: int = 128
    depth: int = 3
    num_steps: int = 1000
    time_dim: int = 64
    num_frequencies: int = 0
    frequency_range: tuple[float, float] = (0.25, 64.0)

    def network(self) -> MLP:
        """Returns the network."""
        return MLP(self)

    def __post_init__(self) -> None:
        for field in ("in_channels", "out_channels", "width", "depth", "num_steps"):
            check(getattr(self, field) >= 1, self, field, "at least 1")
        check(self.time_dim >= 2 and self.time_dim % 2 == 0, self, "time_dim", "even and at least 2")
        check(self.num_frequencies >= 0, self, "num_frequencies", "at least 0")
        low, high = self.frequency_range
        check(0 < low <= high < math.inf, self, "frequency_range", "(lowest, highest) with 0 < lowest <= highest")


class RBF(nn.Module):
    """Equation 1. A fresh network predicts zero.

    What it predicts lies between the readouts of its units, which suits x_0, a place among the data: of the noise or v
    it would have to tell x itself, at the scale of the noise. The paper does not say what the units are made from;
    here both their centres and their widths are trained. It passes what it reads as a variance through a sigmoid;
    here the readout is linear, and the place of the variance between its bounds
    (`sora_jax.diffusion.gaussian.learned_log_variance`) may leave them.

    Attributes:
        config: its size.
    """

    config: RBFConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch values"], steps: Float[Array, " n"] | Int[Array, " n"], deterministic: bool = True
    ) -> Float[Array, "batch out"]:
        """Computes the network's output.

        Args:
            x: (B, in_channels).
            steps: (B,), whole numbers from 0 (the least noisy) to num_steps - 1.
            deterministic: as of networks with dropout; nothing here is random.

        Returns:
            (B, out_channels) float32.

        Raises:
            ValueError: examples or steps of another shape.
        """
        c = self.config
        _check_shapes(x.shape, steps.shape, c.in_channels)
        normal = nn.initializers.normal(1.0)
        centres = self._param("centres", normal, (c.num_units, c.in_channels), ("mlp", "patch"))
        log_widths = self._param("log_widths", nn.initializers.constant(math.log(0.5)), (c.num_units,), ("mlp",))
        zeros = nn.initializers.zeros_init()
        readout = self._param("readout", zeros, (c.num_steps, c.num_units, c.out_channels), (None, "mlp", "patch"))

        squared = jnp.square(x[:, None] - centres).sum(axis=-1)  # (B, K)
        hidden = jax.nn.softmax(-0.5 * squared * jnp.exp(-2 * log_widths), axis=-1)
        return jnp.einsum("bk,bko->bo", hidden, readout[steps.astype(jnp.int32)])

    def _param(self, name: str, init: nn.initializers.Initializer, shape: tuple[int, ...], axes: tuple) -> Array:
        return self.param(name, nn.with_logical_partitioning(init, axes), shape)


def _frequencies(low: float, high: float) -> nn.initializers.Initializer:
    """Returns an initialiser of (in, n) vectors, in radians: random directions, lengths from `low` to `high` cycles."""

    def init(key: jax.Array, shape: tuple[int, int], dtype: jnp.dtype = jnp.float32) -> Array:
        direction = jax.random.normal(key, shape, dtype)
        direction /= jnp.linalg.norm(direction, axis=0)
        return 2 * math.pi * jnp.geomspace(low, high, shape[1], dtype=dtype) * direction

    return init


class MLP(nn.Module):
    """Equations 2 and 3. A fresh network predicts zero.

    Attributes:
        config: its size.
    """

    config: MLPConfig

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch values"], steps: Float[Array, " n"] | Int[Array, " n"], deterministic: bool = True
    ) -> Float[Array, "batch out"]:
        """Computes the network's output.

        Args:
            x: (B, in_channels).
            steps: (B,), from 0 (the least noisy) to num_steps - 1.
            deterministic: as of networks with dropout; nothing here is random.

        Returns:
            (B, out_channels) float32.

        Raises:
            ValueError: examples or steps of another shape.
        """
        c = self.config
        _check_shapes(x.shape, steps.shape, c.in_channels)
        share = (steps.astype(jnp.float32) + 1) / c.num_steps
        time = sinusoidal_embedding(_TIME_SCALE * share, c.time_dim, _TIME_PERIOD)  # (B, time_dim)

        h = x
        if c.num_frequencies:
            init = nn.with_logical_partitioning(_frequencies(*c.frequency_range), ("patch", "features"))
            angles = x @ self.param("frequencies", init, (c.in_channels, c.num_frequencies))
            features = jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)  # (B, 2 num_frequencies)
            gate = dense(2 * c.num_frequencies, ("features", "features"), name="gate", dtype="float32")(time)
            h = jnp.concatenate([x, features * (1 + gate)], axis=-1)
        for n in range(c.depth):
            axes = ("width" if n else "patch", "channels")
            y = dense(c.width, axes, name=f"hidden_{n}", dtype="float32")(h)
            modulation = dense(2 * c.width, ("features", "width"), name=f"modulation_{n}", dtype="float32")(time)
            scale, shift = jnp.split(modulation, 2, axis=-1)
            y = jax.nn.silu(modulate(y, shift, scale))
            h = h + y if n else y
        return dense(c.out_channels, ("width", "patch"), name="out", dtype="float32", zero=True)(h)


def _check_shapes(x: tuple[int, ...], steps: tuple[int, ...], channels: int) -> None:
    if len(x) != 2 or x[1] != channels:
        raise ValueError(f"x must be (B, {channels}), got shape {tuple(x)}.")
    if tuple(steps) != tuple(x[:1]):
        raise ValueError(f"steps must be one for each of {x[0]} examples, got shape {tuple(steps)}.")


def init_params(model: RBF | MLP, key: jax.Array) -> dict:
    """Returns freshly drawn parameters, boxed with their logical axes."""
    return model.init(key, jnp.zeros((1, model.config.in_channels)), jnp.zeros(1))["params"]
