"""Encodes clips in parts, each of which is finished or absent, so that an interrupted preparation goes on.

A part is one ArrayRecord file of serialised clip records and, written last, a JSON file of what was skipped. A part
whose JSON file exists is not done again. Every process writes under a name of its own, so what a killed one leaves is
in nobody's way; it goes with the parts.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import hashlib
import io
import json
import multiprocessing
import os
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Literal

from array_record.python import array_record_module
from etils import epath
from PIL import Image
from tqdm import tqdm

from sora_jax.data.decode import UnreadableClipError
from sora_jax.data.records import ClipRecord, clip_features, to_example, write_atomically

PART_SIZE = 32
"""Files of a part: what is done again, at most, by each process after an interruption."""

CLIP_ID_STRIDE = 100_000
"""Room for the clips of one file in its clip ids."""


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


@dataclasses.dataclass(frozen=True)
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
        stat = os.stat(task.path)  # local, as decoders need it; epath's fails where no account has the owner's number
        label = [task.label] if task.label else []
        state = [task.name, stat.st_size, int(stat.st_mtime), task.caption, task.split, *label]
        digest.update(json.dumps(state).encode())
    return digest.hexdigest()[:16]


def encode_parts(
    tasks: Sequence[ClipTask],
    convert: Convert,
    encoding: Encoding,
    directory: epath.Path,
    num_workers: int,
    label_names: Sequence[str] = (),
) -> dict[str, list[epath.Path]]:
    """Encodes every file whose part is not finished yet.

    Args:
        tasks: the files, in any order.
        convert: reads one file.
        encoding: of the frames.
        directory: of the parts, made where it is missing.
        num_workers: processes (0 or 1: this one).
        label_names: of the classes, in the order of their indices; without any no label is written.

    Returns:
        The finished ArrayRecord files of each split, in order.

    Raises:
        ChildProcessError: a worker process died; finished parts stay.
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
    waiting = [(p, t) for members in parts.values() for p, t in members.items() if not _report_path(p).exists()]
    done = len(tasks) - sum(len(members) for _, members in waiting)
    with tqdm(total=len(tasks), initial=done, desc="encoding", unit="file", delay=1.0) as bar:
        if num_workers <= 1:
            for path, members in waiting:
                bar.update(_encode_part(path, members, convert, encoding, label_names))
        else:
            # Spawned, not forked: the readers of ArrayRecord and the codecs hold threads.
            context = multiprocessing.get_context("spawn")
            with concurrent.futures.ProcessPoolExecutor(num_workers, context, initializer=_end_with_parent) as pool:
                futures = [pool.submit(_encode_part, p, t, convert, encoding, label_names) for p, t in waiting]
                try:
                    for future in concurrent.futures.as_completed(futures):
                        bar.update(future.result())
                except BrokenProcessPool as error:
                    raise ChildProcessError("a worker process died (memory?); fewer num_workers need less.") from error
                finally:
                    pool.shutdown(wait=False, cancel_futures=True)
    return {split: list(members) for split, members in parts.items()}


def skipped_files(path: epath.Path) -> list[dict[str, str]]:
    """Returns the files that a finished part left out, as `file` and `reason`."""
    return json.loads(_report_path(path).read_text())


def _report_path(path: epath.Path) -> epath.Path:
    return path.parent / f"{path.name}.json"


def _end_with_parent() -> None:
    """Lets this worker process end at once when the one that started it is gone, however it died."""

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _encode_part(
    path: epath.Path, tasks: Sequence[ClipTask], convert: Convert, encoding: Encoding, label_names: Sequence[str]
) -> int:
    """Writes one part and returns the number of its files."""
    features, skipped = clip_features(encoding.format, label_names), []
    temporary = path.parent / f"{path.name}.{uuid.uuid4().hex}.incomplete"
    writer = array_record_module.ArrayRecordWriter(str(temporary), "group_size:1,uncompressed")  # pictures are already
    for task in tasks:
        try:
            # Listed first: a file that breaks half-way leaves none of its clips.
            records = list(convert(task, encoding))
        except UnreadableClipError as error:
            skipped.append({"file": task.name, "reason": str(error)})
            continue
        label = label_names.index(task.label) if task.label else -1
        for record in records:
            example = to_example(dataclasses.replace(record, label=label), labelled=bool(label_names))
            writer.write(features.serialize_example(features.encode_example(example)))
    writer.close()
    temporary.replace(path)
    write_atomically(_report_path(path), json.dumps(skipped))
    return len(tasks)
