"""What training changes: parameters, their average, the optimizer's state and the step; and where it all lies."""

from __future__ import annotations

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import optax
from flax.core import meta
from jax.sharding import Mesh

from sora_jax.array_types import Array, Int, PackedBatch, PyTree
from sora_jax.config import ExperimentConfig
from sora_jax.models import sora
from sora_jax.models.attention import AttentionFn
from sora_jax.models.sora import SoraTransformer
from sora_jax.parallel import rules
from sora_jax.training import streams


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


def build_model(config: ExperimentConfig, attention_fn: AttentionFn | None = None) -> SoraTransformer:
    """Returns the network of an experiment; `attention_fn` replaces the kernel that `config.model` names."""
    return SoraTransformer(config.model, config.patch.dim, attention_fn)


def abstract_batch(config: ExperimentConfig, num_rows: int | None = None) -> PackedBatch:
    """Returns the shapes and dtypes of a batch (of `num_rows` rows instead of the configured ones)."""
    data, shape = config.data, jax.ShapeDtypeStruct
    rows = data.batch_size if num_rows is None else num_rows
    return PackedBatch(
        patches=shape((rows, data.row_length, config.patch.dim), jnp.float32),
        positions=shape((rows, data.row_length, 3), jnp.float32),
        segment_ids=shape((rows, data.row_length), jnp.int32),
        level_ids=shape((rows, data.row_length), jnp.int32),
        loss_mask=shape((rows, data.row_length), jnp.bool_),
        text=shape((rows, data.text_length, config.model.text_dim), jnp.float32),
        text_segment_ids=shape((rows, data.text_length), jnp.int32),
        clip_ids=shape((rows, data.max_segments), jnp.int32),
    )


def init_params(model: SoraTransformer, config: ExperimentConfig) -> PyTree:
    """Returns freshly drawn parameters, boxed with their logical axes; under `jax.eval_shape`, their shapes."""
    return sora.init_params(model, streams.derive(config.seed, 0, streams.INIT))


def unboxed_params(model: SoraTransformer, config: ExperimentConfig) -> PyTree:
    """Returns freshly drawn parameters as plain arrays."""
    return meta.unbox(init_params(model, config))


def abstract_params(config: ExperimentConfig) -> PyTree:
    """Returns the shapes of an experiment's parameters as plain leaves, without allocating any."""
    model = build_model(dataclasses.replace(config, model=dataclasses.replace(config.model, attention="xla")))
    return jax.eval_shape(lambda: unboxed_params(model, config))


def state_shardings(
    model: SoraTransformer, tx: optax.GradientTransformation, config: ExperimentConfig, mesh: Mesh
) -> TrainState:
    """Returns the `NamedSharding` of every array of the state; raises like `rules.param_shardings`."""
    boxed = jax.eval_shape(lambda: init_params(model, config))
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


def init_state(
    model: SoraTransformer, tx: optax.GradientTransformation, config: ExperimentConfig, shardings: TrainState
) -> TrainState:
    """Draws the parameters and returns the state before the first update, each device holding its share."""
    return jax.jit(lambda: fresh_state(unboxed_params(model, config), tx), out_shardings=shardings)()


def state_from_params(params: PyTree, tx: optax.GradientTransformation, shardings: TrainState) -> TrainState:
    """Returns the state before the first update of a run that starts from given parameters (fine-tuning)."""
    params = jax.tree.map(jax.device_put, params, shardings.params)
    return jax.jit(lambda params: fresh_state(params, tx), out_shardings=shardings)(params)


def abstract_state(
    model: SoraTransformer, tx: optax.GradientTransformation, config: ExperimentConfig, shardings: TrainState
) -> TrainState:
    """Returns the shapes, dtypes and shardings of the state, without allocating it."""
    shapes = jax.eval_shape(lambda: fresh_state(unboxed_params(model, config), tx))
    return jax.tree.map(lambda s, p: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=p), shapes, shardings)
