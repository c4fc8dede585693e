"""What training changes: parameters, their average, the optimizer's state and the step; and where it all lies."""

from __future__ import annotations

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax.core import meta
from jax.sharding import Mesh

from sora_jax.array_types import Array, Int, PyTree
from sora_jax.parallel import rules
from sora_jax.training import streams
from sora_jax.training.task import Task


@flax.struct.dataclass
class TrainState:
    """The state of a run.

    Attributes:
        step: () int32, updates made.
        params: parameters, float32.
        ema_params: their running average.
        opt_state: of the optimizer.
        bad_step: () int32, the first update whose loss or gradient was not finite, -1 while there is none. From then
            on all else stays as it was, so that the host may look at it late.
    """

    step: Int[Array, ""]
    params: PyTree
    ema_params: PyTree
    opt_state: PyTree
    bad_step: Int[Array, ""]


def abstract_batches(task: Task) -> tuple[PyTree, jax.ShapeDtypeStruct]:
    """Returns the shapes and dtypes of what an update takes: stacked batches (A, B, ...) and row numbers (A, B)."""
    accumulation = task.config.optimizer.accumulation_steps
    batches = jax.tree.map(lambda s: jax.ShapeDtypeStruct((accumulation, *s.shape), s.dtype), task.abstract_batch())
    return batches, jax.ShapeDtypeStruct((accumulation, task.config.data.batch_size), jnp.int32)


def init_params(task: Task) -> PyTree:
    """Returns freshly drawn parameters, boxed with their logical axes; under `jax.eval_shape`, their shapes."""
    return task.init_params(streams.derive(task.config.seed, 0, streams.INIT))


def unboxed_params(task: Task) -> PyTree:
    """Returns freshly drawn parameters as plain arrays."""
    return meta.unbox(init_params(task))


def abstract_params(task: Task) -> PyTree:
    """Returns the shapes of the parameters as plain leaves, without allocating any."""
    return jax.eval_shape(lambda: unboxed_params(task))


def state_shardings(task: Task, tx: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Returns the `NamedSharding` of every array of the state; raises like `rules.param_shardings`."""
    boxed = jax.eval_shape(lambda: init_params(task))
    params = rules.param_shardings(boxed, mesh)
    everywhere = rules.replicated(mesh)
    opt_state = optax.tree_utils.tree_map_params(
        tx,
        lambda _, sharding: sharding,
        jax.eval_shape(tx.init, meta.unbox(boxed)),
        params,
        transform_non_params=lambda _: everywhere,
    )
    return TrainState(everywhere, params, params, opt_state, everywhere)


def fresh_state(params: PyTree, tx: optax.GradientTransformation) -> TrainState:
    """Returns the state before the first update."""
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        ema_params=jax.tree.map(jnp.copy, params),
        opt_state=tx.init(params),
        bad_step=jnp.full((), -1, jnp.int32),
    )


def init_state(task: Task, tx: optax.GradientTransformation, shardings: TrainState) -> TrainState:
    """Draws the parameters and returns the state before the first update, each device holding its share."""
    return jax.jit(lambda: fresh_state(unboxed_params(task), tx), out_shardings=shardings)()


def state_from_params(params: PyTree, tx: optax.GradientTransformation, shardings: TrainState) -> TrainState:
    """Returns the state before the first update of a run that starts from given parameters (fine-tuning)."""
    params = jax.tree.map(jax.device_put, params, shardings.params)
    return jax.jit(lambda params: fresh_state(params, tx), out_shardings=shardings)(params)


def abstract_state(task: Task, tx: optax.GradientTransformation, shardings: TrainState) -> TrainState:
    """Returns the shapes, dtypes and shardings of the state, without allocating it."""
    shapes = jax.eval_shape(lambda: fresh_state(unboxed_params(task), tx))
    return jax.tree.map(lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shapes, shardings)
