import numpy as np
import pytest
import scipy.stats

from sora_jax.config import PatchConfig
from sora_jax.data.captioned import DataConfig
from sora_jax.data.transforms import TOO_LARGE, Sample, StoredClip, fit_size, sample_size, select_clips
from sora_jax.patches.patchify import num_tokens

PATCH = PatchConfig(size=(2, 8, 8))
DATA = DataConfig(num_frames=(2, 24), fps=(6, 12), long_side=(32, 96), row_length=512)


def draw(seed, data=DATA, frames=72, fps=24.0, height=120, width=90):
    return data.draw(np.random.default_rng(seed), StoredClip(5, frames, fps, height, width), PATCH)


def test_draws_stay_in_their_bounds_and_fill_them():
    samples = [draw(seed) for seed in range(2000)]
    stills = [s for s in samples if s.num_frames == 1]
    assert 0.13 < len(stills) / 2000 < 0.27  # still_share 0.2
    assert 0.05 < np.mean([s.caption_dropped for s in samples]) < 0.16  # caption_dropout 0.1
    moving = [s.num_frames for s in samples if s.num_frames > 1]
    assert (min(moving), max(moving)) == (2, 24)
    assert all(6 <= s.fps <= 12 for s in samples)
    assert {max(s.height, s.width) for s in samples} == set(range(32, 97, 8))
    for s in samples:
        assert 0 <= s.start <= 3.0 - s.num_frames / s.fps + 1e-6
        assert num_tokens(s.num_frames, s.height, s.width, PATCH.size) <= 512
        indices = s.frame_indices(24.0, 72)
        assert len(indices) == s.num_frames
        assert 0 <= indices[0] and indices[-1] <= 71


def test_the_same_seed_draws_the_same():
    assert draw(3) == draw(3) != draw(4)


@pytest.mark.parametrize(("height", "width"), [(120, 90), (90, 120), (128, 40), (64, 64)])
def test_the_aspect_is_kept_to_half_a_patch(height, width):
    for long_side in range(32, 97, 5):
        got = fit_size(height, width, long_side, PATCH, 1, 10**6)
        scale = min(long_side, max(height, width)) / max(height, width)
        assert abs(got[0] - height * scale) <= 4 and abs(got[1] - width * scale) <= 4


def test_nothing_is_enlarged():
    assert fit_size(40, 30, 96, PATCH, 1, 10**6) == (40, 32)


def test_a_sample_above_the_budget_is_made_smaller_or_left_out():
    assert fit_size(96, 96, 96, PATCH, 24, 10**6) == (96, 96)  # 12 * 12 * 12 = 1728 patches
    assert fit_size(96, 96, 96, PATCH, 24, 1024) == (72, 72)  # 12 * 9 * 9 = 972
    assert fit_size(96, 96, 96, PATCH, 24, 11) is None
    long = DataConfig(num_frames=(24, 24), long_side=(96, 96), fps=(6, 6), still_share=0, oversize="skip")
    assert draw(0, long, frames=96, height=96, width=96) == TOO_LARGE


def test_frames_are_those_shown_at_each_moment():
    sample = Sample(0, 0.5, 4, 8.0, 8, 8, False)
    assert sample.frame_indices(24.0, 72) == [12, 15, 18, 21]
    assert sample.frame_indices(24.0, 17) == [12, 15, 16, 16]


def test_a_chosen_part_is_fixed_by_its_seed():
    assert select_clips(5, None, 0).tolist() == [0, 1, 2, 3, 4]
    chosen = select_clips(1000, 64, 7)
    assert len(set(chosen)) == 64 and (np.diff(chosen) > 0).all()
    assert select_clips(1000, 64, 7).tolist() == chosen.tolist() != select_clips(1000, 64, 8).tolist()


def side_shares(sides, **options):
    """Where the drawn sides of a large square image lie between the bounds, to within a pixel."""
    pixels = PatchConfig(size=(1, 1, 1))
    rng = np.random.default_rng(0)
    sizes = [sample_size(rng, 5000, 5000, sides, pixels, **options) for _ in range(2000)]
    return [(height - sides[0]) / (sides[1] - sides[0]) for height, _ in sizes]


@pytest.mark.parametrize(("options", "mean"), [({}, -0.5), ({"mean": 0.5}, 0.5)])
def test_sides_follow_a_truncated_normal(options, mean):
    shares = side_shares((64.0, 4064.0), **options)
    assert 0 <= min(shares) < 0.01
    assert 0.97 < max(shares) <= 1
    normal = scipy.stats.truncnorm(-1 - mean, 1 - mean, loc=mean)
    assert scipy.stats.kstest(2 * np.array(shares) - 1, normal.cdf).pvalue > 0.01


def test_sampled_sizes_keep_the_aspect_and_the_area():
    rng = np.random.default_rng(0)
    for height, width in [(300, 400), (1000, 125), (640, 640)]:
        for _ in range(50):
            h, w = sample_size(rng, height, width, (64.0, 200.0), PATCH)
            assert h % 8 == w % 8 == 0 < min(h, w)
            side = np.sqrt(height * width)
            assert abs(h / height - w / width) <= 4 / height + 4 / width
            assert 64 - 8 * side / min(height, width) < np.sqrt(h * w) < 200 + 8 * side / min(height, width)


def test_sampled_sizes_never_enlarge():
    rng = np.random.default_rng(0)
    sizes = {sample_size(rng, 23, 9, (100.0, 200.0), PATCH) for _ in range(20)}
    assert sizes == {(16, 8)}
    assert sample_size(rng, 8, 800, (8.0, 9.0), PATCH)[0] == 8  # at least a patch


@pytest.mark.parametrize(
    ("height", "width", "sides", "match"),
    [
        (7, 90, (8.0, 9.0), "image of 7 x 90 pixels is smaller than a patch of 8 x 8"),
        (90, 7, (8.0, 9.0), "image of 90 x 7 pixels is smaller than a patch of 8 x 8"),
        (90, 90, (9.0, 8.0), "sides must be"),
        (90, 90, (0.0, 8.0), "sides must be"),
    ],
)
def test_sizes_that_cannot_be_sampled(height, width, sides, match):
    with pytest.raises(ValueError, match=match):
        sample_size(np.random.default_rng(0), height, width, sides, PATCH)
