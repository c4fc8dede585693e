"""Binomial diffusion (arXiv:1503.03585, Table App.1): bits that turn into fair coins, and back.

Steps are counted from 0 (the least noisy) to T - 1; x is 0 or 1, B(p) is 1 with probability p.

(1)  q(x_t | x_{t-1}) = B((1 - beta_t) x_{t-1} + beta_t / 2)
(2)  q(x_t | x_0)     = B(a_t x_0 + (1 - a_t) / 2),  a_t = prod_{s <= t} (1 - beta_s)
(3)  q(x_{t-1} | x_t, x_0) ~ q(x_t | x_{t-1}) q(x_{t-1} | x_0)
(4)  p(x_{t-1} | x_t) = sum over x_0 of q(x_{t-1} | x_t, x_0) B(x_0; f(x_t, t))
(5)  p(x_{T-1}) = B(1/2)
(6)  K = -(L_T + sum of L_{t-1} + L_0) / log 2, as in `sora_jax.diffusion.likelihood`

The paper's network gives p(x_{t-1} | x_t) itself; here it gives the logits of x_0, from which (4) follows. Both can
express the same chains of independent bits.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.array_types import Array, Float, Int
from sora_jax.diffusion.likelihood import BoundTerms
from sora_jax.diffusion.schedules import check_betas

Network = Callable[[Array, Array], Array]  # (bits (B, ...), step ()) -> logits of x_0, of the bits' shape
_SMALLEST = 1e-30


def kept(betas: Float[np.ndarray, " steps"]) -> Float[np.ndarray, " steps"]:
    """Returns a_t of equation 2, float64: how much of a bit's lean is left after each step."""
    return np.cumprod(1 - check_betas(betas))


def marginal(x0: Float[Array, "..."], a: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns q(x_t = 1 | x_0) by equation 2; `x0` may be a probability."""
    return a * x0 + (1 - a) / 2


def draw(key: jax.Array, p: Float[Array, "..."]) -> Float[Array, "..."]:
    """Draws bits that are 1 with probability p, as float32."""
    return (jax.random.uniform(key, p.shape) < p).astype(jnp.float32)


def posterior(
    xt: Float[Array, "..."], x0: Float[Array, "..."], beta: Float[Array, "..."], a_before: Float[Array, "..."]
) -> Float[Array, "..."]:
    """Returns q(x_{t-1} = 1 | x_t, x_0) by equation 3.

    Args:
        xt: bits.
        x0: bits, or probabilities f, for which it is equation 4.
        beta: of the step t.
        a_before: a_{t-1}; 1 at t = 0, where the result is `x0`.
    """

    def given(x0: Array) -> Array:
        prior = marginal(x0, a_before)
        one = prior * jnp.where(xt > 0.5, 1 - beta / 2, beta / 2)
        zero = (1 - prior) * jnp.where(xt > 0.5, beta / 2, 1 - beta / 2)
        return one / jnp.maximum(one + zero, _SMALLEST)

    return x0 * given(jnp.ones_like(xt)) + (1 - x0) * given(jnp.zeros_like(xt))


def bernoulli_kl(q: Float[Array, "..."], p: Float[Array, "..."]) -> Float[Array, "..."]:
    """Returns KL(B(q) || B(p)) of each bit in nats."""

    def part(q: Array, p: Array) -> Array:
        safe = jnp.where(q > 0, q, 1)
        return jnp.where(q > 0, q * (jnp.log(safe) - jnp.log(jnp.maximum(p, _SMALLEST))), 0)

    return part(q, p) + part(1 - q, 1 - p)


def step_term(
    network: Network,
    x0: Float[Array, " batch *bits"],
    key: jax.Array,
    step: Int[Array, ""],
    beta: Float[Array, ""],
    a: Float[Array, ""],
    a_before: Float[Array, ""],
) -> tuple[Array, Array]:
    """Returns L_{t-1} of each bit in nats, with one draw of x_t, and the squared error of the predicted probability.

    At step 0 the term is L_0, the coding cost of x_0 itself.

    Args:
        network: gives the logits of x_0.
        x0: bits.
        key: of x_t.
        step: t.
        beta: of the step.
        a: a_t.
        a_before: a_{t-1}, 1 at step 0.
    """
    xt = draw(key, marginal(x0, a))
    logits = network(xt, step)
    f = jax.nn.sigmoid(logits)
    divergence = bernoulli_kl(posterior(xt, x0, beta, a_before), posterior(xt, f, beta, a_before))
    # Where nothing stood before, the logits say it without the rounding of a probability near 0 or 1.
    coding = -jax.nn.log_sigmoid(jnp.where(x0 > 0.5, logits, -logits))
    return jnp.where(step == 0, coding, divergence), (f - x0) ** 2


def bound(
    network: Network, x0: Float[Array, " batch *bits"], betas: Float[np.ndarray, " steps"], key: jax.Array
) -> BoundTerms:
    """Returns the terms of the bound on -log p(x_0), each with one draw, in nats an example.

    Args:
        network: gives the logits of x_0.
        x0: (B, ...), bits.
        betas: of the process.
        key: of the draws; step t takes fold_in(key, t).
    """
    a = kept(betas)
    before = np.append(1.0, a[:-1])
    num_steps = len(a)

    def per_example(values: Array) -> Array:
        return values.reshape(len(x0), -1).sum(axis=1)

    def body(_: None, t: tuple[Array, ...]) -> tuple[None, tuple[Array, Array]]:
        term, error = step_term(network, x0, jax.random.fold_in(key, t[0]), *t)
        return None, (per_example(term), per_example(error))

    order = np.arange(num_steps)[::-1]
    tables = (np.asarray(v[order], np.float32) for v in (np.asarray(betas, np.float64), a, before))
    _, (steps, errors) = jax.lax.scan(body, None, (jnp.asarray(order, jnp.int32), *map(jnp.asarray, tables)))
    prior = per_example(bernoulli_kl(marginal(x0, jnp.float32(a[-1])), jnp.full_like(x0, 0.5)))
    return BoundTerms(prior, steps, errors)


def trajectory(
    network: Network, shape: tuple[int, ...], betas: Float[np.ndarray, " steps"], key: jax.Array
) -> Float[Array, " levels *shape"]:
    """Draws bits by the reverse chain (equations 4 and 5) and returns all that it goes through.

    Args:
        network: gives the logits of x_0.
        shape: of the bits, the number of samples first.
        betas: of the process.
        key: of the draws.

    Returns:
        (T + 1, ...): fair coins, then x after each step; the last is data.
    """
    a = kept(betas)
    before = np.append(1.0, a[:-1])

    def body(x: Array, t: tuple[Array, ...]) -> tuple[Array, Array]:
        step, beta, a_before = t
        p = posterior(x, jax.nn.sigmoid(network(x, step)), beta, a_before)
        x = draw(jax.random.fold_in(key, step), p)
        return x, x

    order = np.arange(len(a))[::-1]
    tables = (np.asarray(v[order], np.float32) for v in (np.asarray(betas, np.float64), before))
    coins = draw(jax.random.fold_in(key, len(a)), jnp.full(shape, 0.5))
    _, path = jax.lax.scan(body, coins, (jnp.asarray(order, jnp.int32), *map(jnp.asarray, tables)))
    return jnp.concatenate([coins[None], path])


def sample(
    network: Network, shape: tuple[int, ...], betas: Float[np.ndarray, " steps"], key: jax.Array
) -> Float[Array, "..."]:
    """Returns the end of a `trajectory`."""
    return trajectory(network, shape, betas, key)[-1]


def null_bits(num_bits: int) -> float:
    """Returns the log-likelihood of fair coins in bits: what the data has after diffusion."""
    return -float(num_bits)
