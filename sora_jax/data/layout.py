"""Which features of a prepared TFDS data set hold the frames, the caption, the class and the rate of a clip.

Read from the `features.json` that TFDS writes, not through TFDS's feature classes: constructing `Video` imports
TensorFlow, and nothing but names and kinds is needed, since the pictures stay encoded.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
from etils import epath

from sora_jax.array_types import NumpyArray
from sora_jax.data.decode import STILL_FPS
from sora_jax.data.records import label_words, parse_example, picture_size

DEFAULT_FPS = 24.0
"""Frames a second of a video data set that stores no `fps`."""

CAPTION_KEYS = ("caption", "text", "prompt", "description", "title")
"""Text features read as the caption, in this order."""

NAME_KEYS = ("name", "id", "filename", "file_name")
"""Text features read as a clip's name, in this order."""


LABEL_KEY = "label"
"""The class label that is read where a data set has several."""


STATES_KEY, NULL_STATES = "caption_states", "null_caption_states.npy"
"""Feature of a record that holds the token states of its caption, and the file beside the records with those of the
empty caption."""


@dataclasses.dataclass(frozen=True, eq=False)
class StatesLayout:
    """How the token states of captions stand in the records.

    Attributes:
        dtype: that they are stored in.
        null: (m, D), those of the empty caption.
    """

    dtype: np.dtype
    null: NumpyArray

    @classmethod
    def read(cls, directory: str) -> StatesLayout | None:
        """Reads it of the data set in `directory`; None where the records hold no states.

        Raises:
            ValueError: they are no (None, D) tensor of bytes, or those of the empty caption are missing.
        """
        features = _features(directory)
        if STATES_KEY not in features:
            return None
        tensor = features[STATES_KEY].get("tensor", {})
        shape = [int(n) for n in tensor.get("shape", {}).get("dimensions", ())]
        if len(shape) != 2 or shape[0] != -1 or tensor.get("encoding") != "bytes":
            raise ValueError(
                f'{STATES_KEY} of {directory} must be tfds.features.Tensor(shape=(None, D), encoding="bytes"), '
                f"got {features[STATES_KEY]}."
            )
        file = epath.Path(directory) / NULL_STATES
        if not file.exists():
            raise ValueError(f"{directory} holds {STATES_KEY} but not {NULL_STATES}, the states of the empty caption.")
        with file.open("rb") as opened:
            null = np.load(opened)
        if null.ndim != 2 or null.shape[1] != shape[1]:
            raise ValueError(f"{file} must be (tokens, {shape[1]}), got {null.shape}.")
        dtype = np.dtype(tensor["dtype"])
        return cls(dtype, null.astype(dtype))

    def of(self, values: dict[str, Any]) -> NumpyArray:
        """Returns the states (m, D) of a record's values."""
        return np.frombuffer(values[STATES_KEY][0], self.dtype).reshape(-1, self.null.shape[1])


@dataclasses.dataclass(frozen=True)
class RecordLayout:
    """The keys of a record that a clip is read from, None where the data set lacks one.

    Attributes:
        frames: encoded pictures.
        moving: whether `frames` is a video or a sequence of pictures.
        caption: text.
        label: class label; its name is the caption where there is none.
        label_names: of the classes, in the order of their indices; their numbers where TFDS kept no names.
        name, fps, clip_id: as in `sora_jax.data.records.clip_features`.
    """

    frames: str
    moving: bool
    caption: str | None
    label: str | None
    label_names: tuple[str, ...]
    name: str | None
    fps: str | None
    clip_id: str | None

    @classmethod
    def read(cls, directory: str) -> RecordLayout:
        """Reads the layout of the data set in `directory`.

        Raises:
            ValueError: it has no picture or video of 8 bits a channel; the message lists what it has.
        """
        features = _features(directory)
        kinds = {key: _kind(feature) for key, feature in features.items()}
        videos = [key for key, kind in kinds.items() if kind == "Video"]
        images = [key for key, kind in kinds.items() if kind == "Image"]
        if not videos and not images:
            found = ", ".join(f"{key}: {kind}" for key, kind in kinds.items()) or "no dictionary of features"
            raise ValueError(
                f"the data set at {directory} has no 8-bit Image, Video or Sequence(Image) feature; it has {found}."
            )
        texts = [key for key, kind in kinds.items() if kind == "Text"]
        caption = next((key for key in CAPTION_KEYS if key in texts), None)
        classes = [key for key, kind in kinds.items() if kind == "ClassLabel"]
        label = LABEL_KEY if LABEL_KEY in classes else next(iter(classes), None)
        return cls(
            frames=(videos or images)[0],
            moving=bool(videos),
            caption=caption,
            label=label,
            label_names=label_names(directory, label, features[label]) if label else (),
            name=next((key for key in NAME_KEYS if key in texts), None),
            fps="fps" if kinds.get("fps") in ("Tensor", "Scalar") else None,
            clip_id="clip_id" if kinds.get("clip_id") in ("Tensor", "Scalar") else None,
        )

    def row(self, index: int, serialized: bytes) -> dict[str, Any]:
        """Returns the metadata of one record; frames are counted, and of the first one the header is read."""
        values = parse_example(serialized)
        frames = values.get(self.frames, [])
        height, width = picture_size(frames[0]) if frames else (0, 0)
        label = values[self.label][0] if self.label else -1
        label = label if 0 <= label < len(self.label_names) else -1  # TFDS: -1 where a test split has no labels
        name = self.label_names[label] if label >= 0 else ""
        return {
            "clip_ids": values[self.clip_id][0] if self.clip_id else index,
            "name": values[self.name][0].decode(errors="replace") if self.name else str(index),
            "caption": values[self.caption][0].decode() if self.caption else name,
            "fps": values[self.fps][0] if self.fps else DEFAULT_FPS if self.moving else STILL_FPS,
            "num_frames": len(frames),
            "height": height,
            "width": width,
            "labels": label,
        }


def _features(directory: str) -> dict[str, Any]:
    """Returns the features of a data set's records by key."""
    content = json.loads((epath.Path(directory) / "features.json").read_text())
    return content.get("featuresDict", {}).get("features", {})


def _kind(feature: dict[str, Any]) -> str:
    """Returns the name of a feature's class, `Video` also for a sequence of pictures."""
    kind = feature.get("pythonClassName", "").rsplit(".", 1)[-1]
    if kind == "Sequence":
        inner = feature.get("sequence", {}).get("feature", {})
        return "Video" if _kind(inner) == "Image" else "Sequence"
    if kind in ("Image", "Video"):
        dtype = feature.get(kind.lower(), {}).get("dtype", "uint8")
        return kind if dtype == "uint8" else f"{kind} of {dtype}"
    return kind


def label_names(directory: str, label: str, feature: dict[str, Any]) -> tuple[str, ...]:
    """Returns the names of the classes as words, their numbers where TFDS kept no names."""
    path = epath.Path(directory) / f"{label}.labels.txt"
    if not path.exists():
        return tuple(str(i) for i in range(int(feature.get("classLabel", {}).get("numClasses", 0))))
    return tuple(label_words(line) for line in path.read_text().split("\n") if line.strip())
