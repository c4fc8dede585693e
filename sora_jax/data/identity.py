"""By what a run knows its data again: a digest of what a split holds, wherever it lies.

A digest covers

- the number of records and the bytes of each file, in the order of the files (not their names, dates or place),
- of clips and pictures: identifiers, names, captions, classes, rates, sizes and numbers of frames of all of them; of
  latents: their shape, type and scaling factor; the names of the classes,
- the records themselves: all bytes where the files of a split hold at most 256 MiB together; else at least three blocks
  of 64 KiB of each file (its first, its last and some evenly between) and about a thousand in all.

So what is not noticed is another picture in a larger data set whose encoded form has the length of the one that it
replaces, outside of all blocks. The cost is that of reading what is covered: below a second on a local disk for each
256 MiB, and for a split of 1,024 files 192 MiB in 3,072 places.
"""

from __future__ import annotations

import concurrent.futures
import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from sora_jax.config import BatchConfig
from sora_jax.data.latents import LatentDataConfig, LatentSource
from sora_jax.data.sources import ClipSource, find_dataset, read_splits, split_spans

READ_WHOLE = 256 << 20  # bytes of a split
BLOCK = 64 << 10  # bytes
NUM_BLOCKS, LEAST_BLOCKS = 1024, 3  # of a split, and of each of its files
READERS = 8  # files at a time: most of the time of an object store is waiting


def data_fingerprints(data: BatchConfig, splits: Sequence[str]) -> dict[str, str]:
    """Returns a digest of each split that is read, whole even where only a part of it is.

    Args:
        data: says where the data set is; examples that are generated have no digest.
        splits: names, or what TFDS makes of names (`train[:100]`, `train+unseen`).

    Returns:
        16 hexadecimal digits by the name of each split.

    Raises:
        ValueError: no such data set or split, or a file of records that is missing.
    """
    if not hasattr(data, "path"):
        return {}
    directory = str(find_dataset(data.path))
    known = read_splits(directory)
    names = dict.fromkeys(name for split in splits for name, _, _ in split_spans(known, split, directory))
    kind = LatentSource if isinstance(data, LatentDataConfig) else ClipSource
    return {name: _fingerprint(kind(directory, name), known[name]) for name in names}


def _fingerprint(source: ClipSource | LatentSource, info: Any) -> str:
    """Returns the digest of a whole split."""
    files = [epath.Path(file.filename) for file in info.file_instructions]
    try:
        sizes = [file.stat().length for file in files]
        contents = _contents(files, sizes)
    except FileNotFoundError as error:
        raise ValueError(f"{error.filename} is missing, prepare the data set again.") from error
    facts = {"lengths": [file.take for file in info.file_instructions], "sizes": sizes, "contents": contents}
    facts["labels"] = list(source.label_names)
    if isinstance(source, LatentSource):
        facts |= {"shape": [source.views, *source.shape], "scaling_factor": source.scaling_factor}
        facts["dtype"] = source.request["dtype"]
    else:
        meta = source.metadata
        facts |= {"captions": meta.captions, "names": meta.names, "fps": meta.fps.astype(float).tolist()}
        for name in ("clip_ids", "num_frames", "height", "width", "labels"):
            facts[f"clip_{name}"] = getattr(meta, name).tolist()
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def _contents(files: Sequence[epath.Path], sizes: Sequence[int]) -> list[str]:
    """Returns a digest of the bytes of each file, or of blocks of them where there are many."""
    whole = sum(sizes) <= READ_WHOLE
    num_blocks = max(NUM_BLOCKS // max(len(files), 1), LEAST_BLOCKS)

    def digest(file: epath.Path, size: int) -> str:
        hashed = hashlib.sha256()
        with file.open("rb") as stream:
            if whole or size <= num_blocks * BLOCK:
                while block := stream.read(BLOCK):
                    hashed.update(block)
            else:
                for place in np.linspace(0, size - BLOCK, num_blocks).astype(np.int64).tolist():
                    stream.seek(place)
                    hashed.update(stream.read(BLOCK))
        return hashed.hexdigest()

    with concurrent.futures.ThreadPoolExecutor(READERS) as pool:
        return list(pool.map(digest, files, sizes))
