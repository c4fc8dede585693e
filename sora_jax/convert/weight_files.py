"""The files of a model's weights: where they are in a directory, of how many parts, and what is in them.

A file is read by what it is, not by what it is called: safetensors, or either format of `torch.save`. A model may be a
directory as transformers and diffusers write them, in parts with an index or without, of full precision or of a variant
(`diffusion_pytorch_model.fp16.safetensors`).
"""

from __future__ import annotations

import io
import json
import re
import zipfile
import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from etils import epath

from sora_jax.array_types import NumpyArray
from sora_jax.convert.state_dict import find_tensors
from sora_jax.convert.torch_reader import read_torch
from sora_jax.models.file_kinds import what_else
from sora_jax.models.weights import CONFIG_FILE, read_tensors

_STEMS = ("model", "diffusion_pytorch_model", "pytorch_model")
# The stem, a variant, and the number of the part and of all, in the two orders that are met.
_FILE = re.compile(
    r"(?P<stem>.+?)(?:\.(?P<before>\w+))?(?:-(?P<part>\d{5})-of-(?P<parts>\d{5}))?(?:\.(?P<after>\w+))?"
    r"\.(?P<suffix>safetensors|bin|pt|pth|ckpt)(?:\.index(?:\.(?P<index>\w+))?\.json)?"
)
# No deflated file is larger than so many times its packed size.
_MOST_DEFLATED = 1032


class Weights(NamedTuple):
    """Tensors by the names of a network's own state dict, and the file that they were in."""

    tensors: dict[str, NumpyArray]
    path: epath.Path


def read_weights(source: epath.PathLike, kind: str, marks: Sequence[str], folder: str = "") -> Weights:
    """Reads the tensors of a network, out of what wraps them.

    Args:
        source: a file of weights, an index of several, or a directory.
        kind: what errors call the model.
        marks: names of tensors by one of which the network is known (`state_dict.find_tensors`).
        folder: of a whole pipeline that has the model in it.

    Raises:
        FileNotFoundError: no weights, or a part of them that is missing.
        ValueError: files that cannot be read or hold no tensors; the message names the file.
    """
    path = find_weights(source, kind, folder)
    values: dict[str, Any] = {}
    parts = _parts(path)
    for part, names in parts.items():
        found = read_file(part)
        if len(parts) == 1 and not names:
            values = found
            break
        try:
            found = find_tensors(found, ())
        except ValueError as error:
            raise ValueError(f"{part} cannot be converted: {error}") from error
        if lacking := [name for name in names if name not in found]:
            more = f" (and {len(lacking) - 1} more)" if len(lacking) > 1 else ""
            raise ValueError(
                f"{path} cannot be converted: {part.name} lacks {lacking[0]}{more}, which it says is there."
            )
        if twice := sorted(values.keys() & found.keys()):
            raise ValueError(f"{part} cannot be converted: another part of {path.name} has {twice[0]} too.")
        values |= found
    try:
        return Weights(find_tensors(values, marks), path)
    except ValueError as error:
        raise ValueError(f"{path} cannot be converted: {error}") from error


def find_weights(source: epath.PathLike, kind: str, folder: str = "") -> epath.Path:
    """Returns the file of weights that `source` is or holds, or its index, or the first of its parts.

    Of several in a directory, those with the usual names are taken, safetensors first, and of full precision.

    Args:
        source: a file or a directory.
        kind: what errors call the model.
        folder: of a whole pipeline that has the model in it.

    Raises:
        FileNotFoundError: there is none.
        ValueError: several, none of which is called as weights usually are; the message names them.
    """
    source = epath.Path(source)
    if source.is_file():
        return source
    if folder and (source / folder).is_dir():
        source = source / folder
    if not source.is_dir():
        raise FileNotFoundError(f"no {kind} at {source}: there is no such file or directory.")
    ranked: dict[tuple, list[str]] = {}  # the first is taken
    for name in sorted(path.name for path in source.iterdir()):
        match = _FILE.fullmatch(name)
        if not match or name.startswith(".") or (match["part"] or "00001") != "00001":
            continue
        variant = match["before"] or match["after"] or match["index"]
        stem = _STEMS.index(match["stem"]) if match["stem"] in _STEMS else len(_STEMS)
        # A part last: an index names all of them.
        rank = (stem == len(_STEMS), variant is not None, match["suffix"] != "safetensors", bool(match["part"]), stem)
        ranked.setdefault(rank, []).append(name)
    if not ranked:
        raise FileNotFoundError(f"no {kind} at {source}: it holds no weights, such as model.safetensors.")
    best = ranked[min(ranked)]
    if len(best) > 1:
        raise ValueError(f"{source} holds several files of weights, name one of them: {', '.join(best)}.")
    return source / best[0]


def read_file(path: epath.PathLike) -> Any:
    """Returns what a file of weights holds: tensors by name, or whatever `torch.save` stored.

    Raises:
        FileNotFoundError: no file.
        ValueError: a file of another kind, a truncated or a damaged one; the message names it and says what it is.
    """
    path = epath.Path(path)
    with path.open("rb") as stream:
        head = stream.read(16)
    if head[8:9] == b"{" or (path.suffix == ".safetensors" and not head.startswith((b"PK", b"\x80"))):
        return read_tensors(path)
    try:
        return read_torch(path)
    except ValueError as error:
        raise ValueError(
            f"{path} cannot be read: {' '.join(str(error).split())}"
        ) from error  # names have any character


def read_npz(path: epath.PathLike) -> dict[str, NumpyArray]:
    """Returns the arrays of an `.npz` file; nothing pickled is read, and nothing is allocated that the file has not.

    Raises:
        ValueError: a truncated or another file; the message says what it is.
    """
    path = epath.Path(path)
    with path.open("rb") as stream:
        try:
            if not zipfile.is_zipfile(stream):
                stream.seek(0)
                raise ValueError(f"it {what_else(stream.read(1000)) or 'is no zip archive'}.")
            size = stream.seek(0, io.SEEK_END)
            with zipfile.ZipFile(stream) as archive:
                entries = [entry for entry in archive.infolist() if entry.filename.endswith(".npy")]
                if not entries:
                    raise ValueError(f"it is a zip archive without arrays: {archive.namelist()[:3]}.")
                sizes = sum(entry.file_size for entry in entries), sum(entry.compress_size for entry in entries)
                if sizes[0] > _MOST_DEFLATED * size or sizes[1] > size:
                    raise ValueError("its arrays are larger than a file of its size can hold.")
                return {entry.filename[: -len(".npy")]: _read_npy(archive, entry) for entry in entries}
        except (
            ValueError, EOFError, OSError, AttributeError, TypeError, KeyError, OverflowError, RuntimeError,
            zipfile.BadZipFile, zlib.error, SyntaxError,
        ) as error:  # fmt: skip
            raise ValueError(f"not a whole .npz file: {' '.join(str(error).split())}") from error


def read_options(weights: epath.Path, config: epath.PathLike | None, kind: str) -> tuple[dict[str, Any], epath.Path]:
    """Returns the options of a model's config, and the file that they stand in.

    Args:
        weights: the model's.
        config: its `config.json`; None for the one beside the weights.
        kind: what errors call the model.

    Raises:
        FileNotFoundError: there is no config.
        ValueError: it is not a JSON object; the message names it.
    """
    path = weights.parent / CONFIG_FILE if config is None else epath.Path(config)
    if not path.is_file():
        raise FileNotFoundError(f"no config of a {kind} at {path}.")
    try:
        return _read_json(path), path
    except ValueError as error:
        raise ValueError(f"{path} cannot be converted: {error}") from error


def _read_json(path: epath.Path) -> dict[str, Any]:
    """Returns the object that a JSON file holds."""
    data = path.read_bytes()
    try:
        values = json.loads(data)
    except ValueError as error:
        words = what_else(data[:1000])
        raise ValueError(f"it {words}." if words and "JSON" not in words else f"it is no JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"expected a JSON object, got {type(values).__name__}.")
    return values


def _parts(path: epath.Path) -> dict[epath.Path, list[str]]:
    """Returns the files of an index, or all parts of which `path` is one; `path` where it is whole.

    Each comes with the names of the tensors that an index says it has.

    Raises:
        FileNotFoundError: parts that are missing.
        ValueError: an index that is none.
    """
    files: Any = {}
    if path.suffix == ".json":
        try:
            files = _read_json(path).get("weight_map")
            if not isinstance(files, dict) or not files:
                raise ValueError("it has no weight_map, which an index of weights has; name the weights instead.")
            names = sorted({name for name in files.values() if isinstance(name, str)})
            if len(names) != len(set(map(str, files.values()))) or any(epath.Path(name).name != name for name in names):
                raise ValueError("its weight_map must name files beside it.")
        except ValueError as error:
            raise ValueError(f"{path} cannot be converted: {error}") from error
    elif (match := _FILE.fullmatch(path.name)) and match["part"]:
        numbers, count = match.span("part"), int(match["parts"])
        names = [f"{path.name[: numbers[0]]}{n:05d}{path.name[numbers[1] :]}" for n in range(1, min(count, 9999) + 1)]
    else:
        return {path: []}
    if lacking := [name for name in names if not (path.parent / name).is_file()]:
        more = f" (and {len(lacking) - 1} more)" if len(lacking) > 1 else ""
        raise FileNotFoundError(f"{path} is of {len(names)} files, of which {lacking[0]}{more} is missing.")
    parts: dict[epath.Path, list[str]] = {path.parent / name: [] for name in names}
    for tensor, name in files.items():
        parts[path.parent / name].append(tensor)
    return parts


def _read_npy(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> NumpyArray:
    """Returns an array of an `.npz` file."""
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{entry.filename} is compressed by method {entry.compress_type}, which NumPy does not write.")
    data = io.BytesIO(archive.read(entry))
    version = np.lib.format.read_magic(data)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"{entry.filename} is of version {version}, which is not read.")
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(data)
    if dtype.hasobject or int(np.prod(shape, dtype=object)) * dtype.itemsize != len(data.getbuffer()) - data.tell():
        raise ValueError(f"{entry.filename} does not hold the {shape} {dtype} that it says.")
    data.seek(0)
    return np.lib.format.read_array(data, allow_pickle=False)
