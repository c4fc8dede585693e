import dataclasses

import numpy as np
import pytest
from fake_source import FakeSource, caption_table

from sora_jax.config import PatchConfig
from sora_jax.data.content import PixelContent
from sora_jax.data.labelled import (
    NO_LABEL,
    TOO_SHORT,
    FixedSize,
    LabelledDataConfig,
    NativeSize,
)
from sora_jax.data.pipeline import PackedPipeline, make_pipeline
from sora_jax.data.transforms import TOO_LARGE, Sample, StoredClip
from sora_jax.patches.patchify import grid_shape, num_tokens
from sora_jax.patches.token_drop import BetaDrop, ConstantDrop

PATCH = PatchConfig(size=(1, 4, 4))
NATIVE = LabelledDataConfig(
    sampling=NativeSize((8.0, 24.0)), row_length=64, max_segments=8, num_bins=4, batch_size=2, num_shards=1,
    num_workers=0,
)  # fmt: skip
FIXED = dataclasses.replace(NATIVE, sampling=FixedSize((16, 8)), row_length=8, max_segments=1, num_bins=1)


class Labelled(FakeSource):
    """Clip i has the class i % 3."""

    def __init__(self):
        super().__init__()
        labels = (np.arange(len(self)) % 3).astype(np.int32)
        self.metadata = dataclasses.replace(self.metadata, labels=labels)


SOURCE = Labelled()


def draw(data, seed=0, frames=72, height=40, width=80, label=1, patch=PATCH):
    return data.draw(np.random.default_rng(seed), StoredClip(7, frames, 24.0, height, width, label), patch)


def rows(data, repeat=True, captions=None, patch=PATCH):
    return PackedPipeline(
        PixelContent(SOURCE), captions, data, patch, repeat=repeat, process_index=0, process_count=1
    )  # fmt: skip


def take(pipeline, count):
    with pipeline:
        return [next(pipeline) for _ in range(count)]


def test_one_size_stretches_and_the_native_one_keeps_the_aspect():
    assert (draw(FIXED).height, draw(FIXED).width) == (16, 8)
    sizes = {(s.height, s.width) for s in (draw(NATIVE, seed) for seed in range(200))}
    assert len(sizes) > 5
    for height, width in sizes:
        assert height % 4 == width % 4 == 0
        assert abs(width - 2 * height) <= 6  # half a patch on either side, twice for the doubled height
        assert 6 <= np.sqrt(height * width) <= 27


def test_small_images_are_enlarged_where_that_is_asked_for():
    """A side of 24 pixels, for an image of 10 x 20: 17 x 34."""
    sampling = NativeSize((24.0, 24.0))
    sizes = [
        (s.height, s.width)
        for s in (
            draw(dataclasses.replace(NATIVE, sampling=dataclasses.replace(sampling, enlarge=e)), height=10, width=20)
            for e in (False, True)
        )
    ]
    assert sizes == [(8, 20), (16, 32)]


def test_held_out_images_are_whole_and_at_the_largest_size():
    dropping = dataclasses.replace(NATIVE, sampling=NativeSize((8.0, 24.0), token_drop=ConstantDrop(0.5)))
    held_out = dropping.for_evaluation()
    assert (held_out.num_workers, held_out.caption_dropout) == (0, 0.0)
    sample = draw(held_out)
    assert sample.num_kept == 0
    assert {(s.height, s.width) for s in (draw(held_out, seed) for seed in range(20))} == {(16, 32)}  # 17 x 34 asked
    assert draw(dropping.at_side(8)).height == 4  # 5.7 x 11.3 asked
    assert FIXED.at_side(12).sampling.size == (12, 12)


def test_classes_and_speeds_are_labels():
    assert draw(FIXED, label=2).label == 2
    assert draw(FIXED, label=-1) == NO_LABEL
    assert draw(dataclasses.replace(FIXED, label="none"), label=2).label == -1
    data = dataclasses.replace(FIXED, label="speed", speeds=(0.5, 2.0, -1.0), num_frames=4, fps=6.0, row_length=32)
    samples = [draw(data, seed, label=-1) for seed in range(60)]
    assert {(s.label, s.speed) for s in samples} == {(0, 0.5), (1, 2.0), (2, -1.0)}
    counts = np.bincount([s.label for s in samples])
    assert counts.min() >= 10
    # Two times six frames a second for four frames: a second; 72 frames of 24 have 2.96.
    assert max(s.start for s in samples if s.label == 1) <= 71 / 24 - 1
    # 20 frames take 0.79 seconds, too few for one speed and so for all.
    assert {draw(data, seed, frames=20, label=-1) for seed in range(60)} == {TOO_SHORT}


def test_short_clips_are_left_out_where_that_is_asked_for():
    data = dataclasses.replace(FIXED, min_seconds=1.0)
    assert draw(data, frames=24) == TOO_SHORT  # 23 / 24 seconds from the first frame to the last
    assert isinstance(draw(data, frames=25), Sample)


@pytest.mark.parametrize(
    ("speed", "expected"), [(1.0, [6, 10, 14]), (2.0, [6, 14, 22]), (-1.0, [14, 10, 6]), (-2.0, [22, 14, 6])]
)
def test_frames_at_a_speed(speed, expected):
    sample = Sample(0, 0.25, 3, 6.0, 8, 8, False, speed)
    assert sample.frame_indices(24.0, 72) == expected


def test_a_sample_goes_through_a_row_of_numbers():
    sample = Sample(3, 0.1, 4, 6.0, 8, 12, True, -2.0, 5, 17, 2**32 - 1)
    assert Sample.from_row(sample.to_row()) == sample
    assert dataclasses.replace(Sample.from_row(sample.to_row()), reduced=True) != sample


def test_too_large_is_resized_or_left_out():
    wide = dataclasses.replace(NATIVE, sampling=NativeSize((40.0, 40.0)), row_length=20)
    reduced = draw(wide)
    assert reduced.reduced and reduced.num_tokens(PATCH) <= 20
    assert draw(dataclasses.replace(wide, oversize="skip")) == TOO_LARGE


def test_one_size_of_more_patches_than_a_row_is_left_out():
    assert draw(dataclasses.replace(FIXED, row_length=7)) == TOO_LARGE


def test_an_image_smaller_than_a_patch_is_left_out_with_both_sizes():
    assert draw(NATIVE, height=3, width=30) == "an image of 3 x 30 pixels is smaller than a patch of 4 x 4"


def test_rows_hold_what_token_dropping_left_and_the_whole_extent():
    dropping = dataclasses.replace(NATIVE, sampling=NativeSize((16.0, 24.0), token_drop=BetaDrop(0.5, 0.9)))
    shares = []
    for batch in take(rows(dropping), 6):
        assert batch.text.shape == (2, 0, 0)
        for row in range(2):
            for k, clip in enumerate(batch.clip_ids[row]):
                tokens = batch.segment_ids[row] == k + 1
                if clip < 0:
                    assert (batch.labels[row, k], *batch.extents[row, k]) == (-1, 0, 0, 0)
                    continue
                assert batch.labels[row, k] == clip % 3
                t, height, width = batch.extents[row, k]
                positions = batch.positions[row][tokens]
                assert t == 1 and (positions[:, 1] < height).all() and (positions[:, 2] < width).all()
                assert len({tuple(p) for p in positions}) == len(positions)
                assert abs(width / height / (SOURCE.metadata.width[clip] / SOURCE.metadata.height[clip]) - 1) < 0.45
                # All patches of a clip's frame have its colour; the sum says which clip it is.
                np.testing.assert_allclose(batch.patches[row][tokens][:, 0], 5 * clip / 127.5 - 1, atol=1e-6)
                shares.append(len(positions) / (height * width))
    assert 0.35 < np.mean(shares) < 0.65 and np.std(shares) > 0.1


def test_dropped_patches_are_those_of_the_places_that_are_missing():
    """The patches that are left are those of the whole image at their positions."""

    class Gradient(Labelled):
        def read_frames(self, index, frame_indices):
            import io

            from PIL import Image

            size = int(self.metadata.height[index]), int(self.metadata.width[index])
            ramp = np.broadcast_to(np.linspace(0, 255, size[1]), size).astype(np.uint8)
            file = io.BytesIO()
            Image.fromarray(ramp).save(file, "PNG")
            return [file.getvalue()] * len(frame_indices)

    data = dataclasses.replace(NATIVE, sampling=NativeSize((16.0, 24.0), token_drop=ConstantDrop(0.5)))
    pipeline = PackedPipeline(
        PixelContent(Gradient()), None, data, PATCH, repeat=True, process_index=0, process_count=1
    )
    (batch,) = take(pipeline, 1)
    real = batch.segment_ids > 0
    width = np.take_along_axis(batch.extents[..., 2], np.maximum(batch.segment_ids - 1, 0), axis=1)
    expected = (batch.positions[..., 2] + 0.5) / width * 2 - 1  # the ramp at the middle of the patch
    np.testing.assert_allclose(batch.patches.mean(axis=-1)[real], expected[real], atol=0.05)


def test_an_epoch_gives_every_image_once_and_says_whom_it_leaves_out():
    with rows(NATIVE.for_evaluation(), repeat=False) as pipeline:
        clips = [c for batch in pipeline for c in batch.clip_ids.ravel() if c >= 0]
    assert sorted(clips) == list(range(len(SOURCE)))
    moving = dataclasses.replace(FIXED, label="speed", speeds=(1.0, 2.0), num_frames=2, fps=6.0, row_length=16)
    with rows(moving.for_evaluation(), repeat=False) as pipeline:
        clips = [c for batch in pipeline for c in batch.clip_ids.ravel() if c >= 0]
        assert sorted(clips) == [c for c in range(len(SOURCE)) if c % 4]  # every fourth is a still
        assert {reason for _, reason in pipeline.statistics.skipped} == {TOO_SHORT}


@pytest.mark.parametrize("data", [NATIVE, FIXED], ids=["native", "fixed"])
def test_a_saved_place_goes_on_exactly(data):
    if isinstance(data.sampling, NativeSize):
        data = dataclasses.replace(data, sampling=NativeSize((8.0, 24.0), token_drop=BetaDrop()))
    whole = take(rows(data), 7)
    first = rows(data)
    with first:
        for _ in range(3):
            next(first)
        place = first.get_state()
    rest = rows(data)
    rest.set_state(place)
    for ours, theirs in zip(take(rest, 4), whole[3:], strict=True):
        for name, a, b in zip(ours._fields, ours, theirs, strict=True):
            np.testing.assert_array_equal(a, b, err_msg=name)


def test_captions_come_along_where_they_are_asked_for():
    captions = caption_table(SOURCE)
    data = dataclasses.replace(NATIVE, text_length=64, max_caption_tokens=8, label="none")
    (batch,) = take(rows(data, captions=captions), 1)
    for row in range(2):
        for k, clip in enumerate(batch.clip_ids[row]):
            if clip >= 0:
                assert set(batch.text[row][batch.text_segment_ids[row] == k + 1][:, 0]) == {float(clip)}
    with pytest.raises(ValueError, match="text_length must be 0 without captions and above with them, got 64"):
        make_pipeline_on(data, None)
    with pytest.raises(ValueError, match="got 0 and a caption table"):
        make_pipeline_on(NATIVE, captions)


def make_pipeline_on(data, captions):
    import unittest.mock

    with unittest.mock.patch("sora_jax.data.pipeline.open_data", lambda *_: PixelContent(SOURCE)):
        return make_pipeline(data, PATCH, captions)


def test_a_row_of_one_size_is_one_clip_in_the_order_of_its_patches():
    data = dataclasses.replace(FIXED, num_frames=2, fps=6.0, row_length=16, label="class")
    (batch,) = take(rows(data, patch=PATCH), 1)
    assert (batch.segment_ids == 1).all() and batch.clip_ids.shape == (2, 1)
    assert num_tokens(2, 16, 8, PATCH.size) == 16
    grid = grid_shape(2, 16, 8, PATCH.size)
    expected = np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij"), -1).reshape(-1, 3)
    np.testing.assert_allclose(batch.positions[0], expected * [4 / 6, 1, 1], rtol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_frames": 0}, "LabelledDataConfig.num_frames must be at least 1, got 0"),
        ({"fps": 0.0}, "fps must be positive and finite, got 0.0"),
        ({"speeds": ()}, r"speeds must be numbers other than 0, got \(\)"),
        ({"speeds": (1.0, 0.0)}, "speeds must be numbers other than 0"),
        ({"label": "speed"}, r"speeds must be several, and each once, where label is 'speed', got \(1.0,\)"),
        ({"label": "speed", "speeds": (1.0, 1.0, 2.0)}, "speeds must be several, and each once"),
        ({"min_seconds": -1.0}, "min_seconds must be at least 0 and finite, got -1.0"),
        ({"text_length": 4}, r"text_length must be 0 or at least max_caption_tokens \(32\), got 4"),
    ],
)
def test_bad_configs(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(NATIVE, **changes)


def test_bad_sampling():
    with pytest.raises(ValueError, match=r"FixedSize.size must be positive \(height, width\), got \(0, 8\)"):
        FixedSize((0, 8))
    with pytest.raises(ValueError, match=r"NativeSize.sides must be \(lowest, highest\)"):
        NativeSize((9.0, 8.0))
    with pytest.raises(ValueError, match=r"NativeSize\.sides must be finite"):
        NativeSize((9.0, float("inf")))
    with pytest.raises(ValueError, match=r"NativeSize\.mean must be between -1 and 1, got 2"):
        NativeSize(mean=2)
