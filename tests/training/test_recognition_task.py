"""Classification and contrastive training: losses, counts, exact resume, and what a run may begin with."""

import dataclasses
import functools
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import meta
from helpers.runs import train
from helpers.trees import random_tree
from tiny_recognition import NATIVE, NAVIT, PAIRS, VIT, VIVIT, RandomRows, fill, random_batch, random_rows
from tiny_run import assert_same_runs

from sora_jax.config import PatchConfig
from sora_jax.config_json import from_json, to_json
from sora_jax.data.labelled import FixedSize, NativeSize
from sora_jax.families.recognition import (
    ClassificationTask,
    ContrastiveTask,
)
from sora_jax.families.registry import make_task
from sora_jax.models.fine_tune import start_from
from sora_jax.models.navit import NaViT
from sora_jax.models.vit import ViT
from sora_jax.models.vivit import ViViT
from sora_jax.patches.patchify import patchify
from sora_jax.training import state as states
from sora_jax.training.flops import count_flops
from sora_jax.training.loop import Outcome


def random_params(task):
    return random_tree(states.abstract_params(task), 0)


@functools.cache
def compiled_loss(config):
    task = make_task(config)
    return jax.jit(lambda params, batch: task.loss(params, batch, jnp.arange(4), jax.random.key(0), training=False))


@pytest.mark.parametrize("config", [NAVIT, VIT, VIVIT, PAIRS], ids=["navit", "vit", "vivit", "contrastive"])
def test_batches_are_as_the_task_says(config):
    task, batch = make_task(config), random_batch(0, config)
    for name, expected, found in zip(batch._fields, task.abstract_batch(), batch, strict=True):
        assert (expected.shape, expected.dtype) == (found.shape, found.dtype), name
    assert task.abstract_batch(7).labels.shape == (7, config.data.max_segments)


def test_the_loss_of_packed_images_is_the_mean_of_those_alone():
    rows = random_rows(1, NAVIT)
    params = random_params(ClassificationTask(NAVIT))
    together = compiled_loss(NAVIT)(params, fill(rows, NAVIT))
    segments = [segment for row in rows for segment in row]
    alone = [compiled_loss(NAVIT)(params, fill([[s], [], [], []], NAVIT)) for s in segments]
    np.testing.assert_allclose(together.total, sum(loss.total for loss in alone), rtol=1e-5)
    assert together.weight == together.counts["examples"] == len(segments)
    assert together.counts["real_tokens"] == sum(len(s.patches) for s in segments)
    assert together.counts["self_pairs"] == sum(len(s.patches) ** 2 for s in segments)
    assert together.counts["correct"] == sum(loss.counts["correct"] for loss in alone)


def test_an_image_without_a_class_counts_nothing():
    rows = random_rows(2, NAVIT)
    params = random_params(ClassificationTask(NAVIT))
    rows[0][0] = rows[0][0]._replace(label=-1)
    found = compiled_loss(NAVIT)(params, fill(rows, NAVIT))
    rest = compiled_loss(NAVIT)(params, fill([rows[0][1:], *rows[1:]], NAVIT))
    np.testing.assert_allclose(found.total, rest.total, rtol=1e-5)
    assert found.weight == rest.weight == found.counts["labelled"]
    assert found.counts["examples"] == rest.counts["examples"] + 1


@pytest.mark.parametrize(("config", "network"), [(VIT, ViT), (VIVIT, ViViT)], ids=["vit", "vivit"])
def test_a_row_of_one_clip_is_that_clip(config, network):
    """Rows and images give the same logits, and the loss is the cross-entropy of these in float64."""
    rng, c = np.random.default_rng(3), config.model
    frames = getattr(c, "num_frames", 1)
    clips = rng.standard_normal((4, frames, *c.image_size, 1)).astype(np.float32)
    rows = [
        [segment._replace(patches=patchify(clip, config.patch.size))]
        for (segment,), clip in zip(random_rows(4, config), clips, strict=True)
    ]
    batch, task = fill(rows, config), ClassificationTask(config)
    params = random_params(task)
    logits = np.asarray(network(c).apply({"params": params}, clips if frames > 1 else clips[:, 0]), np.float64)
    np.testing.assert_allclose(task.outputs(params, batch).logits[:, 0], logits, rtol=1e-5, atol=1e-6)
    labels = batch.labels[:, 0]
    cross_entropy = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(4), labels]
    loss = compiled_loss(config)(params, batch)
    np.testing.assert_allclose(loss.total / loss.weight, cross_entropy.mean(), rtol=1e-5)
    accuracy = (logits.argmax(axis=1) == labels).mean()
    np.testing.assert_allclose(task.scores({k: float(v) for k, v in loss.counts.items()})["accuracy"], accuracy)


def test_an_empty_row_of_one_clip_counts_nothing():
    rows = random_rows(5, VIT)
    params = random_params(ClassificationTask(VIT))
    some = compiled_loss(VIT)(params, fill([*rows[:2], [], []], VIT))
    assert some.weight == some.counts["examples"] == 2
    assert np.isfinite(some.total)


def test_the_contrastive_loss_is_that_of_all_pairs():
    """An independent oracle in float64, from the task's own embeddings."""
    task, batch = ContrastiveTask(PAIRS), random_batch(6, PAIRS)
    params = random_params(task)
    image, text, scale, present = (np.asarray(x, np.float64) for x in task.embeddings(params, batch))
    u, v = image[present > 0], text[present > 0]
    np.testing.assert_allclose(np.linalg.norm(u, axis=1), 1, rtol=1e-5)
    s = scale * u @ v.T
    expected = (np.log(np.exp(s).sum(1)) + np.log(np.exp(s).sum(0)) - 2 * np.diag(s)).mean() / 2
    loss = compiled_loss(PAIRS)(params, batch)
    np.testing.assert_allclose(loss.total / loss.weight, expected, rtol=1e-4)
    retrieved = (s.argmax(axis=1) == np.arange(len(s))).mean()
    scores = task.scores({k: float(v) for k, v in loss.counts.items()})
    np.testing.assert_allclose(scores["retrieval"], retrieved)


def test_label_smoothing_is_for_training_alone():
    smooth = dataclasses.replace(NAVIT, label_smoothing=0.3)
    batch, params = random_batch(7, NAVIT), random_params(ClassificationTask(NAVIT))
    of = [
        float(ClassificationTask(c).loss(params, batch, jnp.arange(4), jax.random.key(0), training=t).total)
        for c, t in ((NAVIT, True), (smooth, True), (smooth, False))
    ]
    assert of[0] == of[2] != of[1]


def test_useful_operations_are_those_counted_over_the_jaxpr():
    """Of one image that fills a row; pooling and the head are computed for that one segment."""
    data = dataclasses.replace(NATIVE, max_segments=1)
    task = ClassificationTask(dataclasses.replace(NAVIT, data=data))
    shapes = meta.unbox(jax.eval_shape(lambda: task.init_params(jax.random.key(0))))
    counted = count_flops(task.outputs, shapes, task.abstract_batch(1))
    # The extents of a row's segments are shared out among its tokens, which is no work of the model's.
    counted -= 2 * 24 * 3
    totals = {"real_tokens": 24.0, "examples": 1.0, "self_pairs": 24.0**2}
    assert math.isclose(task.forward_flops(totals), counted)
    vit = ClassificationTask(VIT)
    shapes = states.abstract_params(vit)
    assert vit.forward_flops_of_one() * 3 == count_flops(vit.outputs, shapes, vit.abstract_batch(3))
    rates = vit.rates({"real_tokens": 24.0, "examples": 4.0, "self_pairs": 0.0}, 2.0, 2)
    assert rates["examples_per_second"] == 2
    assert rates["real_token_share"] == 24 / (2 * 4 * 6)
    assert math.isclose(rates["model_flops_per_second"], 3 * 4 * vit.forward_flops_of_one() / 2)


@pytest.mark.parametrize(
    "config",
    [NAVIT, pytest.param(VIVIT, marks=pytest.mark.slow), pytest.param(PAIRS, marks=pytest.mark.slow)],
    ids=["navit", "vivit", "contrastive"],
)
def test_resume_is_exact_and_held_out_scores_are_written(config, tmp_path):
    def opener(stop_at=None):
        return lambda split, training: RandomRows(config, None if training else 3, stop_at if training else None)

    assert train(config, tmp_path / "whole", opener()) is Outcome.FINISHED
    with pytest.raises(KeyboardInterrupt):
        train(dataclasses.replace(config, save_every=3), tmp_path / "parts", opener(stop_at=4))
    assert train(config, tmp_path / "parts", opener()) is Outcome.FINISHED
    assert_same_runs(tmp_path / "whole", tmp_path / "parts", config)
    name = "retrieval" if config is PAIRS else "accuracy"
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    held_out = [line for line in lines if f"held_out_{name}/unseen" in line]
    assert [line["step"] for line in held_out] == [3, 6]
    assert all(0 <= line[f"held_out_{name}/unseen"] <= 1 and line["held_out_loss/unseen"] > 0 for line in held_out)
    assert all(0 <= line[name] <= 1 for line in lines if "loss" in line)


def test_fine_tuning_takes_over_what_fits():
    key = jax.random.key(0)
    vit, params = VIT.model, random_params(ClassificationTask(VIT))
    assert start_from(vit, vit, params, key) is params
    larger = dataclasses.replace(vit, image_size=(8, 6), num_classes=5)
    moved = start_from(larger, vit, params, key)
    assert moved["encoder"]["position_embedding"].shape == (13, 12)
    assert moved["head"]["kernel"].shape == (12, 5) and not np.asarray(moved["head"]["kernel"]).any()
    np.testing.assert_array_equal(moved["encoder"]["class_token"], params["encoder"]["class_token"])
    clip = start_from(VIVIT.model, vit, params, key)
    shapes = states.abstract_params(ClassificationTask(VIVIT))
    jax.tree.map(lambda a, b: np.testing.assert_equal(a.shape, b.shape), clip, shapes)
    navit, weights = NAVIT.model, random_params(ClassificationTask(NAVIT))
    more = start_from(dataclasses.replace(navit, num_classes=7), navit, weights, key)
    assert more["head"]["kernel"].shape == (12, 7)
    np.testing.assert_array_equal(more["pool_query"], weights["pool_query"])
    with pytest.raises(ValueError, match="a NaViTConfig cannot begin with the parameters of a ViTConfig"):
        start_from(navit, vit, params, key)
    with pytest.raises(ValueError, match="representation_dim must be 8, got 0"):
        start_from(dataclasses.replace(vit, representation_dim=8), vit, params, key)
    with pytest.raises(ValueError, match="the given model's depth must be 3, got 1"):
        start_from(dataclasses.replace(vit, depth=3), vit, params, key)


@pytest.mark.parametrize("config", [NAVIT, VIT, VIVIT, PAIRS], ids=["navit", "vit", "vivit", "contrastive"])
def test_config_round_trips_through_json(config):
    assert from_json(type(config), to_json(config)) == config


def changed(config, **parts):
    """The config with changed parts; `data` and `model` take dicts."""
    made = {k: dataclasses.replace(getattr(config, k), **v) if isinstance(v, dict) else v for k, v in parts.items()}
    return dataclasses.replace(config, **made)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: changed(VIT, data={"row_length": 5}), "row_length must be the 6 patches of the model's image or clip"),
        (lambda: changed(VIT, data={"max_segments": 2}), "max_segments must be 1 for ViT and ViViT"),
        (
            lambda: changed(VIT, data={"sampling": FixedSize((4, 8)), "row_length": 8}),
            r"FixedSize.size must be the model's image_size \(4, 6\), got \(4, 8\)",
        ),
        (lambda: changed(VIT, data={"sampling": NativeSize()}), "sampling must be a FixedSize for ViT and ViViT"),
        (lambda: changed(NAVIT, data={"sampling": FixedSize()}), "sampling must be a NativeSize for NaViT"),
        (lambda: changed(VIVIT, data={"num_frames": 2}), "num_frames must be the model's 4, got 2"),
        (lambda: changed(VIVIT, model={"num_classes": 4}), "num_classes must be the 3 of data.speeds, got 4"),
        (lambda: changed(VIT, patch=PatchConfig((1, 4, 4), 1)), r"PatchConfig.size must be the model's \(1, 2, 2\)"),
        (lambda: changed(VIT, patch=PatchConfig((1, 2, 2), 3)), "PatchConfig.channels must be the model's 1, got 3"),
        (lambda: changed(VIT, data={"label": "none"}), "label must be 'class' or 'speed' for a classifier"),
        (lambda: changed(VIT, label_smoothing=1.0), "label_smoothing must be at least 0 and below 1, got 1.0"),
        (lambda: changed(VIT, learning_rates=(1e-3, 1e-3)), "learning_rates must be distinct"),
        (lambda: changed(VIT, test_sides=(0,)), "test_sides must be at least 1 each"),
        (lambda: changed(VIT, test_sides=(3,)), "test_sides must be multiples of the patch's 2"),
        (lambda: changed(VIVIT, test_sides=(4,)), r"test_sides must be \(\) for a ViViT"),
        (
            lambda: changed(VIT, selection_split="unseen", learning_rates=(1e-3,)),
            "selection_split must be another split than those",
        ),
        (
            lambda: changed(VIT, data={"text_length": 8, "max_caption_tokens": 2}),
            "text_length must be 0: a classifier reads no captions",
        ),
        (
            lambda: changed(PAIRS, data={"label": "class"}),
            "label must be 'none': the captions are what is learned from",
        ),
        (lambda: changed(PAIRS, data={"caption_dropout": 0.5}), "caption_dropout must be 0"),
        (lambda: changed(VIT, sample_every=3), "sample_every must be 0"),
        (lambda: changed(VIT, num_seeds=0), "num_seeds must be at least 1, got 0"),
        (
            lambda: changed(NAVIT, data={"row_length": 15, "oversize": "skip"}),
            "row_length must be at least the 16 patches of the largest sample where oversize is 'skip', got 15",
        ),
        (lambda: changed(PAIRS, data={"text_length": 0}), "text_length must be above 0"),
        (lambda: changed(PAIRS, model={"num_classes": 2}), "num_classes must be 1: the head is not used, got 2"),
        (lambda: changed(PAIRS, chunk=0), "chunk must be None or at least 1, got 0"),
    ],
)
def test_bad_configs(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_the_kernel_can_be_replaced():
    called = []

    def kernel(*arguments):
        called.append(1)
        from sora_jax.models.attention import xla_attention

        return xla_attention(*arguments)

    task = ClassificationTask(NAVIT, kernel)
    jax.eval_shape(task.outputs, states.abstract_params(task), task.abstract_batch())
    assert called and isinstance(task.model, NaViT)
