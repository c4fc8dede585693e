"""Samples by the ten thousand: drawn in shards, resumed where they stopped, put together as the evaluators' `.npz`.

A store is a directory: `manifest.json`, and `shard_00000.npy` ... of `shard_size` samples each (the last of fewer),
(n, H, W, 3) uint8. A shard that is there is whole. Sample i depends on its index alone, whatever shard and host draws
it, so a store that was stopped and resumed holds what one that was not would hold.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from etils import epath

from sora_jax.array_types import Int, NumpyArray
from sora_jax.evaluation.manifest import SampleManifest, differences, manifest_path, read_manifest, write_manifest
from sora_jax.evaluation.whole_files import writing

MANIFEST_FILE = "manifest.json"

# (indices of the samples, (n,) int64) -> the samples, (n, H, W, 3) uint8
SampleFunction = Callable[[Int[np.ndarray, " n"]], NumpyArray]


class Shard(NamedTuple):
    """Samples `start` to `stop` (exclusive), in the file `number`."""

    number: int
    start: int
    stop: int


class SampleStore:
    """The samples of one manifest, in a directory.

    Attributes:
        directory: local or `gs://`.
        manifest: what the samples are made of; `num_samples`, `height` and `width` are the store's.
        shard_size: samples of a shard.
    """

    def __init__(self, directory: epath.PathLike, manifest: SampleManifest, shard_size: int = 500):
        """Opens the store of `directory`, or begins one there.

        Raises:
            ValueError: a directory with samples of another manifest or of shards of another size, named by its first
                field that differs; or a size or number below 1.
        """
        for field in ("num_samples", "height", "width"):
            if getattr(manifest, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(manifest, field)}.")
        if shard_size < 1:
            raise ValueError(f"shard_size must be at least 1, got {shard_size}.")
        self.directory, self.manifest, self.shard_size = epath.Path(directory), manifest, shard_size
        file = self.directory / MANIFEST_FILE
        if file.exists():
            if changed := differences(read_manifest(SampleManifest, file), manifest):
                name, (there, asked) = next(iter(changed.items()))
                raise ValueError(
                    f"{self.directory} holds samples with {name} {json.dumps(there)}, not {json.dumps(asked)}; "
                    "name another directory, or remove it."
                )
        else:
            if any(self.directory.glob("shard_*.npy")):
                raise ValueError(f"{self.directory} holds shards without a {MANIFEST_FILE}; name another directory.")
            write_manifest(file, manifest)
        for shard in self.shards:
            if self._file(shard).exists():
                self._check(shard)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Of a sample, (H, W, 3)."""
        return self.manifest.height, self.manifest.width, 3

    @property
    def shards(self) -> list[Shard]:
        """All shards of the store, whether they are there or not."""
        count, size = self.manifest.num_samples, self.shard_size
        return [Shard(n, start, min(start + size, count)) for n, start in enumerate(range(0, count, size))]

    def missing(self) -> list[Shard]:
        """Returns the shards that are still to be drawn."""
        return [shard for shard in self.shards if not self._file(shard).exists()]

    def fill(
        self,
        sample: SampleFunction,
        *,
        process_index: int = 0,
        process_count: int = 1,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Draws the shards that are missing.

        Args:
            sample: takes the indices of a shard's samples, in order; `shard_size` of them, or fewer in the last shard.
            process_index: of this host, which draws every process_count-th shard, on its own devices.
            process_count: hosts, which share the directory.
            progress: called with the number of samples of each shard that is done.

        Raises:
            ValueError: samples of another shape or dtype.
        """
        for shard in [s for s in self.missing() if s.number % process_count == process_index]:
            images = np.asarray(sample(np.arange(shard.start, shard.stop)))
            expected = (shard.stop - shard.start, *self.shape)
            if images.shape != expected or images.dtype != np.uint8:
                raise ValueError(f"samples must be {expected} uint8, got {images.shape} {images.dtype}.")
            with writing(self._file(shard)) as stream:
                np.save(stream, images, allow_pickle=False)
            if progress is not None:
                progress(len(images))

    def read(self, indices: Int[np.ndarray, " n"]) -> NumpyArray:
        """Returns some samples, (n, H, W, 3) uint8, with one shard in memory at a time.

        Raises:
            FileNotFoundError: a shard of theirs that is missing.
        """
        images = np.empty((len(indices), *self.shape), np.uint8)
        numbers = np.asarray(indices) // self.shard_size
        for number in np.unique(numbers):
            shard, chosen = self.shards[number], numbers == number
            images[chosen] = self._read(shard)[np.asarray(indices)[chosen] - shard.start]
        return images

    def assemble(self, path: epath.PathLike) -> epath.Path:
        """Writes all samples as `arr_0` (N, H, W, 3) of an `.npz`, a shard in memory at a time, and its manifest.

        Args:
            path: of the file, which guided-diffusion's evaluator takes; the manifest is at `manifest_path(path)`.

        Returns:
            The path.

        Raises:
            ValueError: shards that are missing.
        """
        if missing := self.missing():
            there = len(self.shards) - len(missing)
            raise ValueError(f"{self.directory} holds {there} of {len(self.shards)} shards; fill it first.")
        shape = (self.manifest.num_samples, *self.shape)
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype(np.uint8)), "fortran_order": False, "shape": shape}
        with writing(path) as stream, zipfile.ZipFile(stream, "w") as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array_header_1_0(member, header)
                for shard in self.shards:
                    member.write(self._read(shard).tobytes())
        write_manifest(manifest_path(path), self.manifest)
        return epath.Path(path)

    def _file(self, shard: Shard) -> epath.Path:
        return self.directory / f"shard_{shard.number:05d}.npy"

    def _read(self, shard: Shard) -> NumpyArray:
        with self._file(shard).open("rb") as stream:
            return np.load(stream, allow_pickle=False)

    def _check(self, shard: Shard) -> None:
        """Raises ValueError unless the file of a shard says that it is this store's."""
        with self._file(shard).open("rb") as stream:
            try:
                np.lib.format.read_magic(stream)
                shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
            except ValueError as error:
                raise ValueError(f"{self._file(shard)} is not a shard: {error}") from error
        expected = (shard.stop - shard.start, *self.shape)
        if shape != expected or dtype != np.uint8:
            raise ValueError(
                f"{self._file(shard)} holds {shape} {dtype}, not {expected} uint8: "
                f"it was made with another shard_size than {self.shard_size}."
            )
