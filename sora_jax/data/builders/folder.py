"""A folder of videos, animations and pictures with a `captions.jsonl`, as a data set.

Each line of `captions.jsonl` is an object with `file` (relative to the folder), `caption`, and optionally `split`.
Files without a line, lines without a file, and files that cannot be read whole are left out and named.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Iterator
from typing import Any

from etils import epath

from sora_jax.data.builders.clip_dataset import ClipDatasetBuilder
from sora_jax.data.builders.parts import CLIP_ID_STRIDE, ClipTask, Encoding
from sora_jax.data.decode import UnreadableClipError, constant_rate, flatten, iterate_animation, iterate_video
from sora_jax.data.records import ClipRecord, picture_size

MANIFEST = "captions.jsonl"
PICTURES = (".webp", ".gif", ".png", ".apng", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
"""Suffixes that Pillow reads; every other file is tried as a video."""

_SPLIT_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")


class ClipFolder(ClipDatasetBuilder, skip_registration=True):
    """A folder of captioned clips."""

    name = "clip_folder"
    DESCRIPTION = "A folder of captioned clips and pictures, stored as single frames."


def read_manifest(path: epath.Path) -> list[dict[str, str]]:
    """Reads `captions.jsonl`.

    Raises:
        ValueError: the file is missing or a line is not as it should be; the message gives its number.
    """
    if not path.is_file():
        raise ValueError(
            f'{path} is missing: write one line a file, such as {{"file": "cat.mp4", "caption": "a cat jumps"}}.'
        )
    entries = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: not JSON: {error}") from error
        _check_entry(entry, f"{path}, line {number}")
        entries.append(entry)
    return entries


def _check_entry(entry: Any, place: str) -> None:
    """Raises ValueError unless a line has the keys it needs, no other, and strings for values."""
    if not isinstance(entry, dict) or not {"file", "caption"} <= set(entry) <= {"file", "caption", "split"}:
        raise ValueError(f"{place}: expected an object with file, caption and perhaps split, got {entry!r}.")
    for key, value in entry.items():
        if not isinstance(value, str) or (key != "caption" and not value):
            raise ValueError(f"{place}: {key} must be a string, got {value!r}.")
    if "split" in entry and not _SPLIT_NAME.fullmatch(entry["split"]):
        raise ValueError(f"{place}: split must be letters, digits and underscores, got {entry['split']!r}.")


def make_tasks(source: str, unseen_share: float = 0.1) -> tuple[list[ClipTask], list[dict[str, str]]]:
    """Lists what is to be encoded.

    Args:
        source: the folder.
        unseen_share: share of the distinct captions (drawn by their text) whose files make the split `unseen`, where
            no line names a split; the others make `train`.

    Returns:
        The tasks and the files left out, as `file` and `reason`.

    Raises:
        ValueError: the folder or its manifest is missing or malformed, or `unseen_share` is out of range.
    """
    if not 0 <= unseen_share < 1:
        raise ValueError(f"unseen_share must be at least 0 and below 1, got {unseen_share}.")
    root = epath.Path(source)
    if not root.is_dir():
        raise ValueError(f"source: {source} is not a directory.")
    entries = read_manifest(root / MANIFEST)
    named = any("split" in entry for entry in entries)
    present = {
        str(path.relative_to(root))
        for path in _files(root)
        if path.name != MANIFEST and not any(part.startswith(".") for part in path.relative_to(root).parts)
    }
    tasks, skipped, seen = [], [], set()
    for entry in entries:
        name = entry["file"].removeprefix("./")
        if name in seen:
            skipped.append({"file": name, "reason": f"duplicate: {MANIFEST} lists it twice"})
        elif name not in present:
            skipped.append({"file": name, "reason": f"missing: {MANIFEST} lists it, the folder does not hold it"})
        else:
            unseen = not named and _draw(entry["caption"]) < unseen_share
            split = entry.get("split", "unseen" if unseen else "train")
            tasks.append(ClipTask(len(tasks), name, str(root / name), entry["caption"], split))
        seen.add(name)
    skipped += [{"file": f, "reason": f"no caption: {MANIFEST} does not list it"} for f in sorted(present - seen)]
    return tasks, skipped


def _files(root: epath.Path) -> Iterator[epath.Path]:
    """Yields the files of a folder and of the folders in it."""
    for path in sorted(root.iterdir()):
        if path.is_dir():
            yield from _files(path)
        else:
            yield path


def _draw(caption: str) -> float:
    """Returns a number in [0, 1) fixed by the caption."""
    return int.from_bytes(hashlib.sha256(caption.encode()).digest()[:8], "big") / 2**64


@dataclasses.dataclass(frozen=True)
class Converter:
    """Reads one file of the folder; a long video gives several clips.

    Attributes:
        clip_frames: most frames of a clip.
    """

    clip_frames: int = 256

    def __post_init__(self) -> None:
        if self.clip_frames < 1:
            raise ValueError(f"clip_frames must be at least 1, got {self.clip_frames}.")

    def __call__(self, task: ClipTask, encoding: Encoding) -> Iterator[ClipRecord]:
        """Yields the clips of a file.

        Raises:
            UnreadableClipError: the file is empty, truncated, or neither a picture nor a video.
        """
        if epath.Path(task.path).stat().length == 0:
            raise UnreadableClipError("is empty")
        if task.path.lower().endswith(PICTURES):
            shown = [(encoding.encode(flatten(frame)), ms) for frame, ms in iterate_animation(task.path)]
            indices, fps = constant_rate([ms for _, ms in shown])
            encoded = [shown[i][0] for i in indices]
        else:
            fps, frames = iterate_video(task.path)
            encoded = [encoding.encode(frame) for frame in frames]
        height, width = picture_size(encoded[0])
        for piece in range(-(-len(encoded) // self.clip_frames)):
            start = piece * self.clip_frames
            part = encoded[start : start + self.clip_frames]
            name = task.name if len(encoded) <= self.clip_frames else f"{task.name}#{start}"
            clip_id = task.file_id * CLIP_ID_STRIDE + piece
            yield ClipRecord(clip_id, name, task.caption, fps, height, width, part)
