"""The training step of an experiment on packed rows, with fresh parameters, outside the training loop."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import jax
import numpy as np

from sora_jax.array_types import Array, PackedBatch
from sora_jax.config import ExperimentConfig
from sora_jax.families.registry import task_for
from sora_jax.parallel import rules
from sora_jax.parallel.mesh import check_batch_size, make_mesh
from sora_jax.parallel.multihost import to_global
from sora_jax.training.loop import global_rows
from sora_jax.training.optimizer import make_optimizer
from sora_jax.training.state import init_state, state_shardings
from sora_jax.training.step import make_train_step

Metrics = dict[str, Array]
Step = Callable[[Sequence[PackedBatch]], Metrics]


class Trainer:
    """A state, and the steps of several configs on it that differ in their rows and in their attention kernel.

    Args:
        config: of the experiment, on packed rows; gives the model, the optimizer and the mesh.

    Attributes:
        num_devices: that a batch is split over.
    """

    def __init__(self, config: ExperimentConfig) -> None:
        self._mesh = make_mesh(config.mesh)
        self._tx = make_optimizer(config.optimizer, config.num_steps)
        task = task_for(config)(self._mesh)
        self._shardings = state_shardings(task, self._tx, self._mesh)
        self._state = init_state(task, self._tx, self._shardings)
        self.num_devices = self._mesh.size

    def step(self, config: ExperimentConfig) -> Step:
        """Returns the update of `config`, made by `sora_jax.training.step.make_train_step`.

        Args:
            config: like the trainer's but for rows, attention kernel and accumulation.

        Returns:
            A function of the batches that are accumulated into one update. Like the training loop, it moves them onto
            the device and does not wait for the update; `timed` does.
        """
        check_batch_size(config.data.batch_size, dict(self._mesh.shape))
        task = task_for(config)(self._mesh)
        train_step = make_train_step(task, self._tx, self._mesh, self._shardings)
        split = rules.batch_sharding(self._mesh, stacked=True)
        rows = global_rows(config, config.optimizer.accumulation_steps, split)

        def run(batches: Sequence[PackedBatch]) -> Metrics:
            stacked = PackedBatch(*(np.stack(leaves) for leaves in zip(*batches, strict=True)))
            self._state, metrics = train_step(self._state, to_global(stacked, split), rows)
            return metrics

        return run

    def timed(self, step: Step, batches: Sequence[PackedBatch]) -> float:
        """Returns the seconds that a step takes to its end; the first one of a `step` also compiles it."""
        jax.block_until_ready(self._state)
        start = time.perf_counter()
        step(batches)
        jax.block_until_ready(self._state)
        return time.perf_counter() - start
