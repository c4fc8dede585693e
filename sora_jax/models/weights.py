"""Parameters in a safetensors file: names joined by dots, of any stored dtype, read as float32."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
import safetensors
import safetensors.numpy
from etils import epath
from flax import linen as nn
from flax import traverse_util

from sora_jax.array_types import NumpyArray, PyTree
from sora_jax.config_json import from_json
from sora_jax.models.quantize import dequantize_tensors

T = TypeVar("T")

WEIGHTS_FILE, CONFIG_FILE = "model.safetensors", "config.json"
_NAMES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16", "U8": "uint8"}
_DTYPES = {name: jax.numpy.dtype(dtype) for name, dtype in _NAMES.items()}


def flat_names(params: PyTree) -> dict[str, Any]:
    """Returns the leaves by their path, joined by dots, sorted."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return dict(sorted((jax.tree_util.keystr(path, simple=True, separator="."), leaf) for path, leaf in leaves))


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
    try:
        tensors = safetensors.deserialize(path.read_bytes())
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error
    stored = {}
    for name, tensor in tensors:
        if tensor["dtype"] not in _DTYPES:
            raise ValueError(f"{path}: {name} has dtype {tensor['dtype']}; this reads {', '.join(_DTYPES)}.")
        stored[name] = np.frombuffer(tensor["data"], _DTYPES[tensor["dtype"]]).reshape(tensor["shape"])
    return stored


def read_params(path: epath.PathLike) -> PyTree:
    """Returns the nested parameters of a safetensors file as float32; quantised ones (`quantize.py`) are restored.

    Raises:
        ValueError: like `read_tensors`, a quantised tensor that is not whole, or names of which one begins another.
    """
    stored = read_tensors(path)
    parents = {name[:end] for name in stored for end, character in enumerate(name) if character == "."}
    if clashes := sorted(parents & stored.keys()):
        raise ValueError(f"{path}: {clashes[0]} is a tensor and also the beginning of other tensors' names.")
    try:
        return traverse_util.unflatten_dict(dequantize_tensors(stored), sep=".")
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
    for name in (WEIGHTS_FILE, CONFIG_FILE):
        if not (path / name).is_file():
            raise FileNotFoundError(
                f"no {kind} at {path}: {name} is missing (experiments/convert_checkpoint.py writes it)."
            )
    try:
        config = from_json(config_class, (path / CONFIG_FILE).read_text())
    except ValueError as error:
        raise ValueError(f"{path / CONFIG_FILE}: {error}") from error
    params = read_params(path / WEIGHTS_FILE)
    check_shapes(params, nn.meta.unbox(abstract_params(config)), str(path))
    return config, params
