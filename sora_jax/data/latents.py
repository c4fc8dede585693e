"""Latents that `experiments/prepare_data.py latents` stored: by index, and in batches drawn from their posteriors."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import functools
import json
from typing import Any, ClassVar, NamedTuple

import numpy as np

from sora_jax.array_types import Float, Int, NumpyArray, PackedBatch
from sora_jax.config import BatchConfig, PatchConfig, check
from sora_jax.data.records import parse_example
from sora_jax.data.sources import find_dataset, open_records, read_record, read_splits, split_spans
from sora_jax.patches.patchify import grid_shape, patchify
from sora_jax.patches.positions import grid_positions
from sora_jax.patches.rows import Segment, fill_row, stack_rows

REPORT = "report.json"
_ORDER, _DRAW = 0, 1  # of generators


@dataclasses.dataclass(frozen=True)
class LatentDataConfig(BatchConfig):
    """Latents that `experiments/prepare_data.py latents` stored, each a row of its own.

    Attributes:
        path: directory of the data set.
        row_length: patches of an image's latents, L.
        seed: of order, mirror images and the draws from the posteriors.
        num_workers: threads that read and draw batches ahead, one each.
    """

    kind: ClassVar[str] = "latents"

    eval_splits: tuple[str, ...] = ()
    path: str = ""
    row_length: int = 256
    seed: int = 0
    num_workers: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.row_length >= 1, self, "row_length", "at least 1")
        check(self.num_workers >= 1, self, "num_workers", "at least 1")
        check(self.seed >= 0, self, "seed", "at least 0")

    @property
    def text_length(self) -> int:
        """Caption tokens of a row."""
        return 0

    @property
    def max_segments(self) -> int:
        """Images of a row."""
        return 1


class LatentExample(NamedTuple):
    """The posteriors of one image.

    Attributes:
        mean: (views, h, w, c) float32, unscaled; a view is the image or its mirror image.
        std: (views, h, w, c) float32, unscaled.
        label: index of its class, -1 where it has none.
        caption: what it shows; may be empty.
        name: of the image.
    """

    mean: Float[np.ndarray, "views height width channels"]
    std: Float[np.ndarray, "views height width channels"]
    label: int
    caption: str
    name: str


class LatentBatch(NamedTuple):
    """Latents of a host's rows of a batch.

    Attributes:
        latents: (B, h, w, c) float32, drawn from the posteriors and scaled.
        labels: (B,) int32, -1 where there is none.
    """

    latents: Float[np.ndarray, "batch height width channels"]
    labels: Int[np.ndarray, " batch"]


class LatentSource:
    """The latents of one split, by index.

    Args:
        path: directory of a data set that `experiments/prepare_data.py latents` wrote, or one above it.
        split: name of a split, or what TFDS makes of names (`train[:100]`).

    Attributes:
        views, shape: views of an image, and (h, w, c) of each.
        scaling_factor: a diffusion model is trained on latents times this number.
        label_names: of the classes, in the order of their indices; () where the data set has no labels.
        request: what the data set was made from and how.

    Raises:
        ValueError: no such data set, an unknown split, or a damaged file of records, which is named.
    """

    def __init__(self, path: str, split: str = "train"):
        directory = find_dataset(path)
        self.path, self.split = str(directory), split
        report = json.loads((directory / REPORT).read_text()) if (directory / REPORT).exists() else {}
        if len(report.get("shape", ())) != 5:
            raise ValueError(f"{self.path} holds no latents; run experiments/prepare_data.py latents.")
        self.request: dict[str, Any] = report["request"]
        self.views, _, *shape = report["shape"]
        self.shape: tuple[int, int, int] = tuple(shape)
        self.scaling_factor = float(self.request["autoencoder"]["scaling_factor"])
        names = directory / "label.labels.txt"
        self.label_names = tuple(names.read_text().split("\n")[:-1]) if names.exists() else ()
        self._dtype = np.dtype(self.request["dtype"])
        splits = read_splits(self.path)
        self._files = [
            instruction
            for name, start, stop in split_spans(splits, split, self.path)
            for instruction in splits[f"{name}[{start}:{stop}]"].file_instructions
        ]
        self._length = sum(file.take for file in self._files)
        self._records: Any = None

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> LatentExample:
        """Reads one example; IndexError where there is none, ValueError where its file is damaged."""
        if not 0 <= index < len(self):
            raise IndexError(f"index must be in 0 ... {len(self) - 1}, got {index}.")
        if self._records is None:
            self._records = open_records(self._files)
        values = parse_example(read_record(self._records, self._files, int(index)))
        stored = np.frombuffer(values["latents"][0], self._dtype).reshape(self.views, 2, *self.shape)
        mean, std = np.moveaxis(stored.astype(np.float32), 1, 0)
        label = int(values["label"][0]) if "label" in values else -1
        return LatentExample(mean, std, label, values["caption"][0].decode(), values["name"][0].decode())

    def sample(self, index: int, rng: np.random.Generator) -> tuple[NumpyArray, int]:
        """Draws the latents that an image is trained on.

        Args:
            index: of the image.
            rng: draws a view, then unit normal noise e for scaling_factor (mean + std e).

        Returns:
            (h, w, c) float32, and the label.
        """
        example = self[index]
        view = int(rng.integers(self.views))
        noise = rng.standard_normal(self.shape, np.float32)
        return np.float32(self.scaling_factor) * (example.mean[view] + example.std[view] * noise), example.label


class LatentBatches:
    """Batches in which every image comes once an epoch, in a new order; the last ones of an epoch join the next.

    What stands at a place of the order depends on that place and the seed alone, so the number of the batch is all that
    is saved, and the number of hosts changes nothing. Each host reads its own rows, batches ahead of the one that is
    asked for.

    Args:
        source: of the latents.
        seed: of order, views and noise.
        batch_size: of the global batch.
        length: batches until the end (None: endless).
        process_index: number of this host.
        process_count: hosts.
        num_workers: threads; as many batches are made ahead.

    Raises:
        ValueError: a batch that the hosts cannot share, or no latents.
    """

    def __init__(
        self,
        source: LatentSource,
        seed: int,
        batch_size: int,
        length: int | None = None,
        process_index: int = 0,
        process_count: int = 1,
        num_workers: int = 1,
    ) -> None:
        if batch_size % process_count:
            raise ValueError(f"data.batch_size must be a multiple of the {process_count} hosts, got {batch_size}.")
        if not len(source):
            raise ValueError(f"split {source.split!r} of {source.path} is empty.")
        self._source, self._seed, self._batch_size, self._length = source, seed, batch_size, length
        share = batch_size // process_count
        self._rows = range(process_index * share, (process_index + 1) * share)
        self._index = 0
        self._order = functools.lru_cache(maxsize=2)(self._draw_order)  # of two epochs, where one ends
        self._num_workers = num_workers
        self._pool = concurrent.futures.ThreadPoolExecutor(num_workers, "latents")
        self._ahead: collections.deque[concurrent.futures.Future] = collections.deque()  # of batches from _index on

    def __iter__(self) -> LatentBatches:
        """Returns itself."""
        return self

    def __next__(self) -> Any:
        """Returns this host's rows of the next batch."""
        while len(self._ahead) < self._num_workers:
            index = self._index + len(self._ahead)
            if self._length is not None and index >= self._length:
                break
            self._ahead.append(self._pool.submit(self.make, index))
        if not self._ahead:
            raise StopIteration
        batch = self._ahead.popleft().result()
        self._index += 1
        return batch

    def make(self, index: int) -> Any:
        """Returns this host's rows, a `LatentBatch`, of a batch by its number; several threads may ask at once."""
        places = [index * self._batch_size + row for row in self._rows]
        drawn = [
            self._source.sample(self._image_at(place), np.random.default_rng((self._seed, _DRAW, place)))
            for place in places
        ]
        latents, labels = zip(*drawn, strict=True)
        return LatentBatch(np.stack(latents), np.array(labels, np.int32))

    def _image_at(self, place: int) -> int:
        """Returns the index of the image at a place of the order of all epochs."""
        epoch, number = divmod(place, len(self._source))
        return int(self._order(epoch)[number])

    def _draw_order(self, epoch: int) -> Int[np.ndarray, " images"]:
        """Returns the order of an epoch."""
        return np.random.default_rng((self._seed, _ORDER, epoch)).permutation(len(self._source))

    def get_state(self) -> dict[str, Any]:
        """Returns the number of the next batch, which is that of every host."""
        return {"index": self._index}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a place that `get_state` gave."""
        self._index = state["index"]
        self._forget()

    def summary(self) -> str:
        """Returns how much was given, in a line."""
        return f"{self._index:,} batches of {self._batch_size:,} latents"

    def close(self) -> None:
        """Ends the threads."""
        self._forget()
        self._pool.shutdown(cancel_futures=True)

    def _forget(self) -> None:
        """Drops what was made ahead."""
        for future in self._ahead:
            future.cancel()
        self._ahead.clear()


class LatentRows(LatentBatches):
    """`LatentBatches` as packed rows of one image each, as the pipeline of pixels gives them.

    Args:
        source: of the latents.
        patch: that they are cut into.
        **batches: further arguments of `LatentBatches`.

    Raises:
        ValueError: latents of other channels than the patch's, or that patches do not fill; and as `LatentBatches`.
    """

    def __init__(self, source: LatentSource, patch: PatchConfig, **batches: Any) -> None:
        super().__init__(source, **batches)
        height, width, channels = source.shape
        if channels != patch.channels or height % patch.size[1] or width % patch.size[2]:
            given = f"size {patch.size} and {patch.channels} channels"
            raise ValueError(f"patch must cut latents of {source.shape} (h, w, c), got {given}.")
        self._patch = patch

    def make(self, index: int) -> PackedBatch:
        """Returns this host's rows of a batch by its number."""
        batch = super().make(index)
        return image_rows(batch.latents, batch.labels, self._patch)


def image_rows(
    images: Float[np.ndarray, "batch height width channels"], labels: Int[np.ndarray, " batch"], patch: PatchConfig
) -> PackedBatch:
    """Returns equal images (of latents or pixels), whole patches of each, as packed rows of one image each."""
    positions = grid_positions(grid_shape(1, *images.shape[1:3], patch.size), 1.0, patch)
    text, known = np.zeros((0, 0), np.float32), np.zeros(len(positions), bool)
    budgets = dict(row_length=len(positions), text_length=0, max_segments=1, patch_dim=patch.dim, text_dim=0)
    return stack_rows(
        [
            fill_row([Segment(patchify(x[None], patch.size), positions, text, known, 0, int(label))], **budgets)
            for x, label in zip(images, labels, strict=True)
        ]
    )
