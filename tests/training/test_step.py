import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from sora_jax.array_types import PackedBatch
from sora_jax.families.sora import SoraTask, count_tokens, draw_noise, weighted_loss
from sora_jax.training import state as states
from sora_jax.training import streams
from sora_jax.training.optimizer import make_optimizer
from sora_jax.training.step import update


class ZeroModel:
    """Predicts velocity zero, so that the error is the target's."""

    def apply(self, variables, patches, *_):
        return jnp.zeros_like(patches)


@pytest.fixture(scope="module")
def tiny():
    config = tiny_run.CONFIG
    task, tx = SoraTask(config), make_optimizer(config.optimizer, config.num_steps)
    params = states.unboxed_params(task)
    # At an adaLN-Zero initialisation most gradients are zero.
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(0)
    params = tree.unflatten([leaf + 0.1 * rng.standard_normal(leaf.shape).astype(np.float32) for leaf in leaves])
    step = jax.jit(functools.partial(update, task=task, tx=tx))
    return step, states.fresh_state(params, tx)


def stack(batches):
    return PackedBatch(*(np.stack(leaves) for leaves in zip(*batches, strict=True)))


def concatenate(batches):
    return PackedBatch(*(np.concatenate(leaves) for leaves in zip(*batches, strict=True)))


@pytest.mark.parametrize(("weighting", "loss", "weight"), [("token", 1.75, 4), ("clip", 2.5, 2)])
def test_weighting_by_token_or_by_clip(weighting, loss, weight):
    """Clip 1 has three tokens of error 1, clip 2 one of error 4, and the padding one of error 100."""
    config = tiny_run.config(flow={"loss_weighting": weighting})
    batch = PackedBatch(
        patches=np.zeros((1, 5, 4), np.float32),
        positions=np.zeros((1, 5, 3), np.float32),
        segment_ids=np.array([[1, 1, 1, 2, 0]]),
        level_ids=np.array([[0, 0, 0, 2, 0]]),
        loss_mask=np.array([[True, True, True, True, False]]),
        text=np.zeros((1, 2, 8), np.float32),
        text_segment_ids=np.array([[1, 2]]),
        clip_ids=np.array([[0, 1, -1]]),
        labels=np.full((1, 3), -1),
        extents=np.ones((1, 3, 3), np.float32),
    )
    noise = np.array([1, 1, 1, 2, 10], np.float32)[None, :, None] * np.ones((1, 5, 4), np.float32)
    times = np.full((1, 3), 0.5, np.float32)
    total, counted = weighted_loss({}, ZeroModel(), batch, times, noise, config)
    np.testing.assert_allclose(counted, weight)
    np.testing.assert_allclose(total / counted, loss)


def test_known_patches_are_clean_and_others_have_their_segments_time():
    seen = {}

    class Spy(ZeroModel):
        def apply(self, variables, patches, positions, segment_ids, levels, *_):
            seen.update(patches=patches, levels=levels)
            return jnp.zeros_like(patches)

    batch = tiny_run.random_batch(0)._replace(patches=np.zeros((8, 12, 4), np.float32))
    batch.segment_ids[0, :3], batch.level_ids[0, :3] = [1, 1, 2], [0, 1, 2]  # token 1 is known
    times = np.tile(np.array([0.25, 0.5, 0.75], np.float32), (8, 1))
    weighted_loss({}, Spy(), batch, times, np.ones((8, 12, 4), np.float32), tiny_run.CONFIG)
    np.testing.assert_array_equal(seen["levels"][0], [0.25, 0, 0.5, 0, 0.75, 0])
    np.testing.assert_array_equal(seen["patches"][0, :3, 0], [0.25, 0, 0.5])  # (1 - t) 0 + t 1


def test_accumulation_equals_one_big_batch(tiny):
    step, state = tiny
    batches = [tiny_run.random_batch(i) for i in range(2)]
    batches[1].loss_mask[:, 4:] = False  # so that a mean of means would be wrong
    rows = np.arange(16, dtype=np.int32)
    one, one_metrics = step(state, stack([concatenate(batches)]), rows[None])
    two, two_metrics = step(state, stack(batches), rows.reshape(2, 8))
    for name in one_metrics:
        np.testing.assert_allclose(one_metrics[name], two_metrics[name], rtol=2e-5, err_msg=name)
    # Adam divides by the size of the gradient, which would blow up rounding: compare its first moments.
    first, second = one.opt_state[1][0].mu, two.opt_state[1][0].mu
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-6), first, second)


def test_non_finite_loss_freezes_the_state_and_names_the_step(tiny):
    step, state = tiny
    rows = np.arange(8, dtype=np.int32)[None]
    good, _ = step(state, stack([tiny_run.random_batch(0)]), rows)
    bad_batch = tiny_run.random_batch(1)
    bad_batch.patches[0, 0, 0] = np.inf
    bad, metrics = step(good, stack([bad_batch]), rows)
    assert not np.isfinite(metrics["loss"])
    after, _ = step(bad, stack([tiny_run.random_batch(2)]), rows)
    assert int(good.bad_step) == -1
    assert int(bad.bad_step) == int(after.bad_step) == 2
    assert int(after.step) == 3
    for name in ("params", "ema_params", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(good, name), getattr(after, name))
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), state.params, good.params)
    assert any(jax.tree.leaves(moved))


def test_padding_does_not_matter(tiny):
    step, state = tiny
    batch = tiny_run.random_batch(3)
    poisoned = batch._replace(patches=np.where(batch.segment_ids[..., None] > 0, batch.patches, 1e4))
    rows = np.arange(8, dtype=np.int32)[None]
    _, clean_metrics = step(state, stack([batch]), rows)
    _, dirty_metrics = step(state, stack([poisoned]), rows)
    np.testing.assert_allclose(clean_metrics["loss"], dirty_metrics["loss"], rtol=1e-6)
    np.testing.assert_allclose(clean_metrics["grad_norm"], dirty_metrics["grad_norm"], rtol=1e-5)


def test_noise_of_a_row_depends_on_its_number_alone():
    key = streams.derive(0, 5, streams.TRAIN)
    all_rows = draw_noise(key, jnp.arange(6), (3, 2))
    np.testing.assert_array_equal(draw_noise(key, jnp.array([4, 1]), (3, 2)), all_rows[jnp.array([4, 1])])
    assert len(np.unique(np.asarray(all_rows))) == all_rows.size
    other_step = draw_noise(streams.derive(0, 6, streams.TRAIN), jnp.arange(6), (3, 2))
    other_stream = draw_noise(streams.derive(0, 5, streams.EVAL), jnp.arange(6), (3, 2))
    assert not np.isin(other_step, all_rows).any()
    assert not np.isin(other_stream, all_rows).any()


def test_counts():
    batch = PackedBatch(*[None] * 10)._replace(
        segment_ids=jnp.array([[1, 1, 2, 0], [1, 0, 0, 0]]), text_segment_ids=jnp.array([[1, 2, 2], [1, 1, 1]])
    )
    counts = {name: float(value) for name, value in count_tokens(batch, num_segments=3).items()}
    assert counts == {
        "real_tokens": 4,
        "text_tokens": 6,
        "clips": 3,
        "self_pairs": 4 + 1 + 1,
        "cross_pairs": 2 * 1 + 1 * 2 + 1 * 3,
    }
