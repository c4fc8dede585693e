"""What the values of a sample are: pixels that are decoded, or latents that are drawn from stored posteriors.

A data set says itself which of them it holds. Either way a sample is planned from metadata alone, and its values are
(T, H, W, C) numbers on the content's own grid.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from sora_jax.array_types import Float, NumpyArray
from sora_jax.config import MixturePart, PackedDataConfig, PatchConfig
from sora_jax.data.captions import StoredCaptions
from sora_jax.data.decode import UnreadableClipError, decode_frames
from sora_jax.data.latents import LatentSource, latent_report
from sora_jax.data.records import ClipMetadata
from sora_jax.data.sources import ClipSource, RecordSource, find_dataset, read_splits, split_spans
from sora_jax.data.transforms import Sample
from sora_jax.pixels import RGB


class Content(Protocol):
    """The clips of a split, or of several data sets.

    Attributes:
        kind: what its values are, in words.
        encoder: what its values were encoded by: a digest, "" for pixels.
        channels: values of a cell.
        resizable: whether a sample may have another size than it is stored with.
        can_flip: whether there are mirror images.
        metadata: of all clips; sizes and rates in the content's own cells and frames.
        label_names: of the classes.
        path: of the data set, for messages.
        captions: the token states of captions that stand in the records; None where there are none.
        starts: of each part, its first clip, and the number of all.
    """

    kind: str
    encoder: str
    channels: int
    resizable: bool
    can_flip: bool
    metadata: ClipMetadata
    label_names: tuple[str, ...]
    path: str
    starts: Sequence[int]

    @property
    def captions(self) -> StoredCaptions | None: ...  # noqa: D102

    def __len__(self) -> int: ...

    def values(self, clip: int, sample: Sample) -> Float[np.ndarray, "frames height width channels"]:
        """Returns what a sample takes of a clip, float32.

        Raises:
            UnreadableClipError: a picture cannot be decoded; the clip is named.
        """

    def caption_states(self, clip: int) -> NumpyArray:
        """Returns the token states (m, D) of a clip's caption, where the records hold them."""

    def facts(self) -> dict[str, Any]:
        """Returns by what the content is known beside the values of its records, as JSON."""


class _OfOneSource:
    """What all contents of one split have in common."""

    def __init__(self, source: RecordSource) -> None:
        self.source = source
        self.metadata, self.label_names, self.path = source.metadata, source.label_names, source.path
        self.starts = (0, len(source.metadata))

    @property
    def captions(self) -> StoredCaptions | None:
        """The token states that stand in the records."""
        null = self.source.null_states
        return None if null is None else StoredCaptions(self.metadata, self.caption_states, null)

    def __len__(self) -> int:
        return len(self.metadata)

    def caption_states(self, clip: int) -> NumpyArray:
        """Returns the token states (m, D) of a clip's caption."""
        return self.source.caption_states(clip)


class PixelContent(_OfOneSource):
    """Pictures and videos, decoded to RGB in [-1, 1]; a sample is the part that it takes, resized.

    Args:
        source: of the clips.
    """

    kind, encoder, channels, resizable, can_flip = "RGB pixels", "", RGB, True, True

    def __init__(self, source: ClipSource) -> None:
        super().__init__(source)

    def values(self, clip: int, sample: Sample) -> Float[np.ndarray, "frames height width 3"]:
        """Returns the decoded frames of a sample."""
        m = self.metadata
        encoded = self.source.read_frames(clip, sample.frame_indices(float(m.fps[clip]), int(m.num_frames[clip])))
        try:
            pixels = decode_frames(encoded, sample.height, sample.width, sample.shares(m.height[clip], m.width[clip]))
        except UnreadableClipError as error:
            raise UnreadableClipError(f"clip {m.names[clip]!r}: {error}") from error
        return (pixels[:, :, ::-1] if sample.flip else pixels).astype(np.float32) / 127.5 - 1

    def facts(self) -> dict[str, Any]:
        """Returns the metadata of all clips."""
        return clip_facts(self.metadata)


class LatentContent(_OfOneSource):
    """Latents drawn from the stored posteriors and scaled: scale (mean + std e), with normal e by the sample's seed.

    A sample is a window of them. Its mirror image is the one that was stored.

    Args:
        source: of the latents.
    """

    kind, resizable = "latents", False

    def __init__(self, source: LatentSource) -> None:
        super().__init__(source)
        self.channels, self.can_flip = source.layout.channels, len(source.layout.views) > 1
        self.encoder = json.dumps(source.layout.request["autoencoder"], sort_keys=True)

    def values(self, clip: int, sample: Sample) -> Float[np.ndarray, "frames height width channels"]:
        """Returns drawn latents of a sample."""
        m = self.metadata
        frames = sample.frame_indices(float(m.fps[clip]), int(m.num_frames[clip]))
        stored = self.source.posterior(clip, frames, int(sample.flip))
        rows = slice(sample.crop_top, sample.crop_top + sample.height)
        columns = slice(sample.crop_left, sample.crop_left + sample.width)
        mean, std = stored[:, :, rows, columns].astype(np.float32)
        noise = np.random.default_rng(sample.draw_seed).standard_normal(mean.shape, np.float32)
        return np.float32(self.source.layout.scaling_factor) * (mean + std * noise)

    def facts(self) -> dict[str, Any]:
        """Returns what the latents are of, and the metadata of all clips where each has its own."""
        layout = self.source.layout
        return layout.facts() | ({} if layout.is_older else clip_facts(self.metadata))


class MixedContent:
    """Several contents as one, each clip of them by its place in all; see `Content`.

    Classes are kept where all parts have the same; else no clip has one.

    Args:
        parts: at least one.

    Raises:
        ValueError: parts of different kinds or channels, of different autoencoders or encoders of captions.
    """

    def __init__(self, parts: Sequence[Content]) -> None:
        first = parts[0]
        for other in parts[1:]:
            for name, of in (("kind", "kind"), ("channels", "channels"), ("encoder", "autoencoder")):
                if getattr(other, name) != getattr(first, name):
                    raise ValueError(
                        f"the data sets of a mixture must have the same {of}: {first.path} has "
                        f"{getattr(first, name)}, {other.path} {getattr(other, name)}."
                    )
        self.parts = tuple(parts)
        self.kind, self.encoder = first.kind, first.encoder
        self.channels, self.resizable = first.channels, first.resizable
        self.path = ", ".join(part.path for part in parts)
        self.metadata = ClipMetadata.concatenate([part.metadata for part in parts])
        self.label_names = first.label_names
        if any(part.label_names != first.label_names for part in parts):
            self.label_names = ()
            self.metadata = dataclasses.replace(self.metadata, labels=np.full_like(self.metadata.labels, -1))
        self.can_flip = all(part.can_flip for part in parts)
        self.starts = tuple(np.cumsum([0, *map(len, parts)]).tolist())

    @property
    def captions(self) -> StoredCaptions | None:
        """The token states that stand in the records, where those of all parts hold them."""
        tables = [part.captions for part in self.parts]
        if any(table is None for table in tables):
            return None
        null = tables[0].lookup("")
        if not all(np.array_equal(table.lookup(""), null) for table in tables):
            raise ValueError(f"the captions of {self.path} must have been encoded by the same text encoder.")
        return StoredCaptions(self.metadata, self.caption_states, null)

    def __len__(self) -> int:
        return len(self.metadata)

    def _place(self, clip: int) -> tuple[Content, int]:
        part = int(np.searchsorted(self.starts, clip, side="right")) - 1
        return self.parts[part], clip - self.starts[part]

    def values(self, clip: int, sample: Sample) -> Float[np.ndarray, "frames height width channels"]:
        """Returns what a sample takes of a clip, float32."""
        part, own = self._place(clip)
        return part.values(own, sample)

    def caption_states(self, clip: int) -> NumpyArray:
        """Returns the token states (m, D) of a clip's caption."""
        part, own = self._place(clip)
        return part.caption_states(own)


def clip_facts(metadata: ClipMetadata) -> dict[str, Any]:
    """Returns the metadata of clips as JSON."""
    facts = {"captions": metadata.captions, "names": metadata.names, "fps": metadata.fps.astype(float).tolist()}
    for name in ("clip_ids", "num_frames", "height", "width", "labels"):
        facts[f"clip_{name}"] = getattr(metadata, name).tolist()
    return facts


def open_content(path: str, split: str = "train") -> PixelContent | LatentContent:
    """Opens one split of a prepared data set, which says itself what it holds.

    Raises:
        ValueError: as of `sora_jax.data.sources.RecordSource`, or neither pictures nor latents in it.
    """
    if latent_report(find_dataset(path)) is not None:
        return LatentContent(LatentSource(path, split))
    return PixelContent(ClipSource(path, split))


def open_data(data: PackedDataConfig, split: str | None = None) -> Content:
    """Opens what a config names.

    Args:
        data: one data set or a mixture.
        split: of all parts that have it (None: what each is trained on).

    Raises:
        ValueError: no data, none that has the split, or parts that do not go together.
    """
    parts = [open_content(part.path, name) for part, name in parts_with(data, split)]
    return MixedContent(parts) if data.mixture else parts[0]


def parts_with(data: PackedDataConfig, split: str | None = None) -> list[tuple[MixturePart, str]]:
    """Returns the parts of the data that have a split, each with the name of the split that is read of it.

    Args:
        data: one data set or a mixture.
        split: of all parts that have it (None, or `data.split`: what each is trained on).

    Raises:
        ValueError: in a mixture none has the split.
    """
    if split is None or split == data.split:
        return [(part, part.split or data.split) for part in data.parts]
    there = [(part, split) for part in data.parts if not data.mixture or has_split(part.path, split)]
    if not there:
        raise ValueError(f"no data set of the mixture has the split {split!r}.")
    return there


def has_split(path: str, split: str) -> bool:
    """Whether a data set has a split, or all that `train[:100]` or `train+unseen` names; ValueError for no data set."""
    directory = str(find_dataset(path))
    splits = read_splits(directory)
    try:
        split_spans(splits, split, directory)
    except ValueError:
        return False
    return True


def check_content(content: Content, data: PackedDataConfig, patch: PatchConfig) -> None:
    """Raises ValueError where a config asks for what the data does not hold."""
    if patch.channels != content.channels:
        raise ValueError(
            f"patch.channels must be the {content.channels} of the {content.kind} in {content.path}, "
            f"got {patch.channels}."
        )
    if data.flip > 0 and not content.can_flip:
        raise ValueError(
            f"data.flip must be 0, got {data.flip:g}: {content.path} holds {content.kind} without their mirror "
            "images (prepare_data.py latents --views both stores them)."
        )
