import numpy as np
import pytest

from sora_jax.evaluation.nearest import clip_distances, frame_difference


def test_distances_of_clips_that_can_be_checked_by_eye():
    x, y, z = np.eye(3)
    clips = [np.stack([x, y]), np.stack([z]), np.stack([5 * x, 2 * x])]
    samples = [np.stack([x, y]), np.stack([3 * z]), np.stack([y, x, x, x])]
    expected = [[0, 1, 0.5], [1, 0, 1], [0, 1, 0.25]]  # length does not count, nor the order of frames
    np.testing.assert_allclose(clip_distances(samples, clips), expected, atol=1e-12)


def test_distance_is_the_mean_of_the_best_match_of_each_frame():
    rng = np.random.default_rng(0)
    samples = [rng.standard_normal((n, 7)) for n in (1, 4)]
    clips = [rng.standard_normal((n, 7)) for n in (3, 1, 5)]
    cosine = lambda a, b: a @ b / np.sqrt(a @ a) / np.sqrt(b @ b)  # noqa: E731
    for i, sample in enumerate(samples):
        for j, clip in enumerate(clips):
            expected = np.mean([min(1 - cosine(f, g) for g in clip) for f in sample])
            assert clip_distances(samples, clips)[i, j] == pytest.approx(expected)


def test_a_clip_without_frames_is_an_error():
    with pytest.raises(ValueError, match="clips"):
        clip_distances([np.ones((1, 3))], [np.ones((0, 3))])
    with pytest.raises(ValueError, match="samples"):
        clip_distances([], [np.ones((1, 3))])


def test_frame_difference_does_not_wrap_around():
    frames = np.zeros((3, 2, 2, 3), np.uint8)
    frames[1] = 200
    assert frame_difference(frames) == 200
    frames[2] = 100
    assert frame_difference(frames) == 150
    assert frame_difference(frames[:1]) == 0
