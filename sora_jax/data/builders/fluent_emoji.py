"""The default data set: Microsoft's animated Fluent Emoji, captioned by their names.

The npm packages `@lobehub/fluent-emoji-anim-1` ... `-4` (MIT) hold one WebP a code-point sequence, 256x256 with
alpha; PyPI's `emoji` names every sequence in English. Each clip is cropped to what it ever covers and laid over
white. Files of one frame become stills.

Splits go by meaning. Skin tones and genders of one emoji share a *base*. `unseen` holds every clip of some bases.
`compositional` holds, of some bases that move in all five skin tones and both genders, a man in one skin tone and
a woman in another, while the other combinations are trained on: it asks whether a caption composes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import emoji
import numpy as np
from etils import epath
from PIL import Image

from sora_jax.data.builders.clip_dataset import ClipDataset
from sora_jax.data.builders.parts import CLIP_ID_STRIDE, ClipTask, Encoding
from sora_jax.data.decode import WHITE, UnreadableClipError
from sora_jax.data.pictures import decode_animation
from sora_jax.data.records import ClipRecord

PACKAGES = {f"@lobehub/fluent-emoji-anim-{i}": "1.0.0" for i in range(1, 5)}
TONES = ("light", "medium-light", "medium", "medium-dark", "dark")

UNSEEN_SHARE = 0.05
COMPOSITIONAL_SHARE = 0.5
_ALPHA_THRESHOLD = 8  # fainter pixels do not widen the crop

_TONE = re.compile(r"\b(?:medium-light|medium-dark|light|medium|dark) skin tone\b")
_GENDER_WORDS = {"man", "woman", "person", "men", "women", "people", "and", "male", "female"}
_SAME_MEANING = {
    "boy": "child",
    "girl": "child",
    "old man": "older person",
    "old woman": "older person",
    "prince": "crowned",
    "princess": "crowned",
    "person with crown": "crowned",
    "Santa Claus": "Claus",
    "Mrs. Claus": "Claus",
    "Mx Claus": "Claus",
    "mermaid": "merperson",
    "merman": "merperson",
    "men’s room": "toilet sign",
    "women’s room": "toilet sign",
}


class FluentEmoji(ClipDataset):
    """Animated Fluent Emoji with their names."""

    name = "fluent_emoji"
    DESCRIPTION = "Animated Fluent Emoji (Microsoft, MIT) with their English names, cropped, over white."


@dataclasses.dataclass(frozen=True)
class EmojiFile:
    """One file of the packages.

    Attributes:
        name: package and file.
        path: of the file.
        caption: the emoji's English name.
        base: what its skin tones and genders share.
        tone: skin tone, None where there is none or several.
        gender: `man` or `woman`, None where the name says neither or both.
        animated: whether it has more than one frame.
    """

    name: str
    path: str
    caption: str
    base: str
    tone: str | None
    gender: str | None
    animated: bool


def emoji_names() -> dict[str, str]:
    """Returns the English name of every emoji by its `code`."""
    return {
        code(ord(character) for character in sequence): data["en"].strip(":").replace("_", " ")
        for sequence, data in emoji.EMOJI_DATA.items()
    }


def code(points: Iterable[int]) -> str:
    """Returns code points in hexadecimal, joined by "-", without what changes the presentation only.

    The variation selector (fe0f) and the end of a tag sequence (e007f) are left out: file names lack them at times.
    """
    return "-".join(f"{point:x}" for point in points if point not in (0xFE0F, 0xE007F))


def code_of_file(stem: str) -> str | None:
    """Returns the `code` that a file name such as `1f468-1f3fd-200d-1f3a8` stands for, None where it is not one."""
    try:
        return code(int(part, 16) for part in re.split("[-_]", stem))
    except ValueError:
        return None


def base_of(caption: str) -> tuple[str, str | None, str | None]:
    """Splits an emoji's name into (base, skin tone, gender).

    The base is the same for all skin tones and genders of one emoji: "woman artist dark skin tone" and
    "man artist" give "artist"; plain people ("man", "woman medium skin tone") give "person".
    """
    tones = _TONE.findall(caption)
    plain = " ".join(_TONE.sub(" ", caption).replace(":", " ").replace(",", " ").split())
    words = plain.split()
    genders = {"man": "man", "woman": "woman", "men": "man", "women": "woman"}
    found = {genders[word] for word in words if word in genders}
    if plain in ("boy", "girl", "prince", "princess", "mermaid", "merman"):
        found = {"man" if plain in ("boy", "prince", "merman") else "woman"}
    if words and words[0] == "family":
        base = "family"
    elif plain in _SAME_MEANING:
        base = _SAME_MEANING[plain]
    else:
        base = " ".join(word for word in words if word not in _GENDER_WORDS) or "person"
    tone = tones[0].removesuffix(" skin tone") if len(set(tones)) == 1 else None
    return base, tone, found.pop() if len(found) == 1 else None


def list_files(packages: Mapping[str, epath.Path]) -> tuple[list[EmojiFile], list[dict[str, str]]]:
    """Lists the files of packages by their short names, each emoji once, and those left out with the reason."""
    names, files, skipped = emoji_names(), {}, []
    for short_name, package in packages.items():
        for path in sorted((package / "assets").glob("*.webp")):
            name = f"{short_name}/{path.name}"
            key = code_of_file(path.stem)
            if key not in names:
                skipped.append({"file": name, "reason": "no caption: PyPI's emoji does not name these code points"})
            elif key in files:
                skipped.append({"file": name, "reason": f"duplicate: the same emoji as {files[key].name}"})
            else:
                files[key] = EmojiFile(name, str(path), names[key], *base_of(names[key]), _is_animated(path))
    return list(files.values()), skipped


def _is_animated(path: epath.Path) -> bool:
    """Whether a WebP's header says that it is animated; nothing is decoded and nothing else is checked."""
    with path.open("rb") as file:
        header = file.read(21)
    return header[12:16] == b"VP8X" and bool(header[20] & 0x02)


def assign_splits(files: Sequence[EmojiFile]) -> list[str]:
    """Returns the split of each file; depends on names alone, never on order or chance."""
    bases = {file.base for file in files}
    unseen = {base for base in bases if draw("unseen", base) < UNSEEN_SHARE}
    combinations: dict[str, set[tuple[str, str]]] = {}
    for file in files:
        if file.animated and file.tone and file.gender and file.base not in unseen:
            combinations.setdefault(file.base, set()).add((file.tone, file.gender))
    held_out = set()
    for base, present in combinations.items():
        if len(present) == 2 * len(TONES) and draw("compositional", base) < COMPOSITIONAL_SHARE:
            # One of each gender, in two tones: so every tone and gender is still trained on with this base.
            tones = sorted(TONES, key=lambda tone: draw(base, tone))
            held_out |= {(base, tone, gender) for tone, gender in zip(tones, ("man", "woman"), strict=False)}

    def split(file: EmojiFile) -> str:
        if file.base in unseen:
            return "unseen"
        return "compositional" if (file.base, file.tone, file.gender) in held_out else "train"

    return [split(file) for file in files]


def draw(*parts: str) -> float:
    """Returns a number in [0, 1) fixed by the strings."""
    digest = hashlib.sha256("\0".join(("fluent_emoji", *parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def make_tasks(
    packages: Sequence[epath.Path], limit: int | None = None, stills: bool = True
) -> tuple[list[ClipTask], list[dict[str, str]]]:
    """Lists what is to be encoded.

    Args:
        packages: unpacked.
        limit: only so many files, spread evenly over the packages (None: all).
        stills: whether files of a single frame are taken.

    Returns:
        The tasks and the files left out, as `file` and `reason`.
    """
    files, skipped = list_files({f"anim-{i}": package for i, package in enumerate(packages, 1)})
    tasks = [
        ClipTask(i, file.name, file.path, file.caption, split)
        for i, (file, split) in enumerate(zip(files, assign_splits(files), strict=True))
        if stills or file.animated
    ]
    if limit is not None and limit < len(tasks):
        tasks = [tasks[i] for i in np.linspace(0, len(tasks) - 1, limit).round().astype(int)]
    return tasks, skipped


def convert(task: ClipTask, encoding: Encoding) -> Iterator[ClipRecord]:
    """Reads one file: crops it to the union of its alpha boxes over time and lays it over white.

    Raises:
        UnreadableClipError: the file cannot be decoded, or nothing in it is ever visible.
    """
    frames, fps = decode_animation(task.path)
    left, top, right, bottom = alpha_box(frames)
    encoded = []
    for frame in frames:
        canvas = Image.new("RGB", (right - left, bottom - top), WHITE)
        part = frame.crop((left, top, right, bottom))
        canvas.paste(part, mask=part.getchannel("A"))
        encoded.append(encoding.encode(canvas))
    width, height = encoding.stored_size(right - left, bottom - top)
    yield ClipRecord(task.file_id * CLIP_ID_STRIDE, task.name, task.caption, fps, height, width, encoded)


def alpha_box(frames: Sequence[Image.Image]) -> tuple[int, int, int, int]:
    """Returns (left, top, right, bottom) of what RGBA frames of one size ever cover.

    Raises:
        UnreadableClipError: they are transparent throughout.
    """
    alpha = np.maximum.reduce([np.asarray(frame.getchannel("A")) for frame in frames])
    rows, columns = np.nonzero(alpha >= _ALPHA_THRESHOLD)
    if not rows.size:
        raise UnreadableClipError("is transparent throughout")
    return int(columns.min()), int(rows.min()), int(columns.max()) + 1, int(rows.max()) + 1
