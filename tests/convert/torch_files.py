"""Writes files as torch.save does, without PyTorch: a pickle's opcodes, put together by hand, and the storages.

The values of a file of this kind were read by PyTorch 2.13 as they were meant.
"""

import io
import zipfile
from typing import NamedTuple

import numpy as np

STORAGES = {"float32": "Float", "float64": "Double", "float16": "Half", "bfloat16": "BFloat16", "int64": "Long"}


class Instance(NamedTuple):
    """An object of a class, with attributes, and items where it is a dict of its own kind."""

    name: str
    state: dict | None = None
    items: dict | None = None


class Raw(NamedTuple):
    """Opcodes that leave one object on the stack, of which a value may be a part."""

    opcodes: bytes
    value: object = None
    rest: bytes = b""


def module(parameters=None, modules=None):
    """An nn.Module stored whole."""
    state = {"training": False, "_parameters": parameters or {}, "_buffers": {}, "_modules": modules or {}}
    return Instance("my_code.Model", state)


def text(value):
    data = value.encode()
    return b"X" + len(data).to_bytes(4, "little") + data


def integer(value):
    return b"\x8a\x08" + value.to_bytes(8, "little", signed=True)


def global_(name):
    module, _, attribute = name.rpartition(".")
    return f"c{module}\n{attribute}\n".encode()


def opcodes(value, storages):
    """The opcodes of a value; its arrays are appended to `storages`."""
    if isinstance(value, Raw):
        return value.opcodes + (opcodes(value.value, storages) if value.rest else b"") + value.rest
    if isinstance(value, Instance):
        state = b"" if value.state is None else opcodes(value.state, storages) + b"b"
        return global_(value.name) + b")\x81" + items(value.items or {}, storages) + state
    if isinstance(value, np.ndarray):
        untyped = value.dtype.name not in STORAGES  # the tensor names its dtype itself
        storage = b"(" + text("storage") + global_(f"torch.{STORAGES.get(value.dtype.name, 'storage.Untyped')}Storage")
        storage += text(str(len(storages))) + text("cpu") + integer(value.nbytes if untyped else value.size) + b"tQ"
        storages.append(np.ascontiguousarray(value))
        strides = (int(np.prod(value.shape[axis + 1 :])) for axis in range(value.ndim))
        rows = [b"(" + b"".join(map(integer, row)) + b"t" for row in (value.shape, strides)]
        ordered = global_("collections.OrderedDict") + b")R"
        return (
            global_("torch._utils._rebuild_tensor_v3" if untyped else "torch._utils._rebuild_tensor_v2")
            + b"("
            + storage
            + integer(0)
            + b"".join(rows)
            + b"\x89"
            + ordered
            + (global_(f"torch.{value.dtype.name}") + b"}" if untyped else b"")
            + b"tR"
        )
    if isinstance(value, dict):
        return b"}" + items(value, storages)
    if isinstance(value, list):
        return b"]" + b"".join(opcodes(v, storages) + b"a" for v in value)
    if isinstance(value, bool) or value is None:
        return {True: b"\x88", False: b"\x89", None: b"N"}[value]
    return integer(value) if isinstance(value, int) else text(value)


def items(values, storages):
    return b"".join(opcodes(k, storages) + opcodes(v, storages) + b"s" for k, v in values.items())


def torch_bytes(value, extra=None, compression=zipfile.ZIP_STORED):
    """The contents of a .pt file that holds `value`; `extra` are more members of its archive."""
    storages, buffer = [], io.BytesIO()
    pickle = b"\x80\x02" + opcodes(value, storages) + b"."
    with zipfile.ZipFile(buffer, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickle)
        for key, storage in enumerate(storages):
            archive.writestr(f"archive/data/{key}", storage.tobytes())
        for name, data in (extra or {}).items():
            archive.writestr(f"archive/{name}", data)
    return buffer.getvalue()
