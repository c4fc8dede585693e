"""By what a run knows its data again: a digest of what a split holds, wherever and in however many files it lies.

A digest covers

- of clips and pictures: identifiers, names, captions, classes, rates, sizes and numbers of frames of all of them; of
  latents: their shape, type and scaling factor; the names of the classes,
- the values of the records, pictures as they are encoded: of all where a split holds at most 256 MiB and 20,000
  records; else of as many as that, and at least 64, evenly spaced from the first to the last.

So what is not noticed is, in a larger split, another picture of the same size in place of one that is not among these.
The cost is that of reading them: about a second on a local disk for each 256 MiB or 20,000 records. The order of a
record's features and the cut into files are left out, so that the same files prepared again are the same data.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from sora_jax.config import BatchConfig
from sora_jax.data.content import LatentContent, PixelContent, has_split, open_content
from sora_jax.data.records import parse_example
from sora_jax.data.sources import find_dataset, open_records, read_record, read_splits, split_spans

MOST_BYTES = 256 << 20  # that are read of a split
MOST_RECORDS, LEAST_RECORDS = 20_000, 64


def data_fingerprints(data: BatchConfig, splits: Sequence[str]) -> dict[str, str]:
    """Returns a digest of each split that is read, whole even where only a part of it is.

    Args:
        data: says where the data set is; examples that are generated have no digest.
        splits: names, or what TFDS makes of names (`train[:100]`, `train+unseen`).

    Returns:
        16 hexadecimal digits by the name of each split; in a mixture, by the number of the part, a stroke and the name.

    Raises:
        ValueError: no such data set or split, or a file of records that is missing or damaged.
    """
    if not hasattr(data, "path"):
        return {}
    if not getattr(data, "mixture", ()):
        return _of_one(data.path, splits)
    found = {}
    for number, part in enumerate(data.parts):
        own = [part.split or split if split == data.split else split for split in splits]
        there = [split for split in own if has_split(part.path, split)]
        found |= {f"{number}/{split}": value for split, value in _of_one(part.path, there).items()}
    return found


def _of_one(path: str, splits: Sequence[str]) -> dict[str, str]:
    """Returns a digest of each split of a data set."""
    directory = str(find_dataset(path))
    known = read_splits(directory)
    names = dict.fromkeys(name for split in splits for name, _, _ in split_spans(known, split, directory))
    return {name: _fingerprint(open_content(directory, name), known[name]) for name in names}


def _fingerprint(content: PixelContent | LatentContent, info: Any) -> str:
    """Returns the digest of a whole split."""
    facts: dict[str, Any] = {"num_records": info.num_examples, "contents": _contents(info)}
    facts |= {"labels": list(content.label_names), **content.facts()}
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _contents(info: Any) -> str:
    """Returns a digest of the values of a split's records, or of some of them where there are many."""
    count, files = info.num_examples, info.file_instructions if info.num_examples else ()
    wanted = int(MOST_BYTES * count / max(info.num_bytes, 1))
    number = min(count, max(min(wanted, MOST_RECORDS), LEAST_RECORDS))
    records = open_records(files) if number else ()
    digest = hashlib.sha256()
    for index in np.linspace(0, count - 1, number).round().astype(np.int64).tolist():
        for key, values in sorted(parse_example(read_record(records, files, index)).items()):
            parts = [value if isinstance(value, bytes) else repr(value).encode() for value in values]
            digest.update(json.dumps([key, list(map(len, parts))]).encode())
            for part in parts:
                digest.update(part)
    return digest.hexdigest()
