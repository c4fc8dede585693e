"""Reads tensors out of PyTorch files without PyTorch and without running their pickle.

A `.pt` or `.pth` file is a pickle that names its tensors' storages, and the storages' bytes. Unpickling runs what
the file says, so it is never done: the opcodes are interpreted here one by one, with strings, numbers, tuples,
lists and dicts, and with the few names in `_KNOWN`, which build tensors. Anything else is an error that names it.

Both formats of `torch.save` are read: the zip archive (since 1.6: `*/data.pkl`, `*/data/<key>`) and the older run of
pickles (magic number, protocol, machine, object, storage keys) followed by each storage's length and bytes.
"""

from __future__ import annotations

import io
import math
import pickletools
import zipfile
from collections.abc import Callable
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np
from etils import epath

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_PROTOCOL = 1001

_DTYPES = {
    "torch.DoubleStorage": np.dtype(np.float64),
    "torch.FloatStorage": np.dtype(np.float32),
    "torch.HalfStorage": np.dtype(np.float16),
    "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch.LongStorage": np.dtype(np.int64),
    "torch.IntStorage": np.dtype(np.int32),
    "torch.ShortStorage": np.dtype(np.int16),
    "torch.CharStorage": np.dtype(np.int8),
    "torch.ByteStorage": np.dtype(np.uint8),
    "torch.BoolStorage": np.dtype(np.bool_),
}


class _Global(str):
    """A name that the pickle refers to; it stays a name."""


class _Mark:
    """Where a run of stack items begins."""


_MARK = _Mark()


def read_torch(file: str | epath.PathLike | BinaryIO) -> Any:
    """Returns what a `torch.save` file holds.

    Args:
        file: a path, or a seekable file opened for reading bytes.

    Returns:
        Its dicts, lists, tuples, strings and numbers, with every tensor as a NumPy array of its dtype (bfloat16 by
        `ml_dtypes`); tensors that share a storage share memory.

    Raises:
        ValueError: not such a file, a truncated one, or one that refers to anything but plain tensors.
    """
    if not hasattr(file, "read"):
        with epath.Path(file).open("rb") as stream:
            return read_torch(stream)
    try:
        return _read_zip(file) if zipfile.is_zipfile(file) else _read_legacy(file)
    except (IndexError, KeyError, TypeError, EOFError, OverflowError, StopIteration, zipfile.BadZipFile) as error:
        raise ValueError(f"a malformed PyTorch file: {error!r}.") from error


def read_state_dict(file: str | epath.PathLike | BinaryIO) -> dict[str, np.ndarray]:
    """Returns the tensors of a file that holds a module's state dict.

    Raises:
        ValueError: like `read_torch`, or a file that holds something else.
    """
    values = read_torch(file)
    if not isinstance(values, dict) or not values:
        raise ValueError(f"expected a state dict (names to tensors), got {type(values).__name__}.")
    for name, value in values.items():
        if not isinstance(name, str) or not isinstance(value, np.ndarray):
            raise ValueError(f"expected a state dict (names to tensors), got {type(value).__name__} at {name!r}.")
    return values


def _read_zip(file: BinaryIO) -> Any:
    """Reads the zip format."""
    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        pickles = [name for name in names if name == "data.pkl" or name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError(f"a zip archive with {len(pickles)} files named data.pkl is not a PyTorch file.")
        root = pickles[0][: -len("data.pkl")]
        if f"{root}byteorder" in names and archive.read(f"{root}byteorder") != b"little":
            raise ValueError("only little-endian PyTorch files are read.")
        storages: dict[str, np.ndarray] = {}

        def load(identity: tuple) -> np.ndarray:
            dtype, key, num_values = _storage(identity, 5)
            if key not in storages:
                entry = archive.getinfo(f"{root}data/{key}")
                if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != num_values * dtype.itemsize:
                    raise ValueError(f"storage {key!r} has {entry.file_size} bytes, not {num_values} of {dtype}.")
                storages[key] = np.frombuffer(archive.read(entry), dtype)
            return storages[key]

        return _interpret(io.BytesIO(archive.read(pickles[0])), load)


def _read_legacy(file: BinaryIO) -> Any:
    """Reads the format that torch.save wrote before 1.6."""
    size = file.seek(0, io.SEEK_END)
    file.seek(0)
    if _interpret(file) != LEGACY_MAGIC or _interpret(file) != LEGACY_PROTOCOL:
        raise ValueError("not a PyTorch file: its magic number or protocol is another.")
    if not _interpret(file)["little_endian"]:
        raise ValueError("only little-endian PyTorch files are read.")
    storages: dict[str, np.ndarray] = {}

    def load(identity: tuple) -> np.ndarray:
        dtype, key, num_values = _storage(identity, 6)
        if identity[5] is not None:
            raise ValueError(f"storage {key!r} is a view of another, which is not read.")
        if key not in storages:
            if num_values * dtype.itemsize > size:
                raise ValueError(f"storage {key!r} of {num_values} {dtype} is longer than its file.")
            storages[key] = np.zeros(num_values, dtype)  # filled below: the bytes stand behind the pickles
        return storages[key]

    values = _interpret(file, load)
    for key in _interpret(file):
        storage = storages[key]
        num_values = int.from_bytes(file.read(8), "little")
        data = file.read(storage.nbytes)
        if num_values != len(storage) or len(data) != storage.nbytes:
            raise ValueError(f"storage {key!r} is truncated.")
        storage[:] = np.frombuffer(data, storage.dtype)
    return values


def _storage(identity: tuple, length: int) -> tuple[np.dtype, str, int]:
    """Returns (dtype, key, number of values) of a persistent id, which must have `length` parts."""
    if not isinstance(identity, tuple) or len(identity) != length or identity[0] != "storage":
        raise ValueError(f"an unknown persistent id: {identity!r}.")
    _, kind, key, _, num_values = identity[:5]
    if not isinstance(kind, _Global) or kind not in _DTYPES:
        raise ValueError(f"storage {key!r} has the unknown type {kind!r}; known are {', '.join(_DTYPES)}.")
    if not isinstance(key, str) or not isinstance(num_values, int) or num_values < 0:
        raise ValueError(f"an unknown persistent id: {identity!r}.")
    return _DTYPES[kind], key, num_values


def _tensor(storage: np.ndarray, offset: int, shape: tuple, stride: tuple, *_: Any) -> np.ndarray:
    """Returns the view of `storage` that `torch._utils._rebuild_tensor_v2` would make, inside its bounds."""
    if not isinstance(storage, np.ndarray) or len(shape) != len(stride):
        raise ValueError("a tensor without a storage, or whose shape and strides differ in length.")
    if not all(isinstance(n, int) and n >= 0 for n in (offset, *shape, *stride)):
        raise ValueError(f"a tensor with offset {offset!r}, shape {shape!r} and strides {stride!r}.")
    if math.prod(shape) == 0:
        return np.zeros(shape, storage.dtype)
    last = offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
    if last >= len(storage):
        raise ValueError(f"a tensor of shape {shape} reaches beyond its storage of {len(storage)} values.")
    steps = tuple(step * storage.itemsize for step in stride)
    return np.lib.stride_tricks.as_strided(storage[offset:], shape, steps)


_KNOWN: dict[str, Callable] = {
    "collections.OrderedDict": lambda *pairs: dict(*pairs),
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
    "torch.Size": lambda values=(): tuple(values),
    "argparse.Namespace": dict,  # the arguments that training scripts store; what they were is not read
}
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_LITERALS = {
    "BININT", "BININT1", "BININT2", "LONG1", "LONG4", "BINFLOAT", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "INT", "LONG", "FLOAT", "UNICODE",
}  # fmt: skip
_EMPTY: dict[str, Callable] = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_TUPLE": tuple}


def _interpret(stream: BinaryIO, persistent_load: Callable[[tuple], Any] | None = None) -> Any:
    """Reads one pickle from `stream`, up to its STOP, by a small stack machine that can only build plain data."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}

    def to_mark() -> list[Any]:
        index = next(i for i in reversed(range(len(stack))) if stack[i] is _MARK)
        items = stack[index + 1 :]
        del stack[index:]
        return items

    for opcode, argument, _ in pickletools.genops(stream):
        name = opcode.name
        if name in ("PROTO", "FRAME"):
            continue
        if name == "STOP":
            return stack.pop()
        if name in _LITERALS:
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name == "MARK":
            stack.append(_MARK)
        elif name == "POP":
            stack.pop()
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[argument] = stack[-1]
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[argument])
        elif name == "TUPLE":
            stack.append(tuple(to_mark()))
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            items = [stack.pop() for _ in range(int(name[-1]))]
            stack.append(tuple(reversed(items)))
        elif name == "APPEND":
            item = stack.pop()
            _expect(stack[-1], list).append(item)
        elif name == "APPENDS":
            items = to_mark()
            _expect(stack[-1], list).extend(items)
        elif name == "SETITEM":
            value, key = stack.pop(), stack.pop()
            _expect(stack[-1], dict)[key] = value
        elif name == "SETITEMS":
            items = to_mark()
            _expect(stack[-1], dict).update(zip(items[::2], items[1::2], strict=True))
        elif name == "GLOBAL":
            stack.append(_known_global(argument.replace(" ", ".")))
        elif name == "STACK_GLOBAL":
            attribute, module = stack.pop(), stack.pop()
            stack.append(_known_global(f"{module}.{attribute}"))
        elif name in ("REDUCE", "NEWOBJ"):
            arguments, function = _expect(stack.pop(), tuple), _expect(stack.pop(), _Global)
            stack.append(_KNOWN[function](*arguments))
        elif name == "BUILD":
            stack.pop()  # attributes, of an OrderedDict (a module's versions) or a Namespace: not data
            _expect(stack[-1], dict)
        elif name == "BINPERSID" and persistent_load is not None:
            stack.append(persistent_load(stack.pop()))
        else:
            raise ValueError(f"the pickle opcode {name} is not read: the file holds more than plain tensors.")
    raise ValueError("a pickle without an end.")


def _expect(value: Any, kind: type) -> Any:
    """Returns `value` if it is a `kind`."""
    if not isinstance(value, kind):
        raise ValueError(f"a pickle that treats {type(value).__name__} as {kind.__name__}.")
    return value


def _known_global(name: str) -> _Global:
    """Returns `name` if it is one that builds tensors."""
    if name not in _KNOWN and name not in _DTYPES:
        raise ValueError(f"the file refers to {name!r}, which is refused; known are {', '.join([*_KNOWN, *_DTYPES])}.")
    return _Global(name)
