import numpy as np
import pytest

from sora_jax.evaluation.views import multi_view_logits, view_corners, view_frames


def test_clips_lie_evenly_in_time():
    np.testing.assert_array_equal(view_frames(11, 3, 2, 3), [[0, 2, 4], [3, 5, 7], [6, 8, 10]])
    np.testing.assert_array_equal(view_frames(11, 3, 2, 1), [[3, 5, 7]])
    # Too short a video is continued by its last frame.
    np.testing.assert_array_equal(view_frames(4, 3, 2, 2), [[0, 2, 3]] * 2)


def test_crops_lie_evenly_along_the_longer_side():
    np.testing.assert_array_equal(view_corners((8, 20), (6, 6), 3), [[1, 0], [1, 7], [1, 14]])
    np.testing.assert_array_equal(view_corners((20, 8), (6, 4), 2), [[0, 2], [14, 2]])
    np.testing.assert_array_equal(view_corners((8, 8), (6, 6), 1), [[1, 1]])


def test_logits_are_the_mean_over_all_views():
    """A classifier that is linear in its view, on a video whose pixels say where they are."""
    t, y, x = np.meshgrid(np.arange(9.0), np.arange(6.0), np.arange(10.0), indexing="ij")
    video, seen = np.stack([t, y, x], axis=-1), []

    def classify(views):
        seen.append(views.shape)
        return views.mean(axis=(1, 2, 3))

    logits = multi_view_logits(classify, video, num_frames=2, stride=3, crop=(4, 4), num_clips=3, num_crops=3)
    # Frames (0, 3), (2 + 1/2, rounded down: 2, 5), (5, 8); rows 1 ... 4; columns 0 ... 3, 3 ... 6, 6 ... 9.
    np.testing.assert_allclose(logits, [(1.5 + 3.5 + 6.5) / 3, 2.5, 4.5])
    assert seen == [(3, 2, 4, 4, 3)] * 3
    few = multi_view_logits(classify, video, num_frames=2, stride=3, crop=(4, 4), num_clips=1, num_crops=2)
    np.testing.assert_allclose(few, [3.5, 2.5, 4.5])


def test_what_cannot_be_is_named():
    with pytest.raises(ValueError, match="stride must be at least 1, got 0"):
        view_frames(9, 2, 0, 1)
    with pytest.raises(ValueError, match="num_crops must be at least 1, got 0"):
        view_corners((8, 8), (6, 6), 0)
    with pytest.raises(ValueError, match=r"frames of \(8, 5\) pixels have no crop of \(6, 6\)"):
        view_corners((8, 5), (6, 6), 1)
