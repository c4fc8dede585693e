"""Parts of pictures and mirror images: drawn in the plan, the same for all frames, read as NumPy says."""

import io

import numpy as np
import pytest
import scipy.stats
from fake_source import FakeSource
from PIL import Image

from sora_jax.config import PatchConfig
from sora_jax.data.augment import WHOLE, center_box, part_of_size, random_box
from sora_jax.data.captioned import DataConfig
from sora_jax.data.content import PixelContent
from sora_jax.data.labelled import FixedSize, LabelledDataConfig
from sora_jax.data.packing import Shard
from sora_jax.data.transforms import Sample, StoredClip

PATCH = PatchConfig(size=(1, 8, 8))


@pytest.mark.parametrize(
    ("size", "aspect", "box"),
    [
        ((60, 100), 1.0, (0, 20, 60, 60)),
        ((100, 60), 1.0, (20, 0, 60, 60)),
        ((60, 100), 2.0, (5, 0, 50, 100)),
        ((7, 9), 1.0, (0, 1, 7, 7)),
        ((50, 100), 2.0, (0, 0, 50, 100)),
    ],
)
def test_the_middle_is_the_largest_part_of_an_aspect(size, aspect, box):
    assert center_box(*size, aspect) == box


def test_random_parts_follow_their_shares_and_aspects_and_lie_anywhere():
    rng = np.random.default_rng(0)
    boxes = [random_box(rng, 1000, 1200, 1.5, (0.1, 0.4), (0.8, 1.25)) for _ in range(2000)]
    tops, lefts, heights, widths = np.array(boxes).T
    assert (
        (tops >= 0).all() and (lefts >= 0).all() and (tops + heights <= 1000).all() and (lefts + widths <= 1200).all()
    )
    shares, aspects = heights * widths / 1.2e6, widths / heights / 1.5
    assert scipy.stats.kstest(shares, scipy.stats.uniform(0.1, 0.3).cdf).pvalue > 0.01
    between = (np.log(aspects) - np.log(0.8)) / (np.log(1.25) - np.log(0.8))
    assert scipy.stats.kstest(between, "uniform").pvalue > 0.01
    for places, rooms in ((tops, 1000 - heights), (lefts, 1200 - widths)):
        assert scipy.stats.kstest((places + rng.random(2000)) / (rooms + 1), "uniform").pvalue > 0.01


def test_a_part_that_never_fits_is_the_middle():
    assert random_box(np.random.default_rng(0), 10, 100, 1.0, (1.0, 1.0), (1.0, 1.0)) == center_box(10, 100, 1.0)


def test_what_crop_says_is_taken():
    def part(crop, resizable, height=20, width=30, size=(16, 16)):
        data = LabelledDataConfig(crop=crop, crop_area=(0.2, 0.5))
        return part_of_size(np.random.default_rng(0), height, width, size, data, resizable)

    assert part("none", True) == WHOLE and part("center", True) == (0, 5, 20, 20)
    box = part("random", True)
    assert 0.19 < box.height * box.width / 600 < 0.51
    assert part("none", False) is None and part("none", False, 16, 16) == (0, 0, 16, 16)
    assert part("center", False) == (2, 7, 16, 16) and part("center", False, 15, 30) is None
    assert part("random", False)[2:] == (16, 16)


class Coordinates(FakeSource):
    """Pixels that tell their place, in red and green, and their frame, in blue; without loss."""

    def read_frames(self, index, frame_indices):
        height, width = int(self.metadata.height[index]), int(self.metadata.width[index])
        y, x = np.mgrid[:height, :width]
        encoded = []
        for frame in frame_indices:
            file = io.BytesIO()
            Image.fromarray(np.stack([y, x, np.full_like(y, frame)], -1).astype(np.uint8)).save(file, "PNG")
            encoded.append(file.getvalue())
        return encoded


def test_all_frames_of_a_clip_are_the_same_part_of_it_flipped_or_not():
    content = PixelContent(Coordinates())
    box = dict(crop_top=7, crop_left=11, crop_height=16, crop_width=24)
    taken = content.values(1, Sample(1, 0.0, 3, 8.0, 16, 24, False, **box))
    pixels = np.round((taken + 1) * 127.5).astype(int)
    y, x = np.mgrid[7:23, 11:35]
    for frame, number in zip(pixels, (0, 3, 6), strict=True):
        np.testing.assert_array_equal(frame, np.stack([y, x, np.full_like(y, number)], -1))
    flipped = content.values(1, Sample(1, 0.0, 3, 8.0, 16, 24, False, flip=True, **box))
    np.testing.assert_array_equal(flipped, taken[:, :, ::-1])
    smaller = content.values(1, Sample(1, 0.0, 1, 8.0, 8, 8, False, **box))[0]
    # The middle of a slope that is halved, and of one that is cut to a third, lies where it lay.
    np.testing.assert_allclose((smaller[4, 4, :2] + 1) * 127.5, [7 + 9 - 0.5, 11 + 13.5 - 0.5], atol=0.6)


def test_a_part_of_a_jpeg_that_is_decoded_small_is_that_part():
    y, x = np.mgrid[:256, :384]
    file = io.BytesIO()
    Image.fromarray(np.stack([y // 2, x // 2, x * 0], -1).astype(np.uint8)).save(file, "JPEG", quality=100)

    class One(FakeSource):
        def read_frames(self, index, frame_indices):
            return [file.getvalue()]

    source = One(1)
    source.metadata.height[:], source.metadata.width[:] = 256, 384
    box = dict(crop_top=64, crop_left=128, crop_height=128, crop_width=192)
    frame = PixelContent(source).values(0, Sample(0, 0.0, 1, 1.0, 16, 24, False, **box))[0]
    middles = np.meshgrid((64 + 4 + 8 * np.arange(16)) / 2, (128 + 4 + 8 * np.arange(24)) / 2, indexing="ij")
    np.testing.assert_allclose((frame[1:-1, 1:-1, :2] + 1) * 127.5, np.stack(middles, -1)[1:-1, 1:-1], atol=2.5)


def test_a_sample_of_a_random_part_has_its_aspect():
    data = DataConfig(crop="random", crop_area=(0.2, 0.6), crop_aspect=(0.5, 2.0), flip=0.3, row_length=4096)
    rng = np.random.default_rng(0)
    samples = [data.draw(rng, StoredClip(0, 24, 8.0, 400, 600), PATCH) for _ in range(400)]
    assert all(s.crop_top + s.crop_height <= 400 and s.crop_left + s.crop_width <= 600 for s in samples)
    assert all(
        abs(s.height - s.width * s.crop_height / s.crop_width) <= 8 * max(s.crop_height / s.crop_width, 1)
        for s in samples
    )
    assert 0.2 < np.mean([s.flip for s in samples]) < 0.4
    assert {s.draw_seed for s in samples} == {0}


def test_without_augmentation_a_draw_is_what_it_was():
    plain, rng = DataConfig(), np.random.default_rng(3)
    sample = plain.draw(rng, StoredClip(0, 24, 8.0, 96, 96), PATCH)
    assert not sample.flip and sample.shares(96, 96) is None
    reference = np.random.default_rng(3)
    reference.random(7)
    assert rng.random() == reference.random()  # nothing more was drawn


def test_a_row_of_numbers_holds_all_of_a_sample():
    sample = Sample(3, 0.1, 4, 6.0, 8, 12, True, -2.0, 5, 17, 2**32 - 1, True, 1, 2, 3, 4, 2**32 - 2, 2)
    assert Sample.from_row(sample.to_row()) == sample


def test_held_out_pictures_are_their_middles_and_never_flipped():
    data = LabelledDataConfig(sampling=FixedSize((16, 16)), label="none", crop="random", flip=1.0, row_length=4)
    content = PixelContent(Coordinates(4))
    shard = Shard(content, None, data.for_evaluation(), PATCH, 0, False)
    plans = [sample for _ in range(2) for sample in shard.next_plan()]
    for s in plans:
        box = center_box(int(content.metadata.height[s.clip]), int(content.metadata.width[s.clip]), 1.0)
        assert not s.flip and (s.crop_top, s.crop_left, s.crop_height, s.crop_width) == box


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"flip": 1.5}, r"flip must be between 0 and 1, got 1\.5"),
        ({"crop_area": (0.5, 1.5)}, r"crop_area must be at most 1, got \(0\.5, 1\.5\)"),
        ({"crop_area": (0.5, 0.2)}, r"crop_area must be \(lowest, highest\)"),
        ({"crop_aspect": (0.0, 1.0)}, r"crop_aspect must be \(lowest, highest\)"),
    ],
)
def test_bad_values_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        DataConfig(**changes)
