"""The ResNet before the patches: against NumPy in float64, and as what it is to a ViT."""

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
from sora_jax.models.resnet_stem import ResNetStem, ResNetStemConfig, Unit
from sora_jax.models.vit import VIT_SIZES, ViT, ViTConfig, abstract_params
from sora_jax.parallel.rules import param_shardings
from sora_jax.provenance import flat_names
from sora_jax.training.flops import count_flops

pytestmark = pytest.mark.slow

STEM = ResNetStemConfig(stages=(1, 2), width=32, norm_eps=0.01, kernel_eps=0.02)  # epsilons that show
CONFIG = ViTConfig((16, 24), patch_size=8, width=16, depth=1, num_heads=2, mlp_dim=24, num_classes=5, stem=STEM)


def images(height, width, batch=2):
    return np.random.default_rng(1).uniform(-1, 1, (batch, height, width, 3)).astype(np.float32)


def stem_params():
    return random_tree(jax.eval_shape(ResNetStem(STEM, "float32").init, jax.random.key(0), images(16, 24))["params"])


@functools.partial(jax.jit, static_argnums=0)
def forward(model, params, x):
    return model.apply({"params": params}, x)


def windows(x, size, stride, fill):
    """The windows (h, w, size, size, C) of TensorFlow's `SAME` padding, whose odd zero lies behind."""
    pads = []
    for side in x.shape[:2]:
        missing = max((math.ceil(side / stride) - 1) * stride + size - side, 0)
        pads.append((missing // 2, missing - missing // 2))
    x = np.pad(x, (*pads, (0, 0)), constant_values=fill)
    found = np.lib.stride_tricks.sliding_window_view(x, (size, size), axis=(0, 1))[::stride, ::stride]
    return found.transpose(0, 1, 3, 4, 2)


def numpy_stem(params, image):
    """The features of one image in float64, written from the official code's description of its network."""
    w = {name: np.asarray(value, np.float64) for name, value in flat_names(params).items()}

    def conv(name, x, stride=1):
        kernel = w[f"{name}.kernel"]
        kernel = kernel - kernel.mean(axis=(0, 1, 2))
        kernel = kernel / (np.sqrt((kernel**2).mean(axis=(0, 1, 2))) + STEM.kernel_eps)
        return np.einsum("hwijc,ijco->hwo", windows(x, kernel.shape[0], stride, 0), kernel)

    def norm(name, x):
        groups = x.reshape(*x.shape[:2], 32, -1)
        groups = groups - groups.mean(axis=(0, 1, 3), keepdims=True)
        groups = groups / np.sqrt((groups**2).mean(axis=(0, 1, 3), keepdims=True) + STEM.norm_eps)
        return groups.reshape(x.shape) * w[f"{name}.scale"] + w[f"{name}.bias"]

    relu = lambda x: np.maximum(x, 0)  # noqa: E731
    x = relu(norm("gn_root", conv("conv_root", image.astype(np.float64), 2)))
    x = windows(x, 3, 2, -np.inf).max(axis=(2, 3))
    for unit, stride in (("block1.unit1", 1), ("block2.unit1", 2), ("block2.unit2", 1)):
        s = norm(f"{unit}.gn_proj", conv(f"{unit}.conv_proj", x, stride)) if unit.endswith("1") else x
        x = relu(norm(f"{unit}.gn1", conv(f"{unit}.conv1", x)))
        x = relu(norm(f"{unit}.gn2", conv(f"{unit}.conv2", x, stride)))
        x = relu(s + norm(f"{unit}.gn3", conv(f"{unit}.conv3", x)))
    return x


@pytest.mark.parametrize(("height", "width"), [(16, 24), (21, 9)])
def test_features_equal_numpy(height, width):
    params, x = stem_params(), images(height, width)
    found = forward(ResNetStem(STEM, "float32"), params, x)
    expected = np.stack([numpy_stem(params, image) for image in x])
    assert found.shape == (2, -(-height // 8), -(-width // 8), STEM.out_channels) == expected.shape
    np.testing.assert_allclose(found, expected, atol=3e-5 * np.sqrt((expected**2).mean()))


def test_scale_and_mean_of_a_kernel_do_not_matter():
    params, x = stem_params(), images(16, 24)
    changed = jax.tree_util.tree_map_with_path(
        lambda path, leaf: 3 * leaf + 2 if path[-1].key == "kernel" else leaf, params
    )
    model = ResNetStem(dataclasses.replace(STEM, kernel_eps=1e-8), "float32")
    expected = forward(model, params, x)
    np.testing.assert_allclose(forward(model, changed, x), expected, atol=1e-4 * np.sqrt((expected**2).mean()))


def test_a_hybrid_is_a_vit_of_the_features():
    """With one place of the features a patch, the rest of the network is that of images of so many channels."""
    params, x = random_tree(abstract_params(ViT(CONFIG))), images(16, 24)
    features = forward(ResNetStem(STEM, "float32"), params["stem"], x)
    plain = dataclasses.replace(CONFIG, image_size=(2, 3), patch_size=1, channels=STEM.out_channels, stem=None)
    rest = {name: value for name, value in params.items() if name != "stem"}
    np.testing.assert_allclose(forward(ViT(CONFIG), params, x), forward(ViT(plain), rest, features), rtol=1e-4)
    assert CONFIG.grid == plain.grid == (2, 3)


def test_every_parameter_is_used_and_has_known_axes():
    boxed = abstract_params(ViT(CONFIG))
    param_shardings(boxed, Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "fsdp")))
    stem, x = stem_params(), images(16, 24)
    loss = lambda params: (forward(ResNetStem(STEM, "float32"), params, x) ** 2).sum()  # noqa: E731
    for name, leaf in flat_names(jax.jit(jax.grad(loss))(stem)).items():
        assert (np.abs(leaf) > 1e-7).any(), name


def test_at_first_a_unit_passes_on_its_shortcut():
    unit, x = Unit(32, 1, STEM, "float32"), np.random.default_rng(0).uniform(-1, 1, (1, 2, 3, 128)).astype(np.float32)
    found, variables = jax.jit(unit.init_with_output)(jax.random.key(0), x)
    np.testing.assert_array_equal(found, np.maximum(x, 0))
    assert {name for name, leaf in flat_names(nn.meta.unbox(variables["params"])).items() if not leaf.any()} == {
        "gn1.bias", "gn2.bias", "gn3.bias", "gn3.scale"
    }  # fmt: skip


def test_the_dtype_is_that_of_the_computation():
    function = functools.partial(forward, ResNetStem(STEM, "bfloat16"))
    assert jax.eval_shape(function, stem_params(), images(16, 24)).dtype == jnp.bfloat16


@pytest.mark.parametrize(
    ("name", "size", "num_params", "giga_macs"),
    [
        ("vit_r_ti_32", 224, 6_337_704, 0.43368192),
        ("vit_r26_s_32", 224, 36_431_912, 3.463851008),
        ("vit_r26_b_32", 224, 101_383_976, 6.710859776),
        ("vit_r50_b_16", 224, 98_659_112, 21.535358976),
        ("vit_r50_b_16", 384, 98_950_952, 67.155787776),
        ("vit_r50_l_32", 224, 328_994_856, 19.413295104),
    ],
)
def test_the_published_hybrids(name, size, num_params, giga_macs):
    """Counted by instantiating timm 1.0.31's with 1000 classes, and by PyTorch's FlopCounterMode on them."""
    config = dataclasses.replace(VIT_SIZES[name], image_size=(size, size))
    params = nn.meta.unbox(abstract_params(ViT(config)))
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params)) == num_params
    image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
    found = count_flops(lambda p, x: ViT(config).apply({"params": p}, x), params, image) / 2e9
    assert found == pytest.approx(giga_macs, rel=1e-9)


def test_configs():
    assert from_json(ViTConfig, to_json(CONFIG)) == CONFIG
    assert (STEM.stride, STEM.out_channels) == (8, 256)
    root = ResNetStemConfig(stages=())
    assert (root.stride, root.out_channels) == (4, 64)
    plain = dataclasses.replace(CONFIG, stem=None)
    old = to_json(plain).replace(',\n  "stem": null', "")  # written before the field was
    assert "stem" not in old and from_json(ViTConfig, old) == plain
    for make, words in (
        (lambda: dataclasses.replace(STEM, width=48), "width must be a positive multiple of 32, got 48"),
        (lambda: dataclasses.replace(STEM, stages=(1, 0)), r"stages must be at least 1 each, got \(1, 0\)"),
        (lambda: dataclasses.replace(STEM, norm_eps=0.0), "norm_eps must be positive"),
        (lambda: dataclasses.replace(STEM, kernel_eps=0.0), "kernel_eps must be positive"),
        (lambda: dataclasses.replace(CONFIG, patch_size=4), "patch_size must be a multiple of the stem's stride 8"),
    ):
        with pytest.raises(ValueError, match=words):
            make()
