"""What older versions of `config.json` wrote, as the next version would have: one function a version.

A key that was added needs none, since a key that a file lacks takes its field's default. What was renamed or removed,
or means something else now, has a function here, which `MIGRATIONS` lists under the version that it reads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

# The key that distinguishes a kind from those further down, and whether it is a run's, which has `optimizer` too.
_KINDS_OF_VERSION_1 = (
    ("sora", "flow", True),
    ("dit", "class_dropout", True),
    ("contrastive", "embedding_dim", True),
    ("classification", "objective", True),
    ("diffusion", "num_held_out", True),
    ("vivit", "tubelet_size", False),
    ("vit", "representation_dim", False),
    ("dit_model", "conditioning", False),
    ("unet", "multipliers", False),
    ("image_vae", "scaling_factor", False),
    ("minilm", "max_positions", False),
)


def add_kind(values: dict[str, Any]) -> dict[str, Any]:
    """Version 1 to 2: the kind is written, and is no longer inferred from the keys."""
    trained = "optimizer" in values
    kind = next((kind for kind, key, run in _KINDS_OF_VERSION_1 if key in values and run == trained), None)
    return values if kind is None else {"kind": kind, **_with_latents_in_rows(values)}


def _with_latents_in_rows(values: dict[str, Any]) -> dict[str, Any]:
    """Writes how a DiT read its latents as pictures are read: one of one size a row, mirrored half the time."""
    data, network = values.get("data"), values.get("model")
    if not all(isinstance(part, dict) for part in (data, network)):
        return values  # which the config refuses, naming the field
    if "class_dropout" not in values or "sampling" in data or "row_length" not in data:
        return values
    size = network.get("image_size")
    rows = {"sampling": {"size": size}, "max_segments": 1, "num_bins": 1, "num_shards": 1, "flip": 0.5}
    return {**values, "data": {**data, **rows}}


MIGRATIONS: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {1: add_kind}
