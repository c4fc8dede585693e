"""What a training step of an experiment costs, without allocating anything."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax

from sora_jax.config import ExperimentConfig
from sora_jax.families.registry import make_task
from sora_jax.parallel.mesh import MESH_AXES, check_batch_size, mesh_shape
from sora_jax.parallel.rules import param_shardings
from sora_jax.training.flops import step_flops
from sora_jax.training.state import init_params


def step_costs(config: ExperimentConfig) -> dict[str, Any]:
    """Returns the figures of one training step, a config that cannot work raising what it would when it is run.

    Returns:
        `num_params`; `tokens_per_step` (slots of rows) or, of what has no rows, `examples_per_step`; `flops_per_step`
        with dense attention and, where blocks are computed again, `flops_per_step_without_remat`; `mesh`, the smallest
        of these sizes where it is planned for another machine; and the task's own `figures`.

    Raises:
        ValueError: parameters that the mesh cannot split, or a batch.
    """
    try:
        mesh = mesh_shape(config.mesh, jax.device_count())
    except ValueError:  # planned for another machine: the smallest mesh with these sizes
        mesh = {axis: max(getattr(config.mesh, axis), 1) for axis in MESH_AXES}
    check_batch_size(config.data.batch_size, mesh)
    task = make_task(config)
    boxed = jax.eval_shape(lambda: init_params(task))
    param_shardings(boxed, jax.sharding.AbstractMesh(tuple(mesh.values()), tuple(mesh)))
    rows = config.optimizer.accumulation_steps * config.data.batch_size
    length = getattr(config.data, "row_length", None)
    figures = {
        "num_params": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(boxed)),
        **({"examples_per_step": rows} if length is None else {"tokens_per_step": rows * length}),
        "flops_per_step": step_flops(task),
        "mesh": mesh,
        **task.figures(),
    }
    if getattr(config.model, "remat", "none") != "none":
        figures["flops_per_step_without_remat"] = step_flops(make_task(with_model(config, remat="none")))
    return figures


def with_model(config: Any, **changes: Any) -> Any:
    """Returns a config with other values of its model, of those that the model has."""
    there = {name: value for name, value in changes.items() if hasattr(config.model, name)}
    return dataclasses.replace(config, model=dataclasses.replace(config.model, **there)) if there else config
