"""Classifying a long video by several views of it (arXiv:2103.15691, section 4.1).

A view is what a video classifier takes: some frames at a stride, cut to a square or an oblong. Views lie evenly in
time, and evenly along the longer side of the frames (left, centre, right). With logits f of a view:

    (1)  logits(video) = mean over clips i and crops j of f(video[frames_i, crop_j])
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from sora_jax.array_types import Array, Float, Int, NumpyArray, Shaped


def view_frames(video_length: int, num_frames: int, stride: int, num_clips: int) -> Int[NumpyArray, "clips frames"]:
    """Returns the frames of each clip, (num_clips, num_frames).

    The first clip begins with the first frame of the video and the last one ends with its last; a single clip lies in
    the middle. A video that is too short is continued by its last frame.

    Args:
        video_length: frames of the video.
        num_frames: of a clip.
        stride: from one frame of a clip to its next.
        num_clips: how many.

    Raises:
        ValueError: a number below 1; the message names it.
    """
    numbers = dict(video_length=video_length, num_frames=num_frames, stride=stride, num_clips=num_clips)
    for name, value in numbers.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}.")
    room = max(video_length - 1 - (num_frames - 1) * stride, 0)
    frames = _spread(room, num_clips)[:, None] + stride * np.arange(num_frames)
    return np.minimum(frames, video_length - 1)


def view_corners(size: tuple[int, int], crop: tuple[int, int], num_crops: int) -> Int[NumpyArray, "crops 2"]:
    """Returns the (y, x) at which each crop begins, (num_crops, 2): spread over the longer side, central in the other.

    Args:
        size: (height, width) of the frames.
        crop: (height, width) of the crops.
        num_crops: how many; a single one lies in the middle.

    Raises:
        ValueError: frames that are smaller than the crop, or no crops.
    """
    if num_crops < 1:
        raise ValueError(f"num_crops must be at least 1, got {num_crops}.")
    room = np.subtract(size, crop)
    if (room < 0).any() or min(crop) < 1:
        raise ValueError(f"frames of {tuple(size)} pixels have no crop of {tuple(crop)}.")
    corners = np.repeat((room // 2)[None], num_crops, axis=0)
    longer = 0 if size[0] > size[1] else 1
    corners[:, longer] = _spread(room[longer], num_crops)
    return corners


def multi_view_logits(
    classify: Callable[[Array], Array],
    video: Shaped[Array, "frames height width channels"],
    *,
    num_frames: int,
    stride: int,
    crop: tuple[int, int],
    num_clips: int = 4,
    num_crops: int = 3,
) -> Float[Array, " classes"]:
    """Computes equation 1; the defaults are the 4 x 3 views of the paper's results on Kinetics.

    Args:
        classify: from views (n, T, H, W, C) to logits (n, classes). It is called once for each clip with all of its
            crops, so it is compiled once.
        video: (frames, H, W, C), its shorter side already scaled, its values as `classify` takes them.
        num_frames: of a view.
        stride: from one frame of a view to its next.
        crop: (height, width) of a view.
        num_clips: views in time.
        num_crops: views in space.

    Returns:
        (classes,), the mean of all views' logits.

    Raises:
        ValueError: like `view_frames` and `view_corners`.
    """
    corners = view_corners(video.shape[1:3], crop, num_crops)
    logits = []
    for frames in view_frames(len(video), num_frames, stride, num_clips):
        clip = video[frames]
        views = [clip[:, y : y + crop[0], x : x + crop[1]] for y, x in corners]
        logits.append(np.asarray(classify(np.stack(views))))
    return np.concatenate(logits).mean(axis=0)


def _spread(room: int, count: int) -> Int[NumpyArray, " count"]:
    """Returns `count` whole numbers that lie evenly from 0 to `room`; a single one is in the middle."""
    places = np.linspace(0, room, count) if count > 1 else np.array([room / 2])
    return np.floor(places).astype(int)
