"""Files that are there whole or not at all."""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterator
from typing import BinaryIO

from etils import epath


@contextlib.contextmanager
def writing(path: epath.PathLike) -> Iterator[BinaryIO]:
    """Opens a file for writing bytes, which takes the place of `path` when the block ends without an exception.

    Args:
        path: of the file; its directory is made.
    """
    path = epath.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.parent / f"{path.name}.{uuid.uuid4().hex}.part"  # hosts may write the same file
    try:
        with part.open("wb") as stream:
            yield stream
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
