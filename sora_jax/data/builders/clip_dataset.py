"""The TFDS builder that every prepared clip data set is written by, and the steps around it.

`prepare` encodes the files in parts (restartable), lets TFDS write them as ArrayRecord (TensorFlow is not needed),
adds an index beside the records and a report, and removes the parts.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from array_record.python import array_record_data_source
from etils import epath

from sora_jax.data.builders.parts import ClipTask, Convert, Encoding, encode_parts, fingerprint, skipped_files
from sora_jax.data.records import (
    ClipMetadata,
    clip_features,
    from_example,
    to_example,
    write_atomically,
)
from sora_jax.data.sources import ClipSource

REPORT = "report.json"


class ClipDatasetBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Writes encoded parts as a TFDS data set; a subclass gives the name and the description.

    Args:
        parts: the finished parts of each split (None: the data set is only read).
        picture_format: of the frames in them, `jpeg` or `png`.
        label_names: of the classes, in the order of their indices; empty: the clips have no labels.
        **kwargs: of `tfds.core.GeneratorBasedBuilder`.
    """

    VERSION = tfds.core.Version("1.0.0")
    DESCRIPTION = "Captioned clips and stills, stored as single frames."
    LABEL_NAMES: tuple[str, ...] = ()
    """The classes in order, where the data set has an order of its own; else those of the files are sorted."""

    def __init__(
        self,
        parts: dict[str, list[epath.Path]] | None = None,
        picture_format: str = "jpeg",
        label_names: Sequence[str] = (),
        **kwargs: Any,
    ):
        self._parts = parts or {}
        self._picture_format = picture_format
        self._label_names = tuple(label_names)
        super().__init__(file_format="array_record", **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        features = clip_features(self._picture_format, self._label_names)
        return tfds.core.DatasetInfo(builder=self, description=self.DESCRIPTION, features=features)

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
        del dl_manager
        return {split: self._generate_examples(paths) for split, paths in self._parts.items()}

    def _generate_examples(self, paths: Sequence[epath.Path]) -> Iterator[tuple[int, dict[str, Any]]]:
        for path in paths:
            for serialized in _records(path):
                record = from_example(serialized)
                yield record.clip_id, to_example(record, labelled=bool(self._label_names))


def _records(path: epath.Path) -> Iterator[bytes]:
    """Yields the records of one ArrayRecord file, none of an empty one."""
    with array_record_data_source.ArrayRecordDataSource([str(path)]) as source:
        for i in range(len(source)):
            yield source[i]


def prepare(
    builder_class: type[ClipDatasetBuilder],
    tasks: Sequence[ClipTask],
    convert: Convert,
    encoding: Encoding,
    output: str,
    num_workers: int = 1,
    skipped: Sequence[dict[str, str]] = (),
    options: Mapping[str, Any] | None = None,
    num_left_out: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Writes a data set under `output`, or returns the report of the same one where it stands there already.

    Args:
        builder_class: names the data set.
        tasks: the files to be encoded.
        convert: reads one file.
        encoding: of the frames.
        output: directory that will hold `<name>/<version>`.
        num_workers: processes that decode and encode.
        skipped: files already left out, as `file` and `reason`.
        options: whatever else decides what is written; kept in the report.
        num_left_out: counts of files that the data set leaves out on purpose, by what they are; kept in the report.

    Returns:
        The report: `name`, `path`, `fingerprint`, `request` (the arguments), `splits` (clips, stills, frames and
        captions of each), `num_bytes`, the spread of `width`, `height`, `aspect`, `num_frames` and `fps`,
        `labels` (where there are any: the clips of each class by split), `num_left_out`, and `num_skipped`,
        `skip_reasons` and `skipped` (each file and why).

    Raises:
        ValueError: no file could be read, a label is none of `LABEL_NAMES`, or `output` holds another data set of this
            name.
    """
    root = epath.Path(output)
    name = builder_class.name
    target = root / name / str(builder_class.VERSION)
    if num_workers < 0:
        raise ValueError(f"num_workers must be at least 0, got {num_workers}.")
    label_names = builder_class.LABEL_NAMES or tuple(sorted({task.label for task in tasks} - {""}))
    if unknown := {task.label for task in tasks} - {"", *label_names}:
        raise ValueError(f"label must be one of {', '.join(label_names)}, got {min(unknown)!r}.")
    request = request_of(encoding, options)
    mark = fingerprint(tasks, {"name": name} | request)
    work = root / f".{name}-{mark}"
    if (target / "dataset_info.json").exists():
        report = read_report(builder_class, output) or {}
        if report.get("fingerprint") == mark:
            if work.exists():
                work.rmtree()
            return report
        # TFDS renames the finished records into place before the report is written: then the parts still stand.
        if report or not work.exists():
            raise ValueError(f"output {target} holds another data set already; remove it or name another directory.")
    parts = encode_parts(tasks, convert, encoding, work, num_workers, label_names)
    left_out = [*skipped, *(entry for paths in parts.values() for path in paths for entry in skipped_files(path))]
    kept = {s: paths for s, paths in ((s, [p for p in paths if _count(p)]) for s, paths in parts.items()) if paths}
    if not kept:
        named = "; ".join(f"{entry['file']}: {entry['reason']}" for entry in left_out[:5])
        work.rmtree()
        if not any(root.iterdir()):
            root.rmdir()
        raise ValueError(f"no clip could be read, nothing was written ({len(left_out)} files skipped: {named}).")
    for stale in (root / name).glob("incomplete.*"):
        stale.rmtree()
    builder = builder_class(parts=kept, picture_format=encoding.format, label_names=label_names, data_dir=root)
    with contextlib.redirect_stdout(sys.stderr):  # standard output is for the report
        builder.download_and_prepare(download_dir=work / "downloads")
    sources = {split: ClipSource(str(target), split) for split in kept}  # writes the index of each split
    report = {"name": name, "path": str(target), "fingerprint": mark, "request": request}
    report |= describe({split: source.metadata for split, source in sources.items()}, label_names)
    report["num_bytes"] = {split: int(builder.info.splits[split].num_bytes) for split in kept}
    report["num_left_out"] = dict(num_left_out or {})
    report["num_skipped"] = len(left_out)
    report["skip_reasons"] = dict(collections.Counter(entry["reason"].split(":")[0] for entry in left_out))
    report["skipped"] = left_out
    write_atomically(target / REPORT, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    work.rmtree()
    return report


def request_of(encoding: Encoding, options: Mapping[str, Any] | None) -> dict[str, Any]:
    """Returns the arguments that decide what is written, as they stand in a report.

    Of the encoding, JPEG is the format that goes unnamed, and PNG has no quality.
    """
    chosen = dataclasses.asdict(encoding)
    del chosen["format" if encoding.format == "jpeg" else "quality"]
    return chosen | dict(options or {})


def read_report(builder_class: type[ClipDatasetBuilder], output: str) -> dict[str, Any] | None:
    """Returns the report of the finished data set under `output`, None where there is none."""
    path = epath.Path(output) / builder_class.name / str(builder_class.VERSION) / REPORT
    return json.loads(path.read_text()) if path.exists() else None


def _count(path: epath.Path) -> int:
    """Returns the number of records of a part."""
    with array_record_data_source.ArrayRecordDataSource([str(path)]) as source:
        return len(source)


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
