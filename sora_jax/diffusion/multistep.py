"""Multi-step samplers, which reach order 2 with one evaluation a step by looking back at earlier predictions.

With lambda = log(alpha / sigma), x_0 as predicted at the level t, and s the next level:

(1)  x_s = sigma_s / sigma_t x_t + (alpha_s - sigma_s alpha_t / sigma_t) D,  D constant over the step; exact if it is
(2)  DPM-Solver++(2M)      (1) with D = x_0 + h / (2 h_before) (x_0 - x_0 before),  h = lambda_s - lambda_t
                                                                                      arXiv:2211.01095, Algorithm 2
     SDE form    x_s = sigma_s / sigma_t e^-h x_t + alpha_s (1 - e^-2h) D + sigma_s sqrt(1 - e^-2h) z
(3)  UniPC-2     (2) corrected, once x_0 is known at the level it led to              arXiv:2302.04867, Algorithm 5-8

Looking back supposes that x_0 goes on along a straight line in lambda. Next to clean data lambda grows without bound
while x_0 hardly changes, so that a step much longer than the one before (a ladder of a linear schedule ends with one)
carries that line far away, and ends behind Euler's method. A step that is more than `longest_ratio` times as long as
the one before is therefore of order 1, which the published algorithms do for the step onto clean data alone; their
form is a `longest_ratio` of infinity.

Levels may differ from token to token, and some may begin to move late, stop early or rest. A token's memory is of the
steps in which it moved, however many others were made meanwhile, so that it goes where it would go on a ladder of its
own.

A level that does not move, alpha = 0 and sigma = 0 leave each operand finite, so that derivatives are finite too.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import jax
import jax.numpy as jnp

from sora_jax.array_types import Array
from sora_jax.diffusion.gaussian import Levels, expand, root

if TYPE_CHECKING:
    from sora_jax.diffusion.samplers import Denoise

_SMALLEST = 1e-30  # of alpha and sigma, so that lambda is finite


def log_snr(level: Levels) -> Array:
    """Returns lambda, half the log signal-to-noise ratio; about 70 where clean and -70 where all is noise."""
    alpha, sigma = (jnp.maximum(jnp.asarray(part), _SMALLEST) for part in (level.alpha, level.sigma))
    return jnp.log(alpha) - jnp.log(sigma)


class Before(NamedTuple):
    """What a multi-step sampler remembers of the step before, and of the one before that.

    A step here is one in which the level moved; a token's memory stays as it is in the others.

    Attributes:
        x: the state that the step started from.
        alpha: its level's.
        sigma: its level's.
        x0: the clean data that the network predicted then, and a step earlier.
        log_snr: lambda of these two levels.
        steps: int32 of the level's shape, how many were made.
    """

    x: Array
    alpha: Array
    sigma: Array
    x0: tuple[Array, Array]
    log_snr: tuple[Array, Array]
    steps: Array

    @classmethod
    def nothing(cls, x: Array, level: Levels) -> Before:
        """Returns a memory of the right shapes, which the first step does not use."""
        sigma = jnp.asarray(level.sigma)
        # Arrays of their own, each, since a compiled chunk takes them over.
        return cls(
            jnp.zeros_like(x),
            jnp.ones_like(sigma),
            jnp.ones_like(sigma),
            (jnp.zeros_like(x), jnp.zeros_like(x)),
            (jnp.zeros_like(sigma), jnp.zeros_like(sigma)),
            jnp.zeros(sigma.shape, jnp.int32),
        )

    def then(self, x: Array, x0: Array, now: Levels, to: Levels) -> Before:
        """Returns the memory after a step from x at the level `now`, where `x0` was predicted, to the level `to`."""
        alpha, sigma = (jnp.asarray(part) for part in (now.alpha, now.sigma))
        after = Before(x, alpha, sigma, (x0, self.x0[0]), (log_snr(now), self.log_snr[0]), self.steps + 1)
        moves = sigma != to.sigma
        keep = lambda new, old: jnp.where(expand(moves, new), new, old)  # noqa: E731
        return jax.tree.map(keep, after, self)

    def extrapolate(self, x0: Array, now: Levels, to: Levels, longest_ratio: float) -> Array:
        """Returns D of equation 2: x0 itself in the first step, in one onto clean data and in one that is too long."""
        h, h_before = log_snr(to) - log_snr(now), log_snr(now) - self.log_snr[0]
        follows = (self.steps > 0) & (jnp.asarray(to.sigma) > 0) & _follows(h, h_before, longest_ratio)
        ahead = jnp.where(follows, h / jnp.where(follows, h_before, 1) / 2, 0)
        return x0 + expand(ahead, x0) * (x0 - self.x0[0])


def _follows(h: Array, h_before: Array, longest_ratio: float) -> Array:
    """Returns where a step is not too long to go on along the line of the one before."""
    return (h_before > 0) & (h <= longest_ratio * h_before)


def shares(alpha: Array, sigma: Array, to: Levels) -> tuple[Array, Array]:
    """Returns the coefficients of x_t and D in equation 1; 1 and 0 where the level does not move."""
    moves = sigma != to.sigma
    kept = jnp.where(moves, to.sigma / jnp.where(moves & (sigma > 0), sigma, 1), 1)
    return kept, to.alpha - kept * alpha


@dataclasses.dataclass(frozen=True)
class DPMSolver:
    """Equation 2, DPM-Solver++(2M); of order 2 (order 1 where it does not look back).

    Attributes:
        sde: the SDE form, which adds noise.
        longest_ratio: of a step to the one before, in lambda, up to which it looks back.
    """

    sde: bool = False
    longest_ratio: float = 2.0
    evaluations: ClassVar[int] = 1

    @property
    def stochastic(self) -> bool:
        """Whether it is the SDE form."""
        return self.sde

    def start(self, x: Array, level: Levels) -> Before:
        """Remembers the last x0."""
        return Before.nothing(x, level)

    def step(
        self, denoise: Denoise, x: Array, memory: Before, now: Levels, to: Levels, index: Array, noise: Array | None
    ) -> tuple[Array, Before]:
        """Returns x at the level `to`."""
        x0 = denoise(x, now).x0
        d, after = memory.extrapolate(x0, now, to, self.longest_ratio), memory.then(x, x0, now, to)
        kept, gained = shares(now.alpha, now.sigma, to)
        if not self.sde:
            return expand(kept, x) * x + expand(gained, x) * d, after
        decay = kept * now.alpha / jnp.where(to.alpha > 0, to.alpha, 1)  # e^-h
        fresh = jnp.maximum(1 - decay**2, 0)
        mean = expand(kept * decay, x) * x + expand(to.alpha * fresh, x) * d
        return mean + expand(to.sigma * root(fresh), x) * noise, after


@dataclasses.dataclass(frozen=True)
class UniPC:
    """Equation 3 with B(h) = e^h - 1 (`bh2`), predicting x0; predictor of order 2, corrected to order 3.

    The corrector costs no evaluation: it uses the one at the level it corrects, which the next step needs anyway.

    Attributes:
        longest_ratio: of a step to the one before, in lambda, up to which it looks back.
    """

    longest_ratio: float = 2.0
    evaluations: ClassVar[int] = 1
    stochastic: ClassVar[bool] = False

    def start(self, x: Array, level: Levels) -> Before:
        """Remembers the last state and two x0."""
        return Before.nothing(x, level)

    def step(
        self, denoise: Denoise, x: Array, memory: Before, now: Levels, to: Levels, index: Array, noise: Array | None
    ) -> tuple[Array, Before]:
        """Corrects x at the level `now`, then returns the prediction at the level `to`."""
        x0 = denoise(x, now).x0
        x = jnp.where(expand(memory.steps > 0, x), self._correct(x0, memory, now), x)
        kept, gained = shares(now.alpha, now.sigma, to)
        d = memory.extrapolate(x0, now, to, self.longest_ratio)
        return expand(kept, x) * x + expand(gained, x) * d, memory.then(x, x0, now, to)

    def _correct(self, x0: Array, memory: Before, now: Levels) -> Array:
        """Makes the last step again, now that `x0` is known where it led to."""
        h, h_before = log_snr(now) - memory.log_snr[0], memory.log_snr[0] - memory.log_snr[1]
        follows = (memory.steps > 1) & (h > 0) & _follows(h, h_before, self.longest_ratio)
        h, h_before = jnp.where(follows, h, 1), jnp.where(follows, h_before, 1)
        earlier = -h_before / h
        # The weights solve rho_0 + rho_1 = b_0, earlier rho_0 + rho_1 = b_1 (arXiv:2302.04867, Eq. 12).
        phi_1 = jnp.expm1(-h)
        phi_2 = phi_1 / -h - 1
        phi_3 = phi_2 / -h - 1 / 2
        b_0, b_1 = phi_2 / phi_1, 2 * phi_3 / phi_1
        rho_0 = (b_0 - b_1) / (1 - earlier)
        past = jnp.where(follows, rho_0 / earlier, 0)
        weight = jnp.where(follows, b_0 - rho_0, 1 / 2)
        change = expand(past, x0) * (memory.x0[1] - memory.x0[0]) + expand(weight, x0) * (x0 - memory.x0[0])
        kept, gained = shares(memory.alpha, memory.sigma, now)
        return expand(kept, x0) * memory.x + expand(gained, x0) * (memory.x0[0] + change)
