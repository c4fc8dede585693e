"""What the trainer knows of what it trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import jax

from sora_jax.array_types import Array, Float, Int, PyTree
from sora_jax.config import ExperimentConfig

Metrics = dict[str, Array]


class Loss(NamedTuple):
    """A loss that can be summed over batches: the mean of many is the sum of `total` by that of `weight`.

    Attributes:
        total: () float32, the batch's mean times `weight`.
        weight: () float32, what the mean is over: a number of examples, tokens or clips.
        counts: () float32 each, what a batch's work is measured by; summed over accumulated batches.
    """

    total: Float[Array, ""]
    weight: Float[Array, ""]
    counts: Metrics


class Task(Protocol):
    """A model, its loss and its batches: all that differs between one run and another.

    Attributes:
        config: of the experiment.
    """

    config: ExperimentConfig

    def init_params(self, key: jax.Array) -> PyTree:
        """Returns freshly drawn parameters, boxed with their logical axes; may be traced for their shapes alone."""

    def abstract_batch(self, num_rows: int | None = None) -> PyTree:
        """Returns the shapes and dtypes of a batch, of `num_rows` rows instead of the configured ones."""

    def loss(self, params: PyTree, batch: PyTree, rows: Int[Array, " rows"], key: jax.Array, training: bool) -> Loss:
        """Returns the loss of a batch.

        Args:
            params: of the model, float32.
            batch: leaves (B, ...).
            rows: number of each row among all of an update, (B,) int32. What a row draws depends on its number and
                on `key`, so that neither devices nor accumulation change it.
            key: of this update's (or this held-out batch's) draws.
            training: with dropout.
        """

    def rates(self, totals: Mapping[str, float], seconds: float, num_batches: int) -> dict[str, float]:
        """Returns how fast an interval's work was done; `model_flops_per_second` where the useful ones are known.

        Args:
            totals: the interval's sums of `Loss.counts`.
            seconds: that it took.
            num_batches: batches in it.
        """
