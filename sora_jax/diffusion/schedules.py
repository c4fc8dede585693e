"""How much noise there is at each step: beta tables, their subsets, flow times, and which times are trained on.

Discrete diffusion counts steps from 0 (the least noisy) to T - 1; flow time runs from 0 (data) to 1 (noise).

(1)  q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I)                        arXiv:2006.11239, Eq. 2
(2)  alpha_bar_t = prod_{s <= t} (1 - beta_s),  x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) eps     Eq. 4
(3)  alpha_bar_t = f(t + 1) / f(0),  f(t) = cos^2((t / T + s) / (1 + s) pi / 2)      arXiv:2102.09672, Eq. 17
(4)  beta_t = 1 / (T - t), t = 0 ... T - 1                                           arXiv:1503.03585, section 2.4.1
(5)  sqrt(alpha_bar)' = (sqrt(alpha_bar_t) - last) first / (first - last)            arXiv:2305.08891, Algorithm 1
(6)  t' = shift t / (1 + (shift - 1) t)                                              arXiv:2403.03206, Eq. 23
(7)  alpha_bar_t = sigmoid(l_t),  l_t = log SNR_t falling evenly from l_0 to l_{T-1}     arXiv:2107.00630, section 3.2

Tables are float64 NumPy arrays, computed once; what enters a compiled function is made from them in float32.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.array_types import Array, Float, Int, NumpyArray


def check_betas(betas: Float[np.ndarray, " steps"]) -> Float[np.ndarray, " steps"]:
    """Returns a table of betas as float64.

    Raises:
        ValueError: it is not a list of at least one number in (0, 1], naming the first that is not. (1 is allowed: it
            is the last one where the terminal SNR is zero.)
    """
    betas = np.asarray(betas, np.float64)
    if betas.ndim != 1 or not len(betas):
        raise ValueError(f"betas must be a list of at least one number, got shape {betas.shape}.")
    bad = np.flatnonzero(~((betas > 0) & (betas <= 1)))
    if len(bad):
        raise ValueError(f"betas must be in (0, 1], got betas[{bad[0]}] = {betas[bad[0]]}.")
    return betas


def linear_betas(
    num_steps: int = 1000, start: float | None = None, end: float | None = None
) -> Float[np.ndarray, " steps"]:
    """Returns evenly spaced betas (arXiv:2006.11239, section 4).

    Args:
        num_steps: T.
        start: first beta. The default is 1e-4 of 1000 steps, times 1000 / T for another T, as in improved DDPM's code:
            then as little of the data is left at the end, whatever T.
        end: last beta; the default, 0.02, is scaled likewise.

    Raises:
        ValueError: so few steps that the last beta would be scaled to 1 or above.
    """
    _check_num_steps(num_steps)
    scale = 1000 / num_steps
    if end is None and 0.02 * scale >= 1:
        raise ValueError(f"num_steps must be at least 21 for the last beta of 20 / num_steps, got {num_steps}.")
    return check_betas(
        np.linspace(1e-4 * scale if start is None else start, 0.02 * scale if end is None else end, num_steps)
    )


def cosine_betas(num_steps: int = 1000, offset: float = 0.008, largest: float = 0.999) -> Float[np.ndarray, " steps"]:
    """Returns the betas of equation 3, cut at `largest`."""
    _check_num_steps(num_steps)
    t = np.arange(num_steps + 1) / num_steps
    f = np.cos((t + offset) / (1 + offset) * math.pi / 2) ** 2
    return check_betas(np.minimum(1 - f[1:] / f[:-1], largest))


def harmonic_betas(num_steps: int) -> Float[np.ndarray, " steps"]:
    """Returns equation 4: each step erases the same share 1 / T of what there was; the last one erases all.

    The paper counts steps from 1, which makes it 1 / (T - t + 1).
    """
    _check_num_steps(num_steps)
    return check_betas(1 / (num_steps - np.arange(num_steps)))


def log_snr_betas(num_steps: int, first: float, last: float) -> Float[np.ndarray, " steps"]:
    """Returns the betas of equation 7: from one step to the next the SNR falls by the same factor.

    Structure of every size between the two ends then gets its share of the steps. VDM learns the curve; here it is
    the straight line.

    Args:
        num_steps: T, at least 2.
        first: log SNR of step 0, log(alpha_bar / (1 - alpha_bar)); 2 log(1 / s) reaches noise of standard deviation s.
        last: log SNR of step T - 1.

    Raises:
        ValueError: fewer than two steps, or log SNRs that do not fall.
    """
    if num_steps < 2:
        raise ValueError(f"num_steps must be at least 2, got {num_steps}.")
    if not math.inf > first > last > -math.inf:
        raise ValueError(f"first and last must be finite log SNRs, first above last, got {first} and {last}.")
    log_snr = np.linspace(first, last, num_steps)
    return betas_of(1 / (1 + np.exp(-log_snr)))


def learned_betas(logits: Float[Array, " rates"], first: float = 1e-3) -> Float[Array, " steps"]:
    """Returns betas that can be trained (arXiv:1503.03585, section 2.4.1): the first is fixed, to avoid overfitting.

    Args:
        logits: (T - 1,), trained; beta_t is their sigmoid.
        first: beta_0, in (0, 1).
    """
    return jnp.concatenate([jnp.full((1,), first, logits.dtype), jax.nn.sigmoid(logits)])


def alpha_bar(betas: Float[np.ndarray, " steps"]) -> Float[np.ndarray, " steps"]:
    """Returns the share of the data's variance that is left after each step (equation 2), float64."""
    return np.cumprod(1 - check_betas(betas))


def betas_of(alpha_bar: Float[np.ndarray, " steps"]) -> Float[np.ndarray, " steps"]:
    """Undoes `alpha_bar`."""
    alpha_bar = np.asarray(alpha_bar, np.float64)
    return check_betas(1 - alpha_bar / np.concatenate([[1.0], alpha_bar[:-1]]))


def zero_terminal_snr(betas: Float[np.ndarray, " steps"]) -> Float[np.ndarray, " steps"]:
    """Returns betas whose last step leaves nothing of the data, and whose first is as it was (equation 5)."""
    signal = np.sqrt(alpha_bar(betas))
    if len(signal) < 2:
        raise ValueError(f"a zero terminal SNR needs at least 2 steps, got {len(signal)}.")
    first, last = signal[0], signal[-1]
    return betas_of(((signal - last) * first / (first - last)) ** 2)


def respaced_steps(num_steps: int, count: int, spacing: str = "leading", offset: int = 0) -> Int[np.ndarray, " n"]:
    """Returns `count` of the steps 0 ... num_steps - 1, increasing.

    Args:
        num_steps: T, of the trained process.
        count: how many are kept.
        spacing: `leading` keeps every (T // count)-th from 0 on, `trailing` every (T / count)-th back from T - 1,
            `linspace` evenly from 0 to T - 1 (arXiv:2305.08891, Table 2, names them). The official DiT and improved
            DDPM samplers keep `linspace`, and this is their rule to the step. Their `ddimN` is `leading` where count
            divides T; elsewhere it takes the least stride that gives N steps, or none, while `leading` is diffusers'.
        offset: added to `leading`; 1 is what Stable Diffusion's samplers add.

    Raises:
        ValueError: fewer than one or more than T steps.
    """
    _check_num_steps(num_steps)
    if not 1 <= count <= num_steps:
        raise ValueError(f"count must be between 1 and the process's {num_steps} steps, got {count}.")
    if spacing == "leading":
        return np.arange(count) * (num_steps // count) + offset
    if spacing == "trailing":
        return np.round(np.arange(num_steps, 0, -num_steps / count)).astype(np.int64)[:count][::-1] - 1
    if spacing == "linspace":
        # Added up and rounded half to even as `space_timesteps` of improved DDPM does: ties fall as they do there.
        stride = (num_steps - 1) / (count - 1) if count > 1 else 1.0
        return np.array([round(place) for place in itertools.accumulate([0.0] + [stride] * (count - 1))], np.int64)
    raise ValueError(f"spacing must be leading, trailing or linspace, got {spacing!r}.")


def respaced_betas(betas: Float[np.ndarray, " steps"], steps: Sequence[int] | NumpyArray) -> Float[np.ndarray, " kept"]:
    """Returns the betas of the process that visits only some steps (arXiv:2102.09672, Eq. 19).

    Args:
        betas: of the whole process.
        steps: that are kept, strictly increasing.

    Raises:
        ValueError: steps that are not increasing or not of the process.
    """
    steps = np.asarray(steps)
    if steps.ndim != 1 or not len(steps) or (np.diff(steps) <= 0).any() or steps[0] < 0 or steps[-1] >= len(betas):
        raise ValueError(f"steps must increase strictly within 0 ... {len(betas) - 1}, got {steps.tolist()}.")
    return betas_of(alpha_bar(betas)[steps])


def flow_times(num_steps: int, shift: float = 1.0) -> Float[np.ndarray, " times"]:
    """Returns num_steps + 1 times falling from 1 to 0, float32.

    Args:
        num_steps: steps of the sampler.
        shift: 1 spaces them evenly; above 1, equation 6 spends more steps on noise, as large clips need.

    Raises:
        ValueError: fewer than one step, or a shift that is not positive.
    """
    _check_num_steps(num_steps)
    return shift_times(np.linspace(1.0, 0.0, num_steps + 1), shift).astype(np.float32)


def start_at(times: Float[np.ndarray, " times"], strength: float) -> Float[np.ndarray, " started"]:
    """Returns the times that are left of falling ones where a sampler starts at the time `strength` (SDEdit,
    arXiv:2108.01073): that, and all below it. A strength of 1 leaves all.

    Raises:
        ValueError: a strength outside (0, 1].
    """
    if not 0 < strength <= 1:
        raise ValueError(f"strength must be above 0 and at most 1, got {strength}.")
    return np.append(np.asarray(strength, times.dtype), times[times < strength])


def shift_times(t: Float[Array, "*batch"], shift: float) -> Float[Array, "*batch"]:
    """Returns equation 6; its fixed points are 0 and 1.

    Raises:
        ValueError: a shift that is not positive.
    """
    if not shift > 0:
        raise ValueError(f"shift must be positive, got {shift}.")
    return shifted(t, shift)


def shifted(t: Float[Array, "..."], shift: Array | float) -> Float[Array, "..."]:
    """Returns equation 6, unchecked, for shifts that may be arrays, broadcast against `t`."""
    return shift * t / (1 + (shift - 1) * t)


def resolution_shift(num_tokens: int | float, base_tokens: int | float) -> float:
    """Returns the shift that gives a clip of `num_tokens` the uncertainty that one of `base_tokens` has.

    It is the square root of their ratio (arXiv:2403.03206, section 5.3.2: of the resolutions n = H W).
    """
    if not (num_tokens > 0 and base_tokens > 0):
        raise ValueError(f"num_tokens and base_tokens must be positive, got {num_tokens} and {base_tokens}.")
    return math.sqrt(num_tokens / base_tokens)


def uniform_times(key: jax.Array, shape: tuple[int, ...]) -> Float[Array, "..."]:
    """Draws flow times uniformly from [0, 1), float32."""
    return jax.random.uniform(key, shape)


def logit_normal_times(key: jax.Array, shape: tuple[int, ...], mean: float, std: float) -> Float[Array, "..."]:
    """Draws flow times t = sigmoid(mean + std n), n ~ N(0, 1) (arXiv:2403.03206, section 3.1), float32.

    A positive `mean` is noisier.
    """
    return jax.nn.sigmoid(mean + std * jax.random.normal(key, shape))


def _check_num_steps(num_steps: int) -> None:
    if num_steps < 1:
        raise ValueError(f"num_steps must be at least 1, got {num_steps}.")
