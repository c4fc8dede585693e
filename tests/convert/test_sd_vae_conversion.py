"""Stable Diffusion's autoencoder into ImageVAE: against NumPy in float64 and diffusers, and the command."""

import json
import math
import re

import jax
import numpy as np
import pytest
import safetensors.numpy
from helpers.models import read_model

from sora_jax.commands import convert_checkpoint
from sora_jax.config_json import to_json
from sora_jax.convert.sd_vae import convert_config, convert_sd_vae, convert_tensors
from sora_jax.models.autoencoder.image_vae import ImageVAE, ImageVAEConfig
from sora_jax.provenance import flat_names

PUBLISHED = {  # config.json of stabilityai/sd-vae-ft-mse
    "_class_name": "AutoencoderKL",
    "_diffusers_version": "0.4.2",
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 256,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
SMALL = PUBLISHED | {
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "latent_channels": 3,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "scaling_factor": 0.5,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
}
NARROW = PUBLISHED | {"block_out_channels": [8, 16, 32, 32], "norm_num_groups": 8}


def random_state(values, seed=0, old_names=False):
    """An AutoencoderKL state dict in which nothing is zero, one or symmetric."""
    rng = np.random.default_rng(seed)
    channels, num_blocks, latent = values["block_out_channels"], values["layers_per_block"], values["latent_channels"]
    state = {}

    def layer(name, *shape):
        fan = math.prod(shape[1:])
        state[f"{name}.weight"] = rng.normal(scale=fan**-0.5, size=shape).astype(np.float32)
        state[f"{name}.bias"] = rng.normal(scale=0.3, size=shape[0]).astype(np.float32)

    def norm(name, size):
        state[f"{name}.weight"] = rng.normal(1, 0.3, size).astype(np.float32)
        state[f"{name}.bias"] = rng.normal(scale=0.3, size=size).astype(np.float32)

    def resnet(name, inputs, outputs):
        norm(f"{name}.norm1", inputs)
        layer(f"{name}.conv1", outputs, inputs, 3, 3)
        norm(f"{name}.norm2", outputs)
        layer(f"{name}.conv2", outputs, outputs, 3, 3)
        if inputs != outputs:
            layer(f"{name}.conv_shortcut", outputs, inputs, 1, 1)

    def mid(name, size):
        for i in range(2):
            resnet(f"{name}.resnets.{i}", size, size)
        norm(f"{name}.attentions.0.group_norm", size)
        for part in ("query", "key", "value", "proj_attn") if old_names else ("to_q", "to_k", "to_v", "to_out.0"):
            layer(f"{name}.attentions.0.{part}", size, size)

    size = channels[0]
    layer("encoder.conv_in", size, values["in_channels"], 3, 3)
    for i, outputs in enumerate(channels):
        for j in range(num_blocks):
            resnet(f"encoder.down_blocks.{i}.resnets.{j}", size, outputs)
            size = outputs
        if i < len(channels) - 1:
            layer(f"encoder.down_blocks.{i}.downsamplers.0.conv", size, size, 3, 3)
    mid("encoder.mid_block", size)
    norm("encoder.conv_norm_out", size)
    layer("encoder.conv_out", 2 * latent, size, 3, 3)
    layer("quant_conv", 2 * latent, 2 * latent, 1, 1)
    layer("post_quant_conv", latent, latent, 1, 1)
    layer("decoder.conv_in", size, latent, 3, 3)
    mid("decoder.mid_block", size)
    for i, outputs in enumerate(reversed(channels)):
        for j in range(num_blocks + 1):
            resnet(f"decoder.up_blocks.{i}.resnets.{j}", size, outputs)
            size = outputs
        if i < len(channels) - 1:
            layer(f"decoder.up_blocks.{i}.upsamplers.0.conv", size, size, 3, 3)
    norm("decoder.conv_norm_out", size)
    layer("decoder.conv_out", values["out_channels"], size, 3, 3)
    return state


class NumpyVAE:
    """Encoder and decoder for one image (C, H, W), in float64, written from arXiv:2112.10752 and its code."""

    def __init__(self, state, values):
        self.w = {name: value.astype(np.float64) for name, value in state.items()}
        self.values = values

    def conv(self, name, x, stride=1, padding=(1, 1)):
        weight = self.w[f"{name}.weight"]
        if weight.shape[-1] == 3:
            x = np.pad(x, ((0, 0), padding, padding))
        windows = np.lib.stride_tricks.sliding_window_view(x, weight.shape[2:], axis=(1, 2))[:, ::stride, ::stride]
        return np.einsum("chwij,ocij->ohw", windows, weight) + self.w[f"{name}.bias"][:, None, None]

    def norm(self, name, x):
        groups = x.reshape(self.values["norm_num_groups"], -1)
        groups = groups - groups.mean(1, keepdims=True)
        x = (groups / np.sqrt((groups**2).mean(1, keepdims=True) + 1e-6)).reshape(x.shape)
        return x * self.w[f"{name}.weight"][:, None, None] + self.w[f"{name}.bias"][:, None, None]

    def norm_silu(self, name, x):
        x = self.norm(name, x)
        return x / (1 + np.exp(-x))

    def resnet(self, name, x):
        h = self.conv(f"{name}.conv1", self.norm_silu(f"{name}.norm1", x))
        h = self.conv(f"{name}.conv2", self.norm_silu(f"{name}.norm2", h))
        return h + (self.conv(f"{name}.conv_shortcut", x) if f"{name}.conv_shortcut.weight" in self.w else x)

    def linear(self, name, x):
        return self.w[f"{name}.weight"] @ x + self.w[f"{name}.bias"][:, None]

    def mid(self, name, x):
        x = self.resnet(f"{name}.resnets.0", x)
        h = self.norm(f"{name}.attentions.0.group_norm", x).reshape(len(x), -1)
        q, k, v = (self.linear(f"{name}.attentions.0.{part}", h) for part in ("to_q", "to_k", "to_v"))
        weights = np.exp(q.T @ k / math.sqrt(len(x)))
        h = v @ (weights / weights.sum(1, keepdims=True)).T
        x = x + self.linear(f"{name}.attentions.0.to_out.0", h).reshape(x.shape)
        return self.resnet(f"{name}.resnets.1", x)

    def encode(self, x):
        x = self.conv("encoder.conv_in", x)
        levels = len(self.values["block_out_channels"])
        for i in range(levels):
            for j in range(self.values["layers_per_block"]):
                x = self.resnet(f"encoder.down_blocks.{i}.resnets.{j}", x)
            if i < levels - 1:
                x = self.conv(f"encoder.down_blocks.{i}.downsamplers.0.conv", x, stride=2, padding=(0, 1))
        x = self.norm_silu("encoder.conv_norm_out", self.mid("encoder.mid_block", x))
        return np.split(self.conv("quant_conv", self.conv("encoder.conv_out", x)), 2)

    def decode(self, z):
        x = self.mid("decoder.mid_block", self.conv("decoder.conv_in", self.conv("post_quant_conv", z)))
        levels = len(self.values["block_out_channels"])
        for i in range(levels):
            for j in range(self.values["layers_per_block"] + 1):
                x = self.resnet(f"decoder.up_blocks.{i}.resnets.{j}", x)
            if i < levels - 1:
                x = self.conv(f"decoder.up_blocks.{i}.upsamplers.0.conv", x.repeat(2, axis=1).repeat(2, axis=2))
        return self.conv("decoder.conv_out", self.norm_silu("decoder.conv_norm_out", x))


def to_latent_diffusion(state, prefix=""):
    """The same tensors by the names of latent diffusion's own code, with 1x1 convolutions in the attention."""
    levels = 1 + max(int(m[1]) for m in (re.match(r"decoder\.up_blocks\.(\d+)", name) for name in state) if m)
    renamed = {}
    for name, value in state.items():
        name = re.sub(r"down_blocks\.(\d+)\.resnets\.", r"down.\1.block.", name)
        name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0\.", r"down.\1.downsample.", name)
        name = re.sub(r"up_blocks\.(\d+)\.resnets\.", lambda m: f"up.{levels - 1 - int(m[1])}.block.", name)
        name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0\.", lambda m: f"up.{levels - 1 - int(m[1])}.upsample.", name)
        name = name.replace("mid_block.resnets.0", "mid.block_1").replace("mid_block.resnets.1", "mid.block_2")
        name = name.replace("mid_block.attentions.0.group_norm", "mid.attn_1.norm")
        name = re.sub(r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1", name)
        name = name.replace("mid_block.attentions.0.to_out.0", "mid.attn_1.proj_out")
        name = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        if ".attn_1." in name and value.ndim == 2:
            value = value[..., None, None]
        renamed[prefix + name] = value
    return renamed


def images(*shape):
    return np.random.default_rng(1).uniform(-1, 1, shape).astype(np.float32)


def forward(config, params, x, z):
    """Mean and log variance of `x`, and what `z` decodes to."""

    def both(params, x, z):
        model, variables = ImageVAE(config), {"params": params}
        return *model.apply(variables, x, method="encode"), model.apply(variables, z, method="decode")

    return map(np.asarray, jax.jit(both)(params, x, z))


def relative_error(found, expected):
    return np.abs(found - expected).max() / np.sqrt((expected**2).mean())


def write_source(folder, values=SMALL, state=None):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    data = safetensors.numpy.save(random_state(values) if state is None else state)
    (folder / "diffusion_pytorch_model.safetensors").write_bytes(data)
    return folder


def write_converted(folder, source):
    folder.mkdir()
    for file, data in convert_sd_vae(source).items():
        (folder / file).write_bytes(data)
    return read_model(folder)


@pytest.fixture(scope="module")
def command():
    return convert_checkpoint.main


def test_command_writes_a_network_that_computes_as_numpy(tmp_path, command, capsys):
    source, output, table = write_source(tmp_path / "source"), tmp_path / "output", tmp_path / "t.json"
    assert command(["sd-vae", "--source", str(source), "--output", str(output), "--json", str(table)]) == 0
    assert json.loads(table.read_text())["files"] == {p.name: p.stat().st_size for p in output.iterdir()}
    assert {p.name for p in output.iterdir()} == {"model.safetensors", "config.json"}
    assert "model.safetensors" in capsys.readouterr().out
    config, params = read_model(output)
    assert config.scaling_factor == 0.5
    x, z = images(2, 4, 8, 3), images(2, 3, 2, 3) * 3
    reference = NumpyVAE(random_state(SMALL), SMALL)
    encoded = [np.stack(reference.encode(image.transpose(2, 0, 1))) for image in x]
    mean, logvar = np.stack(encoded, axis=1).transpose(0, 1, 3, 4, 2)
    decoded = np.stack([reference.decode(latent.transpose(2, 0, 1)) for latent in z]).transpose(0, 2, 3, 1)
    for found, expected in zip(forward(config, params, x, z), (mean, logvar, decoded), strict=True):
        assert found.shape == expected.shape and relative_error(found, expected) < 2e-5


def test_old_and_new_names_are_one_network():
    config = convert_config(SMALL)
    new = convert_tensors(random_state(SMALL), config)
    old = random_state(SMALL, old_names=True)
    as_convolutions = {k: v[..., None, None] if ".attentions." in k and v.ndim == 2 else v for k, v in old.items()}
    for state in (old, as_convolutions):
        tensors = convert_tensors(state, config)
        assert tensors.keys() == new.keys() and all((tensors[name] == new[name]).all() for name in new)
    with pytest.raises(ValueError, match=r"decoder\.mid_block\.attentions\.0\.key\.bias is unknown"):
        convert_tensors(random_state(SMALL) | old, config)


@pytest.mark.parametrize("prefix", ["", "first_stage_model."])
def test_latent_diffusions_own_layout(tmp_path, prefix, command, capsys):
    values = PUBLISHED | {"block_out_channels": [32, 64], "layers_per_block": 2}  # 32 groups are not in the tensors
    values |= {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    state = to_latent_diffusion(random_state(values), prefix)
    others = {"model.diffusion_model.out.2.bias": np.zeros(4), f"{prefix}loss.logvar": np.zeros(())}
    path = tmp_path / "vae.safetensors"
    path.write_bytes(safetensors.numpy.save(state | {n: v.astype(np.float32) for n, v in others.items()}))
    expected = convert_sd_vae(write_source(tmp_path / "source", values))
    assert convert_sd_vae(path) == expected
    fewer = {name: value for name, value in state.items() if not name.endswith("up.1.block.2.conv1.bias")}
    path.write_bytes(safetensors.numpy.save(fewer))
    assert command(["sd-vae", "--source", str(path), "--output", str(tmp_path / "out")]) == 1
    assert "tensor decoder.up_blocks.0.resnets.2.conv1.bias is missing" in capsys.readouterr().err


def test_config_of_the_published_weights():
    assert convert_config(PUBLISHED) == ImageVAEConfig()
    later = {"scaling_factor": 0.13025, "force_upcast": True, "use_quant_conv": True, "shift_factor": None}
    assert convert_config(PUBLISHED | later) == ImageVAEConfig(scaling_factor=0.13025)


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("_class_name", "AutoencoderTiny", "must be 'AutoencoderKL', got 'AutoencoderTiny'"),
        ("act_fn", "relu", "must be 'silu', got 'relu'"),
        ("use_quant_conv", False, "must be True, got False"),
        ("use_post_quant_conv", False, "must be True, got False"),
        ("mid_block_add_attention", False, "must be True, got False"),
        ("shift_factor", 0.1159, "must be None, got 0.1159"),
        ("latents_mean", [0.0], "must be None, got [0.0]"),
        ("out_channels", 4, "must be in_channels 3, got 4"),
        ("down_block_types", ["DownEncoderBlock2D"], "must be 2 times 'DownEncoderBlock2D', got"),
        ("up_block_types", ["UpDecoderBlock2D", "AttnUpDecoderBlock2D"], "must be 2 times 'UpDecoderBlock2D', got"),
        ("block_out_channels", [8, "16"], "positive integers, got [8, '16']"),
        ("block_out_channels", 8, "positive integers, got 8"),
        ("layers_per_block", 0, "a positive integer, got 0"),
        ("norm_num_groups", None, "a positive integer, got None"),
        ("scaling_factor", "0.18", "a number, got '0.18'"),
        ("wings", 2, "'wings' is unknown"),
    ],
)
def test_options_that_are_another_network_are_named(option, value, words):
    with pytest.raises(ValueError) as error:
        convert_config(SMALL | {option: value})
    assert option in str(error.value) and words in str(error.value)


def test_options_without_which_it_would_be_another_network_are_needed():
    for option in ("_class_name", "block_out_channels", "latent_channels", "norm_num_groups", "down_block_types"):
        with pytest.raises(ValueError, match=option):
            convert_config({key: value for key, value in SMALL.items() if key != option})


def test_tensors_that_do_not_fit_are_named():
    config, state = convert_config(SMALL), random_state(SMALL)
    name = "decoder.up_blocks.1.resnets.0.conv_shortcut.weight"
    for value, words in (
        (None, "is missing"),
        (state[name][..., 0, 0], r"must be \(8, 16, 1, 1\), got \(8, 16\)"),
        (state[name].swapaxes(0, 1), r"must be \(8, 16, 1, 1\), got \(16, 8, 1, 1\)"),
        (state[name] * np.nan, "has a value that is not finite"),
    ):
        broken = {**state, name: value} if value is not None else {k: v for k, v in state.items() if k != name}
        with pytest.raises(ValueError, match=rf"{name} {words}"):
            convert_tensors(broken, config)
    with pytest.raises(ValueError, match=r"tensor loss\.logvar is unknown"):
        convert_tensors({**state, "loss.logvar": np.zeros(1), "z": np.zeros(1)}, config)


def test_command_errors_leave_nothing_behind(tmp_path, command, capsys):
    source, output = write_source(tmp_path / "source"), tmp_path / "output"
    weights = source / "diffusion_pytorch_model.safetensors"

    def fails(words, *arguments, path=source):
        assert command(["sd-vae", "--source", str(path), "--output", str(output), *arguments]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and words in error and not output.exists(), error

    fails("no VAE at", path=tmp_path / "nowhere")
    fails("config.json cannot be converted: it has no weight_map", path=source / "config.json")
    fails("no config of a VAE at", "--config", str(tmp_path / "none.json"))
    (tmp_path / "config.json").write_text(json.dumps(SMALL | {"use_quant_conv": False}))
    fails("use_quant_conv must be True", "--config", str(tmp_path / "config.json"), path=weights)
    (tmp_path / "config.json").write_text(json.dumps(SMALL | {"norm_num_groups": 3}))
    fails("ImageVAEConfig.widths must be one multiple of num_groups 3", "--config", str(tmp_path / "config.json"))
    data = weights.read_bytes()
    weights.write_bytes(data[:-10])
    fails("diffusion_pytorch_model.safetensors is not a whole safetensors file")
    weights.unlink()
    (source / "diffusion_pytorch_model.bin").write_bytes(data[:100])
    fails("diffusion_pytorch_model.bin is not a whole safetensors file")
    (tmp_path / "vae.ckpt").write_bytes(data[:100])
    fails("vae.ckpt is not a whole safetensors file", path=tmp_path / "vae.ckpt")


def test_loader_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"it has no config\.json"):
        read_model(tmp_path)
    config, _ = write_converted(tmp_path / "out", write_source(tmp_path / "source"))
    assert config == convert_config(SMALL)
    (tmp_path / "out" / "config.json").write_text(to_json(config).replace('"channels": 3', '"channels": 4'))
    with pytest.raises(ValueError, match=r"has shape \(3,\), the config asks \(4,\)"):
        read_model(tmp_path / "out")


@pytest.fixture
def reference():
    """(torch, diffusers), where `.[parity]` is installed."""
    torch = pytest.importorskip("torch", reason="needs .[parity]")
    return torch, pytest.importorskip("diffusers", reason="needs .[parity]")


@pytest.mark.parity
@pytest.mark.parametrize(("values", "size"), [(SMALL, (8, 12)), (NARROW, (32, 48))], ids=["small", "narrow"])
def test_encoder_and_decoder_equal_diffusers(reference, values, size, tmp_path):
    torch, diffusers = reference
    state = random_state(values, seed=2)
    model = diffusers.AutoencoderKL(**{k: v for k, v in values.items() if not k.startswith("_")}).eval()
    model.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()}, strict=True)
    stride = 2 ** (len(values["block_out_channels"]) - 1)
    x, z = images(2, *size, 3), images(2, *(n // stride for n in size), values["latent_channels"]) * 3
    with torch.no_grad():
        posterior = model.encode(torch.from_numpy(x.transpose(0, 3, 1, 2))).latent_dist
        decoded = model.decode(torch.from_numpy(z.transpose(0, 3, 1, 2))).sample
    theirs = [part.numpy().transpose(0, 2, 3, 1) for part in (posterior.mean, posterior.logvar, decoded)]

    # Once through each format of file, with the old names in the older one, as the published files have them.
    (tmp_path / "old").mkdir()
    old = {k: torch.from_numpy(v) for k, v in random_state(values, seed=2, old_names=True).items()}
    torch.save(old, tmp_path / "old" / "diffusion_pytorch_model.bin")
    (tmp_path / "old" / "config.json").write_text(json.dumps(values))
    model.save_pretrained(tmp_path / "new")
    (config, params), (also_config, also_params) = (
        write_converted(tmp_path / f"our_{name}", tmp_path / name) for name in ("old", "new")
    )
    assert config == also_config
    assert all((value == flat_names(params)[name]).all() for name, value in flat_names(also_params).items())

    for what, ours, expected in zip(("mean", "logvar", "image"), forward(config, params, x, z), theirs, strict=True):
        error = relative_error(ours, expected)
        print(f"{what}: largest difference from diffusers, relative to the RMS: {error:.1e}")
        assert error < 1e-4


@pytest.mark.parity
def test_a_training_checkpoint_of_latent_diffusion(reference, tmp_path):
    torch, _ = reference
    state = to_latent_diffusion(random_state(PUBLISHED | {"block_out_channels": [32, 32, 32, 32]}))
    tensors = {name: torch.from_numpy(value) for name, value in state.items()}
    torch.save({"global_step": 3, "state_dict": {**tensors, "loss.logvar": torch.zeros(())}}, tmp_path / "vae.ckpt")
    config, params = write_converted(tmp_path / "out", tmp_path / "vae.ckpt")
    assert config == ImageVAEConfig(widths=(32, 32, 32, 32))
    kernel = flat_names(params)["decoder.up_3_block_1.conv2.kernel"]
    np.testing.assert_array_equal(kernel, state["decoder.up.3.block.1.conv2.weight"].transpose(2, 3, 1, 0))
