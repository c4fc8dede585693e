"""Runs on packed rows of a prepared data set: what they all need, and a run that needs nothing else."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import numpy as np
import rich.console
from etils import epath
from jax.sharding import Mesh

from sora_jax.array_types import PyTree
from sora_jax.components import CodecComponent, Components, ProcessComponent
from sora_jax.config import PackedDataConfig
from sora_jax.data.captions import CaptionTable
from sora_jax.data.content import Content, check_content, open_data
from sora_jax.data.identity import data_fingerprints
from sora_jax.data.pipeline import make_pipeline
from sora_jax.data.sources import find_dataset
from sora_jax.families.load import Description, codec_of, load
from sora_jax.models.autoencoder.codec import ImageCodec
from sora_jax.models.text.minilm import load_text_encoder, text_encoder_component
from sora_jax.parallel.multihost import first_process_first

D = TypeVar("D", bound=PackedDataConfig)


class PackedRun:
    """A run on packed rows, a `sora_jax.runs.run.Run`; families whose runs need more have a subclass.

    Args:
        config: of the experiment; where `data.text_length` is above 0 it has a `text_dim`.
        workdir: of the run.
        console: for messages.

    Attributes:
        config: without the held-out splits that the data set lacks.
        content: of the split that is trained on.
        data_fingerprints: returns digests of the splits that are read.
        sample_sheet: None; a subclass that can draw something has a method of this name.

    Raises:
        ValueError: no data set at `config.data.path`, or one of other channels than the patches.
    """

    sample_sheet: Any = None

    def __init__(self, config: Any, workdir: epath.Path, console: rich.console.Console) -> None:
        self.config = dataclasses.replace(config, data=without_missing_splits(config.data, console))
        self._workdir, self._console = workdir, console
        self.content = open_data(self.config.data)
        check_content(self.content, self.config.data, config.patch)
        self._splits = self.read_splits()
        self.captions = functools.cache(self._read_captions)  # encoded once all else has been checked
        self.data_fingerprints = functools.partial(data_fingerprints, self.config.data, self._splits)

    def read_splits(self) -> tuple[str, ...]:
        """Returns the splits that the run reads."""
        data = self.config.data
        return data.split, *(data.eval_splits if self.config.eval_every else ())

    def _read_captions(self) -> Any:
        """Returns the captions' token states, None where the data leaves the captions out."""
        data = self.config.data
        if not data.text_length:
            return None
        return caption_table(data, self.config.text_dim, self._splits, self._workdir, self._console)

    def components(self) -> Components:
        """Returns what the model is trained with."""
        data, process = self.config.data, self.config.process_kind
        return Components(
            text_encoder=text_encoder_component(data.max_caption_tokens) if data.text_length else None,
            codec=content_codec(self.content),
            process=None if process is None else ProcessComponent(process),
        )

    def sheet_codec(self, channels: int) -> ImageCodec | None:
        """Returns what decodes the latents of sample sheets; None where `sample.vae` names none, or none are drawn.

        Raises:
            FileNotFoundError: there is no autoencoder at `sample.vae`.
            ValueError: it does not decode latents of so many channels, or the data is pixels.
        """
        c = self.config
        if not (c.sample_every and c.sample.vae):
            return None
        here = Description(self._workdir, c.kind, c, Components(codec=content_codec(self.content)))
        return codec_of(here, c.sample.vae, channels)

    def initial_params(self, path: str) -> Callable[[Mesh], PyTree]:
        """Returns what reads the parameters of a run or an exported model of the same kind."""
        return lambda mesh: load(path, mesh, kinds=(self.config.kind,)).params

    def open_batches(self, split: str, training: bool) -> Any:
        """Opens the pipeline of a split; see `open_pipeline`."""
        return open_pipeline(self.config, self.captions(), split, training)


def open_pipeline(config: Any, captions: Any, split: str, training: bool, alone: bool = False) -> Any:
    """Opens the pipeline of a split: endless where it is trained on, else once through and with every caption.

    Each host gets its share of the rows, or all of them where it is `alone`.
    """
    return make_pipeline(
        config.data,
        config.patch,
        captions,
        split,
        training=training,
        process_index=0 if alone else jax.process_index(),
        process_count=1 if alone else jax.process_count(),
    )


def caption_table(
    data: PackedDataConfig, text_dim: int, splits: tuple[str, ...], workdir: epath.Path, console: rich.console.Console
) -> Any:
    """Returns the token states of all captions of some splits; encodes them once and keeps them.

    There is no table where the records of all of them hold the states: None. Else it lies beside the data set (of a
    mixture the first), or in the run's directory where that cannot be written. Its name is a digest of the captions (as
    they stand and as they are read), the text encoder and `max_caption_tokens`, so none is ever used for another.

    Raises:
        ValueError: `text_dim`, the model's, is not the text encoder's, or it reads fewer than `max_caption_tokens`.
        OSError: the table can be written neither beside the data nor in `workdir`.
    """
    contents = [open_data(data, split) for split in splits]
    stored = [content.captions for content in contents if content.captions is not None]
    if len(stored) == len(contents):
        if stored[0].dim != text_dim:
            raise ValueError(
                f"text_dim of the model must be the {stored[0].dim} of the caption states in {contents[0].path}, "
                f"got {text_dim}."
            )
        return None
    dataset = find_dataset(data.parts[0].path)
    captions = sorted({caption for content in contents for caption in content.metadata.captions})
    encoder = load_text_encoder()
    if encoder.dim != text_dim:
        raise ValueError(f"text_dim of the model must be the text encoder's {encoder.dim}, got {text_dim}.")
    read = [encoder.spell_out(caption) for caption in captions]
    content = json.dumps(
        [encoder.fingerprint, data.max_caption_tokens, captions, *([read] if read != captions else [])]
    )
    name = f"captions-{hashlib.sha256(content.encode()).hexdigest()[:16]}"
    places = (dataset / name, workdir / name)

    def encode(texts: list[str]) -> list[np.ndarray]:
        return encoder.encode(texts, data.max_caption_tokens, "--data.max-caption-tokens")

    def find_or_build() -> Any:
        for path in places:
            if path.exists():
                return CaptionTable.load(path)
        console.print(f"encoding {len(captions)} captions", highlight=False)
        table = CaptionTable.build(captions, encode)
        try:
            return table.save(places[0])
        except OSError as error:  # read-only, no permission, a quota, a full disk, an object store that refuses
            reason = error.strerror or error
            notice = f"{dataset} takes no table of captions ({reason}): it is kept in {workdir}"
            console.print(notice, highlight=False, markup=False, soft_wrap=True)
            return table.save(places[1])

    return first_process_first(find_or_build)


def without_missing_splits(data: D, console: rich.console.Console) -> D:
    """Returns the config without the held-out splits that the data set does not have, and says which these are."""
    from sora_jax.data.sources import split_names

    there = dict.fromkeys(name for part in data.parts for name in split_names(part.path))
    missing = [split for split in data.eval_splits if split not in there]
    if missing:
        console.print(f"no held-out loss of {', '.join(missing)}: the data set has {', '.join(there)}", highlight=False)
    kept = tuple(split for split in data.eval_splits if split in there)
    return dataclasses.replace(data, eval_splits=kept)


def content_codec(content: Content) -> CodecComponent:
    """Returns which codec made the values of a data set; that of a mixture is its parts' own."""
    encoder = json.loads(content.encoder) if content.encoder else None
    if encoder is None:
        return CodecComponent("identity")
    return CodecComponent("image", encoder.get("sha256"), float(encoder["scaling_factor"]))
