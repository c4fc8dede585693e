"""Stable Diffusion's image autoencoder into `sora_jax.models.autoencoder.image_vae`.

Two layouts are read:

- diffusers' `AutoencoderKL`, such as a copy of `stabilityai/sd-vae-ft-mse`: `config.json` beside
  `diffusion_pytorch_model.safetensors` or `.bin`. Old files call the layers of the attention `query, key, value,
  proj_attn`, new ones `to_q, to_k, to_v, to_out.0`; both are read.
- latent diffusion's own, `.ckpt` or `.safetensors` such as `vae-ft-mse-840000-ema-pruned`, or a whole Stable Diffusion
  (`first_stage_model.*`). It has no config: its sizes are read off the tensors.

Tensors are renamed and transposed, never mixed.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath
from flax import linen as nn

from sora_jax.array_types import NumpyArray
from sora_jax.config_json import to_json
from sora_jax.convert.diffusers_reader import is_count, with_new_names
from sora_jax.convert.state_dict import check_size, missing, unknown
from sora_jax.convert.weight_files import read_options, read_weights
from sora_jax.models.autoencoder.image_vae import ImageVAE, ImageVAEConfig, abstract_params
from sora_jax.models.weights import CONFIG_FILE, WEIGHTS_FILE, tensor_bytes
from sora_jax.provenance import flat_names

# Options with one value that `ImageVAE` computes; a config may leave them out, as diffusers' default is the same.
_FIXED = {
    "act_fn": "silu",
    "latents_mean": None,
    "latents_std": None,
    "mid_block_add_attention": True,
    "shift_factor": None,
    "use_post_quant_conv": True,
    "use_quant_conv": True,
}
_SIZES = {  # ours: theirs
    "channels": "in_channels",
    "latent_channels": "latent_channels",
    "num_blocks": "layers_per_block",
    "num_groups": "norm_num_groups",
}
_NEEDED = {*_SIZES.values(), "block_out_channels", "down_block_types", "out_channels", "up_block_types"}
# The size of the training images and whether half precision is avoided, which no layer depends on.
_UNUSED = ("force_upcast", "sample_size")

_BLOCK_LAYERS = {"norm1": "norm1", "conv1": "conv1", "norm2": "norm2", "conv2": "conv2", "shortcut": "conv_shortcut"}
_ATTENTION_LAYERS = {"norm": "group_norm", "query": "to_q", "key": "to_k", "value": "to_v", "out": "to_out.0"}
_OUT_LAYERS = {"norm": "conv_norm_out", "conv": "conv_out"}

_LDM_MARK = "encoder.mid.block_1.norm1.weight"
_DIFFUSERS_MARK = "encoder.mid_block.resnets.0.norm1.weight"
# Latent diffusion's names, as patterns, and diffusers' names for them; `up` counts from the finest level there.
_LDM_NAMES = (
    (r"\.down\.(\d+)\.block\.", r".down_blocks.\1.resnets."),
    (r"\.down\.(\d+)\.downsample\.", r".down_blocks.\1.downsamplers.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.norm\.", ".mid_block.attentions.0.group_norm."),
    (r"\.mid\.attn_1\.([qkv])\.", r".mid_block.attentions.0.to_\1."),
    (r"\.mid\.attn_1\.proj_out\.", ".mid_block.attentions.0.to_out.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.norm_out\.", ".conv_norm_out."),
)

_BLOCK_PATTERN = r"encoder\.down_blocks\.(\d+)\.resnets\.(\d+)\."

# Which axis of ours each axis of theirs is: (out, in, h, w) of (h, w, in, out), and (out, in) of (in, out).
_SOURCE_AXES = {1: (0,), 2: (1, 0), 4: (3, 2, 0, 1)}


def convert_config(values: Mapping[str, Any]) -> ImageVAEConfig:
    """Reads the `config.json` of an `AutoencoderKL`.

    The scaling factor is the config's, and Stable Diffusion's where it names none, as in diffusers.

    Raises:
        ValueError: another class, or an option that is missing, unknown or not `ImageVAE`'s; the message names it.
    """

    def expect(condition: bool, option: str, allowed: str) -> None:
        if not condition:
            raise ValueError(f"AutoencoderKL config: {option} must be {allowed}, got {values.get(option)!r}.")

    expect(values.get("_class_name") == "AutoencoderKL", "_class_name", "'AutoencoderKL'")
    values = {option: value for option, value in values.items() if not option.startswith("_")}
    if unknown := sorted(values.keys() - {*_FIXED, *_NEEDED, *_UNUSED, "scaling_factor"}):
        raise ValueError(f"AutoencoderKL config: option {unknown[0]!r} is unknown.")
    if missing := sorted(_NEEDED - values.keys()):
        raise ValueError(f"AutoencoderKL config: option {missing[0]!r} is missing.")
    for option, value in _FIXED.items():
        expect(values.get(option, value) == value, option, repr(value))
    for option in _SIZES.values():
        expect(is_count(values[option]), option, "a positive integer")
    expect(values["out_channels"] == values["in_channels"], "out_channels", f"in_channels {values['in_channels']}")
    widths = values["block_out_channels"]
    expect(isinstance(widths, list) and all(map(is_count, widths)), "block_out_channels", "positive integers")
    for option, kind in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
        expect(values[option] == [kind] * len(widths), option, f"{len(widths)} times {kind!r}")
    factor = values.get("scaling_factor", ImageVAEConfig.scaling_factor)
    expect(isinstance(factor, float | int) and not isinstance(factor, bool), "scaling_factor", "a number")
    return ImageVAEConfig(
        **{ours: values[theirs] for ours, theirs in _SIZES.items()},
        widths=tuple(widths),
        scaling_factor=float(factor),
    )


def convert_tensors(state: Mapping[str, NumpyArray], config: ImageVAEConfig) -> dict[str, NumpyArray]:
    """Renames and transposes the state dict of an `AutoencoderKL`.

    Args:
        state: in its old or its new layout.
        config: its sizes.

    Returns:
        The parameters of `ImageVAE(config)` by flat names; float32.

    Raises:
        ValueError: a tensor that is missing, left over, of another shape or not finite; the message names it.
    """
    check_size("AutoencoderKL weights", config.num_blocks, state)
    state, tensors = with_new_names(state, "AutoencoderKL"), {}
    expected = []
    for name, leaf in flat_names(nn.meta.unbox(abstract_params(ImageVAE(config)))).items():
        source = _source_name(name, len(config.widths))
        expected.append(source)
        if source not in state:
            raise missing("AutoencoderKL weights", [source], state)
        value = state.pop(source)
        # Theirs are 1x1 convolutions; in the attention of old files too, which newer ones have as matrices.
        shape = leaf.shape
        attention = ".attentions." in source and value.ndim == 4
        if len(shape) == 2 and (attention or source.endswith(("shortcut.weight", "quant_conv.weight"))):
            shape = (1, 1, *shape)
        wanted = tuple(shape[axis] for axis in _SOURCE_AXES[len(shape)])
        if value.shape != wanted:
            raise ValueError(f"AutoencoderKL weights: {source} must be {wanted}, got {value.shape}.")
        value = value.transpose(np.argsort(_SOURCE_AXES[len(shape)])).reshape(leaf.shape).astype(np.float32)
        if not np.isfinite(value).all():
            raise ValueError(f"AutoencoderKL weights: {source} has a value that is not finite.")
        tensors[name] = value
    if state:
        raise unknown("AutoencoderKL weights", state, expected)
    return tensors


def convert_sd_vae(source: epath.PathLike, config: epath.PathLike | None = None) -> dict[str, bytes]:
    """Converts an image autoencoder.

    Args:
        source: a directory with `diffusion_pytorch_model.safetensors` (taken first) or `.bin`, or one such file; or a
            file in the layout of latent diffusion.
        config: the `config.json` of diffusers' layout (default: the one beside the weights).

    Returns:
        The contents of the files that `sora_jax.load` reads, by name.

    Raises:
        FileNotFoundError: weights or config that are missing.
        ValueError: files that do not hold such a network; the message names them.
    """
    state, weights = read_weights(source, "VAE", (_LDM_MARK, _DIFFUSERS_MARK), folder="vae")
    ldm = _from_latent_diffusion(state)
    if ldm is None:
        values, path = read_options(weights, config, "VAE")
        try:
            converted = convert_config(values)
        except ValueError as error:
            raise ValueError(f"{path} cannot be converted: {error}") from error
    try:
        if ldm is not None:
            state, converted = ldm, _config_of_shapes(ldm)
        tensors = convert_tensors(state, converted)
    except ValueError as error:
        raise ValueError(f"{weights} cannot be converted: {error}") from error
    return {WEIGHTS_FILE: tensor_bytes(tensors), CONFIG_FILE: to_json(converted).encode()}


def _from_latent_diffusion(state: Mapping[str, NumpyArray]) -> dict[str, NumpyArray] | None:
    """Returns the autoencoder's tensors by diffusers' names; None where the layout is not latent diffusion's."""
    if _LDM_MARK not in state:
        return None
    # Beside them stands the loss's discriminator.
    names = [name for name in state if name.startswith(("encoder.", "decoder.", "quant_conv.", "post_quant_conv."))]
    coarsest = max((int(m[1]) for m in (re.match(r"decoder\.up\.(\d+)\.", name) for name in names) if m), default=0)
    renamed = {}
    for name in names:
        new = name
        for pattern, replacement in _LDM_NAMES:
            new = re.sub(pattern, replacement, new)
        if match := re.match(r"decoder\.up\.(\d+)\.(block|upsample)\.(.*)", new):
            kind = {"block": "resnets", "upsample": "upsamplers.0"}[match[2]]
            new = f"decoder.up_blocks.{coarsest - int(match[1])}.{kind}.{match[3]}"
        renamed[new] = state[name]
    return renamed


def _config_of_shapes(state: Mapping[str, NumpyArray]) -> ImageVAEConfig:
    """Returns the sizes of an autoencoder of latent diffusion; groups, epsilon and scale are Stable Diffusion's."""

    def shape(name: str) -> tuple[int, ...]:
        if name not in state or state[name].ndim < 1:
            raise ValueError(f"AutoencoderKL weights: tensor {name} is missing.")
        return state[name].shape

    found = {tuple(map(int, m.groups())) for m in (re.match(_BLOCK_PATTERN, name) for name in state) if m}
    widths = [shape(f"encoder.down_blocks.{i}.resnets.0.conv1.weight")[0] for i in sorted({i for i, _ in found})]
    return ImageVAEConfig(
        channels=shape("decoder.conv_out.bias")[0],
        latent_channels=shape("post_quant_conv.bias")[0],
        widths=tuple(widths),
        num_blocks=1 + max((j for _, j in found), default=0),
    )


def _source_name(name: str, num_levels: int) -> str:
    """Returns the name that `AutoencoderKL` has for one of our parameters."""
    side, layer, *rest, leaf = name.split(".")
    leaf = {"kernel": "weight", "scale": "weight", "bias": "bias"}[leaf]
    if layer in ("quant", "post_quant"):
        return f"{layer}_conv.{leaf}"
    if layer == "out":
        return f"{side}.{_OUT_LAYERS[rest[0]]}.{leaf}"
    if layer == "conv_in":
        return f"{side}.conv_in.{leaf}"
    way, *place = layer.split("_")
    if way == "mid":
        if place[0] == "attention":
            return f"{side}.mid_block.attentions.0.{_ATTENTION_LAYERS[rest[0]]}.{leaf}"
        return f"{side}.mid_block.resnets.{place[1]}.{_BLOCK_LAYERS[rest[0]]}.{leaf}"
    # Theirs counts in the order of computation, so from the coarsest level on the way up.
    level = num_levels - 1 - int(place[0]) if way == "up" else int(place[0])
    if place[1] == "block":
        return f"{side}.{way}_blocks.{level}.resnets.{place[2]}.{_BLOCK_LAYERS[rest[0]]}.{leaf}"
    return f"{side}.{way}_blocks.{level}.{way}samplers.0.conv.{leaf}"
