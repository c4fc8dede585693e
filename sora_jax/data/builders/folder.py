"""A folder of videos, animations and pictures with a `captions.jsonl`, as a data set.

Each line of `captions.jsonl` is an object with `file` (relative to the folder), `caption`, and optionally `split` and
`label`, the name of the file's class, which every line has or none. Files without a line, lines without a file, lines
that are not as they should be, and files that cannot be read whole are left out and named.

A file is what its content says, whatever its name: a picture or an animation that Pillow reads (HEIC and AVIF too),
which becomes upright and sRGB as `sora_jax.data.pictures` describes, or else a video.
"""

from __future__ import annotations

import codecs
import contextlib
import dataclasses
import hashlib
import itertools
import json
import os
import re
import warnings
from collections.abc import Iterable, Iterator
from typing import Any

from etils import epath
from PIL import Image

from sora_jax.data.builders.clip_dataset import ClipDataset
from sora_jax.data.builders.listing import Folder, printable
from sora_jax.data.builders.parts import CLIP_ID_STRIDE, ClipTask, Encoding
from sora_jax.data.errors import UnreadableClipError
from sora_jax.data.media import open_media
from sora_jax.data.records import ClipRecord, label_words, picture_size
from sora_jax.data.videos import Interlaced

MANIFEST = "captions.jsonl"
_SPLIT_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")


class ClipFolder(ClipDataset):
    """A folder of captioned clips."""

    name = "clip_folder"
    DESCRIPTION = "A folder of captioned clips and pictures, stored as single frames."


def read_manifest(path: epath.Path) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Reads `captions.jsonl`.

    Returns:
        The lines, and those that are not as they should be, as `file` (what the line names, else its number) and
        `reason`.

    Raises:
        ValueError: the file is missing or lists nothing, or some of its lines have a label and others none.
    """
    example = 'write one line a file, such as {"file": "cat.mp4", "caption": "a cat jumps"}.'
    if not path.is_file():
        raise ValueError(f"{path} is missing: {example}")
    entries, skipped, labelled = [], [], {}
    # Bytes, since only these are lines to JSON: text has other separators, which may stand in a caption.
    for number, line in enumerate(path.read_bytes().removeprefix(codecs.BOM_UTF8).split(b"\n"), 1):
        if not line.strip():
            continue
        place, entry = f"{path.name}, line {number}", None
        try:
            entry = json.loads(line.decode("utf-8"))
            _check_entry(entry)
        except UnicodeDecodeError as error:
            skipped.append({"file": place, "reason": f"not UTF-8: byte {error.start} of the line: {error.reason}"})
        except RecursionError:
            skipped.append({"file": place, "reason": "not JSON that can be read: nested too deep"})
        except json.JSONDecodeError as error:
            skipped.append({"file": place, "reason": f"not JSON: {error.msg}, column {error.colno}"})
        except ValueError as error:
            file = entry.get("file") if isinstance(entry, dict) else None
            file = file if isinstance(file, str) and file else place
            skipped.append({"file": printable(file), "reason": f"bad line: {place}: {error}"})
        else:
            entries.append(entry)
            labelled.setdefault("label" in entry, number)
    if not entries and not skipped:
        raise ValueError(f"{path} lists nothing: {example}")
    if len(labelled) == 2:
        raise ValueError(
            f"{path}, line {labelled[False]} has no label, line {labelled[True]} has one; give all or none."
        )
    return entries, skipped


def _check_entry(entry: Any) -> None:
    """Raises ValueError unless a line has the keys it needs, no other, and strings for values."""
    if not isinstance(entry, dict) or not {"file", "caption"} <= set(entry) <= {"file", "caption", "split", "label"}:
        raise ValueError(f"expected an object with file, caption and perhaps split and label, got {entry!r}")
    for key, value in entry.items():
        if not isinstance(value, str) or (key != "caption" and not value):
            raise ValueError(f"{key} must be a string, got {value!r}")
        if any("\ud800" <= character <= "\udfff" for character in value):
            raise ValueError(f"{key} must be whole Unicode characters, got half a pair in {value!r}")
    if "label" in entry and not label_words(entry["label"]):
        raise ValueError(f"label must be the name of a class, got {entry['label']!r}")
    if "split" in entry and not _SPLIT_NAME.fullmatch(entry["split"]):
        raise ValueError(f"split must be letters, digits and underscores, got {entry['split']!r}")


def make_tasks(source: str, unseen_share: float = 0.1) -> tuple[list[ClipTask], list[dict[str, str]]]:
    """Lists what is to be encoded.

    Args:
        source: the folder.
        unseen_share: share of the distinct captions (drawn by their text) whose files make the split `unseen`, where
            no line names a split; the others make `train`, which keeps one caption at least (with a warning).

    Returns:
        The tasks and what is left out (files, and lines of the manifest), as `file` and `reason`.

    Raises:
        ValueError: the folder or its manifest is missing, the manifest is empty or labels some lines only, or
            `unseen_share` is out of range.
    """
    if not 0 <= unseen_share < 1:
        raise ValueError(f"unseen_share must be at least 0 and below 1, got {unseen_share}.")
    if not os.path.isdir(source):
        raise ValueError(f"source: {source} is not a directory of this machine; decoders read local files.")
    entries, skipped = read_manifest(epath.Path(source) / MANIFEST)
    listed = Folder(os.fspath(source))
    named = any("split" in entry for entry in entries)
    tasks, seen, bad = [], set(), set()
    for entry in skipped:  # lines that are not as they should be name their files too
        with contextlib.suppress(ValueError):
            bad.add(listed.find(entry["file"]))
    for entry in entries:
        try:
            name = listed.find(entry["file"])
            if name in seen:
                raise ValueError(f"duplicate: {MANIFEST} lists it twice")
        except ValueError as error:
            skipped.append({"file": printable(entry["file"]), "reason": f"{error}"})
            continue
        seen.add(name)
        unseen = not named and _draw(entry["caption"]) < unseen_share
        split = entry.get("split", "unseen" if unseen else "train")
        label = label_words(entry.get("label", ""))
        tasks.append(ClipTask(len(tasks), name, listed.path(name), entry["caption"], split, label))
    unlisted = sorted(name for name in listed.files - seen - bad if os.path.basename(name) != MANIFEST)
    skipped += [{"file": printable(f), "reason": f"no caption: {MANIFEST} does not list it"} for f in unlisted]
    skipped += listed.skipped
    if tasks and not named and all(task.split == "unseen" for task in tasks):
        kept = max((task.caption for task in tasks), key=_draw)  # which a smaller share would leave in train too
        warnings.warn(f"all captions were drawn for the split unseen; {kept!r} stays in train.", stacklevel=2)
        tasks = [dataclasses.replace(task, split="train") if task.caption == kept else task for task in tasks]
    return tasks, skipped


def _draw(caption: str) -> float:
    """Returns a number in [0, 1) fixed by the caption."""
    return int.from_bytes(hashlib.sha256(caption.encode()).digest()[:8], "big") / 2**64


@dataclasses.dataclass(frozen=True)
class Converter:
    """Reads one file of the folder; a long video gives several clips.

    Attributes:
        clip_frames: most frames of a clip.
        interlaced: what is done with interlaced videos; see `iterate_video`.
    """

    clip_frames: int = 256
    interlaced: Interlaced = "deinterlace"

    def __post_init__(self) -> None:
        if self.clip_frames < 1:
            raise ValueError(f"clip_frames must be at least 1, got {self.clip_frames}.")

    def __call__(self, task: ClipTask, encoding: Encoding) -> Iterator[ClipRecord]:
        """Yields the clips of a file.

        Raises:
            UnreadableClipError: the file is empty, truncated, or neither a picture nor a video.
        """
        notes: set[str] = set()
        fps, frames = open_media(task.path, notes.add, interlaced=self.interlaced)
        size = None
        for start, piece in _pieces(_encode_each(frames, encoding), self.clip_frames):
            height, width = size = size or picture_size(piece[0])
            name = task.name if start is None else f"{task.name}#{start}"
            clip_id = task.file_id * CLIP_ID_STRIDE + (start or 0) // self.clip_frames
            yield ClipRecord(clip_id, name, task.caption, fps, height, width, piece, notes=tuple(sorted(notes)))
        if size is None:
            raise UnreadableClipError("holds no frame")


def _encode_each(frames: Iterable[Image.Image], encoding: Encoding) -> Iterator[bytes]:
    """Encodes frames, one that comes as the same object again only once."""
    shown, data = None, b""
    for frame in frames:
        if frame is not shown:
            shown, data = frame, encoding.encode(frame)
        yield data


def _pieces(frames: Iterable[bytes], most: int) -> Iterator[tuple[int | None, list[bytes]]]:
    """Cuts frames into pieces of at most `most`, two of which are held at a time.

    Yields:
        The number of the first frame, None where there is one piece, and the frames.
    """
    frames = iter(frames)
    piece, start = list(itertools.islice(frames, most)), 0
    while piece:
        following = list(itertools.islice(frames, most))
        yield (start if start or following else None), piece
        start, piece = start + len(piece), following
