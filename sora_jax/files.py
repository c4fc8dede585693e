"""Files that are there whole or not at all, and whether they can be written, asked before the work."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Iterator
from typing import BinaryIO

from etils import epath


@contextlib.contextmanager
def writing(path: epath.PathLike) -> Iterator[BinaryIO]:
    """Opens a file for writing bytes, which takes the place of `path` when the block ends without an exception.

    Until then it has a name of its own, so that several processes may write the same file, and no reader sees half of
    it. Where the block raises, nothing is left behind.

    Args:
        path: of the file; its directory is made.
    """
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.parent / f"{path.name}.{uuid.uuid4().hex}.part"
    try:
        with part.open("wb") as stream:
            yield stream
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def write_whole(path: epath.PathLike, data: bytes | str) -> epath.Path:
    """Writes a file by `writing`, text as UTF-8; returns its path."""
    with writing(path) as stream:
        stream.write(data.encode() if isinstance(data, str) else data)
    return epath.Path(path)


def check_writable(option: str, path: epath.PathLike, directory: bool = False) -> None:
    """Checks before the work that `write_whole` will be able to write its result; makes nothing.

    Args:
        option: what the message names.
        path: of the file; the directories above it that are missing will be made.
        directory: `path` is that of a directory of files.

    Raises:
        ValueError: a file stands where a directory would have to, or a directory where the file would; or the
            directory cannot be written to.
    """
    path = epath.Path(path)
    if not directory and path.is_dir():
        raise ValueError(f"{option} {str(path)!r} is a directory; name a file.")
    place = next((p for p in (*((path,) if directory else ()), *path.parents) if p.exists()), None)
    if place is not None and not place.is_dir():
        raise ValueError(f"{option} {str(path)!r} cannot be written: {str(place)!r} is a file, not a directory.")
    if place is not None and os.path.isdir(place) and not os.access(place, os.W_OK):
        raise ValueError(f"{option} {str(path)!r} cannot be written: no permission to write in {str(place)!r}.")
