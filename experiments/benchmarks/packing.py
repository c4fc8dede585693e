"""Packed rows against padding and size buckets: how many real tokens a second the training step gets through.

Clips are drawn once and planned into rows by the pipeline's own shards. The same clips then go through every method:

    packed         the pipeline's rows
    packed_dense   the same rows with dense attention, which also computes the blocks between different clips
    padded         a row a clip, as long as the longest clip
    buckets        a row a clip, as long as its bucket; the bounds are quantiles of the clips' sizes, counted by clip or
                   by token, whichever pads less

A batch of any method has about as many tokens, padding included, as one of packed rows. Captions of padded rows are
as long as the longest. Shares are over all planned clips; the real step is timed on some, method after method in
rounds, so that a slow moment of the machine falls on all, and weighted by how many batches of each shape the planned
clips fill. Padded rows and buckets use, at each shape, whichever kernel is faster; short rows, dense attention.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks.training_step import captions_of, device_name, kernel_name, with_data
from sora_jax.array_types import PackedBatch
from sora_jax.commands.train import load_config
from sora_jax.data.captions import CaptionTable
from sora_jax.data.packing import Shard
from sora_jax.data.sources import open_source
from sora_jax.data.transforms import Sample
from sora_jax.families.sora import SoraConfig
from sora_jax.models.blockwise_attention import BLOCK
from sora_jax.patches.patchify import num_tokens
from sora_jax.patches.rows import fill_row, stack_rows
from sora_jax.runs.trainer import Trainer


@dataclasses.dataclass(frozen=True)
class ClipOptions:
    """Where the clips come from and how they are sampled; all else is the config's.

    Attributes:
        path: directory of a prepared data set (default: the config's).
        max_clips: of the split (default: all).
        num_frames: (fewest, most) frames of a sample.
        long_side: (shortest, longest) long side of a sample in pixels.
        oversize: a sample larger than a row is made smaller, or left out and counted as dropped.
    """

    path: str | None = None
    max_clips: int | None = None
    num_frames: tuple[int, int] = (1, 24)
    long_side: tuple[int, int] = (32, 96)
    oversize: Literal["resize", "skip"] = "resize"


@dataclasses.dataclass(frozen=True)
class PackingOptions:
    """Measures packed rows against padded ones and size buckets, on the real training step.

    Attributes:
        config: name of a file in sora_jax/configs/ or path of a Python file; gives the model and the batch.
        data: the clips.
        row_lengths: tokens of a packed row; the caption tokens and clips of a row grow with them.
        rows: packed rows that are planned for the shares.
        num_steps: timed steps of each shape, after one that compiles.
        num_buckets: at least two.
        seed: chooses the clips whose steps are timed.
        json: also write the table's figures to this file.
    """

    config: str = "sora_emoji"
    data: ClipOptions = ClipOptions()
    row_lengths: tuple[int, ...] = (1024, 2048)
    rows: int = 10_000
    num_steps: int = 4
    num_buckets: int = 6
    seed: int = 0
    json: Path | None = None

    def __post_init__(self) -> None:
        if not self.row_lengths or min(self.row_lengths) < 1:
            raise ValueError(f"row_lengths must be one or more positive numbers, got {self.row_lengths}.")
        for name, least in (("rows", 1), ("num_steps", 1), ("num_buckets", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}.")


@dataclasses.dataclass
class Shape:
    """The rows of a method that have one shape.

    Attributes:
        rows: every planned row of it, as the samples in it.
        row_length, text_length, max_segments: of a row.
        batch_size: rows of a batch.
        seconds: of the timed steps, by attention kernel.
    """

    rows: list[list[Sample]]
    row_length: int
    text_length: int
    max_segments: int
    batch_size: int
    seconds: dict[str, list[float]]

    @property
    def kernel(self) -> str:
        """The kernel whose median step is the fastest."""
        return min(self.seconds, key=lambda name: statistics.median(self.seconds[name]))

    def total_seconds(self) -> float:
        """Returns how long all planned rows take."""
        return len(self.rows) / self.batch_size * statistics.median(self.seconds[self.kernel])


@dataclasses.dataclass(frozen=True)
class Plan:
    """Rows planned on metadata alone.

    Attributes:
        shard: that decodes their samples.
        captions: of the clips, by their index.
        rows: the samples of each.
        num_dropped: samples that fit no row and were left out.
        num_reduced: samples that were made smaller to fit a row.
    """

    shard: Shard
    captions: list[str]
    rows: list[list[Sample]]
    num_dropped: int
    num_reduced: int

    @property
    def samples(self) -> list[Sample]:
        """All samples."""
        return [sample for row in self.rows for sample in row]


def run(options: PackingOptions) -> dict[str, Any]:
    """Runs the suite, prints its table and returns its figures."""
    config = prepare(options)
    source = open_source(config.data.path, config.data.split)
    with tempfile.TemporaryDirectory() as folder:
        captions = captions_of(config, Path(folder))
        trainer = Trainer(config)
        rows = []
        for row_length in options.row_lengths:
            scaled = scale_rows(config, row_length)
            plan = plan_rows(source, captions, scaled, options.rows)
            rows += compare(plan, captions, scaled, trainer, options)
    return report(rows, config, options)


def prepare(options: PackingOptions) -> SoraConfig:
    """Returns the config with the options' clips, one batch an update."""
    config, clips = load_config(options.config, SoraConfig), dataclasses.asdict(options.data)
    clips["path"] = clips["path"] or config.data.path
    optimizer = dataclasses.replace(config.optimizer, accumulation_steps=1)
    return with_data(dataclasses.replace(config, optimizer=optimizer), **clips)


def scale_rows(config: SoraConfig, row_length: int) -> SoraConfig:
    """Returns the config with rows of another length, and the other budgets of a row in proportion."""
    data, factor = config.data, row_length / config.data.row_length
    return with_data(
        config,
        row_length=row_length,
        text_length=max(round(data.text_length * factor), data.max_caption_tokens),
        max_segments=max(round(data.max_segments * factor), 1),
    )


def plan_rows(source: Any, captions: CaptionTable, config: SoraConfig, count: int) -> Plan:
    """Plans `count` rows, by turns from the shards that training would read."""
    data = config.data
    shards = [Shard(source, captions, data, config.patch, i, True, data.max_clips) for i in range(data.num_shards)]
    progress = tqdm(range(count), desc=f"planning rows of {data.row_length}", unit="row")
    rows = [shards[i % len(shards)].next_plan() for i in progress]
    dropped = sum(sum(shard.skipped.values()) for shard in shards)
    return Plan(shards[0], source.metadata.captions, rows, dropped, sum(shard.num_reduced for shard in shards))


def compare(
    plan: Plan, captions: CaptionTable, config: SoraConfig, trainer: Trainer, options: PackingOptions
) -> list[dict[str, Any]]:
    """Times all methods on the clips of a plan; returns a row of the table for each."""
    sizes = token_counts(plan.samples, config)
    kernel, dense = kernel_name(config), "xla"
    methods = make_methods(plan, captions, config, trainer.num_devices, options.num_buckets)
    for name, shapes in methods.items():
        for shape in shapes:
            kernels = {kernel} if name == "packed" else {kernel, dense}
            if name != "packed" and shape.row_length <= SHORT_BLOCKS * BLOCK:
                kernels = {dense}
            shape.seconds = {k: [] for k in sorted(kernels)}
    if kernel != dense:
        methods["packed_dense"] = [dataclasses.replace(methods["packed"][0], seconds={dense: []})]
    time_steps([shape for shapes in methods.values() for shape in shapes], plan, captions, config, trainer, options)

    total = int(sizes.sum())
    rates = {name: total / sum(shape.total_seconds() for shape in shapes) for name, shapes in methods.items()}
    return [
        {
            "row_length": config.data.row_length,
            "method": name,
            "attention": " or ".join(sorted({shape.kernel for shape in shapes})),
            "real_token_share": total / sum(len(shape.rows) * shape.row_length for shape in shapes),
            "real_tokens_per_second": rates[name],
            "ratio_to_padded": rates[name] / rates["padded"],
            "num_dropped": plan.num_dropped,
            "num_reduced": plan.num_reduced,
            "num_clips": len(sizes),
            "shapes": [
                {
                    "row_length": shape.row_length,
                    "batch_size": shape.batch_size,
                    "num_rows": len(shape.rows),
                    "attention": shape.kernel,
                    "step_seconds": {k: statistics.median(s) for k, s in shape.seconds.items()},
                }
                for shape in shapes
            ],
        }
        for name, shapes in sorted(methods.items(), key=lambda item: METHODS.index(item[0]))
    ]


METHODS = ("packed", "packed_dense", "padded", "buckets")
SHORT_BLOCKS = 4
"""Rows of one clip and at most this many attention blocks are timed with dense attention alone, to compile less."""


def token_counts(samples: list[Sample], config: SoraConfig) -> np.ndarray:
    """Returns the patches of each sample, int64."""
    return np.array([num_tokens(s.num_frames, s.height, s.width, config.patch.size) for s in samples])


def make_methods(
    plan: Plan, captions: CaptionTable, config: SoraConfig, num_devices: int, num_buckets: int
) -> dict[str, list[Shape]]:
    """Lays the clips of a plan out by each method."""
    data, samples = config.data, plan.samples
    sizes = token_counts(samples, config)
    longest_text = int(captions.lengths(["", *{plan.captions[sample.clip] for sample in samples}]).max())
    slots = data.batch_size * data.row_length

    def one_clip_a_row(members: np.ndarray, row_length: int) -> Shape:
        batch_size = max(round(slots / row_length / num_devices), 1) * num_devices
        rows = [[samples[i]] for i in np.flatnonzero(members)]
        return Shape(rows, row_length, longest_text, 1, batch_size, {})

    bounds = bucket_bounds(sizes, num_buckets)
    bucket = np.searchsorted(bounds, sizes)
    return {
        "packed": [Shape(plan.rows, data.row_length, data.text_length, data.max_segments, data.batch_size, {})],
        "padded": [one_clip_a_row(np.ones(len(sizes), bool), int(sizes.max()))],
        "buckets": [one_clip_a_row(bucket == i, int(bound)) for i, bound in enumerate(bounds)],
    }


def bucket_bounds(sizes: np.ndarray, num_buckets: int) -> np.ndarray:
    """Returns the largest size of each bucket, increasing; fewer than asked for where sizes are few.

    Args:
        sizes: (n,) tokens of the clips.
        num_buckets: with equally many clips each, or equally many tokens each, whichever pads less.
    """
    ordered = np.sort(sizes)
    candidates = []
    for weights in (np.ones(len(ordered)), ordered):
        reached = np.cumsum(weights) / weights.sum()
        places = np.searchsorted(reached, np.arange(1, num_buckets + 1) / num_buckets - 1e-9)
        candidates.append(np.unique(ordered[places]))
    return min(candidates, key=lambda bounds: bounds[np.searchsorted(bounds, sizes)].sum())


def time_steps(
    shapes: list[Shape],
    plan: Plan,
    captions: CaptionTable,
    config: SoraConfig,
    trainer: Trainer,
    options: PackingOptions,
) -> None:
    """Fills in the seconds of each shape's steps, one round of all shapes after another."""
    runs = []
    for shape in shapes:
        batches = draw_batches(shape, plan, captions, config, options)
        for kernel in shape.seconds:
            runs.append((shape, kernel, trainer.step(step_config(shape, kernel, config)), batches))
    with tqdm(total=len(runs) * (options.num_steps + 1), desc="training steps", unit="step") as progress:
        for number in range(options.num_steps + 1):
            for shape, kernel, step, batches in runs:
                seconds = trainer.timed(step, [batches[max(number - 1, 0)]])
                if number:  # the first one compiles
                    shape.seconds[kernel].append(seconds)
                progress.update()


def draw_batches(
    shape: Shape, plan: Plan, captions: CaptionTable, config: SoraConfig, options: PackingOptions
) -> list[PackedBatch]:
    """Decodes `num_steps` batches of a shape, from rows drawn by the seed."""
    rng = np.random.default_rng(options.seed)
    count = options.num_steps * shape.batch_size
    chosen = np.resize(rng.permutation(len(shape.rows)), count)  # again from the start where there are few
    filled = [
        fill_row(
            [plan.shard.segment(sample) for sample in shape.rows[i]],
            row_length=shape.row_length,
            text_length=shape.text_length,
            max_segments=shape.max_segments,
            patch_dim=config.patch.dim,
            text_dim=captions.dim,
        )
        for i in chosen
    ]
    return [stack_rows(filled[i : i + shape.batch_size]) for i in range(0, count, shape.batch_size)]


def step_config(shape: Shape, kernel: str, config: SoraConfig) -> SoraConfig:
    """Returns the config of the training step on rows of a shape."""
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, attention=kernel))
    return with_data(
        config,
        row_length=shape.row_length,
        text_length=shape.text_length,
        max_caption_tokens=min(config.data.max_caption_tokens, shape.text_length),
        max_segments=shape.max_segments,
        batch_size=shape.batch_size,
        num_shards=1,
    )


def report(rows: list[dict[str, Any]], config: SoraConfig, options: PackingOptions) -> dict[str, Any]:
    """Prints the table; returns what goes into the JSON file."""
    table = Table(title=f"{options.config} on {device_name()}, {options.rows:,} planned rows")
    for name in ("row length", "method", "attention", "real-token share", "real tokens/s", "to padded", "dropped"):
        table.add_column(name, justify="left" if name in ("method", "attention") else "right", no_wrap=name == "method")
    for row in rows:
        table.add_row(
            str(row["row_length"]),
            row["method"],
            row["attention"],
            f"{row['real_token_share']:.2%}",
            f"{row['real_tokens_per_second']:,.0f}",
            f"{row['ratio_to_padded']:.2f}",
            str(row["num_dropped"]),
        )
    Console().print(table)
    by_method = {(row["row_length"], row["method"]): row["real_tokens_per_second"] for row in rows}
    for length in options.row_lengths:
        reduced = next(row for row in rows if row["row_length"] == length)
        print(f"rows of {length}: {reduced['num_clips']:,} clips, {reduced['num_reduced']:,} made smaller to fit")
        if (length, "packed_dense") in by_method:
            cost = by_method[length, "packed"] / by_method[length, "packed_dense"]
            print(f"rows of {length}: with dense attention a step takes {cost:.2f} times as long (empty blocks)")
    return {
        "rows": rows,
        "config": options.config,
        "device": device_name(),
        "num_planned_rows": options.rows,
        "num_frames": list(config.data.num_frames),
        "long_side": list(config.data.long_side),
    }
