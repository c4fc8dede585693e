import dataclasses
import io
import json
import time

import benchmark
import numpy as np
import pytest
from PIL import Image

from sora_jax.config import PatchConfig
from sora_jax.data.captioned import DataConfig
from sora_jax.data.captions import CaptionTable
from sora_jax.data.content import PixelContent
from sora_jax.data.packing import Shard
from sora_jax.data.pipeline import PackedPipeline
from sora_jax.data.records import ClipMetadata
from sora_jax.families.sora import SoraConfig
from sora_jax.models.sora import ModelConfig
from sora_jax.patches.patchify import num_tokens

packing, data, samplers = benchmark.packing, benchmark.data, benchmark.samplers

CONFIG = SoraConfig(
    model=ModelConfig(width=16, depth=1, num_heads=2, mlp_dim=16, text_dim=3, frequency_dim=8),
    patch=PatchConfig(size=(2, 8, 8)),
    data=DataConfig(
        path="clips", row_length=64, text_length=16, max_segments=8, max_caption_tokens=4, num_bins=8,
        num_frames=(1, 4), long_side=(16, 32), batch_size=2, num_shards=2, num_workers=0, prefetch=1,
    ),
    num_steps=10,
)  # fmt: skip


class GreySource:
    """Twenty clips, stills and longer ones, each of one grey; reading takes `pause` seconds."""

    def __init__(self, pause=0.0):
        rng = np.random.default_rng(0)
        self.pause = pause
        self.path, self.label_names, self.null_states = "grey", (), None
        self.metadata = ClipMetadata(
            clip_ids=np.arange(20),
            num_frames=np.where(np.arange(20) % 3 == 0, 1, 24).astype(np.int32),
            height=rng.integers(24, 40, 20).astype(np.int32),
            width=rng.integers(24, 40, 20).astype(np.int32),
            fps=np.full(20, 12, np.float32),
            labels=np.full(20, -1, np.int32),
            captions=[f"grey {i}" for i in range(20)],
            names=[f"{i}.png" for i in range(20)],
        )

    def __len__(self):
        return 20

    def read_frames(self, index, frame_indices):
        time.sleep(self.pause)
        file = io.BytesIO()
        Image.new("RGB", (int(self.metadata.width[index]), int(self.metadata.height[index])), (index,) * 3).save(
            file, "PNG"
        )
        return [file.getvalue()] * len(frame_indices)


def caption_table(source):
    return CaptionTable.build(
        source.metadata.captions, lambda texts: [np.ones((2 + len(text) % 2, 3), np.float32) for text in texts]
    )


@pytest.fixture
def fake_data(monkeypatch):
    def install(source):
        dense = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, attention="xla"))
        for suite, config in ((packing, CONFIG), (data, dense)):  # dense attention compiles sooner
            monkeypatch.setattr(suite, "load_config", lambda name, kind, config=config: config)
            monkeypatch.setattr(suite, "captions_of", lambda config, folder: caption_table(source))
        monkeypatch.setattr(packing, "open_data", lambda data: PixelContent(source))
        monkeypatch.setattr(
            data,
            "make_pipeline",
            lambda d, patch, captions: PackedPipeline(
                PixelContent(source), captions, d, patch, repeat=True, process_index=0, process_count=1
            ),
        )

    return install


class SlotTrainer:
    """Takes a second for each token of a batch, padding included, so that tokens a second are the share itself.

    With dense attention a step takes twice as long.
    """

    num_devices = 1

    def __init__(self, config):
        pass

    def step(self, config):
        return config

    def timed(self, config, batches):
        (batch,) = batches
        d = config.data
        assert batch.patches.shape == (d.batch_size, d.row_length, CONFIG.patch.dim)
        assert batch.text.shape[:2] == (d.batch_size, d.text_length)
        assert batch.clip_ids.shape == (d.batch_size, d.max_segments)
        assert ((batch.clip_ids >= 0).sum(axis=1) == (batch.segment_ids.max(axis=1))).all()
        return batch.segment_ids.size * (2.0 if config.model.attention == "xla" else 1.0)


@pytest.mark.parametrize(
    ("sizes", "num_buckets", "bounds"),
    [
        (range(1, 101), 4, [25, 50, 75, 100]),  # as many clips each: 6250 tokens, against 6683 with as many tokens each
        ([40] * 6 + [60] * 4 + [100] * 2, 2, [60, 100]),  # as many tokens each: 800, against 840 with as many clips
        ([7, 7, 7], 6, [7]),
    ],
)
def test_bucket_bounds(sizes, num_buckets, bounds):
    sizes = np.random.default_rng(0).permutation(np.array(sizes))
    assert packing.bucket_bounds(sizes, num_buckets).tolist() == bounds


def small_plan():
    source = GreySource()
    config = packing.scale_rows(packing.prepare(packing.PackingOptions()), CONFIG.data.row_length)
    return packing.plan_rows(PixelContent(source), caption_table(source), config, 30), caption_table(source), config


def test_every_method_gets_the_same_clips(fake_data):
    fake_data(GreySource())
    plan, captions, config = small_plan()
    methods = packing.make_methods(plan, captions, config, num_devices=1, num_buckets=4)
    clips = sorted(dataclasses.astuple(sample) for sample in plan.samples)
    assert len(clips) > 60
    for shapes in methods.values():
        assert sorted(dataclasses.astuple(s) for shape in shapes for row in shape.rows for s in row) == clips
        for shape in shapes:
            for row in shape.rows:
                tokens = sum(num_tokens(s.num_frames, s.height, s.width, CONFIG.patch.size) for s in row)
                assert tokens <= shape.row_length
            slots = CONFIG.data.batch_size * CONFIG.data.row_length
            assert abs(shape.batch_size * shape.row_length - slots) <= shape.row_length / 2
    assert [len(shapes) for shapes in methods.values()] == [1, 1, 4]


def test_rows_are_divided_among_devices(fake_data):
    fake_data(GreySource())
    plan, captions, config = small_plan()
    for shapes in packing.make_methods(plan, captions, config, num_devices=3, num_buckets=4).values():
        assert all(shape.batch_size % 3 == 0 for shape in shapes if shape.max_segments == 1)


def test_a_shape_is_weighted_by_its_batches_and_its_faster_kernel():
    shape = packing.Shape([[]] * 30, 8, 4, 1, 5, {"xla": [9.0, 1.0, 2.0], "blockwise": [3.0, 3.0, 0.1]})
    assert shape.kernel == "xla"
    assert shape.total_seconds() == 30 / 5 * 2.0


def test_packing_counts_every_token_and_every_slot(fake_data, monkeypatch, tmp_path, capsys):
    fake_data(GreySource())
    monkeypatch.setattr(packing, "Trainer", SlotTrainer)
    monkeypatch.setattr(packing, "BLOCK", 0)  # so that padded rows may take the kernel that is faster here
    path = tmp_path / "packing.json"
    options = ["--row-lengths", "64", "128", "--rows", "40", "--num-steps", "2", "--num-buckets", "3"]
    assert benchmark.main(["packing", *options, "--json", str(path)]) == 0
    figures = json.loads(path.read_text())
    rows = {(row["row_length"], row["method"]): row for row in figures["rows"]}
    assert list(rows) == [(n, m) for n in (64, 128) for m in ("packed", "packed_dense", "padded", "buckets")]
    assert figures["num_frames"] == [1, 24]
    for (length, method), row in rows.items():
        speed = row["real_tokens_per_second"] * (2 if method == "packed_dense" else 1)
        assert speed == pytest.approx(row["real_token_share"])
        assert row["ratio_to_padded"] == pytest.approx(
            row["real_tokens_per_second"] / rows[length, "padded"]["real_tokens_per_second"]
        )
        assert row["num_dropped"] == 0
    assert rows[64, "packed"]["real_token_share"] > rows[64, "buckets"]["real_token_share"]
    assert rows[64, "buckets"]["real_token_share"] > rows[64, "padded"]["real_token_share"]
    assert rows[64, "packed"]["attention"] == "blockwise"
    assert rows[64, "packed_dense"]["attention"] == "xla"
    assert rows[64, "packed"]["num_reduced"] > 0
    shown = capsys.readouterr().out
    assert "packed_dense" in shown
    assert "a step takes 2.00 times as long" in shown


def test_clips_larger_than_a_row_are_dropped_where_asked(fake_data, monkeypatch, tmp_path):
    fake_data(GreySource())
    monkeypatch.setattr(packing, "Trainer", SlotTrainer)
    clips = packing.ClipOptions(oversize="skip")
    figures = packing.run(packing.PackingOptions(data=clips, row_lengths=(32,), rows=10, num_steps=1, num_buckets=2))
    assert {row["num_reduced"] for row in figures["rows"]} == {0}
    assert min(row["num_dropped"] for row in figures["rows"]) > 0


@pytest.mark.slow
def test_the_real_step_is_timed(fake_data):
    fake_data(GreySource())
    options = packing.PackingOptions(row_lengths=(64,), rows=12, num_steps=1, num_buckets=2)
    figures = packing.run(options)
    assert [row["method"] for row in figures["rows"]] == ["packed", "packed_dense", "padded", "buckets"]
    assert all(row["real_tokens_per_second"] > 0 for row in figures["rows"])


@pytest.mark.slow
def test_waiting_is_seen_and_is_not_work(fake_data, tmp_path, capsys):
    fake_data(GreySource(pause=0.1))
    path = tmp_path / "data.json"
    assert benchmark.main(["data", "--num-steps", "2", "--json", str(path)]) == 0
    figures = json.loads(path.read_text())
    assert 0.5 < figures["wait_share"] <= 1
    assert 0 < figures["pipeline_cpus"] < 0.5  # it sleeps
    assert figures["headroom"] == pytest.approx(
        figures["pipeline_tokens_per_second"] / figures["step_tokens_per_second"]
    )
    # A batch has two rows of up to 64 tokens and at least two clips, each of which takes 0.1 s to read.
    assert 0 < figures["pipeline_tokens_per_second"] < 128 / 0.2
    assert "alone, the pipeline makes" in capsys.readouterr().out


def test_a_reader_counts_from_its_restart():
    source = GreySource()
    captions, content = caption_table(source), PixelContent(source)
    first, second = (Shard(content, captions, CONFIG.data, CONFIG.patch, i, True) for i in range(2))
    expected = [next(first), next(second)], [next(first), next(second)]
    with PackedPipeline(
        content, captions, CONFIG.data, CONFIG.patch, repeat=True, process_index=0, process_count=1
    ) as pipeline:
        reader = data.Reader(pipeline)
        reader.read(1)
        reader.restart()
        reader.read(1)
        assert reader.tokens == 128
        assert reader.real_tokens == sum((row.segment_ids > 0).sum() for row in expected[1])
        assert 0 < reader.figures()["wait_share"] <= 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["packing", "--rows", "0"], "rows must be at least 1, got 0"),
        (["packing", "--num-buckets", "1"], "num_buckets must be at least 2, got 1"),
        (["packing", "--row-lengths", "0"], "row_lengths must be one or more positive numbers"),
        (["packing", "--data.path", "nowhere"], "'nowhere' holds no prepared TFDS data set"),
        (["packing"], "data.path is empty"),
        (["packing", "--config", "sora_huge"], "no config 'sora_huge'"),
        (["data", "--num-steps", "0"], "num_steps must be at least 1, got 0"),
        (["data", "--data.path", "nowhere"], "'nowhere' holds no prepared TFDS data set"),
        (["data", "--json", "/dev/null/x.json"], "--json '/dev/null/x.json' cannot be written"),
    ],
)
def test_bad_input_is_named(argv, message, capsys):
    try:
        code = benchmark.main(argv)
    except SystemExit as error:
        code = error.code
    assert code == 2
    assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


class Circle:
    """A pipeline whose clip is right up to 1 / steps, by Euler, and 1 / steps^2 by any other sampler."""

    config = CONFIG

    def clips(self, requests, names, steps, sampler, progress):
        progress(0, steps)
        progress(steps, steps)
        return [np.full((2, 4, 4, 3), (1 if sampler == "euler" else steps**-1) / steps) for _ in requests]


def test_samplers_table(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(samplers.SoraPipeline, "from_pretrained", lambda path: Circle())
    path = tmp_path / "samplers.json"
    arguments = ["samplers", "--evaluations", "4", "16", "--reference-steps", "100", "--num-points", "300"]
    assert benchmark.main([*arguments, "--json", str(path)]) == 0
    rows = json.loads(path.read_text())["rows"]
    of_model = {(r["sampler"], r["evaluations"]): r["error"] for r in rows if r["what"] == "model"}
    assert set(of_model) == {(name, n) for name in ("euler", "heun", "dpm++", "unipc") for n in (4, 16)}
    assert of_model["euler", 16] == pytest.approx(1 / 16 - 1e-4)
    assert of_model["heun", 16] == pytest.approx(1 / 8**2 - 1e-4)  # two evaluations a step
    of_mixture = {(r["sampler"], r["evaluations"]): r["error"] for r in rows if r["what"] == "mixture"}
    assert len(of_mixture) == 2 * len(samplers.SAMPLERS)
    assert all(of_mixture[name, 16] < of_mixture[name, 4] for name in samplers.SAMPLERS)
    assert "unipc" in capsys.readouterr().out


def test_energy_distance_by_eye():
    zero, three = np.zeros((2, 1)), np.full((3, 1), 3.0)
    assert samplers.energy_distance(zero, three) == 6.0
    assert samplers.energy_distance(three, three) == 0.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--evaluations", "1"], "evaluations must be at least 2 each, got (1,)"),
        (["--reference-steps", "0"], "reference_steps must be at least 1, got 0"),
        (["--num-points", "1"], "num_points must be at least 2, got 1"),
        (["--prompts"], "prompts must be one or more"),
    ],
)
def test_bad_sampler_options_are_named(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        benchmark.main(["samplers", *arguments])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
