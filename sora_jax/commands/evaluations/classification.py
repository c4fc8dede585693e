"""Accuracy of ViT, ViViT and NaViT on a split of a prepared data set; of ViViT over several views of each clip."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import jax
import numpy as np
import rich.console
import rich.table
from tqdm import tqdm

from sora_jax.array_types import PyTree
from sora_jax.config import PatchConfig
from sora_jax.data.content import open_data
from sora_jax.data.decode import decode_frames
from sora_jax.data.labelled import FixedSize, LabelledDataConfig
from sora_jax.data.sources import open_source
from sora_jax.data.transforms import Sample
from sora_jax.evaluation.views import multi_view_logits
from sora_jax.families.load import load
from sora_jax.families.recognition import ClassificationConfig
from sora_jax.files import check_writable, write_whole
from sora_jax.models.vivit import ViViT
from sora_jax.parallel.attention import attention_for
from sora_jax.patches.patchify import num_tokens
from sora_jax.runs.recognition import at_side, check_source, score


@dataclasses.dataclass(frozen=True)
class ClassifyOptions:
    """Counts how many images or clips of a split are given their class.

    Attributes:
        checkpoint: a run, an exported model, or a ViT or ViViT that `convert_checkpoint.py` wrote.
        data: directory of the prepared data set (default: the one that a run was trained on).
        split: of it.
        sides: of ViT and NaViT: sizes of the images, the square root of their area in pixels (default: the model's).
        views: of ViViT: (clips, crops) whose logits are averaged; (1, 1) stretches each clip as training does.
        fps: of the frames of a converted ViViT (default: 12.5, every other of Kinetics' 25).
        batch_size: rows at a time.
        json: also write the table's figures to this file.
    """

    checkpoint: str
    data: str | None = None
    split: str = "unseen"
    sides: tuple[int, ...] = ()
    views: tuple[int, int] = (1, 1)
    fps: float | None = None
    batch_size: int = 16
    json: Path | None = None

    def __post_init__(self) -> None:
        if self.sides and self.views != (1, 1):
            raise ValueError(f"sides and views do not go together, got {self.sides} and {self.views}.")
        for name, values in {"sides": self.sides, "views": self.views, "batch_size": (self.batch_size,)}.items():
            if any(value < 1 for value in values):
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}.")


def classify(options: ClassifyOptions) -> None:
    """Measures and prints a table.

    Raises:
        FileNotFoundError: there is no model at `checkpoint`.
        ValueError: no data set, other classes than the model's, or views or sides for a model that has none.
    """
    if options.json is not None:
        check_writable("--json", options.json)
    config, params = read_classifier(options)
    video = len(config.model.example_shape or ()) == 4
    if options.sides and not config.model.takes_any_size:
        raise ValueError(f"sides are for ViT and NaViT: a ViViT takes clips of one size, got {options.sides}.")
    if config.model.patch is None:
        config = dataclasses.replace(config, test_sides=options.sides)
    check_source(config, open_data(config.data, options.split))
    if options.views != (1, 1) and not video:
        raise ValueError(f"views are of ViViT's clips, got {options.views} for a {type(config.model).__name__}.")
    results: dict[str, Any] = {}
    if options.views != (1, 1):
        results[f"{options.views[0]} x {options.views[1]} views"] = multi_view_score(config, params, options)
    else:
        for side in options.sides or (None,):
            name = "as trained" if side is None else f"side {side}"
            results[name] = score(*at_side(config, params, side, options.split), options.split)
    table = rich.table.Table("", "accuracy", "standard error", "most frequent class", "scored", "left out")
    for name, r in results.items():
        shares = (f"{r[key]:.4f}" for key in ("accuracy", "accuracy_stderr", "most_frequent"))
        table.add_row(name, *shares, f"{r['num_scored']:,}", f"{r['num_left_out']:,}")
    rich.console.Console().print(table)
    if options.json is not None:
        figures = {"checkpoint": options.checkpoint, "split": options.split, "results": results}
        write_whole(options.json, json.dumps(figures, indent=2) + "\n")


def read_classifier(options: ClassifyOptions) -> tuple[ClassificationConfig, PyTree]:
    """Returns the config and the parameters at `options.checkpoint`, on the data that the options name."""
    loaded = load(options.checkpoint, kinds=("classification", "vit", "vivit"))
    shared = dict(batch_size=options.batch_size, num_shards=1, num_workers=0)
    if loaded.trained_here:
        if options.fps is not None:
            raise ValueError(f"fps is for converted weights: a run has its own, got {options.fps}.")
        config = loaded.config
        if not (options.data or config.data.path or config.data.mixture):
            raise ValueError("data is needed, the directory of a prepared data set: an exported model names none.")
        there = dict(path=options.data, mixture=(), max_clips=None) if options.data else {}
        data = dataclasses.replace(config.data, **shared, **there)
        return dataclasses.replace(config, data=data), loaded.params
    if options.data is None:
        raise ValueError("data is needed, the directory of a prepared data set: converted weights name none.")
    model = loaded.config
    frames, patch = model.num_frames, model.patch
    data = LabelledDataConfig(
        path=options.data,
        sampling=FixedSize(model.image_size),
        num_frames=frames,
        fps=options.fps or 12.5,
        row_length=num_tokens(frames, *model.image_size, patch),
        max_segments=1,
        num_bins=1,
        **shared,
    )
    return ClassificationConfig(data=data, patch=PatchConfig(patch, model.channels), model=model), loaded.params


def multi_view_score(config: ClassificationConfig, params: PyTree, options: ClassifyOptions) -> dict[str, Any]:
    """Returns the accuracy of a ViViT that averages views of each clip; see `sora_jax.evaluation.views`.

    The shorter side of the frames is brought to that of the model's. Where the speed is the class, each clip is shown
    at each speed.
    """
    model, data = config.model, config.data
    source = open_source(data.path, options.split)
    meta = source.metadata
    vivit = ViViT(model, attention_for("auto", packed=False))
    network = jax.jit(lambda params, clips: vivit.apply({"params": params}, clips))
    params = jax.device_put(params)
    labels, guesses, left_out = [], [], 0
    height, width = model.image_size
    for clip in tqdm(range(len(source)), desc=f"scoring {options.split}", unit="clip", delay=2.0):
        seconds = (int(meta.num_frames[clip]) - 1) / float(meta.fps[clip])
        scale = max(height / int(meta.height[clip]), width / int(meta.width[clip]))
        size = (max(round(int(meta.height[clip]) * scale), height), max(round(int(meta.width[clip]) * scale), width))
        for index, speed in enumerate(data.speeds if data.label == "speed" else data.speeds[:1]):
            label = index if data.label == "speed" else int(meta.labels[clip])
            length = (model.num_frames - 1) * max(map(abs, data.speeds)) / data.fps
            if label < 0 or (data.label == "speed" and length > seconds + 1e-3):
                left_out += 1
                continue
            count = max(math.floor(seconds / abs(speed) * data.fps + 1e-3) + 1, 1)  # frames of the whole clip
            sample = Sample(clip, 0.0, count, data.fps, *size, False, speed)
            frames = sample.frame_indices(float(meta.fps[clip]), int(meta.num_frames[clip]))
            pixels = decode_frames(source.read_frames(clip, frames), *size).astype(np.float32) / 127.5 - 1
            logits = multi_view_logits(
                lambda views: network(params, views), pixels, num_frames=model.num_frames, stride=1,
                crop=model.image_size, num_clips=options.views[0], num_crops=options.views[1],
            )  # fmt: skip
            labels.append(label)
            guesses.append(int(logits.argmax()))
    if not labels:
        raise ValueError(f"split {options.split!r} has no clip that can be scored; {left_out} were left out.")
    accuracy = float(np.mean(np.equal(labels, guesses)))
    return {
        "accuracy": accuracy,
        "accuracy_stderr": math.sqrt(accuracy * (1 - accuracy) / len(labels)),
        "most_frequent": float(np.bincount(labels).max() / len(labels)),
        "num_scored": len(labels),
        "num_left_out": left_out,
    }
