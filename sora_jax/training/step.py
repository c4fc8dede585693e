"""One update of the parameters, and the held-out loss: pure functions, compiled over the mesh.

For a segment with time t, noise eps and clean patches x_0 (t = 0 is data, t = 1 is noise):

(1)  x_t = (1 - t) x_0 + t eps where a patch is asked for, x_0 where it is known
(2)  loss = mean of (v_theta(x_t, t) - (eps - x_0))^2 over tokens, or over clips (`FlowConfig.loss_weighting`)

The gradient of accumulated batches is that of one large batch: each batch's mean is weighted by the tokens (or
clips) that it is over.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from sora_jax.array_types import Array, Float, Int, PackedBatch, PyTree
from sora_jax.config import ExperimentConfig
from sora_jax.diffusion import flow
from sora_jax.diffusion.losses import flow_loss
from sora_jax.diffusion.schedules import logit_normal_times
from sora_jax.models.sora import SoraTransformer
from sora_jax.parallel import rules
from sora_jax.patches.segments import segment_one_hot
from sora_jax.training import streams
from sora_jax.training.optimizer import ema_update, learning_rate
from sora_jax.training.state import TrainState

Metrics = dict[str, Array]
TrainStep = Callable[[TrainState, PackedBatch, Array], tuple[TrainState, Metrics]]
EvalStep = Callable[[PyTree, PackedBatch, Array, Array], tuple[Array, Array]]


def draw_times(key: jax.Array, rows: Int[Array, " rows"], num_segments: int, config: ExperimentConfig) -> Array:
    """Returns a logit-normal time for each segment of each row, (B, K) float32; `rows` are their global numbers."""
    mean, std = config.flow.time_mean, config.flow.time_std
    draw = jax.vmap(lambda key: logit_normal_times(key, (num_segments,), mean, std))
    return draw(streams.row_keys(key, rows))


def draw_noise(key: jax.Array, rows: Int[Array, " rows"], shape: tuple[int, ...]) -> Array:
    """Returns standard normal noise for each row, (B, *shape) float32; `rows` are their global numbers."""
    return jax.vmap(lambda key: jax.random.normal(key, shape))(streams.row_keys(key, rows))


def weighted_loss(
    params: PyTree,
    model: SoraTransformer,
    batch: PackedBatch,
    times: Float[Array, "batch segments"],
    noise: Float[Array, "batch length values"],
    config: ExperimentConfig,
) -> tuple[Array, Array]:
    """Returns equation 2 times what its mean is over, and that number.

    Args:
        params: of the model.
        model: the network.
        batch: rows of clips.
        times: t of each segment; its known patches have time 0.
        noise: for every patch.
        config: of the experiment.

    Returns:
        (loss * weight, weight), both float32 scalars; the weight counts tokens or clips.
    """
    num_segments = times.shape[1]
    levels = jnp.stack([times, jnp.zeros_like(times)], axis=-1).reshape(len(times), -1)  # (B, 2K)
    t = jnp.take_along_axis(levels, batch.level_ids, axis=1)  # (B, L)
    xt = flow.interpolate(batch.patches, noise, t)
    output = model.apply(
        {"params": params},
        xt,
        batch.positions,
        batch.segment_ids,
        levels,
        batch.level_ids,
        batch.text,
        batch.text_segment_ids,
    )
    loss = flow_loss(output, xt, t, batch.patches, noise, batch.loss_mask, batch.segment_ids, num_segments, config.flow)
    if config.flow.loss_weighting == "token":
        weight = batch.loss_mask.sum()
    else:
        members = segment_one_hot(batch.segment_ids, num_segments) * batch.loss_mask[..., None]
        weight = (members.sum(axis=1) > 0).sum()
    weight = weight.astype(jnp.float32)
    return loss * weight, weight


def count_tokens(batch: PackedBatch, num_segments: int) -> Metrics:
    """Returns what the work of a batch depends on, float32 scalars.

    `real_tokens` and `text_tokens` are not padding; `self_pairs` sums the squares of the segments' lengths and
    `cross_pairs` their lengths times their captions'.
    """
    lengths = segment_one_hot(batch.segment_ids, num_segments).sum(axis=1)  # (B, K)
    captions = segment_one_hot(batch.text_segment_ids, num_segments).sum(axis=1)
    return {
        "real_tokens": lengths.sum(),
        "text_tokens": captions.sum(),
        "clips": (lengths > 0).sum().astype(jnp.float32),
        "self_pairs": jnp.square(lengths).sum(),
        "cross_pairs": (lengths * captions).sum(),
    }


def update(
    state: TrainState,
    batches: PackedBatch,
    rows: Int[Array, "accumulation batch"],
    *,
    model: SoraTransformer,
    tx: optax.GradientTransformation,
    config: ExperimentConfig,
) -> tuple[TrainState, Metrics]:
    """Makes one update.

    Where the loss or the gradient is not finite, `bad_step` is set and everything else but the step's number stays
    as it was, in this update and all later ones.

    Args:
        state: before it.
        batches: leaves (A, B, ...), A batches to accumulate.
        rows: (A, B) int32, number of each row among all of this update; its noise and times depend on it.
        model: the network.
        tx: the optimizer.
        config: of the experiment.

    Returns:
        The next state and scalars: `loss`, `grad_norm` (before clipping), `learning_rate` and `count_tokens`'.
    """
    num_segments = config.data.max_segments
    times_key = streams.derive(config.seed, state.step, streams.TIMES)
    noise_key = streams.derive(config.seed, state.step, streams.NOISE)

    def one_batch(batch: PackedBatch, rows: Array) -> tuple[PyTree, tuple[Array, Array, Metrics]]:
        times = draw_times(times_key, rows, num_segments, config)
        noise = draw_noise(noise_key, rows, batch.patches.shape[1:])
        grad = jax.value_and_grad(weighted_loss, has_aux=True)
        (total, weight), gradient = grad(state.params, model, batch, times, noise, config)
        return gradient, (total, weight, count_tokens(batch, num_segments))

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
    gradient = jax.tree.map(lambda g: g / weight, gradient)
    loss, grad_norm = total / weight, optax.tree.norm(gradient)

    changes, opt_state = tx.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, changes)
    ema_params = ema_update(state.ema_params, params, state.step, config.optimizer.ema_decay)
    finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    good = finite & (state.bad_step < 0)
    params, ema_params, opt_state = jax.tree.map(
        lambda new, old: jnp.where(good, new, old),
        (params, ema_params, opt_state),
        (state.params, state.ema_params, state.opt_state),
    )
    bad_step = jnp.where((state.bad_step < 0) & ~finite, state.step + 1, state.bad_step)
    rate = learning_rate(config.optimizer, config.num_steps)(state.step)
    metrics = {"loss": loss, "grad_norm": grad_norm, "learning_rate": rate, **counts}
    return TrainState(state.step + 1, params, ema_params, opt_state, bad_step), metrics


def make_train_step(
    model: SoraTransformer,
    tx: optax.GradientTransformation,
    config: ExperimentConfig,
    mesh: Mesh,
    shardings: TrainState,
) -> TrainStep:
    """Returns the compiled `update` of (state, batches, rows), whose state is donated."""

    def step(state: TrainState, batches: PackedBatch, rows: Array) -> tuple[TrainState, Metrics]:
        return update(state, batches, rows, model=model, tx=tx, config=config)

    split = rules.batch_sharding(mesh, stacked=True)
    return jax.jit(
        step,
        in_shardings=(shardings, split, split),
        out_shardings=(shardings, rules.replicated(mesh)),
        donate_argnums=0,
    )


def make_eval_step(model: SoraTransformer, config: ExperimentConfig, mesh: Mesh, params_shardings: PyTree) -> EvalStep:
    """Returns the compiled held-out loss of (params, batch, rows, index).

    Times and noise depend on the seed, on the batch's number `index` and on the row alone, so two evaluations differ
    by their parameters only. It returns (loss * weight, weight) like `weighted_loss`.
    """

    def evaluate(params: PyTree, batch: PackedBatch, rows: Array, index: Array) -> tuple[Array, Array]:
        times_key = streams.derive(config.seed, index, streams.EVAL_TIMES)
        noise_key = streams.derive(config.seed, index, streams.EVAL_NOISE)
        times = draw_times(times_key, rows, config.data.max_segments, config)
        noise = draw_noise(noise_key, rows, batch.patches.shape[1:])
        return weighted_loss(params, model, batch, times, noise, config)

    split, everywhere = rules.batch_sharding(mesh), rules.replicated(mesh)
    return jax.jit(
        evaluate, in_shardings=(params_shardings, split, split, everywhere), out_shardings=(everywhere, everywhere)
    )
