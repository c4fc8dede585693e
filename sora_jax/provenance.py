"""What something was made of: hashes of parameters and files, and where it was computed."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
from typing import Any

import jax
import numpy as np
from etils import epath

from sora_jax.array_types import PyTree

_CHUNK = 1 << 24  # bytes that are hashed at a time


@dataclasses.dataclass(frozen=True)
class Environment:
    """Where something was computed.

    Attributes:
        device: kind and number of the devices, such as "8 x TPU v5 lite".
        jax, sora_jax, numpy: versions.
    """

    device: str
    jax: str
    sora_jax: str
    numpy: str

    @classmethod
    def here(cls) -> Environment:
        """Returns that of this process, with the devices of all hosts."""
        devices = jax.devices()
        versions = {name: importlib.metadata.version(name) for name in ("jax", "sora_jax", "numpy")}
        return cls(device=f"{len(devices)} x {devices[0].device_kind}", **versions)


def flat_names(params: PyTree) -> dict[str, Any]:
    """Returns the leaves by their path, joined by dots, sorted."""
    leaves = jax.tree_util.tree_leaves_with_path(params)
    return dict(sorted((jax.tree_util.keystr(path, simple=True, separator="."), leaf) for path, leaf in leaves))


def params_hash(params: PyTree) -> str:
    """Returns the SHA-256, in hexadecimal digits, over the names, dtypes, shapes and bytes of all leaves by name."""
    digest = hashlib.sha256()
    for name, leaf in flat_names(params).items():
        leaf = np.asarray(leaf, order="C")
        digest.update(f"{name} {leaf.dtype} {leaf.shape}\n".encode())
        digest.update(leaf.tobytes())
    return digest.hexdigest()


def file_hash(path: epath.PathLike) -> str:
    """Returns the SHA-256 of a file, or of the names and contents of the files in a folder.

    Raises:
        FileNotFoundError: nothing at `path`.
    """
    path = epath.Path(path)
    if not path.exists():
        raise FileNotFoundError(f"nothing at {path}.")
    digest = hashlib.sha256()
    for file in sorted(f for f in path.iterdir() if f.is_file()) if path.is_dir() else [path]:
        if path.is_dir():
            digest.update(f"{file.name} {file.stat().length}\n".encode())
        with file.open("rb") as stream:
            while chunk := stream.read(_CHUNK):
                digest.update(chunk)
    return digest.hexdigest()
