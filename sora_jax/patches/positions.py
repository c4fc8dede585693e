"""Where the patches of a clip are, and learned positions on another grid. NumPy only: the pipeline's workers use it."""

from __future__ import annotations

import math

import numpy as np

from sora_jax.array_types import Array, Float
from sora_jax.config import PatchConfig


def grid_positions(grid: tuple[int, int, int], fps: float, patch: PatchConfig) -> Float[np.ndarray, "patches 3"]:
    """Returns the (t, y, x) of a clip's patches, (gt * gh * gw, 3) float32, in the order of `patchify`.

    Args:
        grid: (gt, gh, gw).
        fps: frames a second. t is the time of a patch's first frame in seconds, times `patch.reference_rate`, so
            the same motion at another frame rate has the same coordinates.
        patch: gives the patch's frames and the reference rate.

    Raises:
        ValueError: a frame rate that is not positive.
    """
    if not fps > 0:
        raise ValueError(f"fps must be positive, got {fps}.")
    index = np.stack(np.meshgrid(*(np.arange(n) for n in grid), indexing="ij"), axis=-1).reshape(-1, 3)
    scale = np.array([patch.size[0] * patch.reference_rate / fps, 1.0, 1.0])
    return (index * scale).astype(np.float32)


def interpolate_positions(
    table: Float[Array, "length width"], old_grid: tuple[int, ...], new_grid: tuple[int, ...]
) -> Float[np.ndarray, "new_length width"]:
    """Interpolates learned positions linearly along each axis of their grid (arXiv:2010.11929, section 3.2).

    The corners of the new grid lie on those of the old one, as in the official code (`scipy.ndimage.zoom` of order
    1). An axis of the new grid that has one place takes the first of the old one.

    Args:
        table: (n, D), the grid's positions in the order of `patchify`, or (1 + n, D), with a class token's before
            them, which is kept as it is.
        old_grid: places along each axis: (gh, gw), or (gt, gh, gw).
        new_grid: of as many axes.

    Returns:
        The table of the new grid, with the class token's if there was one, of the dtype of `table`.

    Raises:
        ValueError: grids of different numbers of axes, an axis without places, or a table of another grid.
    """
    table = np.asarray(table)
    if len(old_grid) != len(new_grid) or min(*old_grid, *new_grid) < 1:
        raise ValueError(f"old_grid and new_grid must have as many axes of at least 1, got {old_grid} and {new_grid}.")
    num_special = len(table) - math.prod(old_grid)
    if num_special not in (0, 1):
        n = math.prod(old_grid)
        raise ValueError(f"table must have {n} rows, or {n + 1}, for old_grid {old_grid}; got {len(table)}.")
    grid = table[num_special:].astype(np.float64).reshape(*old_grid, -1)
    for axis, (old, new) in enumerate(zip(old_grid, new_grid, strict=True)):
        places = np.linspace(0, old - 1, new)
        below = np.minimum(places.astype(int), max(old - 2, 0))
        above = np.minimum(below + 1, old - 1)
        share = (places - below).reshape(-1, *[1] * (grid.ndim - axis - 1))
        grid = grid.take(below, axis) * (1 - share) + grid.take(above, axis) * share
    return np.concatenate([table[:num_special], grid.reshape(-1, table.shape[1]).astype(table.dtype)])
