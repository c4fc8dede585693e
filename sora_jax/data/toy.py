"""The two toy data sets of Sohl-Dickstein et al. 2015 (arXiv:1503.03585, section 3.1): Swiss roll and heartbeat.

The roll is the spiral

(1)  c(t) = t (cos t, sin t),  t uniform in [3/2 pi, 9/2 pi]

shifted and scaled, each coordinate by itself, to mean 0 and variance 1, and blurred such that both stay so:

(2)  x = sqrt(1 - noise^2) (c(t) - mean) / std + noise n,  n ~ N(0, I)
(3)  log p(x) = log of the mean over t of N(x; sqrt(1 - noise^2) (c(t) - mean) / std, noise^2 I)

mean and std are those of the law of t, in closed form, so that p has mean 0 and variance 1 itself, not just a sample
of it. The range of t is that of the three-dimensional roll of scikit-learn, which has no width here. The paper does
not say how much noise its roll has.

The heartbeat is 20 bits, a one in every fifth bin, at one of five phases.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import numpy as np

from sora_jax.array_types import Float
from sora_jax.config import BatchConfig, check
from sora_jax.data.examples import Draw, Values

_START, _END = 1.5 * math.pi, 4.5 * math.pi  # of t
_NODES = 8  # of the quadrature in a panel
_PANEL = 2.0  # its length in units of the noise; the error of the density is then below 1e-10 of its peak
_CHUNK = 1 << 22  # pairs of point and node that are held at once
NUM_BINS, PERIOD = 20, 5


@dataclasses.dataclass(frozen=True)
class SwissRollConfig(BatchConfig):
    """Points of a noisy Swiss roll (`sora_jax.data.toy`), drawn afresh for each batch.

    Attributes:
        noise: standard deviation of the noise around the roll, where each coordinate has unit variance.
    """

    kind: ClassVar[str] = "swiss_roll"
    values: ClassVar[Values] = "numbers"

    eval_splits: tuple[str, ...] = ("held_out",)
    noise: float = 0.0025

    def __post_init__(self) -> None:
        super().__post_init__()
        check(1e-4 <= self.noise < 1, self, "noise", "at least 1e-4 and below 1")

    @property
    def shape(self) -> tuple[int, ...]:
        """Of an example."""
        return (2,)

    def source(self, split: str) -> Draw:
        """Returns what draws points, the same law for every split."""
        del split
        return lambda rng, count: swiss_roll(rng, count, self.noise)

    def held_out(self, count: int, seed: int) -> Float[np.ndarray, "count 2"]:
        """Returns points that a model is scored on."""
        return swiss_roll(np.random.default_rng(seed), count, self.noise)

    def log_density(self, x: Float[np.ndarray, "count 2"]) -> Float[np.ndarray, " count"]:
        """Returns the true log-density of points, nats (equation 3)."""
        return swiss_roll_log_density(x, self.noise)

    def facts(self) -> dict[str, float]:
        """Returns what a report says of the data."""
        return {"noise": self.noise}


@dataclasses.dataclass(frozen=True)
class HeartbeatConfig(BatchConfig):
    """Binary heartbeats of 20 bins (`sora_jax.data.toy`), drawn afresh for each batch."""

    kind: ClassVar[str] = "heartbeat"
    values: ClassVar[Values] = "bits"

    eval_splits: tuple[str, ...] = ("held_out",)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of an example."""
        return (20,)

    def source(self, split: str) -> Draw:
        """Returns what draws heartbeats, the same law for every split."""
        del split
        return heartbeat

    def held_out(self, count: int, seed: int) -> Float[np.ndarray, "count 20"]:
        """Returns all sequences in turn, so that each counts the same.

        Raises:
            ValueError: a count that is no multiple of their number.
        """
        del seed
        sequences = heartbeat_sequences()
        if count % len(sequences):
            raise ValueError(f"num_held_out must be a multiple of the {len(sequences)} sequences, got {count}.")
        return np.tile(sequences, (count // len(sequences), 1))

    def log_density(self, x: Float[np.ndarray, "count 20"]) -> Float[np.ndarray, " count"]:
        """Returns the log-probability of heartbeats, nats: all are as likely."""
        return np.full(len(x), -math.log(len(heartbeat_sequences())))

    def facts(self) -> dict[str, float]:
        """Returns what a report says of the data: nothing more."""
        return {}


def _spiral_moments() -> tuple[Float[np.ndarray, " 2"], Float[np.ndarray, " 2"]]:
    """Returns mean and standard deviation of both coordinates of equation 1.

    As complex numbers z = t e^(i t) has E[x^2] and E[y^2] = (E|z|^2 +- Re E[z^2]) / 2, and the integrals of z, |z|^2
    and z^2 are e^(i t) (1 - i t), t^3 / 3 and e^(2 i t) (2 t + i (1 - 2 t^2)) / 4.
    """
    t = np.array([_START, _END])
    integrals = (np.exp(1j * t) * (1 - 1j * t), t**3 / 3, np.exp(2j * t) * (2 * t + 1j * (1 - 2 * t**2)) / 4)
    mean, squared, square = (np.diff(values)[0] / (_END - _START) for values in integrals)
    mean = np.array([mean.real, mean.imag])
    return mean, np.sqrt((squared.real + np.array([1, -1]) * square.real) / 2 - mean**2)


_MEAN, _STD = _spiral_moments()


def _check(count: int, noise: float) -> None:
    if count < 0:
        raise ValueError(f"count must be at least 0, got {count}.")
    if not 0 < noise < 1:
        raise ValueError(f"noise must be above 0 and below 1, got {noise}.")


def _centre(t: Float[np.ndarray, " n"], noise: float) -> Float[np.ndarray, "n 2"]:
    """Returns the mean of x given t (equation 2), float64."""
    spiral = t[:, None] * np.stack([np.cos(t), np.sin(t)], axis=-1)
    return math.sqrt(1 - noise**2) * (spiral - _MEAN) / _STD


def swiss_roll(rng: np.random.Generator, count: int, noise: float) -> Float[np.ndarray, "count 2"]:
    """Draws points by equation 2.

    Args:
        rng: generator of the draws.
        count: number of points.
        noise: standard deviation of the blur, in units of the standard deviation of the data; in (0, 1).

    Returns:
        (count, 2) float32, of mean 0 and variance 1 each.

    Raises:
        ValueError: a negative count, or a noise out of its range.
    """
    _check(count, noise)
    t = rng.uniform(_START, _END, count)
    return (_centre(t, noise) + noise * rng.standard_normal((count, 2))).astype(np.float32)


def swiss_roll_log_density(x: Float[np.ndarray, "count 2"], noise: float) -> Float[np.ndarray, " count"]:
    """Returns equation 3 in nats, float64, by Gauss-Legendre quadrature in panels shorter than 2 `noise`.

    The work is `count` times about 50 / noise evaluations of a Gaussian. The points should be within reach of the
    data: where the density is less than 1e-10 of its peak, its logarithm is only approximate.

    Args:
        x: points.
        noise: as in `swiss_roll`.

    Raises:
        ValueError: points of another shape, or a noise out of its range.
    """
    x = np.asarray(x, np.float64)
    if x.ndim != 2 or x.shape[1] != 2:
        raise ValueError(f"x must be (count, 2), got shape {x.shape}.")
    _check(len(x), noise)
    # |c'(t)| = sqrt(1 + t^2), stretched by 1 / std at most.
    longest = math.sqrt(1 + _END**2) / _STD.min() * (_END - _START)
    num_panels = math.ceil(longest / (_PANEL * noise))
    at, weight = np.polynomial.legendre.leggauss(_NODES)
    middle = (np.arange(num_panels) + 0.5) / num_panels
    share = (middle[:, None] + at / (2 * num_panels)).ravel()
    centre = _centre(_START + (_END - _START) * share, noise)  # (nodes, 2)
    weight = np.tile(weight / (2 * num_panels), num_panels)  # sums to 1

    def density(x: np.ndarray) -> np.ndarray:
        squared = ((x[:, None, 0] - centre[:, 0]) ** 2 + (x[:, None, 1] - centre[:, 1]) ** 2) / (2 * noise**2)
        nearest = squared.min(axis=1, keepdims=True)
        return np.log(np.exp(nearest - squared) @ weight) - nearest[:, 0]

    chunk = max(_CHUNK // len(centre), 1)
    logs = [density(x[i : i + chunk]) for i in range(0, len(x), chunk)]
    return np.concatenate([np.empty(0), *logs]) - math.log(2 * math.pi * noise**2)


def heartbeat_sequences() -> Float[np.ndarray, "5 20"]:
    """Returns the five heartbeats, (5, 20) float32: number i has its ones in the bins i, i + 5, i + 10, i + 15."""
    return (np.arange(NUM_BINS) % PERIOD == np.arange(PERIOD)[:, None]).astype(np.float32)


def heartbeat(rng: np.random.Generator, count: int) -> Float[np.ndarray, "count 20"]:
    """Draws heartbeats, each of the five as probable as another: their log-likelihood is log2(1/5) = -2.322 bits.

    Args:
        rng: generator of the draws.
        count: number of sequences.

    Returns:
        (count, 20) float32, of zeros and ones.

    Raises:
        ValueError: a negative count.
    """
    if count < 0:
        raise ValueError(f"count must be at least 0, got {count}.")
    return heartbeat_sequences()[rng.integers(PERIOD, size=count)]
