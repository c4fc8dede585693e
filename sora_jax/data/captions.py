"""Token states of captions: of a table, encoded once per distinct caption, or of the records of a data set.

They are used in the dtype that they are stored in, float16: an encoder's outputs are rounded once, and the same numbers
train a model and sample from it.
"""

from __future__ import annotations

import collections
import contextlib
import json
import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import numpy as np
from etils import epath

from sora_jax.array_types import TEXT_DTYPE, NumpyArray
from sora_jax.data.records import ClipMetadata

MOST_RECENT = 1024
"""Captions of records whose states are kept: those of classes come again and again."""

Encode = Callable[[list[str]], Sequence[NumpyArray]]


class CaptionStates(Protocol):
    """Looks captions up; always holds "", the null caption.

    Attributes:
        dim: width of a token state, D.
    """

    dim: int

    def lookup(self, caption: str) -> NumpyArray:
        """Returns the token states (m, D) float16 of a caption; ValueError where it has none."""

    def lengths(self, captions: Sequence[str]) -> NumpyArray:
        """Returns how many tokens each caption has, int32; ValueError where one has none."""


class StoredCaptions:
    """`CaptionStates` that stand in the records of a data set.

    Args:
        metadata: of its clips.
        read: returns the states in the record of a clip, (m, D).
        null: (m, D), states of the null caption.
    """

    def __init__(self, metadata: ClipMetadata, read: Callable[[int], NumpyArray], null: NumpyArray) -> None:
        # A caption of several clips has the same states in all of them.
        self._clips = {caption: i for i, caption in reversed(list(enumerate(metadata.captions)))}
        self._tokens, self._read, self._null = metadata.caption_tokens, read, null.astype(TEXT_DTYPE)
        self._recent: collections.OrderedDict[str, NumpyArray] = collections.OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_recent": collections.OrderedDict()}

    @property
    def dim(self) -> int:
        """Width of a token state, D."""
        return self._null.shape[1]

    def lookup(self, caption: str) -> NumpyArray:
        """Returns the token states (m, D) float16 of a caption; ValueError where no record has it."""
        if not caption:
            return self._null
        if caption in self._recent:
            self._recent.move_to_end(caption)
            return self._recent[caption]
        states = self._recent[caption] = self._read(self._clip(caption)).astype(TEXT_DTYPE)
        if len(self._recent) > MOST_RECENT:
            self._recent.popitem(last=False)
        return states

    def lengths(self, captions: Sequence[str]) -> NumpyArray:
        """Returns how many tokens each caption has, int32; ValueError where no record has one."""
        return np.array([self._tokens[self._clip(c)] if c else len(self._null) for c in captions], np.int32)

    def _clip(self, caption: str) -> int:
        if caption not in self._clips:
            raise ValueError(f"no record of the data set has the caption {caption!r}.")
        return self._clips[caption]


class CaptionTable:
    """`CaptionStates` of a file; see `build`.

    Args:
        states: (N, D) float16, the token states of all captions one after the other.
        spans: first and one past the last state of each caption.
    """

    def __init__(self, states: NumpyArray, spans: dict[str, tuple[int, int]], path: str | None = None) -> None:
        self._states, self._spans, self._path = states, spans, path

    @classmethod
    def build(cls, captions: Iterable[str], encode: Encode) -> CaptionTable:
        """Encodes distinct captions, and the null caption.

        Args:
            captions: with repetitions as they come.
            encode: returns an array (m, D) for each caption of a list.
        """
        distinct = sorted({"", *captions})
        encoded = encode(distinct)
        ends = np.cumsum([len(states) for states in encoded])
        spans = {c: (int(end - len(s)), int(end)) for c, s, end in zip(distinct, encoded, ends, strict=True)}
        return cls(np.concatenate(encoded).astype(TEXT_DTYPE), spans)

    def save(self, path: epath.PathLike) -> CaptionTable:
        """Writes the table, whole or not at all, unless another process has done so meanwhile.

        Args:
            path: directory that `load` reads.

        Returns:
            The table as `load` opens it.

        Raises:
            OSError: it cannot be written there.
        """
        path = epath.Path(path)
        temporary = path.parent / f"{path.name}.{uuid.uuid4().hex}.incomplete"
        try:
            temporary.mkdir(parents=True)
            with (temporary / "states.npy").open("wb") as file:
                np.save(file, self._states)
            (temporary / "spans.json").write_text(json.dumps(self._spans))
            if not path.exists():
                temporary.rename(path)
        except OSError:
            if not path.exists():
                raise
        finally:
            with contextlib.suppress(OSError):
                if temporary.exists():
                    temporary.rmtree()
        return CaptionTable.load(path)

    @classmethod
    def load(cls, path: epath.PathLike) -> CaptionTable:
        """Opens a table that `build` wrote; a local one is memory-mapped, so processes share its pages."""
        path = epath.Path(path)
        if not (path / "spans.json").exists():
            raise ValueError(f"no caption table at {path}.")
        states = path / "states.npy"
        try:
            spans = {caption: tuple(span) for caption, span in json.loads((path / "spans.json").read_text()).items()}
            if "://" not in str(states):
                return cls(np.load(states, mmap_mode="r"), spans, str(path))
            with states.open("rb") as file:  # an object store has nothing to map
                return cls(np.load(file), spans, str(path))
        except (ValueError, AttributeError, TypeError, EOFError) as error:
            raise ValueError(
                f"the caption table {path} is damaged ({error}); remove it, and it is made again."
            ) from error

    def __reduce__(self) -> tuple:
        if self._path is not None:
            return CaptionTable.load, (self._path,)
        return CaptionTable, (self._states, self._spans)

    @property
    def dim(self) -> int:
        """Size of a token state, D."""
        return self._states.shape[1]

    def lookup(self, caption: str) -> NumpyArray:
        """Returns the token states (m, D) float16 of a caption; ValueError where the table lacks it."""
        start, end = self._span(caption)
        return np.asarray(self._states[start:end], TEXT_DTYPE)

    def lengths(self, captions: Sequence[str]) -> NumpyArray:
        """Returns how many tokens each caption has, int32; ValueError where the table lacks one."""
        return np.array([end - start for start, end in map(self._span, captions)], np.int32)

    def _span(self, caption: str) -> tuple[int, int]:
        if caption not in self._spans:
            raise ValueError(f"the caption table has no caption {caption!r}; build it from this data set.")
        return self._spans[caption]
