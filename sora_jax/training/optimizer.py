"""AdamW with clipping, its learning rate, and the running average of the parameters.

(1)  rate(n)  = peak * min(1, (n + 1) / warmup) * (final + (1 - final) (1 + cos(pi progress)) / 2)
     progress = clip((n - warmup) / (steps - warmup), 0, 1)
(2)  decay(n) = min(ema_decay, (1 + n) / (10 + n))
(3)  ema'     = decay ema + (1 - decay) params'

n counts updates from 0. By (2) the average forgets the initialisation within the first steps.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from sora_jax.array_types import Array, Float, PyTree
from sora_jax.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, num_steps: int) -> optax.Schedule:
    """Returns equation 1 as a function of the update's number.

    Args:
        config: peak (`learning_rate`), `final_share` and `warmup_steps`.
        num_steps: updates of the whole run, where the cosine ends.
    """
    span = max(num_steps - config.warmup_steps, 1)

    def schedule(count: Array) -> Float[Array, ""]:
        warm = jnp.minimum(1.0, (count + 1) / max(config.warmup_steps, 1))
        progress = jnp.clip((count - config.warmup_steps) / span, 0.0, 1.0)
        cosine = (1 + jnp.cos(jnp.pi * progress)) / 2
        return config.learning_rate * warm * (config.final_share + (1 - config.final_share) * cosine)

    return schedule


def decay_mask(params: PyTree) -> PyTree:
    """Returns which parameters are decayed: kernels; not biases, norms or modulation tables."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == "kernel", params)


def make_optimizer(config: OptimizerConfig, num_steps: int) -> optax.GradientTransformation:
    """Returns clipping by the global norm, then AdamW (arXiv:1711.05101) at `learning_rate`."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate(config, num_steps),
            b1=config.b1,
            b2=config.b2,
            eps=config.eps,
            weight_decay=config.weight_decay,
            mask=decay_mask,
        ),
    )


def ema_update(ema_params: PyTree, params: PyTree, count: Array, limit: float) -> PyTree:
    """Returns the average after update `count` (from 0) by equations 2 and 3; `limit` is `ema_decay`."""
    count = jnp.asarray(count, jnp.float32)
    decay = jnp.minimum(limit, (1 + count) / (10 + count))
    return jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, ema_params, params)
