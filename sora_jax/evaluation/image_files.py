"""Samples in files: the `.npz` of the community's evaluators, read as a stream, and folders of pictures.

Pictures are read as when a data set is prepared (`sora_jax.data.pictures`): upright, in sRGB, 16 bits brought to 8,
transparent pixels over white.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator

import numpy as np
from etils import epath

from sora_jax.array_types import Int
from sora_jax.data.errors import UnreadableClipError
from sora_jax.data.picture_files import is_picture, suffixes
from sora_jax.data.pictures import read_picture

ARRAY = "arr_0"


class ImageFiles:
    """Images of one size, all of which are never in memory together.

    Attributes:
        path: an `.npz` file whose `arr_0` is (N, H, W, 3) uint8, or a folder of pictures, taken in the order of their
            names. A file in it is a picture by its name or by its content; others, hidden files (`._photo.png`,
            `.DS_Store`) and folders are passed over.
        count: N.
        height, width: in pixels.
    """

    def __init__(self, path: epath.PathLike):
        """Opens a file or a folder.

        Raises:
            FileNotFoundError: nothing at `path`.
            ValueError: no images in it, or images of another shape or dtype; the message names the path.
        """
        self.path = epath.Path(path)
        if not self.path.exists():
            raise FileNotFoundError(f"no samples at {self.path}.")
        self._pictures = []
        if self.path.is_dir():
            self._pictures = sorted(file for file in self.path.iterdir() if _is_picture(file))
            if not self._pictures:
                raise ValueError(f"{self.path} holds no pictures.")
            shape = (len(self._pictures), *_read_picture(self._pictures[0]).shape)
        else:
            with self.path.open("rb") as stream, _open_array(self.path, stream) as member:
                shape = _read_header(self.path, member)
        self.count, self.height, self.width, _ = shape

    def batches(self, size: int) -> Iterator[Int[np.ndarray, "batch height width 3"]]:
        """Yields the images in order, `size` at a time (the last ones fewer), uint8.

        Raises:
            ValueError: a picture that cannot be read whole, or is of another size than the first, or a file that ends
                too early; the message names it.
        """
        starts = range(0, self.count, size)
        if self._pictures:
            for start in starts:
                files = self._pictures[start : start + size]
                images = [_read_picture(file) for file in files]
                for file, image in zip(files, images, strict=True):
                    if image.shape[:2] != (self.height, self.width):
                        raise ValueError(
                            f"{file} has {image.shape[0]} x {image.shape[1]} pixels, "
                            f"{self._pictures[0].name} has {self.height} x {self.width}; all must have the same."
                        )
                yield np.stack(images)
            return
        with self.path.open("rb") as stream, _open_array(self.path, stream) as member:
            _read_header(self.path, member)
            for start in starts:
                shape = (min(size, self.count - start), self.height, self.width, 3)
                data = member.read(int(np.prod(shape)))
                if len(data) != np.prod(shape):
                    raise ValueError(f"{self.path} ends within image {start + len(data) // int(np.prod(shape[1:]))}.")
                yield np.frombuffer(data, np.uint8).reshape(shape)


def has_images(path: epath.PathLike) -> bool:
    """Returns whether there are images at `path`: a folder, or an `.npz` file with `arr_0`."""
    path = epath.Path(path)
    if path.is_dir():
        return True
    with path.open("rb") as stream:
        return zipfile.is_zipfile(stream) and f"{ARRAY}.npy" in zipfile.ZipFile(stream).namelist()


def _open_array(path: epath.Path, stream: io.IOBase) -> zipfile.ZipExtFile:
    """Returns `arr_0` of an `.npz` file as a stream."""
    try:
        return zipfile.ZipFile(stream).open(f"{ARRAY}.npy")
    except (KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is no .npz file with an array {ARRAY}: {error}") from error


def _read_header(path: epath.Path, member: zipfile.ZipExtFile) -> tuple[int, int, int, int]:
    """Returns the shape that the beginning of an array states, and leaves `member` at its values."""
    try:
        version = np.lib.format.read_magic(member)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran_order, dtype = read(member)
    except ValueError as error:
        raise ValueError(f"{path}: {ARRAY} is no array: {error}") from error
    if len(shape) != 4 or shape[-1] != 3 or not shape[0] or dtype != np.uint8 or fortran_order:
        raise ValueError(f"{path}: {ARRAY} must be (N, H, W, 3) uint8 in C order, got {shape} {dtype}.")
    return shape


def _is_picture(file: epath.Path) -> bool:
    """Returns whether a file of a folder is taken for a picture; a damaged one is."""
    if file.name.startswith(".") or not file.is_file():
        return False
    if file.suffix.lower() in suffixes():
        return True
    with file.open("rb") as stream:
        return is_picture(stream, file.name)


def _read_picture(file: epath.Path) -> Int[np.ndarray, "height width 3"]:
    """Returns a picture as RGB, uint8; ValueError where it cannot be read whole, with its path."""
    try:
        with file.open("rb") as stream:
            return np.asarray(read_picture(stream, file.name))
    except UnreadableClipError as error:
        raise ValueError(f"{file}: {error}.") from error
