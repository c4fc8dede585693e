"""Parameters in a safetensors file: names joined by dots, of any stored dtype, read as float32."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TypeVar

import jax
import numpy as np
import safetensors
import safetensors.numpy
from etils import epath
from flax import traverse_util

from sora_jax.array_types import Array, NumpyArray, PyTree
from sora_jax.config_json import Document, as_first_written, config_of, parse
from sora_jax.models.file_kinds import what_else
from sora_jax.models.quantize import dequantize_tensors
from sora_jax.provenance import flat_names

T = TypeVar("T")

WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"
_NAMES = {
    "F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16", "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2", "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U64": "uint64",
    "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
MAX_HEADER = 100_000_000  # bytes that the header of a safetensors file may have
DTYPES = {name: jax.numpy.dtype(dtype) for name, dtype in _NAMES.items()}


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
    """Raises ValueError naming the first parameter with a value that is NaN or infinite.

    Parameters on devices are looked at there, each device at its share.
    """
    flat = flat_names(params)
    if all(isinstance(value, jax.Array) for value in flat.values()):
        finite = jax.device_get(_are_finite(list(flat.values())))
    else:
        finite = (np.isfinite(value).all() for value in flat.values())
    for name, whole in zip(flat, finite, strict=True):
        if not whole:
            raise ValueError(f"{where}: parameter {name} has a value that is not finite.")


@jax.jit
def _are_finite(values: list[Array]) -> list[Array]:
    return [jax.numpy.isfinite(value).all() for value in values]


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
        raise not_whole(where, data, len(data), error) from error
    stored = {}
    for name, tensor in tensors:
        if tensor["dtype"] not in DTYPES:
            raise ValueError(f"{where}: {name} has dtype {tensor['dtype']}; this reads {', '.join(DTYPES)}.")
        stored[name] = np.frombuffer(tensor["data"], DTYPES[tensor["dtype"]]).reshape(tensor["shape"])
    return stored


def not_whole(where: str, head: bytes, size: int, error: Exception) -> ValueError:
    """Returns the error of a file that is no safetensors file, or not all of one.

    Args:
        where: the file is.
        head: its beginning, with its header where it has one.
        size: of the file, in bytes.
        error: what reading it gave.
    """
    words = what_else(head[:1000])
    return ValueError(
        f"{where} is not a whole safetensors file: {f'it {words}' if words else _cut_short(head, size) or error}."
    )


def _cut_short(head: bytes, size: int) -> str | None:
    """Returns how much of a safetensors file is there, where its header promises more; None where it does not."""
    length = int.from_bytes(head[:8], "little")
    try:
        header = json.loads(head[8 : 8 + length])
        whole = 8 + length + max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        cut = size - 8 < length <= MAX_HEADER
        return f"it is truncated: its header alone has {length} bytes, the file {size}" if cut else None
    return f"it is truncated: {size} of its {whole} bytes are there" if size < whole else None


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


def read_document(path: epath.PathLike) -> Document:
    """Reads a `config.json`, whatever it is of.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is none, or of no version that is known, naming the file.
    """
    path = epath.Path(path)
    data = path.read_bytes()
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} {what_else(data[:1000]) or 'is no text'}.") from error
    try:
        return parse(text)
    except json.JSONDecodeError as error:
        words = what_else(text[:1000].encode())
        raise ValueError(f"{path} {words}." if words and "JSON" not in words else f"{path}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_config_file(path: epath.PathLike, config_class: type[T]) -> T:
    """Reads a `config.json` of one kind.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is none of this or an older version, or another kind's, naming the file and the key.
    """
    document = read_document(path)
    try:
        return config_of(config_class, document)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def weights_fingerprint(directory: epath.PathLike) -> str:
    """Returns the SHA-256 of the config and the weights of a converted model; the config's version does not change it.

    Raises:
        FileNotFoundError: a file that is missing.
        ValueError: a config that cannot be read.
    """
    directory = epath.Path(directory)
    digest = hashlib.sha256(as_first_written(read_document(directory / CONFIG_FILE)).encode())
    with (directory / WEIGHTS_FILE).open("rb") as stream:
        while chunk := stream.read(1 << 24):
            digest.update(chunk)
    return digest.hexdigest()
