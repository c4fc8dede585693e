"""One logical shard of the data: its own order, its own packer, and rows made of what the packer planned.

Rows are planned on token counts alone, by grain's best-fit packer, and only then read and filled. A shard's place is
the packer's, so it is small, restoring reads nothing, and it is exact in the middle of packing. Of a mixture, grain
takes samples from its parts in turn, such that every run of them has each part's share to within a sample or two.
"""

from __future__ import annotations

import bisect
import collections
import dataclasses
import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np

from sora_jax.array_types import TEXT_DTYPE, NumpyArray, PackedBatch
from sora_jax.config import PackedDataConfig, PatchConfig
from sora_jax.data.captions import CaptionStates
from sora_jax.data.content import Content
from sora_jax.data.transforms import Sample, StoredClip, select_clips
from sora_jax.patches.levels import TABLES, num_levels, segment_levels
from sora_jax.patches.patchify import grid_shape, patchify
from sora_jax.patches.positions import grid_positions
from sora_jax.patches.rows import Segment, fill_row
from sora_jax.patches.token_drop import kept_tokens

TOO_LONG_CAPTION = "caption of more tokens than data.text_length"
FEW_CLIPS = 256
"""Of fewer clips a shard makes the permutations itself: grain's takes 2**16 steps an epoch, however few there are."""
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
        content: the split's clips.
        captions: token states of their captions; None where `data.text_length` is 0.
        data: sampling, budgets and seed.
        patch: of the model.
        index: of the shard, 0 ... data.num_shards - 1; it has every num_shards-th clip of each part of the content.
        repeat: go on for ever, in a new order each epoch, on the clips that `data` chooses of each of its parts, and as
            often as their weights say; else all clips once.

    Attributes:
        skipped: how often each (clip name, reason) was left out; whoever reads it may clear it.
        num_reduced: samples that were made smaller to fit a row, likewise.

    Raises:
        ValueError: where `repeat`, and no sample of the shard fits a row.
    """

    def __init__(
        self,
        content: Content,
        captions: CaptionStates | None,
        data: PackedDataConfig,
        patch: PatchConfig,
        index: int,
        repeat: bool,
    ) -> None:
        self._content, self._captions, self._data, self._patch = content, captions, data, patch
        self.skipped: collections.Counter[tuple[str, str]] = collections.Counter()
        self.num_reduced = 0
        self._misses = 0
        self._repeat = repeat
        self._data_of_part = [_of_part(data, part.still_share) for part in data.parts] if repeat else [data]
        if captions is not None:
            self._null_length = int(captions.lengths([""])[0])
            self._caption_lengths = captions.lengths(content.metadata.captions)
        self._rows: Any = None
        plans = self._order(index)
        if plans is not None:
            # grain's threads would only get in the way of a plan that takes microseconds.
            plans = plans.filter(lambda plan: plan is not None)
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

    def _order(self, index: int) -> grain.MapDataset | None:
        """Returns the plans of a shard in their order, None where it has no clips."""
        data, starts, draw = self._data, self._content.starts, _DrawPlan(self)
        seed = data.seed * data.num_shards + index
        if not self._repeat:
            clips = range(index, len(self._content), data.num_shards)
            return grain.MapDataset.source(list(clips)).seed(seed).shuffle().random_map(draw) if clips else None
        of_parts = [
            (start + select_clips(stop - start, part.max_clips, data.clip_seed)[index :: data.num_shards]).tolist()
            for part, (start, stop) in zip(data.parts, itertools.pairwise(starts), strict=True)
        ]
        if len(of_parts) == 1:
            return _shuffled(of_parts[0], seed).seed(seed).random_map(draw)
        seeds = np.random.default_rng((data.seed, index)).integers(2**31, size=1 + len(of_parts)).tolist()
        shuffled = [_shuffled(clips, own) for clips, own in zip(of_parts, seeds[1:], strict=True)]
        mixed = grain.MapDataset.mix(shuffled, [part.weight for part in data.parts])
        return mixed.seed(seeds[0]).random_map(draw)

    def plan(self, clip: int, rng: np.random.Generator) -> dict[str, NumpyArray] | None:
        """Draws a sample of a clip, as arrays whose lengths are what it needs of a row's budgets."""
        m, part = self._content.metadata, 0
        if len(self._data_of_part) > 1:
            part = bisect.bisect_right(self._content.starts, clip) - 1
        data, resizable = self._data_of_part[part], self._content.resizable
        stored = StoredClip(
            clip,
            int(m.num_frames[clip]),
            float(m.fps[clip]),
            int(m.height[clip]),
            int(m.width[clip]),
            int(m.labels[clip]),
        )
        sample = data.draw(rng, stored, self._patch, resizable)
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
        self.skipped[self._content.metadata.names[clip], reason] += 1
        self._misses += 1
        if self._repeat and self._misses >= MOST_MISSES:
            reasons = ", ".join(sorted({reason for _, reason in self.skipped}))
            raise ValueError(f"{self._misses} samples in a row were left out ({reasons}); {self._data.how_to_fit}")

    def next_plan(self) -> list[Sample]:
        """Returns the samples of the next row; StopIteration where the epoch has ended."""
        if self._rows is None:
            raise StopIteration
        row = next(self._rows)
        return [Sample.from_row(numbers) for numbers in row["sample"][row["sample_segment_ids"] > 0]]

    def __next__(self) -> PackedBatch:
        return self.fill(self.next_plan())

    def fill(self, samples: list[Sample]) -> PackedBatch:
        """Reads samples and packs them into a row (without a batch axis)."""
        return fill_row(
            [self.segment(sample) for sample in samples], **row_budgets(self._data, self._patch, self._captions)
        )

    def segment(self, sample: Sample) -> Segment:
        """Reads one sample."""
        patches = patchify(self._content.values(sample.clip, sample), self._patch.size)
        grid = grid_shape(sample.num_frames, sample.height, sample.width, self._patch.size)
        positions = grid_positions(grid, sample.fps, self._patch)
        extent = positions.max(axis=0) + 1
        frames = np.repeat(np.arange(grid[0]), grid[1] * grid[2])
        if sample.num_kept:
            rng = np.random.default_rng(sample.drop_seed)
            kept = kept_tokens(rng, len(patches), 1 - sample.num_kept / len(patches))
            patches, positions, frames = patches[kept], positions[kept], frames[kept]
        if self._captions is None:
            text = np.zeros((0, 0), TEXT_DTYPE)
        else:
            text = self._captions.lookup("" if sample.caption_dropped else self._content.metadata.captions[sample.clip])
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


def _shuffled(clips: list[int], seed: int) -> grain.MapDataset:
    """Returns clips for ever, in a new order each epoch."""
    if len(clips) < FEW_CLIPS:
        return grain.MapDataset.source(_Epochs(clips, seed))
    return grain.MapDataset.source(clips).seed(seed).shuffle().repeat()


class _Epochs(Sequence[int]):
    """Permutations of a few clips, one after the other, as a sequence without end."""

    def __init__(self, clips: list[int], seed: int) -> None:
        self._clips, self._seed = np.array(clips), seed
        self._epoch, self._order = -1, self._clips

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> int:
        epoch, place = divmod(index, len(self._clips))
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng((self._seed, epoch)).permutation(self._clips)
        return int(self._order[place])


def _of_part(data: PackedDataConfig, still_share: float | None) -> PackedDataConfig:
    """Returns how the samples of a part of the data are drawn."""
    return data if still_share is None else dataclasses.replace(data, still_share=still_share)


def row_budgets(data: PackedDataConfig, patch: PatchConfig, captions: CaptionStates | None) -> dict[str, int]:
    """Returns the arguments of `fill_row` that a data set's rows have in common."""
    return {
        "row_length": data.row_length,
        "text_length": data.text_length,
        "max_segments": data.max_segments,
        "max_levels": data.num_levels,
        "patch_dim": patch.dim,
        "text_dim": captions.dim if captions is not None else 0,
    }
