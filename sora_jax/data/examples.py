"""Batches of examples of one shape, for experiments without clips: generated ones, or images held in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Literal, Protocol

import numpy as np

from sora_jax.array_types import Float

Draw = Callable[[np.random.Generator, int], np.ndarray]  # (generator, count) -> (count, ...) float32
TRAIN = "train"
Values = Literal["bits", "numbers", "8-bit"]


class ExampleData(Protocol):
    """A config of examples of one shape, which stands with what makes them.

    Attributes:
        values: what they are made of; `8-bit` are such, as numbers in [-1, 1].
        shape: of an example.
    """

    values: ClassVar[Values]

    @property
    def shape(self) -> tuple[int, ...]: ...  # noqa: D102

    def source(self, split: str) -> Draw:
        """Returns what draws the examples of a split; ValueError where there is no such split."""
        ...

    def held_out(self, count: int, seed: int) -> np.ndarray:
        """Returns the examples that a model is scored on, float32; ValueError where there are not so many."""
        ...

    def log_density(self, x: np.ndarray) -> np.ndarray | None:
        """Returns the true log-density of examples, nats; None where it is not known."""
        ...

    def facts(self) -> dict[str, float]:
        """Returns what a report says of the data."""
        ...


class ExampleBatches:
    """Batches that depend on their number and on a seed alone; the number is the place that can be saved.

    Args:
        draw: makes the examples of a batch.
        seed: of all batches.
        batch_size: of the global batch; this host gets its share of it.
        length: batches until the end (None: endless).
        process_index: number of this host.
        process_count: hosts.
    """

    def __init__(
        self,
        draw: Draw,
        seed: int,
        batch_size: int,
        length: int | None = None,
        process_index: int = 0,
        process_count: int = 1,
    ) -> None:
        if batch_size % process_count:
            raise ValueError(f"data.batch_size must be a multiple of the {process_count} hosts, got {batch_size}.")
        self._draw, self._seed, self._batch_size, self._length = draw, seed, batch_size, length
        share = batch_size // process_count
        self._rows = slice(process_index * share, (process_index + 1) * share)
        self._index = 0

    def __iter__(self) -> ExampleBatches:
        """Returns itself."""
        return self

    def __next__(self) -> Float[np.ndarray, " rows *values"]:
        """Returns the next batch, float32."""
        if self._index == self._length:
            raise StopIteration
        rng = np.random.default_rng((self._seed, self._index))
        self._index += 1
        return self._draw(rng, self._batch_size)[self._rows]

    def get_state(self) -> dict[str, Any]:
        """Returns the number of the next batch, which is that of every host."""
        return {"index": self._index}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a place that `get_state` gave."""
        self._index = state["index"]

    def summary(self) -> str:
        """Returns how much was given, in a line."""
        return f"{self._index:,} batches of {self._batch_size:,} examples"

    def close(self) -> None:
        """Does nothing: there is no process to end."""


def from_images(images: Float[np.ndarray, " images *values"]) -> Draw:
    """Returns what draws from some images, with replacement."""
    return lambda rng, count: images[rng.integers(len(images), size=count)]
