"""DiT: against NumPy in float64 in each conditioning, its sizes, and packing that changes nothing."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from helpers.trees import random_tree
from jax.sharding import Mesh

from sora_jax.config_json import from_json, to_json
from sora_jax.models.dit import (
    DIT_SIZES,
    DiT,
    DiTConfig,
    abstract_params,
    init_params,
    num_params,
    num_table_params,
    sincos_positions,
    split_output,
)
from sora_jax.parallel.attention import attention_for
from sora_jax.parallel.rules import param_shardings
from sora_jax.provenance import flat_names

pytestmark = pytest.mark.slow

CONDITIONINGS = ("adaln_zero", "adaln", "cross_attention", "in_context")
CONFIG = DiTConfig(
    image_size=(4, 6), in_channels=3, width=16, depth=2, num_heads=2, mlp_dim=24, num_classes=5, frequency_dim=8,
    attention="xla",
)  # fmt: skip
CONFIGS = {name: dataclasses.replace(CONFIG, conditioning=name) for name in CONDITIONINGS}
PATCH_DIM, LENGTH, SEGMENTS = 12, 24, 4


@functools.cache
def random_params(name):
    return random_tree(abstract_params(DiT(CONFIGS[name])), 0.05)


@functools.partial(jax.jit, static_argnums=0)
def forward(config, params, *row):
    return DiT(config, attention_for(config.attention)).apply({"params": params}, *row)


@functools.partial(jax.jit, static_argnums=0)
def on_images(config, params, x, timesteps, labels):
    return DiT(config).apply({"params": params}, x, timesteps, labels, method="on_images")


def numpy_dit(config, params, image, timestep, label):
    """The output for one image in float64, written from the paper's text and figure 3."""
    w = {name: np.asarray(value, np.float64) for name, value in flat_names(params).items()}
    adaptive = config.conditioning.startswith("adaln")
    silu = lambda x: x / (1 + np.exp(-x))  # noqa: E731
    layer = lambda name, x, w=w: x @ w[f"{name}.kernel"] + w[f"{name}.bias"]  # noqa: E731

    def norm(x, scale=1.0, bias=0.0):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps) * scale + bias

    p, (height, width) = config.patch_size, image.shape[:2]
    rows, columns = height // p, width // p
    x = []
    for row in range(rows):
        for column in range(columns):
            cut = image[row * p : row * p + p, column * p : column * p + p].astype(np.float64).ravel()
            angles = [
                place / 10000 ** (4 * i / config.width) for place in (column, row) for i in range(config.width // 4)
            ]
            (ax, ay) = np.split(np.array(angles), 2)
            x.append(layer("patch_embedding", cut) + np.concatenate([np.sin(ax), np.cos(ax), np.sin(ay), np.cos(ay)]))
    x = np.stack(x)

    half = config.frequency_dim // 2
    angles = timestep * np.array([10000 ** (-i / half) for i in range(half)])
    time = layer("time_fc2", silu(layer("time_fc1", np.concatenate([np.cos(angles), np.sin(angles)]))))
    label = w["label_embedding"][label]
    tokens = np.stack([time, label])
    if config.conditioning == "in_context":
        x = np.concatenate([x, tokens])

    for n in range(config.depth):
        b = {name.removeprefix("blocks."): value[n] for name, value in w.items() if name.startswith("blocks.")}
        dense = functools.partial(layer, w=b)

        def attention(name, x, source, dense=dense):
            heads = []
            q, k, v = dense(f"{name}.query", x), dense(f"{name}.key", source), dense(f"{name}.value", source)
            for q_h, k_h, v_h in zip(*(np.split(y, config.num_heads, -1) for y in (q, k, v)), strict=True):
                weights = np.exp(q_h @ k_h.T / math.sqrt(q_h.shape[1]))
                heads.append(weights / weights.sum(1, keepdims=True) @ v_h)
            return dense(f"{name}.out", np.concatenate(heads, -1))

        def mlp(x, dense=dense):
            h = dense("mlp.mlp.fc1", x)
            return dense("mlp.mlp.fc2", h * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3))) / 2)

        if adaptive:
            parts = np.split(dense("modulation", silu(time + label)), 6 if "zero" in config.conditioning else 4)
            shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = (
                parts if "zero" in config.conditioning else (*parts[:2], 1.0, *parts[2:], 1.0)
            )
            h = norm(x) * (1 + scale_1) + shift_1
            x = x + gate_1 * attention("self_attention", h, h)
            x = x + gate_2 * mlp(norm(x) * (1 + scale_2) + shift_2)
            continue
        h = norm(x, b["self_attention_norm.scale"], b["self_attention_norm.bias"])
        x = x + attention("self_attention", h, h)
        if config.conditioning == "cross_attention":
            h = norm(x, b["cross_attention_norm.scale"], b["cross_attention_norm.bias"])
            x = x + attention("cross_attention", h, tokens)
        x = x + mlp(norm(x, b["mlp_norm.scale"], b["mlp_norm.bias"]))

    x = x[: rows * columns]
    if adaptive:
        shift, scale = np.split(layer("head_modulation", silu(time + label)), 2)
        x = norm(x) * (1 + scale) + shift
    else:
        x = norm(x, w["head_norm.scale"], w["head_norm.bias"])
    x = layer("head", x).reshape(rows, columns, p, p, -1)
    return x.transpose(0, 2, 1, 3, 4).reshape(height, width, -1)


@pytest.mark.parametrize("name", CONDITIONINGS)
def test_oblong_images_equal_numpy(name):
    images = np.random.default_rng(1).normal(size=(2, 4, 6, 3)).astype(np.float32)
    timesteps, labels = np.array([731.0, 4.0], np.float32), np.array([3, 5])  # 5 is the null class
    found = on_images(CONFIGS[name], random_params(name), images, timesteps, labels)
    expected = [
        numpy_dit(CONFIGS[name], random_params(name), *one) for one in zip(images, timesteps, labels, strict=True)
    ]
    assert found.shape == (2, 4, 6, 6) and found.dtype == jnp.float32
    np.testing.assert_allclose(found, expected, atol=3e-5 * np.sqrt(np.square(expected).mean()))


def test_parameters_are_as_many_as_published():
    # Counted by instantiating the reference implementation; with the fixed table, which it counts.
    together = {
        "dit_s_2": 32_963_360,
        "dit_b_2": 130_512_416,
        "dit_l_2": 458_102_816,
        "dit_xl_2": 675_129_632,
        "dit_s_8": 33_148_160,
        "dit_xl_8": 675_683_072,
    }
    for name, count in together.items():
        assert num_params(DIT_SIZES[name]) + num_table_params(DIT_SIZES[name]) == count, name
    assert num_params(DIT_SIZES["dit_xl_2"]) == 674_834_720
    assert set(DIT_SIZES) == {f"dit_{size}_{patch}" for size in ("s", "b", "l", "xl") for patch in (2, 4, 8)}


@pytest.mark.parametrize(("name", "millions"), [("in_context", 449), ("cross_attention", 598), ("adaln", 600)])
def test_the_other_conditionings_of_xl_2_have_the_papers_sizes(name, millions):
    config = dataclasses.replace(DIT_SIZES["dit_xl_2"], conditioning=name)
    assert round(num_params(config) / 1e6) == millions  # table 4


def test_positions_by_another_way():
    """Real and imaginary parts of powers: exp(i p w) for the frequencies as a geometric series."""
    width = 24
    places = np.array([[y, x] for y in range(5) for x in range(7)])
    series = np.cumprod(np.concatenate([[1.0], np.full(width // 4 - 1, 10000.0 ** (-4 / width))]))
    turns = np.exp(1j * places[:, :, None].astype(np.float64) * series)  # (35, y or x, 6)
    expected = np.concatenate([turns[:, 1].imag, turns[:, 1].real, turns[:, 0].imag, turns[:, 0].real], axis=1)
    found = sincos_positions(jnp.asarray(places, jnp.float32), width)
    np.testing.assert_allclose(found, expected, atol=2e-6)
    far = sincos_positions(jnp.array([[255.0, 0.5]]), width)[0]
    assert far[width // 2] == pytest.approx(math.sin(255), abs=1e-5) and far[0] == pytest.approx(
        math.sin(0.5), abs=1e-6
    )


def image(seed, grid):
    """Patches, positions, timestep and class of an image of (rows, columns) patches."""
    rng = np.random.default_rng(seed)
    places = np.array([[0, y, x] for y in range(grid[0]) for x in range(grid[1])], np.float32)
    return rng.normal(size=(len(places), PATCH_DIM)).astype(np.float32), places, float(rng.integers(1000)), seed % 5


IMAGES = [image(0, (2, 3)), image(1, (1, 1)), image(2, (3, 4))]


def packed(images, poison=0.0):
    """A row of images, and one of padding alone."""
    rng = np.random.default_rng(7)
    patches, positions = (poison * rng.normal(size=(2, LENGTH, n)).astype(np.float32) for n in (PATCH_DIM, 3))
    segment_ids = np.zeros((2, LENGTH), np.int32)
    timesteps, labels = np.full((2, SEGMENTS), poison, np.float32), np.full((2, SEGMENTS), -1, np.int32)
    start = 0
    for k, (values, places, timestep, label) in enumerate(images):
        at = slice(start, start := start + len(values))
        patches[0, at], positions[0, at], segment_ids[0, at] = values, places, k + 1
        timesteps[0, k], labels[0, k] = timestep, label
    return patches, positions, segment_ids, timesteps, labels


@functools.partial(jax.jit, static_argnums=0)
def outputs_and_gradients(config, params, row, weight):
    def total(params, patches):
        out = forward(config, params, patches, *row[1:])
        return (out * weight).sum(), out

    return jax.value_and_grad(total, argnums=(0, 1), has_aux=True)(params, row[0])


@pytest.mark.parametrize("name", CONDITIONINGS)
def test_packed_outputs_and_gradients_equal_those_alone(name):
    config, params = CONFIGS[name], random_params(name)
    weight = np.random.default_rng(3).normal(size=(2, LENGTH, 2 * PATCH_DIM)).astype(np.float32) / LENGTH
    (_, out), (by_params, by_patches) = outputs_and_gradients(config, params, packed(IMAGES, poison=50.0), weight)
    start, total = 0, jax.tree.map(jnp.zeros_like, params)
    for one in IMAGES:
        at, n = slice(start, start := start + len(one[0])), len(one[0])
        lonely_weight = np.zeros_like(weight)
        lonely_weight[0, :n] = weight[0, at]
        (_, alone), (more, by_lonely) = outputs_and_gradients(config, params, packed([one]), lonely_weight)
        assert np.abs(alone[0, :n]).max() > 0.1
        np.testing.assert_allclose(out[0, at], alone[0, :n], atol=2e-5, rtol=1e-5)
        np.testing.assert_allclose(by_patches[0, at], by_lonely[0, :n], atol=1e-5)
        total = jax.tree.map(jnp.add, total, more)
    assert not out[0, start:].any() and not out[1].any()
    assert not by_patches[0, start:].any() and not by_patches[1].any()
    for key, summed in flat_names(total).items():
        # A key's bias adds the same to all scores of a query, which softmax does not see: its gradient is rounding.
        scale = 1.0 if key.endswith("key.bias") else float(jnp.abs(summed).max())
        assert scale > 1e-6, key
        np.testing.assert_allclose(flat_names(by_params)[key] / scale, summed / scale, atol=2e-5, err_msg=key)


@pytest.mark.parametrize("poison", [np.nan, np.inf, 1e30])
@pytest.mark.parametrize("name", CONDITIONINGS)
def test_padding_may_be_anything(name, poison):
    """Patches, positions, timesteps and classes of images that are not there: bitwise the same as zeros."""
    config, params = CONFIGS[name], random_params(name)
    weight = np.random.default_rng(3).normal(size=(2, LENGTH, 2 * PATCH_DIM)).astype(np.float32) / LENGTH
    clean, dirty = packed(IMAGES), packed(IMAGES, poison)
    dirty[4][clean[4] == -1] = 99
    found, expected = (outputs_and_gradients(config, params, row, weight) for row in (dirty, clean))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_an_image_without_a_timestep_is_not_silent():
    config, params = CONFIGS["adaln_zero"], random_params("adaln_zero")
    patches, positions, ids, timesteps, labels = packed(IMAGES)
    for few in (2, 1):
        out = forward(config, params, patches, positions, ids, timesteps[:, :few], labels[:, :few])
        assert np.isnan(out[ids > few]).all() and np.isfinite(out[ids <= few]).all()


def test_a_row_is_the_whole_image_in_any_order():
    """Tokens carry their places, so that the order of a row means nothing; on_images is rows of one image."""
    x = np.random.default_rng(4).normal(size=(1, 4, 6, 3)).astype(np.float32)
    whole = on_images(CONFIG, random_params("adaln_zero"), x, np.array([12.0], np.float32), np.array([2]))[0]
    patches = np.stack([x[0, y : y + 2, z : z + 2].ravel() for y in (0, 2) for z in (0, 2, 4)])
    places = np.array([[0, y, z] for y in (0, 1) for z in (0, 1, 2)], np.float32)
    order = np.random.default_rng(5).permutation(6)
    out = np.asarray(forward(CONFIG, random_params("adaln_zero"), *packed([(patches[order], places[order], 12.0, 2)])))
    for token, place in zip(out[0, :6], places[order].astype(int), strict=True):
        _, y, z = 2 * place
        np.testing.assert_allclose(token.reshape(2, 2, 6), whole[y : y + 2, z : z + 2], atol=2e-5, rtol=1e-5)
        prediction, variance = split_output(token, CONFIG)
        np.testing.assert_array_equal(prediction, token.reshape(4, 6)[:, :3].ravel())
        np.testing.assert_array_equal(variance, token.reshape(4, 6)[:, 3:].ravel())


def test_labels():
    def out(label):
        row = packed([IMAGES[0][:3] + (label,)])
        return np.asarray(forward(CONFIG, random_params("adaln_zero"), *row))[0, :6]

    for negative in (-1, -3):
        np.testing.assert_array_equal(out(negative), out(5))  # the null class
    assert np.abs(out(0) - out(5)).max() > 1e-2
    assert np.isnan(out(6)).all()


def test_initialisation_is_the_official_one():
    config = dataclasses.replace(CONFIG, width=64, num_classes=40, frequency_dim=64)
    params = nn.meta.unbox(jax.jit(functools.partial(init_params, DiT(config)))(jax.random.key(0)))
    flat = {name: np.asarray(value) for name, value in flat_names(params).items()}
    for name in ("blocks.modulation", "head_modulation", "head"):
        assert not flat[f"{name}.kernel"].any()
    for name, value in flat.items():
        assert not (name.endswith("bias") and value.any()), name
    for name in ("label_embedding", "time_fc1.kernel", "time_fc2.kernel"):
        assert flat[name].std() == pytest.approx(0.02, rel=0.1), name
    for name, fans in (
        ("patch_embedding", 12 + 64),
        ("blocks.self_attention.query", 64 + 3 * 64),  # one layer computes queries, keys and values there
        ("blocks.self_attention.out", 64 + 64),
        ("blocks.mlp.mlp.fc1", 64 + 24),
    ):
        bound = math.sqrt(6 / fans)
        assert 0.9 * bound < np.abs(flat[f"{name}.kernel"]).max() < bound * (1 + 1e-6), name
    assert not np.asarray(forward(config, params, *packed(IMAGES))).any()
    params = nn.meta.unbox(jax.jit(functools.partial(init_params, DiT(CONFIGS["adaln"])))(jax.random.key(0)))
    zero = {name for name, value in flat_names(params).items() if "kernel" in name and not value.any()}
    assert zero == {"head.kernel", "head_modulation.kernel"}


def test_every_parameter_has_known_axes():
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "fsdp"))
    for config in CONFIGS.values():
        param_shardings(abstract_params(DiT(config)), mesh)


@pytest.mark.parametrize(
    ("name", "changes", "tolerance"),
    [
        ("adaln_zero", {"dtype": "bfloat16", "remat": "full"}, 0.1),
        ("in_context", {"attention": "blockwise"}, 1e-5),
    ],
)
def test_other_ways_of_computing_change_little(name, changes, tolerance):
    exact = forward(CONFIGS[name], random_params(name), *packed(IMAGES))
    found = forward(dataclasses.replace(CONFIGS[name], **changes), random_params(name), *packed(IMAGES))
    assert found.dtype == jnp.float32
    assert 0 < np.abs(found - exact).max() < tolerance * np.abs(exact).max()


def test_bad_configs_and_inputs_are_named():
    for field, value, words in (
        ("image_size", (32, 33), r"\(height, width\), positive multiples of patch_size 2, got \(32, 33\)"),
        ("width", 18, "a multiple of 4"),
        ("num_heads", 3, "a divisor of width 16, got 3"),
        ("frequency_dim", 7, "even, at least 4, got 7"),
        ("num_classes", 0, "at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=f"DiTConfig.{field} must be {words}"):
            dataclasses.replace(CONFIG, **{field: value})
    x, t, y = np.zeros((2, 4, 6, 3), np.float32), np.zeros(2, np.float32), np.zeros(2, np.int32)
    for arguments, words in (
        ((x[:, :3], t, y), r"H and W multiples of patch_size 2, got shape \(2, 3, 6, 3\)"),
        ((x[..., :2], t, y), r"x must be \(B, H, W, 3\)"),
        ((x, t[:1], y), r"timesteps must be one for each of 2 images, got shape \(1,\)"),
        ((x, t, y[:1]), r"labels must be one for each of 2 images, got shape \(1,\)"),
    ):
        with pytest.raises(ValueError, match=words):
            on_images(CONFIG, random_params("adaln_zero"), *arguments)
    assert from_json(DiTConfig, to_json(CONFIG)) == CONFIG
