"""DDPM's weights into UNet: against NumPy in float64 and against diffusers, and the command that does it."""

import json
import math

import jax
import numpy as np
import pytest
import safetensors.numpy
from helpers.models import read_model

from sora_jax.commands import convert_checkpoint
from sora_jax.config_json import to_json
from sora_jax.convert.ddpm import convert_config, convert_ddpm, convert_tensors
from sora_jax.models.unet import UNet, UNetConfig
from sora_jax.provenance import flat_names

CIFAR = {  # config.json of google/ddpm-cifar10-32
    "_class_name": "UNet2DModel",
    "_diffusers_version": "0.0.4",
    "act_fn": "silu",
    "attention_head_dim": None,
    "block_out_channels": [128, 256, 256, 256],
    "center_input_sample": False,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"],
    "downsample_padding": 0,
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "in_channels": 3,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-06,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 32,
    "time_embedding_type": "positional",
    "up_block_types": ["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"],
}
# Small, and with an epsilon that its numbers show.
SMALL = CIFAR | {
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "layers_per_block": 1,
    "norm_eps": 0.05,
    "norm_num_groups": 4,
    "out_channels": 2,
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
}
OTHER = SMALL | {
    "block_out_channels": [8, 8, 24],
    "down_block_types": ["AttnDownBlock2D", "DownBlock2D", "AttnDownBlock2D"],
    "layers_per_block": 3,
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D", "AttnUpBlock2D"],
}
T = np.array([0, 977])


def random_state(values, seed=0, old_names=False):
    """A UNet2DModel state dict in which nothing is zero, one or symmetric."""
    rng = np.random.default_rng(seed)
    channels, num_blocks = values["block_out_channels"], values["layers_per_block"]
    width, time = channels[0], 4 * channels[0]
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
        layer(f"{name}.time_emb_proj", outputs, time)
        norm(f"{name}.norm2", outputs)
        layer(f"{name}.conv2", outputs, outputs, 3, 3)
        if inputs != outputs:
            layer(f"{name}.conv_shortcut", outputs, inputs, 1, 1)

    def attention(name, size):
        norm(f"{name}.group_norm", size)
        for part in ("query", "key", "value", "proj_attn") if old_names else ("to_q", "to_k", "to_v", "to_out.0"):
            layer(f"{name}.{part}", size, size)

    layer("conv_in", width, values["in_channels"], 3, 3)
    layer("time_embedding.linear_1", time, width)
    layer("time_embedding.linear_2", time, time)
    size, skips = width, [width]
    for i, (kind, outputs) in enumerate(zip(values["down_block_types"], channels, strict=True)):
        for j in range(num_blocks):
            resnet(f"down_blocks.{i}.resnets.{j}", size, outputs)
            size = outputs
            skips.append(size)
            if kind.startswith("Attn"):
                attention(f"down_blocks.{i}.attentions.{j}", size)
        if i < len(channels) - 1:
            layer(f"down_blocks.{i}.downsamplers.0.conv", size, size, 3, 3)
            skips.append(size)
    resnet("mid_block.resnets.0", size, size)
    attention("mid_block.attentions.0", size)
    resnet("mid_block.resnets.1", size, size)
    for i, (kind, outputs) in enumerate(zip(values["up_block_types"], reversed(channels), strict=True)):
        for j in range(num_blocks + 1):
            resnet(f"up_blocks.{i}.resnets.{j}", size + skips.pop(), outputs)
            size = outputs
            if kind.startswith("Attn"):
                attention(f"up_blocks.{i}.attentions.{j}", size)
        if i < len(channels) - 1:
            layer(f"up_blocks.{i}.upsamplers.0.conv", size, size, 3, 3)
    norm("conv_norm_out", width)
    layer("conv_out", values["out_channels"], width, 3, 3)
    return state


def numpy_unet(state, values, x, timestep):
    """The network's output for one image (C, H, W), in float64, written from arXiv:2006.11239, appendix B."""
    w = {name: value.astype(np.float64) for name, value in state.items()}
    silu = lambda x: x / (1 + np.exp(-x))  # noqa: E731

    def conv(name, x, stride=1, padding=(1, 1)):
        weight = w[f"{name}.weight"]
        if weight.shape[-1] == 3:
            x = np.pad(x, ((0, 0), padding, padding))
        windows = np.lib.stride_tricks.sliding_window_view(x, weight.shape[2:], axis=(1, 2))
        windows = windows[:, ::stride, ::stride]
        return np.einsum("chwij,ocij->ohw", windows, weight) + w[f"{name}.bias"][:, None, None]

    def linear(name, x):
        return w[f"{name}.weight"] @ x + (w[f"{name}.bias"] if x.ndim == 1 else w[f"{name}.bias"][:, None])

    def norm(name, x):
        groups = x.reshape(values["norm_num_groups"], -1)
        groups = groups - groups.mean(1, keepdims=True)
        x = (groups / np.sqrt((groups**2).mean(1, keepdims=True) + values["norm_eps"])).reshape(x.shape)
        return x * w[f"{name}.weight"][:, None, None] + w[f"{name}.bias"][:, None, None]

    def resnet(name, x):
        h = conv(f"{name}.conv1", silu(norm(f"{name}.norm1", x)))
        h = h + linear(f"{name}.time_emb_proj", silu(time))[:, None, None]
        h = conv(f"{name}.conv2", silu(norm(f"{name}.norm2", h)))
        return h + (conv(f"{name}.conv_shortcut", x) if f"{name}.conv_shortcut.weight" in w else x)

    def attention(name, x):
        if f"{name}.to_q.weight" not in w:
            return x
        h = norm(f"{name}.group_norm", x).reshape(len(x), -1)
        q, k, v = (linear(f"{name}.{part}", h) for part in ("to_q", "to_k", "to_v"))
        weights = np.exp(q.T @ k / math.sqrt(len(x)))
        h = v @ (weights / weights.sum(1, keepdims=True)).T
        return x + linear(f"{name}.to_out.0", h).reshape(x.shape)

    half = values["block_out_channels"][0] // 2
    angles = timestep * 10_000.0 ** (-np.arange(half) / (half - 1))
    time = linear("time_embedding.linear_1", np.concatenate([np.sin(angles), np.cos(angles)]))
    time = linear("time_embedding.linear_2", silu(time))
    x = conv("conv_in", x)
    skips = [x]
    levels, blocks = len(values["block_out_channels"]), values["layers_per_block"]
    for i in range(levels):
        for j in range(blocks):
            x = attention(f"down_blocks.{i}.attentions.{j}", resnet(f"down_blocks.{i}.resnets.{j}", x))
            skips.append(x)
        if i < levels - 1:
            x = conv(f"down_blocks.{i}.downsamplers.0.conv", x, stride=2, padding=(0, 1))
            skips.append(x)
    x = resnet("mid_block.resnets.0", x)
    x = resnet("mid_block.resnets.1", attention("mid_block.attentions.0", x))
    for i in range(levels):
        for j in range(blocks + 1):
            x = resnet(f"up_blocks.{i}.resnets.{j}", np.concatenate([x, skips.pop()]))
            x = attention(f"up_blocks.{i}.attentions.{j}", x)
        if i < levels - 1:
            x = conv(f"up_blocks.{i}.upsamplers.0.conv", x.repeat(2, axis=1).repeat(2, axis=2))
    return conv("conv_out", silu(norm("conv_norm_out", x)))


def images(*shape):
    return np.random.default_rng(1).uniform(-1, 1, shape).astype(np.float32)


def forward(config, params, x):
    return np.asarray(jax.jit(UNet(config).apply)({"params": params}, x, T))


def relative_error(found, expected):
    return np.abs(found - expected).max() / np.sqrt((expected**2).mean())


def write_source(folder, values=SMALL, state=None):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(values))
    data = safetensors.numpy.save(random_state(values) if state is None else state)
    (folder / "diffusion_pytorch_model.safetensors").write_bytes(data)
    return folder


@pytest.fixture(scope="module")
def command():
    return convert_checkpoint.main


def test_command_writes_a_network_that_computes_as_numpy(tmp_path, command, capsys):
    source, output, table = write_source(tmp_path / "source"), tmp_path / "output", tmp_path / "t.json"
    assert command(["ddpm", "--source", str(source), "--output", str(output), "--json", str(table)]) == 0
    assert json.loads(table.read_text())["files"] == {p.name: p.stat().st_size for p in output.iterdir()}
    assert {p.name for p in output.iterdir()} == {"model.safetensors", "config.json"}
    assert "model.safetensors" in capsys.readouterr().out
    config, params = read_model(output)
    x = images(2, 4, 8, 3)
    found = forward(config, params, x)
    state = random_state(SMALL)
    expected = [numpy_unet(state, SMALL, image.transpose(2, 0, 1), t) for image, t in zip(x, T, strict=True)]
    assert relative_error(found, np.stack(expected).transpose(0, 2, 3, 1)) < 2e-5


def test_old_and_new_names_are_one_network():
    config = convert_config(SMALL)
    old, new = (convert_tensors(random_state(SMALL, old_names=names), config) for names in (True, False))
    assert old.keys() == new.keys() and all((old[name] == new[name]).all() for name in new)
    both = random_state(SMALL) | random_state(SMALL, old_names=True)
    with pytest.raises(ValueError, match=r"attentions\.0\.\w+\.bias is unknown"):
        convert_tensors(both, config)


def test_config_of_the_published_weights():
    assert convert_config(CIFAR) == UNetConfig(dropout=0.0)
    assert convert_config(CIFAR | {"dropout": 0.1}) == UNetConfig()
    config = convert_config(OTHER)
    assert (config.multipliers, config.attention_levels, config.num_blocks) == ((1, 1, 3), (0, 2), 3)


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("_class_name", "UNet2DConditionModel", "must be 'UNet2DModel', got 'UNet2DConditionModel'"),
        ("resnet_time_scale_shift", "scale_shift", "must be 'default', got 'scale_shift'"),
        ("freq_shift", 0, "must be 1, got 0"),
        ("flip_sin_to_cos", True, "must be False, got True"),
        ("downsample_padding", 1, "must be 0, got 1"),
        ("attention_head_dim", 8, "must be None, got 8"),
        ("time_embedding_type", "fourier", "must be 'positional', got 'fourier'"),
        ("num_class_embeds", 10, "must be None, got 10"),
        ("mid_block_type", None, "must be 'UNetMidBlock2D', got None"),
        ("down_block_types", ["SkipDownBlock2D", "DownBlock2D"], "DownBlock2D, AttnDownBlock2D, got ['Skip"),
        ("down_block_types", ["DownBlock2D"], "must be 2 of"),
        ("down_block_types", [{}, "DownBlock2D"], "must be 2 of"),
        ("up_block_types", ["UpBlock2D", "UpBlock2D"], "mirrored, ['AttnUpBlock2D', 'UpBlock2D'], got"),
        ("block_out_channels", [8, 12], "multiples of their first, got [8, 12]"),
        ("block_out_channels", [], "multiples of their first, got []"),
        ("block_out_channels", 8, "multiples of their first, got 8"),
        ("layers_per_block", "2", "a positive integer, got '2'"),
        ("norm_num_groups", None, "a positive integer, got None"),
        ("norm_eps", "1e-6", "a number, got '1e-6'"),
        ("wings", 2, "'wings' is unknown"),
    ],
)
def test_options_that_are_another_network_are_named(option, value, words):
    with pytest.raises(ValueError) as error:
        convert_config(SMALL | {option: value})
    assert option in str(error.value) and words in str(error.value)


@pytest.mark.parametrize(
    "option", ["freq_shift", "attention_head_dim", "downsample_padding", "norm_eps", "_class_name"]
)
def test_options_without_which_it_would_be_another_network_are_needed(option):
    with pytest.raises(ValueError, match=option):
        convert_config({key: value for key, value in SMALL.items() if key != option})


def test_tensors_that_do_not_fit_are_named():
    config, state = convert_config(SMALL), random_state(SMALL)
    name = "up_blocks.1.resnets.0.conv_shortcut.weight"
    for value, words in (
        (None, "is missing"),
        (state[name][..., 0, 0], r"must be \(8, 24, 1, 1\), got \(8, 24\)"),
        (state[name].swapaxes(0, 1), r"must be \(8, 24, 1, 1\), got \(24, 8, 1, 1\)"),
        (state[name] * np.nan, "has a value that is not finite"),
    ):
        broken = {**state, name: value} if value is not None else {k: v for k, v in state.items() if k != name}
        with pytest.raises(ValueError, match=rf"{name} {words}"):
            convert_tensors(broken, config)
    with pytest.raises(ValueError, match=r"tensor ema\.decay is unknown"):
        convert_tensors({**state, "ema.decay": np.zeros(1), "z": np.zeros(1)}, config)


def test_command_errors_leave_nothing_behind(tmp_path, command, capsys):
    source, output = write_source(tmp_path / "source"), tmp_path / "output"
    weights = source / "diffusion_pytorch_model.safetensors"

    def fails(words, *arguments, path=source):
        assert command(["ddpm", "--source", str(path), "--output", str(output), *arguments]) == 1
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and words in error and not output.exists(), error

    fails("no U-Net at", path=tmp_path / "nowhere")
    fails("config.json cannot be converted: it has no weight_map", path=source / "config.json")
    fails("no config of a U-Net at", "--config", str(tmp_path / "none.json"))
    for text, words in (
        ("[]", "expected a JSON object, got list"),
        ('{"_class', "config.json cannot be converted"),
        (json.dumps(SMALL | {"resnet_time_scale_shift": "scale_shift"}), "resnet_time_scale_shift must be 'default'"),
    ):
        (tmp_path / "config.json").write_text(text)
        fails(words, "--config", str(tmp_path / "config.json"), path=weights)
    data = weights.read_bytes()
    weights.write_bytes(data[:-10])
    fails("diffusion_pytorch_model.safetensors is not a whole safetensors file")
    weights.unlink()
    (source / "diffusion_pytorch_model.bin").write_bytes(data[:100])
    fails("diffusion_pytorch_model.bin is not a whole safetensors file")


def test_loader_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"it has no config\.json"):
        read_model(tmp_path)
    for name, data in convert_ddpm(write_source(tmp_path / "source")).items():
        (tmp_path / name).write_bytes(data)
    config, _ = read_model(tmp_path)
    assert config == convert_config(SMALL)
    (tmp_path / "config.json").write_text(to_json(config).replace('"out_channels": 2', '"out_channels": 3'))
    with pytest.raises(ValueError, match=r"conv_out\.bias has shape \(2,\), the config asks \(3,\)"):
        read_model(tmp_path)
    (tmp_path / "config.json").write_text(to_json(config).replace("width", "depth"))
    with pytest.raises(ValueError, match=r"config\.json: UNetConfig: unknown key 'depth'"):
        read_model(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match="name one of them: source"):
        read_model(tmp_path)


@pytest.mark.parity
@pytest.mark.parametrize(("values", "size"), [(CIFAR, (32, 32)), (OTHER, (8, 12))], ids=["ddpm-cifar10-32", "other"])
def test_outputs_equal_diffusers(values, size, tmp_path):
    torch = pytest.importorskip("torch", reason="needs .[parity]")
    diffusers = pytest.importorskip("diffusers", reason="needs .[parity]")
    state = random_state(values, seed=2)
    model = diffusers.UNet2DModel(**{k: v for k, v in values.items() if not k.startswith("_")}).eval()
    model.load_state_dict({name: torch.from_numpy(value) for name, value in state.items()}, strict=True)
    x = images(2, *size, 3)
    with torch.no_grad():
        theirs = model(torch.from_numpy(x.transpose(0, 3, 1, 2)), torch.from_numpy(T)).sample.numpy()

    # Once through each format of file, with the old names in the older one, as the published files have them.
    written = tmp_path / "old"
    written.mkdir()
    old = {k: torch.from_numpy(v) for k, v in random_state(values, seed=2, old_names=True).items()}
    torch.save(old, written / "diffusion_pytorch_model.bin")
    (written / "config.json").write_text(json.dumps(values))
    model.save_pretrained(tmp_path / "new")
    found = []
    for name in ("old", "new"):
        (tmp_path / f"our_{name}").mkdir()
        for file, data in convert_ddpm(tmp_path / name).items():
            (tmp_path / f"our_{name}" / file).write_bytes(data)
        found.append(read_model(tmp_path / f"our_{name}"))
    (config, params), (also_config, also_params) = found
    assert config == also_config
    assert all((value == flat_names(params)[name]).all() for name, value in flat_names(also_params).items())

    error = relative_error(forward(config, params, x), theirs.transpose(0, 2, 3, 1))
    print(f"largest difference from diffusers, relative to the RMS: {error:.1e}")
    assert error < 1e-4
