"""Processes that make rows, each of them whole logical shards.

A worker sends its rows in the order in which they will be used, each with its shard's place after it. So the place
of the whole is that of the rows that were used, whatever was made ahead, and does not depend on the number of workers.

A worker is a fresh interpreter with a pipe to the main process, rather than a `multiprocessing.Process`: it does not
import the main module again (so a script needs no `__main__` guard, and its imports are not paid for twice), and both
ends hold one end of the pipe each, so that either notices at once when the other has died, however it died.
"""

from __future__ import annotations

import multiprocessing.connection
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import time
import traceback
import weakref
from collections.abc import Callable
from typing import Any, NamedTuple

from sora_jax.array_types import PackedBatch
from sora_jax.data.packing import Shard

# Shards are what is parallel; threads under NumPy would only fight over the same processors. grain imports JAX,
# which must not take the accelerator from the main process, should anything ever touch it.
_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "JAX_PLATFORMS": "cpu",
}
_START = "import pickle, sys; sys.path[:] = pickle.load(sys.stdin.buffer); import sora_jax.data.workers as w; w.run()"
# A preemption notice or Ctrl-C may reach all processes; what happens then is for the main process to say.
_LEFT_TO_MAIN = {signal.SIGINT, signal.SIGTERM}


class Made(NamedTuple):
    """A row and what goes with it.

    Attributes:
        row: without a batch axis; None where the shard has ended.
        state: the shard's place after it.
        skipped: what the shard has left out since its last row.
        num_reduced: samples made smaller to fit a row since its last row.
        cpu_seconds: processor time of the worker so far (0 in the main process).
    """

    row: PackedBatch | None
    state: Any
    skipped: dict[tuple[str, str], int]
    num_reduced: int
    cpu_seconds: float


class Failure(NamedTuple):
    """What ended a worker.

    Attributes:
        message: of the exception, where it is about a value that the user can change; else None.
        traceback: of the worker.
    """

    message: str | None
    traceback: str


def make_row(shard: Shard) -> Made:
    """Makes the next row of a shard."""
    row = next(shard, None)
    made = Made(row, shard.get_state(), dict(shard.skipped), shard.num_reduced, 0.0)
    shard.skipped.clear()
    shard.num_reduced = 0
    return made


class Worker:
    """A process that makes the rows of some shards.

    Args:
        open_shard: makes a shard of its index; pickled to the process.
        shards: indices, in the order in which a batch uses them.
        states: the place at which each starts, None for the beginning.
        rows_per_turn: rows that a batch uses of each shard.
        ahead: rows kept ready.

    Attributes:
        process: the interpreter.
        close: ends it at once; called when the worker is no longer referred to, and at exit.
    """

    def __init__(
        self,
        open_shard: Callable[[int], Shard],
        shards: list[int],
        states: dict[int, Any],
        rows_per_turn: int,
        ahead: int,
    ) -> None:
        job = pickle.dumps((open_shard, shards, states, rows_per_turn))
        read, write = os.pipe()
        self._rows = multiprocessing.connection.Connection(read, writable=False)
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, _LEFT_TO_MAIN)  # the worker inherits the mask
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _START, str(write), str(ahead)],
                stdin=subprocess.PIPE,
                env=os.environ | _ENVIRONMENT,
                pass_fds=(write,),
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
            os.close(write)  # so that the pipe ends when the worker does
        self.close = weakref.finalize(self, _stop, self.process, self._rows)
        try:
            with self.process.stdin as stdin:
                stdin.write(pickle.dumps(sys.path) + job)
        except BrokenPipeError:
            self._raise_died()

    def get(self) -> Made:
        """Waits for the next row.

        Raises:
            RuntimeError: the worker died, or failed (with its traceback).
            ValueError: what it raised was one; the traceback is its cause.
        """
        try:
            made = self._rows.recv()
        except (EOFError, OSError):
            self._raise_died()
        if isinstance(made, Failure):
            error = RuntimeError(f"a data worker failed:\n{made.traceback}")
            if made.message is None:
                raise error
            raise ValueError(made.message) from error
        return made

    def _raise_died(self) -> None:
        code = self.process.wait()
        hint = " (killed; out of memory?)" if code == -signal.SIGKILL else ""
        raise RuntimeError(f"a data worker died with exit code {code}{hint}.") from None


def _stop(process: subprocess.Popen, rows: Any) -> None:
    """Ends a worker at once: whatever it has made is made again from the saved place."""
    process.kill()
    process.wait()
    rows.close()


def run() -> None:
    """Makes rows in a worker process, until the main process ends it or is gone."""
    pipe, ahead = sys.argv[1:]
    made: queue.Queue[Made | Failure] = queue.Queue(maxsize=int(ahead))
    # Sending stands beside decoding: both leave the interpreter's lock most of the time.
    connection = multiprocessing.connection.Connection(int(pipe), readable=False)
    threading.Thread(target=_send, args=(connection, made), daemon=True).start()
    try:
        open_shard, indices, states, rows_per_turn = pickle.load(sys.stdin.buffer)
        shards = [open_shard(index) for index in indices]
        for index, shard in zip(indices, shards, strict=True):
            if states.get(index) is not None:
                shard.set_state(states[index])
        while True:
            for shard in shards:
                for _ in range(rows_per_turn):
                    made.put(make_row(shard)._replace(cpu_seconds=time.process_time()))
    except Exception as error:  # whatever it is, the main process raises it
        made.put(Failure(str(error) if isinstance(error, ValueError) else None, traceback.format_exc()))
        made.join()


def _send(connection: Any, made: queue.Queue[Made | Failure]) -> None:
    """Sends rows; ends the process where nobody is there to read them."""
    while True:
        item = made.get()
        try:
            connection.send(item)
        except OSError:
            os._exit(0)
        made.task_done()
