"""Reads tensors out of PyTorch files without PyTorch and without running their pickle (`pickle_reader`).

A `.pt`, `.pth`, `.bin` or `.ckpt` file is a pickle that names its tensors' storages, and the storages' bytes. Both
formats of `torch.save` are read: the zip archive (since 1.6: `*/data.pkl`, `*/data/<key>`) and the older run of pickles
(magic number, protocol, machine, object, storage keys) followed by each storage's length and bytes.

What is allocated is never more than a small multiple of the file, whatever its numbers say.
"""

from __future__ import annotations

import io
import math
import zipfile
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from etils import epath

from sora_jax.convert.pickle_reader import BoundedFile, Global, Stranger, read_pickle
from sora_jax.models.file_kinds import what_else

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001
_ENCRYPTED = 1  # of a zip entry's flags
_MOST_AXES = 32

_STORAGES = {
    "torch.DoubleStorage": np.float64,
    "torch.FloatStorage": np.float32,
    "torch.HalfStorage": np.float16,
    "torch.BFloat16Storage": ml_dtypes.bfloat16,
    "torch.LongStorage": np.int64,
    "torch.IntStorage": np.int32,
    "torch.ShortStorage": np.int16,
    "torch.CharStorage": np.int8,
    "torch.ByteStorage": np.uint8,
    "torch.BoolStorage": np.bool_,
    "torch.ComplexFloatStorage": np.complex64,
    "torch.ComplexDoubleStorage": np.complex128,
    # Of tensors that name their dtype themselves (`_rebuild_tensor_v3`).
    "torch.UntypedStorage": np.uint8,
    "torch.storage.UntypedStorage": np.uint8,
}
_DTYPES = {
    "torch.float64": np.float64,
    "torch.float32": np.float32,
    "torch.float16": np.float16,
    "torch.bfloat16": ml_dtypes.bfloat16,
    "torch.float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "torch.float8_e5m2": ml_dtypes.float8_e5m2,
    "torch.int64": np.int64,
    "torch.int32": np.int32,
    "torch.uint16": np.uint16,
    "torch.uint32": np.uint32,
    "torch.uint64": np.uint64,
}


def read_torch(file: str | epath.PathLike | BinaryIO) -> Any:
    """Returns what a `torch.save` file holds.

    Args:
        file: a path, or a seekable file opened for reading bytes.

    Returns:
        Its dicts, lists, tuples, strings and numbers, with every tensor as a NumPy array of its dtype (bfloat16 by
        `ml_dtypes`); tensors that share a storage share memory. What is neither is a `Stranger`.

    Raises:
        FileNotFoundError: no file.
        ValueError: not such a file, or a truncated one; the message says what it is instead.
    """
    if not hasattr(file, "read"):
        with epath.Path(file).open("rb") as stream:
            return read_torch(stream)
    try:
        if zipfile.is_zipfile(file):
            return _read_zip(file)
        file.seek(0)
        head = file.read(1000)
        if not head.startswith(b"\x80"):  # of a pickle that names its protocol
            words = what_else(head) or f"is no PyTorch file: it begins with {head[:8]!r}"
            raise ValueError(f"it {words}.")
        return _read_legacy(file)
    except (
        IndexError, KeyError, TypeError, AttributeError, EOFError, OverflowError, StopIteration, UnicodeError,
        zipfile.BadZipFile, zlib.error, NotImplementedError, RecursionError,
    ) as error:  # fmt: skip
        raise ValueError(f"it is damaged: no PyTorch file is like that ({error!r}).") from error


def _read_zip(file: BinaryIO) -> Any:
    """Reads the zip format."""
    size = file.seek(0, io.SEEK_END)
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        pickles = [name for name in names if name == "data.pkl" or name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError(f"it {_what_archive(names)}: it has {len(pickles)} files named data.pkl.")
        root = pickles[0][: -len("data.pkl")]
        if f"{root}constants.pkl" in names:
            raise ValueError("it is a TorchScript archive: save the module's state_dict() with torch.save instead.")

        def read(name: str) -> bytes:
            entry = archive.getinfo(name)
            if entry.flag_bits & _ENCRYPTED:
                raise ValueError(f"its {name} is encrypted.")
            if entry.compress_type != zipfile.ZIP_STORED or not entry.file_size == entry.compress_size <= size:
                raise ValueError(
                    f"its {name} is compressed (method {entry.compress_type}) or has not the {entry.file_size} bytes "
                    "that it should, which no file of torch.save is like."
                )
            return archive.read(entry)

        if f"{root}byteorder" in names and read(f"{root}byteorder") != b"little":
            raise ValueError("it is of a big-endian machine; only little-endian PyTorch files are read.")
        storages: dict[str, np.ndarray] = {}

        def load(identity: Any) -> np.ndarray | Stranger:
            dtype, key, num_values = _storage(identity, 5)
            if isinstance(dtype, Stranger):
                return dtype
            if key not in storages:
                data = read(f"{root}data/{key}")
                if len(data) != num_values * dtype.itemsize:
                    raise ValueError(f"storage {key!r} has {len(data)} bytes, not {num_values} of {dtype}.")
                storages[key] = np.frombuffer(data, dtype)
            return storages[key]

        return _interpret(io.BytesIO(read(pickles[0])), size, load)


def _read_legacy(file: BinaryIO) -> Any:
    """Reads the format that torch.save wrote before 1.6."""
    bounded = BoundedFile(file)
    size = bounded.size
    if _interpret(bounded, size) != LEGACY_MAGIC:
        raise ValueError("it is a pickle, but not of torch.save.")
    if _interpret(bounded, size) != LEGACY_PROTOCOL:
        raise ValueError("its protocol is none of torch.save.")
    if not _interpret(bounded, size)["little_endian"]:
        raise ValueError("it is of a big-endian machine; only little-endian PyTorch files are read.")
    storages: dict[str, np.ndarray] = {}

    def load(identity: Any) -> np.ndarray | Stranger:
        dtype, key, num_values = _storage(identity, 6)
        if isinstance(dtype, Stranger):
            return dtype
        if identity[5] is not None:
            raise ValueError(f"storage {key!r} is a view of another, which is not read.")
        if key not in storages:
            together = sum(storage.nbytes for storage in storages.values())
            if together + num_values * dtype.itemsize > size:
                raise ValueError(f"storage {key!r} of {num_values} {dtype} is longer than its file: it is truncated.")
            storages[key] = np.zeros(num_values, dtype)  # filled below: the bytes stand behind the pickles
        return storages[key]

    values = _interpret(bounded, size, load)
    for key in _interpret(bounded, size):
        if key not in storages:
            raise ValueError(f"storage {key!r} is of a type that is not read; the storages behind it are not found.")
        storage = storages[key]
        num_values = int.from_bytes(bounded.read(8), "little")
        data = bounded.read(storage.nbytes)
        if num_values != len(storage) or len(data) != storage.nbytes:
            raise ValueError(f"storage {key!r} is truncated.")
        storage[:] = np.frombuffer(data, storage.dtype)
    return values


def _what_archive(names: list[str]) -> str:
    """Returns what a zip archive is that torch.save did not write."""
    if any(name.endswith(".npy") for name in names):
        return "is an archive of NumPy arrays (.npz), not a PyTorch file"
    shown = f" ({names[0]} ...)" if names else ""
    return f"is a zip archive of other files{shown}, not a PyTorch file"


def _interpret(stream: Any, size: int, persistent_load: Callable[[Any], Any] | None = None) -> Any:
    """Returns what the next pickle of a file of `size` bytes holds."""

    def tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> np.ndarray | Stranger:
        return _tensor(storage, offset, shape, stride, size)

    def typed(storage: Any, offset: Any, shape: Any, stride: Any, *rest: Any) -> np.ndarray | Stranger:
        dtype = rest[2]
        if isinstance(storage, np.ndarray) and dtype in _DTYPES:
            return _tensor(storage.view(_DTYPES[dtype]), offset, shape, stride, size)
        return Stranger(f"torch._utils._rebuild_tensor_v3 of {dtype}")

    def of_type(function: Any, kind: Any, arguments: tuple, *_: Any) -> Any:
        name = function.name if isinstance(function, Stranger) else function
        return functions[name](*arguments) if name in functions else Stranger(str(name))

    functions: dict[str, Callable[..., Any]] = {
        "collections.OrderedDict": _ordered_dict,
        "collections.defaultdict": lambda *_: {},
        "torch.Size": lambda values=(): tuple(values),
        "torch._utils._rebuild_tensor": tensor,
        "torch._utils._rebuild_tensor_v2": tensor,
        "torch._utils._rebuild_tensor_v3": typed,
        "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
        "torch._utils._rebuild_parameter_with_state": lambda tensor, *_: tensor,
        "torch._tensor._rebuild_from_type_v2": of_type,
    }
    try:
        return read_pickle(stream, functions, {*_STORAGES, *_DTYPES}, persistent_load)
    except ValueError as error:
        raise ValueError(f"its pickle is truncated or damaged ({error}).") from error


def _ordered_dict(*arguments: Any) -> dict:
    """Returns a dict; pairs, which Python 2 wrote, are moved into it, so that none are copied twice."""
    if not arguments:
        return {}
    (pairs,) = arguments
    if not isinstance(pairs, list):
        raise ValueError("an OrderedDict that is not made of a list of pairs.")
    values = dict(pairs)
    pairs.clear()
    return values


def _storage(identity: Any, length: int) -> tuple[np.dtype | Stranger, str, int]:
    """Returns (dtype, key, number of values) of a persistent id, which must have `length` parts."""
    if not isinstance(identity, tuple) or len(identity) != length or identity[0] != "storage":
        raise ValueError(f"an unknown persistent id: {str(identity)[:80]}.")
    _, kind, key, _, num_values = identity[:5]
    if not isinstance(key, str) or type(num_values) is not int or num_values < 0:
        raise ValueError(f"an unknown persistent id: {str(identity)[:80]}.")
    if isinstance(kind, Stranger):
        return kind, key, num_values
    if not isinstance(kind, Global) or kind not in _STORAGES:
        raise ValueError(f"storage {key!r} has the unknown type {str(kind)[:80]}.")
    return np.dtype(_STORAGES[kind]), key, num_values


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, size: int) -> np.ndarray | Stranger:
    """Returns the view of `storage` that `torch._utils._rebuild_tensor_v2` would make, inside its bounds.

    Args:
        storage: (n,); what is no array makes a stranger.
        offset: in values, where the tensor begins.
        shape: of the tensor.
        stride: of its axes in values; 0 repeats them.
        size: of the file in bytes, the most values that a view may repeat a few to.
    """
    if isinstance(storage, Stranger):
        return Stranger(storage.name)
    if not isinstance(storage, np.ndarray) or len(shape) != len(stride) or len(shape) > _MOST_AXES:
        raise ValueError("a tensor without a storage, or whose shape and strides differ in length.")
    if not all(type(n) is int and 0 <= n < 2**62 for n in (offset, *shape, *stride)):
        raise ValueError(f"a tensor with offset {offset!r}, shape {str(shape)[:80]} and strides {str(stride)[:80]}.")
    if 0 in shape:
        return np.zeros(shape, storage.dtype)
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    if last >= len(storage) or math.prod(shape) > max(size, len(storage)):
        raise ValueError(f"a tensor of shape {shape} reaches beyond its storage of {len(storage)} values.")
    steps = tuple(step * storage.itemsize for step in stride)
    # Not by as_strided, which knows no dtype of 8 bits that is of ml_dtypes.
    return np.ndarray(shape, storage.dtype, storage.view(np.uint8), offset * storage.itemsize, steps)
