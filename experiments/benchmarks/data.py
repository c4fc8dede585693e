"""Whether the data pipeline keeps up with the training step.

The pipeline is first read as fast as it gives batches, then the step runs on batches that lie ready, then both run
together as in training, where the host is at most two steps ahead of the device.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks.training_step import captions_of, device_name, with_data
from sora_jax.array_types import PackedBatch
from sora_jax.commands.train import load_config
from sora_jax.data.captions import CaptionTable
from sora_jax.data.pipeline import PackedPipeline, make_pipeline
from sora_jax.families.sora import SoraConfig
from sora_jax.runs.trainer import Trainer


@dataclasses.dataclass(frozen=True)
class PipelineOptions:
    """What is read; all else is the config's.

    Attributes:
        path: directory of a prepared data set (default: the config's).
        num_workers: processes that decode (default: the config's).
    """

    path: str | None = None
    num_workers: int | None = None


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """Measures the data pipeline beside the training step that it feeds.

    Attributes:
        config: name of a file in sora_jax/configs/ or path of a Python file.
        data: the clips.
        num_steps: timed updates, alone and again with the pipeline; the pipeline alone makes as many batches.
        json: also write the table's figures to this file.
    """

    config: str = "sora_emoji"
    data: PipelineOptions = PipelineOptions()
    num_steps: int = 50
    json: Path | None = None

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"num_steps must be at least 1, got {self.num_steps}.")


class Reader:
    """Reads a pipeline and keeps count of tokens, time and processor time from when it is told to.

    Args:
        pipeline: to read.
    """

    def __init__(self, pipeline: PackedPipeline) -> None:
        self._pipeline = pipeline
        self.restart()

    def restart(self) -> None:
        """Begins to count."""
        self._start, self._cpu_before = time.perf_counter(), self._worker_cpu()
        self.real_tokens, self.tokens, self.waited, self._cpu = 0, 0, 0.0, 0.0

    def read(self, count: int) -> list[PackedBatch]:
        """Returns the next `count` batches."""
        start, cpu = time.perf_counter(), time.thread_time()
        batches = list(itertools.islice(self._pipeline, count))
        self.waited += time.perf_counter() - start
        self._cpu += time.thread_time() - cpu
        self.real_tokens += count_real(batches)
        self.tokens += sum(batch.segment_ids.size for batch in batches)
        return batches

    def figures(self) -> dict[str, float]:
        """Returns tokens a second, their real share, the share of time waited, and processors in use since then."""
        seconds = time.perf_counter() - self._start
        return {
            "real_tokens_per_second": self.real_tokens / seconds,
            "real_token_share": self.real_tokens / self.tokens,
            "wait_share": self.waited / seconds,
            "pipeline_cpus": (self._cpu + self._worker_cpu() - self._cpu_before) / seconds,
        }

    def _worker_cpu(self) -> float:
        """Returns the processor time of the workers, until each had made the last row that was read."""
        return sum(self._pipeline.statistics.worker_cpu_seconds.values())


def run(options: DataOptions) -> dict[str, Any]:
    """Runs the suite, prints its table and returns its figures."""
    config = load_config(options.config, SoraConfig)
    changes = {name: value for name, value in dataclasses.asdict(options.data).items() if value is not None}
    config = with_data(config, **changes)
    with tempfile.TemporaryDirectory() as folder:
        captions = captions_of(config, Path(folder))
        trainer = Trainer(config)
        alone = pipeline_alone(config, captions, options.num_steps)
        step, together = step_alone_and_together(config, captions, trainer, options.num_steps)
    rows = [{"what": "pipeline", **alone}, {"what": "training step", **step}, {"what": "both", **together}]
    return report(rows, config, options)


def pipeline_alone(config: SoraConfig, captions: CaptionTable, count: int) -> dict[str, float]:
    """Measures how fast the pipeline gives batches when nothing else runs."""
    with make_pipeline(config.data, config.patch, captions) as pipeline:
        reader = Reader(pipeline)
        # What the workers made ahead while they were not asked is used up first.
        for _ in tqdm(range(2 * config.data.prefetch + 1), desc="filling the pipeline", unit="batch"):
            reader.read(1)
        reader.restart()
        for _ in tqdm(range(count), desc="pipeline alone", unit="batch"):
            reader.read(1)
        return reader.figures()


def step_alone_and_together(
    config: SoraConfig, captions: CaptionTable, trainer: Trainer, count: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Measures the step on batches that lie ready, and the step fed by the pipeline."""
    accumulation, step = config.optimizer.accumulation_steps, trainer.step(config)
    with make_pipeline(config.data, config.patch, captions) as pipeline:
        ready = [Reader(pipeline).read(accumulation) for _ in range(min(count, READY))]
    trainer.timed(step, ready[0])  # compiles
    turns = itertools.islice(itertools.cycle(ready), count)
    seconds = [trainer.timed(step, batches) for batches in tqdm(turns, "step alone", total=count, unit="step")]
    real = statistics.fmean(count_real(batches) for batches in ready)
    alone = {
        "real_tokens_per_second": real / statistics.median(seconds),
        "real_token_share": real / (accumulation * ready[0][0].segment_ids.size),
        "step_seconds": statistics.median(seconds),
    }

    with make_pipeline(config.data, config.patch, captions) as pipeline:
        reader, pending = Reader(pipeline), []
        trainer.timed(step, reader.read(accumulation))  # starts the workers
        reader.restart()
        for _ in tqdm(range(count), desc="both together", unit="step"):
            pending.append(step(reader.read(accumulation)))
            if len(pending) > 1:  # as far ahead as the training loop is
                jax.block_until_ready(pending[-2]["loss"])
        jax.block_until_ready(pending[-1]["loss"])
        return alone, reader.figures()


READY = 8
"""Updates' worth of batches that the step alone takes in turn."""


def count_real(batches: list[PackedBatch]) -> int:
    """Returns how many tokens are not padding."""
    return sum(int((batch.segment_ids > 0).sum()) for batch in batches)


def report(rows: list[dict[str, Any]], config: SoraConfig, options: DataOptions) -> dict[str, Any]:
    """Prints the table; returns what goes into the JSON file."""
    table = Table(title=f"{options.config} on {device_name()}, {config.data.num_workers} data workers")
    table.add_column("")
    for name in ("real tokens/s", "real-token share", "waiting", "pipeline CPUs"):
        table.add_column(name, justify="right")
    for row in rows:
        waited, cpus = row.get("wait_share"), row.get("pipeline_cpus")
        # Alone, the reader does nothing but wait.
        table.add_row(
            row["what"],
            f"{row['real_tokens_per_second']:,.0f}",
            f"{row['real_token_share']:.2%}",
            f"{waited:.2%}" if row["what"] == "both" else "",
            "" if cpus is None else f"{cpus:.2f}",
        )
    Console().print(table)
    pipeline, step, both = rows
    headroom = pipeline["real_tokens_per_second"] / step["real_tokens_per_second"]
    print(f"alone, the pipeline makes {headroom:.2f} times the tokens that the step consumes")
    return {
        "rows": rows,
        "pipeline_tokens_per_second": pipeline["real_tokens_per_second"],
        "step_tokens_per_second": step["real_tokens_per_second"],
        "headroom": headroom,
        "wait_share": both["wait_share"],
        "pipeline_cpus": both["pipeline_cpus"],
        "num_workers": config.data.num_workers,
        "config": options.config,
        "device": device_name(),
    }
