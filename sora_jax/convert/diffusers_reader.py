"""Reads a model in the layout of diffusers: `config.json` beside `diffusion_pytorch_model.safetensors` or `.bin`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from etils import epath

from sora_jax.array_types import NumpyArray
from sora_jax.convert.torch_reader import read_state_dict
from sora_jax.models.weights import CONFIG_FILE, read_tensors

SOURCE_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")

_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def find_weights(source: epath.PathLike, kind: str) -> epath.Path:
    """Returns the file of weights that `source` is or holds (`.safetensors` first).

    Raises:
        FileNotFoundError: there is none; the message calls the model `kind`.
        ValueError: a file of another kind.
    """
    source = epath.Path(source)
    if source.is_file():
        if source.suffix not in (".safetensors", ".bin"):
            raise ValueError(f"{source} must be a .safetensors or a .bin file.")
        return source
    for name in SOURCE_WEIGHTS:
        if (source / name).is_file():
            return source / name
    raise FileNotFoundError(f"no {kind} at {source}: it holds neither {' nor '.join(SOURCE_WEIGHTS)}.")


def read_options(weights: epath.Path, config: epath.PathLike | None, kind: str) -> tuple[dict[str, Any], epath.Path]:
    """Returns the options of a model's config, and the file that they stand in.

    Args:
        weights: the model's.
        config: its `config.json`; None for the one beside the weights.
        kind: what errors call the model.

    Raises:
        FileNotFoundError: there is no config.
        ValueError: it is not a JSON object; the message names it.
    """
    path = weights.parent / CONFIG_FILE if config is None else epath.Path(config)
    if not path.is_file():
        raise FileNotFoundError(f"no config of a {kind} at {path}.")
    try:
        values = json.loads(path.read_text())
        if not isinstance(values, dict):
            raise ValueError(f"expected a JSON object, got {type(values).__name__}.")
    except ValueError as error:
        raise ValueError(f"{path} cannot be converted: {error}") from error
    return values, path


def read_weights(weights: epath.Path) -> dict[str, NumpyArray]:
    """Returns the tensors of a `.safetensors` file, or of a state dict, without unpickling it.

    Raises:
        ValueError: a file that does not hold them.
    """
    return read_tensors(weights) if weights.suffix == ".safetensors" else read_state_dict(weights)


def with_new_names(state: Mapping[str, NumpyArray], kind: str) -> dict[str, NumpyArray]:
    """Renames the layers of attentions where they are called as in old files: `query, key, value, proj_attn`.

    Raises:
        ValueError: a tensor that is there under both names; the message names it.
    """
    new = {}
    for name in sorted(state):  # so that the first one is named whatever the file's order
        parts = name.split(".")
        if "attentions" in parts:
            parts = [_OLD_ATTENTION.get(part, part) for part in parts]
        renamed = ".".join(parts)
        if renamed != name and renamed in state:
            raise ValueError(f"{kind} weights: tensor {name} is unknown.")
        new[renamed] = state[name]
    return new


def is_count(value: Any) -> bool:
    """Returns whether an option is a positive integer."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
