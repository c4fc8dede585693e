import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run

from sora_jax.array_types import PackedBatch
from sora_jax.families.sora import SoraTask, count_tokens, draw_levels, draw_noise, sorted_within, weighted_loss
from sora_jax.patches.levels import ASKED, FREE, KNOWN, TABLES, segment_levels
from sora_jax.patches.rows import Segment, fill_row, stack_rows
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
        level_ids=np.array([[0, 0, 0, 1, 0]]),
        level_segments=np.array([[1, 2, 0]]),
        level_roles=np.zeros((1, 3), int),
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


def test_patches_are_noised_to_the_levels_of_their_columns():
    seen = {}

    class Spy(ZeroModel):
        def apply(self, variables, patches, positions, segment_ids, levels, *_):
            seen.update(patches=patches, levels=levels)
            return jnp.zeros_like(patches)

    batch = tiny_run.random_batch(0)._replace(patches=np.zeros((8, 12, 4), np.float32))
    batch.segment_ids[0, :3], batch.level_ids[0, :3] = [1, 1, 2], [0, 1, 2]
    levels = np.tile(np.array([0.25, 0, 0.5], np.float32), (8, 1))
    weighted_loss({}, Spy(), batch, levels, np.ones((8, 12, 4), np.float32), tiny_run.CONFIG)
    np.testing.assert_array_equal(seen["levels"], levels)
    np.testing.assert_array_equal(seen["patches"][0, :3, 0], [0.25, 0, 0.5])  # (1 - t) 0 + t 1


ROLES = np.array([[ASKED, KNOWN, FREE, FREE, ASKED, FREE, FREE, FREE, 0]])
KEY = jax.random.key(0)
OWNERS = np.array([[1, 1, 2, 2, 3, 4, 4, 4, 0]])


@pytest.mark.parametrize("free_times", ["independent", "rising"])
def test_columns_are_drawn_by_their_roles(free_times):
    """4,000 rows: each column's own distribution, and which of them move together."""
    config = tiny_run.config(flow={"free_times": free_times, "known_noise": 0.1, "time_mean": -0.5, "time_std": 0.8})
    tables = {"level_segments": OWNERS, "level_roles": ROLES, "clip_ids": np.zeros((1, 4), int)}
    tables["segment_ids"] = np.ones((1, 4), int)
    batch = PackedBatch(*[None] * 12)._replace(**{name: np.repeat(a, 4000, axis=0) for name, a in tables.items()})
    drawn = np.asarray(draw_levels(KEY, jnp.arange(4000), batch, config), np.float64)
    logits = np.log(drawn) - np.log1p(-drawn)
    asked = ROLES[0, :8] == ASKED
    np.testing.assert_allclose(logits[:, :8][:, asked].mean(axis=0), -0.5, atol=0.06)
    np.testing.assert_allclose(logits[:, :8][:, asked].std(axis=0), 0.8, atol=0.05)
    assert drawn[:, 1].min() >= 0 and drawn[:, 1].max() <= 0.1 and drawn[:, 1].mean() == pytest.approx(0.05, abs=2e-3)
    correlation = np.corrcoef(drawn[:, :8].T) - np.eye(8)
    pairs = (correlation[2, 3], correlation[5, 6], correlation[6, 7])
    if free_times == "independent":
        assert np.abs(correlation).max() < 0.06
        np.testing.assert_allclose(logits[:, [2, 3, 5, 6, 7]].mean(axis=0), -0.5, atol=0.06)
    else:
        assert (np.diff(drawn[:, 2:4]) >= 0).all() and (np.diff(drawn[:, 5:8]) >= 0).all() and min(pairs) > 0.2
        # Sorting changes none of the values; the lowest of two normal numbers has the mean -1 / sqrt(pi).
        np.testing.assert_allclose(logits[:, 5:8].mean(), -0.5, atol=0.05)
        np.testing.assert_allclose(logits[:, 2].mean(), -0.5 - 0.8 / np.sqrt(np.pi), atol=0.05)
        others = np.delete(np.delete(correlation, [2, 3, 5, 6, 7], 0), [2, 3, 5, 6, 7], 1)
        assert np.abs(others).max() < 0.06 and np.abs(correlation[2:4, 5:8]).max() < 0.06
    # A clip of 3 x 12 tokens where 12 are the base: the odds of noise grow by sqrt(3); what is known is not shifted.
    shifted = tiny_run.config(flow=vars(config.flow) | {"base_tokens": 12})
    longer = batch._replace(segment_ids=np.full((4000, 36), 2))
    odds = [np.asarray(d, np.float64) / (1 - d) for d in (draw_levels(KEY, jnp.arange(4000), longer, shifted), drawn)]
    np.testing.assert_allclose(odds[0][:, 2:4], odds[1][:, 2:4] * np.sqrt(3), rtol=1e-4)
    np.testing.assert_array_equal(draw_levels(KEY, jnp.arange(4000), longer, shifted)[:, 1], drawn[:, 1])
    # What a row draws depends on its number alone; a known patch is clean by default.
    few = PackedBatch(*(None if a is None else a[:2] for a in batch))
    np.testing.assert_array_equal(draw_levels(KEY, jnp.array([7, 3]), few, config), drawn[[7, 3]])
    clean = draw_levels(KEY, jnp.arange(2), few, tiny_run.CONFIG)
    assert (clean[:, 1] == 0).all()


def test_sorting_within_groups_by_eye():
    values, groups = jnp.array([3.0, 1.0, 9.0, 2.0, 5.0, 4.0]), jnp.array([1, 1, 0, 1, 2, 2])
    np.testing.assert_array_equal(sorted_within(values, groups), [1, 2, 9, 3, 4, 5])


def mixture(seed):
    """Three clips of three latent frames, of the three tables, with their patches and captions."""
    rng = np.random.default_rng(seed)
    frames, segments = np.repeat(np.arange(3), 2), []
    for clip_id, table in enumerate(TABLES):
        patches, text = rng.standard_normal((6, 4)), rng.standard_normal((2, 8))
        positions = np.stack([frames, np.zeros(6), np.arange(6) % 2], axis=1)
        arrays = (a.astype(np.float32) for a in (patches, positions, text))
        segments.append(Segment(*arrays, segment_levels(table, frames, 3), clip_id))
    return segments


@pytest.mark.parametrize("weighting", ["token", "clip"])
def test_training_on_a_mixture_of_tables_is_packed_equals_alone(weighting, tiny):
    """Text to video, a known first frame and a level for each frame in one row: loss and gradient are those alone."""
    config = tiny_run.config(flow={"loss_weighting": weighting})
    params, segments = tiny[1].params, mixture(0)
    budget = dict(row_length=20, text_length=8, max_segments=3, max_levels=8, patch_dim=4, text_dim=8)
    model, rng = SoraTask(config).model, np.random.default_rng(1)
    tables = [rng.uniform(0.1, 1, len(s.levels.roles)).astype(np.float32) for s in segments]
    tables[1][1] = 0.05  # what is known may have a little noise
    noises = rng.standard_normal((3, 6, 4)).astype(np.float32)

    @jax.jit
    @jax.value_and_grad
    def total(params, batch, levels, noise):
        return weighted_loss(params, model, batch, levels, noise, config)[0]

    def of(*chosen):
        batch = stack_rows([fill_row([segments[i] for i in chosen], **budget)])
        levels, noise = np.full((1, 8), 0.5, np.float32), np.zeros((1, 20, 4), np.float32)
        columns = np.concatenate([tables[i] for i in chosen])
        levels[0, : len(columns)] = columns
        noise[0, : 6 * len(chosen)] = np.concatenate([noises[i] for i in chosen])
        return total(params, batch, levels, noise)

    (packed, packed_gradient), alone = of(0, 1, 2), [of(i) for i in range(3)]
    np.testing.assert_allclose(packed, sum(loss for loss, _ in alone), rtol=1e-5)
    summed = jax.tree.map(lambda *leaves: sum(leaves), *(gradient for _, gradient in alone))

    def compare(path, ours, theirs):
        scale = max(float(jnp.abs(theirs).max()), 1e-3)
        np.testing.assert_allclose(ours / scale, theirs / scale, atol=1e-5, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(compare, packed_gradient, summed)
    order, _ = of(2, 0, 1)
    np.testing.assert_allclose(order, packed, rtol=1e-5)


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
    chex.assert_trees_all_close(first, second, rtol=1e-3, atol=1e-6)


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
        chex.assert_trees_all_equal(getattr(good, name), getattr(after, name))
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
    batch = PackedBatch(*[None] * 12)._replace(
        segment_ids=jnp.array([[1, 1, 2, 0], [1, 0, 0, 0]]),
        text_segment_ids=jnp.array([[1, 2, 2], [1, 1, 1]]),
        level_segments=jnp.array([[1, 1, 2], [1, 0, 0]]),
    )
    counts = {name: float(value) for name, value in count_tokens(batch, num_segments=3).items()}
    assert counts == {
        "real_tokens": 4,
        "text_tokens": 6,
        "clips": 3,
        "levels": 4,
        "self_pairs": 4 + 1 + 1,
        "cross_pairs": 2 * 1 + 1 * 2 + 1 * 3,
    }
