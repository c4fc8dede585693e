import numpy as np
import pytest

from sora_jax.patches.levels import ASKED, FREE, KNOWN, TABLES, SegmentLevels, num_levels, segment_levels
from sora_jax.patches.rows import Segment, fill_row, first_fit, stack_rows
from sora_jax.patches.segments import segment_extent, segment_mask, segment_mean

BUDGET = dict(row_length=6, text_length=4, max_segments=3, max_levels=4, patch_dim=2, text_dim=1)


def segment(n, m, clip_id, known=0):
    roles = np.array([ASKED, KNOWN] if known else [ASKED])
    return Segment(
        np.full((n, 2), clip_id, np.float32),
        np.full((n, 3), clip_id, np.float32),
        np.full((m, 1), clip_id, np.float32),
        SegmentLevels((np.arange(n) < known).astype(np.int32), roles),
        clip_id,
    )


def test_a_row_by_eye():
    row = fill_row([segment(2, 1, 7), segment(3, 2, 9, known=1)], **BUDGET)
    np.testing.assert_array_equal(row.segment_ids, [1, 1, 2, 2, 2, 0])
    np.testing.assert_array_equal(row.level_ids, [0, 0, 2, 1, 1, 0])
    np.testing.assert_array_equal(row.level_segments, [1, 2, 2, 0])
    np.testing.assert_array_equal(row.level_roles[:3], [ASKED, ASKED, KNOWN])
    np.testing.assert_array_equal(row.loss_mask, [1, 1, 0, 1, 1, 0])
    np.testing.assert_array_equal(row.patches[:, 0], [7, 7, 9, 9, 9, 0])
    np.testing.assert_array_equal(row.positions[:, 2], [7, 7, 9, 9, 9, 0])
    np.testing.assert_array_equal(row.text[:, 0], [7, 9, 9, 0])
    np.testing.assert_array_equal(row.text_segment_ids, [1, 2, 2, 0])
    np.testing.assert_array_equal(row.clip_ids, [7, 9, -1])
    assert stack_rows([row, row]).patches.shape == (2, 6, 2)


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        ([segment(7, 1, 0)], "row_length 6 is too small for these segments, which need 7"),
        ([segment(1, 3, 0), segment(1, 2, 1)], "text_length 4 is too small for these segments, which need 5"),
        ([segment(2, 1, 0, known=1)] * 3, "max_levels 4 is too small for these segments, which need 6"),
        ([segment(1, 1, 0)] * 4, "max_segments 3 is too small for these segments, which need 4"),
    ],
)
def test_a_row_that_is_too_small(segments, message):
    with pytest.raises(ValueError, match=message):
        fill_row(segments, **BUDGET)


def test_tables_by_eye():
    frames = np.array([0, 0, 1, 2])
    expected = {
        "one_level": ([0, 0, 0, 0], [ASKED]),
        "first_frame_known": ([1, 1, 0, 0], [ASKED, KNOWN]),
        "free_frames": ([0, 0, 1, 2], [FREE, FREE, FREE]),
    }
    assert tuple(expected) == TABLES
    for table, (ids, roles) in expected.items():
        found = segment_levels(table, frames, 3)
        assert (found.ids.tolist(), found.roles.tolist()) == (ids, roles) and num_levels(table, 3) == len(roles)
        still = segment_levels(table, np.zeros(2, int), 1)
        assert (still.ids.tolist(), still.roles.tolist()) == ([0, 0], [ASKED]) and num_levels(table, 1) == 1


def test_first_fit_by_eye():
    budget = dict(row_length=10, text_length=6, max_segments=2)
    assert first_fit([6, 5, 4, 1], [1, 1, 1, 1], **budget) == [[0, 2], [1, 3]]
    assert first_fit([1, 1, 1], [5, 2, 1], **budget) == [[0, 2], [1]]
    with pytest.raises(ValueError, match="clip 1 needs 11 patches"):
        first_fit([1, 11], [1, 1], **budget)


def test_mask_by_eye():
    mask = segment_mask(np.array([[1, 2, 2, 0]]), np.array([[2, 1, 0]]))
    np.testing.assert_array_equal(mask[0], [[0, 1, 0], [1, 0, 0], [1, 0, 0], [0, 0, 0]])


def test_means_of_segments_by_eye():
    values = np.array([[1.0, 3.0, 5.0, 9.0, np.nan]])
    means, present = segment_mean(values, np.array([[1, 1, 1, 0, 0]], bool), np.array([[1, 1, 2, 3, 0]]), 4)
    np.testing.assert_array_equal(means, [[2, 5, 0, 0]])
    np.testing.assert_array_equal(present, [[True, True, False, False]])


def test_extents_of_segments_by_eye():
    positions = np.array([[[0, 0], [0, 2], [1, 1], [4, 0], [9, 9]]], np.float32)
    extent = segment_extent(positions, np.array([[1, 1, 1, 2, 0]]))
    np.testing.assert_array_equal(extent, [[[2, 3], [2, 3], [2, 3], [5, 1], [1, 1]]])
    # No row of five tokens holds more than five segments.
    extent = segment_extent(positions, np.array([[5, 5, 1, 6, 0]]))
    np.testing.assert_array_equal(extent, [[[1, 3], [1, 3], [2, 2], [np.nan, np.nan], [1, 1]]])
