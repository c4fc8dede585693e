"""DiT's published weights into `sora_jax.models.dit`.

Two layouts are read: the state dict of the official code (facebookresearch/DiT: `DiT-XL-2-256x256.pt`, or a checkpoint
of its `train.py`, of which the averaged weights are taken), and diffusers' `DiTTransformer2DModel`, `config.json`
beside the weights, as in the folder `transformer` of `facebook/DiT-XL-2-256`. Either may be a file of PyTorch or of
safetensors, in parts or whole, and wrapped (`sora_jax.convert.state_dict`).
Tensors are renamed, cut apart (queries, keys and values) and transposed, never mixed.

The two are not quite one network, and each is converted to what its own code computes. diffusers spaces the
frequencies of the timestep otherwise (`DiTConfig.frequency_endpoint`) than the code that trained the published
weights; `official_frequencies` undoes that. It also adds 1e-5, not 1e-6, to the variance in the norm before an MLP,
which is not imitated: at activations of order 1 it changes outputs by a few millionths.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath
from flax import linen as nn

from sora_jax.array_types import NumpyArray
from sora_jax.config_json import to_json
from sora_jax.convert.state_dict import check_depth, check_real, check_size, missing
from sora_jax.convert.vit import Source, gather_tensors
from sora_jax.convert.weight_files import read_options, read_weights
from sora_jax.models.dit import DIT_SIZES, DiT, DiTConfig, abstract_params, sincos_positions
from sora_jax.models.weights import CONFIG_FILE, WEIGHTS_FILE, tensor_bytes
from sora_jax.provenance import flat_names

_LOGGER = logging.getLogger(__name__)

OFFICIAL_MARK, DIFFUSERS_MARK = "x_embedder.proj.weight", "pos_embed.proj.weight"
# Sines as bfloat16, which a file may have or may have had, are off by 2e-3 (half precision: 5e-4).
POSITION_TOLERANCE = 4e-3
OFFICIAL, DIFFUSERS = "DiT weights", "DiTTransformer2DModel weights"

_BLOCKS = "blocks."
_ATTENTION = ("query", "key", "value")
_OFFICIAL_LAYERS = {
    "patch_embedding": "x_embedder.proj",
    "time_fc1": "t_embedder.mlp.0",
    "time_fc2": "t_embedder.mlp.2",
    "label_embedding": "y_embedder.embedding_table",
    "head_modulation": "final_layer.adaLN_modulation.1",
    "head": "final_layer.linear",
    "modulation": "adaLN_modulation.1",
    **{f"self_attention.{part}": "attn.qkv" for part in _ATTENTION},
    "self_attention.out": "attn.proj",
    "mlp.mlp.fc1": "mlp.fc1",
    "mlp.mlp.fc2": "mlp.fc2",
}
# The embeddings of timestep and class are stored once for each block there.
_EMBEDDINGS = "transformer_blocks.{}.norm1.emb."
_DIFFUSERS_LAYERS = {
    "patch_embedding": "pos_embed.proj",
    "time_fc1": _EMBEDDINGS.format(0) + "timestep_embedder.linear_1",
    "time_fc2": _EMBEDDINGS.format(0) + "timestep_embedder.linear_2",
    "label_embedding": _EMBEDDINGS.format(0) + "class_embedder.embedding_table",
    "head_modulation": "proj_out_1",
    "head": "proj_out_2",
    "modulation": "norm1.linear",
    "self_attention.query": "attn1.to_q",
    "self_attention.key": "attn1.to_k",
    "self_attention.value": "attn1.to_v",
    "self_attention.out": "attn1.to_out.0",
    "mlp.mlp.fc1": "ff.net.0.proj",
    "mlp.mlp.fc2": "ff.net.2",
}
# Options of `DiTTransformer2DModel`, and of the `Transformer2DModel` that it was in older files, with the values that
# `DiT` computes; all may be absent, since they are the defaults of the former.
_FIXED: dict[str, tuple[Any, ...]] = {
    "activation_fn": ("gelu-approximate",),
    "attention_bias": (True,),
    "attention_type": ("default",),
    "caption_channels": (None,),
    "cross_attention_dim": (None,),
    "double_self_attention": (False,),
    "interpolation_scale": (None,),
    "norm_elementwise_affine": (False,),
    "norm_eps": (1e-5, 1e-6),
    "norm_type": ("ada_norm_zero",),
    "num_vector_embeds": (None,),
    "only_cross_attention": (False,),
    "use_additional_conditions": (None, False),
    "use_linear_projection": (False,),
}
_NEEDED = (
    "num_attention_heads", "attention_head_dim", "in_channels", "num_layers", "sample_size", "patch_size",
    "num_embeds_ada_norm",
)  # fmt: skip
_UNUSED = ("dropout", "norm_num_groups", "out_channels", "upcast_attention")


def official_config(
    state: Mapping[str, NumpyArray], num_heads: int | None = None, num_classes: int | None = None
) -> DiTConfig:
    """Reads the sizes off the tensors of an official state dict.

    Args:
        state: the tensors.
        num_heads: which no tensor tells; None for those of the published size of the same width and depth.
        num_classes: which no tensor tells either: the label table has a row more for the null class, or not where no
            labels were dropped in training. None assumes that it has, and logs it.

    Raises:
        ValueError: a tensor without which the sizes are not known, or positions that make no square, named; a width
            and depth of no published size without `num_heads`; or `num_classes` that the label table cannot have.
    """

    def shape(name: str, ndim: int) -> tuple[int, ...]:
        if name not in state:
            raise missing(OFFICIAL, [name], state)
        if state[name].ndim != ndim:
            raise ValueError(f"{OFFICIAL}: {name} must have {ndim} axes, got shape {state[name].shape}.")
        return state[name].shape

    width, channels, patch, _ = shape("x_embedder.proj.weight", 4)
    if "pos_embed" not in state:
        raise ValueError(f"{OFFICIAL}: tensor pos_embed is missing, which tells the size of the images.")
    num_places = shape("pos_embed", 3)[1]
    side = math.isqrt(num_places)
    if side * side != num_places:
        raise ValueError(f"{OFFICIAL}: pos_embed has {num_places} places, which make no square.")
    blocks = {int(m[1]) for m in (re.match(r"blocks\.(\d{1,9})\.", name) for name in state) if m}
    depth = check_depth(OFFICIAL, blocks, "blocks.")
    if num_heads is None:
        published = {(c.width, c.depth): c.num_heads for c in DIT_SIZES.values()}
        if (width, depth) not in published:
            raise ValueError(
                f"{OFFICIAL}: no published DiT has width {width} and depth {depth}, so that num_heads must be given."
            )
        num_heads = published[width, depth]
    return DiTConfig(
        image_size=(side * patch, side * patch),
        patch_size=patch,
        in_channels=channels,
        width=width,
        depth=depth,
        num_heads=num_heads,
        mlp_dim=shape("blocks.0.mlp.fc1.weight", 2)[0],
        **_classes(shape("y_embedder.embedding_table.weight", 2)[0], num_classes),
        learned_variance=shape("final_layer.linear.weight", 2)[0] == 2 * channels * patch**2,
        frequency_dim=shape("t_embedder.mlp.0.weight", 2)[1],
    )


def from_official(state: Mapping[str, NumpyArray], config: DiTConfig) -> dict[str, NumpyArray]:
    """Returns the parameters of `DiT(config)` by flat names, float32, from an official state dict.

    Raises:
        ValueError: like `gather_tensors`, or positions that are not the fixed ones.
    """
    if "pos_embed" not in state:
        raise missing(OFFICIAL, ["pos_embed"], state)
    state = dict(state)
    _check_positions(state.pop("pos_embed"), config, f"{OFFICIAL}: pos_embed")
    return gather_tensors(state, _sources(config, _OFFICIAL_LAYERS, "blocks"), _shapes(config), OFFICIAL)


def _classes(num_rows: int, num_classes: int | None) -> dict[str, int]:
    """Returns the fields of `DiTConfig` for a label table of so many rows."""
    if num_classes is None:
        if num_rows == 1:
            _LOGGER.info("the label table has 1 row: 1 class and no null class, so that guidance is not possible.")
            return {"num_classes": 1, "num_label_rows": 1}
        _LOGGER.info(
            "the label table has %d rows: %d classes and the null class are assumed; if no labels were dropped in "
            "training, and there is no null class, give --num-classes %d.", num_rows, num_rows - 1, num_rows
        )  # fmt: skip
        return {"num_classes": num_rows - 1}
    if num_classes == num_rows - 1:
        return {"num_classes": num_classes}
    if num_classes == num_rows:
        return {"num_classes": num_classes, "num_label_rows": num_rows}
    raise ValueError(
        f"{OFFICIAL}: num_classes must be {num_rows - 1} (and the null class) or {num_rows} for the {num_rows} rows of "
        f"y_embedder.embedding_table.weight, got {num_classes}."
    )


def diffusers_config(values: Mapping[str, Any], official_frequencies: bool = False) -> DiTConfig:
    """Reads the `config.json` of a `DiTTransformer2DModel`.

    Args:
        values: its options.
        official_frequencies: embed timesteps as the official code does, not as diffusers does.

    Raises:
        ValueError: another class, or an option that is missing, unknown or not `DiT`'s; the message names it.
    """

    def expect(condition: bool, option: str, allowed: str) -> None:
        if not condition:
            raise ValueError(f"DiTTransformer2DModel config: {option} must be {allowed}, got {values.get(option)!r}.")

    kinds = ("DiTTransformer2DModel", "Transformer2DModel")
    expect(values.get("_class_name") in kinds, "_class_name", " or ".join(map(repr, kinds)))
    options = {option for option in values if not option.startswith("_")}
    if unknown := sorted(options - {*_FIXED, *_NEEDED, *_UNUSED}):
        raise ValueError(f"DiTTransformer2DModel config: option {unknown[0]!r} is unknown.")
    if missing := sorted(set(_NEEDED) - options):
        raise ValueError(f"DiTTransformer2DModel config: option {missing[0]!r} is missing.")
    for option, allowed in _FIXED.items():
        expect(values.get(option, allowed[0]) in allowed, option, " or ".join(map(repr, allowed)))
    for option in _NEEDED:
        value = values[option]
        expect(isinstance(value, int) and not isinstance(value, bool) and value >= 1, option, "a positive integer")
    width = values["num_attention_heads"] * values["attention_head_dim"]
    channels, out = values["in_channels"], values.get("out_channels")
    expect(out in (None, channels, 2 * channels), "out_channels", f"{channels} or {2 * channels}")
    return DiTConfig(
        image_size=(values["sample_size"], values["sample_size"]),
        patch_size=values["patch_size"],
        in_channels=channels,
        width=width,
        depth=values["num_layers"],
        num_heads=values["num_attention_heads"],
        mlp_dim=4 * width,
        num_classes=values["num_embeds_ada_norm"],
        learned_variance=out == 2 * channels,
        frequency_endpoint=not official_frequencies,
    )


def from_diffusers(state: Mapping[str, NumpyArray], config: DiTConfig) -> dict[str, NumpyArray]:
    """Returns the parameters of `DiT(config)` by flat names, float32, from the tensors of a `DiTTransformer2DModel`.

    Raises:
        ValueError: like `gather_tensors`, positions that are not the fixed ones, or blocks whose embeddings of
            timestep and class are not the same.
    """
    state = dict(state)
    check_size(DIFFUSERS, config.depth, state)
    if "pos_embed.pos_embed" in state:  # in older files
        _check_positions(state.pop("pos_embed.pos_embed"), config, f"{DIFFUSERS}: pos_embed.pos_embed")
    first = _EMBEDDINGS.format(0)
    for name in sorted(name for name in state if name.startswith(first)):
        for block in range(1, config.depth):
            other = _EMBEDDINGS.format(block) + name.removeprefix(first)
            if other not in state:
                raise missing(DIFFUSERS, [other], state)
            if not np.array_equal(state.pop(other), state[name]):
                raise ValueError(f"{DIFFUSERS}: {other} must equal {name}: all blocks of a DiT share it.")
    return gather_tensors(state, _sources(config, _DIFFUSERS_LAYERS, "transformer_blocks"), _shapes(config), DIFFUSERS)


def convert_dit(
    source: epath.PathLike,
    num_heads: int | None = None,
    official_frequencies: bool = False,
    num_classes: int | None = None,
) -> dict[str, bytes]:
    """Converts a DiT.

    Args:
        source: a file in the official layout: a state dict, or a checkpoint that has one, averaged (taken first) or
            not. Or a directory of diffusers with `config.json` and weights, or with the folder `transformer` that
            holds them; or that file of weights beside its config.
        num_heads: of an official file of a size that is not published.
        official_frequencies: of a model of diffusers, see the module.
        num_classes: of an official file, see `official_config`.

    Returns:
        The contents of the files that `sora_jax.load` reads, by name.

    Raises:
        FileNotFoundError: weights or config that are missing.
        ValueError: files that do not hold such a network; the message names them.
    """
    state, weights = read_weights(source, "DiT", (OFFICIAL_MARK, DIFFUSERS_MARK), folder="transformer")
    if DIFFUSERS_MARK in state:
        values, _ = read_options(weights, None, "DiT")
    try:
        if DIFFUSERS_MARK in state:
            config = diffusers_config(values, official_frequencies)
            tensors = from_diffusers(state, config)
        else:
            config = official_config(state, num_heads, num_classes)
            tensors = from_official(state, config)
    except ValueError as error:
        raise ValueError(f"{weights} cannot be converted: {error}") from error
    return {WEIGHTS_FILE: tensor_bytes(tensors), CONFIG_FILE: to_json(config).encode()}


def _sources(config: DiTConfig, layers: Mapping[str, str], blocks: str) -> dict[str, Source]:
    """Returns where the parameters of `DiT(config)` lie in a state dict whose layers are called so."""
    sources = {}
    for name, shape in _shapes(config).items():
        layer, _, leaf = name.removeprefix(_BLOCKS).rpartition(".")
        if name == "label_embedding":
            sources[name] = Source((f"{layers[name]}.weight",), shape, (0, 1))
            continue
        path, leaf, part = layers[layer], "bias" if leaf == "bias" else "weight", (0, 1)
        names = (f"{path}.{leaf}",)
        if name.startswith(_BLOCKS):
            names, shape = tuple(f"{blocks}.{i}.{path}.{leaf}" for i in range(config.depth)), shape[1:]
        shape = shape[::-1]  # (out, in)
        if path.endswith("attn.qkv"):
            part = (_ATTENTION.index(layer.removeprefix("self_attention.")), 3)
            shape = (3 * shape[0], *shape[1:])
        if name == "patch_embedding.kernel":
            # (D, C, p, p) -> (p, p, C, D)
            shape = (config.width, config.in_channels, config.patch_size, config.patch_size)
            sources[name] = Source(names, shape, (2, 3, 1, 0))
        else:
            sources[name] = Source(names, shape, tuple(reversed(range(len(shape)))), part)
    return sources


def _check_positions(table: NumpyArray, config: DiTConfig, name: str) -> None:
    """Raises ValueError where a stored table of positions is not what `DiT` computes."""
    shape = (1, math.prod(config.grid), config.width)
    if table.shape != shape:
        raise ValueError(f"{name} must be {shape}, got {table.shape}.")
    check_real(name, table)
    places = np.stack(np.meshgrid(*map(np.arange, config.grid), indexing="ij"), axis=-1).reshape(-1, 2)
    expected = sincos_positions(jnp.asarray(places, jnp.float32), config.width)
    # Numbers below 1 are rounded by a quarter of the distance of 1 to the next number; 8 bits have large ones.
    tolerance = max(POSITION_TOLERANCE, 0.26 * float(jnp.finfo(table.dtype).eps))
    if not np.abs(table[0].astype(np.float32) - expected).max() < tolerance:
        raise ValueError(f"{name} is not the fixed embedding of a grid of {config.grid[0]} x {config.grid[1]} patches.")


def _shapes(config: DiTConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the parameters of `DiT(config)` by flat names."""
    return {name: leaf.shape for name, leaf in flat_names(nn.meta.unbox(abstract_params(DiT(config)))).items()}
