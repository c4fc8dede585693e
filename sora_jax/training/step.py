"""One update of the parameters, and the held-out loss: pure functions, compiled over the mesh.

The gradient of accumulated batches is that of one large batch: each batch's mean is weighted by what it is over
(`sora_jax.training.task.Loss`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from sora_jax.array_types import Array, Int, PyTree
from sora_jax.parallel import rules
from sora_jax.training import streams
from sora_jax.training.optimizer import ema_update, learning_rate
from sora_jax.training.state import TrainState
from sora_jax.training.task import Loss, Metrics, Task


class TrainStep(Protocol):
    """The compiled `update`; like whatever `jax.jit` returns it can be lowered for shapes alone."""

    def __call__(self, state: TrainState, batches: PyTree, rows: Array, /) -> tuple[TrainState, Metrics]:
        """Returns the next state and the metrics; the state is donated."""

    def lower(self, *args: PyTree) -> jax.stages.Lowered:
        """Returns what is traced of such arguments, ready to be compiled."""


EvalStep = Callable[[PyTree, PyTree, Array, Array], Loss]


def update(
    state: TrainState,
    batches: PyTree,
    rows: Int[Array, "accumulation batch"],
    *,
    task: Task,
    tx: optax.GradientTransformation,
) -> tuple[TrainState, Metrics]:
    """Makes one update.

    Where the loss or the gradient is not finite, `bad_step` is set and everything else but the step's number stays
    as it was, in this update and all later ones.

    Args:
        state: before it.
        batches: leaves (A, B, ...), A batches to accumulate.
        rows: (A, B) int32, number of each row among all of this update; its draws depend on it.
        task: what is trained.
        tx: the optimizer.

    Returns:
        The next state and scalars: `loss`, `grad_norm` (before clipping), `learning_rate` and the task's counts.
    """
    config = task.config
    key = streams.derive(config.seed, state.step, streams.TRAIN)

    def one_batch(batch: PyTree, rows: Array) -> tuple[PyTree, Loss]:
        def total(params: PyTree) -> tuple[Array, Loss]:
            loss = task.loss(params, batch, rows, key, training=True)
            return loss.total, loss

        return jax.grad(total, has_aux=True)(state.params)

    if rows.shape[0] == 1:
        sums = one_batch(jax.tree.map(lambda x: x[0], batches), rows[0])
    else:
        zeros = jax.tree.map(
            lambda s: jnp.zeros(s.shape, s.dtype),
            jax.eval_shape(one_batch, jax.tree.map(lambda x: x[0], batches), rows[0]),
        )
        sums, _ = jax.lax.scan(
            lambda carry, xs: (jax.tree.map(jnp.add, carry, one_batch(*xs)), None), zeros, (batches, rows)
        )
    gradient, (total, weight, counts) = sums
    weight = jnp.maximum(weight, 1)
    loss, grad_norm = total / weight, optax.tree.norm(gradient) / weight

    def updated(params: PyTree, ema_params: PyTree, opt_state: PyTree) -> tuple[PyTree, PyTree, PyTree]:
        changes, opt_state = tx.update(jax.tree.map(lambda g: g / weight, gradient), opt_state, params)
        params = optax.apply_updates(params, changes)
        return params, ema_update(ema_params, params, state.step, config.optimizer.ema_decay), opt_state

    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    good = finite & (state.bad_step < 0)
    # A choice of each array between old and new would have to keep both: on a CPU it takes twice the time.
    params, ema_params, opt_state = jax.lax.cond(
        good, updated, lambda *old: old, state.params, state.ema_params, state.opt_state
    )
    bad_step = jnp.where((state.bad_step < 0) & ~finite, state.step + 1, state.bad_step)
    rate = learning_rate(config.optimizer, config.num_steps)(state.step)
    metrics = {"loss": loss, "grad_norm": grad_norm, "learning_rate": rate, **counts}
    return TrainState(state.step + 1, params, ema_params, opt_state, bad_step), metrics


def make_train_step(task: Task, tx: optax.GradientTransformation, mesh: Mesh, shardings: TrainState) -> TrainStep:
    """Returns the compiled `update` of (state, batches, rows), whose state is donated."""

    def step(state: TrainState, batches: PyTree, rows: Array) -> tuple[TrainState, Metrics]:
        return update(state, batches, rows, task=task, tx=tx)

    split = rules.batch_sharding(mesh, stacked=True)
    return jax.jit(
        step,
        in_shardings=(shardings, split, split),
        out_shardings=(shardings, rules.replicated(mesh)),
        donate_argnums=0,
    )


def make_eval_step(task: Task, mesh: Mesh, params_shardings: PyTree) -> EvalStep:
    """Returns the compiled held-out loss of (params, batch, rows, index).

    Draws depend on the seed, on the batch's number `index` and on the row alone, so two evaluations differ by their
    parameters only.
    """

    def evaluate(params: PyTree, batch: PyTree, rows: Array, index: Array) -> Loss:
        key = streams.derive(task.config.seed, index, streams.EVAL)
        return task.loss(params, batch, rows, key, training=False)

    split, everywhere = rules.batch_sharding(mesh), rules.replicated(mesh)
    return jax.jit(evaluate, in_shardings=(params_shardings, split, split, everywhere), out_shardings=everywhere)
