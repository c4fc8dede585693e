import collections
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from fake_source import FakeSource, caption_table
from rows import assert_equal, take

from sora_jax.config import PatchConfig
from sora_jax.data import packing
from sora_jax.data.captioned import DataConfig
from sora_jax.data.content import PixelContent
from sora_jax.data.pipeline import PackedPipeline
from sora_jax.patches.patchify import num_tokens

SOURCE = FakeSource()
CAPTIONS = caption_table(SOURCE)
PATCH = PatchConfig(size=(2, 8, 8))
DATA = dict(
    num_frames=(1, 16), long_side=(32, 64), row_length=512, text_length=64, max_segments=16, max_caption_tokens=8,
    num_bins=8, batch_size=4, num_shards=2, num_workers=0, prefetch=2,
)  # fmt: skip


def pipeline(repeat=True, process_index=0, process_count=1, source=SOURCE, captions=CAPTIONS, **changes):
    return PackedPipeline(
        PixelContent(source), captions, DataConfig(**(DATA | changes)), PATCH,
        repeat=repeat, process_index=process_index, process_count=process_count,
    )  # fmt: skip


REFERENCE = take(pipeline(), 9)


def test_every_segment_is_one_clip_with_its_caption_and_its_aspect():
    seen = collections.Counter()
    for batch in REFERENCE:
        assert batch.patches.shape == (4, 512, PATCH.dim)
        assert batch.patches.dtype == np.float32
        assert np.abs(batch.patches).max() <= 1
        for row in range(4):
            for k, clip in enumerate(batch.clip_ids[row]):
                tokens = batch.segment_ids[row] == k + 1
                text = batch.text[row][batch.text_segment_ids[row] == k + 1]
                assert tokens.any() == (clip >= 0) == (len(text) > 0)
                if clip < 0:
                    continue
                seen[clip] += 1
                red = batch.patches[row][tokens].reshape(-1, 3)[:, 0]
                np.testing.assert_allclose(red, 5 * clip / 127.5 - 1, atol=1e-6)
                null = (text == -1).all()
                assert null or (text == clip).all()
                assert len(text) == (2 if null else 2 + clip % 3)
                rows, columns = batch.positions[row][tokens][:, 1:].max(axis=0) + 1
                scale = max(rows, columns) * 8 / max(SOURCE.metadata.height[clip], SOURCE.metadata.width[clip])
                assert abs(rows * 8 - SOURCE.metadata.height[clip] * scale) <= 9
                assert abs(columns * 8 - SOURCE.metadata.width[clip] * scale) <= 9
        np.testing.assert_array_equal(batch.loss_mask, batch.segment_ids > 0)
    assert len(seen) == len(SOURCE)


def test_frames_of_a_clip_run_forward():
    for batch in REFERENCE:
        green = batch.patches[..., 1]
        for row in range(4):
            for k in range(16):
                tokens = batch.segment_ids[row] == k + 1
                t = batch.positions[row][tokens][:, 0]
                by_time = [green[row][tokens][t == moment].mean() for moment in np.unique(t)]
                assert (np.diff(by_time) < 0).all()


@pytest.mark.parametrize("num_workers", [1, 2])
def test_workers_change_nothing(num_workers):
    assert_equal(take(pipeline(num_workers=num_workers), 4), REFERENCE[:4])


def test_hosts_change_nothing():
    halves = [take(pipeline(process_index=host, process_count=2), 4) for host in range(2)]
    together = [
        type(a)(*(np.concatenate(pair) for pair in zip(a, b, strict=True))) for a, b in zip(*halves, strict=True)
    ]
    assert_equal(together, REFERENCE[:4])


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_place_in_the_middle_of_packing_is_found_again(num_workers):
    before = pipeline(num_workers=num_workers)
    with before:
        assert_equal([next(before) for _ in range(3)], REFERENCE[:3])
        state = json.loads(json.dumps(before.get_state()))
    assert any(0 < shard["next_row"] < DATA["num_bins"] for shard in state.values())
    after = pipeline(num_workers=2 - num_workers)
    after.set_state(state)
    assert_equal(take(after, 6), REFERENCE[3:])


def test_a_place_of_other_shards_is_refused():
    with pytest.raises(ValueError, match="lacks shard 1; it has 0"):
        pipeline().set_state({"0": None})


def test_epochs_differ_and_one_pass_gives_each_clip_once():
    first, second = take(pipeline(), 2)
    assert (first.clip_ids != second.clip_ids).any()
    counts = collections.Counter()
    with pipeline(repeat=False) as rows:
        for batch in rows:
            assert batch.patches.shape[0] == 4
            counts.update(batch.clip_ids[batch.clip_ids >= 0].tolist())
    assert counts == dict.fromkeys(range(len(SOURCE)), 1)


def test_only_the_chosen_clips_are_used():
    ids = {i for batch in take(pipeline(max_clips=6), 6) for i in batch.clip_ids.ravel() if i >= 0}
    assert len(ids) == 6


def test_statistics_count_what_was_given():
    rows = pipeline()
    batches = take(rows, 5)
    real = sum(int((b.segment_ids > 0).sum()) for b in batches)
    assert rows.statistics.real_tokens == real
    assert rows.statistics.real_token_share == real / (5 * 4 * 512)
    assert rows.statistics.clips == sum(int((b.clip_ids >= 0).sum()) for b in batches)
    assert rows.statistics.rows == 20
    assert rows.summary() == f"20 rows of {rows.statistics.clips} clips, {real / (20 * 512):.2%} of their tokens real"


@pytest.mark.parametrize(("row_length", "share"), [(1024, 0.98), (2048, 0.99)])
def test_rows_are_nearly_full(row_length, share):
    rows = pipeline(row_length=row_length, long_side=(32, 96), num_frames=(1, 24), num_bins=64, max_segments=64,
                    text_length=512, batch_size=32)  # fmt: skip
    shard = rows._open_shard(0)
    lengths = [
        sum(num_tokens(s.num_frames, s.height, s.width, PATCH.size) for s in shard.next_plan()) for _ in range(64)
    ]
    assert np.mean(lengths) / row_length >= share


def test_what_is_left_out_is_counted_named_and_said(caplog):
    rows = pipeline(
        num_frames=(16, 16), fps=(24, 24), long_side=(64, 64), still_share=0.0, row_length=256, oversize="skip",
        num_shards=1,
    )  # fmt: skip
    batches = take(rows, 3)
    # 8 patches in time leave room for 32 a frame; the narrowest clip has 8 x 5.
    assert {i % 4 for b in batches for i in b.clip_ids.ravel() if i >= 0} == {0}  # the stills
    assert {name for name, _ in rows.statistics.skipped} == {f"clip-{i}.webp" for i in range(40) if i % 4}
    assert {reason for _, reason in rows.statistics.skipped} == {"more patches than a row of data.row_length has"}
    told = [message for message in caplog.messages if "left out" in message]
    assert len(told) == 6 and len(set(told)) == 6  # five by name, and that there are more
    assert told[-1].startswith("more clips left out: more patches than a row")
    assert rows.statistics.num_reduced == 0
    samples, clips = sum(rows.statistics.skipped.values()), len(rows.statistics.skipped)
    assert f"; {samples} samples of {clips} clips left out (more patches than a row" in rows.summary()
    assert "data.row_length has: clip-1.webp, clip-10.webp, clip-11.webp, ...)" in rows.summary()


def test_what_is_made_smaller_is_counted_and_said(caplog):
    rows = pipeline(num_frames=(16, 16), fps=(24, 24), long_side=(64, 64), still_share=0.0, row_length=256)
    batches = take(rows, 3)
    assert {i % 4 for b in batches for i in b.clip_ids.ravel() if i >= 0} == {0, 1, 2, 3}
    assert not rows.statistics.skipped
    assert 0 < rows.statistics.num_reduced
    assert rows.summary().endswith(f"; {rows.statistics.num_reduced} samples made smaller to fit a row")
    assert len([m for m in caplog.messages if "made smaller" in m]) == 1


@pytest.mark.parametrize("repeat", [True, False])
def test_no_row_at_all_is_an_error_that_says_what_to_change(repeat, monkeypatch, caplog):
    monkeypatch.setattr(packing, "MOST_MISSES", 200)
    source = FakeSource(3)
    source.metadata.num_frames[:] = 72
    rows = pipeline(
        repeat, source=source, num_frames=(16, 16), fps=(24, 24), long_side=(64, 64), still_share=0.0, row_length=256,
        oversize="skip",
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"more patches than a row.*raise data.row_length \(256\).*oversize"):
        next(rows)


def test_a_shard_without_clips_is_refused():
    with pytest.raises(ValueError, match=r"num_shards must be at most the number of clips .*\(1\), got 2"):
        pipeline(max_clips=1)
    with pytest.raises(ValueError, match="the split has no clips"):
        next(pipeline(repeat=False, source=FakeSource(0)))


class BrokenSource(FakeSource):
    def read_frames(self, index, frame_indices):
        return [b"not a picture"] * len(frame_indices)


class WorkerReport(FakeSource):
    def read_frames(self, index, frame_indices):
        from jax._src import xla_bridge

        raise OSError(f"threads {os.environ['OMP_NUM_THREADS']}, JAX started {xla_bridge.backends_are_initialized()}")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_bad_clip_is_named_in_the_main_process(num_workers):
    with pytest.raises(ValueError, match=r"clip 'clip-\d+.webp': frame 0 of \d+ cannot be decoded"):
        take(pipeline(source=BrokenSource(), num_workers=num_workers), 1)


def test_a_failure_reaches_the_main_process_with_its_traceback():
    with pytest.raises(RuntimeError, match=r"(?s)in read_frames.*OSError: threads 1, JAX started False"):
        take(pipeline(source=WorkerReport(), num_workers=1), 1)


def test_a_dead_worker_is_noticed_and_closing_leaves_none():
    with pipeline(num_workers=2) as rows:
        assert_equal([next(rows)], REFERENCE[:1])
        first, second = {maker.process.pid: maker.process for maker in rows._makers.values()}.values()
        assert second.poll() is None
        first.kill()
        with pytest.raises(RuntimeError, match=r"a data worker died with exit code -9"):
            for _ in range(20):
                next(rows)
        assert second.poll() is not None
        place = rows.get_state()
    again = pipeline()
    again.set_state(place)
    done = rows.statistics.rows // 4
    assert_equal(take(again, 1), REFERENCE[done : done + 1])


SCRIPT = """
import sys, time
sys.path.insert(0, {folder!r})
from fake_source import FakeSource, caption_table
from sora_jax.config import PatchConfig
from sora_jax.data.captioned import DataConfig
from sora_jax.data.content import PixelContent
from sora_jax.data.pipeline import PackedPipeline
data = DataConfig(row_length=64, num_bins=4, long_side=(16, 16), num_workers=1, prefetch=1)
source = FakeSource()
rows = PackedPipeline(PixelContent(source), caption_table(source), data, PatchConfig(), repeat=True,
                      process_index=0, process_count=1)
next(rows)  # without a __main__ guard
print(rows._makers[0].process.pid, flush=True)
if "sleep" in sys.argv:
    time.sleep(60)
"""


def test_workers_leave_signals_to_the_main_process_and_end_with_it(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(folder=str(pathlib.Path(__file__).parent)))
    main = subprocess.Popen([sys.executable, script, "sleep"], stdout=subprocess.PIPE, text=True)
    with main:
        worker = int(main.stdout.readline())
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(worker, number)
        time.sleep(0.2)
        os.kill(worker, 0)  # it is still there
        main.kill()
    wait_until_gone(worker)
    ended = subprocess.run([sys.executable, script], stdout=subprocess.PIPE, text=True, timeout=300)
    assert ended.returncode == 0
    wait_until_gone(int(ended.stdout))


def wait_until_gone(pid):
    for _ in range(100):
        try:
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rsplit(")", 1)[1].split()[0] == "Z":  # nobody has collected it yet
                    return
        except FileNotFoundError:
            return
        time.sleep(0.1)
    raise AssertionError(f"process {pid} is still there")


def test_shards_must_be_shared_out_evenly():
    with pytest.raises(ValueError, match=r"num_shards must be a multiple of the number of hosts \(3\), got 2"):
        pipeline(process_count=3)
