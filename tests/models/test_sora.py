"""Packing is invisible: what a clip gets in a packed row is what it gets alone."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta
from helpers.trees import random_tree

from sora_jax.models.sora import SORA_SIZES, ModelConfig, SoraTransformer, abstract_params, init_params, param_count
from sora_jax.parallel.attention import attention_for
from sora_jax.patches.levels import ASKED, KNOWN, SegmentLevels, one_level
from sora_jax.patches.rows import Segment, fill_row, stack_rows

PATCH_DIM, TEXT_DIM, MAX_SEGMENTS = 6, 5, 4
CONFIG = ModelConfig(width=24, depth=2, num_heads=2, mlp_dim=32, text_dim=TEXT_DIM, frequency_dim=16, attention="xla")
MODELS = {
    "xla": SoraTransformer(CONFIG, PATCH_DIM),
    "blockwise": SoraTransformer(CONFIG, PATCH_DIM, attention_for("blockwise")),
}


def random_params():
    return random_tree(abstract_params(MODELS["xla"]), 0)


PARAMS = random_params()


def clip(seed, n, m, known=0):
    """A clip of n patches and m caption tokens, of which the first `known` patches are clean."""
    rng = np.random.default_rng(seed)
    patches, text = rng.normal(size=(n, PATCH_DIM)), rng.normal(size=(m, TEXT_DIM))
    positions = rng.integers(0, 5, size=(n, 3))
    levels = SegmentLevels((np.arange(n) < known).astype(np.int32), np.array([ASKED, KNOWN], np.int32))
    return Segment(*(x.astype(np.float32) for x in (patches, positions, text)), levels, seed)


CLIPS = [clip(0, 9, 3), clip(1, 1, 2), clip(2, 14, 4, known=5), clip(3, 4, 1)]
TIMES = [0.9, 0.35, 0.6, 0.05]


def packed(clips, times, row_length, text_length=16, poison=0.0):
    row = fill_row(
        clips, row_length=row_length, text_length=text_length, max_segments=MAX_SEGMENTS,
        patch_dim=PATCH_DIM, text_dim=TEXT_DIM, max_levels=2 * MAX_SEGMENTS,
    )  # fmt: skip
    batch = stack_rows([row])
    rng = np.random.default_rng(7)
    for values, ids in ((batch.patches, batch.segment_ids), (batch.positions, batch.segment_ids),
                        (batch.text, batch.text_segment_ids)):  # fmt: skip
        values[ids == 0] = poison * rng.normal(size=values[ids == 0].shape)
    levels = np.full((1, 2 * MAX_SEGMENTS), poison, np.float32)
    for k, t in enumerate(times):
        levels[0, 2 * k : 2 * k + 2] = t, 0.0
    return batch, levels


@functools.partial(jax.jit, static_argnums=0)
def forward(name, params, batch, levels):
    return MODELS[name].apply(
        {"params": params}, batch.patches, batch.positions, batch.segment_ids, levels, batch.level_ids,
        batch.text, batch.text_segment_ids,
    )  # fmt: skip


@functools.partial(jax.jit, static_argnums=0)
def gradients(name, params, batch, levels, weight):
    """Gradients of a weighted sum of outputs, for the parameters and the patches."""

    def total(params, patches):
        return (forward(name, params, batch._replace(patches=patches), levels) * weight).sum()

    return jax.grad(total, argnums=(0, 1))(params, batch.patches)


def slices():
    start = 0
    for c in CLIPS:
        yield slice(start, start := start + len(c.patches))


def alone(index):
    """The clip in a row of its own, of the same shape, so that nothing is compiled twice."""
    return packed([CLIPS[index]], [TIMES[index]], row_length=40)


@pytest.mark.parametrize("name", MODELS)
def test_packed_outputs_equal_those_alone(name):
    out = np.asarray(forward(name, PARAMS, *packed(CLIPS, TIMES, row_length=40, poison=50.0)))
    for index, where in enumerate(slices()):
        lonely = np.asarray(forward(name, PARAMS, *alone(index)))[0, : len(CLIPS[index].patches)]
        assert np.abs(lonely).max() > 0.1
        np.testing.assert_allclose(out[0, where], lonely, atol=1e-5, rtol=1e-5)
    assert not out[0, 28:].any()


@pytest.mark.parametrize("poison", [np.nan, np.inf, 1e30, 50.0])
@pytest.mark.parametrize("name", ["blockwise", pytest.param("xla", marks=pytest.mark.slow)])
def test_padding_may_be_anything(name, poison):
    """Patches, positions, captions and levels that no token has: bitwise the same as zeros, gradients too."""
    (clean, levels), (dirty, other_levels) = (packed(CLIPS, TIMES, row_length=40, poison=p) for p in (0.0, poison))
    dirty = dirty._replace(level_ids=np.where(dirty.segment_ids == 0, 99, dirty.level_ids))
    out = forward(name, PARAMS, clean, levels)
    np.testing.assert_array_equal(forward(name, PARAMS, dirty, other_levels), out)
    weight = np.cos(np.arange(out.size, dtype=np.float32)).reshape(out.shape)
    found, expected = (
        gradients(name, PARAMS, dirty, other_levels, weight),
        gradients(name, PARAMS, clean, levels, weight),
    )
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_a_row_may_have_fewer_levels_than_clips():
    """All clips at one level, of a table of one: what they get from a table with a column for each."""
    batch, levels = packed(CLIPS, [0.7] * 4, row_length=40)
    batch = batch._replace(level_ids=np.where(batch.level_ids % 2, 0, batch.level_ids))  # what is known has it too
    one = batch._replace(level_ids=np.zeros_like(batch.level_ids))
    expected = forward("xla", PARAMS, batch, levels)
    np.testing.assert_allclose(forward("xla", PARAMS, one, levels[:, :1]), expected, atol=1e-5)


def test_a_token_of_a_level_that_the_table_lacks_is_not_silent():
    batch, levels = packed(CLIPS, TIMES, row_length=40)
    out = np.asarray(forward("xla", PARAMS, batch, levels[:, :2]))[0]
    known = (batch.segment_ids[0] == 0) | (batch.level_ids[0] < 2)
    assert known.any() and np.isfinite(out[known]).all()
    assert np.isnan(out[~known]).all()


@pytest.mark.parametrize("name", MODELS)
def test_packed_gradients_equal_the_sum_of_those_alone(name):
    rng = np.random.default_rng(3)
    batch, levels = packed(CLIPS, TIMES, row_length=40, poison=50.0)
    weight = rng.normal(size=batch.patches.shape).astype(np.float32) / 40
    params_gradient, patches_gradient = gradients(name, PARAMS, batch, levels, weight)
    total = jax.tree.map(jnp.zeros_like, PARAMS)
    for index, where in enumerate(slices()):
        lonely_batch, lonely_levels = alone(index)
        lonely_weight = np.zeros_like(weight)
        n = len(CLIPS[index].patches)
        lonely_weight[0, :n] = weight[0, where]
        by_params, by_patches = gradients(name, PARAMS, lonely_batch, lonely_levels, lonely_weight)
        np.testing.assert_allclose(patches_gradient[0, where], by_patches[0, :n], atol=1e-5)
        total = jax.tree.map(jnp.add, total, by_params)
    assert not np.asarray(patches_gradient)[0, 28:].any()

    def compare(path, ours, summed):
        scale = max(float(jnp.abs(summed).max()), 1e-3)
        np.testing.assert_allclose(ours / scale, summed / scale, atol=1e-5, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(compare, params_gradient, total)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("change", ["patches", "text", "time", "positions"])
def test_a_changed_clip_leaves_its_neighbours_bitwise_unchanged(name, change):
    before = np.asarray(forward(name, PARAMS, *packed(CLIPS, TIMES, row_length=40)))
    clips, times = list(CLIPS), list(TIMES)
    if change == "time":
        times[2] = 0.8
    else:
        clips[2] = clips[2]._replace(**{change: getattr(clips[2], change)[::-1] * 1.5})
    after = np.asarray(forward(name, PARAMS, *packed(clips, times, row_length=40)))
    for index, where in enumerate(slices()):
        if index == 2:
            assert np.abs(before[0, where] - after[0, where]).max() > 1e-3
        else:
            np.testing.assert_array_equal(before[0, where], after[0, where])


@pytest.mark.parametrize("name", MODELS)
def test_a_fully_padded_row_gives_zeros(name):
    batch, levels = packed([], [], row_length=40, poison=50.0)
    out = np.asarray(forward(name, PARAMS, batch, levels))
    assert out.shape == (1, 40, PATCH_DIM)
    assert not out.any()


def test_known_patches_have_their_own_level():
    """Marking patches as known changes the output although patches, text and time stay as they are."""
    asked = [CLIPS[2]._replace(levels=one_level(14))]
    known = np.asarray(forward("xla", PARAMS, *packed([CLIPS[2]], [0.6], row_length=40)))
    unknown = np.asarray(forward("xla", PARAMS, *packed(asked, [0.6], row_length=40)))
    assert np.abs(known - unknown)[0, :14].max() > 1e-3


@pytest.mark.parametrize("remat", [pytest.param("dots", marks=pytest.mark.slow), "full"])
def test_remat_changes_neither_parameters_nor_gradients(remat):
    model = SoraTransformer(dataclasses.replace(CONFIG, remat=remat), PATCH_DIM)
    assert jax.tree.structure(abstract_params(model)) == jax.tree.structure(abstract_params(MODELS["xla"]))
    batch, levels = packed(CLIPS, TIMES, row_length=40)

    def total(params, model):
        args = (batch.patches, batch.positions, batch.segment_ids, levels, batch.level_ids, batch.text)
        return jnp.square(model.apply({"params": params}, *args, batch.text_segment_ids)).sum()

    ours, plain = (jax.jit(jax.grad(total), static_argnums=1)(PARAMS, m) for m in (model, MODELS["xla"]))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), ours, plain)


def test_bfloat16_stays_near_float32():
    model = SoraTransformer(dataclasses.replace(CONFIG, dtype="bfloat16"), PATCH_DIM)
    batch, levels = packed(CLIPS, TIMES, row_length=40)
    args = (batch.patches, batch.positions, batch.segment_ids, levels, batch.level_ids, batch.text)
    out = np.asarray(model.apply({"params": PARAMS}, *args, batch.text_segment_ids))
    reference = np.asarray(forward("xla", PARAMS, batch, levels))
    assert out.dtype == np.float32
    assert np.sqrt(np.mean((out - reference) ** 2)) < 0.05 * np.sqrt(np.mean(reference**2))


def test_initialisation_predicts_zero():
    params = meta.unbox(init_params(MODELS["xla"], jax.random.key(0)))
    assert not np.asarray(forward("xla", params, *packed(CLIPS, TIMES, row_length=40))).any()


def test_wan_sizes():
    # Counted by instantiating the public reference implementation.
    assert param_count(SORA_SIZES["wan_1_3b"], patch_dim=64) == 1_418_996_800
