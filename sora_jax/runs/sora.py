"""What a run of `SoraTransformer` needs: captions, packed rows and sample sheets."""

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
from sora_jax.data.content import RGB, check_content, open_data
from sora_jax.data.identity import data_fingerprints
from sora_jax.families.load import load
from sora_jax.families.sora import SoraConfig
from sora_jax.models.text.minilm import text_encoder_component
from sora_jax.runs import packed


class SoraRun:
    """A run on a prepared data set of captioned clips.

    Args:
        config: of the experiment.
        workdir: of the run.
        console: for messages.

    Attributes:
        config: without the held-out splits that the data set lacks.
        data_fingerprints: returns digests of the splits that are read.
        sample_sheet: draws the prompts of `config.sample`; None for a model of latents.

    Raises:
        ValueError: no data set at `config.data.path`, or one of other channels than the model's patches.
    """

    def __init__(self, config: SoraConfig, workdir: epath.Path, console: rich.console.Console) -> None:
        self.config = packed.without_missing_splits(config, console)
        content = open_data(self.config.data)
        check_content(content, self.config.data, config.patch)
        self._codec = packed.codec_component(content)
        self.sample_sheet = SampleSheet(self.config) if config.patch.channels == RGB else None
        if self.sample_sheet is None and config.sample_every:
            console.print("no sample sheets: they are of pixels, and this model makes latents", highlight=False)
        # The captions are encoded once all else has been checked.
        data = self.config.data
        splits = (data.split, *(data.eval_splits if config.eval_every else ()))
        self._captions = functools.cache(
            lambda: packed.caption_table(data, config.model.text_dim, splits, workdir, console)
        )
        self.data_fingerprints = functools.partial(data_fingerprints, data, splits)

    def components(self) -> Components:
        """Returns what the model is trained with."""
        return Components(
            text_encoder=text_encoder_component(self.config.data.max_caption_tokens),
            codec=self._codec,
            process=ProcessComponent("flow"),
        )

    def initial_params(self, path: str) -> Callable[[Mesh], PyTree]:
        """Returns what reads the parameters of a run or an exported model of the same kind."""
        return lambda mesh: load(path, mesh, kinds=(self.config.kind,)).params

    def open_batches(self, split: str, training: bool) -> Any:
        """Opens the pipeline of a split; see `packed.open_pipeline`."""
        return packed.open_pipeline(self.config, self._captions(), split, training)


class SampleSheet:
    """Draws the clips that `config.sample` asks for as a contact sheet; compiles and reads the text encoder once.

    Args:
        config: of the experiment.
    """

    def __init__(self, config: SoraConfig) -> None:
        self._config = config
        self._pipeline: Any = None

    def __call__(self, params: PyTree) -> np.ndarray:
        """Returns (H, W, 3) uint8: a row a prompt, its frames from left to right."""
        from sora_jax.generation.pipeline import SoraPipeline
        from sora_jax.generation.video_io import contact_sheet
        from sora_jax.models.text.minilm import load_text_encoder

        if self._pipeline is None:
            self._pipeline = SoraPipeline(self._config, params, load_text_encoder())
        self._pipeline.params = params
        prompts = self._config.sample.prompts
        return contact_sheet(self._pipeline(prompts), prompts)
