"""What several hosts have to agree on: arrays made of local rows, states, and the step at which all stop."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding

from sora_jax.array_types import PyTree

T = TypeVar("T")


def to_global(local: PyTree, sharding: NamedSharding) -> PyTree:
    """Returns global arrays of which every host gives its own rows (on one host: moves them onto the mesh).

    Args:
        local: tree of NumPy arrays with the rows of this host, in the order of its devices.
        sharding: of the global arrays.
    """
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), local)


def to_local(tree: PyTree) -> PyTree:
    """Returns global arrays whole, as NumPy arrays on every host; all hosts have to call it."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    return multihost_utils.process_allgather(tree, tiled=True)


def gather_json(value: Any) -> list[Any]:
    """Returns every host's JSON-able `value`, in the order of the processes."""
    if jax.process_count() == 1:
        return [value]
    encoded = np.frombuffer(json.dumps(value).encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.array(len(encoded), np.int32))
    padded = np.zeros(int(lengths.max()), np.uint8)
    padded[: len(encoded)] = encoded
    rows = multihost_utils.process_allgather(padded)
    return [json.loads(row[:length].tobytes()) for row, length in zip(rows, lengths, strict=True)]


def first_process_first(make: Callable[[], T]) -> T:
    """Returns `make()` of every host; the others wait for the first one, whose files they may share."""
    if jax.process_count() == 1:
        return make()
    result = make() if jax.process_index() == 0 else None
    multihost_utils.sync_global_devices("first_process_first")
    return make() if jax.process_index() > 0 else result


class PreemptionGuard:
    """Tells all hosts, at the same step, that they are to save and stop.

    On one process a SIGTERM or SIGINT sets a flag. On several, JAX's coordination service has caught the SIGTERM of
    any of them and names a step that all reach (`jax.experimental.multihost_utils.reached_preemption_sync_point`).
    Use as a context; the old signal handlers come back at its end.
    """

    def __init__(self) -> None:
        self._stop = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> PreemptionGuard:
        single = jax.process_count() == 1
        if single and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._request)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self._stop and number == signal.SIGINT:  # the second Ctrl-C does not wait for the step
            raise KeyboardInterrupt
        self._stop = True

    def reached(self, step: int) -> bool:
        """Returns whether to save and stop after `step`, the same on all hosts; each must ask at every step."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self._stop
