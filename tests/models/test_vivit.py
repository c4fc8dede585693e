"""ViViT: sizes and costs of its four models, who attends to whom, and what it takes over from an image model."""

import dataclasses
import functools
import math

import jax
import numpy as np
import pytest
from flax import linen as nn
from helpers.trees import random_tree

from sora_jax.config_json import from_json, to_json
from sora_jax.models.attention import xla_attention
from sora_jax.models.vit import ViT, ViTConfig
from sora_jax.models.vit import abstract_params as vit_shapes
from sora_jax.models.vivit import (
    ViViT,
    ViViTConfig,
    abstract_params,
    init_from_vit,
    over_space,
    over_space_and_time,
    over_time,
)
from sora_jax.patches.patchify import patchify
from sora_jax.provenance import flat_names
from sora_jax.training.flops import count_flops

pytestmark = pytest.mark.slow

SIZES = dict(width=16, depth=2, num_heads=2, mlp_dim=24, num_classes=0)
CONFIGS = {
    model: ViViTConfig(
        model=model,
        num_frames=6,
        image_size=(8, 12),
        tubelet_size=(2, 4, 4),
        temporal_depth=1,
        exact_gelu=True,
        **SIZES,
    )
    for model in (1, 2, 3, 4)
}
IMAGE = ViTConfig(image_size=(8, 12), patch_size=4, **SIZES)
MODELS = pytest.mark.parametrize("model", [1, 2, 3, 4])


def random_clips(config, seed=1):
    shape = (2, config.num_frames, *config.image_size, config.channels)
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


@functools.partial(jax.jit, static_argnums=0)
def forward(config, params, clips):
    return ViViT(config).apply({"params": params}, clips)


@functools.partial(jax.jit, static_argnums=0)
def image_features(config, params, images):
    return ViT(config).apply({"params": params}, images)


@pytest.mark.parametrize(
    ("model", "parameters", "paper_parameters", "paper_macs"),
    [
        (1, 88_954_000, 88.9e6, 455.2e9),
        (2, 115_062_928, 115.1e6, 284.4e9),
        (3, 117_319_312, 117.3e6, 372.3e9),
        (4, 88_952_464, 88.9e6, 277.1e9),
    ],
)
def test_sizes_and_costs_are_the_papers(model, parameters, paper_parameters, paper_macs):
    """ViViT-B/16x2 on 32 frames at 224, arXiv:2103.15691, table 2a; its FLOPs are multiply-accumulates of one view."""
    config = ViViTConfig(model=model)
    params = nn.meta.unbox(abstract_params(ViViT(config)))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == parameters
    assert parameters == pytest.approx(paper_parameters, abs=0.1e6)
    clip = jax.ShapeDtypeStruct((1, 32, 224, 224, 3), np.float32)
    macs = count_flops(lambda params, clip: ViViT(config).apply({"params": params}, clip), params, clip) / 2
    print(f"Model {model}: {parameters / 1e6:.3f} M parameters, {macs / 1e9:.1f} GMACs (paper {paper_macs / 1e9:.1f})")
    assert macs == pytest.approx(paper_macs, rel=0.01)


def test_attention_along_an_axis_against_loops():
    """Frame by frame and place by place, with a segment of padding and two clips in a row of tokens."""
    rng = np.random.default_rng(0)
    frames, places = 3, 4
    q, k, v = rng.normal(size=(3, 2, frames * places, 4, 2)).astype(np.float32)
    ids = rng.integers(0, 3, size=(2, frames * places))
    space, time = np.zeros_like(q), np.zeros_like(q)
    attention = jax.jit(xla_attention)
    for runs, out in (
        ([np.arange(t * places, (t + 1) * places) for t in range(frames)], space),
        ([np.arange(n, frames * places, places) for n in range(places)], time),
    ):
        for run in runs:
            out[:, run] = attention(q[:, run], k[:, run], v[:, run], ids[:, run], ids[:, run])
    both = np.concatenate([space[:, :, :2], time[:, :, 2:]], axis=2)
    for wrapper, expected in ((over_space, space), (over_time, time), (over_space_and_time, both)):
        np.testing.assert_allclose(jax.jit(wrapper(xla_attention, frames))(q, k, v, ids, ids), expected, atol=1e-6)


@MODELS
def test_every_parameter_is_used_and_every_frame_counts(model):
    config = CONFIGS[model]
    loss = lambda params, clips: (forward(config, params, clips) ** 2).sum()  # noqa: E731
    of_params, of_clips = jax.jit(jax.grad(loss, argnums=(0, 1)))(
        random_tree(abstract_params(ViViT(config))), random_clips(config)
    )
    for name, leaf in flat_names(of_params).items():
        # A key's bias adds the same to all scores of a query, which softmax does not see.
        assert name.endswith("key.bias") or (np.abs(leaf) > 1e-7).any(), name
    assert (np.abs(of_clips).max(axis=(2, 3, 4)) > 1e-6).all()


@functools.lru_cache
def from_image(model, embedding="inflation"):
    image = random_tree(vit_shapes(ViT(image_config(model))), seed=2)
    config = CONFIGS[model]
    return config, image, init_from_vit(config, jax.random.key(0), image_config(model), image, embedding)


def image_config(model):
    return dataclasses.replace(IMAGE, pooling="token" if model in (1, 2) else "mean")


def test_a_clip_of_one_tubelet_frame_is_what_the_image_model_sees():
    config = dataclasses.replace(CONFIGS[1], num_frames=2)
    image = random_tree(vit_shapes(ViT(IMAGE)), seed=2)
    params = init_from_vit(config, jax.random.key(0), IMAGE, image, "inflation")
    stills = random_clips(config)[:, 0]
    found = forward(config, params, np.repeat(stills[:, None], 2, axis=1))
    np.testing.assert_allclose(found, image_features(IMAGE, image, stills), atol=1e-5)


def test_model_3_begins_as_the_image_model_of_each_frame():
    """Attention over time adds nothing, so its features are the mean of those of all tubelet frames."""
    config, image, params = from_image(3, "central_frame")
    clips = random_clips(config)
    features = [image_features(image_config(3), image, clips[:, frame]) for frame in (1, 3, 5)]
    np.testing.assert_allclose(forward(config, params, clips), np.mean(features, axis=0), atol=1e-5)


@MODELS
def test_what_is_taken_over_from_an_image_model(model):
    config, image, params = from_image(model)
    shapes = nn.meta.unbox(abstract_params(ViViT(config)))
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda leaf: leaf.shape, shapes)
    # A still's tubelets have the embedding of its patches, and each frame its positions.
    still = random_clips(config)[0, 0]
    layer = lambda params, patches: patches @ params["kernel"] + params["bias"]  # noqa: E731
    tubelets = layer(params["patch_embedding"], patchify(np.stack([still] * 2), (2, 4, 4)))
    np.testing.assert_allclose(tubelets, layer(image["patch_embedding"], patchify(still[None], (1, 4, 4))), atol=1e-5)
    found, old = (p["encoder"]["position_embedding"] for p in (params, image))
    grid = old[-6:]
    expected = {1: [old[:1], *[grid] * 3], 2: [old], 3: [grid] * 3, 4: [grid] * 3}[model]
    np.testing.assert_array_equal(found, np.concatenate(expected))
    if model == 2:
        assert params["temporal_encoder"]["blocks"]["mlp"]["mlp"]["fc1"]["kernel"].std() > 0.1


def test_central_frame_embedding_sees_one_frame():
    _, image, params = from_image(1, "central_frame")
    kernel = params["patch_embedding"]["kernel"].reshape(2, 48, 16)
    np.testing.assert_array_equal(kernel[1], image["patch_embedding"]["kernel"])
    assert not kernel[0].any()


def test_another_image_size_is_interpolated():
    large = dataclasses.replace(IMAGE, image_size=(16, 20))
    image = random_tree(vit_shapes(ViT(large)))
    params = init_from_vit(CONFIGS[2], jax.random.key(0), large, image)
    found, old = params["encoder"]["position_embedding"], image["encoder"]["position_embedding"]
    np.testing.assert_allclose(found[[0, 1, 2, 3, -1]], old[[0, 1, 3, 5, 20]], rtol=1e-6)


def test_image_models_that_do_not_fit_are_named():
    image = random_tree(vit_shapes(ViT(IMAGE)))
    for changes, words in (
        (dict(mlp_dim=8), "mlp_dim must be the ViViT's 24, got 8"),
        (dict(patch_size=2), r"patch_size must be the ViViT's \(4, 4\), got \(2, 2\)"),
        (dict(pooling="mean"), "Model 1 needs an image model with pooling 'token', got 'mean'"),
    ):
        with pytest.raises(ValueError, match=words):
            init_from_vit(CONFIGS[1], jax.random.key(0), dataclasses.replace(IMAGE, **changes), image)


def test_errors_name_what_would_work():
    clips = np.zeros((1, 4, 8, 12, 3), np.float32)
    with pytest.raises(ValueError, match=r"must be \(B, 6, 8, 12, 3\), got \(1, 4, 8, 12, 3\)"):
        jax.eval_shape(functools.partial(forward, CONFIGS[1]), random_tree(abstract_params(ViViT(CONFIGS[1]))), clips)
    for field, value, words in (
        ("model", 5, "1, 2, 3 or 4, got 5"),
        ("num_frames", 5, "a positive multiple of the tubelet's 2, got 5"),
        ("image_size", (8, 10), r"positive multiples of the tubelet's \(4, 4\), got \(8, 10\)"),
        ("tubelet_size", (2, 0, 4), r"positive \(t, h, w\), got \(2, 0, 4\)"),
        ("num_heads", 3, "a divisor of width 16, got 3"),
        ("num_heads", 1, "even in Model 4, got 1"),
    ):
        with pytest.raises(ValueError, match=rf"ViViTConfig\.{field} must be .*{words}"):
            dataclasses.replace(CONFIGS[4], **{field: value})


def test_config_survives_json():
    assert from_json(ViViTConfig, to_json(CONFIGS[3])) == CONFIGS[3]
