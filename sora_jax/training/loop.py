"""The training loop, from the config to the finished run.

`train(2N)` equals `train(N)`, an interruption at any moment, and `train(N)` again, bitwise: noise and times are
derived from (seed, step, row), and a checkpoint holds the data iterator as it was after the last batch of its step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import itertools
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
import numpy as np
import rich.console
from etils import epath
from jax.sharding import Mesh, NamedSharding
from PIL import Image

from sora_jax.array_types import PyTree
from sora_jax.components import UNKNOWN, Components
from sora_jax.config import ExperimentConfig
from sora_jax.models.weights import WEIGHTS_FILE, check_shapes
from sora_jax.parallel import rules
from sora_jax.parallel.mesh import check_batch_size, make_mesh
from sora_jax.parallel.multihost import PreemptionGuard, gather_json, to_global, to_local
from sora_jax.training import checkpoint_folder, run_directory
from sora_jax.training.checkpoint import Checkpointer, latest_step
from sora_jax.training.optimizer import make_optimizer
from sora_jax.training.state import (
    TrainState,
    abstract_params,
    abstract_state,
    init_state,
    state_from_params,
    state_shardings,
)
from sora_jax.training.step import EvalStep, make_eval_step, make_train_step
from sora_jax.training.task import Task
from sora_jax.training.telemetry import Stopwatch, Telemetry, interval_figures


class Batches(Protocol):
    """An iterator over the rows of this host, (B / hosts, ...) NumPy arrays, whose place can be saved."""

    def __iter__(self) -> Iterator[PyTree]: ...
    def __next__(self) -> PyTree: ...
    def get_state(self) -> dict[str, Any]:
        """Returns the place after the last batch given, JSON-able, by parts that no other host has."""

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a place, which may hold the parts of other hosts too."""

    def summary(self) -> str:
        """Returns what was given so far, and what was left out and why, in a line."""

    def close(self) -> None:
        """Ends its processes."""


OpenBatches = Callable[[str, bool], Batches]  # (split, whether it is trained on: endless, and with caption dropout)
SampleSheet = Callable[[PyTree], np.ndarray]  # EMA params -> (H, W, 3) uint8


class Outcome(enum.Enum):
    """How a call of `train` ended."""

    FINISHED = "finished"
    PREEMPTED = "preempted"
    ALREADY_FINISHED = "already finished"


class NonFiniteLossError(FloatingPointError):
    """The loss or the gradient was not finite."""


@dataclasses.dataclass
class _Run:
    """What the parts of the loop share."""

    task: Task
    config: ExperimentConfig
    workdir: epath.Path
    checkpointer: Checkpointer
    telemetry: Telemetry
    batches: Batches
    ahead: list[PyTree]  # read from them and not used yet: the first of a new run
    guard: PreemptionGuard
    best_loss: float

    def next_batch(self) -> PyTree:
        """Returns the next batch to train on."""
        return self.ahead.pop() if self.ahead else _next_batch(self.batches, self.config.data.split)

    def save(self, step: int, state: TrainState, held_out_loss: float | None = None) -> None:
        """Saves a state that is known to be good, with the place in the data after its last batch."""
        self.require_finite(state)
        places = {part: place for host in gather_json(self.batches.get_state()) for part, place in host.items()}
        self.checkpointer.save(step, state, places, held_out_loss)
        self.telemetry.flush()

    def check(self, state: TrainState) -> None:
        """Raises what has gone wrong so far: an update that was bad, or a checkpoint that could not be written."""
        self.require_finite(state)
        self.checkpointer.check()

    def require_finite(self, state: TrainState) -> None:
        """Raises NonFiniteLossError where an update so far was bad; the last good checkpoint stays."""
        bad = int(jax.device_get(state.bad_step))
        if bad >= 0:
            self.checkpointer.wait()
            kept = self.checkpointer.latest_step
            where = "there is no checkpoint yet" if kept is None else f"the last good checkpoint is step {kept}"
            raise NonFiniteLossError(f"loss or gradient is not finite at step {bad}; {where} in {self.workdir}.")


def train(
    config: ExperimentConfig,
    workdir: epath.PathLike,
    open_batches: OpenBatches,
    task_for: Callable[[Mesh], Task],
    *,
    data_fingerprints: Callable[[], dict[str, str]] | None = None,
    components: Components = UNKNOWN,
    init_from: Callable[[Mesh], PyTree] | None = None,
    sample_sheet: SampleSheet | None = None,
    console: rich.console.Console | None = None,
) -> Outcome:
    """Trains a model, or goes on where an earlier call in the same directory stopped.

    Args:
        config: of the experiment.
        workdir: of the run (see `sora_jax.training.run_directory`).
        open_batches: opens a split.
        task_for: makes what is trained for the mesh, which an attention kernel may need.
        data_fingerprints: digests by which the run knows its data again (`sora_jax.data.identity`), by split; without
            it, by the text of `data.path`.
        components: that the model is trained with, which stand in `config.json`.
        init_from: returns the parameters that a new run starts from, on the mesh or on the host; an old run goes on
            from its own checkpoint.
        sample_sheet: draws a sample sheet of the averaged parameters.
        console: for progress.

    Returns:
        How it ended. After a preemption the same call continues exactly.

    Raises:
        ConfigChangedError: the directory holds a run with another config.
        ComponentChangedError: the directory holds a run with another text encoder, codec or process.
        DataChangedError: the directory holds a run on other data.
        NonFiniteLossError: a loss or a gradient was not finite, naming the step; the last good checkpoint stays.
        OSError: what the run writes cannot be written, naming the last whole checkpoint.
        ValueError: a config that cannot work, an exported model at `workdir`, a damaged checkpoint, parameters of
            another model, or a split without batches. What fails up to the first batch leaves no new directory behind.
    """
    workdir = epath.Path(workdir)
    console = console or rich.console.Console(stderr=True)
    if (workdir / WEIGHTS_FILE).exists():
        raise ValueError(f"{workdir} holds an exported model, which a run would spoil: choose another --workdir.")
    first_step = latest_step(workdir)
    if first_step is not None:
        run_directory.check_config(workdir, config, first_step, path_may_change=data_fingerprints is not None)
        run_directory.check_components(workdir, components)
    fingerprints, notes = _check_data(config, workdir, first_step, data_fingerprints)
    for note in notes:
        console.print(note, highlight=False, markup=False, soft_wrap=True)
    done = run_directory.done_step(workdir)
    # Where the last checkpoint was removed, the run goes on from what is left.
    if done is not None and first_step is not None and config.num_steps <= min(done, first_step):
        if notes:
            try:
                run_directory.write_moved(workdir, config, fingerprints)
            except OSError as error:  # a finished run may lie where nothing is written any more
                console.print(
                    f"{workdir} does not record it: {error.strerror or error}", highlight=False, soft_wrap=True
                )
        return Outcome.ALREADY_FINISHED

    saved = {*range(config.save_every, config.num_steps, config.save_every), config.num_steps}
    checkpoint_folder.check_places(workdir, {step for step in saved if step > (first_step or 0)})
    mesh = make_mesh(config.mesh)
    check_batch_size(config.data.batch_size, dict(mesh.shape))
    task = task_for(mesh)
    tx = make_optimizer(config.optimizer, config.num_steps)
    shardings = state_shardings(task, tx, mesh)
    start = _initial_params(task, init_from, mesh) if first_step is None else None

    with contextlib.ExitStack() as stack:
        stack.enter_context(checkpoint_folder.naming_what_is_kept(workdir))
        guard = stack.enter_context(PreemptionGuard())
        batches = stack.enter_context(contextlib.closing(open_batches(config.data.split, True)))
        # A new run whose data gives no batch writes nothing. No state is saved before this batch has been used.
        ahead = [_next_batch(batches, config.data.split)] if first_step is None else []
        workdir.mkdir(parents=True, exist_ok=True)
        evaluates = bool(config.eval_every and config.data.eval_splits)
        checkpointer = stack.enter_context(contextlib.closing(Checkpointer(workdir, config.keep, evaluates)))
        if first_step is not None:
            state, places = checkpointer.restore(abstract_state(task, tx, shardings), first_step)
            batches.set_state(places)
        elif start is not None:
            state = state_from_params(start, tx, shardings)
        else:
            state = init_state(task, tx, shardings)
        if jax.process_index() == 0:
            run_directory.write_config(workdir, config, components)
            run_directory.write_data(workdir, fingerprints)
            (workdir / "DONE").unlink(missing_ok=True)
        telemetry = stack.enter_context(
            contextlib.closing(Telemetry(workdir, first_step or 0, config.num_steps, console))
        )
        size = sum(leaf.size for leaf in jax.tree.leaves(state.params))
        telemetry.say(
            f"{'starting' if first_step is None else 'continuing'} at step {first_step or 0} of {config.num_steps}: "
            f"{size:,} parameters, mesh {dict(mesh.shape)}, {workdir}"
        )
        for path in checkpoint_folder.strangers(workdir):
            telemetry.say(f"{path} is no checkpoint of this run; it is left alone")
        run = _Run(task, config, workdir, checkpointer, telemetry, batches, ahead, guard, checkpointer.best_loss)
        train_step = make_train_step(task, tx, mesh, shardings)
        held_out = HeldOut(task, open_batches, mesh, make_eval_step(task, mesh, shardings.params))
        return _steps(run, state, first_step or 0, train_step, held_out, sample_sheet, mesh)


def _steps(
    run: _Run,
    state: TrainState,
    first_step: int,
    train_step: Callable[..., Any],
    held_out: HeldOut,
    sample_sheet: SampleSheet | None,
    mesh: Mesh,
) -> Outcome:
    """Makes the updates from `first_step` to the last."""
    config, telemetry = run.config, run.telemetry
    accumulation = config.optimizer.accumulation_steps
    split = rules.batch_sharding(mesh, stacked=True)
    rows = global_rows(config, accumulation, split)
    stopwatch, pending = Stopwatch(), []
    for step in range(first_step + 1, config.num_steps + 1):
        with stopwatch.waiting():
            local = [run.next_batch() for _ in range(accumulation)]
        stacked = to_global(jax.tree.map(lambda *leaves: np.stack(leaves), *local), split)
        with jax.transfer_guard("disallow"):
            state, metrics = train_step(state, stacked, rows)
        pending.append(metrics)
        if len(pending) > 1:  # the host stays at most two steps ahead of the devices
            jax.block_until_ready(pending[-2]["loss"])
        telemetry.advance(step)

        if step % config.log_every == 0 or step == config.num_steps:
            fetched = jax.device_get(pending)
            run.check(state)
            figures = interval_figures(
                fetched, stopwatch.elapsed(), stopwatch.waited, run.task, list(mesh.devices.flat)
            )
            telemetry.write(step, figures)
            pending = []
            stopwatch.restart()
        stop = run.guard.reached(step)
        last = step == config.num_steps
        with stopwatch.apart():
            loss: float | None = None
            if config.eval_every and (step % config.eval_every == 0 or last) and not stop:
                scores = held_out.scores(state.ema_params)
                if scores:
                    loss = float(np.mean([score["loss"] for score in scores.values()]))
                    names = {f"held_out_{name}/{split}": (split, name) for split in scores for name in scores[split]}
                    telemetry.write(step, {key: scores[split][name] for key, (split, name) in names.items()})
            best_loss = run.best_loss if loss is None else min(run.best_loss, loss)
            best = best_loss < run.best_loss
            if step % config.save_every == 0 or last or stop or best:
                run.save(step, state, loss)
            run.best_loss = best_loss
            if sample_sheet and config.sample_every and (step % config.sample_every == 0 or last) and not stop:
                _sample(run, step, state, sample_sheet)
        if stop and not last:
            run.checkpointer.wait()
            telemetry.say(f"data since step {first_step}: {run.batches.summary()}")
            telemetry.say(f"preempted at step {step} of {config.num_steps}: saved; start again to continue")
            return Outcome.PREEMPTED
    run.checkpointer.wait()
    if jax.process_index() == 0:
        run_directory.mark_done(run.workdir, config.num_steps)
    telemetry.say(f"data since step {first_step}: {run.batches.summary()}")
    telemetry.say(f"finished at step {config.num_steps}: {run.workdir}")
    return Outcome.FINISHED


def _sample(run: _Run, step: int, state: TrainState, sample_sheet: SampleSheet) -> None:
    """Draws a sample sheet, on the first process alone, and writes it to `samples/` and TensorBoard."""
    params = to_local(state.ema_params)
    if jax.process_index() > 0:
        return
    try:
        sheet = sample_sheet(params)
    except FloatingPointError as error:  # of the sampler; training has a guard of its own
        run.telemetry.say(f"no sample sheet at step {step}: {error}")
        return
    folder = run.workdir / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / f"{step:08d}.png").open("wb") as file:
        Image.fromarray(sheet).save(file, format="PNG")
    run.telemetry.image(step, "samples", sheet)


class HeldOut:
    """The loss of held-out splits, on the same batches, times and noise each time.

    The batches are read at the first evaluation and kept in the host's memory.

    Args:
        task: that is trained.
        open_batches: opens a split.
        mesh: of the run.
        eval_step: of `make_eval_step`.
    """

    def __init__(self, task: Task, open_batches: OpenBatches, mesh: Mesh, eval_step: EvalStep) -> None:
        self._task, self._config = task, task.config
        self._open, self._eval_step = open_batches, eval_step
        self._split = rules.batch_sharding(mesh)
        self._everywhere = rules.replicated(mesh)
        self._rows = global_rows(self._config, None, self._split)
        self._batches: dict[str, list[PyTree]] = {}

    def scores(self, params: PyTree) -> dict[str, dict[str, float]]:
        """Returns each split's `loss`, the mean over all of its batches, and the task's scores."""
        result = {}
        for split in self._config.data.eval_splits:
            if split not in self._batches:
                self._batches[split] = self._read(split)
            losses = [
                self._eval_step(
                    params,
                    to_global(batch, self._split),
                    self._rows,
                    jax.device_put(np.int32(index), self._everywhere),
                )
                for index, batch in enumerate(self._batches[split])
            ]
            losses = jax.device_get(losses)
            total, weight = (float(sum(getattr(loss, name) for loss in losses)) for name in ("total", "weight"))
            counts = {name: float(sum(loss.counts[name] for loss in losses)) for name in losses[0].counts}
            result[split] = {"loss": total / max(weight, 1), **self._task.scores(counts)}
        return result

    def _read(self, split: str) -> list[PyTree]:
        """Returns at most `eval_batches` batches, as many on every host."""
        with contextlib.closing(self._open(split, False)) as batches:
            found = list(itertools.islice(batches, self._config.eval_batches))
        found = found[: min(gather_json(len(found)))]
        if not found:
            raise ValueError(
                f"split {split!r} of data.eval_splits has no batch of {self._config.data.batch_size} rows."
            )
        return found


def global_rows(config: ExperimentConfig, accumulation: int | None, sharding: NamedSharding) -> jax.Array:
    """Returns the number of each row among those of an update, (A, B) int32 (or (B,) where A is None).

    A host's rows are a run of each batch, wherever on the mesh its devices stand.
    """
    batches, hosts = accumulation or 1, jax.process_count()
    rows = np.arange(batches * config.data.batch_size, dtype=np.int32).reshape(batches, hosts, -1)
    local = rows[:, jax.process_index()]
    return to_global(local if accumulation else local[0], sharding)


def _check_data(
    config: ExperimentConfig,
    workdir: epath.Path,
    first_step: int | None,
    data_fingerprints: Callable[[], dict[str, str]] | None,
) -> tuple[dict[str, str], list[str]]:
    """Returns what a run records of its data, and what there is to say of it; the same on all hosts.

    Raises:
        DataChangedError: it is not the run's data.
        ValueError: the hosts do not read the same data.
    """
    if data_fingerprints is None:
        return {}, []
    recorded = run_directory.read_data(workdir) if first_step is not None else {}
    of_hosts = gather_json([recorded, data_fingerprints()])
    recorded, found = of_hosts[0]
    for process, (_, other) in enumerate(of_hosts):
        if other != found:
            place = run_directory.place_of(config.data)
            raise ValueError(
                f"data.path {place!r} holds other data on host {process} ({other}) than on host 0 ({found})."
            )
    notes = run_directory.check_data(workdir, config, recorded, found) if first_step is not None else []
    return {**recorded, **found}, notes if jax.process_index() == 0 else []


def _next_batch(batches: Batches, split: str) -> PyTree:
    """Returns the next batch; ValueError where the split has ended, which a training split never does."""
    try:
        return next(batches)
    except StopIteration:
        raise ValueError(f"split {split!r} gave no more batches; is it empty?") from None


def _initial_params(task: Task, init_from: Callable[[Mesh], PyTree] | None, mesh: Mesh) -> PyTree | None:
    """Returns the parameters to start from, None for fresh ones."""
    if init_from is None:
        return None
    params = init_from(mesh)
    check_shapes(params, abstract_params(task), "what init_from gives")
    return params
