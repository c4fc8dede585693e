"""Batches of examples of one shape, for experiments without clips: generated ones, or images held in memory."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from sora_jax.array_types import Float
from sora_jax.config import BatchConfig
from sora_jax.data.dead_leaves import DeadLeavesConfig, dead_leaves
from sora_jax.data.images import StillsConfig, load_images
from sora_jax.data.toy import HeartbeatConfig, SwissRollConfig, heartbeat, swiss_roll

Draw = Callable[[np.random.Generator, int], np.ndarray]  # (generator, count) -> (count, ...) float32
TRAIN = "train"


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


def example_source(config: BatchConfig, split: str) -> Draw:
    """Returns what draws the examples of a split.

    The roll and the heartbeat are drawn afresh, images from those of the split with replacement.

    Raises:
        ValueError: a data set that has no such split or no such stills.
    """
    if isinstance(config, SwissRollConfig):
        return lambda rng, count: swiss_roll(rng, count, config.noise)
    if isinstance(config, HeartbeatConfig):
        return heartbeat
    if not isinstance(config, DeadLeavesConfig | StillsConfig):
        raise TypeError(f"no examples for data of type {type(config).__name__}.")
    images = example_images(config, split)
    return lambda rng, count: images[rng.integers(len(images), size=count)]


@functools.lru_cache(maxsize=4)
def example_images(
    config: DeadLeavesConfig | StillsConfig, split: str, count: int | None = None
) -> Float[np.ndarray, "images size size channels"]:
    """Returns the images of a split, float32, each time the same array.

    Args:
        config: of the data.
        split: its name; of dead leaves any other than `train` is another set of images.
        count: of dead leaves (default: `num_images`); of stills, the first so many.
    """
    if isinstance(config, DeadLeavesConfig):
        rng = np.random.default_rng((config.image_seed, *split.encode()))
        count = config.num_images if count is None else count
        return dead_leaves(rng, count, config.size, radii=config.radii, noise=config.pixel_noise)
    images, _ = load_images(config.path, split, config.size, config.channels)
    return images[:count].astype(np.float32) / 127.5 - 1
