"""What a run of `SoraTransformer` needs: captions, packed rows and sample sheets."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from typing import Any

import jax
import numpy as np
import rich.console
from etils import epath

from sora_jax.array_types import PyTree
from sora_jax.config import SoraConfig
from sora_jax.parallel.multihost import first_process_first


class SoraSetup:
    """A run on a prepared data set of captioned clips.

    Args:
        config: of the experiment.
        workdir: of the run.
        console: for messages.

    Attributes:
        config: without the held-out splits that the data set lacks.
        sample_sheet: draws the prompts of `config.sample`.

    Raises:
        ValueError: patches that no pixels can be cut into, or no data set at `config.data.path`.
    """

    def __init__(self, config: SoraConfig, workdir: epath.Path, console: rich.console.Console) -> None:
        from sora_jax.data.pipeline import check_channels

        check_channels(config.patch)  # before the captions are encoded, which takes a while
        self.config = without_missing_splits(config, console)
        self.sample_sheet = SampleSheet(self.config)
        # The captions are encoded once all else has been checked.
        self._captions = functools.cache(lambda: caption_table(self.config, workdir, console))

    def open_batches(self, split: str, training: bool) -> Any:
        """Opens the pipeline of a split: endless where it is trained on, else once through and with every caption."""
        from sora_jax.data.pipeline import make_pipeline

        return make_pipeline(
            self.config.data,
            self.config.patch,
            self._captions(),
            split,
            training=training,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    def attention_for(self, mesh: jax.sharding.Mesh) -> Any:
        """Returns the attention kernel that needs a mesh, where the config names one."""
        return attention_for(self.config, mesh)


def caption_table(config: SoraConfig, workdir: epath.Path, console: rich.console.Console) -> Any:
    """Returns the token states of all captions of the config's splits; encodes them once and keeps them.

    The table lies beside the data set, or in the run's directory where that cannot be written. Its name is a digest
    of the captions, the text encoder and `max_caption_tokens`, so none is ever used for another.
    """
    from sora_jax.data.captions import CaptionTable
    from sora_jax.data.sources import find_dataset, open_source
    from sora_jax.models.text.minilm import load_text_encoder

    data = config.data
    dataset = find_dataset(data.path)
    evaluated = data.eval_splits if config.eval_every else ()
    captions = sorted(
        {c for split in (data.split, *evaluated) for c in open_source(data.path, split).metadata.captions}
    )
    encoder = load_text_encoder()
    if encoder.dim != config.model.text_dim:
        raise ValueError(f"model.text_dim must be the text encoder's {encoder.dim}, got {config.model.text_dim}.")
    content = json.dumps([encoder.fingerprint, data.max_caption_tokens, captions])
    name = f"captions-{hashlib.sha256(content.encode()).hexdigest()[:16]}"
    places = (dataset / name, workdir / name)

    def encode(texts: list[str]) -> list[np.ndarray]:
        return encoder.encode(texts, data.max_caption_tokens)

    def find_or_build() -> Any:
        for path in places:
            if path.exists():
                return CaptionTable.load(path)
        console.print(f"encoding {len(captions)} captions", highlight=False)
        try:
            return CaptionTable.build(captions, encode, places[0])
        except PermissionError:
            workdir.mkdir(parents=True, exist_ok=True)
            return CaptionTable.build(captions, encode, places[1])

    return first_process_first(find_or_build)


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


def attention_for(config: SoraConfig, mesh: jax.sharding.Mesh) -> Any:
    """Returns the attention kernel that needs a mesh, where the config names one."""
    if config.model.attention != "splash":
        return None
    from sora_jax.parallel.splash import splash_attention

    return splash_attention(mesh)


def without_missing_splits(config: SoraConfig, console: rich.console.Console) -> SoraConfig:
    """Returns the config without the held-out splits that the data set does not have, and says which these are."""
    from sora_jax.data.sources import split_names

    there = split_names(config.data.path)
    missing = [split for split in config.data.eval_splits if split not in there]
    if missing:
        console.print(f"no held-out loss of {', '.join(missing)}: the data set has {', '.join(there)}", highlight=False)
    kept = tuple(split for split in config.data.eval_splits if split in there)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, eval_splits=kept))
