"""What TensorBoard reads: events written at once, by the thread that has them.

`tensorboardX.SummaryWriter` hands them to a thread; where that dies (a full disk), the next ones wait forever for room
in its queue.
"""

from __future__ import annotations

import os
import socket
import time

import numpy as np
from tensorboardX import proto, summary
from tensorboardX.record_writer import RecordWriter, directory_check

FLUSH_SECONDS = 120.0
EVENT_VERSION = "brain.Event:2"


class EventFile:
    """A new file of events; flushed from time to time.

    Args:
        directory: of the file, made where it is missing.
        first_step: events of other files from this step on are those of an interrupted run, and are not shown.

    Raises:
        OSError: it cannot be written, here or in any method.
    """

    def __init__(self, directory: str, first_step: int) -> None:
        directory_check(directory)
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}"
        self._writer, self._flushed = RecordWriter(os.path.join(directory, name)), time.monotonic()
        self._add(0, file_version=EVENT_VERSION)
        self._add(first_step, session_log=proto.event_pb2.SessionLog(status=proto.event_pb2.SessionLog.START))

    def add_scalar(self, name: str, value: float, step: int) -> None:
        """Adds a figure of a step."""
        self._add(step, summary=summary.scalar(name, value))

    def add_image(self, name: str, image: np.ndarray, step: int) -> None:
        """Adds an (H, W, 3) uint8 image of a step."""
        self._add(step, summary=summary.image(name, image, dataformats="HWC"))

    def flush(self) -> None:
        """Makes sure that all is on disk."""
        self._writer.flush()
        self._flushed = time.monotonic()

    def close(self) -> None:
        """Flushes and closes the file, which is closed in any case."""
        try:
            self._writer.flush()
        finally:
            self._writer.close()

    def _add(self, step: int, **content: object) -> None:
        event = proto.event_pb2.Event(step=step, wall_time=time.time(), **content)
        self._writer.write(event.SerializeToString())
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()
