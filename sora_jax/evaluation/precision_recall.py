"""Improved precision and recall: the share of one set that lies on the manifold of the other (arXiv:1904.06991).

The manifold of a set is the union of balls around its features, each as large as the distance r_k to the k-th nearest
other feature of the set:

(1)  f(x, S) = 1 if |x - s| <= r_k(s) for some s in S, and 0 otherwise
(2)  precision = mean over samples x of f(x, reference),   recall = mean over reference x of f(x, samples)

k is 3, as in the paper and in guided-diffusion's evaluator. Distances are in float32, of features with the mean of the
reference taken off, on the default device, a block at a time; that evaluator's are in float16 unless they overflow.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.array_types import Array, Float, NumpyArray

NUM_NEIGHBOURS = 3


class PrecisionRecall(NamedTuple):
    """Shares, 0 ... 1 (equation 2)."""

    precision: float
    recall: float


def precision_recall(
    reference: Float[np.ndarray, "references dim"],
    samples: Float[np.ndarray, "samples dim"],
    *,
    num_neighbours: int = NUM_NEIGHBOURS,
    block_size: int = 4096,
) -> PrecisionRecall:
    """Returns precision and recall (equation 2).

    Args:
        reference: (N, D), N above `num_neighbours`.
        samples: (M, D), as well; the score depends on N and M, which should be those of what it is compared with.
        num_neighbours: k.
        block_size: of the block_size^2 distances that are in memory at a time, 4 bytes each and a few copies.

    Raises:
        ValueError: other shapes, too few features, or one that is not finite.
    """
    if num_neighbours < 1 or block_size < 1:
        raise ValueError(f"num_neighbours and block_size must be at least 1, got {num_neighbours} and {block_size}.")
    for name, features in (("reference", reference), ("samples", samples)):
        if np.ndim(features) != 2 or np.shape(features)[1] != np.shape(reference)[1]:
            shapes = np.shape(reference), np.shape(samples)
            raise ValueError(f"reference and samples must be (N, D) and (M, D), got {shapes[0]} and {shapes[1]}.")
        if len(features) <= num_neighbours:
            raise ValueError(f"{name} must have more than num_neighbours {num_neighbours} rows, got {len(features)}.")
        if not np.isfinite(features).all():
            raise ValueError(f"{name} must be finite.")
    centre = np.mean(reference, axis=0, dtype=np.float64)
    sets = [_blocks(features - centre, block_size) for features in (reference, samples)]
    radii = [_radii(blocks, len(f), num_neighbours) for blocks, f in zip(sets, (reference, samples), strict=True)]
    inside = [[jnp.zeros(len(block), bool) for block in blocks] for blocks in sets]
    for i, u in enumerate(sets[0]):
        for j, v in enumerate(sets[1]):
            found = _inside(u, radii[0][i], v, radii[1][j])
            inside[0][i] |= found[0]
            inside[1][j] |= found[1]
    recall, precision = (
        float(np.concatenate(found)[: len(features)].mean())
        for found, features in zip(inside, (reference, samples), strict=True)
    )
    return PrecisionRecall(precision, recall)


def _blocks(features: NumpyArray, size: int) -> list[NumpyArray]:
    """Returns (size, D) float32 blocks, the last of them filled up with zeros; of fewer rows, one block of those."""
    size = min(size, len(features))
    padding = -len(features) % size
    padded = np.pad(features.astype(np.float32), ((0, padding), (0, 0)))
    return list(padded.reshape(-1, size, features.shape[1]))


def _radii(blocks: list[NumpyArray], count: int, k: int) -> list[Array]:
    """Returns the squared distance of each row to the k-th nearest other one; -1, which holds nothing, for padding."""
    size = len(blocks[0])
    radii = []
    for i, u in enumerate(blocks):
        nearest = jnp.full((size, k), jnp.inf)
        for j, v in enumerate(blocks):
            nearest = _merge_nearest(nearest, u, v, i * size, j * size, count)
        radii.append(jnp.where(i * size + jnp.arange(size) < count, nearest[:, -1], -1.0))
    return radii


@functools.partial(jax.jit, donate_argnums=0)
def _merge_nearest(nearest: Array, u: Array, v: Array, u_start: int, v_start: int, count: int) -> Array:
    """Returns the k smallest squared distances, ascending, of `nearest` and of those from `u` to other rows of `v`."""
    rows, columns = u_start + jnp.arange(len(u)), v_start + jnp.arange(len(v))
    other = (rows[:, None] != columns) & (columns < count)
    distances = jnp.where(other, _squared_distances(u, v), jnp.inf)
    return -jax.lax.top_k(-jnp.concatenate([nearest, distances], axis=1), nearest.shape[1])[0]


@jax.jit
def _inside(u: Array, u_radii: Array, v: Array, v_radii: Array) -> tuple[Array, Array]:
    """Returns which rows of `u` are in a ball of `v`, and which of `v` in one of `u` (equation 1)."""
    distances = _squared_distances(u, v)
    return (distances <= v_radii).any(axis=1), (distances <= u_radii[:, None]).any(axis=0)


def _squared_distances(u: Array, v: Array) -> Array:
    """Returns |u_i - v_j|^2."""
    products = jnp.matmul(u, v.T, precision="highest")
    return jnp.maximum(jnp.square(u).sum(axis=1)[:, None] + jnp.square(v).sum(axis=1) - 2 * products, 0.0)
