"""Does a model make what it is asked for? The training clip that a sample is nearest to, by features of its frames.

A sample may begin anywhere in the motion of its clip, so frames are matched each on their own:

    (1)  d(sample, clip) = mean over frames f of the sample of  min over frames g of the clip of  1 - cos(f, g)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from sora_jax.array_types import Float


def clip_distances(
    samples: Sequence[Float[np.ndarray, "sample_frames features"]],
    clips: Sequence[Float[np.ndarray, "clip_frames features"]],
) -> Float[np.ndarray, "samples clips"]:
    """Returns the distance of every sample to every clip by equation 1.

    Args:
        samples: the features of each sample's frames; at least one frame each.
        clips: the features of each clip's frames; at least one frame each.

    Returns:
        (samples, clips) float64, 0 (the same direction) to 2.

    Raises:
        ValueError: a sample or a clip without frames, or none at all.
    """
    for name, values in (("samples", samples), ("clips", clips)):
        if not len(values) or not all(len(features) for features in values):
            raise ValueError(f"{name} must hold at least one clip, of at least one frame each.")
    starts = np.cumsum([0, *(len(clip) for clip in clips[:-1])])
    bank = _unit(np.concatenate(clips))
    rows = [np.maximum.reduceat(_unit(sample) @ bank.T, starts, axis=1) for sample in samples]  # (frames, clips)
    return np.stack([1 - row.mean(axis=0) for row in rows])


def frame_difference(frames: np.ndarray) -> float:
    """Returns the mean absolute difference between consecutive frames, in pixel values (0 ... 255).

    Args:
        frames: (T, H, W, C) uint8; a single frame differs by 0.
    """
    if len(frames) < 2:
        return 0.0
    return float(np.abs(np.diff(frames.astype(np.int16), axis=0)).mean())


def _unit(features: Float[np.ndarray, "frames features"]) -> Float[np.ndarray, "frames features"]:
    """Returns float64 features of length 1 (a zero stays zero)."""
    features = np.asarray(features, np.float64)
    return features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-12)
