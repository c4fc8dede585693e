"""Guidance, as wrappers of networks (functions of (x, time)) and of denoise functions.

(1)  f = f_null + scale (f_text - f_null)                                      arXiv:2207.12598, Eq. 6, scale = 1 + w
(2)  f = f_text where time lies outside an interval                            arXiv:2404.07724, Eq. 6
(3)  p~(x_s | x_t) ~ p(x_s | x_t) r(x_s):  mean~ = mean + variance d log r / d x
                                                                    arXiv:1503.03585, section 2.5, Eq. 15-20

(1) and (2) may be applied to any prediction, since these are linear in each other at a given x.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax.numpy as jnp

from sora_jax.array_types import Array
from sora_jax.diffusion.gaussian import Levels, expand, posterior, root
from sora_jax.diffusion.samplers import Denoise, Network


def classifier_free(
    conditional: Network, unconditional: Network, scale: float | Array, values: Array | None = None
) -> Network:
    """Returns the network of equation 1; a scale of 1 is no guidance.

    Args:
        conditional: gives f_text.
        unconditional: gives f_null.
        scale: of the guidance, broadcast against what is predicted.
        values: bool, broadcast against what is predicted: what is guided, the rest being the conditional network's;
            None for all. The official DiT sampler guides three of four channels, and no variance.
    """

    def network(x: Array, time: Array) -> Array:
        text, null = conditional(x, time), unconditional(x, time)
        guided = null + scale * (text - null)
        return guided if values is None else jnp.where(values, guided, text)

    return network


def limited_interval(guided: Network, conditional: Network, low: float, high: float) -> Network:
    """Returns the network that is guided only at times in [low, high] (equation 2).

    Raises:
        ValueError: an empty interval.
    """
    if not low <= high:
        raise ValueError(f"the interval must have low <= high, got ({low}, {high}).")

    def network(x: Array, time: Array) -> Array:
        inside = expand((time >= low) & (time <= high), x)
        return jnp.where(inside, guided(x, time), conditional(x, time))

    return network


@dataclasses.dataclass(frozen=True)
class Multiplied:
    """The reverse chain of p(x) r(x), for a chain that samples p(x) (equation 3): posteriors without retraining.

    Noise is that of the posterior (`small`). r is evaluated at each noise level as if x were clean, as in the paper.

    Attributes:
        log_r_gradient: d log r / d x at a state, of its shape.
    """

    log_r_gradient: Callable[[Array], Array]
    evaluations: ClassVar[int] = 1
    stochastic: ClassVar[bool] = True

    def start(self, x: Array, level: Levels) -> tuple[()]:
        """Remembers nothing."""
        return ()

    def step(
        self, denoise: Denoise, x: Array, memory: Any, now: Levels, to: Levels, index: Array, noise: Array
    ) -> tuple[Array, Any]:
        """Draws x at the level `to`; the step onto clean data takes the mean alone."""
        denoised, q = denoise(x, now), posterior(now, to)
        mean = expand(q.xt, x) * x + expand(q.x0, x) * denoised.x0
        moved = mean + expand(q.variance, x) * self.log_r_gradient(mean)
        return moved + expand(root(q.variance), x) * noise, ()


def inpainting(denoise: Denoise, known: Array, mask: Array, noise: Callable[[Levels], Array]) -> Denoise:
    """Returns a denoise function around known values: r(x) is a delta there (arXiv:1503.03585, section 2.5.3).

    What is known is put into the state at its noise level before the network sees it, and is returned as the
    prediction, so any sampler ends with it. The rest sees it through noise alone, so it follows it less than the true
    conditional does; a network trained with clean patches beside noisy ones (`SoraTransformer`) has no need of this.

    Args:
        denoise: of the network.
        known: the clean values, of the shape of x; anything where they are not known.
        mask: true where they are known, broadcast against x.
        noise: standard normal of the shape of x, for a level.
    """
    known = jnp.where(mask, known, 0)

    def wrapped(x: Array, level: Levels) -> Any:
        alpha, sigma = expand(level.alpha, x), expand(level.sigma, x)
        fresh = noise(level)
        x = jnp.where(mask, alpha * known + sigma * fresh, x)
        denoised = denoise(x, level)
        return denoised._replace(x0=jnp.where(mask, known, denoised.x0), noise=jnp.where(mask, fresh, denoised.noise))

    return wrapped
