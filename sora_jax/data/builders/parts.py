"""Encodes clips in parts, each of which is finished or absent, so that an interrupted preparation goes on.

What is wrong with one file is that file's: it is left out and named. What is wrong with the output or the system (a
full disk, too many open files) stops the preparation, and the parts that are finished stay.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import errno
import hashlib
import io
import json
import multiprocessing
import os
import signal
import stat
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Literal

from etils import epath
from PIL import Image
from tqdm import tqdm

from sora_jax.data.builders.listing import printable
from sora_jax.data.builders.writer import Part, is_finished, naming_output, serialize, write_part
from sora_jax.data.decode import UnreadableClipError
from sora_jax.data.records import ClipRecord, check_record, clip_features, to_example

PART_SIZE = 32
"""Files of a part: what is done again, at most, by each process after an interruption."""

CLIP_ID_STRIDE = 100_000
"""Room for the clips of one file in its clip ids."""

_SPOOLED_BYTES = 64 << 20  # records of one file that are held in memory until the file has been read whole
_OF_THE_SYSTEM = (errno.ENOSPC, errno.EDQUOT, errno.EMFILE, errno.ENFILE)  # errors that are no fault of the file


@dataclasses.dataclass(frozen=True)
class Encoding:
    """How frames are stored.

    Attributes:
        max_side: longer frames are made smaller, keeping their aspect; none is enlarged.
        quality: of JPEG pictures, 1 to 100, without chroma subsampling; PNG has none.
        format: `jpeg`, or `png`, which keeps every pixel of a frame that is not made smaller.
    """

    max_side: int = 128
    quality: int = 92
    format: Literal["jpeg", "png"] = "jpeg"

    def __post_init__(self) -> None:
        if self.max_side < 1:
            raise ValueError(f"max_side must be at least 1, got {self.max_side}.")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality must be between 1 and 100, got {self.quality}.")
        if self.format not in ("jpeg", "png"):
            raise ValueError(f"format must be jpeg or png, got {self.format!r}.")

    def encode(self, frame: Image.Image) -> bytes:
        """Returns an RGB picture in `format`, its long side at most `max_side`."""
        width, height = self.stored_size(*frame.size)
        if frame.size != (width, height):
            frame = frame.resize((width, height), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        if self.format == "png":
            frame.save(buffer, "PNG")
        else:
            frame.save(buffer, "JPEG", quality=self.quality, subsampling=0)
        return buffer.getvalue()

    def stored_size(self, width: int, height: int) -> tuple[int, int]:
        """Returns the (width, height) that a frame of this size is stored at."""
        scale = min(1.0, self.max_side / max(width, height))
        return max(1, round(width * scale)), max(1, round(height * scale))


@dataclasses.dataclass(frozen=True, slots=True)
class ClipTask:
    """One file to be encoded.

    Attributes:
        file_id: number of the file in the data set; its clips take ids `file_id * CLIP_ID_STRIDE + piece`.
        name: of the file, relative to its source.
        path: of the file.
        caption: of every clip in it.
        split: that its clips belong to.
        label: name of the class of every clip in it; empty: none.
    """

    file_id: int
    name: str
    path: str
    caption: str
    split: str
    label: str = ""


Convert = Callable[[ClipTask, Encoding], Iterator[ClipRecord]]
"""Reads one file and yields its clips, without their label; picklable, raises `UnreadableClipError`."""


def fingerprint(tasks: Sequence[ClipTask], request: Mapping[str, Any]) -> str:
    """Returns a digest of what a preparation would write: its arguments, each file's state, caption, split, label."""
    digest = hashlib.sha256(json.dumps([dict(request), PART_SIZE], sort_keys=True).encode())
    for task in tasks:
        try:
            found = os.stat(task.path)  # local, as decoders need it; epath's fails where no account has the owner
            size, time = found.st_size, int(found.st_mtime)
        except OSError:
            size = time = None  # left out and named when its turn comes
        label = [task.label] if task.label else []
        state = [task.name, size, time, task.caption, task.split, *label]
        digest.update(json.dumps(state).encode())
    return digest.hexdigest()[:16]


def encode_parts(
    tasks: Sequence[ClipTask],
    convert: Convert,
    encoding: Encoding,
    directory: epath.Path,
    num_workers: int,
    label_names: Sequence[str] = (),
) -> dict[str, list[Part]]:
    """Encodes every file whose part is not finished yet.

    A file at which a worker process dies is read again by a process of its own. If that dies too, the file is left out
    as one that cannot be read, and the others go on.

    Args:
        tasks: the files, in any order.
        convert: reads one file.
        encoding: of the frames.
        directory: of the parts, made where it is missing.
        num_workers: processes; 0: this one, which then ends where a decoder ends its process.
        label_names: of the classes, in the order of their indices; without any no label is written.

    Returns:
        The finished parts of each split, in order.

    Raises:
        ChildProcessError: a worker process died, and not by a file; finished parts stay.
        OSError: a part cannot be written, or there are too many open files; finished parts stay.
    """
    directory.mkdir(parents=True, exist_ok=True)
    splits: dict[str, list[ClipTask]] = {}
    for task in tasks:
        splits.setdefault(task.split, []).append(task)
    parts = {
        split: {
            directory / f"{split}-{i // PART_SIZE:05d}.array_record": members[i : i + PART_SIZE]
            for i in range(0, len(members), PART_SIZE)
        }
        for split, members in splits.items()
    }
    waiting = {p: t for members in parts.values() for p, t in members.items() if not is_finished(p)}
    done = len(tasks) - sum(map(len, waiting.values()))
    job = _Job(convert, encoding, tuple(label_names))
    with tqdm(total=len(tasks), initial=done, desc="encoding", unit="file", delay=1.0) as bar:
        if num_workers == 0:
            for path, members in waiting.items():
                bar.update(job.encode_part(path, members))
        while num_workers and waiting:
            try:
                _encode_in_processes(waiting, job, num_workers, bar)
            except BrokenProcessPool as error:
                deadly = {task.file_id: end for task in _suspects(waiting) if (end := _end_of_reading(task, job))}
                if not deadly:
                    raise ChildProcessError("a worker process died (memory?); fewer num_workers need less.") from error
                job = dataclasses.replace(job, deadly=job.deadly | deadly)
            waiting = {p: t for p, t in waiting.items() if not is_finished(p)}
    return {split: [Part.read(path) for path in members] for split, members in parts.items()}


def _encode_in_processes(
    waiting: Mapping[epath.Path, Sequence[ClipTask]], job: _Job, num_workers: int, bar: tqdm
) -> None:
    # Spawned, not forked: the readers of ArrayRecord and the codecs hold threads.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(num_workers, context, initializer=_end_with_parent) as pool:
        try:
            futures = [pool.submit(job.encode_part, path, members) for path, members in waiting.items()]
            for future in concurrent.futures.as_completed(futures):
                bar.update(future.result())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _end_with_parent() -> None:
    """Lets this worker process end at once when the one that started it is gone, however it died."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _mark_path(path: epath.Path) -> epath.Path:
    """Returns where a part says which file it is at."""
    return path.parent / f"{path.name}.reading"


def _suspects(waiting: Mapping[epath.Path, Sequence[ClipTask]]) -> list[ClipTask]:
    """Returns the files that unfinished parts were at."""
    marked = {path: _mark_path(path) for path in waiting if _mark_path(path).exists()}
    places = {path: mark.read_text() for path, mark in marked.items()}
    return [waiting[path][int(place)] for path, place in places.items() if place]


def _end_of_reading(task: ClipTask, job: _Job) -> str | None:
    """Reads a file in a process of its own, and returns what ended that where it died; else None."""
    process = multiprocessing.get_context("spawn").Process(target=_read_alone, args=(task, job), daemon=True)
    process.start()
    process.join()
    code = process.exitcode
    if code is None or code >= 0:
        return f"exit code {code}" if code else None
    return signal.Signals(-code).name + (": out of memory?" if -code == signal.SIGKILL else "")


def _read_alone(task: ClipTask, job: _Job) -> None:
    _end_with_parent()
    with contextlib.suppress(UnreadableClipError):
        for _ in job.read(task):
            pass


@dataclasses.dataclass(frozen=True)
class _Job:
    """What is done with every file.

    Attributes:
        convert: reads it.
        encoding: of its frames.
        label_names: of the classes; empty: no label is written.
        deadly: files that end the process which reads them, by id, and how it ends.
    """

    convert: Convert
    encoding: Encoding
    label_names: tuple[str, ...]
    deadly: Mapping[int, str] = dataclasses.field(default_factory=dict)

    def encode_part(self, path: epath.Path, tasks: Sequence[ClipTask]) -> int:
        """Writes one part and returns the number of its files."""
        skipped: list[dict[str, str]] = []
        converted: list[dict[str, str]] = []
        mark = _mark_path(path)
        try:
            write_part(path, self._records(path, tasks, skipped, converted), skipped, converted)
        finally:
            mark.unlink(missing_ok=True)
        return len(tasks)

    def _records(
        self,
        path: epath.Path,
        tasks: Sequence[ClipTask],
        skipped: list[dict[str, str]],
        converted: list[dict[str, str]],
    ) -> Iterator[tuple[int, bytes]]:
        """Yields the records of a part; a file that breaks half-way gives none, and is named in `skipped`."""
        for place, task in enumerate(tasks):
            with tempfile.SpooledTemporaryFile(_SPOOLED_BYTES, dir=path.parent) as spool:
                with naming_output(path):
                    _mark_path(path).write_text(str(place))
                clips, changes = [], set()
                try:
                    for clip_id, record, notes in self.read(task):
                        changes.update(notes)
                        with naming_output(path):
                            spool.write(record)
                        clips.append((clip_id, len(record)))
                except UnreadableClipError as error:
                    skipped.append({"file": printable(task.name), "reason": printable(str(error))})
                    continue
                converted += ({"file": printable(task.name), "change": change} for change in sorted(changes))
                with naming_output(path):
                    spool.seek(0)
                for clip_id, size in clips:
                    yield clip_id, spool.read(size)

    def read(self, task: ClipTask) -> Iterator[tuple[int, bytes, tuple[str, ...]]]:
        """Yields the id, the serialised record and the notes of each clip of a file.

        Raises:
            UnreadableClipError: whatever is wrong with the file, with the memory that it takes, or with its records.
            OSError: what is wrong with the system instead.
        """
        if task.file_id in self.deadly:
            raise UnreadableClipError(f"ends the process that decodes it: {self.deadly[task.file_id]}")
        features = clip_features(self.encoding.format, self.label_names)
        label = self.label_names.index(task.label) if task.label else -1
        try:
            _check_file(task.path)
            for record in self.convert(task, self.encoding):
                check_record(record, self.encoding.format)
                if not 0 <= record.clip_id - task.file_id * CLIP_ID_STRIDE < CLIP_ID_STRIDE:
                    raise UnreadableClipError(f"gives more than {CLIP_ID_STRIDE} clips; longer clips make fewer")
                example = to_example(dataclasses.replace(record, label=label), labelled=bool(self.label_names))
                yield record.clip_id, serialize(features, features.encode_example(example)), record.notes
        except MemoryError as error:
            raise UnreadableClipError("needs more memory than there is") from error
        except OSError as error:
            if error.errno in _OF_THE_SYSTEM:
                raise
            raise UnreadableClipError(f"cannot be read: {error.strerror or error}") from error


def _check_file(path: str) -> None:
    """Raises UnreadableClipError unless `path` is a file that can be opened: a pipe would be waited for."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError as error:
        if not os.path.islink(path):
            raise
        raise UnreadableClipError(f"cannot be read: a link to {os.readlink(path)!r}, which does not exist") from error
    if not stat.S_ISREG(mode):
        kinds = {stat.S_ISDIR: "folder", stat.S_ISFIFO: "named pipe", stat.S_ISSOCK: "socket"}
        kind = next((name for is_kind, name in kinds.items() if is_kind(mode)), "device")
        raise UnreadableClipError(f"is no file: a {kind}")
    with open(path, "rb"):  # readers have words of their own for a file that they may not open
        pass
