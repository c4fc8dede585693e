"""Weights of ViT and ViViT: against NumPy in float64 and against transformers, both layouts, and the commands."""

import json
import math
import re

import jax
import numpy as np
import pytest
import safetensors.numpy
from helpers.models import read_model

from sora_jax.commands import convert_checkpoint
from sora_jax.convert.vit import convert_vit, from_npz, npz_config, to_npz, torch_config
from sora_jax.convert.vivit import convert_vivit
from sora_jax.convert.vivit import torch_config as vivit_config
from sora_jax.models.vit import ViT, ViTConfig
from sora_jax.models.vivit import ViViT, ViViTConfig

WIDTH, DEPTH, HEADS, MLP, PATCH, CLASSES = 16, 3, 2, 24, 4, 5
VALUES = {  # config.json of a small ViTForImageClassification, with an epsilon that its numbers show
    "model_type": "vit",
    "hidden_size": WIDTH,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": HEADS,
    "intermediate_size": MLP,
    "hidden_act": "gelu",
    "layer_norm_eps": 0.05,
    "image_size": 12,
    "patch_size": PATCH,
    "num_channels": 3,
}
VIDEO = {key: value for key, value in VALUES.items() if key != "patch_size"} | {
    "model_type": "vivit",
    "hidden_act": "gelu_fast",
    "num_frames": 6,
    "tubelet_size": [3, 4, 2],
}


def random_npz(class_token=True, representation=0, classes=CLASSES, places=9):
    """The tensors of an official file in which nothing is zero, one or symmetric."""
    rng, head_dim, state = np.random.default_rng(0), WIDTH // HEADS, {}

    def layer(name, kernel, bias):
        state[f"{name}/kernel"] = rng.normal(size=kernel, scale=math.prod(kernel[: len(kernel) - len(bias)]) ** -0.5)
        state[f"{name}/bias"] = rng.normal(size=bias, scale=0.3)

    def norm(name):
        state[f"{name}/scale"], state[f"{name}/bias"] = rng.normal(1, 0.3, WIDTH), rng.normal(size=WIDTH, scale=0.3)

    layer("embedding", (PATCH, PATCH, 3, WIDTH), (WIDTH,))
    if class_token:
        state["cls"] = rng.normal(size=(1, 1, WIDTH))
    state["Transformer/posembed_input/pos_embedding"] = rng.normal(size=(1, places + class_token, WIDTH))
    for i in range(DEPTH):
        block = f"Transformer/encoderblock_{i}"
        norm(f"{block}/LayerNorm_0")
        for part in ("query", "key", "value"):
            layer(f"{block}/MultiHeadDotProductAttention_1/{part}", (WIDTH, HEADS, head_dim), (HEADS, head_dim))
        layer(f"{block}/MultiHeadDotProductAttention_1/out", (HEADS, head_dim, WIDTH), (WIDTH,))
        norm(f"{block}/LayerNorm_2")
        layer(f"{block}/MlpBlock_3/Dense_0", (WIDTH, MLP), (MLP,))
        layer(f"{block}/MlpBlock_3/Dense_1", (MLP, WIDTH), (WIDTH,))
    norm("Transformer/encoder_norm")
    if representation:
        layer("pre_logits", (WIDTH, representation), (representation,))
    if classes:
        layer("head", (representation or WIDTH, classes), (classes,))
    return {name: value.astype(np.float32) for name, value in state.items()}


def numpy_vit(state, image):
    """The official network for one image in float64, written in its own layout."""
    w = {name: value.astype(np.float64) for name, value in state.items()}

    def norm(name, x):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * w[f"{name}/scale"] + w[f"{name}/bias"]

    def layer(name, x):
        return x @ w[f"{name}/kernel"] + w[f"{name}/bias"]

    windows = np.lib.stride_tricks.sliding_window_view(image, (PATCH, PATCH), axis=(0, 1))[::PATCH, ::PATCH]
    x = np.einsum("hwcij,ijcd->hwd", windows, w["embedding/kernel"]) + w["embedding/bias"]
    x = x.reshape(-1, WIDTH)
    if "cls" in w:
        x = np.concatenate([w["cls"][0], x])
    x = x + w["Transformer/posembed_input/pos_embedding"][0]
    for i in range(DEPTH):
        block = f"Transformer/encoderblock_{i}"
        attention = f"{block}/MultiHeadDotProductAttention_1"
        h = norm(f"{block}/LayerNorm_0", x)
        q, k, v = (
            np.einsum("ld,dhk->hlk", h, w[f"{attention}/{n}/kernel"]) + w[f"{attention}/{n}/bias"][:, None]
            for n in ("query", "key", "value")
        )
        weights = np.exp(q @ k.swapaxes(1, 2) / math.sqrt(q.shape[-1]))
        h = weights / weights.sum(-1, keepdims=True) @ v
        x = x + np.einsum("hlk,hkd->ld", h, w[f"{attention}/out/kernel"]) + w[f"{attention}/out/bias"]
        h = layer(f"{block}/MlpBlock_3/Dense_0", norm(f"{block}/LayerNorm_2", x))
        h = h * (1 + np.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3))) / 2
        x = x + layer(f"{block}/MlpBlock_3/Dense_1", h)
    x = norm("Transformer/encoder_norm", x)
    x = x[0] if "cls" in w else x.mean(0)
    if "pre_logits/kernel" in w:
        x = np.tanh(layer("pre_logits", x))
    return layer("head", x) if "head/kernel" in w else x


def as_torch(state, prefix="vit."):
    """An official file's tensors as transformers has them."""
    torch, heads = {}, "MultiHeadDotProductAttention_1"
    names = {
        f"{heads}/query": "attention.attention.query",
        f"{heads}/key": "attention.attention.key",
        f"{heads}/value": "attention.attention.value",
        f"{heads}/out": "attention.output.dense",
        "LayerNorm_0": "layernorm_before",
        "LayerNorm_2": "layernorm_after",
        "MlpBlock_3/Dense_0": "intermediate.dense",
        "MlpBlock_3/Dense_1": "output.dense",
    }
    for name, value in state.items():
        if match := re.fullmatch(r"Transformer/encoderblock_(\d+)/(.*)/(\w+)", name):
            i, layer, leaf = match.groups()
            if leaf == "kernel":
                rows = math.prod(value.shape[:-1]) if layer.endswith("out") else value.shape[0]
                value = value.reshape(rows, -1).T
            name = f"{prefix}encoder.layer.{i}.{names[layer]}.{'bias' if leaf == 'bias' else 'weight'}"
            torch[name] = value.ravel() if leaf != "kernel" else value
        elif name == "embedding/kernel":
            torch[f"{prefix}embeddings.patch_embeddings.projection.weight"] = np.einsum("...cd->dc...", value)
        elif name.startswith("head"):
            torch[f"classifier.{'bias' if name.endswith('bias') else 'weight'}"] = value.T
        else:
            top = {
                "embedding/bias": "embeddings.patch_embeddings.projection.bias",
                "cls": "embeddings.cls_token",
                "Transformer/posembed_input/pos_embedding": "embeddings.position_embeddings",
                "Transformer/encoder_norm/scale": "layernorm.weight",
                "Transformer/encoder_norm/bias": "layernorm.bias",
            }
            torch[prefix + top[name]] = value
    return {name: np.ascontiguousarray(value) for name, value in torch.items()}


def random_video():
    """A VivitForVideoClassification state dict."""
    state = random_npz(places=2 * 3 * 6)
    state["embedding/kernel"] = np.random.default_rng(1).normal(size=(3, 4, 2, 3, WIDTH), scale=0.2).astype(np.float32)
    return as_torch(state, "vivit.")


def images(*shape):
    return np.random.default_rng(2).uniform(-1, 1, shape).astype(np.float32)


def write_torch(folder, values, state):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "model.safetensors").write_bytes(safetensors.numpy.save(state))
    return folder


def write_files(folder, files):
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


def relative_error(found, expected):
    return np.abs(found - expected).max() / np.sqrt((expected**2).mean())


@pytest.fixture(scope="module")
def command():
    return convert_checkpoint.main


def test_command_writes_a_network_that_computes_as_numpy(tmp_path, command, capsys):
    state, output = random_npz(), tmp_path / "output"
    np.savez(tmp_path / "ViT.npz", **state)
    assert command(["vit", "--source", str(tmp_path / "ViT.npz"), "--output", str(output)]) == 0
    assert "model.safetensors" in capsys.readouterr().out
    config, params = read_model(output)
    x = images(2, 12, 12, 3)
    found = jax.jit(ViT(config).apply)({"params": params}, x)
    assert relative_error(found, np.stack([numpy_vit(state, image) for image in x])) < 2e-5


def test_a_model_without_class_token_for_oblong_images(tmp_path):
    state = random_npz(class_token=False, representation=7, places=8)
    config = npz_config(state, image_size=(16, 8))
    assert (config.pooling, config.representation_dim, config.grid) == ("mean", 7, (4, 2))
    x = images(2, 16, 8, 3)
    found = jax.jit(ViT(config).apply)({"params": from_npz(state, config)}, x)
    assert relative_error(found, np.stack([numpy_vit(state, image) for image in x])) < 2e-5


@pytest.mark.parametrize("options", [{}, {"class_token": False, "classes": 0}, {"representation": 7}])
def test_round_trip_is_exact(options):
    state = random_npz(**options)
    config = npz_config(state)
    back = to_npz(from_npz(state, config), config)
    assert back.keys() == state.keys()
    for name, value in state.items():
        np.testing.assert_array_equal(back[name], value)


@pytest.mark.parametrize("new_names", [False, True], ids=["files", "transformers-5"])
def test_all_layouts_are_one_network(tmp_path, new_names):
    state = random_npz()
    torch = as_torch(state)
    if new_names:
        for old, new in (
            ("encoder.layer", "layers"),
            ("attention.attention.query", "attention.q_proj"),
            ("attention.attention.key", "attention.k_proj"),
            ("attention.attention.value", "attention.v_proj"),
            ("attention.output.dense", "attention.o_proj"),
            ("intermediate.dense", "mlp.fc1"),
            ("output.dense", "mlp.fc2"),
        ):
            torch = {name.replace(old, new): value for name, value in torch.items()}
    source = write_torch(tmp_path / "torch", VALUES, torch)
    config, params = read_model(write_files(tmp_path / "ours", convert_vit(source)))
    assert config == torch_config(VALUES, CLASSES)
    assert (config.norm_eps, config.exact_gelu, config.num_classes) == (0.05, True, CLASSES)
    for name, value in to_npz(params, config).items():
        np.testing.assert_array_equal(value, state[name])


def test_video_command(tmp_path, command):
    source, output = write_torch(tmp_path / "torch", VIDEO, random_video()), tmp_path / "ours"
    assert command(["vivit", "--source", str(source), "--output", str(output)]) == 0
    config, params = read_model(output)
    sizes = dict(width=WIDTH, depth=DEPTH, num_heads=HEADS, mlp_dim=MLP, num_classes=CLASSES, norm_eps=0.05)
    assert config == ViViTConfig(num_frames=6, image_size=(12, 12), tubelet_size=(3, 4, 2), **sizes)
    kernel = random_video()["vivit.embeddings.patch_embeddings.projection.weight"]  # (D, C, t, h, w)
    at = ((2 * 4 + 1) * 2 + 1) * 3 + 2  # frame 2, row 1, column 1, channel 2 of a tubelet
    np.testing.assert_array_equal(params["patch_embedding"]["kernel"][at], kernel[:, 2, 2, 1, 1])


def test_tensors_that_do_not_fit_are_named():
    state = random_npz()
    config = npz_config(state)
    query = "Transformer/encoderblock_2/MultiHeadDotProductAttention_1/query/kernel"
    for name, value, words in (
        (query, None, "is missing"),
        (query, state[query].swapaxes(1, 2), r"must be \(16, 2, 8\), got \(16, 8, 2\)"),
        ("head/bias", state["head/bias"] * np.nan, "has a value that is not finite"),
        ("head/bias", state["head/bias"].astype(np.int8), "has dtype int8; weights must be of a floating-point one"),
    ):
        broken = {k: v for k, v in state.items() if k != name} | ({} if value is None else {name: value})
        with pytest.raises(ValueError, match=rf"{name} {words}"):
            from_npz(broken, config)
    with pytest.raises(ValueError, match=r"tensor conv_root/kernel is unknown"):
        from_npz({**state, "conv_root/kernel": np.zeros(1)}, config)
    with pytest.raises(ValueError, match=r"pos_embedding has 8 patches, which make no square"):
        npz_config(random_npz(places=8))
    for name in ("embedding/kernel", "Transformer/encoderblock_0/MlpBlock_3/Dense_0/kernel"):
        with pytest.raises(ValueError, match=rf"{name} is missing"):
            npz_config({k: v for k, v in state.items() if k != name})
        with pytest.raises(ValueError, match=rf"{name} must have \d axes, got shape \(3,\)"):
            npz_config({**state, name: np.zeros(3)})


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("model_type", "deit", "must be 'vit', got 'deit'"),
        ("qkv_bias", False, "must be True, got False"),
        ("hidden_act", "relu", "'gelu_pytorch_tanh', got 'relu'"),
        ("patch_size", None, "'patch_size' is missing"),
    ],
)
def test_options_that_are_another_network_are_named(option, value, words):
    values = {k: v for k, v in VALUES.items() if k != option} | ({} if value is None else {option: value})
    with pytest.raises(ValueError, match="vit config: ") as error:
        torch_config(values, 5)
    assert option in str(error.value) and words in str(error.value)


def test_video_options_that_are_missing_are_named():
    with pytest.raises(ValueError, match="vivit config: option 'tubelet_size' is missing"):
        vivit_config({k: v for k, v in VIDEO.items() if k != "tubelet_size"}, 5)


def test_command_errors_leave_nothing_behind(tmp_path, command, capsys):
    output, npz = tmp_path / "output", tmp_path / "ViT.npz"

    def fails(kind, path, words):
        assert command([kind, "--source", str(path), "--output", str(output)]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and words in error and not output.exists(), error

    fails("vit", npz, "no ViT at")
    fails("vivit", tmp_path / "nowhere", "no ViViT at")
    np.savez(npz, **random_npz())
    data = npz.read_bytes()
    npz.write_bytes(data[: len(data) // 2])
    fails("vit", npz, "ViT.npz cannot be converted: not a whole .npz file")
    npz.write_bytes(b"")
    fails("vit", npz, "not a whole .npz file")
    video = random_video()
    key = "vivit.encoder.layer.1.output.dense.weight"
    source = write_torch(tmp_path / "torch", VIDEO, {k: v for k, v in video.items() if k != key})
    fails("vivit", source, f"tensor {key} is missing")
    fails("vit", source, "model_type must be 'vit', got 'vivit'")
    fails("vivit", source / "config.json", "config.json cannot be converted: it has no weight_map")
    weights = source / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    fails("vivit", source, "model.safetensors is not a whole safetensors file")
    (source / "config.json").unlink()
    fails("vivit", weights, "no config of a ViViT at")


@pytest.fixture(scope="module")
def peers():
    return (
        pytest.importorskip("torch", reason="needs .[parity]"),
        pytest.importorskip("transformers", reason="needs .[parity]"),
    )


@pytest.mark.parity
@pytest.mark.parametrize(("size", "act"), [(12, "gelu"), ((16, 8), "gelu_new")], ids=["square", "oblong"])
def test_vit_outputs_equal_transformers(size, act, peers, tmp_path):
    torch, transformers = peers
    values = VALUES | {"image_size": size, "hidden_act": act}
    config = transformers.ViTConfig(**{k: v for k, v in values.items() if k != "model_type"}, num_labels=CLASSES)
    model = randomised(torch, transformers.ViTForImageClassification(config))
    height, width = (size, size) if isinstance(size, int) else size
    x = images(2, height, width, 3)
    with torch.no_grad():
        theirs = model(torch.from_numpy(x.transpose(0, 3, 1, 2))).logits.numpy()
    model.save_pretrained(tmp_path / "safetensors")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "config.json").write_bytes((tmp_path / "safetensors" / "config.json").read_bytes())
    torch.save(model.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    files = [convert_vit(tmp_path / name) for name in ("safetensors", "bin")]
    assert files[0] == files[1]
    ours, params = read_model(write_files(tmp_path / "ours", files[0]))
    assert isinstance(ours, ViTConfig) and ours.image_size == (height, width)
    assert relative_error(jax.jit(ViT(ours).apply)({"params": params}, x), theirs) < 1e-4


@pytest.mark.parity
@pytest.mark.parametrize("act", ["gelu_fast", "gelu"])
def test_vivit_outputs_equal_transformers(act, peers, tmp_path):
    torch, transformers = peers
    values = {k: v for k, v in VIDEO.items() if k != "model_type"} | {"hidden_act": act}
    model = randomised(
        torch, transformers.VivitForVideoClassification(transformers.VivitConfig(**values, num_labels=5))
    )
    x = images(2, 6, 12, 12, 3)
    with torch.no_grad():
        theirs = model(torch.from_numpy(x.transpose(0, 1, 4, 2, 3))).logits.numpy()
    model.save_pretrained(tmp_path / "theirs")
    config, params = read_model(write_files(tmp_path / "ours", convert_vivit(tmp_path / "theirs")))
    assert relative_error(jax.jit(ViViT(config).apply)({"params": params}, x), theirs) < 1e-4


def randomised(torch, model):
    """The model with weights in which nothing is zero, one or symmetric."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, value in model.named_parameters():
            value.normal_(1.0 if "layernorm" in name and name.endswith("weight") else 0.05, 0.3)
    return model.eval()
