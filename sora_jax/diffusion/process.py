"""A process as one object: levels to train at, levels to sample through, what a prediction stands for, and the loss.

    flow        x_t = (1 - t) x_0 + t eps, t in [0, 1]                     `FlowProcess` (`sora_jax.diffusion.flow`)
    discrete    x_t = alpha_t x_0 + sigma_t eps, t = 0 ... T - 1           `DiscreteProcess` (`diffusion.gaussian`)

Whoever samples knows a `Process` alone: its ladder of levels, and the denoise function that it makes of a network.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.array_types import Array, Float, Int
from sora_jax.config import FlowConfig, check
from sora_jax.diffusion import likelihood, schedules
from sora_jax.diffusion.gaussian import Levels, corrupt, discrete_levels, flow_levels
from sora_jax.diffusion.losses import hybrid_error, prediction_error
from sora_jax.diffusion.samplers import SAMPLERS, Ancestral, Denoise, Network, Sampler, denoiser


@dataclasses.dataclass(frozen=True)
class GaussianConfig:
    """A discrete Gaussian process, what the network says of it, and the loss.

    Attributes:
        num_levels: steps of the process, T.
        schedule: of the betas: `linear` (DDPM's, scaled by 1000 / num_levels), `cosine`, or `log_snr`, evenly spaced in
            log(alpha^2 / sigma^2).
        log_snr_range: lowest and highest of `log_snr`.
        learn_betas: train the betas from the schedule on, all but the first (arXiv:1503.03585, section 2.4.1); needs
            the loss `bound`.
        prediction: what the network predicts.
        variance: of the reverse steps, `small`, `large` or `learned` between them.
        last_variance: of the last step in the bound, where the variance is not learned: `beta`, or `posterior` as in
            the code of DDPM (see `sora_jax.diffusion.likelihood.bound`).
        loss: the squared error of the prediction (`simple`), that and the bound's term for the variance (`hybrid`), or
            the bound itself (`bound`).
        discrete: values are 8-bit and lie in [-1, 1]: L_0 is a mass, and x_0 is clipped to that range.
        zero_terminal_snr: the betas are changed such that the last step leaves nothing of the data
            (arXiv:2305.08891, Algorithm 1); no noise can be predicted from there.
        min_snr: the squared error of x_0 is weighted by min(SNR, min_snr) (arXiv:2303.09556, which takes 5); None for
            the error of the prediction as it is. Of the loss `simple`.
    """

    kind: ClassVar[str] = "gaussian"
    of_bits: ClassVar[Literal[False]] = False

    num_levels: int = 1000
    schedule: Literal["linear", "cosine", "log_snr"] = "linear"
    log_snr_range: tuple[float, float] = (-8.0, 14.0)
    learn_betas: bool = False
    prediction: Literal["noise", "x0", "v"] = "noise"
    variance: Literal["small", "large", "learned"] = "small"
    last_variance: Literal["beta", "posterior"] = "beta"
    loss: Literal["simple", "hybrid", "bound"] = "simple"
    discrete: bool = False
    zero_terminal_snr: bool = False
    min_snr: float | None = None

    def __post_init__(self) -> None:
        check(self.num_levels >= 2, self, "num_levels", "at least 2")
        few = self.schedule == "linear" and self.num_levels < 21
        check(not few, self, "num_levels", "at least 21 for the schedule 'linear'")
        low, high = self.log_snr_range
        check(-30 <= low < high <= 30, self, "log_snr_range", "(lowest, highest) with -30 <= lowest < highest <= 30")
        learns = self.variance == "learned"
        check(learns or self.loss != "hybrid", self, "loss", "simple or bound where variance is not learned")
        check(not learns or self.loss != "simple", self, "loss", "hybrid or bound where variance is learned")
        check(not self.learn_betas or self.loss == "bound", self, "learn_betas", "false where loss is not bound")
        defined = self.prediction != "noise" and not self.learn_betas
        check(defined or not self.zero_terminal_snr, self, "zero_terminal_snr", "false for noise or learned betas")
        check(self.min_snr is None or self.min_snr > 0, self, "min_snr", "None or positive")
        check(self.min_snr is None or self.loss == "simple", self, "min_snr", "None where loss is not simple")

    def betas(self) -> Float[np.ndarray, " steps"]:
        """Returns the betas of the schedule, float64."""
        if self.schedule == "linear":
            betas = schedules.linear_betas(self.num_levels)
        elif self.schedule == "cosine":
            betas = schedules.cosine_betas(self.num_levels)
        else:
            low, high = self.log_snr_range
            betas = schedules.log_snr_betas(self.num_levels, high, low)
        return schedules.zero_terminal_snr(betas) if self.zero_terminal_snr else betas


class Process(Protocol):
    """What a sampler needs of a process."""

    @property
    def most_steps(self) -> int | None:
        """The most steps that a sampler can make; None where there is no such number."""
        ...

    def ladder(self, num_steps: int, strength: float = 1.0, num_tokens: int | None = None) -> Levels:
        """Returns the levels that a sampler visits, (n + 1,) each, from the noisiest to clean data.

        Args:
            num_steps: n, of the whole way from noise; fewer are left of it where `strength` is below 1.
            strength: share of the whole time that the first level lies at, in (0, 1].
            num_tokens: of the clip that is sampled, where levels depend on it.

        Raises:
            ValueError: an argument out of range.
        """
        ...

    def denoiser(self, network: Network) -> Denoise:
        """Returns the denoise function of a network's output as a function of (x, time)."""
        ...

    def sampler(self, name: str) -> Sampler:
        """Returns the sampler of a name of `SAMPLERS`, with the process's variance; ValueError for another name."""
        ...


class FlowProcess:
    """Rectified flow.

    Args:
        config: what is predicted, and which times are trained on.
    """

    most_steps = None

    def __init__(self, config: FlowConfig) -> None:
        self.config = config

    def draw(self, key: jax.Array, shape: tuple[int, ...]) -> Float[Array, "..."]:
        """Draws times to train at, logit-normal."""
        return schedules.logit_normal_times(key, shape, self.config.time_mean, self.config.time_std)

    def shift(self, times: Float[Array, "..."], num_tokens: Array | float) -> Float[Array, "..."]:
        """Returns times as clips of so many tokens have them, broadcast; as they are without `config.base_tokens`."""
        base = self.config.base_tokens
        if base is None:
            return times
        # A clip without tokens is no clip: its times are of no token.
        return schedules.shifted(times, (jnp.maximum(num_tokens, 1) / base) ** 0.5)

    def ladder(self, num_steps: int, strength: float = 1.0, num_tokens: int | None = None) -> Levels:
        """Returns the levels of evenly spaced times, shifted for the clip's size; see `Process`."""
        base = self.config.base_tokens
        shift = 1.0 if base is None or num_tokens is None else schedules.resolution_shift(num_tokens, base)
        return flow_levels(schedules.start_at(schedules.flow_times(num_steps, shift), strength))

    def denoiser(self, network: Network) -> Denoise:
        """Returns the denoise function of a network."""
        return denoiser(network, self.config.prediction)

    def sampler(self, name: str) -> Sampler:
        """Returns the sampler of a name."""
        return named_sampler(name)


class DiscreteProcess:
    """A discrete Gaussian process.

    Args:
        config: of the process.
        clip: bounds that the clean data is clipped to when it is sampled; None for no clipping.
        levels: (T + 1,) each, in place of the schedule's, where betas are trained.

    Attributes:
        config: of the process.
        levels: (T + 1,) each, from the noisiest to data.
    """

    def __init__(
        self, config: GaussianConfig, clip: tuple[float, float] | None = None, levels: Levels | None = None
    ) -> None:
        self.config, self.clip = config, clip
        self.levels = discrete_levels(config.betas()) if levels is None else levels

    @property
    def most_steps(self) -> int:
        """T."""
        return self.config.num_levels

    def draw(self, key: jax.Array, shape: tuple[int, ...]) -> Int[Array, "..."]:
        """Draws steps to train at, uniformly."""
        return jax.random.randint(key, shape, 0, self.config.num_levels)

    def at(self, steps: Int[Array, "*shape"]) -> tuple[Levels, Levels]:
        """Returns the levels of steps, and of the steps below them."""
        index = self.config.num_levels - 1 - steps
        return tuple(Levels(*(jnp.asarray(a)[i] for a in self.levels)) for i in (index, index + 1))

    def ladder(self, num_steps: int, strength: float = 1.0, num_tokens: int | None = None) -> Levels:
        """Returns the levels of evenly spaced steps (`linspace`), of T's whole range; see `Process`.

        A strength s leaves those of the lowest s T steps.
        """
        del num_tokens
        total = self.config.num_levels
        steps = schedules.respaced_steps(total, num_steps, "linspace")
        kept = steps[steps + 1 <= strength * total]
        if not 0 < strength <= 1 or not len(kept):
            raise ValueError(f"strength must leave one of {num_steps} steps and be at most 1, got {strength}.")
        places = [*(total - 1 - kept[::-1]), total]
        return Levels(*(np.asarray(a)[places] for a in self.levels))

    def denoiser(self, network: Network, clipped: bool = True) -> Denoise:
        """Returns the denoise function of a network; in training nothing is clipped: it would learn nothing there."""
        learned = self.config.variance == "learned"
        return denoiser(network, self.config.prediction, self.clip if clipped else None, learned_range=learned)

    def sampler(self, name: str) -> Sampler:
        """Returns the sampler of a name."""
        return named_sampler(name, self.config.variance)

    def error(
        self,
        network: Network,
        x0: Float[Array, " examples *values"],
        noise: Float[Array, " examples *values"],
        steps: Int[Array, " examples"],
        bound_share: float,
    ) -> Float[Array, " examples"]:
        """Returns the loss of each example at its step, averaged over its values: `simple` or `hybrid`.

        Args:
            network: function of (x, time).
            x0: the data.
            noise: standard normal.
            steps: 0 ... T - 1.
            bound_share: of the bound's term in `hybrid` (`sora_jax.diffusion.losses.hybrid_error`).
        """
        config, (now, to) = self.config, self.at(steps)
        if config.loss == "simple":
            output = network(corrupt(x0, noise, now.alpha, now.sigma), now.time)
            flat = (a.reshape(len(x0), -1) for a in (output, x0, noise))
            weighting = "simple" if config.min_snr is None else "min_snr"
            return prediction_error(*flat, now.alpha, now.sigma, config.prediction, weighting, config.min_snr or 1.0)
        error = hybrid_error(
            self.denoiser(network, clipped=False), x0, noise, now, to, bound_share, config.discrete,
            likelihood.last_floor(self.levels), config.prediction,
        )  # fmt: skip
        return error.reshape(len(x0), -1).mean(axis=1)


def named_sampler(name: str, variance: str = "small") -> Sampler:
    """Returns a sampler of `SAMPLERS` by its name.

    Args:
        name: of the sampler.
        variance: of the ancestral one, see `Ancestral`.

    Raises:
        ValueError: another name.
    """
    if name not in SAMPLERS:
        raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, got {name!r}.")
    return Ancestral(variance) if name == "ancestral" else SAMPLERS[name]
