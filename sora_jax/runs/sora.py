"""What a run of `SoraTransformer` needs: captions, packed rows and sample sheets."""

from __future__ import annotations

from typing import Any

import numpy as np
import rich.console
from etils import epath

from sora_jax.array_types import PyTree
from sora_jax.families.sora import SoraConfig
from sora_jax.models.autoencoder.codec import Codec
from sora_jax.runs import packed


class SoraRun(packed.PackedRun):
    """A run on a prepared data set of captioned clips; see `PackedRun`.

    Attributes:
        sample_sheet: draws the prompts of `config.sample`; None for a model of latents without their autoencoder.

    Raises:
        ValueError: as `PackedRun`, or an autoencoder of other latents than the data's.
    """

    config: SoraConfig

    def __init__(self, config: SoraConfig, workdir: epath.Path, console: rich.console.Console) -> None:
        super().__init__(config, workdir, console)
        codec = self.sheet_codec(config.patch.channels)
        makes_clips = codec is not None or packed.content_codec(self.content).kind == "identity"
        self.sample_sheet = SampleSheet(self.config, codec) if makes_clips else None
        if self.sample_sheet is None and config.sample_every:
            console.print("no sample sheets: this model makes latents; --sample.vae decodes them", highlight=False)


class SampleSheet:
    """Draws the clips that `config.sample` asks for as a contact sheet; compiles and reads the text encoder once.

    Args:
        config: of the experiment.
        codec: decodes what the model makes (None: that is pixels).
    """

    def __init__(self, config: SoraConfig, codec: Codec | None = None) -> None:
        self._config, self._codec = config, codec
        self._pipeline: Any = None

    def __call__(self, params: PyTree) -> np.ndarray:
        """Returns (H, W, 3) uint8: a row a prompt, its frames from left to right."""
        from sora_jax.generation.pipeline import SoraPipeline
        from sora_jax.generation.video_io import contact_sheet
        from sora_jax.models.text.minilm import load_text_encoder

        if self._pipeline is None:
            self._pipeline = SoraPipeline(self._config, params, load_text_encoder(), self._codec)
        self._pipeline.params = params
        prompts = self._config.sample.prompts
        return contact_sheet(self._pipeline(prompts), prompts)
