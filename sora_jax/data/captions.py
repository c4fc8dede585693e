"""Token states of captions, encoded once per distinct caption and read from a memory-mapped file."""

from __future__ import annotations

import contextlib
import json
import uuid
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from etils import epath

from sora_jax.array_types import NumpyArray

Encode = Callable[[list[str]], Sequence[NumpyArray]]


class CaptionTable:
    """Looks captions up; always holds "", the null caption.

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
        return cls(np.concatenate(encoded).astype(np.float16), spans)

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
        """Returns the token states (m, D) float32 of a caption; ValueError where the table lacks it."""
        start, end = self._span(caption)
        return np.asarray(self._states[start:end], np.float32)

    def lengths(self, captions: Sequence[str]) -> NumpyArray:
        """Returns how many tokens each caption has, int32; ValueError where the table lacks one."""
        return np.array([end - start for start, end in map(self._span, captions)], np.int32)

    def _span(self, caption: str) -> tuple[int, int]:
        if caption not in self._spans:
            raise ValueError(f"the caption table has no caption {caption!r}; build it from this data set.")
        return self._spans[caption]
