"""What a run of DiT needs: rows of pixels or of latents, and sample sheets."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import rich.console
from etils import epath
from jax.sharding import Mesh

from sora_jax.array_types import PyTree
from sora_jax.components import Components, ProcessComponent
from sora_jax.data.content import check_content, open_data
from sora_jax.data.identity import data_fingerprints
from sora_jax.evaluation import plots
from sora_jax.families.dit import ClassConditionalConfig
from sora_jax.families.load import load, load_codec
from sora_jax.generation.dit_pipeline import DiTPipeline
from sora_jax.runs import packed


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
        ValueError: no data set at `config.data.path`, or other channels or classes than the model's.
    """

    def __init__(self, config: ClassConditionalConfig, workdir: epath.Path, console: rich.console.Console) -> None:
        del workdir
        self._pipeline: DiTPipeline | None = None
        self.config = packed.without_missing_splits(config, console)
        data = self.config.data
        splits = (data.split, *(data.eval_splits if config.eval_every else ()))
        self.data_fingerprints = functools.partial(data_fingerprints, data, splits)
        content = open_data(data)
        check_content(content, data, config.patch)
        self._codec = packed.codec_component(content)
        if len(content.label_names) != config.model.num_classes:
            raise ValueError(
                f"model.num_classes must be the {len(content.label_names)} classes of {content.path}, "
                f"got {config.model.num_classes}."
            )

    def components(self) -> Components:
        """Returns what the model is trained with."""
        return Components(codec=self._codec, process=ProcessComponent(self.config.process.kind))

    def initial_params(self, path: str) -> Callable[[Mesh], PyTree]:
        """Returns what reads the parameters of a run or an exported model of the same kind."""
        return lambda mesh: load(path, mesh, kinds=(self.config.kind,)).params

    def open_batches(self, split: str, training: bool) -> Any:
        """Opens the rows of a split: endless where it is trained on."""
        return packed.open_pipeline(self.config, None, split, training)

    def sample_sheet(self, params: PyTree) -> np.ndarray:
        """Returns a picture of guided samples, a class a row, always of the same noise, (H, W, 3) uint8."""
        c = self.config.sample
        if self._pipeline is None:  # compiles once, and reads the autoencoder
            codec = load_codec(c.vae) if c.vae else None
            self._pipeline = DiTPipeline.of_experiment(self.config, params, codec)
        self._pipeline.params = params
        samples = self._pipeline(
            np.repeat(c.labels, c.columns),
            self.config.seed,
            image_size=tuple(n * stride for n, stride in zip(c.size, self._pipeline.codec.strides[1:], strict=True)),
            num_steps=c.num_steps,
            guidance_scale=c.guidance_scale,
        )
        if samples.shape[-1] not in (1, 3):
            samples = samples[..., :3]
        return plots.image_grid(list(samples.clip(-1, 1).reshape(len(c.labels), c.columns, *samples.shape[1:])))
