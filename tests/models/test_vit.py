"""ViT: its size, its parts, and what fine-tuning does to it. Weights of others are loaded in tests/convert."""

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
from sora_jax.models.vit import VIT_SIZES, ViT, ViTConfig, abstract_params, init_params, reset_head, resize_images
from sora_jax.parallel.rules import param_shardings
from sora_jax.provenance import flat_names

CONFIG = ViTConfig(
    image_size=(8, 12), patch_size=4, width=16, depth=2, num_heads=2, mlp_dim=24, representation_dim=12, num_classes=5
)
MEAN = dataclasses.replace(CONFIG, pooling="mean", representation_dim=0, num_classes=0)


def random_params(config, seed=0):
    return random_tree(abstract_params(ViT(config)), seed=seed)


def random_images(config, batch=2, seed=1):
    return np.random.default_rng(seed).uniform(-1, 1, (batch, *config.image_size, config.channels)).astype(np.float32)


@functools.partial(jax.jit, static_argnums=0)
def forward(config, params, images):
    return ViT(config).apply({"params": params}, images)


def test_the_published_sizes():
    def count(name, **changes):
        shapes = abstract_params(ViT(dataclasses.replace(VIT_SIZES[name], **changes)))
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))

    # Counted by instantiating reference implementations; Ti, S and B/32 are those of arXiv:2106.10270, table 2.
    assert count("vit_b_16") == 86_567_656
    assert count("vit_l_16") == 304_326_632
    assert count("vit_h_14") == 632_045_800
    assert count("vit_ti_16", num_classes=0) == pytest.approx(5.8e6, rel=0.06)
    assert count("vit_s_16", num_classes=0) == pytest.approx(22.2e6, rel=0.03)
    assert count("vit_b_32", num_classes=0) == pytest.approx(88.2e6, rel=0.01)
    # No class token, no position for it.
    assert count("vit_b_16") - count("vit_b_16", pooling="mean") == 2 * 768


def numpy_vit(config, params, image):
    """The network's output for one image in float64, written from arXiv:2010.11929, equations 1 to 4."""
    w = {name: np.asarray(value, np.float64) for name, value in flat_names(params).items()}
    error_function = np.vectorize(math.erf)
    layer = lambda name, x: x @ w[f"{name}.kernel"] + w[f"{name}.bias"]  # noqa: E731

    def norm(name, x, scale=None, bias=None):
        x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + config.norm_eps)
        return x * (w[f"{name}.scale"] if scale is None else scale) + (w[f"{name}.bias"] if bias is None else bias)

    p = config.patch_size
    cuts = [image[y : y + p, x : x + p] for y in range(0, image.shape[0], p) for x in range(0, image.shape[1], p)]
    x = layer("patch_embedding", np.stack([cut.ravel() for cut in cuts]).astype(np.float64))
    if config.pooling == "token":
        x = np.concatenate([w["encoder.class_token"][None], x])
    x = x + w["encoder.position_embedding"]
    for i in range(config.depth):
        b = {name.removeprefix("encoder.blocks."): value[i] for name, value in w.items() if "blocks" in name}

        def dense(name, x, b=b):
            return x @ b[f"{name}.kernel"] + b[f"{name}.bias"]

        h = norm("", x, b["self_attention_norm.scale"], b["self_attention_norm.bias"])
        q, k, v = (np.split(dense(f"self_attention.{n}", h), config.num_heads, -1) for n in ("query", "key", "value"))
        heads = []
        for q_h, k_h, v_h in zip(q, k, v, strict=True):
            weights = np.exp(q_h @ k_h.T / math.sqrt(q_h.shape[1]))
            heads.append(weights / weights.sum(1, keepdims=True) @ v_h)
        x = x + dense("self_attention.out", np.concatenate(heads, -1))
        h = dense("mlp.mlp.fc1", norm("", x, b["mlp_norm.scale"], b["mlp_norm.bias"]))
        x = x + dense("mlp.mlp.fc2", h * (1 + error_function(h / math.sqrt(2))) / 2)
    x = norm("encoder.norm", x)
    x = x[0] if config.pooling == "token" else x.mean(0)
    if config.representation_dim:
        x = np.tanh(layer("representation", x))
    return layer("head", x) if config.num_classes else x


@pytest.mark.parametrize("config", [CONFIG, MEAN], ids=["token", "mean"])
def test_outputs_equal_numpy(config):
    params, images = random_params(config), random_images(config)
    found = forward(config, params, images)
    expected = np.stack([numpy_vit(config, params, image) for image in images])
    assert found.dtype == jnp.float32 and found.shape == (2, config.num_classes or config.width)
    np.testing.assert_allclose(found, expected, atol=2e-5 * np.sqrt((expected**2).mean()))


def test_every_parameter_is_used_and_has_known_axes():
    boxed = abstract_params(ViT(CONFIG))
    param_shardings(boxed, Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "fsdp")))
    loss = lambda params: (forward(CONFIG, params, random_images(CONFIG)) ** 2).sum()  # noqa: E731
    gradient = jax.jit(jax.grad(loss))(random_params(CONFIG))
    for name, leaf in flat_names(gradient).items():
        # A key's bias adds the same to all scores of a query, which softmax does not see.
        assert name.endswith("key.bias") or (np.abs(leaf) > 1e-7).any(), name


def test_a_fresh_model_predicts_zero():
    params = nn.meta.unbox(jax.jit(functools.partial(init_params, ViT(CONFIG)))(jax.random.key(0)))
    assert not forward(CONFIG, params, random_images(CONFIG)).any()
    assert not params["encoder"]["class_token"].any()
    assert params["encoder"]["position_embedding"].std() == pytest.approx(0.02, rel=0.2)


def test_bfloat16_and_remat_change_little():
    params, images = random_params(CONFIG), random_images(CONFIG)
    exact = forward(CONFIG, params, images)
    rounded = forward(dataclasses.replace(CONFIG, dtype="bfloat16", remat="full"), params, images)
    assert rounded.dtype == jnp.float32 and 0 < np.abs(rounded - exact).max() < 0.1 * np.abs(exact).max()


def test_a_new_head_is_zero_and_replaces_all_of_the_old_one():
    params = random_params(CONFIG)
    config, tuned = reset_head(CONFIG, params, 7)
    assert (config.num_classes, config.representation_dim) == (7, 0)
    out = forward(config, tuned, random_images(CONFIG))
    assert out.shape == (2, 7) and not out.any()
    assert tuned["encoder"] is params["encoder"] and "representation" in params
    config, features = reset_head(CONFIG, params, 0)
    assert (
        "head" not in features
        and flat_names(nn.meta.unbox(abstract_params(ViT(config)))).keys() == flat_names(features).keys()
    )


def test_another_size_keeps_the_corners():
    config, params = resize_images(CONFIG, old := random_params(CONFIG), (16, 8))
    assert config.grid == (4, 2)
    assert jax.tree.map(np.shape, params) == jax.tree.map(
        lambda p: p.shape, nn.meta.unbox(abstract_params(ViT(config)))
    )
    before, after = (p["encoder"]["position_embedding"] for p in (old, params))
    np.testing.assert_allclose(after[[0, 1, 2, -2, -1]], before[[0, 1, 3, 4, 6]], rtol=1e-6)
    same_config, same = resize_images(CONFIG, old, CONFIG.image_size)
    np.testing.assert_array_equal(same["encoder"]["position_embedding"], before)
    assert same_config == CONFIG


def test_errors_name_what_would_work():
    with pytest.raises(ValueError, match=r"must be \(B, 8, 12, 3\), got \(2, 12, 8, 3\)"):
        jax.eval_shape(functools.partial(forward, CONFIG), random_params(CONFIG), np.zeros((2, 12, 8, 3), np.float32))
    for field, value, words in (
        ("image_size", (8, 10), r"positive multiples of patch_size 4, got \(8, 10\)"),
        ("image_size", (0, 8), r"positive multiples of patch_size 4, got \(0, 8\)"),
        ("num_heads", 3, "a divisor of width 16, got 3"),
        ("depth", 0, "at least 1, got 0"),
        ("num_classes", -1, "at least 0, got -1"),
        ("norm_eps", 0.0, "positive, got 0.0"),
    ):
        with pytest.raises(ValueError, match=rf"ViTConfig\.{field} must be .*{words}"):
            dataclasses.replace(CONFIG, **{field: value})


def test_config_survives_json():
    assert from_json(ViTConfig, to_json(CONFIG)) == CONFIG
