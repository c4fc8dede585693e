"""The bound on the log-likelihood, averaged over examples and draws of the noise, with its standard error."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.array_types import Array, Float
from sora_jax.diffusion.likelihood import BoundTerms, bits

Bound = Callable[[Array, jax.Array], BoundTerms]  # ((B, ...) examples, key) -> their terms


@dataclasses.dataclass(frozen=True)
class BoundEstimate:
    """K of examples, in bits an example (`sora_jax.diffusion.likelihood`, equation 5), and the terms that it sums.

    Attributes:
        k: (examples,) float64, each averaged over its draws.
        terms: means over examples and draws, `prior` (1,), `steps` (T, 1) and `squared_errors` (T, 1); in nats.
    """

    k: Float[np.ndarray, " examples"]
    terms: BoundTerms

    @property
    def mean(self) -> float:
        """Mean of K."""
        return float(self.k.mean())

    @property
    def standard_error(self) -> float:
        """Standard error of the mean, were the examples independent; of copies of a few it is that of the draws alone.

        0 for one example.
        """
        return float(self.k.std(ddof=1) / np.sqrt(len(self.k))) if len(self.k) > 1 else 0.0


def estimate_bound(
    bound: Bound,
    examples: Float[np.ndarray, " examples *values"],
    key: jax.Array,
    *,
    num_draws: int = 1,
    batch_size: int = 128,
    progress: Callable[[int], None] | None = None,
) -> BoundEstimate:
    """Returns the bound of examples.

    Args:
        bound: of a model; compiled here, for one shape.
        examples: (N, ...).
        key: of the draws; batch i of draw d takes fold_in(fold_in(key, d), i).
        num_draws: of the noise of all steps, for each example.
        batch_size: examples at a time; the last batch is filled up with copies that do not count.
        progress: called with the batches done.

    Raises:
        ValueError: no example, or fewer than one draw.
    """
    if not len(examples) or num_draws < 1:
        raise ValueError(f"needs an example and a draw, got {len(examples)} examples and num_draws {num_draws}.")
    compiled = jax.jit(bound)
    batch_size = min(batch_size, len(examples))
    starts = range(0, len(examples), batch_size)
    k = np.zeros(len(examples))
    sums: list[np.ndarray] | None = None
    for draw in range(num_draws):
        for number, start in enumerate(starts):
            index = np.arange(start, start + batch_size)
            counts = index < len(examples)
            batch = jnp.asarray(examples[np.minimum(index, len(examples) - 1)])
            terms = compiled(batch, jax.random.fold_in(jax.random.fold_in(key, draw), number))
            k[index[counts]] -= np.float64(bits(terms.total))[counts] / num_draws
            parts = [np.float64(part)[..., counts].sum(axis=-1) for part in terms]
            sums = parts if sums is None else [a + b for a, b in zip(sums, parts, strict=True)]
            if progress is not None:
                progress(draw * len(starts) + number + 1)
    means = (part[..., None] / (num_draws * len(examples)) for part in sums)
    return BoundEstimate(k, BoundTerms(*means))
