"""Hybrids' weights: the official layout there and back, and outputs against timm and transformers."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
import safetensors.numpy
from flax import linen as nn
from flax import traverse_util
from helpers.models import read_model
from helpers.trees import random_tree

from sora_jax.convert.vit import convert_vit, from_npz, npz_config, to_npz
from sora_jax.convert.vit_hybrid import TIMM_EPSILONS, npz_stem, timm_to_npz
from sora_jax.models.resnet_stem import ResNetStem, ResNetStemConfig
from sora_jax.models.vit import VIT_SIZES, ViT, ViTConfig, abstract_params
from sora_jax.provenance import flat_names

SIZES = dict(width=64, depth=2, num_heads=1, mlp_dim=24, num_classes=5)
CONFIG = ViTConfig((32, 32), patch_size=16, **SIZES, exact_gelu=False, stem=ResNetStemConfig((2, 1), width=32))
ROOT = dataclasses.replace(CONFIG, stem=ResNetStemConfig((), width=32), pooling="mean")


def random_params(config):
    return random_tree(abstract_params(ViT(config)))


def official(config):
    """The tensors of a published file, whose group norms have leading ones."""
    tensors = to_npz(random_params(config), config)
    return {
        name: value.reshape(1, 1, 1, -1) if re.search(r"gn(_root|_proj|\d)/", name) else value
        for name, value in tensors.items()
    }


def as_timm(tensors):
    """An official file's tensors as timm has them."""
    names = {
        "cls": "cls_token",
        "Transformer/posembed_input/pos_embedding": "pos_embed",
        "conv_root": "patch_embed.backbone.stem.conv",
        "gn_root": "patch_embed.backbone.stem.norm",
        "embedding": "patch_embed.proj",
        "Transformer/encoder_norm": "norm",
        "head": "head",
        "LayerNorm_0": "norm1",
        "LayerNorm_2": "norm2",
        "MultiHeadDotProductAttention_1/out": "attn.proj",
        "MlpBlock_3/Dense_0": "mlp.fc1",
        "MlpBlock_3/Dense_1": "mlp.fc2",
    }
    found = {}
    for name, value in tensors.items():
        layer, _, leaf = name.rpartition("/")
        if name in names:
            found[names[name]] = value
            continue
        leaf = "bias" if leaf == "bias" else "weight"
        if value.ndim == 4:
            value = value.ravel() if value.shape[:3] == (1, 1, 1) and "gn" in layer else np.einsum("hwio->oihw", value)
        elif "MultiHead" in layer and leaf == "weight":
            value = value.reshape(64, 64).T  # one head
        elif "MultiHead" in layer:
            value = value.ravel()
        else:
            value = value.T
        if block := re.fullmatch(r"Transformer/encoderblock_(\d+)/(.+)", layer):
            part = names.get(block[2], "attn." + block[2].rpartition("/")[2])
            layer = f"blocks.{block[1]}.{part}"
        elif unit := re.fullmatch(r"block(\d+)/unit(\d+)/(conv|gn)(.*)", layer):
            kind = {"conv": "conv", "gn": "norm"}[unit[3]]
            part = f"downsample.{kind}" if unit[4] == "_proj" else kind + unit[4]
            layer = f"patch_embed.backbone.stages.{int(unit[1]) - 1}.blocks.{int(unit[2]) - 1}.{part}"
        else:
            layer = names[layer]
        found[f"{layer}.{leaf}"] = value
    for n in range(SIZES["depth"]):
        for leaf in ("weight", "bias"):
            parts = [found.pop(f"blocks.{n}.attn.{part}.{leaf}") for part in ("query", "key", "value")]
            found[f"blocks.{n}.attn.qkv.{leaf}"] = np.concatenate(parts)
    return {name: np.ascontiguousarray(value) for name, value in found.items()}


def write(folder, state):
    folder.mkdir()
    safetensors.numpy.save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"architecture": "vit_base_r50_s16_224"}))
    return folder


def load_converted(folder, source):
    folder.mkdir()
    for name, data in convert_vit(source).items():
        (folder / name).write_bytes(data)
    return read_model(folder)


@pytest.mark.parametrize("config", [CONFIG, ROOT], ids=["stages", "root"])
def test_a_published_file_there_and_back(config, tmp_path):
    tensors, params = official(config), random_params(config)
    assert npz_config(tensors) == config
    np.savez(tmp_path / "R+ViT.npz", **tensors)
    found_config, found = load_converted(tmp_path / "ours", tmp_path / "R+ViT.npz")
    assert found_config == config
    for name, value in flat_names(found).items():
        np.testing.assert_array_equal(value, flat_names(params)[name])
    back = to_npz(found, config)
    assert back.keys() == tensors.keys()
    for name, value in tensors.items():
        np.testing.assert_array_equal(back[name], value.ravel() if "gn" in name else value)


def test_official_names():
    """Of the official code's variables, and the shapes of R50+ViT-B/16."""
    config = VIT_SIZES["vit_r50_b_16"]
    tensors = to_npz(
        jax.tree.map(lambda leaf: np.zeros(leaf.shape, bool), nn.meta.unbox(abstract_params(ViT(config)))), config
    )
    for name, shape in {
        "conv_root/kernel": (7, 7, 3, 64),
        "gn_root/scale": (64,),
        "block1/unit1/conv_proj/kernel": (1, 1, 64, 256),
        "block1/unit1/gn_proj/bias": (256,),
        "block1/unit3/conv1/kernel": (1, 1, 256, 64),
        "block2/unit4/conv2/kernel": (3, 3, 128, 128),
        "block3/unit9/conv3/kernel": (1, 1, 256, 1024),
        "block3/unit9/gn3/scale": (1024,),
        "embedding/kernel": (1, 1, 1024, 768),
        "Transformer/posembed_input/pos_embedding": (1, 197, 768),
    }.items():
        assert tensors[name].shape == shape, name
    assert "block1/unit2/conv_proj/kernel" not in tensors and "block4/unit1/conv1/kernel" not in tensors


def test_timms_layout_is_the_same_network(tmp_path):
    config, params = load_converted(tmp_path / "ours", write(tmp_path / "timm", as_timm(official(CONFIG))))
    stem = dataclasses.replace(CONFIG.stem, norm_eps=1e-5, kernel_eps=1e-8)
    assert config == dataclasses.replace(CONFIG, exact_gelu=True, stem=stem)
    for name, value in flat_names(random_params(CONFIG)).items():
        np.testing.assert_array_equal(flat_names(params)[name], value)


def test_tensors_that_do_not_fit_are_named(tmp_path):
    tensors = official(CONFIG)
    without = lambda name: {key: value for key, value in tensors.items() if key != name}  # noqa: E731
    for name in ("block1/unit2/gn1/scale", "block2/unit1/conv_proj/kernel", "gn_root/bias"):
        with pytest.raises(ValueError, match=f"tensor {name} is missing"):
            from_npz(without(name), CONFIG)
    with pytest.raises(ValueError, match=r"conv_root/kernel must have 4 axes, got shape \(3,\)"):
        npz_config({**tensors, "conv_root/kernel": np.zeros(3)})
    with pytest.raises(ValueError, match="width must be a positive multiple of 32, got 12"):
        npz_config({**tensors, "conv_root/kernel": np.zeros((7, 7, 3, 12))})
    with pytest.raises(ValueError, match=r"must be \(3, 3, 32, 32\), got \(3, 3, 32, 31\)"):
        name = "block1/unit1/conv2/kernel"
        from_npz({**tensors, name: tensors[name][..., 1:]}, CONFIG)
    state = as_timm(tensors)
    for name, value, words in (
        ("blocks.0.ls1.gamma", np.ones(64, np.float32), "tensor blocks.0.ls1.gamma is unknown"),
        ("blocks.0.attn.qkv.bias", np.ones(144, np.float32), "width must be a multiple of 64, .* got 48"),
    ):
        with pytest.raises(ValueError, match=f"model.safetensors cannot be converted: .*{words}"):
            convert_vit(write(tmp_path / words[:6], {**state, name: value}))


@pytest.fixture(scope="module")
def peers():
    try:
        import timm
        import torch
    except (ImportError, RuntimeError) as error:  # a torchvision built for another PyTorch raises RuntimeError
        pytest.skip(f"needs timm and a torchvision that fits PyTorch: {error}")
    return torch, timm


# Not among the parity tests, all of which must run: timm needs a torchvision that fits the installed PyTorch.
@pytest.mark.parametrize(("name", "size"), [("vit_small_r26_s32_224", 64), ("vit_tiny_r_s16_p8_224", 96)])
def test_outputs_equal_timm(name, size, peers, tmp_path):
    torch, timm = peers
    torch.manual_seed(0)
    model = timm.create_model(name, img_size=size, num_classes=5, depth=2).eval()
    with torch.no_grad():
        for key, value in model.named_parameters():
            norm = "norm" in key and key.endswith("weight")
            value.normal_(1.0 if norm else 0.0, 0.3 if value.ndim == 1 else 0.1)
    x = np.random.default_rng(1).uniform(-1, 1, (2, size, size, 3)).astype(np.float32)
    with torch.no_grad():
        theirs = model(torch.from_numpy(x.transpose(0, 3, 1, 2))).numpy()
    state = {key: value.numpy() for key, value in model.state_dict().items()}
    config, params = load_converted(tmp_path / "ours", write(tmp_path / "timm", state))
    assert config.image_size == (size, size)
    ours = jax.jit(ViT(config).apply)({"params": params}, x)
    assert np.abs(ours - theirs).max() / np.sqrt((theirs**2).mean()) < 1e-4


@pytest.mark.parity
def test_features_equal_transformers():
    """`BitModel` as the hybrids of transformers had it; its names differ from timm's in the prefixes alone."""
    torch = pytest.importorskip("torch", reason="needs .[parity]")
    transformers = pytest.importorskip("transformers", reason="needs .[parity]")
    sizes = dict(embedding_size=32, hidden_sizes=[128, 256], depths=[2, 1], num_groups=32)
    padding = dict(global_padding="same", embedding_dynamic_padding=True)
    model = transformers.BitModel(transformers.BitConfig(layer_type="bottleneck", **sizes, **padding)).eval()
    torch.manual_seed(0)
    x = np.random.default_rng(1).uniform(-1, 1, (2, 24, 20, 3)).astype(np.float32)
    with torch.no_grad():
        for key, value in model.named_parameters():
            norm = "norm" in key and key.endswith("weight")
            value.normal_(1.0 if norm else 0.0, 0.3 if value.ndim == 1 else 0.1)
        theirs = model(torch.from_numpy(x.transpose(0, 3, 1, 2))).last_hidden_state.numpy().transpose(0, 2, 3, 1)
    state = {}
    for key, value in model.state_dict().items():
        key = key.replace("embedder.convolution", "stem.conv").replace("embedder.norm", "stem.norm")
        key = key.replace("encoder.stages", "stages").replace(".layers.", ".blocks.")
        state[f"patch_embed.backbone.{key}"] = value.numpy()
    tensors = timm_to_npz(state)
    config = dataclasses.replace(npz_stem(tensors), **TIMM_EPSILONS)
    assert (config.stages, config.width) == ((2, 1), 32)
    params = traverse_util.unflatten_dict(tensors, sep="/")
    ours = jax.jit(ResNetStem(config, "float32").apply)({"params": params}, x)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() / np.sqrt((theirs**2).mean()) < 1e-4
