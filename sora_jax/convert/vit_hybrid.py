"""The ResNet stem of ViT's hybrids in the official layout, and timm's layout of a ViT in terms of the official one.

The stem's parameters have the official names in `sora_jax.models.resnet_stem` too. The published files hold the scales
and biases of its group norms as (1, 1, 1, C), newer code as (C,).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from sora_jax.array_types import NumpyArray
from sora_jax.models.resnet_stem import ResNetStemConfig

# How timm computes a stem (see `sora_jax.models.resnet_stem`).
TIMM_EPSILONS = {"norm_eps": 1e-5, "kernel_eps": 1e-8}

_LAYERS = {
    "patch_embed.proj": "embedding",
    "patch_embed.backbone.stem.conv": "conv_root",
    "patch_embed.backbone.stem.norm": "gn_root",
    "patch_embed.backbone.conv": "conv_root",  # a stem of the root alone
    "patch_embed.backbone.norm": "gn_root",
    "norm": "Transformer/encoder_norm",
    "head": "head",
}
_BLOCK_LAYERS = {
    "norm1": "LayerNorm_0",
    "attn.proj": "MultiHeadDotProductAttention_1/out",
    "norm2": "LayerNorm_2",
    "mlp.fc1": "MlpBlock_3/Dense_0",
    "mlp.fc2": "MlpBlock_3/Dense_1",
}
_GROUP_NORM = re.compile(r"(.*/)?gn(_root|_proj|\d)/(scale|bias)")


def flat_group_norms(state: Mapping[str, NumpyArray]) -> dict[str, NumpyArray]:
    """Returns an official file's tensors with scales and biases of group norms as (C,)."""
    flat = {}
    for name, value in state.items():
        leading = value.ndim == 4 and value.shape[:3] == (1, 1, 1)
        flat[name] = value.reshape(-1) if leading and _GROUP_NORM.fullmatch(name) else value
    return flat


def npz_stem(state: Mapping[str, NumpyArray]) -> ResNetStemConfig | None:
    """Reads the size of the stem off the tensors of an official file; None where there is none.

    Raises:
        ValueError: a root that is not a convolution's kernel, or of a width that `ResNetStemConfig` does not allow.
    """
    if "conv_root/kernel" not in state:
        return None
    kernel = state["conv_root/kernel"]
    if kernel.ndim != 4:
        raise ValueError(f"ViT .npz weights: conv_root/kernel must have 4 axes, got shape {kernel.shape}.")
    units: dict[int, int] = {}
    for name in state:
        if match := re.match(r"block(\d+)/unit(\d+)/", name):
            stage, unit = int(match[1]), int(match[2])
            units[stage] = max(units.get(stage, 0), unit)
    stages = tuple(units.get(stage, 1) for stage in range(1, max(units, default=0) + 1))
    return ResNetStemConfig(stages, width=kernel.shape[3])


def timm_to_npz(state: Mapping[str, NumpyArray]) -> dict[str, NumpyArray]:
    """Returns the tensors of a `VisionTransformer` of timm, hybrid or not, as an official file has them.

    A file does not tell the number of heads: it is the published ViTs', which have 64 values a head (80 at width 1280).
    A name that no such network has stays what it is.

    Raises:
        ValueError: a width that 64 does not divide.
    """
    tensors: dict[str, NumpyArray] = {}
    for name, value in state.items():
        layer, _, leaf = name.rpartition(".")
        leaf = "bias" if leaf == "bias" else "scale" if value.ndim == 1 else "kernel"
        block = re.fullmatch(r"blocks\.(\d+)\.(.+)", layer)
        unit = re.fullmatch(
            r"patch_embed\.backbone\.stages\.(\d+)\.blocks\.(\d+)\.(?:(downsample)\.)?(conv|norm)(\d?)", layer
        )
        if name == "cls_token":
            tensors["cls"] = value
        elif name == "pos_embed":
            tensors["Transformer/posembed_input/pos_embedding"] = value
        elif unit:
            stage, n, projection, kind, number = unit.groups()
            layer = ("conv" if kind == "conv" else "gn") + ("_proj" if projection else number)
            tensors[f"block{int(stage) + 1}/unit{int(n) + 1}/{layer}/{leaf}"] = _reversed_kernel(value)
        elif block and block[2] == "attn.qkv":
            for part, matrix in zip(("query", "key", "value"), np.split(value, 3), strict=True):
                heads = (_num_heads(len(matrix)), -1)
                matrix = matrix.reshape(heads) if leaf == "bias" else matrix.T.reshape(matrix.shape[1], *heads)
                tensors[f"Transformer/encoderblock_{block[1]}/MultiHeadDotProductAttention_1/{part}/{leaf}"] = matrix
        elif block and block[2] in _BLOCK_LAYERS:
            value = _reversed_kernel(value)
            if block[2] == "attn.proj" and leaf == "kernel":
                value = value.reshape(_num_heads(len(value)), -1, value.shape[1])
            tensors[f"Transformer/encoderblock_{block[1]}/{_BLOCK_LAYERS[block[2]]}/{leaf}"] = value
        elif layer in _LAYERS:
            tensors[f"{_LAYERS[layer]}/{leaf}"] = _reversed_kernel(value)
        else:
            tensors[name] = value
    return tensors


def _reversed_kernel(value: NumpyArray) -> NumpyArray:
    """Returns a kernel (out, in) as (in, out), or (out, in, h, w) as (h, w, in, out); others as they are."""
    return value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T


def _num_heads(width: int) -> int:
    """Returns the heads of the published ViT of this width."""
    if width % 64:
        raise ValueError(f"ViT weights of timm: the width must be a multiple of 64, the size of a head, got {width}.")
    return 16 if width == 1280 else width // 64
