"""Parameters in a safetensors file: names joined by dots, of any stored dtype, read as float32."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import TypeVar

import jax
import numpy as np
import safetensors
import safetensors.numpy
from etils import epath
from flax import linen as nn
from flax import traverse_util

from sora_jax.array_types import NumpyArray, PyTree
from sora_jax.config_json import from_json
from sora_jax.models.file_kinds import what_else
from sora_jax.models.kinds import check_kind
from sora_jax.models.quantize import dequantize_tensors
from sora_jax.provenance import flat_names

T = TypeVar("T")

WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"
_NAMES = {
    "F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U64": "uint64",
    "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
_DTYPES = {name: jax.numpy.dtype(dtype) for name, dtype in _NAMES.items()}


def check_shapes(found: PyTree, expected: PyTree, where: str) -> None:
    """Raises ValueError naming the first parameter that is missing, unknown or of another shape."""
    found, expected = flat_names(found), flat_names(expected)
    for name in sorted(found.keys() | expected.keys()):
        if name not in found:
            raise ValueError(f"{where} is of another model: it lacks parameter {name}.")
        if name not in expected:
            raise ValueError(f"{where} is of another model: it has an unknown parameter {name}.")
        shapes = tuple(found[name].shape), tuple(expected[name].shape)
        if shapes[0] != shapes[1]:
            raise ValueError(f"{where} is of another model: {name} has shape {shapes[0]}, the config asks {shapes[1]}.")


def check_finite(params: PyTree, where: str) -> None:
    """Raises ValueError naming the first parameter with a value that is NaN or infinite."""
    for name, value in flat_names(params).items():
        if not np.isfinite(value).all():
            raise ValueError(f"{where}: parameter {name} has a value that is not finite.")


def tensor_bytes(tensors: Mapping[str, NumpyArray]) -> bytes:
    """Returns the contents of a safetensors file that holds `tensors` as they are."""
    # Files hold C order, whatever view a tensor is.
    tensors = {name: np.asarray(value, order="C") for name, value in tensors.items()}
    return safetensors.numpy.save(tensors, metadata={"format": "sora_jax"})


def read_tensors(path: epath.PathLike) -> dict[str, NumpyArray]:
    """Returns the tensors of a safetensors file by name, of the dtypes that they are stored in.

    Raises:
        ValueError: a truncated or another file, or a dtype that is not read; the message names the file.
    """
    path = epath.Path(path)
    return tensors_of(path.read_bytes(), str(path))


def tensors_of(data: bytes, where: str) -> dict[str, NumpyArray]:
    """Returns the tensors of the contents of a safetensors file; raises what `read_tensors` does, of a file `where`."""
    try:
        tensors = safetensors.deserialize(data)
    except safetensors.SafetensorError as error:
        words = what_else(data[:1000])
        raise ValueError(
            f"{where} is not a whole safetensors file: {f'it {words}' if words else _cut_short(data) or error}."
        ) from error
    stored = {}
    for name, tensor in tensors:
        if tensor["dtype"] not in _DTYPES:
            raise ValueError(f"{where}: {name} has dtype {tensor['dtype']}; this reads {', '.join(_DTYPES)}.")
        stored[name] = np.frombuffer(tensor["data"], _DTYPES[tensor["dtype"]]).reshape(tensor["shape"])
    return stored


def _cut_short(data: bytes) -> str | None:
    """Returns how much of a safetensors file is there, where its header promises more; None where it does not."""
    length = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + length])
        size = 8 + length + max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        cut = len(data) - 8 < length < 100_000_000  # the most that a header may have
        return f"it is truncated: its header alone has {length} bytes, the file {len(data)}" if cut else None
    return f"it is truncated: {len(data)} of its {size} bytes are there" if len(data) < size else None


def read_params(path: epath.PathLike) -> PyTree:
    """Returns the nested parameters of a safetensors file as float32; quantised ones (`quantize.py`) are restored.

    Raises:
        ValueError: like `read_tensors`, a quantised tensor that is not whole, names of which one begins another, or a
            parameter that is not finite, named.
    """
    stored = read_tensors(path)
    parents = {name[:end] for name in stored for end, character in enumerate(name) if character == "."}
    if clashes := sorted(parents & stored.keys()):
        raise ValueError(f"{path}: {clashes[0]} is a tensor and also the beginning of other tensors' names.")
    try:
        params = dequantize_tensors(stored)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    check_finite(params, str(path))
    return traverse_util.unflatten_dict(params, sep=".")


def read_config_file(path: epath.PathLike, config_class: type[T]) -> T:
    """Reads a `config.json`.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is none of this version, naming the file and the key; or another kind's, which is named.
    """
    path = epath.Path(path)
    text = path.read_text()
    try:
        keys = json.loads(text)
    except ValueError as error:
        words = what_else(text[:1000].encode())
        raise ValueError(f"{path} {words}." if words and "JSON" not in words else f"{path}: {error}") from error
    if isinstance(keys, dict):
        check_kind(keys, config_class.__name__, str(path.parent))
    try:
        return from_json(config_class, text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_model(
    path: epath.PathLike, config_class: type[T], kind: str, abstract_params: Callable[[T], PyTree]
) -> tuple[T, PyTree]:
    """Reads the config and the parameters of a model directory that `experiments/convert_checkpoint.py` wrote.

    Args:
        path: the directory, local or `gs://`.
        config_class: the dataclass that `config.json` holds.
        kind: what errors call the model.
        abstract_params: gives the shapes of the parameters of a config's model, boxed or not.

    Returns:
        The config, and nested parameters as NumPy arrays, float32.

    Raises:
        FileNotFoundError: a file that is missing; the message names it.
        ValueError: a file that cannot be read, or parameters that are not those of the config; the message names it.
    """
    path = epath.Path(path)
    file = path / CONFIG_FILE
    config = read_config_file(file, config_class) if file.is_file() else None  # first: it says what the directory is
    for name in (WEIGHTS_FILE, CONFIG_FILE):
        if not (path / name).is_file():
            raise FileNotFoundError(
                f"no {kind} at {path}: {name} is missing (experiments/convert_checkpoint.py writes it)."
            )
    params = read_params(path / WEIGHTS_FILE)
    check_shapes(params, nn.meta.unbox(abstract_params(config)), str(path))
    return config, params
