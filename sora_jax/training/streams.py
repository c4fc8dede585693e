"""Random keys, derived from (seed, step, stream) and never stored."""

from __future__ import annotations

import jax

from sora_jax.array_types import Array, Int

INIT, TRAIN, EVAL = range(3)


def derive(seed: int, step: Int[Array, ""] | int, stream: int) -> jax.Array:
    """Returns the key of one stream at one step."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), stream)


def row_keys(key: jax.Array, rows: Int[Array, " rows"]) -> jax.Array:
    """Returns a key for each row: what a row draws depends on its number in the global batch and on nothing else, so
    neither devices, hosts nor accumulation change it.
    """
    return jax.vmap(lambda row: jax.random.fold_in(key, row))(rows)
