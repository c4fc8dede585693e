"""What every prepared clip data set goes through: files are encoded, written as a TFDS data set, counted and described.

`prepare` encodes the files in parts (restartable), copies their records to shards, writes an index and a report beside
them, and renames the directory into place, so that a data set is there whole or not at all. Then the parts go.
"""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
from etils import epath

from sora_jax.data.builders import writer
from sora_jax.data.builders.parts import ClipTask, Convert, Encoding, encode_parts, fingerprint
from sora_jax.data.records import ClipMetadata, clip_features
from sora_jax.data.sources import ClipSource
from sora_jax.files import write_whole

REPORT = "report.json"


class ClipDataset:
    """What is known of a clip data set before its files are; a subclass for each, never an object of one."""

    name: ClassVar[str]
    VERSION: ClassVar[str] = "1.0.0"
    DESCRIPTION: ClassVar[str] = "Captioned clips and stills, stored as single frames."
    LABEL_NAMES: ClassVar[tuple[str, ...]] = ()
    """The classes in order, where the data set has an order of its own; else those of the files are sorted."""


def prepare(
    dataset: type[ClipDataset],
    tasks: Sequence[ClipTask],
    convert: Convert,
    encoding: Encoding,
    output: str,
    num_workers: int = 0,
    skipped: Sequence[dict[str, str]] = (),
    options: Mapping[str, Any] | None = None,
    num_left_out: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Writes a data set under `output`, or returns the report of the same one where it stands there already.

    Args:
        dataset: names the data set.
        tasks: the files to be encoded.
        convert: reads one file.
        encoding: of the frames.
        output: directory that will hold `<name>/<version>`.
        num_workers: processes that decode and encode; 0: this one.
        skipped: files already left out, as `file` and `reason`.
        options: whatever else decides what is written; kept in the report.
        num_left_out: counts of files that the data set leaves out on purpose, by what they are; kept in the report.

    Returns:
        The report: `name`, `path`, `fingerprint` (of the files and arguments), `request` (the arguments), `splits`
        (clips, stills, frames and captions of each), `num_bytes`, the spread of `width`, `height`, `aspect`,
        `num_frames` and `fps`, `labels` (where there are any: the clips of each class by split), `num_left_out`,
        `num_skipped`, `skip_reasons` and `skipped` (each file and why), and `num_converted` (files by what was changed
        in their pictures) and `converted` (each file and change).

    Raises:
        ValueError: no file could be read, a label is none of `LABEL_NAMES`, or `output` holds another data set of this
            name.
        OSError: `output` cannot be written, because its disk is full for example; the same call goes on from there.
    """
    root = epath.Path(output)
    name = dataset.name
    target = root / name / dataset.VERSION
    if num_workers < 0:
        raise ValueError(f"num_workers must be at least 0, got {num_workers}.")
    label_names = dataset.LABEL_NAMES or tuple(sorted({task.label for task in tasks} - {""}))
    if unknown := {task.label for task in tasks} - {"", *label_names}:
        raise ValueError(f"label must be one of {', '.join(label_names)}, got {min(unknown)!r}.")
    request = request_of(encoding, options)
    mark = fingerprint(tasks, {"name": name} | request)
    work = root / f".{name}-{mark}"
    if target.exists() and any(target.iterdir()):
        report = read_report(dataset, output) or {}
        if report.get("fingerprint") != mark:
            raise ValueError(f"output {target} holds another data set already; remove it or name another directory.")
        if work.exists():
            work.rmtree()
        return report
    encoded = encode_parts(tasks, convert, encoding, work / "parts", num_workers, label_names)
    left_out = [*skipped, *(entry for parts in encoded.values() for part in parts for entry in part.skipped)]
    kept = {split: parts for split, parts in encoded.items() if any(map(len, parts))}
    if not kept:
        named = "; ".join(f"{entry['file']}: {entry['reason']}" for entry in left_out[:5])
        work.rmtree()
        if not any(root.iterdir()):
            root.rmdir()
        raise ValueError(f"no clip could be read, nothing was written ({len(left_out)} files skipped: {named}).")
    whole = work / dataset.VERSION
    whole.mkdir(exist_ok=True)
    splits = [writer.write_shards(whole, name, split, parts) for split, parts in kept.items()]
    features = clip_features(encoding.format, label_names)
    writer.write_metadata(whole, name, dataset.VERSION, features, splits, dataset.DESCRIPTION)
    sources = {split: ClipSource(str(whole), split) for split in kept}  # writes the index of each split
    report = {"name": name, "path": str(target), "fingerprint": mark, "request": request}
    report |= describe({split: source.metadata for split, source in sources.items()}, label_names)
    report["num_bytes"] = {split.name: split.num_bytes for split in splits}
    report["num_left_out"] = dict(num_left_out or {})
    report["num_skipped"] = len(left_out)
    report["skip_reasons"] = dict(collections.Counter(entry["reason"].split(":")[0] for entry in left_out))
    report["skipped"] = left_out
    converted = [entry for parts in encoded.values() for part in parts for entry in part.converted]
    report["num_converted"] = dict(collections.Counter(entry["change"] for entry in converted))
    report["converted"] = converted
    write_whole(whole / REPORT, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    target.parent.mkdir(exist_ok=True)
    whole.replace(target)
    work.rmtree()
    return report


def request_of(encoding: Encoding, options: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns the arguments that decide what is written, as they stand in a report.

    Of the encoding, JPEG is the format that goes unnamed, and PNG has no quality.
    """
    chosen = dataclasses.asdict(encoding)
    del chosen["format" if encoding.format == "jpeg" else "quality"]
    return chosen | dict(options or {})


def read_report(dataset: type[ClipDataset], output: str) -> dict[str, Any] | None:
    """Returns the report of the finished data set under `output`, None where there is none."""
    path = epath.Path(output) / dataset.name / dataset.VERSION / REPORT
    return json.loads(path.read_text()) if path.exists() else None


def describe(splits: dict[str, ClipMetadata], label_names: Sequence[str] = ()) -> dict[str, Any]:
    """Returns counts by split and class, and the spread of sizes, aspects, rates and lengths over all of them."""
    counts = {
        split: {
            "num_clips": int((m.num_frames > 1).sum()),
            "num_stills": int((m.num_frames == 1).sum()),
            "num_frames": int(m.num_frames.sum()),
            "num_captions": len(set(m.captions)),
        }
        for split, m in splits.items()
    }

    def spread(values: np.ndarray) -> dict[str, float]:
        points = np.percentile(values, [0, 5, 50, 95, 100])
        return dict(zip(("min", "p5", "median", "p95", "max"), points.round(3).tolist(), strict=True))

    every = {
        field: np.concatenate([getattr(m, field) for m in splits.values()])
        for field in ("num_frames", "height", "width", "fps")
    }
    moving = every["num_frames"] > 1
    report = {"splits": counts, "width": spread(every["width"]), "height": spread(every["height"])}
    report["aspect"] = spread(every["width"] / every["height"])
    if moving.any():
        report["num_frames"] = spread(every["num_frames"][moving])
        report["fps"] = spread(every["fps"][moving])
    if label_names:
        report["labels"] = {
            name: {split: int((m.labels == i).sum()) for split, m in splits.items()}
            for i, name in enumerate(label_names)
        }
    return report
