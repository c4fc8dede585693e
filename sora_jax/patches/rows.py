"""Packed rows from segments, in NumPy: the one place where a `PackedBatch` is filled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from sora_jax.array_types import TEXT_DTYPE, Float, PackedBatch
from sora_jax.patches.levels import KNOWN, SegmentLevels


class Segment(NamedTuple):
    """One clip, ready to be packed.

    Attributes:
        patches: (n, P) float32.
        positions: (n, 3) float32, (t, y, x).
        text: (m, D) float16, token states of its caption.
        levels: of its patches, and the roles of their columns.
        clip_id: its index in its data set.
        label: its class, -1 where it has none.
        extent: (3,) float32, one more than the largest positions of the whole clip; None where nothing was dropped.
    """

    patches: Float[np.ndarray, "patches values"]
    positions: Float[np.ndarray, "patches 3"]
    text: Float[np.ndarray, "tokens text_dim"]
    levels: SegmentLevels
    clip_id: int
    label: int = -1
    extent: Float[np.ndarray, " 3"] | None = None


def fill_row(
    segments: Sequence[Segment],
    *,
    row_length: int,
    text_length: int,
    max_segments: int,
    patch_dim: int,
    text_dim: int,
    max_levels: int | None = None,
) -> PackedBatch:
    """Packs segments into one row, in their order and without gaps.

    Args:
        segments: at most `max_segments` clips.
        row_length: L.
        text_length: M.
        max_segments: K.
        patch_dim: P.
        text_dim: D.
        max_levels: J (default: K).

    Returns:
        A `PackedBatch` without its batch axis; padding is zero and `loss_mask` holds for what is not known.

    Raises:
        ValueError: segments that do not fit, naming the budget.
    """
    max_levels = max_segments if max_levels is None else max_levels
    for name, used, budget in (
        ("row_length", sum(len(s.patches) for s in segments), row_length),
        ("text_length", sum(len(s.text) for s in segments), text_length),
        ("max_segments", len(segments), max_segments),
        ("max_levels", sum(len(s.levels.roles) for s in segments), max_levels),
    ):
        if used > budget:
            raise ValueError(f"{name} {budget} is too small for these segments, which need {used}.")
    row = PackedBatch(
        patches=np.zeros((row_length, patch_dim), np.float32),
        positions=np.zeros((row_length, 3), np.float32),
        segment_ids=np.zeros(row_length, np.int32),
        level_ids=np.zeros(row_length, np.int32),
        level_segments=np.zeros(max_levels, np.int32),
        level_roles=np.zeros(max_levels, np.int32),
        loss_mask=np.zeros(row_length, bool),
        text=np.zeros((text_length, text_dim), TEXT_DTYPE),
        text_segment_ids=np.zeros(text_length, np.int32),
        clip_ids=np.full(max_segments, -1, np.int32),
        labels=np.full(max_segments, -1, np.int32),
        extents=np.zeros((max_segments, 3), np.float32),
    )
    start = text_start = level_start = 0
    for index, segment in enumerate(segments):
        tokens = slice(start, start := start + len(segment.patches))
        text = slice(text_start, text_start := text_start + len(segment.text))
        row.patches[tokens] = segment.patches
        row.positions[tokens] = segment.positions
        row.segment_ids[tokens] = index + 1
        ids, roles = segment.levels
        columns = slice(level_start, level_start + len(roles))
        row.level_ids[tokens] = level_start + ids
        row.level_segments[columns] = index + 1
        row.level_roles[columns] = roles
        row.loss_mask[tokens] = roles[ids] != KNOWN
        level_start = columns.stop
        row.text[text] = segment.text
        row.text_segment_ids[text] = index + 1
        row.clip_ids[index] = segment.clip_id
        row.labels[index] = segment.label
        row.extents[index] = segment.positions.max(axis=0) + 1 if segment.extent is None else segment.extent
    return row


def stack_rows(rows: Sequence[PackedBatch]) -> PackedBatch:
    """Stacks rows into a batch."""
    return PackedBatch(*(np.stack(values) for values in zip(*rows, strict=True)))


def first_fit(
    lengths: Sequence[int], text_lengths: Sequence[int], *, row_length: int, text_length: int, max_segments: int
) -> list[list[int]]:
    """Shares clips out among rows: each goes into the first row with room for it.

    Args:
        lengths: patches of each clip.
        text_lengths: caption tokens of each clip.
        row_length: L.
        text_length: M.
        max_segments: K.

    Returns:
        The clips' indices, row by row.

    Raises:
        ValueError: a clip that no row can hold.
    """
    rows: list[list[int]] = []
    room: list[list[int]] = []
    for index, need in enumerate(zip(lengths, text_lengths, strict=True)):
        if need[0] > row_length or need[1] > text_length:
            raise ValueError(
                f"clip {index} needs {need[0]} patches and {need[1]} caption tokens; "
                f"a row has row_length {row_length} and text_length {text_length}."
            )
        fits = (r for r, left in enumerate(room) if left[0] >= need[0] and left[1] >= need[1] and left[2])
        row = next(fits, len(rows))
        if row == len(rows):
            rows.append([])
            room.append([row_length, text_length, max_segments])
        rows[row].append(index)
        room[row] = [room[row][0] - need[0], room[row][1] - need[1], room[row][2] - 1]
    return rows
