"""The small networks: against float64 NumPy, at a fresh start, and their errors."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from helpers.trees import random_tree

from sora_jax.config_json import from_json, to_json
from sora_jax.models.mlp import MLP, RBF, MLPConfig, RBFConfig, init_params
from sora_jax.models.unet import UNetConfig
from sora_jax.parallel.rules import partition_spec

RBF_CONFIG = RBFConfig(in_channels=2, out_channels=4, num_units=5, num_steps=3)
MLP_CONFIG = MLPConfig(
    in_channels=2, out_channels=3, width=8, depth=2, num_steps=10, time_dim=4, num_frequencies=6,
    frequency_range=(0.5, 16.0),
)  # fmt: skip
PLAIN = dataclasses.replace(MLP_CONFIG, in_channels=20, out_channels=20, num_frequencies=0)
MODELS = [RBF(RBF_CONFIG), MLP(MLP_CONFIG), MLP(PLAIN)]


@functools.cache
def fresh(model):
    return nn.meta.unbox(jax.jit(functools.partial(init_params, model))(jax.random.key(0)))


@functools.partial(jax.jit, static_argnums=0)
def forward(model, params, x, steps):
    return model.apply({"params": params}, x, steps, deterministic=True)


def random_params(model, seed=0):
    return random_tree(fresh(model), std=0.5, seed=seed)


def inputs(model, count=6, seed=1):
    return np.random.default_rng(seed).normal(size=(count, model.config.in_channels)).astype(np.float32)


def rbf_in_float64(params, x, steps):
    """Equation 1, unit by unit."""
    p = {name: np.asarray(value, np.float64) for name, value in params.items()}
    rows = []
    for point, step in zip(np.asarray(x, np.float64), steps, strict=True):
        bumps = [
            np.exp(-np.sum((point - c) ** 2) / (2 * np.exp(log_w) ** 2))
            for c, log_w in zip(p["centres"], p["log_widths"], strict=True)
        ]
        rows.append(sum(b * r for b, r in zip(bumps, p["readout"][step], strict=True)) / sum(bumps))
    return np.stack(rows)


def mlp_in_float64(config, params, x, steps):
    """Equations 2 and 3, with the embedding of the step written out."""
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)

    def linear(h, name):
        return h @ p[name]["kernel"] + p[name]["bias"]

    x = np.asarray(x, np.float64)
    half = config.time_dim // 2
    angles = 64 * (steps[:, None] + 1) / config.num_steps * 256.0 ** (-np.arange(half) / half)
    time = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    h = x
    if config.num_frequencies:
        waves = np.concatenate([np.cos(x @ p["frequencies"]), np.sin(x @ p["frequencies"])], axis=1)
        h = np.concatenate([x, waves * (1 + linear(time, "gate"))], axis=1)
    for n in range(config.depth):
        scale, shift = np.split(linear(time, f"modulation_{n}"), 2, axis=1)
        y = linear(h, f"hidden_{n}") * (1 + scale) + shift
        y = y / (1 + np.exp(-y))
        h = y if n == 0 else h + y
    return linear(h, "out")


def test_the_rbf_network_is_its_equation():
    model, steps = MODELS[0], np.array([0, 1, 2, 2, 1, 0])
    params, x = random_params(model), inputs(model)
    got = forward(model, params, x, steps)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, rbf_in_float64(params, x, steps), rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(forward(model, params, x, steps.astype(np.float32)), got)


def test_the_rbf_network_reads_from_its_nearest_unit_far_away():
    """Normalised units say something everywhere: far from all of equal width, the nearest alone."""
    model = MODELS[0]
    params = random_params(model) | {"log_widths": np.full(5, -1.0, np.float32)}
    x = np.array([[50.0, 20.0]], np.float32)
    nearest = np.argmin(((x - params["centres"]) ** 2).sum(axis=1))
    got = forward(model, params, x, np.array([2]))[0]
    np.testing.assert_allclose(got, params["readout"][2, nearest], rtol=1e-5)


@pytest.mark.parametrize("model", MODELS[1:], ids=["fourier", "plain"])
def test_the_perceptron_is_its_equations(model):
    steps = np.array([0, 9, 4, 4, 2, 7])
    params, x = random_params(model), inputs(model)
    got = forward(model, params, x, steps)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, mlp_in_float64(model.config, params, x, steps), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("model", MODELS, ids=["rbf", "fourier", "plain"])
def test_a_fresh_network_predicts_zero_and_can_leave_it(model):
    params, x, steps = fresh(model), inputs(model), np.arange(6) % 3
    out, gradient = jax.value_and_grad(lambda p: (forward(model, p, x, steps) - 1.0).sum())(params)
    assert out == -6 * model.config.out_channels
    end = gradient["readout"] if "readout" in gradient else gradient["out"]["kernel"]
    assert np.abs(end).max() > 0.01


def test_frequencies_start_spaced_geometrically_in_all_directions():
    config = dataclasses.replace(MLP_CONFIG, num_frequencies=400, frequency_range=(0.25, 64.0))
    table = fresh(MLP(config))["frequencies"]
    length = np.linalg.norm(table, axis=0) / (2 * np.pi)
    np.testing.assert_allclose(length, 0.25 * 256 ** (np.arange(400) / 399), rtol=1e-4)
    assert np.abs((table / np.linalg.norm(table, axis=0)).mean(axis=1)).max() < 0.15


@pytest.mark.parametrize("model", MODELS, ids=["rbf", "fourier", "plain"])
def test_every_parameter_names_axes_that_the_mesh_knows(model):
    boxed = jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))
    leaves = jax.tree.leaves(boxed, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned))
    for leaf in leaves:
        assert len(leaf.names) == leaf.value.ndim
        partition_spec(leaf.names)


def test_configs_differ_by_their_keys_and_come_back_from_json():
    kinds = (RBFConfig, MLPConfig, UNetConfig)
    assert len({frozenset(field.name for field in dataclasses.fields(kind)) for kind in kinds}) == 3
    for config in (RBF_CONFIG, MLP_CONFIG):
        assert from_json(type(config), to_json(config)) == config


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RBFConfig(num_units=0), "RBFConfig.num_units must be at least 1, got 0"),
        (lambda: MLPConfig(depth=0), "MLPConfig.depth must be at least 1, got 0"),
        (lambda: MLPConfig(time_dim=3), "MLPConfig.time_dim must be even and at least 2, got 3"),
        (lambda: MLPConfig(num_frequencies=-1), "MLPConfig.num_frequencies must be at least 0, got -1"),
        (lambda: MLPConfig(frequency_range=(2.0, 1.0)), r"MLPConfig.frequency_range must be .* got \(2\.0, 1\.0\)"),
    ],
)
def test_a_bad_size_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("model", MODELS[:2], ids=["rbf", "fourier"])
def test_bad_input_is_named(model):
    params = fresh(model)
    with pytest.raises(ValueError, match=r"x must be \(B, 2\), got shape \(4, 3\)"):
        model.apply({"params": params}, np.zeros((4, 3), np.float32), np.zeros(4))
    with pytest.raises(ValueError, match=r"steps must be one for each of 4 examples, got shape \(1,\)"):
        model.apply({"params": params}, np.zeros((4, 2), np.float32), np.zeros(1))
