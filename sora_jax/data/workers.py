"""Processes that make rows, each of them whole logical shards.

A worker sends its rows in the order in which they will be used, each with its shard's place after it. So the place
of the whole is that of the rows that were used, whatever was made ahead, and does not depend on the number of workers.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import queue
import signal
import time
import traceback
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

from sora_jax.array_types import PackedBatch
from sora_jax.data.packing import Shard

POLL_SECONDS = 0.5


class Made(NamedTuple):
    """A row and what goes with it.

    Attributes:
        row: without a batch axis; None where the shard has ended.
        state: the shard's place after it.
        skipped: what the shard has left out since its last row.
        cpu_seconds: processor time of the worker so far (0 in the main process).
    """

    row: PackedBatch | None
    state: Any
    skipped: dict[tuple[str, str], int]
    cpu_seconds: float


def make_row(shard: Shard) -> Made:
    """Makes the next row of a shard."""
    row = next(shard, None)
    skipped = dict(shard.skipped)
    shard.skipped.clear()
    return Made(row, shard.get_state(), skipped, 0.0)


class Worker:
    """A process that makes the rows of some shards.

    Args:
        open_shard: makes a shard of its index; pickled to the process.
        shards: indices, in the order in which a batch uses them.
        states: the place at which each starts, None for the beginning.
        rows_per_turn: rows that a batch uses of each shard.
        ahead: rows kept ready.
    """

    def __init__(
        self,
        open_shard: Callable[[int], Shard],
        shards: list[int],
        states: dict[int, Any],
        rows_per_turn: int,
        ahead: int,
    ) -> None:
        context = multiprocessing.get_context("spawn")
        self._queue: Any = context.Queue(maxsize=ahead)
        job = pickle.dumps((open_shard, shards, states, rows_per_turn))
        self._process = context.Process(target=_run, args=(job, self._queue, os.getpid()), daemon=True)
        self._process.start()
        self.close = weakref.finalize(self, _stop, self._process, self._queue)

    def get(self) -> Made:
        """Waits for the next row.

        Raises:
            RuntimeError: the worker failed (with its traceback) or died.
        """
        while True:
            try:
                made = self._queue.get(timeout=POLL_SECONDS)
            except queue.Empty:
                if self._process.is_alive():
                    continue
                raise RuntimeError(f"a data worker died (exit code {self._process.exitcode}).") from None
            if isinstance(made, str):
                raise RuntimeError(f"a data worker failed:\n{made}")
            return made


def _stop(process: Any, rows: Any) -> None:
    """Ends a worker at once: whatever it has made is made again from the saved place."""
    process.kill()
    process.join()
    rows.close()
    rows.cancel_join_thread()


def _run(job: bytes, rows: Any, parent: int) -> None:
    """Makes rows until the main process ends it, or is gone."""
    # A preemption notice or Ctrl-C reaches the whole process group; what happens then is for the main process to say.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        open_shard, indices, states, rows_per_turn = pickle.loads(job)
        shards = [open_shard(index) for index in indices]
        for index, shard in zip(indices, shards, strict=True):
            if states.get(index) is not None:
                shard.set_state(states[index])
        while True:
            for shard in shards:
                for _ in range(rows_per_turn):
                    made = make_row(shard)._replace(cpu_seconds=time.process_time())
                    if not _put(rows, made, parent):
                        return
    except Exception:
        _put(rows, traceback.format_exc(), parent)


def _put(rows: Any, item: Any, parent: int) -> bool:
    """Puts an item into the queue when there is room; False where the main process has gone."""
    while True:
        try:
            rows.put(item, timeout=POLL_SECONDS)
            return True
        except queue.Full:
            if os.getppid() != parent:
                return False
