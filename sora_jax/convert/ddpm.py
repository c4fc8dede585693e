"""DDPM's published weights, in the layout of diffusers' `UNet2DModel`, into `sora_jax.models.unet`.

The source is a directory such as a copy of `google/ddpm-cifar10-32`: `config.json` beside
`diffusion_pytorch_model.safetensors` or `.bin`. Old files call the layers of an attention `query, key, value,
proj_attn`, new ones `to_q, to_k, to_v, to_out.0`; both are read. Tensors are renamed and transposed, never mixed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath
from flax import linen as nn

from sora_jax.array_types import NumpyArray
from sora_jax.config_json import to_json
from sora_jax.convert.diffusers_reader import is_count, with_new_names
from sora_jax.convert.state_dict import check_size, missing, unknown
from sora_jax.convert.weight_files import find_weights, read_options, read_weights
from sora_jax.models.unet import UNet, UNetConfig, abstract_params
from sora_jax.models.weights import CONFIG_FILE, WEIGHTS_FILE, tensor_bytes
from sora_jax.provenance import flat_names

# Options with one value that `UNet` computes. Those in _STATED must be in a config, as diffusers' own default for
# them is another network; the others may be absent from it.
_FIXED = {
    "act_fn": "silu",
    "add_attention": True,
    "attention_head_dim": None,
    "attn_norm_num_groups": None,
    "center_input_sample": False,
    "class_embed_type": None,
    "downsample_padding": 0,
    "downsample_type": "conv",
    "flip_sin_to_cos": False,
    "freq_shift": 1,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2D",
    "num_class_embeds": None,
    "resnet_time_scale_shift": "default",
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "upsample_type": "conv",
}
_STATED = ("attention_head_dim", "downsample_padding", "flip_sin_to_cos", "freq_shift")
_SIZES = {  # ours: theirs
    "in_channels": "in_channels",
    "out_channels": "out_channels",
    "num_blocks": "layers_per_block",
    "num_groups": "norm_num_groups",
}
_NEEDED = {*_STATED, *_SIZES.values(), "norm_eps", "block_out_channels", "down_block_types", "up_block_types"}
# The size of the training images and the number of steps, which no layer of this network depends on.
_UNUSED = ("sample_size", "num_train_timesteps")

_TOP_LAYERS = {
    "conv_in": "conv_in",
    "time_fc1": "time_embedding.linear_1",
    "time_fc2": "time_embedding.linear_2",
    "norm_out": "conv_norm_out",
    "conv_out": "conv_out",
}
_BLOCK_LAYERS = {
    "norm1": "norm1",
    "conv1": "conv1",
    "time_projection": "time_emb_proj",
    "norm2": "norm2",
    "conv2": "conv2",
    "shortcut": "conv_shortcut",
}
_ATTENTION_LAYERS = {"norm": "group_norm", "query": "to_q", "key": "to_k", "value": "to_v", "out": "to_out.0"}
_LISTS = {"block": "resnets", "attention": "attentions", "downsample": "downsamplers", "upsample": "upsamplers"}

# Which axis of ours each axis of theirs is: (out, in, h, w) of (h, w, in, out), and (out, in) of (in, out).
_SOURCE_AXES = {1: (0,), 2: (1, 0), 4: (3, 2, 0, 1)}


def convert_config(values: Mapping[str, Any]) -> UNetConfig:
    """Reads the `config.json` of a `UNet2DModel`.

    Dropout is the config's, and 0 where it names none, as in diffusers; DDPM's weights for CIFAR-10 were trained with
    0.1, which their config does not say.

    Raises:
        ValueError: another class, or an option that is missing, unknown or not `UNet`'s; the message names it.
    """

    def expect(condition: bool, option: str, allowed: str) -> None:
        if not condition:
            raise ValueError(f"UNet2DModel config: {option} must be {allowed}, got {values.get(option)!r}.")

    expect(values.get("_class_name") == "UNet2DModel", "_class_name", "'UNet2DModel'")
    values = {option: value for option, value in values.items() if not option.startswith("_")}
    if unknown := sorted(values.keys() - {*_FIXED, *_NEEDED, *_UNUSED, "dropout"}):
        raise ValueError(f"UNet2DModel config: option {unknown[0]!r} is unknown.")
    if missing := sorted(_NEEDED - values.keys()):
        raise ValueError(f"UNet2DModel config: option {missing[0]!r} is missing.")
    for option, value in _FIXED.items():
        expect(values.get(option, value) == value, option, repr(value))
    for option in _SIZES.values():
        expect(is_count(values[option]), option, "a positive integer")
    for option in ("norm_eps", "dropout"):
        expect(isinstance(values.get(option, 0.0), float | int), option, "a number")

    channels, down, up = (values[option] for option in ("block_out_channels", "down_block_types", "up_block_types"))
    counts = isinstance(channels, list) and len(channels) > 0 and all(map(is_count, channels))
    expect(counts and all(n % channels[0] == 0 for n in channels), "block_out_channels", "multiples of their first")
    kinds = ("DownBlock2D", "AttnDownBlock2D")
    known = isinstance(down, list) and len(down) == len(channels) and all(kind in kinds for kind in down)
    expect(known, "down_block_types", f"{len(channels)} of {', '.join(kinds)}")
    mirrored = [kind.replace("Down", "Up") for kind in reversed(down)]
    expect(up == mirrored, "up_block_types", f"those of the way down mirrored, {mirrored}")
    return UNetConfig(
        **{ours: values[theirs] for ours, theirs in _SIZES.items()},
        width=channels[0],
        multipliers=tuple(n // channels[0] for n in channels),
        attention_levels=tuple(level for level, kind in enumerate(down) if kind == kinds[1]),
        norm_eps=float(values["norm_eps"]),
        dropout=float(values.get("dropout", 0.0)),
    )


def convert_tensors(state: Mapping[str, NumpyArray], config: UNetConfig) -> dict[str, NumpyArray]:
    """Renames and transposes the state dict of a `UNet2DModel`.

    Args:
        state: in its old or its new layout.
        config: its sizes.

    Returns:
        The parameters of `UNet(config)` by flat names; float32.

    Raises:
        ValueError: a tensor that is missing, left over, of another shape or not finite; the message names it.
    """
    check_size("UNet2DModel weights", config.num_blocks, state)
    state, tensors = with_new_names(state, "UNet2DModel"), {}
    expected = []
    for name, leaf in flat_names(nn.meta.unbox(abstract_params(UNet(config)))).items():
        source = _source_name(name, len(config.multipliers))
        expected.append(source)
        if source not in state:
            raise missing("UNet2DModel weights", [source], state)
        value = state.pop(source)
        shape = leaf.shape
        if name.endswith("shortcut.kernel"):
            shape = (1, 1, *shape)  # theirs is a convolution
        wanted = tuple(shape[axis] for axis in _SOURCE_AXES[len(shape)])
        if value.shape != wanted:
            raise ValueError(f"UNet2DModel weights: {source} must be {wanted}, got {value.shape}.")
        value = value.transpose(np.argsort(_SOURCE_AXES[len(shape)])).reshape(leaf.shape).astype(np.float32)
        if not np.isfinite(value).all():
            raise ValueError(f"UNet2DModel weights: {source} has a value that is not finite.")
        tensors[name] = value
    if state:
        raise unknown("UNet2DModel weights", state, expected)
    return tensors


def convert_ddpm(source: epath.PathLike, config: epath.PathLike | None = None) -> dict[str, bytes]:
    """Converts a U-Net.

    Args:
        source: a directory with `diffusion_pytorch_model.safetensors` (taken first) or `.bin`, or one such file.
        config: its `config.json` (default: the one beside the weights).

    Returns:
        The contents of the files that `sora_jax.load` reads, by name.

    Raises:
        FileNotFoundError: weights or config that are missing.
        ValueError: files that do not hold such a network; the message names them.
    """
    weights = find_weights(source, "U-Net", folder="unet")
    values, path = read_options(weights, config, "U-Net")
    try:
        converted = convert_config(values)
    except ValueError as error:
        raise ValueError(f"{path} cannot be converted: {error}") from error
    state, _ = read_weights(weights, "U-Net", ("time_embedding.linear_1.weight",))
    try:
        tensors = convert_tensors(state, converted)
    except ValueError as error:
        raise ValueError(f"{weights} cannot be converted: {error}") from error
    return {WEIGHTS_FILE: tensor_bytes(tensors), CONFIG_FILE: to_json(converted).encode()}


def _source_name(name: str, num_levels: int) -> str:
    """Returns the name that `UNet2DModel` has for one of our parameters."""
    *module, layer, leaf = name.split(".")
    leaf = {"kernel": "weight", "scale": "weight", "bias": "bias"}[leaf]
    if module:
        module, layers = _source_module(module[0], num_levels)
        return f"{module}.{layers[layer]}.{leaf}"
    if layer in _TOP_LAYERS:
        return f"{_TOP_LAYERS[layer]}.{leaf}"
    return f"{_source_module(layer, num_levels)[0]}.conv.{leaf}"


def _source_module(name: str, num_levels: int) -> tuple[str, dict[str, str]]:
    """Returns the path of one of our blocks in `UNet2DModel`, and what its layers are called there."""
    way, *rest = name.split("_")
    if way == "mid":
        path = "mid_block"
    else:
        level, *rest = rest
        # Theirs counts in the order of computation, so from the coarsest level on the way up.
        path = f"{way}_blocks.{num_levels - 1 - int(level) if way == 'up' else level}"
    kind, number = (*rest, "0")[:2]
    return f"{path}.{_LISTS[kind]}.{number}", _ATTENTION_LAYERS if kind == "attention" else _BLOCK_LAYERS
