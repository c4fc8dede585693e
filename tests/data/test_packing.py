"""The plans of a shard: what a row holds, before anything is decoded."""

import dataclasses
import json

import numpy as np
import pytest
from fake_source import FakeSource, caption_table

from sora_jax.config import PatchConfig
from sora_jax.data.captioned import DataConfig
from sora_jax.data.content import PixelContent
from sora_jax.data.packing import FEW_CLIPS, TOO_LONG_CAPTION, Shard
from sora_jax.patches.levels import KNOWN
from sora_jax.patches.patchify import num_tokens

SOURCE = FakeSource()
CAPTIONS = caption_table(SOURCE)
PATCH = PatchConfig(size=(2, 8, 8))
DATA = DataConfig(
    num_frames=(1, 16), long_side=(32, 64), row_length=512, text_length=24, max_segments=6, max_caption_tokens=8,
    num_bins=8, num_shards=3, batch_size=3,
)  # fmt: skip


def shard(index=0, repeat=True, source=SOURCE, **changes):
    data = DataConfig(**({name: getattr(DATA, name) for name in DATA.__dataclass_fields__} | changes))
    return Shard(PixelContent(source), CAPTIONS, data, PATCH, index, repeat)


def plans(of, count):
    return [of.next_plan() for _ in range(count)]


def text_tokens(sample):
    return 2 if sample.caption_dropped else 2 + sample.clip % 3


def test_no_budget_is_exceeded_and_each_one_binds():
    used = []
    for row in plans(shard(), 200):
        patches = sum(num_tokens(s.num_frames, s.height, s.width, PATCH.size) for s in row)
        used.append((patches, sum(map(text_tokens, row)), len(row)))
    assert (np.max(used, axis=0) <= (512, 24, 6)).all()
    assert np.max(used, axis=0)[0] > 500 and np.max(used, axis=0)[2] == 6
    short = [sum(map(text_tokens, row)) for row in plans(shard(text_length=8), 100)]
    assert max(short) == 8
    assert any(len(row) == 1 for row in plans(shard(max_segments=1), 20))


def test_tables_are_drawn_by_their_shares_and_a_row_has_room_for_their_levels():
    shares = dict(known_first_share=0.3, free_frames_share=0.5, max_levels=20, still_share=0.0)
    of = shard(**shares)
    rows = plans(of, 300)

    def columns(sample):
        frames = -(-sample.num_frames // PATCH.size[0])
        return (1, min(frames, 2), frames)[sample.table]

    used = [sum(map(columns, row)) for row in rows]
    assert max(used) == 20
    tables = np.bincount([sample.table for row in rows for sample in row], minlength=3)
    np.testing.assert_allclose(tables / tables.sum(), [0.2, 0.3, 0.5], atol=0.05)
    for samples in rows[:3]:
        row = of.fill(samples)
        assert row.level_segments.shape == (20,) and (row.level_segments > 0).sum() == sum(map(columns, samples))
        for number, sample in enumerate(samples, 1):
            ids, tokens = row.level_ids[row.segment_ids == number], row.positions[row.segment_ids == number]
            assert len(set(ids.tolist())) == columns(sample)
            assert (row.level_segments[ids] == number).all()
            known = row.level_roles[ids] == KNOWN
            first = (tokens[:, 0] == 0) & (sample.table == 1) & (columns(sample) == 2)
            np.testing.assert_array_equal(known, first)
            np.testing.assert_array_equal(row.loss_mask[row.segment_ids == number], ~known)
    # Without the shares all else is drawn as it was.
    assert [s.clip for r in plans(shard(still_share=0.0), 3) for s in r] == [
        s.clip for r in plans(shard(still_share=0.0, max_levels=6), 3) for s in r
    ]


def test_shards_share_the_clips_out_and_each_epoch_has_each_clip_once():
    owned = []
    for index in range(3):
        one = shard(index, repeat=False)
        clips = []
        with pytest.raises(StopIteration):
            while True:
                clips += [sample.clip for sample in one.next_plan()]
        assert sorted(clips) == list(range(index, len(SOURCE), 3))
        assert clips != sorted(clips)
        owned += clips
    assert sorted(owned) == list(range(len(SOURCE)))


@pytest.mark.parametrize("size", [1, 5, FEW_CLIPS])
def test_an_endless_shard_gives_every_clip_once_an_epoch_in_a_new_order(size):
    source = FakeSource(3 * size)
    one = Shard(PixelContent(source), None, dataclasses.replace(DATA, max_segments=1, num_bins=1), PATCH, 1, True)
    epochs = [[one.next_plan()[0].clip for _ in range(size)] for _ in range(3)]
    assert all(sorted(epoch) == list(range(1, 3 * size, 3)) for epoch in epochs)
    orders = {tuple(epoch) for epoch in epochs}
    assert len(orders) == (1 if size == 1 else 3) and (size == 1 or tuple(range(1, 3 * size, 3)) not in orders)


def test_seeds_and_shards_draw_differently():
    def draws(**changes):
        return [(s.clip, s.start, s.fps) for row in plans(shard(**changes), 3) for s in row]

    assert draws() == draws() != draws(seed=1)
    assert not set(draws()) & set(draws(index=1))


@pytest.mark.parametrize("after", range(0, 20, 3))
def test_a_place_is_small_exact_and_survives_json(after):
    one = shard()
    plans(one, after)
    place = json.dumps(one.get_state())
    assert len(place) < 1000
    expected = plans(one, 12)
    other = shard()
    plans(other, 5)  # wherever it was before
    other.set_state(json.loads(place))
    assert plans(other, 12) == expected


def test_a_caption_longer_than_a_row_is_left_out():
    one = shard(index=0, caption_dropout=0.0, text_length=3, max_caption_tokens=2)
    clips = {sample.clip for row in plans(one, 30) for sample in row}
    assert clips == {i for i in range(0, 40, 3) if 2 + i % 3 <= 3}
    one = shard(index=2, caption_dropout=0.5, text_length=3, max_caption_tokens=2)  # 4 tokens each, 2 where dropped
    assert all(sample.caption_dropped for row in plans(one, 30) for sample in row)
    assert {reason for _, reason in one.skipped} == {TOO_LONG_CAPTION}
