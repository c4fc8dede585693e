"""Integrating dx / dt = v(x, t) from noise (t = 1) to data (t = 0).

    (1)  Euler (order 1)   x' = x + h v(x, t)
    (2)  Heun (order 2)    x' = x + h / 2 (v(x, t) + v(x + h v(x, t), t + h))

with h = t' - t < 0. A step is a pure function; a run of steps is one scan. `denoise(x, t)` returns the velocity at
a scalar time; how time is shared out among tokens is its own affair.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.array_types import Array, Float

Denoise = Callable[[Array, Array], Array]
Step = Callable[[Denoise, Array, Array, Array], Array]


def flow_times(num_steps: int, shift: float = 1.0) -> Float[np.ndarray, " times"]:
    """Returns num_steps + 1 times falling from 1 to 0, float32.

    Args:
        num_steps: steps of the sampler.
        shift: 1 spaces them evenly; t -> shift t / (1 + (shift - 1) t) spends more steps on noise where it is
            above 1 (arXiv:2403.03206, Eq. 23).

    Raises:
        ValueError: fewer than one step, or a shift that is not positive.
    """
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}.")
    if not shift > 0:
        raise ValueError(f"shift must be positive, got {shift}.")
    t = np.linspace(1.0, 0.0, num_steps + 1)
    return (shift * t / (1 + (shift - 1) * t)).astype(np.float32)


def euler_step(denoise: Denoise, x: Array, t: Array, t_next: Array) -> Array:
    """Steps from `t` to `t_next` by equation 1: one evaluation."""
    return x + (t_next - t) * denoise(x, t)


def heun_step(denoise: Denoise, x: Array, t: Array, t_next: Array) -> Array:
    """Steps from `t` to `t_next` by equation 2: two evaluations.

    The step onto t = 0 is equation 1 (arXiv:2206.00364, Algorithm 1), because a network that predicts x_0 has no
    velocity there. The order stays 2: it is a single step.
    """
    v = denoise(x, t)
    ahead = denoise(x + (t_next - t) * v, t_next)
    return x + (t_next - t) * jnp.where(t_next > 0, (v + ahead) / 2, v)


STEPS: dict[str, Step] = {"euler": euler_step, "heun": heun_step}


def sample_chunk(denoise: Denoise, x: Array, times: Float[Array, " times"], step: Step) -> Array:
    """Takes `x` through consecutive times by one scan.

    Args:
        denoise: returns the velocity at (x, t).
        x: the state at times[0].
        times: at least two.
        step: `euler_step` or `heun_step`.

    Returns:
        The state at times[-1].
    """
    times = jnp.asarray(times)

    def body(x: Array, pair: tuple[Array, Array]) -> tuple[Array, None]:
        return step(denoise, x, *pair), None

    return jax.lax.scan(body, x, (times[:-1], times[1:]))[0]
