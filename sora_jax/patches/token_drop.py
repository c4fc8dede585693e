"""NaViT's token dropping (arXiv:2307.06304, sections 2.2 and 3.3, Appendix A.4; B.6 of the NeurIPS version).

NumPy only: the data pipeline uses it.

Dropped patches leave with their positions before an image is packed, so that each image may have a rate d of its own:

    (1)  constant:    d = rate
    (2)  beta:        d = d_max u,  u ~ Beta(a, b) with mean m = d_mean / d_max and variance share * m (1 - m),
                      so a = m (1 / share - 1) and b = (1 - m) (1 / share - 1)
    (3)  resolution:  d ~ N(mu, std^2) within two standard deviations of mu, which grows linearly from d_min to d_max
                      with the number of tokens

The paper writes d ~ N_trunc(mu, 0.02). That 0.02 is the standard deviation is our reading: as a variance, two standard
deviations would be 0.28, and its rates of 0.1 to 0.9 (Fig. 14b) would leave [0, 1]. Not here: A.5's schedule of rates.
Whatever is drawn comes from the generator that is passed.
"""

from __future__ import annotations

import dataclasses
import statistics
from typing import ClassVar

import numpy as np

from sora_jax.array_types import Int
from sora_jax.config import check


@dataclasses.dataclass(frozen=True)
class ConstantDrop:
    """Equation 1.

    Attributes:
        rate: share of an image's tokens that is dropped, in [0, 1).
    """

    kind: ClassVar[str] = "constant"

    rate: float = 0.5

    def __post_init__(self) -> None:
        check(0 <= self.rate < 1, self, "rate", "in [0, 1)")

    def draw_rate(self, rng: np.random.Generator, num_tokens: int) -> float:
        """Returns the rate of an image; nothing is drawn."""
        return self.rate


@dataclasses.dataclass(frozen=True)
class BetaDrop:
    """Equation 2.

    Attributes:
        mean: of the rates.
        highest: no rate is above; below 1. The paper shows 0.4, 0.7 and 0.9 (Fig. 14a) and names no best one.
        variance_share: the variance, as a share of the largest that a distribution with this mean can have; the
            paper's default.
    """

    kind: ClassVar[str] = "beta"

    mean: float = 0.5
    highest: float = 0.9
    variance_share: float = 0.3

    def __post_init__(self) -> None:
        check(0 < self.highest < 1, self, "highest", "in (0, 1)")
        check(0 < self.mean < self.highest, self, "mean", f"in (0, highest = {self.highest})")
        check(0 < self.variance_share < 1, self, "variance_share", "in (0, 1)")

    def draw_rate(self, rng: np.random.Generator, num_tokens: int) -> float:
        """Returns the rate of an image."""
        share, concentration = self.mean / self.highest, 1 / self.variance_share - 1
        return self.highest * float(rng.beta(share * concentration, (1 - share) * concentration))


@dataclasses.dataclass(frozen=True)
class ResolutionDrop:
    """Equation 3.

    Attributes:
        num_tokens: (fewest, most) tokens of an image; one outside has the mean of the nearer end (the paper has none).
            The default is that of squares of 64 to 384 pixels in patches of 16, the paper's resolutions.
        rates: (d_min, d_max), the mean at each end, in [0, 1). The paper compares 0.5 -+ 0.25 and 0.5 -+ 0.4 (Fig. 9b).
        std: sigma.
    """

    kind: ClassVar[str] = "resolution"

    num_tokens: tuple[int, int] = (16, 576)
    rates: tuple[float, float] = (0.1, 0.9)
    std: float = 0.02

    def __post_init__(self) -> None:
        fewest, most = self.num_tokens
        check(1 <= fewest < most, self, "num_tokens", "(fewest, most) with 1 <= fewest < most")
        check(all(0 <= rate < 1 for rate in self.rates), self, "rates", "both in [0, 1)")
        check(self.std > 0, self, "std", "positive")

    def draw_rate(self, rng: np.random.Generator, num_tokens: int) -> float:
        """Returns the rate of an image of so many tokens, in [0, 1]."""
        mean = float(np.interp(num_tokens, self.num_tokens, self.rates))
        return truncated_normal(rng, mean, self.std, max(mean - 2 * self.std, 0.0), min(mean + 2 * self.std, 1.0))


TokenDrop = ConstantDrop | BetaDrop | ResolutionDrop


def kept_tokens(rng: np.random.Generator, num_tokens: int, rate: float) -> Int[np.ndarray, " kept"]:
    """Draws the tokens of an image that stay, each set of that size as likely as any other.

    Args:
        rng: of this draw.
        num_tokens: n, of the image.
        rate: share that is dropped.

    Returns:
        Indices in increasing order, n (1 - rate) of them, rounded, and at least one.

    Raises:
        ValueError: no tokens, or a rate outside [0, 1].
    """
    if num_tokens < 1:
        raise ValueError(f"num_tokens must be at least 1, got {num_tokens}.")
    if not 0 <= rate <= 1:
        raise ValueError(f"rate must be in [0, 1], got {rate}.")
    count = max(round(num_tokens * (1 - rate)), 1)
    return np.sort(rng.permutation(num_tokens)[:count])


def truncated_normal(rng: np.random.Generator, mean: float, std: float, low: float, high: float) -> float:
    """Draws from a normal distribution within bounds, by its inverse distribution function: one uniform draw.

    Args:
        rng: of this draw.
        mean: of the whole distribution.
        std: of the whole distribution, positive.
        low: bound.
        high: bound, above `low`.

    Raises:
        ValueError: bounds that do not increase, or between which there is next to no mass.
    """
    normal = statistics.NormalDist(mean, std)
    below, above = normal.cdf(low), normal.cdf(high)
    if not (low < high and above - below > 1e-9):
        raise ValueError(f"low and high must bound a share of N({mean}, {std}^2), got {low} and {high}.")
    # The inverse function does not take the ends of [0, 1] themselves.
    share = min(max(below + float(rng.random()) * (above - below), 1e-300), 1 - 2**-53)
    return min(max(normal.inv_cdf(share), low), high)
