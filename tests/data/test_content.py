"""What samples are made of: windows of stored latents drawn by the plan, through the one packed pipeline."""

import json
import pickle

import numpy as np
import pytest
from latent_sets import SIZES, posteriors, write_latents, write_older_latents
from rows import assert_equal, take

from sora_jax.config import PatchConfig
from sora_jax.data.captioned import DataConfig
from sora_jax.data.captions import CaptionTable
from sora_jax.data.content import LatentContent, PixelContent, open_content
from sora_jax.data.identity import data_fingerprints
from sora_jax.data.labelled import OTHER_SIZE, FixedSize, LabelledDataConfig, NativeSize
from sora_jax.data.packing import Shard
from sora_jax.data.pipeline import make_pipeline
from sora_jax.data.transforms import Sample
from sora_jax.patches.patchify import unpatchify

PATCH = PatchConfig(size=(1, 2, 2), channels=2)
CLIPS = dict(
    num_frames=(1, 6), fps=(4, 8), row_length=64, text_length=24, max_segments=8, max_caption_tokens=4, num_bins=4,
    batch_size=4, num_shards=4, num_workers=0, flip=0.5, eval_splits=("unseen",),
)  # fmt: skip
STILLS = dict(
    sampling=FixedSize((4, 4)), row_length=4, max_segments=1, num_bins=1, batch_size=4, num_shards=4, num_workers=0
)


def states(caption):
    """Of each caption as many tokens as it has words and one, each of the number in it."""
    return np.full((len(caption.split()) + 1, 3), float(caption.split()[1]) if caption else -1.0, np.float32)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_latents(tmp_path_factory.mktemp("latents"))


@pytest.fixture(scope="module")
def captions(path):
    names = [c for split in ("train", "unseen") for c in open_content(path, split).metadata.captions]
    return CaptionTable.build(names, lambda texts: [states(text) for text in texts])


def clips(path, captions, index=0, count=1, training=True, split=None, **changes):
    data = DataConfig(path=path, **(CLIPS | changes))
    options = dict(training=training, process_index=index, process_count=count)
    return make_pipeline(data, PATCH, captions, split, **options)


def test_a_data_set_says_what_it_holds(path):
    content = open_content(path)
    assert isinstance(content, LatentContent) and (content.kind, content.channels) == ("latents", 2)
    assert isinstance(open_content("tests/fixtures/clip_folder"), PixelContent)
    sizes = [(m.num_frames, m.height, m.width) for m in [content.metadata]]
    np.testing.assert_array_equal(np.stack(sizes[0], axis=1), [SIZES[i % 8] for i in range(16)])


def test_values_are_drawn_from_the_scaled_posterior_of_the_view(path):
    content = pickle.loads(pickle.dumps(open_content(path)))
    mean, std = posteriors(2, SIZES[2])[0]  # (5, 6, 4, 2)
    window = dict(crop_top=1, crop_left=2, crop_height=4, crop_width=2)
    sample = Sample(2, 0.25, 2, 4.0, 4, 2, False, **window)  # frames 2 and 4
    expected = [x[[2, 4], 1:5, 2:4] for x in (mean, std)]
    drawn = np.stack([content.values(2, Sample(**vars(sample) | {"draw_seed": i})) for i in range(3000)])
    assert drawn.dtype == np.float32 and drawn.shape == (3000, 2, 4, 2, 2)
    np.testing.assert_allclose(drawn.mean(0), 0.5 * expected[0], atol=0.03)
    np.testing.assert_allclose(drawn.std(0), 0.5 * expected[1], rtol=0.1)
    np.testing.assert_array_equal(content.values(2, sample), drawn[0])
    mirrored = Sample(**vars(sample) | {"flip": True, "crop_left": 0})
    flipped = np.stack([content.values(2, Sample(**vars(mirrored) | {"draw_seed": i})) for i in range(3000)])
    np.testing.assert_allclose(flipped.mean(0), 0.5 * expected[0][:, :, ::-1], atol=0.03)


def test_clips_of_all_sizes_stand_in_rows_whole_or_shorter(path, captions):
    content, seen = open_content(path), set()
    for batch in take(clips(path, captions, caption_dropout=0.0), 12):
        assert batch.patches.shape == (4, 64, 8) and batch.text.dtype == np.float16
        for row, k in np.argwhere(batch.clip_ids >= 0):
            clip, tokens = int(batch.clip_ids[row, k]), batch.segment_ids[row] == k + 1
            positions = batch.positions[row][tokens]
            frames = len(set(positions[:, 0]))
            height, width = SIZES[clip % 8][1] // 2 * 2, SIZES[clip % 8][2] // 2 * 2
            assert frames <= content.metadata.num_frames[clip] and batch.labels[row, k] == -1
            found = unpatchify(batch.patches[row][tokens], frames, height, width, (1, 2, 2), 2)
            # 4 deviations of the noise from the mean of a window of either view
            views = posteriors(clip, SIZES[clip % 8])[:, :, :, :height, :width]
            near = [(np.abs(found[None, 0] / 0.5 - view[0]) < 5 * view[1]).mean(axis=(1, 2, 3)).max() for view in views]
            assert max(near) > 0.95 or SIZES[clip % 8][1:] == (5, 7)
            text = batch.text[row][batch.text_segment_ids[row] == k + 1]
            np.testing.assert_array_equal(text, states(f"clip {clip}"))
            seen.add((clip, frames > 1))
    assert {clip for clip, _ in seen} == set(range(16))


def test_rows_are_the_same_on_any_number_of_hosts_and_workers(path, captions):
    expected = take(clips(path, captions), 6)
    for count in (2, 4):
        hosts = [take(clips(path, captions, i, count), 6) for i in range(count)]
        joined = [type(parts[0])(*map(np.concatenate, zip(*parts, strict=True))) for parts in zip(*hosts, strict=True)]
        assert_equal(joined, expected)
    assert_equal(take(clips(path, captions, num_workers=2), 6), expected)


def test_going_on_in_the_middle_is_exact(path, captions):
    with clips(path, captions) as rows:
        expected = [next(rows) for _ in range(7)]
    first, second = clips(path, captions), clips(path, captions)
    for _ in range(3):
        next(first)
    second.set_state(json.loads(json.dumps(first.get_state())))
    assert_equal(take(second, 4), expected[3:])


def test_held_out_clips_come_once_and_unturned(path, captions):
    batches = list(clips(path, captions, training=False, split="unseen"))
    ids = sorted(i for batch in batches for i in batch.clip_ids.ravel() if i >= 0)
    assert ids == [0, 1, 2, 3]
    assert_equal(batches, list(clips(path, captions, training=False, split="unseen")))


def test_a_clip_too_long_for_a_row_has_fewer_frames(path):
    content = open_content(path)
    data = DataConfig(**(CLIPS | dict(num_frames=(6, 6), fps=(8, 8), still_share=0.0, row_length=24)))
    shard = Shard(content, None, data, PATCH, 3, True)
    samples = [sample for _ in range(8) for sample in shard.next_plan() if sample.clip % 8 == 7]  # 6 frames of 3 x 3
    assert samples and {sample.num_frames for sample in samples} == {2} and shard.num_reduced > 0
    skipping = Shard(content, None, data.__class__(**(vars(data) | {"oversize": "skip"})), PATCH, 3, True)
    assert not any(sample.clip % 8 == 7 for _ in range(8) for sample in skipping.next_plan())


def test_stills_of_one_size_are_whole_or_windows(path):
    data = LabelledDataConfig(path=path, **STILLS)
    with make_pipeline(data, PATCH, None, training=False) as rows:
        whole = {i for batch in rows for i in batch.clip_ids.ravel() if i >= 0}
        assert {reason for _, reason in rows.statistics.skipped} == {OTHER_SIZE}
    assert whole == {i for i in range(16) if SIZES[i % 8][1:] == (4, 4)}

    def plans(index, count=60, **changes):
        shard = Shard(open_content(path), None, LabelledDataConfig(path=path, **STILLS | changes), PATCH, index, True)
        return [sample for _ in range(count) for sample in shard.next_plan()]

    def places(samples, size):
        return {(s.crop_top, s.crop_left) for s in samples if SIZES[s.clip % 8][1:] == size}

    drawn = plans(0, crop="random")
    assert places(drawn, (4, 6)) == {(0, 0), (0, 1), (0, 2)} and places(drawn, (4, 4)) == {(0, 0)}
    assert len({s.draw_seed for s in drawn}) == len(drawn)  # a draw of its own each time
    assert places(plans(2, crop="random"), (6, 4)) == {(0, 0), (1, 0), (2, 0)}
    assert places(plans(0, crop="center"), (4, 6)) == {(0, 1)}
    native = plans(3, 30, sampling=NativeSize(), row_length=16)
    assert {(s.height, s.width) for s in native} == {(4, 6), (6, 6)}  # of 5 x 7 and 6 x 6


def test_a_data_set_of_before_reads_as_it_did(tmp_path):
    path = write_older_latents(tmp_path)
    content = open_content(path)
    m = content.metadata
    assert (set(m.num_frames), set(m.height), set(m.width)) == ({1}, {4}, {4}) and m.labels.tolist() == [0, 1] * 4
    assert content.label_names == ("cat", "dog") and content.can_flip
    sample = Sample(3, 0.0, 1, 1.0, 4, 4, False, flip=True, crop_height=4, crop_width=4, draw_seed=7)
    mean, std = posteriors(3, (1, 4, 4))[1]
    noise = np.random.default_rng(7).standard_normal((1, 4, 4, 2), np.float32)
    np.testing.assert_allclose(content.values(3, sample), 0.5 * (mean + std * noise), rtol=1e-6)
    assert content.facts() == {"scaling_factor": 0.5, "dtype": "float32", "shape": [2, 4, 4, 2]}
    batch = take(make_pipeline(LabelledDataConfig(path=path, flip=0.5, **STILLS), PATCH, None), 1)[0]
    assert batch.patches.shape == (4, 4, 8) and set(batch.labels.ravel()) <= {0, 1}


def test_what_the_data_does_not_hold_is_refused(path, captions, tmp_path):
    with pytest.raises(ValueError, match=r"patch\.channels must be the 2 of the latents in .*, got 3"):
        make_pipeline(DataConfig(path=path, **CLIPS), PatchConfig((1, 2, 2)), captions)
    pixels = DataConfig(path="tests/fixtures/clip_folder", **CLIPS)
    with pytest.raises(ValueError, match=r"patch\.channels must be the 3 of the RGB pixels in .*, got 2"):
        make_pipeline(pixels, PATCH, captions)
    single = write_latents(tmp_path, (("train", 4),), views=1)
    with pytest.raises(ValueError, match=r"data\.flip must be 0, got 0\.5: .* holds latents without their mirror"):
        make_pipeline(DataConfig(path=single, **CLIPS), PATCH, captions)
    with pytest.raises(IndexError, match=r"must be in 0 \.\.\. 15, got 16"):
        open_content(path).source.record(16)


def test_the_fingerprint_covers_scale_sizes_and_captions(path, tmp_path):
    def of(path):
        return data_fingerprints(DataConfig(path=path), ("train",))["train"]

    same, scaled = (write_latents(tmp_path / str(factor), factor=factor) for factor in (0.5, 0.25))
    assert of(path) == of(same) != of(scaled)


def test_states_in_the_records_stand_in_for_a_table(captions, path, tmp_path):
    stored = write_latents(tmp_path, states=states)
    content = open_content(stored)
    table = content.captions
    assert table.dim == 3 and table.lengths(["clip 3", ""]).tolist() == [3, 1]
    np.testing.assert_array_equal(table.lookup("clip 3"), states("clip 3"))
    np.testing.assert_array_equal(table.lookup(""), states(""))
    assert table.lookup("clip 3").dtype == table.lookup("").dtype == np.float16
    with pytest.raises(ValueError, match="no record of the data set has the caption 'frog'"):
        table.lookup("frog")
    # The rows are those of a table, with workers too.
    expected = take(clips(path, captions), 3)
    assert_equal(take(clips(stored, None), 3), expected)
    assert_equal(take(clips(stored, None, num_workers=1), 3), expected)
    with pytest.raises(ValueError, match=r"text_length must be 0 without captions .*, got 24 and no caption table"):
        clips(path, None)


def test_stored_states_without_those_of_the_empty_caption_are_refused(tmp_path):
    path = write_latents(tmp_path, (("train", 2),), states=states)
    (tmp_path / "clips_latents" / "1.0.0" / "null_caption_states.npy").unlink()
    with pytest.raises(ValueError, match=r"holds caption_states but not null_caption_states\.npy"):
        open_content(path)
