"""The level table of a row: which noise levels its patches have, whose they are, and how they come by their values.

A row has J levels, columns of its table. A patch names one; a column belongs to a segment and has a role:

    ASKED   the segment's own time
    KNOWN   no noise, or little of it: what is given, to animate, to extend, to fill in
    FREE    a time of its own, one for each latent frame (diffusion forcing, arXiv:2407.01392)

A segment's patches and columns come with it in numbers of its own, counted from 0 (`SegmentLevels`), so that it is the
same wherever it is packed. NumPy only: the pipeline's workers use it.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import numpy as np

from sora_jax.array_types import Int

ASKED, KNOWN, FREE = range(3)
Table = Literal["one_level", "first_frame_known", "free_frames"]
TABLES: tuple[str, ...] = get_args(Table)


class SegmentLevels(NamedTuple):
    """The part of a level table that belongs to one segment of n patches and j columns.

    Attributes:
        ids: (n,) int32, each patch's column, 0 ... j - 1.
        roles: (j,) int32, `ASKED`, `KNOWN` or `FREE`.
    """

    ids: Int[np.ndarray, " patches"]
    roles: Int[np.ndarray, " columns"]


def one_level(num_patches: int) -> SegmentLevels:
    """Returns the table of a clip all of which is asked for."""
    return SegmentLevels(np.zeros(num_patches, np.int32), np.array([ASKED], np.int32))


def first_frames_known(frames: Int[np.ndarray, " patches"], num_known: int = 1) -> SegmentLevels:
    """Returns the table of a clip whose first latent frames are given.

    Args:
        frames: (n,), the latent frame that each patch is of, counted from 0.
        num_known: latent frames that are given.
    """
    return SegmentLevels((frames < num_known).astype(np.int32), np.array([ASKED, KNOWN], np.int32))


def free_frames(frames: Int[np.ndarray, " patches"], num_frames: int) -> SegmentLevels:
    """Returns the table of a clip each of whose latent frames has a time of its own.

    Args:
        frames: (n,), the latent frame that each patch is of, 0 ... num_frames - 1.
        num_frames: of the clip.
    """
    return SegmentLevels(frames.astype(np.int32), np.full(num_frames, FREE, np.int32))


def segment_levels(table: Table, frames: Int[np.ndarray, " patches"], num_frames: int) -> SegmentLevels:
    """Returns the table of a clip by the name of its kind; a clip of one latent frame has one level, whatever the kind.

    Args:
        table: its kind.
        frames: (n,), the latent frame that each patch is of, 0 ... num_frames - 1.
        num_frames: latent frames of the clip.
    """
    if table == "one_level" or num_frames == 1:
        return one_level(len(frames))
    return first_frames_known(frames) if table == "first_frame_known" else free_frames(frames, num_frames)


def num_levels(table: Table, num_frames: int) -> int:
    """Returns the columns of `segment_levels`, for a clip of so many latent frames."""
    return {"one_level": 1, "first_frame_known": min(num_frames, 2), "free_frames": num_frames}[table]
