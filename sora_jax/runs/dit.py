"""What a run of DiT needs: rows of pixels or of latents, and sample sheets."""

from __future__ import annotations

import numpy as np
import rich.console
from etils import epath

from sora_jax.array_types import PyTree
from sora_jax.evaluation import plots
from sora_jax.families.dit import ClassConditionalConfig
from sora_jax.generation.dit_pipeline import DiTPipeline
from sora_jax.runs import packed


class DiTRun(packed.PackedRun):
    """A run on labelled pictures or latents; see `PackedRun`.

    Raises:
        ValueError: as `PackedRun`, other classes than the model's, or an autoencoder of other latents than the data's.
    """

    config: ClassConditionalConfig

    def __init__(self, config: ClassConditionalConfig, workdir: epath.Path, console: rich.console.Console) -> None:
        super().__init__(config, workdir, console)
        self._pipeline: DiTPipeline | None = None
        self._codec = self.sheet_codec(config.model.in_channels)
        names = self.content.label_names
        if len(names) != config.model.num_classes:
            raise ValueError(
                f"model.num_classes must be the {len(names)} classes of {self.content.path}, "
                f"got {config.model.num_classes}."
            )

    def sample_sheet(self, params: PyTree) -> np.ndarray:
        """Returns a picture of guided samples, a class a row, always of the same noise, (H, W, 3) uint8."""
        c = self.config.sample
        if self._pipeline is None:  # compiles once
            pixels = packed.content_codec(self.content).kind == "identity"
            self._pipeline = DiTPipeline.of_experiment(self.config, params, self._codec, pixels=pixels)
        self._pipeline.params = params
        height, width = (n * stride for n, stride in zip(c.size, self._pipeline.codec.strides[1:], strict=True))
        samples = self._pipeline(
            np.repeat(c.labels, c.columns),
            self.config.seed,
            image_size=(height, width),
            num_steps=c.num_steps,
            guidance_scale=c.guidance_scale,
        )
        if samples.shape[-1] not in (1, 3):
            samples = samples[..., :3]
        return plots.image_grid(list(samples.clip(-1, 1).reshape(len(c.labels), c.columns, *samples.shape[1:])))
