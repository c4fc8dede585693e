"""What the layouts of diffusers' autoencoder and U-Net share: names of old files, and options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sora_jax.array_types import NumpyArray

_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


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
