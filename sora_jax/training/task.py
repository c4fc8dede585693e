"""What the trainer knows of what it trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp

from sora_jax.array_types import TEXT_DTYPE, Array, Float, Int, PackedBatch, PyTree
from sora_jax.config import ExperimentConfig, PackedDataConfig

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
    """A model, its loss and its batches: all that differs between one run and another."""

    @property
    def config(self) -> ExperimentConfig:
        """Of the experiment; each family's has its own class."""

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

    def scores(self, totals: Mapping[str, float]) -> dict[str, float]:
        """Returns what the sums of `Loss.counts` say of the model beside its loss, by name: an accuracy, say."""

    def figures(self) -> dict[str, int]:
        """Returns what else a run shows before it trains the model: `num_table_params`, or `forward_macs` of one."""


def packed_batch(data: PackedDataConfig, patch_dim: int, text_dim: int, num_rows: int | None = None) -> PackedBatch:
    """Returns the shapes and dtypes of a batch of packed rows.

    Args:
        data: sizes of the rows.
        patch_dim: P.
        text_dim: D.
        num_rows: instead of those that `data` says.
    """
    shape = jax.ShapeDtypeStruct
    rows = data.batch_size if num_rows is None else num_rows
    length, text, segments, levels = data.row_length, data.text_length, data.max_segments, data.num_levels
    return PackedBatch(
        patches=shape((rows, length, patch_dim), jnp.float32),
        positions=shape((rows, length, 3), jnp.float32),
        segment_ids=shape((rows, length), jnp.int32),
        level_ids=shape((rows, length), jnp.int32),
        level_segments=shape((rows, levels), jnp.int32),
        level_roles=shape((rows, levels), jnp.int32),
        loss_mask=shape((rows, length), jnp.bool_),
        text=shape((rows, text, text_dim), TEXT_DTYPE),
        text_segment_ids=shape((rows, text), jnp.int32),
        clip_ids=shape((rows, segments), jnp.int32),
        labels=shape((rows, segments), jnp.int32),
        extents=shape((rows, segments, 3), jnp.float32),
    )
