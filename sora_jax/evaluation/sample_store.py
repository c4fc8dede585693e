"""Samples by the ten thousand: drawn in shards, resumed where they stopped, put together as the evaluators' `.npz`.

A store is a directory: `manifest.json`, and shards of (n, H, W, 3) uint8 each, called by their samples:
`shard_00000064_00000128.npy` holds the samples 64 to 127. A shard that is there is whole. Sample i depends on its index
alone, up to the rounding of a batch of another size (`SampleManifest.batch_sizes` tells them), so a store may go on
with shards of another size and for more samples or fewer, and one that was stopped and resumed holds what one that was
not would hold.

Older stores called their shards by their number, `shard_00001.npy`; they are read too.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
import zipfile
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from etils import epath

from sora_jax.array_types import Int, NumpyArray
from sora_jax.evaluation.manifest import SampleManifest, differences, manifest_path, read_manifest, write_manifest
from sora_jax.files import writing

MANIFEST_FILE = "manifest.json"

# (indices of the samples, (n,) int64) -> the samples, (n, H, W, 3) uint8
SampleFunction = Callable[[Int[np.ndarray, " n"]], NumpyArray]

_SHARD = re.compile(r"shard_(\d+)_(\d+)\.npy")
_NUMBERED = re.compile(r"shard_(\d+)\.npy")


class Shard(NamedTuple):
    """Samples `start` to `stop` (exclusive), in the file `path`."""

    start: int
    stop: int
    path: epath.Path


class SampleStore:
    """The samples of one manifest, in a directory.

    Attributes:
        directory: local or `gs://`; made with the first shard.
        manifest: what the samples are made of; `num_samples`, `height` and `width` are the store's, `batch_sizes` those
            of the shards that were drawn.
        shard_size: samples of a shard that is drawn.
        damaged: names of the shards that were cut short, whose samples are drawn again.
    """

    def __init__(self, directory: epath.PathLike, manifest: SampleManifest, shard_size: int = 500):
        """Opens the store of `directory`, or begins one there.

        Raises:
            ValueError: a directory with samples of another manifest, named by its first field that differs (but for
                `num_samples` and `batch_sizes`), or with shards of other images; or a size or number below 1.
        """
        for field in ("num_samples", "height", "width"):
            if getattr(manifest, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(manifest, field)}.")
        if shard_size < 1:
            raise ValueError(f"shard_size must be at least 1, got {shard_size}.")
        self.directory, self.shard_size = epath.Path(directory), shard_size
        self.damaged: tuple[str, ...] = ()
        file = self.directory / MANIFEST_FILE
        if file.exists():
            there = read_manifest(SampleManifest, file)
            manifest = dataclasses.replace(manifest, batch_sizes=there.batch_sizes)
            if changed := differences(dataclasses.replace(there, num_samples=manifest.num_samples), manifest):
                name, (old, asked) = next(iter(changed.items()))
                raise ValueError(
                    f"{self.directory} holds samples with {name} {json.dumps(old)}, not {json.dumps(asked)}; "
                    "name another directory, or remove it."
                )
        elif any(self.directory.glob("shard_*.npy")):
            raise ValueError(f"{self.directory} holds shards without a {MANIFEST_FILE}; name another directory.")
        self.manifest = manifest
        self._whole = self._read_shards()

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of a sample, (H, W, 3)."""
        return self.manifest.height, self.manifest.width, 3

    @property
    def num_present(self) -> int:
        """Samples that are there, more than the manifest asks for not counted."""
        count = self.manifest.num_samples
        return sum(min(shard.stop, count) - min(shard.start, count) for shard in self._whole)

    @property
    def num_beyond(self) -> int:
        """Samples that are there beyond those that the manifest asks for."""
        return sum(shard.stop - shard.start for shard in self._whole) - self.num_present

    def missing(self) -> list[Int[np.ndarray, " n"]]:
        """Returns the indices of the samples that are still to be drawn, those of a shard together."""
        return [indices for _, indices in self._missing()]

    def fill(
        self,
        sample: SampleFunction,
        *,
        process_index: int = 0,
        process_count: int = 1,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Draws the samples that are missing, and writes the store's manifest with the first of them.

        Args:
            sample: takes the indices of a shard's samples, in order; `shard_size` of them, or fewer.
            process_index: of this host, which draws every process_count-th shard, on its own devices.
            process_count: hosts, which share the directory.
            progress: called with the number of samples of each shard that is done.

        Raises:
            ValueError: samples of another shape or dtype.
        """
        if process_count == 1:  # other hosts may be at work on theirs
            for useless in (*self.directory.glob("shard_*.npy.*.part"), *map(self.directory.joinpath, self.damaged)):
                useless.unlink(missing_ok=True)
        for cell, indices in list(self._missing()):
            if cell % process_count != process_index:
                continue
            images = np.asarray(sample(indices))
            expected = (len(indices), *self.shape)
            if images.shape != expected or images.dtype != np.uint8:
                raise ValueError(f"samples must be {expected} uint8, got {images.shape} {images.dtype}.")
            sizes = {*(self.manifest.batch_sizes or ()), self.shard_size}
            self.manifest = dataclasses.replace(self.manifest, batch_sizes=tuple(sorted(sizes)))
            self._write_manifest()
            start, stop = int(indices[0]), int(indices[-1]) + 1
            shard = Shard(start, stop, self.directory / f"shard_{start:08d}_{stop:08d}.npy")
            with writing(shard.path) as stream:
                np.save(stream, images, allow_pickle=False)
            self._whole = sorted([*self._whole, shard])
            if progress is not None:
                progress(len(images))

    def read(self, indices: Int[np.ndarray, " n"]) -> NumpyArray:
        """Returns some samples, (n, H, W, 3) uint8, with one shard in memory at a time.

        Raises:
            ValueError: a sample of theirs that is missing.
        """
        indices, found = np.asarray(indices), np.zeros(len(indices), bool)
        images = np.empty((len(indices), *self.shape), np.uint8)
        for shard in self._whole:
            chosen = (indices >= shard.start) & (indices < shard.stop)
            if chosen.any():
                images[chosen] = _load(shard)[indices[chosen] - shard.start]
                found |= chosen
        if not found.all():
            raise ValueError(f"{self.directory} lacks the sample {indices[~found][0]}; fill it first.")
        return images

    def assemble(self, path: epath.PathLike) -> epath.Path:
        """Writes all samples as `arr_0` (N, H, W, 3) of an `.npz`, a shard in memory at a time, and its manifest.

        Args:
            path: of the file, which guided-diffusion's evaluator takes; the manifest is at `manifest_path(path)`.

        Returns:
            The path.

        Raises:
            ValueError: samples that are missing.
        """
        self._whole = self._read_shards()  # those of other hosts too
        count = self.manifest.num_samples
        if self.num_present < count:
            raise ValueError(f"{self.directory} holds {self.num_present} of {count} samples; fill it first.")
        shape = (count, *self.shape)
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.uint8)), "fortran_order": False, "shape": shape}
        with writing(path) as stream, zipfile.ZipFile(stream, "w") as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header)
                for shard in self._whole:
                    if shard.start < count:
                        member.write(_load(shard)[: count - shard.start].tobytes())
        self._write_manifest()
        write_manifest(manifest_path(path), self.manifest)
        return epath.Path(path)

    def _missing(self) -> Iterator[tuple[int, Int[np.ndarray, " n"]]]:
        """Yields the runs of samples that are missing, each with the number of its cell of `shard_size` samples.

        A cell is one host's, so that what others write meanwhile changes nothing of what a host draws.
        """
        count, size = self.manifest.num_samples, self.shard_size
        present = np.zeros(count, bool)
        for shard in self._whole:
            present[shard.start : shard.stop] = True
        for cell, start in enumerate(range(0, count, size)):
            absent = start + np.flatnonzero(~present[start : start + size])
            for run in np.split(absent, 1 + np.flatnonzero(np.diff(absent) > 1)):
                if len(run):
                    yield cell, run

    def _write_manifest(self) -> None:
        """Writes the store's manifest where it is not there as it is now."""
        file = self.directory / MANIFEST_FILE
        if not file.exists() or read_manifest(SampleManifest, file) != self.manifest:
            write_manifest(file, self.manifest)

    def _read_shards(self) -> list[Shard]:
        """Returns the whole shards, by their first sample; notes those that were cut short.

        Raises:
            ValueError: a file that is no shard of this store, or shards that overlap.
        """
        whole, damaged = [], []
        for path in sorted(self.directory.glob("shard_*.npy")):
            shape = _shape_of(path)
            if shape is None:
                damaged.append(path.name)
                continue
            if len(shape) != 4 or shape[1:] != self.shape:
                raise ValueError(f"{path} holds {shape} uint8, not {('n', *self.shape)}; name another directory.")
            if match := _SHARD.fullmatch(path.name):
                start, stop = map(int, match.groups())
            elif match := _NUMBERED.fullmatch(path.name):
                start = int(match[1]) * self._numbered_size(path)
                stop = start + shape[0]
            else:
                raise ValueError(f"{path} is not called as a shard is, shard_START_STOP.npy; name another directory.")
            if stop - start != shape[0]:
                raise ValueError(f"{path} holds {shape[0]} samples, not {stop - start}; remove it.")
            whole.append(Shard(start, stop, path))
        whole.sort()
        for before, after in itertools.pairwise(whole):
            if after.start < before.stop:
                raise ValueError(f"{after.path} holds samples that are in {before.path.name} too; remove one of them.")
        self.damaged = tuple(damaged)
        return whole

    def _numbered_size(self, path: epath.Path) -> int:
        """Returns the samples of a whole shard of an older store, which the one of number 0 tells."""
        first = path.parent / path.name.replace(_NUMBERED.fullmatch(path.name)[1], "0" * 5)
        shape = _shape_of(first) if first.exists() else None
        if shape is None:
            raise ValueError(f"{path} is a shard of an older store whose {first.name} is not whole; remove it.")
        return shape[0]


def _load(shard: Shard) -> NumpyArray:
    """Returns the samples of a shard."""
    with shard.path.open("rb") as stream:
        return np.load(stream, allow_pickle=False)


def _shape_of(path: epath.Path) -> tuple[int, ...] | None:
    """Returns the shape of a shard's array; None where the file was cut short.

    Raises:
        ValueError: a file that holds no array of uint8.
    """
    size = path.stat().length
    with path.open("rb") as stream:
        if size < np.lib.format.MAGIC_LEN:
            return None
        try:
            np.lib.format.read_magic(stream)
            shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
        except ValueError as error:
            if "EOF" in str(error):  # NumPy's word where the header ends too early
                return None
            raise ValueError(f"{path} is not a shard: {error}") from error
        expected = stream.tell() + int(np.prod(shape, dtype=object))
    if dtype != np.uint8 or fortran_order:
        raise ValueError(f"{path} is not a shard: it holds {dtype}, not uint8 in C order.")
    if size > expected:
        raise ValueError(f"{path} is not a shard: it has {size} bytes where {expected} are its array.")
    return shape if size == expected else None
