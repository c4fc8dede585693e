import numpy as np
import pytest

from sora_jax.patches.patchify import grid_shape, num_tokens, patchify, unpatchify


def test_order_of_patches_and_values_by_hand():
    # One 2x4 frame in 1x2x2 patches: the left square, then the right one, each read like a page.
    clip = np.array([[[0, 1, 2, 3], [4, 5, 6, 7]]])[..., None]
    np.testing.assert_array_equal(patchify(clip, (1, 2, 2)), [[0, 1, 4, 5], [2, 3, 6, 7]])


def test_against_loops():
    rng = np.random.default_rng(0)
    clip = rng.normal(size=(4, 6, 4, 3))
    patches = patchify(clip, (2, 3, 2))
    n = 0
    for t in range(0, 4, 2):
        for y in range(0, 6, 3):
            for x in range(0, 4, 2):
                np.testing.assert_array_equal(patches[n], clip[t : t + 2, y : y + 3, x : x + 2].ravel())
                n += 1
    assert n == len(patches) == num_tokens(4, 6, 4, (2, 3, 2))


@pytest.mark.parametrize("num_frames", [1, 2, 3, 5])
def test_round_trip_of_any_number_of_frames(num_frames):
    clip = np.random.default_rng(num_frames).normal(size=(num_frames, 4, 8, 3))
    patches = patchify(clip, (2, 4, 4))
    np.testing.assert_array_equal(unpatchify(patches, num_frames, 4, 8, (2, 4, 4), 3), clip)


def test_a_still_fills_its_patch_with_its_own_frame():
    still = np.random.default_rng(0).normal(size=(1, 4, 4, 3))
    np.testing.assert_array_equal(patchify(still, (2, 4, 4)), patchify(np.repeat(still, 2, axis=0), (2, 4, 4)))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((0, 8, 8), "num_frames must be at least 1, got 0"),
        ((1, 20, 8), "height must be a multiple of the patch's 8, got 20; 16 or 24 would work"),
        ((1, 8, 3), "width must be a multiple of the patch's 8, got 3; 8 would work"),
        ((1, 0, 8), "height must be a multiple of the patch's 8, got 0; 8 would work"),
    ],
)
def test_sizes_that_do_not_fit(shape, message):
    with pytest.raises(ValueError, match=message):
        grid_shape(*shape, (2, 8, 8))


def test_patches_of_another_clip():
    with pytest.raises(ValueError, match=r"patches must have shape \(4, 96\) for this clip, got \(3, 96\)"):
        unpatchify(np.zeros((3, 96)), 2, 8, 8, (2, 4, 4), 3)
