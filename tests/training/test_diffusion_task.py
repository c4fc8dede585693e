"""Training of discrete diffusion: its losses against the bound and closed forms, and the invariants of every task."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers.runs import train
from tiny_run import assert_same_runs

from sora_jax.array_types import Array
from sora_jax.config import OptimizerConfig
from sora_jax.config_json import from_json, to_json
from sora_jax.data.dead_leaves import DeadLeavesConfig
from sora_jax.data.examples import ExampleBatches
from sora_jax.data.images import StillsConfig
from sora_jax.data.toy import HeartbeatConfig, SwissRollConfig
from sora_jax.diffusion.gaussian import discrete_levels
from sora_jax.families.diffusion import (
    BinomialConfig,
    DiffusionConfig,
    GaussianConfig,
    diffusion_task,
    spread_steps,
)
from sora_jax.models.mlp import MLPConfig
from sora_jax.models.unet import UNetConfig
from sora_jax.training import state as states
from sora_jax.training.loop import Outcome
from sora_jax.training.optimizer import make_optimizer
from sora_jax.training.step import update

ROLL = DiffusionConfig(
    data=SwissRollConfig(batch_size=8),
    model=MLPConfig(in_channels=2, out_channels=4, width=16, depth=1, num_steps=20),
    process=GaussianConfig(num_levels=20, schedule="log_snr", variance="learned", loss="bound"),
    optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=2),
    num_steps=6, log_every=2, eval_every=3, eval_batches=2, save_every=100, sample_every=0,
)  # fmt: skip
BEATS = dataclasses.replace(
    ROLL,
    data=HeartbeatConfig(batch_size=8),
    model=MLPConfig(in_channels=20, out_channels=20, width=16, depth=1, num_steps=20),
    process=BinomialConfig(num_levels=20),
)
DIGITS = dataclasses.replace(
    ROLL,
    data=StillsConfig(batch_size=8, size=4),
    model=UNetConfig(1, 2, width=4, multipliers=(1,), num_blocks=1, attention_levels=(), num_groups=2, dropout=0.3),
    process=GaussianConfig(num_levels=20, schedule="cosine", variance="learned", loss="hybrid", discrete=True),
)


def random_params(task, scale=0.3):
    """Parameters none of which is zero."""
    leaves, tree = jax.tree.flatten(states.unboxed_params(task))
    rng = np.random.default_rng(0)
    return tree.unflatten([leaf + scale * rng.standard_normal(leaf.shape).astype(np.float32) for leaf in leaves])


def random_batch(config, seed=0):
    rng = np.random.default_rng(seed)
    shape = (config.data.batch_size, *config.data.shape)
    if isinstance(config.data, HeartbeatConfig):
        return rng.integers(2, size=shape).astype(np.float32)
    return rng.uniform(-1, 1, shape).astype(np.float32)


def test_steps_are_spread_over_the_batch():
    """Each of T steps is drawn exactly once by T rows, in an order that turns with the key."""
    keys = jax.random.split(jax.random.key(0), 50)
    drawn = jax.vmap(lambda key: spread_steps(key, jnp.arange(16), 16, 16))(keys)
    for row in np.asarray(drawn):
        assert sorted(row) == list(range(16))
    assert len(np.unique(drawn[:, 0])) > 10
    few = jax.vmap(lambda key: spread_steps(key, jnp.arange(4), 4, 1000))(keys)
    np.testing.assert_allclose(np.diff(few, axis=1) % 1000, 250, atol=1)


@pytest.mark.parametrize("config", [ROLL, BEATS], ids=["gaussian", "binomial"])
def test_the_loss_averages_to_the_bound(config):
    """With as many rows as steps each is met once, so the mean over keys of the loss is the mean of the whole bound."""
    steps = len(config.process.betas())
    data = dataclasses.replace(config.data, batch_size=steps)
    task = diffusion_task(dataclasses.replace(config, data=data))
    params = random_params(task, 0.05)
    x0 = jnp.asarray(np.repeat(random_batch(config)[:1], steps, axis=0))

    @jax.jit
    @jax.vmap
    def both(key):
        loss = task.loss(params, x0, jnp.arange(steps), key, training=False)
        terms = task.bound(params, x0[:1], key)
        fixed = 0.0 if config is ROLL else terms.prior[0]  # the loss on bits leaves out what the network cannot change
        return loss.total / loss.weight, terms.total[0] - fixed

    loss, bound = (np.float64(a) for a in both(jax.random.split(jax.random.key(1), 3000)))
    error = np.hypot(loss.std(), bound.std()) / np.sqrt(len(loss))
    assert abs(loss.mean() - bound.mean()) < 4 * error
    assert error < 0.05 * abs(bound.mean())


def test_simple_loss_of_a_network_that_says_nothing():
    """It predicts zero noise, so the loss is the noise's own mean square: 1, by every step."""
    process = GaussianConfig(num_levels=50)
    config = dataclasses.replace(
        ROLL,
        process=process,
        data=SwissRollConfig(batch_size=20_000),
        model=dataclasses.replace(ROLL.model, out_channels=2, num_steps=50),
    )
    task = diffusion_task(config)
    zero = jax.tree.map(jnp.zeros_like, states.unboxed_params(task))
    batch = random_batch(config)
    loss = task.loss(zero, batch, jnp.arange(len(batch)), jax.random.key(0), training=False)
    assert float(loss.total / loss.weight) == pytest.approx(1, abs=0.03)


def test_learned_betas_begin_as_the_schedule_and_keep_the_first():
    process = dataclasses.replace(ROLL.process, learn_betas=True)
    task = diffusion_task(dataclasses.replace(ROLL, process=process))
    params = states.unboxed_params(task)
    for found, expected in zip(task.levels(params), discrete_levels(process.betas()), strict=True):
        np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-7)
    moved = {**params, "betas": {"logits": params["betas"]["logits"] + 0.5}}
    levels = task.levels(moved)
    assert float(levels.sigma[-2]) == pytest.approx(float(np.sqrt(process.betas()[0])), rel=1e-5)
    assert (np.asarray(levels.sigma[:-2]) > np.asarray(discrete_levels(process.betas()).sigma[:-2])).all()
    gradient = jax.grad(lambda p: task.loss(p, random_batch(ROLL), jnp.arange(8), jax.random.key(0), True).total)(
        params
    )
    assert (np.asarray(gradient["betas"]["logits"]) != 0).sum() >= 8


@pytest.mark.parametrize("prediction", ["noise", "v"])
def test_hybrid_gives_the_mean_no_gradient_of_the_bound(prediction):
    """The weights of what is predicted get the gradient of the simple loss alone; only the variance's see the bound."""
    process = dataclasses.replace(ROLL.process, loss="hybrid", prediction=prediction)
    task = diffusion_task(dataclasses.replace(ROLL, process=process))
    simple = diffusion_task(
        dataclasses.replace(
            ROLL,
            process=dataclasses.replace(process, variance="small", loss="simple"),
            model=dataclasses.replace(ROLL.model, out_channels=2),
        )
    )
    params = random_params(task, 0.05)
    first = jax.tree.map(lambda a: a[..., :2], params["network"]["out"])
    halved = {"network": {**params["network"], "out": first}}
    batch, rows, key = random_batch(ROLL), jnp.arange(8), jax.random.key(0)
    hybrid_gradient, simple_gradient = (
        jax.jit(jax.grad(lambda p, t=t: t.loss(p, batch, rows, key, training=False).total))(p)["network"]["out"]
        for t, p in ((task, params), (simple, halved))
    )
    np.testing.assert_allclose(hybrid_gradient["kernel"][:, :2], simple_gradient["kernel"], rtol=1e-3, atol=1e-5)
    assert np.abs(hybrid_gradient["kernel"][:, 2:]).max() > 0


def test_a_held_out_batch_is_spread_over_all_steps_whatever_is_accumulated():
    optimizer = dataclasses.replace(ROLL.optimizer, accumulation_steps=4)
    task, one = (diffusion_task(dataclasses.replace(ROLL, optimizer=o)) for o in (optimizer, ROLL.optimizer))
    key, rows = jax.random.key(0), jnp.arange(8)
    np.testing.assert_array_equal(task.draw(rows, key, 1000, False)[0], one.draw(rows, key, 1000, True)[0])
    both = jnp.concatenate([task.draw(rows + 8 * n, key, 32, True)[0] for n in range(4)])
    assert sorted(both.tolist()) == list(range(32))


@pytest.mark.parametrize("config", [ROLL, BEATS], ids=["gaussian", "binomial"])
def test_accumulation_equals_one_big_batch(config):
    """What a row draws depends on its number alone, so its place among devices and batches changes nothing."""
    big = (
        dataclasses.replace(config, model=dataclasses.replace(config.model, dropout=0.0))
        if config is DIGITS
        else config
    )
    small = dataclasses.replace(
        big,
        data=dataclasses.replace(big.data, batch_size=4),
        optimizer=dataclasses.replace(big.optimizer, accumulation_steps=2),
    )
    batch, rows = random_batch(big), np.arange(8, dtype=np.int32)
    found = []
    for experiment, shape in ((big, (1, 8)), (small, (2, 4))):
        task, tx = diffusion_task(experiment), make_optimizer(experiment.optimizer, 6)
        state = states.fresh_state(random_params(task, 0.05), tx)
        step = jax.jit(functools.partial(update, task=task, tx=tx))
        found.append(step(state, batch.reshape(*shape, -1), rows.reshape(shape)))
    (one, one_metrics), (two, two_metrics) = found
    for name in one_metrics:
        np.testing.assert_allclose(one_metrics[name], two_metrics[name], rtol=1e-4, err_msg=name)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=1e-5),
        one.opt_state[1][0].mu,
        two.opt_state[1][0].mu,
    )


class Examples(ExampleBatches):
    """Random images in the place of a data set's."""

    def __init__(self, config, training):
        draw = config.data.source("train") if not isinstance(config.data, StillsConfig) else random_images
        super().__init__(draw, 5, config.data.batch_size, None if training else 4)


def random_images(rng: np.random.Generator, count: int) -> Array:
    return np.float32(rng.integers(256, size=(count, 4, 4, 1)) / 127.5 - 1)


class Stops(Examples):
    """Ends the process that reads the fourth batch."""

    def __next__(self):
        if self.get_state()["index"] == 3:
            raise KeyboardInterrupt
        return super().__next__()


@pytest.mark.parametrize("config", [ROLL, pytest.param(DIGITS, marks=pytest.mark.slow)], ids=["gaussian", "dropout"])
def test_resume_is_exact(config, tmp_path):
    def opener(split, training):
        return Examples(config, training)

    assert train(config, tmp_path / "whole", opener) is Outcome.FINISHED
    with pytest.raises(KeyboardInterrupt):
        train(dataclasses.replace(config, save_every=3), tmp_path / "parts", lambda *_: Stops(config, True))
    assert train(config, tmp_path / "parts", opener) is Outcome.FINISHED
    assert_same_runs(tmp_path / "whole", tmp_path / "parts", config)


@pytest.mark.parametrize("config", [ROLL, BEATS, DIGITS], ids=["gaussian", "binomial", "unet"])
def test_config_round_trips_through_json(config):
    assert from_json(DiffusionConfig, to_json(config)) == config


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GaussianConfig(num_levels=1), "GaussianConfig.num_levels must be at least 2, got 1"),
        (lambda: GaussianConfig(loss="hybrid"), "loss must be simple or bound where variance is not learned"),
        (lambda: GaussianConfig(variance="learned"), "loss must be hybrid or bound where variance is learned"),
        (lambda: GaussianConfig(learn_betas=True), "learn_betas must be false where loss is not bound"),
        (lambda: GaussianConfig(log_snr_range=(3.0, 1.0)), r"log_snr_range must be \(lowest, highest\)"),
        (lambda: BinomialConfig(num_levels=0), "num_levels must be at least 2, got 0"),
        (lambda: dataclasses.replace(ROLL, sample_every=5), "sample_every must be 0 for what is not an image, got 5"),
        (lambda: dataclasses.replace(ROLL, num_seeds=0), "num_seeds must be at least 1, got 0"),
        (
            lambda: dataclasses.replace(ROLL, model=dataclasses.replace(ROLL.model, in_channels=20)),
            "MLPConfig.in_channels must be the 2 of the data, got 20",
        ),
        (
            lambda: dataclasses.replace(ROLL, process=dataclasses.replace(ROLL.process, discrete=True)),
            "process.discrete must be true for 8-bit stills and false for all else, got True for SwissRollConfig",
        ),
        (lambda: dataclasses.replace(ROLL, model=DIGITS.model), "RBFConfig or MLPConfig for vectors, got UNetConfig"),
        (
            lambda: dataclasses.replace(
                DIGITS,
                data=StillsConfig(size=5),
                model=dataclasses.replace(DIGITS.model, multipliers=(1, 2)),
            ),
            "StillsConfig.size must be a multiple of the network's 2, got 5",
        ),
        (
            lambda: dataclasses.replace(ROLL, data=SwissRollConfig(eval_splits=("train",))),
            "eval_splits must be without the split trained on",
        ),
        (lambda: dataclasses.replace(ROLL, data=SwissRollConfig(eval_splits=())), "eval_splits must be at least one"),
        (lambda: dataclasses.replace(ROLL, seed=-1), "seed must be at least 0, got -1"),
        (lambda: SwissRollConfig(noise=1e-9), "noise must be at least 1e-4 and below 1"),
        (lambda: DeadLeavesConfig(num_images=256), "num_images must be more than an image's 256 pixels"),
        (lambda: GaussianConfig(log_snr_range=(-8.0, 60.0)), "log_snr_range must be"),
        (
            lambda: dataclasses.replace(ROLL, model=dataclasses.replace(ROLL.model, out_channels=2)),
            "MLPConfig.out_channels must be 4 for such data and such a variance, got 2",
        ),
        (
            lambda: dataclasses.replace(ROLL, process=dataclasses.replace(ROLL.process, num_levels=21)),
            "MLPConfig.num_steps must be the 21 of process.num_levels, got 20",
        ),
        (
            lambda: dataclasses.replace(BEATS, process=GaussianConfig(num_levels=30)),
            "process must be a BinomialConfig for bits and a GaussianConfig for numbers",
        ),
    ],
)
def test_bad_configs(make, message):
    with pytest.raises(ValueError, match=message):
        make()
