"""What a run tells: a line of JSON, TensorBoard and a progress line, from the same figures.

Figures are made on the device and fetched once an interval. Rates are over the interval's wall time without that
spent on held-out losses, sample sheets and checkpoints.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
import rich.console
import rich.progress
from etils import epath

from sora_jax.files import write_whole
from sora_jax.training.chips import peak_flops
from sora_jax.training.event_file import EventFile
from sora_jax.training.task import Task

# Of the figures of an interval, those that stand in the progress line, and how.
LINE = {
    "loss": "loss {:.4f}",
    "accuracy": "accuracy {:.1%}",
    "retrieval": "retrieval {:.1%}",
    "grad_norm": "grad {:.3g}",
    "step_seconds": "{:.3g} s/step",
    "real_tokens_per_second": "{:,.0f} tokens/s",
    "real_token_share": "({:.1%} real)",
    "examples_per_second": "{:,.0f} examples/s",
    "wait_share": "waiting {:.1%}",
    "model_flops_per_second": "{:.4g} FLOP/s",
    "mfu": "MFU {:.1%}",
}


class Stopwatch:
    """Wall time of an interval, of which some is set apart."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begins the next interval."""
        self._start, self._apart, self.waited = time.perf_counter(), 0.0, 0.0

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Leaves what happens inside out of the interval."""
        start = time.perf_counter()
        yield
        self._apart += time.perf_counter() - start

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Counts what happens inside as waiting for data."""
        start = time.perf_counter()
        yield
        self.waited += time.perf_counter() - start

    def elapsed(self) -> float:
        """Returns the interval's seconds."""
        return time.perf_counter() - self._start - self._apart


def interval_figures(
    metrics: Sequence[Mapping[str, np.ndarray]],
    seconds: float,
    waited: float,
    task: Task,
    devices: Sequence[jax.Device],
) -> dict[str, float]:
    """Returns the figures of an interval of steps.

    Args:
        metrics: of each step, as `sora_jax.training.step.update` returns them.
        seconds: that the steps took together.
        waited: of these, for data.
        task: what is trained.
        devices: that took part.

    Returns:
        `loss` and `grad_norm` (means over steps), `learning_rate` (of the last), `step_seconds`, `wait_share`, the
        task's `rates` and `scores` and, where these name useful operations and the chip's peak is known, `mfu`.
    """
    count = len(metrics)
    of_update = ("loss", "grad_norm", "learning_rate")
    totals = {name: float(sum(m[name] for m in metrics)) for name in metrics[0] if name not in of_update}
    figures = {
        "loss": float(np.mean([m["loss"] for m in metrics])),
        "grad_norm": float(np.mean([m["grad_norm"] for m in metrics])),
        "learning_rate": float(metrics[-1]["learning_rate"]),
        "step_seconds": seconds / count,
        "wait_share": waited / seconds,
    }
    figures |= task.rates(totals, seconds, count * task.config.optimizer.accumulation_steps) | task.scores(totals)
    if "model_flops_per_second" in figures and (peak := peak_flops(devices)):
        figures["mfu"] = figures["model_flops_per_second"] / (peak * len(devices))
    return figures


class Telemetry:
    """Writes figures to `metrics.jsonl` and TensorBoard and draws the progress line; on the first process alone.

    Lines after `first_step` that an interrupted run has left are dropped, since those steps are made again.

    Args:
        workdir: directory of the run.
        first_step: that the run starts after.
        num_steps: that it ends with.
        console: to draw on.
    """

    def __init__(self, workdir: epath.PathLike, first_step: int, num_steps: int, console: rich.console.Console) -> None:
        self._active = jax.process_index() == 0
        self._console, self._num_steps = console, num_steps
        self._lines: list[str] = []
        if not self._active:
            return
        workdir = epath.Path(workdir)
        self._path = workdir / "metrics.jsonl"
        # Object stores cannot append: there the whole file is written again at each flush.
        self._appends = "://" not in str(self._path)
        if self._path.exists():
            lines = self._path.read_text().splitlines()
            self._lines = [line for line in lines if _step_of(line) <= first_step]
        write_whole(self._path, "".join(line + "\n" for line in self._lines))
        self._board = EventFile(str(workdir / "tensorboard"), first_step + 1)
        self._progress = rich.progress.Progress(
            "{task.description}",
            rich.progress.BarColumn(bar_width=20),
            rich.progress.MofNCompleteColumn(),
            rich.progress.TimeRemainingColumn(),
            "{task.fields[line]}",
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("training", total=num_steps, completed=first_step, line="")
        self._progress.start()

    def advance(self, step: int) -> None:
        """Moves the progress line."""
        if self._active:
            self._progress.update(self._task, completed=step)

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Writes the figures of a step."""
        if not self._active:
            return
        line = json.dumps({"step": step, **figures})
        if not self._appends:
            self._lines.append(line)
        else:
            with self._path.open("a") as file:
                file.write(line + "\n")
        for name, value in figures.items():
            self._board.add_scalar(name, value, step)
        if "loss" in figures:
            text = "  ".join(form.format(figures[name]) for name, form in LINE.items() if name in figures)
            self._progress.update(self._task, completed=step, line=text)
            if not self._console.is_terminal:
                self._print(f"step {step}/{self._num_steps}  {text}")
        else:
            values = "  ".join(f"{name} {value:.4f}" for name, value in figures.items())
            self._print(f"step {step}/{self._num_steps}  {values}")

    def say(self, message: str) -> None:
        """Prints a line above the progress line."""
        if self._active:
            self._print(message)

    def _print(self, message: str) -> None:
        self._console.print(message, highlight=False, markup=False, soft_wrap=True)

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """Writes an (H, W, 3) uint8 image to TensorBoard."""
        if self._active:
            self._board.add_image(name, image, step)

    def flush(self) -> None:
        """Makes sure that all is on disk."""
        if self._active:
            if not self._appends:
                write_whole(self._path, "".join(line + "\n" for line in self._lines))
            self._board.flush()

    def close(self) -> None:
        """Flushes and ends the progress line."""
        if self._active:
            self._progress.stop()
            try:
                self.flush()
            finally:
                self._board.close()


def _step_of(line: str) -> float:
    """Returns the step of a line of metrics; infinite where a killed process left half a line."""
    try:
        record: Any = json.loads(line)
    except json.JSONDecodeError:
        return float("inf")
    return record["step"]
