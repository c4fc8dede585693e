"""One logical shard of the data: its own order, its own packer, and rows made of what the packer planned.

Rows are planned on token counts alone, by grain's best-fit packer, and only then decoded and filled. A shard's
place is the packer's, so it is small, restoring decodes nothing, and it is exact in the middle of packing.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Iterator
from typing import Any

import grain
import numpy as np

from sora_jax.array_types import NumpyArray, PackedBatch
from sora_jax.config import DataConfig, PackedDataConfig, PatchConfig
from sora_jax.data.captions import CaptionTable
from sora_jax.data.decode import UnreadableClipError, decode_frames
from sora_jax.data.recognition import RecognitionDataConfig, draw_recognition_sample
from sora_jax.data.sources import ClipSource
from sora_jax.data.transforms import TOO_LARGE, Sample, draw_sample, select_clips
from sora_jax.patches.levels import TABLES, num_levels, segment_levels
from sora_jax.patches.patchify import grid_shape, patchify
from sora_jax.patches.positions import grid_positions
from sora_jax.patches.rows import Segment, fill_row
from sora_jax.patches.token_drop import kept_tokens

TOO_LONG_CAPTION = "caption of more tokens than data.text_length"
MOST_MISSES = 10_000
"""Samples in a row that may be left out before an endless shard gives up."""


class _DrawPlan(grain.transforms.RandomMap):
    """Draws a sample of a clip as arrays that the packer can count; None where it fits no row."""

    def __init__(self, shard: Shard) -> None:
        self._shard = shard

    def random_map(self, clip: int, rng: np.random.Generator) -> dict[str, NumpyArray] | None:
        """Returns one byte for each patch and caption token, and the sample itself as a row of numbers."""
        return self._shard.plan(int(clip), rng)


class Shard(Iterator[PackedBatch]):
    """The rows of one logical shard, endless or of one epoch.

    Args:
        source: the split's clips.
        captions: token states of their captions; None where `data.text_length` is 0.
        data: sampling, budgets and seed.
        patch: of the model.
        index: of the shard, 0 ... data.num_shards - 1; it has every num_shards-th clip.
        repeat: go on for ever, in a new order each epoch.
        max_clips: of the split, for all shards together.

    Attributes:
        skipped: how often each (clip name, reason) was left out; whoever reads it may clear it.
        num_reduced: samples that were made smaller to fit a row, likewise.

    Raises:
        ValueError: where `repeat`, and no sample of the shard fits a row.
    """

    def __init__(
        self,
        source: ClipSource,
        captions: CaptionTable | None,
        data: PackedDataConfig,
        patch: PatchConfig,
        index: int,
        repeat: bool,
        max_clips: int | None,
    ) -> None:
        self._source, self._captions, self._data, self._patch = source, captions, data, patch
        self.skipped: collections.Counter[tuple[str, str]] = collections.Counter()
        self.num_reduced = 0
        self._misses = 0
        self._repeat = repeat
        clips = select_clips(len(source), max_clips, data.clip_seed)[index :: data.num_shards]
        if captions is not None:
            self._null_length = int(captions.lengths([""])[0])
            self._caption_lengths = captions.lengths(source.metadata.captions)
        self._rows: Any = None
        if len(clips):
            plans = grain.MapDataset.source(clips.tolist()).seed(data.seed * data.num_shards + index).shuffle()
            plans = plans.repeat() if repeat else plans
            # grain's threads would only get in the way of a plan that takes microseconds.
            plans = plans.random_map(_DrawPlan(self)).filter(lambda plan: plan is not None)
            options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
            self._rows = iter(
                grain.experimental.BestFitPackIterDataset(
                    plans.to_iter_dataset(options),
                    length_struct={"patches": data.row_length, "sample": data.max_segments}
                    | ({"text": data.text_length} if captions is not None else {})
                    | ({"levels": data.max_levels} if data.max_levels is not None else {}),
                    num_packing_bins=data.num_bins,
                    seed=data.seed,
                )
            )

    def plan(self, clip: int, rng: np.random.Generator) -> dict[str, NumpyArray] | None:
        """Draws a sample of a clip, as arrays whose lengths are what it needs of a row's budgets."""
        m = self._source.metadata
        clip_of = (clip, int(m.num_frames[clip]), float(m.fps[clip]), int(m.height[clip]), int(m.width[clip]))
        if isinstance(self._data, RecognitionDataConfig):
            sample = draw_recognition_sample(rng, *clip_of, int(m.labels[clip]), self._data, self._patch)
        else:
            sample = draw_sample(rng, *clip_of, self._data, self._patch) or TOO_LARGE
        if isinstance(sample, str):
            return self._leave_out(clip, sample)
        needs = {"patches": np.zeros(sample.num_tokens(self._patch), np.uint8), "sample": sample.to_row()[None]}
        if self._captions is not None:
            text = self._null_length if sample.caption_dropped else int(self._caption_lengths[clip])
            if text > self._data.text_length:
                return self._leave_out(clip, TOO_LONG_CAPTION)
            needs["text"] = np.zeros(text, np.uint8)
        if self._data.max_levels is not None:
            frames = math.ceil(sample.num_frames / self._patch.size[0])
            needs["levels"] = np.zeros(num_levels(TABLES[sample.table], frames), np.uint8)
        self._misses = 0
        self.num_reduced += sample.reduced
        return needs

    def _leave_out(self, clip: int, reason: str) -> None:
        """Takes note of a sample that fits no row; raises ValueError where none ever does."""
        self.skipped[self._source.metadata.names[clip], reason] += 1
        self._misses += 1
        if self._repeat and self._misses >= MOST_MISSES:
            reasons = ", ".join(sorted({reason for _, reason in self.skipped}))
            raise ValueError(f"{self._misses} samples in a row were left out ({reasons}); {how_to_fit(self._data)}")

    def next_plan(self) -> list[Sample]:
        """Returns the samples of the next row; StopIteration where the epoch has ended."""
        if self._rows is None:
            raise StopIteration
        row = next(self._rows)
        return [Sample.from_row(numbers) for numbers in row["sample"][row["sample_segment_ids"] > 0]]

    def __next__(self) -> PackedBatch:
        return self.fill(self.next_plan())

    def fill(self, samples: list[Sample]) -> PackedBatch:
        """Decodes samples and packs them into a row (without a batch axis)."""
        return fill_row(
            [self.segment(sample) for sample in samples], **row_budgets(self._data, self._patch, self._captions)
        )

    def segment(self, sample: Sample) -> Segment:
        """Decodes one sample."""
        m = self._source.metadata
        indices = sample.frame_indices(float(m.fps[sample.clip]), int(m.num_frames[sample.clip]))
        encoded = self._source.read_frames(sample.clip, indices)
        try:
            pixels = decode_frames(encoded, sample.height, sample.width)
        except UnreadableClipError as error:
            raise UnreadableClipError(f"clip {m.names[sample.clip]!r}: {error}") from error
        frames = pixels.astype(np.float32) / 127.5 - 1
        patches = patchify(frames, self._patch.size)
        grid = grid_shape(sample.num_frames, sample.height, sample.width, self._patch.size)
        positions = grid_positions(grid, sample.fps, self._patch)
        extent = positions.max(axis=0) + 1
        frames = np.repeat(np.arange(grid[0]), grid[1] * grid[2])
        if sample.num_kept:
            rng = np.random.default_rng(sample.drop_seed)
            kept = kept_tokens(rng, len(patches), 1 - sample.num_kept / len(patches))
            patches, positions, frames = patches[kept], positions[kept], frames[kept]
        if self._captions is None:
            text = np.zeros((0, 0), np.float32)
        else:
            text = self._captions.lookup("" if sample.caption_dropped else m.captions[sample.clip])
        return Segment(
            patches=patches,
            positions=positions,
            text=text,
            levels=segment_levels(TABLES[sample.table], frames, grid[0]),
            clip_id=sample.clip,
            label=sample.label,
            extent=extent,
        )

    def get_state(self) -> dict[str, Any] | None:
        """Returns the place in the data, JSON-able."""
        return None if self._rows is None else self._rows.get_state()

    def set_state(self, state: dict[str, Any] | None) -> None:
        """Goes to a place that `get_state` returned."""
        if self._rows is not None:
            self._rows.set_state(state)


def how_to_fit(data: PackedDataConfig) -> str:
    """Returns what to change where no clip fits a row."""
    if not isinstance(data, DataConfig):
        return "choose another data.sampling, data.label or data.row_length."
    return (
        f"raise data.row_length ({data.row_length}) or data.text_length ({data.text_length}), lower data.num_frames "
        f"{data.num_frames} or data.long_side {data.long_side}, or set data.oversize to 'resize'."
    )


def row_budgets(data: PackedDataConfig, patch: PatchConfig, captions: CaptionTable | None) -> dict[str, int]:
    """Returns the arguments of `fill_row` that a data set's rows have in common."""
    return {
        "row_length": data.row_length,
        "text_length": data.text_length,
        "max_segments": data.max_segments,
        "max_levels": data.num_levels,
        "patch_dim": patch.dim,
        "text_dim": captions.dim if captions is not None else 0,
    }
