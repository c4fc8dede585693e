"""Parameters from a safetensors file straight to the devices of a mesh, of which each gets its share.

A local file is mapped into memory, so that what no device of this host holds is never read; of a remote one a tensor at
a time is.
"""

from __future__ import annotations

import json
import math
import os
import re
from typing import Any, NamedTuple

import jax
import numpy as np
from etils import epath
from flax import traverse_util

from sora_jax.array_types import NumpyArray, PyTree
from sora_jax.models.quantize import dequantize_tensors
from sora_jax.models.weights import DTYPES, MAX_HEADER, check_finite, check_shapes, not_whole
from sora_jax.provenance import flat_names

_CODES = re.compile(r"(.+)\.codes(\d)")


class Entry(NamedTuple):
    """A tensor of a file.

    Attributes:
        dtype: that it is stored in.
        shape: of it.
        start: of its bytes in the file.
        stop: of them.
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


class TensorFile:
    """The tensors of a safetensors file, each read when it is asked for.

    Args:
        path: of the file.

    Attributes:
        entries: of the tensors, by name.

    Raises:
        FileNotFoundError: no file.
        ValueError: a truncated or another file, or a dtype that is not read; the message names the file.
    """

    def __init__(self, path: epath.PathLike) -> None:
        self._path = epath.Path(path)
        size = self._path.stat().length
        with self._path.open("rb") as stream:
            head = stream.read(8)
            length = int.from_bytes(head, "little")
            head += stream.read(min(length, MAX_HEADER))
        try:
            self.entries = _read_header(head, size)
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise not_whole(str(path), head, size, error) from error
        for name, (dtype, *_) in self.entries.items():
            if dtype is None:
                raise ValueError(f"{path}: {name} has a dtype that is not read; these are: {', '.join(DTYPES)}.")
        local = os.path.isfile(self._path)
        self._bytes = np.memmap(self._path, np.uint8, mode="r") if local else None

    def __getitem__(self, name: str) -> NumpyArray:
        """Returns a tensor of the dtype that it is stored in: of a local file a view, of which nothing is read yet."""
        dtype, shape, start, stop = self.entries[name]
        if self._bytes is not None:
            return self._bytes[start:stop].view(dtype).reshape(shape)
        with self._path.open("rb") as stream:
            stream.seek(start)
            return np.frombuffer(stream.read(stop - start), dtype).reshape(shape)


def _read_header(head: bytes, size: int) -> dict[str, Entry]:
    """Returns the entries of a header; raises whatever it is wrong in."""
    length = int.from_bytes(head[:8], "little")
    if len(head) < 8 or length > len(head) - 8:
        raise ValueError("its header is not whole")
    header = json.loads(head[8 : 8 + length])
    header.pop("__metadata__", None)
    entries, place = {}, 0
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        start, stop = entry["data_offsets"]
        dtype, shape = DTYPES.get(entry["dtype"]), tuple(entry["shape"])
        numbers = (start, stop, *shape)
        if not all(type(n) is int and n >= 0 for n in numbers) or start != place or stop < start:
            raise ValueError(f"{name} is at {start} to {stop}, behind {place}, with shape {shape}")
        if dtype is not None and stop - start != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{name} of shape {shape} and dtype {dtype} has {stop - start} bytes")
        entries[name] = Entry(dtype, shape, 8 + length + start, 8 + length + stop)
        place = stop
    if 8 + length + place != size:
        raise ValueError(f"its tensors end at {8 + length + place}, the file at {size}")
    return entries


def read_sharded(path: epath.PathLike, expected: PyTree, shardings: PyTree, dtype: Any) -> PyTree:
    """Returns the parameters of a safetensors file on the devices of a mesh.

    Args:
        path: of the file.
        expected: shapes of the parameters.
        shardings: `jax.sharding.NamedSharding` of each.
        dtype: to cast them to. Quantised ones (`sora_jax.models.quantize`) are restored whole, one at a time.

    Raises:
        ValueError: like `TensorFile`, parameters that are not the expected ones, quantised ones that are not whole, or
            a value that is not finite, named.
    """
    file = TensorFile(path)
    coded = {match[1]: match[0] for match in map(_CODES.fullmatch, file.entries) if match}
    parts = {name: (codes, f"{name}.scale") for name, codes in coded.items() if f"{name}.scale" in file.entries}
    lone = file.entries.keys() - {part for pair in parts.values() for part in pair}
    shapes = {name: file.entries[name].shape for name in lone} | {
        name: (*file.entries[scale].shape[:-1], math.prod(file.entries[codes].shape[-2:]) * 8 // int(codes[-1]))
        for name, (codes, scale) in parts.items()
    }
    check_shapes({name: jax.ShapeDtypeStruct(shape, dtype) for name, shape in shapes.items()}, expected, str(path))

    def place(name: str, sharding: jax.sharding.Sharding) -> jax.Array:
        pieces: dict[str, NumpyArray] = {}  # devices that hold the same share it

        def piece(index: tuple[slice, ...]) -> NumpyArray:
            key = str(index)
            if key not in pieces:
                pieces[key] = np.asarray(tensor[index], dtype)
            return pieces[key]

        if name in parts:
            try:
                tensor = dequantize_tensors({part: file[part] for part in parts[name]})[name]
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
        else:
            tensor = file[name]
        return jax.make_array_from_callback(shapes[name], sharding, piece)

    params = {name: place(name, sharding) for name, sharding in flat_names(shardings).items()}
    params = traverse_util.unflatten_dict(params, sep=".")
    check_finite(params, str(path))
    return params
