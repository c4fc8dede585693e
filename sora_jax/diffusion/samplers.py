"""Samplers: from noise to data along falling noise levels, one scan of one pure step.

A level is (alpha, sigma) with x = alpha x_0 + sigma eps (`sora_jax.diffusion.gaussian`), lambda = log(alpha / sigma).
With x_0 and eps as the network predicts them at the level t, and s the next one:

(1)  ancestral   x_s ~ q(x_s | x_t, x_0)                                              arXiv:2006.11239, Algorithm 2
(2)  DDIM        x_s = alpha_s x_0 + sqrt(sigma_s^2 - c^2) eps + c z,  c^2 = eta^2 Var q(x_s | x_t, x_0)
                                                                                      arXiv:2010.02502, Eq. 12
(3)  Heun        y_s = y_t + (d_t + d_s) / 2,  y = x / unit,
                 d = (change of alpha / unit) x_0 + (change of sigma / unit) eps      arXiv:2206.00364, Algorithm 1

The multi-step samplers DPM-Solver++(2M) and UniPC stand in `sora_jax.diffusion.multistep`.

Deterministic DDIM is Euler's method: for a flow x_s = x_t + (s - t)(eps - x_0), so `euler` is its name here too.

`denoise(x, level)` says what is clean and what is noise; how it comes by that (parameterisation, guidance, clipping)
is its own affair. Levels may differ from token to token, with axes that are the first axes of x; a token whose level
does not change stays as it is, which is how prompts, of level (1, 0), are sampled around.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from sora_jax.array_types import Array, Float, Int
from sora_jax.diffusion.gaussian import (
    Levels,
    Prediction,
    expand,
    learned_log_variance,
    noise_of,
    posterior,
    root,
    to_x0_and_noise,
)
from sora_jax.diffusion.multistep import DPMSolver, UniPC


class Denoised(NamedTuple):
    """What a network says of x at a level.

    Attributes:
        x0: the clean data.
        noise: eps, so that x = alpha x0 + sigma noise.
        range: where the network learns the variance, v of `gaussian.learned_log_variance`.
    """

    x0: Array
    noise: Array
    range: Array | None = None


Denoise = Callable[[Array, Levels], Denoised]
Network = Callable[[Array, Array], Array]


def denoiser(
    network: Network,
    prediction: Prediction,
    clip: tuple[float, float] | None = None,
    learned_range: bool = False,
) -> Denoise:
    """Returns the denoise function of a network.

    Args:
        network: maps (x, time), time of the level's shape, to its output.
        prediction: what it predicts.
        clip: bounds of the clean data; x0 is clipped to them and the noise follows.
        learned_range: the last axis of the output is twice that of x: the prediction, then the variance's place
            between its bounds, in [-1, 1] (arXiv:2102.09672, section 3.1).
    """

    def denoise(x: Array, level: Levels) -> Denoised:
        output, v = network(x, level.time), None
        if learned_range:
            output, v = jnp.split(output, 2, axis=-1)
            v = (v + 1) / 2
        x0, noise = to_x0_and_noise(output, x, level.alpha, level.sigma, prediction)
        if clip is not None:
            x0 = jnp.clip(x0, *clip)
            noise = noise_of(x, x0, expand(level.alpha, x), expand(level.sigma, x))
        return Denoised(x0, noise, v)

    return denoise


@runtime_checkable
class Sampler(Protocol):
    """One way from a level to the next.

    Attributes:
        evaluations: of the network in a step.
        stochastic: whether a step needs noise.
    """

    evaluations: ClassVar[int]

    @property
    def stochastic(self) -> bool:
        """Whether a step needs noise."""
        ...

    def start(self, x: Array, level: Levels) -> Any:
        """Returns what is remembered before the first step, which starts from x at `level`."""

    def step(
        self, denoise: Denoise, x: Array, memory: Any, now: Levels, to: Levels, index: Array, noise: Array | None
    ) -> tuple[Array, Any]:
        """Returns x at the level `to`, and what the next step has to remember.

        Args:
            denoise: of the network.
            x: the state at the level `now`.
            memory: of the step before.
            now: level of x, of any shape that is a prefix of that of x.
            to: the next level.
            index: () int32, steps made before.
            noise: standard normal, of the shape of x; None where the sampler is not stochastic.
        """


@dataclasses.dataclass(frozen=True)
class Ancestral:
    """Equation 1: the reverse chain of DDPM.

    Attributes:
        variance: `small` (of the posterior), `large` (beta) or `learned` (between them, as the network says).
    """

    variance: str = "small"
    evaluations: ClassVar[int] = 1
    stochastic: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.variance not in ("small", "large", "learned"):
            raise ValueError(f"variance must be small, large or learned, got {self.variance!r}.")

    def start(self, x: Array, level: Levels) -> tuple[()]:
        """Remembers nothing."""
        return ()

    def step(
        self, denoise: Denoise, x: Array, memory: tuple[()], now: Levels, to: Levels, index: Array, noise: Array
    ) -> tuple[Array, tuple[()]]:
        """Draws x at the level `to`; without noise where that is clean."""
        denoised = denoise(x, now)
        q = posterior(now, to)
        mean = expand(q.xt, x) * x + expand(q.x0, x) * denoised.x0
        if self.variance == "learned":
            if denoised.range is None:
                raise ValueError("variance 'learned' needs a network that learns its range (denoiser(learned_range)).")
            std = jnp.exp(learned_log_variance(denoised.range, now, to) / 2)
        else:
            std = expand(root(q.variance if self.variance == "small" else q.beta), x)
        return jnp.where(expand(to.sigma, x) > 0, mean + std * noise, mean), ()


@dataclasses.dataclass(frozen=True)
class DDIM:
    """Equation 2; of order 1 where `eta` is 0, and then Euler's method.

    Attributes:
        eta: share of the ancestral sampler's noise, in [0, 1].
    """

    eta: float = 0.0
    evaluations: ClassVar[int] = 1

    def __post_init__(self) -> None:
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must be between 0 and 1, got {self.eta}.")

    @property
    def stochastic(self) -> bool:
        """Whether `eta` asks for noise."""
        return self.eta > 0

    def start(self, x: Array, level: Levels) -> tuple[()]:
        """Remembers nothing."""
        return ()

    def step(
        self, denoise: Denoise, x: Array, memory: tuple[()], now: Levels, to: Levels, index: Array, noise: Array | None
    ) -> tuple[Array, tuple[()]]:
        """Returns x at the level `to`."""
        denoised = denoise(x, now)
        if not self.stochastic:
            return expand(to.alpha, x) * denoised.x0 + expand(to.sigma, x) * denoised.noise, ()
        fresh = self.eta**2 * posterior(now, to).variance
        kept = root(to.sigma**2 - fresh)
        mean = expand(to.alpha, x) * denoised.x0 + expand(kept, x) * denoised.noise
        return mean + expand(root(fresh), x) * noise, ()


@dataclasses.dataclass(frozen=True)
class Heun:
    """Equation 3; of order 2. The step onto clean data is Euler's, since nothing can be asked there.

    With `Levels.unit` 1, as all levels of `sora_jax.diffusion.gaussian` have it, x itself is integrated, whatever the
    process. With the unit alpha it is EDM's form, of x / alpha. That suits EDM's ladder, but a cosine schedule takes
    sigma / alpha from 20,000 to 15 in its first step, over which a straight line errs by orders of magnitude.
    """

    evaluations: ClassVar[int] = 2
    stochastic: ClassVar[bool] = False

    def start(self, x: Array, level: Levels) -> tuple[()]:
        """Remembers nothing."""
        return ()

    def step(
        self, denoise: Denoise, x: Array, memory: tuple[()], now: Levels, to: Levels, index: Array, noise: Array | None
    ) -> tuple[Array, tuple[()]]:
        """Returns x at the level `to`."""
        here, unit = denoise(x, now), expand(to.unit, x)
        first = expand(to.alpha / to.unit - now.alpha / now.unit, x)
        second = expand(to.sigma / to.unit - now.sigma / now.unit, x)
        slope = first * here.x0 + second * here.noise
        y = (expand(now.alpha, x) * here.x0 + expand(now.sigma, x) * here.noise) / expand(now.unit, x)
        ahead = denoise(_moved(x, unit * (y + slope), now, to), to)
        mean = (slope + first * ahead.x0 + second * ahead.noise) / 2
        return unit * (y + jnp.where(expand(to.sigma, x) > 0, mean, slope)), ()


def _moved(x: Array, moved: Array, now: Levels, to: Levels) -> Array:
    """Returns `moved` where the level changes, and x as it was where it does not."""
    return jnp.where(expand(now.sigma != to.sigma, x), moved, x)


SAMPLERS: dict[str, Sampler] = {
    "euler": DDIM(),
    "heun": Heun(),
    "dpm++": DPMSolver(),
    "dpm++sde": DPMSolver(sde=True),
    "unipc": UniPC(),
    "ancestral": Ancestral(),
}


class State(NamedTuple):
    """Where a sampler is.

    Attributes:
        x: the state.
        memory: of the sampler.
        index: () int32, steps made.
        first_bad: int32, of each cell (x without its last axis) the step, counted from 0, after which the square of a
            value of it was first not finite, so a value NaN, infinite or beyond 1.8e19; -1 where none was. Norms take
            squares: of larger values a network makes finite numbers that mean nothing.
    """

    x: Array
    memory: Any
    index: Int[Array, ""]
    first_bad: Int[Array, "*cells"]


def start(sampler: Sampler, x: Float[Array, "*shape"], levels: Levels) -> State:
    """Returns the state before the first step, at x and levels[0]."""
    never = jnp.full(jnp.shape(x)[:-1], -1, jnp.int32)
    return State(x, sampler.start(x, Levels(*(a[0] for a in levels))), jnp.int32(0), never)


def sample_chunk(
    denoise: Denoise,
    state: State,
    levels: Levels,
    sampler: Sampler,
    noise: Callable[[Array], Array] | None = None,
) -> State:
    """Takes a state through consecutive levels by one scan.

    Args:
        denoise: of the network.
        state: at levels[0].
        levels: of shape (n + 1, ...), falling.
        sampler: that steps.
        noise: gives the standard normal noise of step `index`, of the shape of x; needed by stochastic samplers.

    Returns:
        The state at levels[-1].

    Raises:
        ValueError: a stochastic sampler without noise.
    """
    if sampler.stochastic and noise is None:
        raise ValueError(f"{sampler} is stochastic: sample_chunk needs its noise.")
    levels = Levels(*(jnp.asarray(a) for a in levels))

    def body(state: State, pair: tuple[Levels, Levels]) -> tuple[State, None]:
        now, to = pair
        fresh = noise(state.index) if sampler.stochastic else None
        x, memory = sampler.step(denoise, state.x, state.memory, now, to, state.index, fresh)
        x = _moved(state.x, x, now, to)
        bad = (state.first_bad < 0) & ~jnp.isfinite(jnp.square(x)).all(-1)
        return State(x, memory, state.index + 1, jnp.where(bad, state.index, state.first_bad)), None

    pairs = Levels(*(a[:-1] for a in levels)), Levels(*(a[1:] for a in levels))
    return jax.lax.scan(body, state, pairs)[0]


def sample(
    chunk: Callable[[State, Levels], State],
    state: State,
    levels: Levels,
    longest_chunk: int = 10,
    progress: Callable[[int], None] | None = None,
) -> State:
    """Samples in equal chunks of one compiled scan, so that progress can be shown.

    Args:
        chunk: (state, levels) to state, `sample_chunk` compiled once by the caller; its levels have one shape.
        state: before the first step.
        levels: of shape (n + 1, ...).
        longest_chunk: most steps of a chunk; the largest divisor of n up to it is taken.
        progress: called with the steps done, at first 0, once they are.

    Returns:
        The state at the last level; `first_bad` says whether it diverged.
    """
    num_steps = len(levels.sigma) - 1
    length = next(n for n in range(min(longest_chunk, num_steps), 0, -1) if num_steps % n == 0)
    if progress is not None:
        progress(0)
    for first in range(0, num_steps, length):
        state = chunk(state, Levels(*(a[first : first + length + 1] for a in levels)))
        if progress is not None:
            jax.block_until_ready(state.x)
            progress(first + length)
    return state
