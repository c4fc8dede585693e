"""Packing is invisible: what an image gets in a packed row is what it gets alone."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta
from helpers.trees import random_tree

from sora_jax.config import PatchConfig
from sora_jax.models import navit
from sora_jax.models.navit import (
    ContrastiveHead,
    NaViT,
    NaViTConfig,
    abstract_params,
    check_positions,
    init_params,
    param_count,
)
from sora_jax.parallel.attention import attention_for
from sora_jax.parallel.rules import partition_spec
from sora_jax.patches.levels import one_level
from sora_jax.patches.positions import grid_positions
from sora_jax.patches.rows import Segment, fill_row
from sora_jax.patches.token_drop import kept_tokens

pytestmark = pytest.mark.slow

PATCH_DIM, LENGTH, SEGMENTS = 5, 40, 4
CONFIG = NaViTConfig(
    width=12, depth=2, num_heads=2, mlp_dim=16, num_classes=3, max_grid=(4, 6, 7), num_fractions=5, attention="xla"
)
CONFIGS = {
    "both": CONFIG,
    "absolute": dataclasses.replace(CONFIG, position_embedding="absolute"),
    "fractional": dataclasses.replace(CONFIG, position_embedding="fractional"),
    "blockwise": dataclasses.replace(CONFIG, attention="blockwise"),
}
MODELS = {name: NaViT(config, PATCH_DIM, SEGMENTS, attention_for(config.attention)) for name, config in CONFIGS.items()}
GRIDS = [(1, 3, 4), (1, 5, 1), (3, 2, 2), (1, 1, 1)]  # the third is a clip


def random_params(model):
    return random_tree(abstract_params(model), 0, 0.5)


PARAMS = {name: random_params(model) for name, model in MODELS.items()}


def image(seed, grid, kept=None):
    """An image or clip of random patches; `kept` are the indices of the tokens that are not dropped."""
    positions = grid_positions(grid, 8.0, PatchConfig(size=(2, 8, 8), reference_rate=3.0))  # t in steps of 3 / 4
    patches = np.random.default_rng(seed).normal(size=(len(positions), PATCH_DIM)).astype(np.float32)
    kept = np.arange(len(positions)) if kept is None else kept
    text = np.zeros((1, 1), np.float32)
    return Segment(patches[kept], positions[kept], text, one_level(len(kept)), seed)


IMAGES = [image(seed, grid) for seed, grid in enumerate(GRIDS)]


def packed(images, poison=0.0):
    """Patches, positions and segment ids of one row."""
    row = fill_row(
        images, row_length=LENGTH, text_length=8, max_segments=SEGMENTS, patch_dim=PATCH_DIM, text_dim=1
    )  # fmt: skip
    patches, positions, ids = row.patches[None], row.positions[None], row.segment_ids[None]
    rng = np.random.default_rng(7)
    patches[ids == 0] = poison * rng.normal(size=patches[ids == 0].shape)
    positions[ids == 0] = poison * rng.normal(size=positions[ids == 0].shape)
    return patches, positions, ids


@functools.partial(jax.jit, static_argnums=0)
def forward(name, params, row):
    return MODELS[name].apply({"params": params}, *row)


@functools.partial(jax.jit, static_argnums=0)
def gradients(name, params, row, weights):
    """Gradients, for parameters and patches, of a sum of a segment's features and logits, squared and weighted."""

    def total(params, patches):
        out = forward(name, params, (patches, *row[1:]))
        each = jnp.square(out.features).sum(-1) + jnp.square(out.logits - 1).sum(-1)
        return jnp.where(out.present, each * weights, 0).sum()

    return jax.grad(total, argnums=(0, 1))(params, row[0])


@pytest.mark.parametrize("name", MODELS)
def test_packed_equals_alone(name):
    out = forward(name, PARAMS[name], packed(IMAGES, poison=50.0))
    assert out.present.tolist() == [[True] * 4]
    for index, each in enumerate(IMAGES):
        alone = forward(name, PARAMS[name], packed([each]))
        assert alone.present.tolist() == [[True, False, False, False]]
        for ours, single in ((out.features, alone.features), (out.logits, alone.logits)):
            assert np.abs(single[0, 0]).max() > 0.1
            np.testing.assert_allclose(ours[0, index], single[0, 0], rtol=1e-5, atol=1e-5)
            assert not np.asarray(single[0, 1:]).any()


@pytest.mark.parametrize("poison", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("name", ["both", "blockwise"])
def test_padding_may_be_anything(name, poison):
    weights = np.array([[0.3, -0.7, 1.1, 0.5]], np.float32)
    clean, dirty = packed(IMAGES[:3]), packed(IMAGES[:3], poison)
    jax.tree.map(np.testing.assert_array_equal, *(forward(name, PARAMS[name], row) for row in (dirty, clean)))
    found, expected = (gradients(name, PARAMS[name], row, weights) for row in (dirty, clean))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_an_image_beyond_the_models_segments_is_not_silent():
    patches, positions, ids = packed(IMAGES)
    out = forward("both", PARAMS["both"], (patches, positions, np.where(ids == 2, SEGMENTS + 1, ids)))
    assert np.isnan(out.features[0, 0]).all() and np.isnan(out.logits[0, 0]).all()


@pytest.mark.parametrize("name", ["both", "blockwise"])
def test_packed_gradients_equal_the_sum_of_those_alone(name):
    weights = np.array([[0.3, 0.7, 1.1, 0.5]], np.float32)  # of one sign: nothing cancels
    by_params, by_patches = gradients(name, PARAMS[name], packed(IMAGES, poison=50.0), weights)
    total, start = jax.tree.map(jnp.zeros_like, PARAMS[name]), 0
    for index, each in enumerate(IMAGES):
        n = len(each.patches)
        alone, patches = gradients(name, PARAMS[name], packed([each]), np.full((1, 4), weights[0, index]))
        assert np.abs(patches[0, :n]).max() > 1e-3
        np.testing.assert_allclose(by_patches[0, start : start + n], patches[0, :n], rtol=1e-3, atol=1e-4)
        total, start = jax.tree.map(jnp.add, total, alone), start + n
    assert not np.asarray(by_patches)[0, start:].any()

    def compare(path, ours, summed):
        scale = max(float(jnp.abs(summed).max()), 1e-3)
        np.testing.assert_allclose(ours / scale, summed / scale, atol=2e-5, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(compare, by_params, total)


def test_packed_equals_alone_with_tokens_dropped():
    """Each image loses tokens by a rate of its own; what is left is packed."""
    rng = np.random.default_rng(0)
    kept = [kept_tokens(rng, math.prod(grid), rate) for grid, rate in zip(GRIDS, (0.5, 0.2, 0.7, 0.0), strict=True)]
    assert [len(k) for k in kept] == [6, 4, 4, 1]
    images = [image(seed, grid, k) for seed, (grid, k) in enumerate(zip(GRIDS, kept, strict=True))]
    whole, out = (forward("both", PARAMS["both"], packed(i, poison=50.0)) for i in (IMAGES, images))
    for index, each in enumerate(images):
        alone = forward("both", PARAMS["both"], packed([each]))
        np.testing.assert_allclose(out.features[0, index], alone.features[0, 0], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(out.logits[0, index], alone.logits[0, 0], rtol=1e-5, atol=1e-5)
    changed = np.abs(whole.features - out.features)[0].max(axis=-1)
    assert (changed[:3] > 1e-3).all()
    assert changed[3] < 1e-5


def test_permuted_images_permute_outputs():
    order = [2, 0, 3, 1]
    straight, permuted = (forward("both", PARAMS["both"], packed([IMAGES[i] for i in o])) for o in (range(4), order))
    np.testing.assert_allclose(permuted.logits[0], np.asarray(straight.logits)[0, order], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(permuted.features[0], np.asarray(straight.features)[0, order], rtol=1e-5, atol=1e-5)


def test_poisoned_padding_changes_no_bit():
    clean, poisoned = (forward("both", PARAMS["both"], packed(IMAGES[:2], poison)) for poison in (0.0, 1e4))
    jax.tree.map(np.testing.assert_array_equal, clean, poisoned)


def test_a_padded_row_gives_zeros():
    out = forward("both", PARAMS["both"], packed([], poison=50.0))
    assert not any(np.asarray(leaf).any() for leaf in out)


@pytest.mark.parametrize("field", ["patches", "positions"])
def test_a_changed_image_leaves_its_neighbours_bitwise_unchanged(field):
    images = list(IMAGES)
    images[0] = images[0]._replace(**{field: getattr(images[0], field)[::-1].copy()})
    before, after = (np.asarray(forward("both", PARAMS["both"], packed(i)).features)[0] for i in (IMAGES, images))
    assert np.abs(before[0] - after[0]).max() > 1e-3
    np.testing.assert_array_equal(before[1:], after[1:])


def test_an_image_does_not_depend_on_the_order_of_its_tokens():
    order = np.random.default_rng(1).permutation(12)
    shuffled = IMAGES[0]._replace(patches=IMAGES[0].patches[order], positions=IMAGES[0].positions[order])
    straight, other = (forward("both", PARAMS["both"], packed([i])).features[0, 0] for i in (IMAGES[0], shuffled))
    np.testing.assert_allclose(other, straight, rtol=1e-5, atol=1e-5)


def test_position_embedding_is_a_sum_of_axes():
    """Against rows of the tables picked by hand, and np.interp between them."""
    params = PARAMS["both"]["position_embedding"]
    assert {name: table.shape[0] for name, table in params.items()} == {
        "absolute_t": 4, "absolute_y": 6, "absolute_x": 7, "fractional_t": 5, "fractional_y": 5, "fractional_x": 5,
    }  # fmt: skip
    positions, extent = np.array([[[0.75, 4.0, 2.0]]], np.float32), np.array([[[3.0, 5.0, 4.0]]], np.float32)
    ours = navit.PositionEmbedding(CONFIG).apply({"params": params}, positions, extent)[0, 0]
    tables = {name: np.asarray(table, np.float64) for name, table in params.items()}
    want = 0.25 * tables["absolute_t"][0] + 0.75 * tables["absolute_t"][1]
    want = want + tables["absolute_y"][4] + tables["absolute_x"][2]
    for axis, fraction in (("t", 0.25), ("y", 0.8), ("x", 0.5)):
        columns = tables[f"fractional_{axis}"].T
        want = want + [np.interp(fraction, [0, 0.25, 0.5, 0.75, 1], column) for column in columns]
    np.testing.assert_allclose(ours, want, rtol=1e-5, atol=1e-5)


def test_fractional_positions_follow_the_size_that_is_given():
    """Where the last row was dropped, the extent that is passed keeps what the largest position would lose."""
    model, params = MODELS["fractional"], {"params": PARAMS["fractional"]}
    row = packed([image(0, (1, 3, 4), kept=np.arange(8)), IMAGES[1]])
    smaller = np.array([[[1, 2, 4], [1, 5, 1], [9, 9, 9], [9, 9, 9]]], np.float32)
    whole = smaller.copy()
    whole[0, 0, 1] = 3
    apply = jax.jit(model.apply)
    inferred, same, right = (np.asarray(apply(params, *row, e).features)[0] for e in (None, smaller, whole))
    np.testing.assert_allclose(same, inferred, rtol=1e-6, atol=1e-6)
    assert np.abs(right[0] - inferred[0]).max() > 1e-3
    np.testing.assert_array_equal(right[1], inferred[1])


def test_an_image_beyond_the_tables_is_an_error():
    check_positions(CONFIG, IMAGES[0].positions)
    check_positions(CONFIGS["fractional"], image(0, (1, 30, 30)).positions)
    with pytest.raises(ValueError, match=r"1 x 7 x 2 .*max_grid 4 x 6 x 7 allows for both"):
        check_positions(CONFIG, image(0, (1, 7, 2)).positions)
    stills = dataclasses.replace(CONFIGS["fractional"], max_grid=(1, 6, 7))
    assert stills.axes == ("y", "x")
    with pytest.raises(ValueError, match=r"2\.5 x 2 x 2 .*max_grid 1 x 6 x 7 allows for fractional"):
        check_positions(stills, IMAGES[2].positions)
    assert np.isnan(forward("absolute", PARAMS["absolute"], packed([image(0, (1, 7, 2))])).logits[0, 0]).all()


def test_remat_changes_neither_parameters_nor_outputs():
    model = NaViT(dataclasses.replace(CONFIG, remat="full"), PATCH_DIM, SEGMENTS)
    assert jax.tree.structure(abstract_params(model)) == jax.tree.structure(abstract_params(MODELS["both"]))
    ours = jax.jit(model.apply)({"params": PARAMS["both"]}, *packed(IMAGES))
    want = forward("both", PARAMS["both"], packed(IMAGES))
    np.testing.assert_allclose(ours.logits, want.logits, rtol=1e-4, atol=1e-5)


def test_bfloat16_stays_near_float32():
    model = NaViT(dataclasses.replace(CONFIG, dtype="bfloat16"), PATCH_DIM, SEGMENTS)
    out = np.asarray(jax.jit(model.apply)({"params": PARAMS["both"]}, *packed(IMAGES)).features)
    want = np.asarray(forward("both", PARAMS["both"], packed(IMAGES)).features)
    assert out.dtype == np.float32
    assert np.sqrt(np.mean((out - want) ** 2)) < 0.05 * np.sqrt(np.mean(want**2))


def test_parameters():
    """Counted by hand; the only biases of projections are those of the patch embedding and of the head."""
    width, mlp, heads = 12, 16, 6
    block = 4 * width**2 + 2 * width * mlp + 2 * heads + 4 * width
    pool = width + 4 * width**2 + 2 * width * mlp + 2 * heads + 2 * width
    tables = (4 + 6 + 7 + 3 * 5) * width
    edges = (PATCH_DIM + 1) * width + 2 * width + (width + 1) * 3
    assert param_count(CONFIG, PATCH_DIM) == 2 * block + pool + tables + edges
    boxed = jax.jit(functools.partial(init_params, MODELS["both"]))(jax.random.key(0))
    for path, leaf in jax.tree_util.tree_leaves_with_path(boxed, is_leaf=lambda x: isinstance(x, meta.AxisMetadata)):
        assert len(partition_spec(leaf.names)) == leaf.value.ndim, path
    out = forward("both", meta.unbox(boxed), packed(IMAGES))
    assert not np.asarray(out.logits).any()
    assert np.asarray(out.features).any()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"num_heads": 5}, "num_heads must be a divisor of width 12"),
        ({"max_grid": (0, 1, 1)}, "max_grid must be positive"),
        ({"num_fractions": 1}, "num_fractions must be at least 2"),
    ],
)
def test_what_cannot_work_is_refused(change, match):
    with pytest.raises(ValueError, match=match):
        dataclasses.replace(CONFIG, **change)


def test_contrastive_head():
    """Against NumPy, caption by caption; a segment without caption gets zeros."""
    rng = np.random.default_rng(5)
    features, text = rng.normal(size=(2, SEGMENTS, 12)), rng.normal(size=(2, 9, 7))
    ids = np.array([[1, 1, 1, 2, 4, 4, 0, 0, 0], [2, 1, 2, 1, 2, 3, 3, 3, 0]])
    text[ids == 0] = 1e4
    head = ContrastiveHead(embedding_dim=6)
    features, text = features.astype(np.float32), text.astype(np.float32)
    params = meta.unbox(head.init(jax.random.key(0), features, text, ids)["params"])
    image_embedding, text_embedding, scale = head.apply({"params": params}, features, text, ids)
    assert scale == pytest.approx(1 / 0.07, rel=1e-5)
    for row, k in np.ndindex(2, SEGMENTS):
        want = features[row, k] @ params["image_projection"]["kernel"]
        np.testing.assert_allclose(image_embedding[row, k], want / np.linalg.norm(want), rtol=1e-4, atol=1e-5)
        if (row, k) in ((0, 2), (1, 3)):
            assert not np.asarray(text_embedding[row, k]).any()
        else:
            want = text[row, ids[row] == k + 1].mean(axis=0) @ params["text_projection"]["kernel"]
            np.testing.assert_allclose(text_embedding[row, k], want / np.linalg.norm(want), rtol=1e-4, atol=1e-5)
    _, _, scale = head.apply({"params": params | {"log_scale": jnp.float32(9.0)}}, features, text, ids)
    assert scale == pytest.approx(100, rel=1e-5)

    def total(features, text):
        return sum(x.sum() for x in head.apply({"params": params}, features, text, ids))

    by_features, by_text = jax.grad(total, argnums=(0, 1))(0 * features, text)
    assert np.isfinite(by_features).all()
    assert np.isfinite(by_text).all()
    assert not np.asarray(by_text)[ids == 0].any()
