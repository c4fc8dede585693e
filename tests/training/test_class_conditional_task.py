"""DiT's training: its loss against NumPy, packing, dropped classes, exact resume, latents as rows."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.runs import train
from helpers.trees import random_tree
from tiny_recognition import RandomRows, fill, random_rows
from tiny_run import assert_same_runs

from sora_jax.config import OptimizerConfig, PatchConfig
from sora_jax.config_json import from_json, to_json
from sora_jax.data.labelled import FixedSize, LabelledDataConfig, NativeSize
from sora_jax.families.diffusion import GaussianConfig
from sora_jax.families.dit import ClassConditionalConfig, ClassConditionalTask, ClassSampleConfig
from sora_jax.models.attention import xla_attention
from sora_jax.models.dit import DIT_SIZES, DiTConfig
from sora_jax.training import state as states
from sora_jax.training.loop import Outcome

CONFIG = ClassConditionalConfig(
    data=LabelledDataConfig(
        sampling=NativeSize((4.0, 8.0)), row_length=24, max_segments=4, batch_size=4, num_shards=1
    ),
    patch=PatchConfig((1, 2, 2), 1),
    model=DiTConfig(
        image_size=(4, 4), patch_size=2, in_channels=1, width=12, depth=1, num_heads=2, mlp_dim=16, num_classes=3,
        frequency_dim=8, attention="xla",
    ),
    process=GaussianConfig(num_levels=20, schedule="cosine", variance="learned", loss="hybrid", discrete=True),
    sample=ClassSampleConfig(labels=(0, 2), columns=2, size=(4, 6), num_steps=4),
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
    num_steps=6, log_every=2, eval_every=3, eval_batches=2, save_every=100, sample_every=0,
)  # fmt: skip
FIXED = dataclasses.replace(
    CONFIG,
    model=dataclasses.replace(CONFIG.model, learned_variance=False),
    process=dataclasses.replace(CONFIG.process, variance="small", loss="simple"),
)
TASK, FIXED_TASK = ClassConditionalTask(CONFIG), ClassConditionalTask(FIXED)


def random_params(task):
    return random_tree(states.abstract_params(task), 0)


PARAMS, FIXED_PARAMS = random_params(TASK), random_params(FIXED_TASK)
LOSS_AT, FIXED_LOSS_AT = jax.jit(TASK.loss_at), jax.jit(FIXED_TASK.loss_at)
LOSS = jax.jit(TASK.loss, static_argnums=4)


def random_draws(seed):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 20, (4, 4)), rng.standard_normal((4, 24, 4)).astype(np.float32)


def test_the_simple_loss_is_the_squared_error_of_the_noise():
    batch = fill(random_rows(1, CONFIG), CONFIG)
    steps, noise = random_draws(2)
    betas = FIXED.process.betas()
    alpha_bar = np.cumprod(1 - betas)[steps]  # (B, K)
    xt = np.zeros_like(batch.patches)
    for row, token in np.argwhere(batch.segment_ids > 0):
        a = alpha_bar[row, batch.segment_ids[row, token] - 1]
        xt[row, token] = math.sqrt(a) * batch.patches[row, token] + math.sqrt(1 - a) * noise[row, token]
    out = FIXED_TASK.model.apply(
        {"params": FIXED_PARAMS}, xt, batch.positions, batch.segment_ids, np.float32(steps), batch.labels
    )
    real = batch.segment_ids > 0
    expected = np.square(np.asarray(out, np.float64) - noise)[real].mean()
    loss = FIXED_LOSS_AT(FIXED_PARAMS, batch, steps, noise)
    np.testing.assert_allclose(loss.total / loss.weight, expected, rtol=1e-5)
    assert loss.weight == real.sum() == loss.counts["real_tokens"]


def test_the_loss_of_packed_images_is_that_of_those_alone():
    rows = random_rows(3, CONFIG)
    steps, noise = random_draws(4)
    together, total = LOSS_AT(PARAMS, fill(rows, CONFIG), steps, noise), 0.0
    for row, segments in enumerate(rows):
        start = 0
        for k, segment in enumerate(segments):
            own_steps, own_noise = np.zeros((4, 4), int), np.zeros((4, 24, 4), np.float32)
            own_steps[0, 0], stop = steps[row, k], start + len(segment.patches)
            own_noise[0, : stop - start] = noise[row, start:stop]
            total += float(LOSS_AT(PARAMS, fill([[segment], [], [], []], CONFIG), own_steps, own_noise).total)
            start = stop
    np.testing.assert_allclose(together.total, total, rtol=1e-5)


@pytest.mark.slow
def test_the_bound_trains_the_variance_alone():
    """With the hybrid loss the head's part for the noise has the gradient of the squared error."""
    batch = fill(random_rows(5, CONFIG), CONFIG)
    steps, noise = random_draws(6)
    halves = [
        {**PARAMS, "head": jax.tree.map(lambda a: a.reshape(*a.shape[:-1], 4, 2)[..., 0], PARAMS["head"])},
        PARAMS,
    ]
    simple, hybrid = (
        jax.grad(lambda p, f=f: f(p, batch, steps, noise).total)(p)["head"]["kernel"]
        for f, p in zip((FIXED_TASK.loss_at, TASK.loss_at), halves, strict=True)
    )
    hybrid = np.asarray(hybrid).reshape(12, 4, 2)
    np.testing.assert_allclose(hybrid[..., 0], simple, rtol=1e-3, atol=1e-5)
    assert np.abs(hybrid[..., 1]).max() > 0


def test_classes_are_dropped_in_training_alone_and_by_row():
    rows = random_rows(7, CONFIG)
    batch, key = fill(rows, CONFIG), jax.random.key(0)
    null = batch._replace(labels=np.full_like(batch.labels, 3))
    always = ClassConditionalTask(dataclasses.replace(CONFIG, class_dropout=1.0))
    never = ClassConditionalTask(dataclasses.replace(CONFIG, class_dropout=0.0))
    of = {
        name: float(task.loss(PARAMS, b, jnp.arange(4), key, training).total)
        for name, task, b, training in (
            ("null", never, null, True),
            ("always", always, batch, True),
            ("held out", always, batch, False),
            ("never", never, batch, True),
        )
    }
    assert of["always"] == of["null"]
    assert of["held out"] == of["never"] != of["null"]
    # What a row draws depends on its number alone.
    order = np.array([2, 0, 3, 1])
    moved = type(batch)(*(np.asarray(leaf)[order] for leaf in batch))
    np.testing.assert_allclose(LOSS(PARAMS, batch, jnp.arange(4), key, True).total,
                               LOSS(PARAMS, moved, jnp.asarray(order), key, True).total, rtol=1e-5)  # fmt: skip


def test_a_negative_label_is_the_null_class():
    batch = fill(random_rows(8, CONFIG), CONFIG)
    steps, noise = random_draws(9)
    losses = [
        LOSS_AT(PARAMS, batch._replace(labels=np.full_like(batch.labels, label)), steps, noise).total
        for label in (-1, 3, 0)
    ]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.slow
def test_resume_is_exact(tmp_path):
    def opener(stop_at=None):
        return lambda split, training: RandomRows(CONFIG, None if training else 3, stop_at if training else None)

    assert train(CONFIG, tmp_path / "whole", opener()) is Outcome.FINISHED
    with pytest.raises(KeyboardInterrupt):
        train(dataclasses.replace(CONFIG, save_every=3), tmp_path / "parts", opener(stop_at=4))
    assert train(CONFIG, tmp_path / "parts", opener()) is Outcome.FINISHED
    assert_same_runs(tmp_path / "whole", tmp_path / "parts", CONFIG)


def test_useful_operations_are_those_of_the_paper():
    """DiT-S/2 on 32 x 32 latents: 6.06 Gflops in table 4 of the paper, where a flop is a multiply-accumulate."""
    data = dataclasses.replace(ClassConditionalConfig().data, batch_size=8, row_length=256)
    model = dataclasses.replace(DIT_SIZES["dit_s_2"], dtype="bfloat16", attention="splash")
    config = dataclasses.replace(ClassConditionalConfig(), data=data, model=model)
    totals = {"real_tokens": 5120.0, "examples": 20.0}
    rates = ClassConditionalTask(config, xla_attention).rates(totals, 4.0, 5)
    assert rates["model_flops_per_second"] == pytest.approx(3 * 20 * 2 * 6.06e9 / 4, rel=0.01)
    assert rates["examples_per_second"] == 5 and rates["real_token_share"] == 0.5
    assert "model_flops_per_second" not in TASK.rates(totals, 4.0, 5)


def test_config_round_trips_through_json():
    for config in (CONFIG, FIXED, ClassConditionalConfig()):
        assert from_json(ClassConditionalConfig, to_json(config)) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"patch": PatchConfig((1, 4, 4), 1)}, r"PatchConfig.size must be the model's \(1, 2, 2\), got \(1, 4, 4\)"),
        ({"patch": PatchConfig((1, 2, 2), 3)}, "PatchConfig.channels must be the model's 1, got 3"),
        ({"process": FIXED.process}, "loss must be hybrid where the model learns its variance, got 'simple'"),
        ({"class_dropout": 1.5}, "class_dropout must be between 0 and 1, got 1.5"),
        (
            {"sample": ClassSampleConfig(labels=(3,), size=(4, 4), num_steps=4)},
            r"labels must be classes of the model, got \(3,\)",
        ),
        (
            {"sample": ClassSampleConfig(labels=(0,), size=(4, 5), num_steps=4)},
            r"size must be multiples of the patch's 2",
        ),
        (
            {"sample": ClassSampleConfig(labels=(0,), size=(4, 4), num_steps=21)},
            "num_steps must be at most the 20 of process.num_levels, got 21",
        ),
        (
            {"data": dataclasses.replace(CONFIG.data, label="none")},
            "label must be 'class': the class is what the model is conditioned on",
        ),
        (
            {"data": dataclasses.replace(CONFIG.data, sampling=FixedSize((4, 5)))},
            r"size must be multiples of the patch's 2, got \(4, 5\)",
        ),
        (
            {"data": dataclasses.replace(CONFIG.data, sampling=FixedSize((20, 10)))},
            "row_length must be at least the 50 patches of an image, got 24",
        ),
    ],
)
def test_bad_configs(changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **changes)
