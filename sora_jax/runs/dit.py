"""What a run of DiT needs: rows of pixels or of latents, and sample sheets."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import rich.console
from etils import epath
from jax.sharding import Mesh

from sora_jax.array_types import PyTree
from sora_jax.components import CodecComponent, Components, ProcessComponent
from sora_jax.data.identity import data_fingerprints
from sora_jax.data.latents import LatentDataConfig, LatentRows, LatentSource
from sora_jax.data.sources import open_source
from sora_jax.evaluation import plots
from sora_jax.families.dit import ClassConditionalConfig
from sora_jax.families.load import load
from sora_jax.generation.class_conditional import ClassConditionalSampler, LatentDecoder
from sora_jax.runs import packed

HELD_OUT_SEED = 20_221_219  # of the latents of held-out splits


class DiTRun:
    """A run on labelled pictures or latents.

    Args:
        config: of the experiment.
        workdir: of the run.
        console: for messages.

    Attributes:
        config: without the held-out splits that the data set lacks.
        data_fingerprints: returns digests of the splits that are read.

    Raises:
        ValueError: no data set at `config.data.path`, other classes than the model's, or latents of another size.
    """

    def __init__(self, config: ClassConditionalConfig, workdir: epath.Path, console: rich.console.Console) -> None:
        del workdir
        self._sampler: ClassConditionalSampler | None = None
        self.config = packed.without_missing_splits(config, console)
        data = self.config.data
        splits = (data.split, *(data.eval_splits if config.eval_every else ()))
        self.data_fingerprints = functools.partial(data_fingerprints, data, splits)
        latents = isinstance(data, LatentDataConfig)
        source = (LatentSource if latents else open_source)(data.path, data.split)
        self._codec = CodecComponent("identity")
        if latents:
            autoencoder = source.request["autoencoder"]
            self._codec = CodecComponent("image", autoencoder["sha256"], source.scaling_factor)
        if len(source.label_names) != config.model.num_classes:
            raise ValueError(
                f"model.num_classes must be the {len(source.label_names)} classes of {source.path}, "
                f"got {config.model.num_classes}."
            )
        if latents and source.shape[:2] != config.model.image_size:
            raise ValueError(
                f"model.image_size must be that of the latents of {source.path}, {source.shape[:2]}, "
                f"got {config.model.image_size}."
            )

    def components(self) -> Components:
        """Returns what the model is trained with."""
        return Components(codec=self._codec, process=ProcessComponent(self.config.process.kind))

    def initial_params(self, path: str) -> Callable[[Mesh], PyTree]:
        """Returns what reads the parameters of a run or an exported model of the same kind."""
        return lambda mesh: load(path, mesh, kinds=(self.config.kind,)).params

    def open_batches(self, split: str, training: bool) -> Any:
        """Opens the rows of a split: endless where it is trained on."""
        config = self.config
        if not isinstance(config.data, LatentDataConfig):
            return packed.open_pipeline(config, None, split, training)
        return LatentRows(
            LatentSource(config.data.path, split),
            config.patch,
            seed=config.data.seed if training else HELD_OUT_SEED,
            batch_size=config.data.batch_size,
            length=None if training else config.eval_batches,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            num_workers=config.data.num_workers,
        )

    def sample_sheet(self, params: PyTree) -> np.ndarray:
        """Returns a picture of guided samples, a class a row, always of the same noise, (H, W, 3) uint8."""
        c = self.config.sample
        if self._sampler is None:  # compiles once, and reads the autoencoder
            decode = LatentDecoder.from_pretrained(c.vae) if c.vae else None
            self._sampler = ClassConditionalSampler.of_experiment(self.config, params, decode)
        self._sampler.params = params
        samples = self._sampler(
            np.repeat(c.labels, c.columns),
            self.config.seed,
            image_size=c.size,
            num_steps=c.num_steps,
            guidance_scale=c.guidance_scale,
        )
        if samples.shape[-1] not in (1, 3):
            samples = samples[..., :3]
        return plots.image_grid(list(samples.clip(-1, 1).reshape(len(c.labels), c.columns, *samples.shape[1:])))
