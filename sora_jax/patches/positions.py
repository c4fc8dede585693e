"""Where the patches of a clip are. NumPy only: the data pipeline's workers use it."""

from __future__ import annotations

import numpy as np

from sora_jax.array_types import Float
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
