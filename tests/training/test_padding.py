"""Whatever stands where padded, NaN and infinity too, comes neither into a loss nor into its gradient."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_recognition
import tiny_run
from helpers.trees import random_tree
from test_class_conditional_task import CONFIG as DIT
from test_class_conditional_task import FIXED as FIXED_DIT

from sora_jax.config import FlowConfig
from sora_jax.diffusion.losses import flow_loss
from sora_jax.families.registry import make_task
from sora_jax.patches.segments import without_padding
from sora_jax.training import state as states
from sora_jax.training.contrastive import classification_loss, contrastive_loss

SORA = tiny_run.CONFIG
CONFIGS = {
    "sora": SORA,
    "sora of x0, by clips": dataclasses.replace(SORA, flow=FlowConfig(prediction="x0", loss_weighting="clip")),
    "dit": DIT,
    "dit, simple": FIXED_DIT,
    "navit": tiny_recognition.NAVIT,
    "vit": tiny_recognition.VIT,
    "vivit": tiny_recognition.VIVIT,
    "contrastive": tiny_recognition.PAIRS,
}
GARBAGE = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf, "1e30": 1e30, "-3": -3.0}


def batch_of(config):
    """Rows with padding; the last one is padding alone."""
    make = tiny_run if config.__class__ is SORA.__class__ else tiny_recognition
    batch = make.random_batch(0, config)
    empty = np.arange(len(batch.patches)) == len(batch.patches) - 1
    ids, text_ids = (np.where(empty[:, None], 0, a) for a in (batch.segment_ids, batch.text_segment_ids))
    return batch._replace(segment_ids=ids, text_segment_ids=text_ids, loss_mask=batch.loss_mask & (ids > 0))


def filled(batch, value):
    """The batch with `value` wherever there is no segment."""
    padded, without_text = batch.segment_ids == 0, batch.text_segment_ids == 0
    present = (batch.segment_ids[:, :, None] == np.arange(1, batch.labels.shape[1] + 1)).any(axis=1)
    whole = int(value) if np.isfinite(value) and abs(value) < 1e9 else 10**9
    return batch._replace(
        patches=np.where(padded[..., None], np.float32(value), batch.patches),
        positions=np.where(padded[..., None], np.float32(value), batch.positions),
        level_ids=np.where(padded, whole, batch.level_ids),
        text=np.where(without_text[..., None], np.float32(value), batch.text),
        labels=np.where(present, batch.labels, whole),
        extents=np.where(present[..., None], batch.extents, np.float32(value)),
    )


@functools.cache
def loss_and_gradient(name):
    task = make_task(CONFIGS[name])
    params = random_tree(states.abstract_params(task), 0)

    def total(params, batch):
        loss = task.loss(params, batch, jnp.arange(len(batch.patches)), jax.random.key(1), False)
        return loss.total, loss

    return functools.partial(jax.jit(jax.value_and_grad(total, has_aux=True)), params)


FAST = ("sora", "navit")


@pytest.mark.parametrize("garbage", GARBAGE)
@pytest.mark.parametrize("name", [n if n in FAST else pytest.param(n, marks=pytest.mark.slow) for n in CONFIGS])
def test_losses_and_gradients_are_bitwise_those_of_zeros(name, garbage):
    batch = batch_of(CONFIGS[name])
    assert (batch.segment_ids == 0).any() and (batch.segment_ids > 0).any()
    clean, dirty = (loss_and_gradient(name)(filled(batch, value)) for value in (0.0, GARBAGE[garbage]))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(clean))
    assert any(np.abs(leaf).max() > 1e-4 for leaf in jax.tree.leaves(clean[1]))
    jax.tree.map(np.testing.assert_array_equal, dirty, clean)


@pytest.mark.parametrize("prediction", ["velocity", "x0"])
def test_a_flow_loss_takes_anything_where_it_does_not_count(prediction):
    rng = np.random.default_rng(0)
    arrays = dict(
        zip(("output", "xt", "x0", "noise"), rng.standard_normal((4, 2, 5, 3)).astype(np.float32), strict=True)
    )
    arrays["t"] = rng.uniform(0.1, 1, (2, 5)).astype(np.float32)
    mask = np.array([[1, 1, 0, 0, 1], [0, 0, 0, 0, 0]], bool)
    ids = np.array([[1, 1, 1, 2, 2], [1, 1, 0, 0, 0]])
    config = FlowConfig(prediction=prediction)

    def loss(arrays):
        return flow_loss(**arrays, loss_mask=mask, segment_ids=ids, num_segments=2, config=config)

    dirty = {k: np.where(mask[..., None] if v.ndim == 3 else mask, v, np.nan) for k, v in arrays.items()}
    (value, gradient), (clean, clean_gradient) = (jax.value_and_grad(loss)(a) for a in (dirty, arrays))
    target = arrays["noise"] - arrays["x0"]
    told = arrays["output"] if prediction == "velocity" else (arrays["xt"] - arrays["output"]) / arrays["t"][..., None]
    assert float(value) == pytest.approx(np.square(told - target)[mask].mean(), rel=1e-5)
    assert value == clean
    jax.tree.map(np.testing.assert_array_equal, gradient, clean_gradient)


def test_pairs_and_classes_that_are_absent_may_be_anything():
    rng = np.random.default_rng(0)
    present = np.array([True, True, False, True])
    image, text = (np.where(present[:, None], a, 0) for a in rng.standard_normal((2, 4, 3)).astype(np.float32))
    labels = np.array([0, 2, 1, 1])

    def losses(image, text):
        return (
            contrastive_loss(image, text, present, jnp.float32(3), chunk=2)
            + classification_loss(image, labels, present)
            + classification_loss(text, labels, present, kind="sigmoid")
        )

    dirty = [np.where(present[:, None], a, np.nan) for a in (image, text)]
    for clean, found in zip(*(jax.value_and_grad(losses, (0, 1))(*a) for a in ((image, text), dirty)), strict=True):
        jax.tree.map(np.testing.assert_array_equal, found, clean)
    assert np.isfinite(losses(*dirty))


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_a_class_that_is_none_of_the_logits_is_not_silent(kind):
    logits = np.zeros((2, 3), np.float32)
    assert np.isfinite(classification_loss(logits, np.array([2, 7]), np.array([True, False]), kind=kind))
    assert np.isnan(classification_loss(logits, np.array([2, 3]), np.array([True, True]), kind=kind))


def test_without_padding_by_eye():
    values = np.array([[[1.0, 2.0], [np.nan, np.inf], [3.0, 1e30]]], np.float32)
    np.testing.assert_array_equal(
        without_padding(values, np.array([[2, 0, 1]])), [[[1, 2], [0, 0], [3, np.float32(1e30)]]]
    )
