"""DiT's weights: the official layout and diffusers', against each other and against diffusers' network."""

import argparse
import dataclasses
import functools
import json
import re

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from helpers.models import read_model
from torch_files import torch_bytes

from sora_jax.commands import convert_checkpoint
from sora_jax.convert.dit import convert_dit, diffusers_config, from_diffusers, from_official, official_config
from sora_jax.models.dit import DIT_SIZES, DiT, DiTConfig
from sora_jax.provenance import flat_names

WIDTH, DEPTH, CLASSES = 16, 3, 10
CONFIG = DiTConfig(image_size=(8, 8), width=WIDTH, depth=DEPTH, num_heads=2, mlp_dim=64, num_classes=CLASSES)
VALUES = {  # config.json of a small DiTTransformer2DModel
    "_class_name": "DiTTransformer2DModel",
    "_diffusers_version": "0.42.1",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_head_dim": 8,
    "dropout": 0.0,
    "in_channels": 4,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "norm_type": "ada_norm_zero",
    "num_attention_heads": 2,
    "num_embeds_ada_norm": CLASSES,
    "num_layers": DEPTH,
    "out_channels": 8,
    "patch_size": 2,
    "sample_size": 8,
    "upcast_attention": False,
}
PUBLISHED = {  # transformer/config.json of facebook/DiT-XL-2-256
    "_class_name": "Transformer2DModel",
    "_diffusers_version": "0.12.0.dev0",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_head_dim": 72,
    "cross_attention_dim": None,
    "dropout": 0.0,
    "in_channels": 4,
    "norm_elementwise_affine": False,
    "norm_num_groups": 32,
    "norm_type": "ada_norm_zero",
    "num_attention_heads": 16,
    "num_embeds_ada_norm": 1000,
    "num_layers": 28,
    "num_vector_embeds": None,
    "only_cross_attention": False,
    "out_channels": 8,
    "patch_size": 2,
    "sample_size": 32,
    "upcast_attention": False,
    "use_linear_projection": False,
}


def positions():
    """The fixed table of 4 x 4 patches: sines and cosines of x, then of y."""
    y, x = (axis.ravel() for axis in np.meshgrid(np.arange(4), np.arange(4), indexing="ij"))
    angles = [axis[:, None] / 10000 ** (np.arange(WIDTH // 4) / (WIDTH // 4)) for axis in (x, y)]
    return np.concatenate([f(a) for a in angles for f in (np.sin, np.cos)], axis=1)[None].astype(np.float32)


@functools.cache
def official():
    """An official state dict in which no weight is zero or like another."""
    rng = np.random.default_rng(0)
    shapes = {
        "x_embedder.proj.weight": (WIDTH, 4, 2, 2),
        "t_embedder.mlp.0.weight": (WIDTH, 256),
        "t_embedder.mlp.2.weight": (WIDTH, WIDTH),
        "y_embedder.embedding_table.weight": (CLASSES + 1, WIDTH),
        "final_layer.adaLN_modulation.1.weight": (2 * WIDTH, WIDTH),
        "final_layer.linear.weight": (32, WIDTH),
    }
    for i in range(DEPTH):
        for name, out, inputs in (
            ("attn.qkv", 3 * WIDTH, WIDTH),
            ("attn.proj", WIDTH, WIDTH),
            ("mlp.fc1", 64, WIDTH),
            ("mlp.fc2", WIDTH, 64),
            ("adaLN_modulation.1", 6 * WIDTH, WIDTH),
        ):
            shapes[f"blocks.{i}.{name}.weight"] = (out, inputs)
    shapes |= {n.replace("weight", "bias"): s[:1] for n, s in shapes.items() if "table" not in n}
    state = {n: rng.normal(0.02, 0.7 * np.prod(s[1:]) ** -0.5, s).astype(np.float32) for n, s in shapes.items()}
    return state | {"pos_embed": positions()}


def as_diffusers(state):
    """An official state dict as diffusers has it: renamed, queries, keys and values apart, embeddings in each block."""
    renamed = {}
    names = {
        "x_embedder.proj": "pos_embed.proj",
        "final_layer.adaLN_modulation.1": "proj_out_1",
        "final_layer.linear": "proj_out_2",
        "attn.proj": "attn1.to_out.0",
        "mlp.fc1": "ff.net.0.proj",
        "mlp.fc2": "ff.net.2",
        "adaLN_modulation.1": "norm1.linear",
        "t_embedder.mlp.0": "timestep_embedder.linear_1",
        "t_embedder.mlp.2": "timestep_embedder.linear_2",
        "y_embedder": "class_embedder",
    }
    for name, value in state.items():
        if name == "pos_embed":
            continue
        block = re.match(r"blocks\.\d+\.", name)
        stem = name[block.end() :] if block else name
        prefix = f"transformer_{block[0]}" if block else ""
        if stem.startswith("attn.qkv"):
            for letter, part in zip("qkv", np.split(value, 3), strict=True):
                renamed[f"{prefix}attn1.to_{letter}.{stem.rsplit('.')[-1]}"] = part
            continue
        old = next(old for old in names if stem.startswith(old))
        stem = stem.replace(old, names[old])
        copies = [prefix] if "embedder." not in stem else [f"transformer_blocks.{i}.norm1.emb." for i in range(DEPTH)]
        renamed |= {copy + stem: value for copy in copies}
    return renamed


def write_diffusers(folder, values=VALUES, state=None):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    data = safetensors.numpy.save({n: np.ascontiguousarray(v) for n, v in (state or as_diffusers(official())).items()})
    (folder / "diffusion_pytorch_model.safetensors").write_bytes(data)
    return folder


def write_files(folder, files):
    folder.mkdir(exist_ok=True)
    for name, data in files.items():
        (folder / name).write_bytes(data)
    return folder


@pytest.fixture(scope="module")
def command():
    return convert_checkpoint.main


@pytest.fixture
def stored(tmp_path):
    """Writes a file as torch.save does."""

    def write(values, name="DiT.pt"):
        (tmp_path / name).write_bytes(torch_bytes(values))
        return str(tmp_path / name)

    return write


def test_values_of_an_official_file_stand_where_they_belong(command, stored, tmp_path, capsys):
    checkpoint = {"model": {"a": np.zeros(1)}, "ema": official(), "opt": {"state": {}}, "args": {}}
    arguments = ["dit", "--source", stored(checkpoint), "--output", str(tmp_path / "ours"), "--num-heads", "2"]
    assert command(arguments) == 0 and "model.safetensors" in capsys.readouterr().out
    config, params = read_model(tmp_path / "ours")
    assert config == CONFIG
    state, ours = official(), flat_names(params)
    at = (1 * 2 + 0) * 4 + 3  # row 1, column 0, channel 3 of a patch
    np.testing.assert_array_equal(ours["patch_embedding.kernel"][at], state["x_embedder.proj.weight"][:, 3, 1, 0])
    np.testing.assert_array_equal(ours["label_embedding"], state["y_embedder.embedding_table.weight"])
    for n, part in enumerate(("query", "key", "value")):
        rows = slice(n * WIDTH, (n + 1) * WIDTH)
        kernel, bias = ours[f"blocks.self_attention.{part}.kernel"], ours[f"blocks.self_attention.{part}.bias"]
        np.testing.assert_array_equal(kernel[2], state["blocks.2.attn.qkv.weight"][rows].T)
        np.testing.assert_array_equal(bias[1], state["blocks.1.attn.qkv.bias"][rows])
    np.testing.assert_array_equal(ours["blocks.modulation.kernel"][0], state["blocks.0.adaLN_modulation.1.weight"].T)
    np.testing.assert_array_equal(ours["time_fc2.bias"], state["t_embedder.mlp.2.bias"])


def test_both_layouts_are_one_network(tmp_path):
    config = diffusers_config(VALUES)
    assert config == dataclasses.replace(CONFIG, frequency_endpoint=True)
    assert diffusers_config(VALUES, official_frequencies=True) == CONFIG
    expected = from_official(official(), CONFIG)
    old = as_diffusers(official()) | {"pos_embed.pos_embed": positions()}
    for state in (as_diffusers(official()), old):
        found = from_diffusers(state, config)
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_array_equal(found[name], value, err_msg=name)
    write_diffusers(tmp_path / "pipeline" / "transformer")
    assert convert_dit(tmp_path / "pipeline") == convert_dit(tmp_path / "pipeline" / "transformer")


def test_published_sizes_are_known():
    assert diffusers_config(PUBLISHED, official_frequencies=True) == DIT_SIZES["dit_xl_2"]
    plain = diffusers_config({k: v for k, v in VALUES.items() if k != "out_channels"})
    assert not plain.learned_variance and plain.out_channels == 4
    names = {
        "x_embedder.proj.weight": (768, 4, 8, 8),
        "pos_embed": (1, 16, 768),
        **{f"blocks.{i}.attn.proj.bias": (768,) for i in range(12)},
    }
    names |= {"blocks.0.mlp.fc1.weight": (3072, 768), "y_embedder.embedding_table.weight": (1001, 768)}
    names |= {"final_layer.linear.weight": (512, 768), "t_embedder.mlp.0.weight": (768, 256)}
    assert official_config({name: np.zeros(shape) for name, shape in names.items()}) == DIT_SIZES["dit_b_8"]
    with pytest.raises(ValueError, match=r"no published DiT has width 16 and depth 3, so that num_heads must be given"):
        official_config(official())


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("_class_name", "UNet2DModel", "must be 'DiTTransformer2DModel' or 'Transformer2DModel', got 'UNet2DModel'"),
        ("norm_type", "ada_norm", "must be 'ada_norm_zero', got 'ada_norm'"),
        ("activation_fn", "gelu", "must be 'gelu-approximate', got 'gelu'"),
        ("norm_eps", 0.1, "must be 1e-05 or 1e-06, got 0.1"),
        ("out_channels", 6, "must be 4 or 8, got 6"),
        ("num_layers", "3", "must be a positive integer, got '3'"),
        ("wings", 2, "'wings' is unknown"),
        ("sample_size", ..., "'sample_size' is missing"),
    ],
)
def test_options_that_are_another_network_are_named(option, value, words):
    with pytest.raises(ValueError) as error:
        diffusers_config({k: v for k, v in (VALUES | {option: value}).items() if v is not ...})
    assert option in str(error.value) and words in str(error.value)


def test_tensors_that_do_not_fit_are_named():
    qkv, state = "blocks.1.attn.qkv.weight", official()
    for name, value, words in (
        (qkv, None, "is missing"),
        (qkv, state[qkv][:-1], r"must be \(48, 16\), got \(47, 16\)"),
        (qkv, state[qkv].T, r"must be \(48, 16\), got \(16, 48\)"),
        (qkv, np.where(np.arange(48)[:, None] == 47, np.nan, state[qkv]), "has a value that is not finite"),
        ("pos_embed", state["pos_embed"][..., ::-1], "is not the fixed embedding of a grid of 4 x 4 patches"),
        ("pos_embed", None, "is missing"),
        ("pos_embed", state["pos_embed"][:, :9], r"must be \(1, 16, 16\), got \(1, 9, 16\)"),
        ("t_embedder.mlp.9.weight", np.zeros(1), "is unknown"),
    ):
        broken = {k: v for k, v in state.items() if k != name} | ({} if value is None else {name: value})
        with pytest.raises(ValueError, match=rf"{name} {words}"):
            from_official(broken, CONFIG)
    state, copy = as_diffusers(official()), "transformer_blocks.2.norm1.emb.timestep_embedder.linear_1.bias"
    with pytest.raises(ValueError, match=rf"{copy} must equal transformer_blocks\.0\.norm1"):
        from_diffusers(state | {copy: state[copy] + 1}, diffusers_config(VALUES))
    with pytest.raises(ValueError, match=rf"tensor {copy} is missing"):
        from_diffusers({k: v for k, v in state.items() if k != copy}, diffusers_config(VALUES))


@pytest.mark.parametrize(
    ("rows", "asked", "classes", "label_rows", "said"),
    [
        (11, None, 10, None, "10 classes and the null class are assumed; .* give --num-classes 11"),
        (11, 10, 10, None, ""),
        (11, 11, 11, 11, ""),
        (1, None, 1, 1, "1 class and no null class"),
        (1, 1, 1, 1, ""),
    ],
)
def test_a_label_table_is_of_as_many_classes_as_is_said(rows, asked, classes, label_rows, said, caplog):
    caplog.set_level("INFO")
    table = np.resize(official()["y_embedder.embedding_table.weight"], (rows, WIDTH))
    state = official() | {"y_embedder.embedding_table.weight": table}
    config = official_config(state, 2, asked)
    assert (config.num_classes, config.num_label_rows) == (classes, label_rows)
    assert re.search(said, caplog.text) if said else not caplog.text
    np.testing.assert_array_equal(from_official(state, config)["label_embedding"], table)


def test_classes_that_the_label_table_cannot_have_are_named():
    with pytest.raises(
        ValueError, match=r"num_classes must be 10 \(and the null class\) or 11 for the 11 rows .*got 9"
    ):
        official_config(official(), 2, 9)


def test_every_way_to_store_the_official_layout_gives_the_same_files(tmp_path):
    expected = convert_dit(write(tmp_path / "a.pt", official()), 2)
    wrapped = {"model": {}, "ema": {f"module._orig_mod.{name}": value for name, value in official().items()}}
    assert convert_dit(write(tmp_path / "b.pt", wrapped), 2) == expected
    (tmp_path / "c.safetensors").write_bytes(safetensors.numpy.save(official()))
    assert convert_dit(tmp_path / "c.safetensors", 2) == expected


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2])
def test_few_bits_are_converted_as_they_are(tmp_path, dtype):
    few = {name: value.astype(dtype) for name, value in official().items()}
    (tmp_path / "d").mkdir()
    write_files(tmp_path / "d", convert_dit(write(tmp_path / "few.pt", few), 2))
    _, params = read_model(tmp_path / "d")
    np.testing.assert_array_equal(
        params["label_embedding"], few["y_embedder.embedding_table.weight"].astype(np.float32)
    )
    few["pos_embed"] = few["pos_embed"][:, ::-1]
    with pytest.raises(ValueError, match="pos_embed is not the fixed embedding of a grid of 4 x 4"):
        convert_dit(write(tmp_path / "few.pt", few), 2)


@pytest.mark.parametrize("name", ["pos_embed", "blocks.1.mlp.fc1.weight", "x_embedder.proj.bias"])
def test_integers_are_no_weights(tmp_path, name):
    state = official() | {name: np.zeros_like(official()[name], np.int64)}
    with pytest.raises(ValueError, match=rf"whole\.pt cannot be converted: .*{name} has dtype int64; weights must be"):
        convert_dit(write(tmp_path / "whole.pt", state), 2)


def write(path, values):
    path.write_bytes(torch_bytes(values))
    return path


def test_command_errors_leave_nothing_behind(command, stored, tmp_path, capsys):
    output = tmp_path / "output"

    def fails(source, words):
        assert command(["dit", "--source", str(source), "--output", str(output)]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and words in error and not output.exists(), error

    fails(tmp_path / "none.pt", "no DiT at")
    fails(tmp_path / "nowhere", "no DiT at")
    fails(stored([1]), "DiT.pt cannot be converted: expected a state dict (names to tensors), got list")
    fails(stored({"epoch": 3}), "got dict with 'epoch'")
    fails(stored({"ema": official()}), "num_heads must be given")
    fails(stored({"pos_embed": positions()}), "tensor x_embedder.proj.weight is missing")
    source = write_diffusers(tmp_path / "source", VALUES | {"num_layers": 4})
    fails(source, "diffusion_pytorch_model.safetensors cannot be converted: DiTTransformer2DModel weights: tensor")
    weights = source / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    fails(source, "is not a whole safetensors file")


@pytest.mark.parity
@pytest.mark.parametrize("layout", ["safetensors", "bin", "official"])
def test_outputs_equal_diffusers(layout, tmp_path):
    torch = pytest.importorskip("torch", reason="needs .[parity]")
    diffusers = pytest.importorskip("diffusers", reason="needs .[parity]")
    options = {k: v for k, v in VALUES.items() if not k.startswith("_")}
    model = diffusers.DiTTransformer2DModel(**options).eval()
    model.load_state_dict({n: torch.from_numpy(v.copy()) for n, v in as_diffusers(official()).items()}, strict=True)
    num_heads = None
    if layout == "safetensors":
        model.save_pretrained(tmp_path / "theirs")
    elif layout == "bin":
        model.save_pretrained(tmp_path / "theirs" / "transformer", safe_serialization=False)
    else:
        # The official code's frequencies, and a checkpoint as its train.py writes it.
        for block in model.transformer_blocks:
            block.norm1.emb.time_proj.downscale_freq_shift = 0
        state = {n: torch.from_numpy(v) for n, v in official().items()}
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
        args = argparse.Namespace(model="DiT-XL/2", global_seed=0)
        checkpoint = {"model": {}, "ema": state, "opt": optimizer.state_dict(), "args": args}
        torch.save(checkpoint, tmp_path / "theirs.pt")
        num_heads = 2
    source = tmp_path / ("theirs.pt" if layout == "official" else "theirs")
    config, params = read_model(write_files(tmp_path / "ours", convert_dit(source, num_heads)))

    x = np.random.default_rng(3).normal(size=(4, 8, 8, 4)).astype(np.float32)
    timesteps, labels = np.array([0, 500, 977, 500]), np.array([7, 0, 3, CLASSES])  # the last is the null class
    with torch.no_grad():
        nchw = torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))
        theirs = model(nchw, torch.from_numpy(timesteps), torch.from_numpy(labels)).sample.numpy().transpose(0, 2, 3, 1)
    ours = jax.jit(functools.partial(DiT(config).apply, method="on_images"))(
        {"params": params}, x, timesteps.astype(np.float32), labels
    )
    rms = np.sqrt(np.square(theirs).mean())
    error = np.abs(ours - theirs).max() / rms
    print(f"{layout}: largest difference from diffusers, relative to the RMS {rms:.2f}: {error:.1e}")
    assert rms > 0.1 and error < 1e-4
