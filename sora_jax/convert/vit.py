"""ViT's published weights into `sora_jax.models.vit`, and ours into the official layout.

Three layouts are read: the `.npz` files of the official JAX code (google-research/vision_transformer), and, with a
`config.json` beside `model.safetensors` or `pytorch_model.bin`, the `ViTForImageClassification` of transformers and the
`VisionTransformer` of timm. Those of the official code and of timm may be hybrids (`sora_jax.convert.vit_hybrid`).

The values of a patch run in the order y, x, channel in the official kernel (P, P, C, D) as in
`sora_jax.patches.patchify`, so the official tensors are reshaped and nothing else. PyTorch's are transposed first.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from flax import linen as nn
from flax import traverse_util

from sora_jax.array_types import NumpyArray, PyTree
from sora_jax.config_json import to_json
from sora_jax.convert.state_dict import check_depth, check_real, check_size, missing, unknown
from sora_jax.convert.vit_hybrid import TIMM_EPSILONS, flat_group_norms, npz_stem, timm_to_npz
from sora_jax.convert.weight_files import find_weights, read_npz, read_options, read_weights
from sora_jax.models.vit import ViT, ViTConfig, abstract_params
from sora_jax.models.weights import CONFIG_FILE, WEIGHTS_FILE, tensor_bytes
from sora_jax.provenance import flat_names

MARKS = ("vit.embeddings.patch_embeddings.projection.weight", "patch_embed.proj.weight")

_NPZ_LAYERS = {
    "patch_embedding": "embedding",
    "encoder.norm": "Transformer/encoder_norm",
    "representation": "pre_logits",
    "head": "head",
    "self_attention_norm": "LayerNorm_0",
    "self_attention.query": "MultiHeadDotProductAttention_1/query",
    "self_attention.key": "MultiHeadDotProductAttention_1/key",
    "self_attention.value": "MultiHeadDotProductAttention_1/value",
    "self_attention.out": "MultiHeadDotProductAttention_1/out",
    "mlp_norm": "LayerNorm_2",
    "mlp.mlp.fc1": "MlpBlock_3/Dense_0",
    "mlp.mlp.fc2": "MlpBlock_3/Dense_1",
}
_TORCH_LAYERS = {
    "patch_embedding": "embeddings.patch_embeddings.projection",
    "encoder.norm": "layernorm",
    "self_attention_norm": "layernorm_before",
    "self_attention.query": "attention.attention.query",
    "self_attention.key": "attention.attention.key",
    "self_attention.value": "attention.attention.value",
    "self_attention.out": "attention.output.dense",
    "mlp_norm": "layernorm_after",
    "mlp.mlp.fc1": "intermediate.dense",
    "mlp.mlp.fc2": "output.dense",
}
_BLOCKS = "encoder.blocks."
# What transformers 5 calls a layer's parts in memory; its files, like those of version 4, have the older names.
_NEW_NAMES = {
    "attention.q_proj": "attention.attention.query",
    "attention.k_proj": "attention.attention.key",
    "attention.v_proj": "attention.attention.value",
    "attention.o_proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}


class Source(NamedTuple):
    """Where one of our parameters lies in a file.

    Attributes:
        names: of its tensors: one, or one for each block.
        shape: of each tensor.
        axes: the order of the file's axes in which they are ours up to reshaping.
        part: (n, count), where ours is the n-th of so many equal parts of each tensor along its first axis.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    axes: tuple[int, ...]
    part: tuple[int, int] = (0, 1)


def gather_tensors(
    state: Mapping[str, NumpyArray], sources: Mapping[str, Source], shapes: Mapping[str, tuple[int, ...]], kind: str
) -> dict[str, NumpyArray]:
    """Takes our parameters out of a file's tensors.

    Args:
        state: the file's tensors.
        sources: by our flat names.
        shapes: of our parameters.
        kind: what errors call the file.

    Returns:
        The parameters by flat names; float32.

    Raises:
        ValueError: a tensor that is missing, left over, of another shape or not finite; the message names it.
    """
    expected = dict.fromkeys(key for source in sources.values() for key in source.names)
    if lacking := [key for key in expected if key not in state]:
        raise missing(kind, lacking, state)
    tensors = {}
    for name, source in sources.items():
        values = []
        for key in source.names:
            value = state[key]
            if value.shape != source.shape:
                raise ValueError(f"{kind}: {key} must be {source.shape}, got {value.shape}.")
            check_real(f"{kind}: {key}", value)
            part, count = source.part
            value = np.split(value, count)[part].astype(np.float32)
            if not np.isfinite(value).all():
                raise ValueError(f"{kind}: {key} has a value that is not finite.")
            values.append(value.transpose(source.axes))
        tensors[name] = np.stack(values).reshape(shapes[name])
    if left := state.keys() - expected.keys():
        raise unknown(kind, left, expected)
    return tensors


def npz_config(state: Mapping[str, NumpyArray], image_size: tuple[int, int] | None = None) -> ViTConfig:
    """Reads the sizes off the tensors of an official file.

    Its code computes GELU by the tanh approximation (`jax.nn.gelu`'s default), so `exact_gelu` is false.

    Args:
        state: the file's tensors.
        image_size: (height, width) in pixels; None for the square that the positions make.

    Raises:
        ValueError: a tensor without which the sizes are not known, or positions that make no square; it is named.
    """
    first = "Transformer/encoderblock_0"

    def shape(name: str, ndim: int) -> tuple[int, ...]:
        if name not in state:
            raise missing("ViT .npz weights", [name], state)
        if state[name].ndim != ndim:
            raise ValueError(f"ViT .npz weights: {name} must have {ndim} axes, got shape {state[name].shape}.")
        return state[name].shape

    patch, _, channels, width = shape("embedding/kernel", 4)
    stem = npz_stem(state)
    if stem is not None:
        patch, channels = patch * stem.stride, shape("conv_root/kernel", 4)[2]
    positions = "Transformer/posembed_input/pos_embedding"
    num_places = shape(positions, 3)[1] - ("cls" in state)
    if image_size is None:
        side = math.isqrt(num_places)
        if side * side != num_places:
            raise ValueError(f"ViT .npz weights: {positions} has {num_places} patches, which make no square.")
        image_size = (side * patch, side * patch)
    prefix = "Transformer/encoderblock_"
    blocks = {int(match[1]) for match in (re.match(rf"{prefix}(\d{{1,9}})/", name) for name in state) if match}
    return ViTConfig(
        image_size=image_size,
        patch_size=patch,
        channels=channels,
        width=width,
        depth=check_depth("ViT .npz weights", blocks, prefix),
        num_heads=shape(f"{first}/MultiHeadDotProductAttention_1/query/kernel", 3)[1],
        mlp_dim=shape(f"{first}/MlpBlock_3/Dense_0/kernel", 2)[1],
        pooling="token" if "cls" in state else "mean",
        representation_dim=shape("pre_logits/kernel", 2)[1] if "pre_logits/kernel" in state else 0,
        num_classes=shape("head/kernel", 2)[1] if "head/kernel" in state else 0,
        exact_gelu=False,
        stem=stem,
    )


def from_npz(state: Mapping[str, NumpyArray], config: ViTConfig) -> PyTree:
    """Returns the parameters of `ViT(config)` from the tensors of an official file.

    Raises:
        ValueError: like `gather_tensors`.
    """
    shapes = _shapes(config)
    tensors = gather_tensors(flat_group_norms(state), _npz_sources(config, shapes), shapes, "ViT .npz weights")
    return traverse_util.unflatten_dict(tensors, sep=".")


def to_npz(params: PyTree, config: ViTConfig) -> dict[str, NumpyArray]:
    """Returns the tensors of an official file: the inverse of `from_npz`.

    Args:
        params: of `ViT(config)`, unboxed.
        config: of the model.
    """
    values, tensors = flat_names(params), {}
    for name, source in _npz_sources(config, _shapes(config)).items():
        parts = np.asarray(values[name]).reshape(len(source.names), *source.shape)
        tensors |= dict(zip(source.names, parts, strict=True))
    return tensors


def torch_config(values: Mapping[str, Any], num_classes: int) -> ViTConfig:
    """Reads the `config.json` of a `ViTForImageClassification`.

    Args:
        values: its options.
        num_classes: of the head, which the file of weights tells.

    Raises:
        ValueError: an option that is missing or not `ViT`'s; the message names it.
    """
    expect_options(values, "vit")
    size = values["image_size"]
    return ViTConfig(
        image_size=(size, size) if isinstance(size, int) else tuple(size),
        patch_size=values["patch_size"],
        channels=values["num_channels"],
        **common_options(values),
        num_classes=num_classes,
    )


def expect_options(values: Mapping[str, Any], kind: str) -> None:
    """Checks the options that the config of a ViT or a ViViT of transformers must have.

    Args:
        values: the options.
        kind: `vit` or `vivit`, its `model_type`.

    Raises:
        ValueError: one that is missing or another network's; the message names it.
    """
    needed = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "layer_norm_eps")
    sizes = {"vit": ("patch_size",), "vivit": ("num_frames", "tubelet_size")}[kind]
    for option, allowed in (
        ("model_type", (kind,)),
        ("qkv_bias", (True,)),
        ("hidden_act", ("gelu", "gelu_fast", "gelu_new", "gelu_pytorch_tanh")),
    ):
        value = values.get(option, None if option == "model_type" else allowed[0])
        if value not in allowed:
            words = " or ".join(map(repr, allowed))
            raise ValueError(f"{kind} config: {option} must be {words}, got {value!r}.")
    for option in (*needed, "hidden_act", "image_size", "num_channels", *sizes):
        if option not in values:
            raise ValueError(f"{kind} config: option {option!r} is missing.")


def common_options(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of `ViTConfig` and `ViViTConfig` that transformers has one name for."""
    return {
        "width": values["hidden_size"],
        "depth": values["num_hidden_layers"],
        "num_heads": values["num_attention_heads"],
        "mlp_dim": values["intermediate_size"],
        "norm_eps": values["layer_norm_eps"],
        "exact_gelu": values["hidden_act"] == "gelu",
    }


def torch_sources(
    shapes: Mapping[str, tuple[int, ...]], kernel: tuple[int, ...], depth: int, prefix: str
) -> dict[str, Source]:
    """Returns where the parameters of a ViT or a ViViT (Model 1) lie in a state dict of transformers.

    Args:
        shapes: of our parameters by flat names.
        kernel: (P, P) or (t, P, P), sides of the kernel of the patch embedding.
        depth: number of blocks.
        prefix: `vit.` or `vivit.`, which all names but the head's have.
    """
    sources = {}
    for name, shape in shapes.items():
        if name == "encoder.class_token":
            sources[name] = Source((f"{prefix}embeddings.cls_token",), (1, 1, *shape), (0, 1, 2))
            continue
        if name == "encoder.position_embedding":
            sources[name] = Source((f"{prefix}embeddings.position_embeddings",), (1, *shape), (0, 1, 2))
            continue
        layer, leaf = name.rsplit(".", 1)
        leaf = "bias" if leaf == "bias" else "weight"
        if name.startswith(_BLOCKS):
            layer, shape = _TORCH_LAYERS[layer.removeprefix(_BLOCKS)], shape[1:]
            names = tuple(f"{prefix}encoder.layer.{i}.{layer}.{leaf}" for i in range(depth))
        else:
            names = (f"classifier.{leaf}" if layer == "head" else f"{prefix}{_TORCH_LAYERS[layer]}.{leaf}",)
        if name == "patch_embedding.kernel":
            channels = shape[0] // math.prod(kernel)
            # (D, C, ..., P, P) -> (..., P, P, C, D)
            sources[name] = Source(names, (shape[1], channels, *kernel), (*range(2, 2 + len(kernel)), 1, 0))
        else:
            sources[name] = Source(names, shape[::-1], tuple(reversed(range(len(shape)))))
    return sources


def convert_vit(source: epath.PathLike, image_size: tuple[int, int] | None = None) -> dict[str, bytes]:
    """Converts a ViT.

    Args:
        source: an official `.npz` file; or a directory with `config.json` and `model.safetensors` (taken first) or
            `pytorch_model.bin` of a `ViTForImageClassification` or of timm's `VisionTransformer` (which has the exact
            GELU and other epsilons in its stem), or that file of weights beside its config.
        image_size: (height, width) of an official or a timm model whose images are not square; None where they are.

    Returns:
        The contents of the files that `sora_jax.load` reads, by name.

    Raises:
        FileNotFoundError: weights or config that are missing.
        ValueError: files that do not hold such a network; the message names them.
    """
    source = epath.Path(source)
    if source.suffix != ".npz":
        values, _ = read_options(find_weights(source, "ViT"), None, "ViT")
        state, weights = read_weights(source, "ViT", MARKS)
        try:
            state = file_names(state)
            if "patch_embed.proj.weight" in state:
                config, tensors = _from_timm(state, image_size)
            else:
                head = state.get("classifier.bias")
                config = torch_config(values, 0 if head is None else len(head))
                check_size("ViT weights", config.depth, state)
                shapes, kernel = _shapes(config), (config.patch_size, config.patch_size)
                sources = torch_sources(shapes, kernel, config.depth, "vit.")
                tensors = gather_tensors(state, sources, shapes, "ViT weights")
        except ValueError as error:
            raise ValueError(f"{weights} cannot be converted: {error}") from error
    else:
        if not source.is_file():
            raise FileNotFoundError(f"no ViT at {source}.")
        try:
            state = read_npz(source)
            config = npz_config(state, image_size)
            tensors = flat_names(from_npz(state, config))
        except ValueError as error:
            raise ValueError(f"{source} cannot be converted: {error}") from error
    return {WEIGHTS_FILE: tensor_bytes(tensors), CONFIG_FILE: to_json(config).encode()}


def _from_timm(
    state: Mapping[str, NumpyArray], image_size: tuple[int, int] | None
) -> tuple[ViTConfig, dict[str, NumpyArray]]:
    """Returns config and flat parameters from the tensors of a `VisionTransformer` of timm, computed as timm does."""
    state = timm_to_npz(state)
    config = dataclasses.replace(npz_config(state, image_size), exact_gelu=True)
    if config.stem is not None:
        config = dataclasses.replace(config, stem=dataclasses.replace(config.stem, **TIMM_EPSILONS))
    return config, flat_names(from_npz(state, config))


def file_names(state: Mapping[str, NumpyArray]) -> dict[str, NumpyArray]:
    """Returns tensors by the names that files have: a state dict saved from transformers 5 has others."""
    return {_file_name(name): value for name, value in state.items()}


def _file_name(name: str) -> str:
    """Returns the name in files of a tensor."""
    if match := re.fullmatch(r"(\w+)\.layers\.(\d+)\.(.+)\.(weight|bias)", name):
        prefix, layer, part, leaf = match.groups()
        return f"{prefix}.encoder.layer.{layer}.{_NEW_NAMES.get(part, part)}.{leaf}"
    return name


def _npz_sources(config: ViTConfig, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Source]:
    """Returns where the parameters of `ViT(config)` lie in an official file."""
    heads = (config.num_heads, config.width // config.num_heads)
    sources = {}
    for name, shape in shapes.items():
        if name == "encoder.class_token":
            names, shape = ("cls",), (1, 1, *shape)
        elif name == "encoder.position_embedding":
            names, shape = ("Transformer/posembed_input/pos_embedding",), (1, *shape)
        elif name.startswith(_BLOCKS):
            layer, leaf = name.removeprefix(_BLOCKS).rsplit(".", 1)
            names = tuple(f"Transformer/encoderblock_{i}/{_NPZ_LAYERS[layer]}/{leaf}" for i in range(config.depth))
            shape = shape[1:]
            if layer in ("self_attention.query", "self_attention.key", "self_attention.value"):
                shape = (*shape[:-1], *heads)
            elif name.endswith("self_attention.out.kernel"):
                shape = (*heads, config.width)
        elif name.startswith("stem."):
            names = (name.removeprefix("stem.").replace(".", "/"),)
        else:
            layer, leaf = name.rsplit(".", 1)
            names = (f"{_NPZ_LAYERS[layer]}/{leaf}",)
            if name == "patch_embedding.kernel":
                side = config.patch_size if config.stem is None else config.patch_size // config.stem.stride
                shape = (side, side, shape[0] // side**2, config.width)
        sources[name] = Source(names, shape, tuple(range(len(shape))))
    return sources


def _shapes(config: ViTConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the parameters of `ViT(config)` by flat names."""
    return {name: leaf.shape for name, leaf in flat_names(nn.meta.unbox(abstract_params(ViT(config)))).items()}
