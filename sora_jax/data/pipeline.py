"""Batches of packed rows, from a prepared data set or a mixture of several, of pixels or of latents.

The data is cut into `data.num_shards` logical shards. A batch takes the same number of rows from each, in the order
of the shards; a host owns a run of neighbouring shards and so makes its own run of the batch's rows. Neither the
number of hosts nor that of worker processes changes the rows of a batch.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import itertools
import logging
import time
from collections.abc import Iterator
from typing import Any

from sora_jax.array_types import PackedBatch
from sora_jax.config import PackedDataConfig, PatchConfig
from sora_jax.data.captions import CaptionStates
from sora_jax.data.content import Content, check_content, open_data
from sora_jax.data.packing import Shard, row_budgets
from sora_jax.data.workers import Made, Worker, make_row
from sora_jax.patches.rows import fill_row, stack_rows

_LOGGER = logging.getLogger(__name__)
MOST_REPORTED = 5  # clips that are named of those left out for one reason


@dataclasses.dataclass
class PipelineStatistics:
    """What a pipeline has given so far on this host.

    Attributes:
        rows: rows given.
        clips: samples in them.
        real_tokens: patches in them that are not padding.
        tokens: patches they have room for.
        waited_seconds: time that `next` took.
        skipped: how often each (clip name, reason) was left out. The first few of each reason are logged as warnings.
        num_reduced: samples made smaller because they had more patches than a row; the first time is logged.
        worker_cpu_seconds: processor time of each worker process, by its process id.
    """

    rows: int = 0
    clips: int = 0
    real_tokens: int = 0
    tokens: int = 0
    waited_seconds: float = 0.0
    skipped: collections.Counter[tuple[str, str]] = dataclasses.field(default_factory=collections.Counter)
    num_reduced: int = 0
    worker_cpu_seconds: dict[int, float] = dataclasses.field(default_factory=dict)

    @property
    def real_token_share(self) -> float:
        """Share of the rows' tokens that are not padding."""
        return self.real_tokens / self.tokens if self.tokens else 0.0


class PackedPipeline(Iterator[PackedBatch]):
    """Iterates over this host's rows of each batch; see `make_pipeline`."""

    def __init__(
        self,
        content: Content,
        captions: CaptionStates | None,
        data: PackedDataConfig,
        patch: PatchConfig,
        *,
        repeat: bool,
        process_index: int,
        process_count: int,
    ) -> None:
        if data.num_shards % process_count:
            raise ValueError(
                f"data.num_shards must be a multiple of the number of hosts ({process_count}), got {data.num_shards}."
            )
        self._num_clips = len(content)
        if repeat:
            sizes = [stop - start for start, stop in itertools.pairwise(content.starts)]
            counts = [min(size, part.max_clips or size) for size, part in zip(sizes, data.parts, strict=True)]
            self._num_clips = sum(counts)
            if min(counts) < data.num_shards:
                few = data.parts[counts.index(min(counts))].path if data.mixture else "the data set"
                raise ValueError(
                    f"data.num_shards must be at most the number of clips of {few} that are trained on "
                    f"({min(counts)}), got {data.num_shards}."
                )
        owned = data.num_shards // process_count
        self.statistics = PipelineStatistics()
        self._data = data
        self._shards = list(range(process_index * owned, (process_index + 1) * owned))
        self._rows_per_shard = data.batch_size // data.num_shards
        self._open_shard = functools.partial(_open_shard, content, captions, data, patch, repeat=repeat)
        self._empty_row = fill_row([], **row_budgets(data, patch, captions))
        self._states: dict[int, Any] = {shard: None for shard in self._shards}
        self._restored = False
        self._makers: dict[int, Worker | Shard] = {}

    def __next__(self) -> PackedBatch:
        began = time.perf_counter()
        with contextlib.ExitStack() as on_failure:
            on_failure.callback(self.close)  # a batch that was begun is made again from the place after the last one
            if not self._makers:
                self._start()
            made = [(shard, self._make(shard)) for shard in self._shards for _ in range(self._rows_per_shard)]
            on_failure.pop_all()
        rows = [m.row for _, m in made if m.row is not None]
        for shard, m in made:
            self._states[shard] = m.state
        if not rows:
            self._check_not_empty()
            raise StopIteration
        batch = stack_rows([self._empty_row if m.row is None else m.row for _, m in made])
        stats = self.statistics
        stats.rows += len(rows)
        stats.clips += int((batch.clip_ids >= 0).sum())
        stats.real_tokens += int((batch.segment_ids > 0).sum())
        stats.tokens += len(rows) * self._data.row_length
        stats.waited_seconds += time.perf_counter() - began
        return batch

    def get_state(self) -> dict[str, Any]:
        """Returns the place after the last batch given, JSON-able: that of each shard of this host, by its index."""
        return {str(shard): state for shard, state in self._states.items()}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a place; `state` may hold the shards of other hosts too.

        Raises:
            ValueError: a shard of this host is missing.
        """
        missing = [shard for shard in self._shards if str(shard) not in state]
        if missing:
            raise ValueError(
                f"the saved place of the data lacks shard {missing[0]}; it has {', '.join(state)}. A run that an older "
                "version saved in another order of the data starts anew from its parameters (--init-from)."
            )
        self.close()
        self._states = {shard: state[str(shard)] for shard in self._shards}
        self._restored = True

    def close(self) -> None:
        """Ends the worker processes; the next batch starts them again."""
        for maker in self._makers.values():
            if isinstance(maker, Worker):
                maker.close()
        self._makers = {}

    def summary(self) -> str:
        """Returns what this host has been given so far, and what was left out and why, in a line."""
        stats = self.statistics
        text = f"{stats.rows:,} rows of {stats.clips:,} clips, {stats.real_token_share:.2%} of their tokens real"
        if stats.num_reduced:
            text += f"; {stats.num_reduced:,} samples made smaller to fit a row"
        reasons = collections.Counter()
        for (_, reason), count in stats.skipped.items():
            reasons[reason] += count
        for reason, count in reasons.most_common():
            names = sorted(name for name, why in stats.skipped if why == reason)
            text += f"; {count:,} samples of {len(names):,} clips left out ({reason}: {', '.join(names[:3])}"
            text += ", ...)" if len(names) > 3 else ")"
        return text

    def __enter__(self) -> PackedPipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        """Opens the shards, in this process or in workers."""
        num_workers = min(self._data.num_workers, len(self._shards))
        if num_workers == 0:
            for index in self._shards:
                shard = self._makers[index] = self._open_shard(index)
                if self._states[index] is not None:
                    shard.set_state(self._states[index])
        for number in range(num_workers):
            shards = self._shards[number::num_workers]
            ahead = self._data.prefetch * self._rows_per_shard * len(shards)
            states = {shard: self._states[shard] for shard in shards}
            worker = Worker(self._open_shard, shards, states, self._rows_per_shard, ahead)
            self._makers.update(dict.fromkeys(shards, worker))

    def _make(self, shard: int) -> Made:
        """Returns a shard's next row, and takes note of what it says of itself."""
        maker = self._makers[shard]
        made = maker.get() if isinstance(maker, Worker) else make_row(maker)
        stats = self.statistics
        for (name, reason), count in made.skipped.items():
            if (name, reason) not in stats.skipped:
                reported = sum(why == reason for _, why in stats.skipped)
                if reported < MOST_REPORTED:
                    _LOGGER.warning("clip %r left out: %s", name, reason)
                elif reported == MOST_REPORTED:
                    _LOGGER.warning("more clips left out: %s; they are counted in the end", reason)
            stats.skipped[name, reason] += count
        if made.num_reduced and not stats.num_reduced:
            _LOGGER.warning(
                "samples of more patches than a row (data.row_length %d) are made smaller", self._data.row_length
            )
        stats.num_reduced += made.num_reduced
        if isinstance(maker, Worker):
            stats.worker_cpu_seconds[maker.process.pid] = made.cpu_seconds
        return made

    def _check_not_empty(self) -> None:
        """Raises ValueError where a whole pass over the data gave no row."""
        if self._restored or self.statistics.rows:
            return
        if not self._num_clips:
            raise ValueError("the split has no clips; choose another one or prepare the data again.")
        reasons = ", ".join(sorted({reason for _, reason in self.statistics.skipped})) or "they belong to other hosts"
        raise ValueError(f"none of {self._num_clips} clips gives a row ({reasons}); {self._data.how_to_fit}")


def make_pipeline(
    data: PackedDataConfig,
    patch: PatchConfig,
    captions: CaptionStates | None,
    split: str | None = None,
    *,
    training: bool = True,
    process_index: int = 0,
    process_count: int = 1,
) -> PackedPipeline:
    """Opens a split of a prepared data set.

    Args:
        data: where it is, how it is sampled and packed.
        patch: of the model.
        captions: token states of the split's captions; None where `data.text_length` is 0 or the records hold them.
        split: of the data set; `data.split` where it is None. In a mixture each part may have its own to train on.
        training: endless, with caption dropout and mirror images, on the clips that `data` chooses; otherwise every
            clip of the split once, with its caption, read in this process. The last batch is filled up with empty rows.
        process_index: of this host.
        process_count: number of hosts.

    Raises:
        ValueError: patches of other channels than the data's, mirror images that it lacks, no such data, or shards that
            cannot be shared out among the hosts or have no clips. The iterator raises it where no clip fits a row,
            naming what to change.
    """
    content = open_data(data, split)
    check_content(content, data, patch)
    if captions is None and data.text_length:
        captions = content.captions
    if (captions is None) != (data.text_length == 0):
        given = "no caption table" if captions is None else "a caption table"
        raise ValueError(
            f"data.text_length must be 0 without captions and above with them, got {data.text_length} and {given}."
        )
    return PackedPipeline(
        content,
        captions,
        data if training else data.for_evaluation(),
        patch,
        repeat=training,
        process_index=process_index,
        process_count=process_count,
    )


def _open_shard(
    content: Content,
    captions: CaptionStates | None,
    data: PackedDataConfig,
    patch: PatchConfig,
    index: int,
    *,
    repeat: bool,
) -> Shard:
    """Opens one logical shard, in the process that will read it."""
    return Shard(content, captions, data, patch, index, repeat)
