"""What the suites on the training step share."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import jax
from etils import epath
from rich.console import Console

from sora_jax.data.captions import CaptionTable
from sora_jax.families.sora import SoraConfig
from sora_jax.parallel.attention import kernel_of
from sora_jax.runs.packed import caption_table


def kernel_name(config: SoraConfig) -> str:
    """Returns the name of the attention kernel that a config uses here, with `auto` resolved."""
    return kernel_of(config.model.attention, jax.default_backend(), config.data.row_length)


def with_data(config: SoraConfig, **changes: object) -> SoraConfig:
    """Returns a config with other values of `config.data`."""
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **changes))


def captions_of(config: SoraConfig, workdir: Path) -> CaptionTable:
    """Returns the token states of the data set's captions; see `sora_jax.runs.packed.caption_table`."""
    data = config.data
    splits = (data.split, *(data.eval_splits if config.eval_every else ()))
    return caption_table(data, config.model.text_dim, splits, epath.Path(workdir), Console(stderr=True))


def device_name() -> str:
    """Returns what the suite runs on."""
    device = jax.devices()[0]
    return f"{jax.device_count()} x {device.device_kind} ({device.platform})"
