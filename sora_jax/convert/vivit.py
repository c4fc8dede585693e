"""ViViT's published weights, in the layout of transformers' `VivitForVideoClassification`, into Model 1.

The source is a directory such as a copy of `google/vivit-b-16x2-kinetics400`: `config.json` beside
`model.safetensors` or `pytorch_model.bin`. Tensors are renamed and transposed, never mixed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from etils import epath
from flax import linen as nn

from sora_jax.config_json import to_json
from sora_jax.convert.state_dict import check_size
from sora_jax.convert.vit import common_options, expect_options, file_names, gather_tensors, torch_sources
from sora_jax.convert.weight_files import find_weights, read_options, read_weights
from sora_jax.models.vivit import ViViT, ViViTConfig, abstract_params
from sora_jax.models.weights import CONFIG_FILE, WEIGHTS_FILE, tensor_bytes
from sora_jax.provenance import flat_names


def torch_config(values: Mapping[str, Any], num_classes: int) -> ViViTConfig:
    """Reads the `config.json` of a `VivitForVideoClassification`.

    Args:
        values: its options.
        num_classes: of the head, which the file of weights tells.

    Raises:
        ValueError: an option that is missing or not `ViViT`'s; the message names it.
    """
    expect_options(values, "vivit")
    size = values["image_size"]
    return ViViTConfig(
        num_frames=values["num_frames"],
        image_size=(size, size) if isinstance(size, int) else tuple(size),
        tubelet_size=tuple(values["tubelet_size"]),
        channels=values["num_channels"],
        **common_options(values),
        num_classes=num_classes,
    )


def convert_vivit(source: epath.PathLike) -> dict[str, bytes]:
    """Converts a ViViT (Model 1).

    Args:
        source: a directory with `config.json` and `model.safetensors` (taken first) or `pytorch_model.bin`, or that
            file of weights beside its config.

    Returns:
        The contents of the files that `sora_jax.load` reads, by name.

    Raises:
        FileNotFoundError: weights or config that are missing.
        ValueError: files that do not hold such a network; the message names them.
    """
    values, _ = read_options(find_weights(source, "ViViT"), None, "ViViT")
    state, weights = read_weights(source, "ViViT", ("vivit.embeddings.patch_embeddings.projection.weight",))
    try:
        state = file_names(state)
        head = state.get("classifier.bias")
        config = torch_config(values, 0 if head is None else len(head))
        check_size("ViViT weights", config.depth, state)
        found = flat_names(nn.meta.unbox(abstract_params(ViViT(config))))
        shapes = {name: leaf.shape for name, leaf in found.items()}
        sources = torch_sources(shapes, config.tubelet_size, config.depth, "vivit.")
        tensors = gather_tensors(state, sources, shapes, "ViViT weights")
    except ValueError as error:
        raise ValueError(f"{weights} cannot be converted: {error}") from error
    return {WEIGHTS_FILE: tensor_bytes(tensors), CONFIG_FILE: to_json(config).encode()}
