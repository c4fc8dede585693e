"""Clips from requests: conditions, a packed canvas, the generator, and the codec that makes clips of latents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

from sora_jax.array_types import Bool, Float, NumpyArray
from sora_jax.config import PatchConfig
from sora_jax.generation.canvas import (
    Canvas,
    ClipRequest,
    Condition,
    canvas_segment,
    is_number,
    pack_canvas,
    unpack_clips,
)
from sora_jax.generation.generator import Generator, by_shape, canvas_draw
from sora_jax.models.autoencoder.codec import Codec


class Conditioner(Protocol):
    """What a family's clips are conditioned on."""

    @property
    def null(self) -> Condition:
        """The condition that clips are guided away from."""
        ...

    def __call__(self, requests: Sequence[ClipRequest]) -> list[Condition]:
        """Returns the condition of each request."""
        ...


class TextEncoder(Protocol):
    """What a conditioner needs of a text encoder."""

    dim: int

    def encode(self, captions: list[str], max_tokens: int) -> list[Float[np.ndarray, "tokens dim"]]:
        """Returns each caption's token states, cut to `max_tokens` with a warning."""
        ...


class TextConditioner:
    """Captions by their token states; the null condition is the empty caption.

    Args:
        encoder: of the captions.
        max_tokens: longer captions are cut.
    """

    def __init__(self, encoder: TextEncoder, max_tokens: int) -> None:
        self.encoder, self._max_tokens = encoder, max_tokens

    @property
    def null(self) -> Condition:
        """The empty caption."""
        return Condition(self.encoder.encode([""], self._max_tokens)[0])

    def __call__(self, requests: Sequence[ClipRequest]) -> list[Condition]:
        """Returns the captions' token states, each encoded once."""
        captions = list(dict.fromkeys(request.prompt.strip() for request in requests))
        states = dict(zip(captions, self.encoder.encode(captions, self._max_tokens), strict=True))
        return [Condition(states[request.prompt.strip()]) for request in requests]


class ClassConditioner:
    """Classes as they are; the null condition is the class of no class.

    Args:
        null_class: number of that class.
    """

    def __init__(self, null_class: int) -> None:
        self.null = Condition(np.zeros((0, 0), np.float32), null_class)

    def __call__(self, requests: Sequence[ClipRequest]) -> list[Condition]:
        """Returns the labels."""
        return [self.null._replace(label=request.label) for request in requests]


class ClipGenerator:
    """Makes the clips of requests, as many batches as they need.

    Args:
        generator: of the family's network.
        conditioner: gives what it is conditioned on.
        codec: makes clips of what it makes.
        patch: how that is cut into patches.
        tokens_per_batch: most tokens that one device samples at once.

    Raises:
        ValueError: patches of other channels than the codec's, or fewer tokens than one.
    """

    def __init__(
        self,
        generator: Generator,
        conditioner: Conditioner,
        codec: Codec,
        patch: PatchConfig,
        tokens_per_batch: int = 16_384,
    ) -> None:
        if patch.channels != codec.channels:
            raise ValueError(
                f"patch.channels must be the {codec.channels} of what the codec {codec.kind!r} decodes, "
                f"got {patch.channels}."
            )
        if tokens_per_batch < 1:
            raise ValueError(f"tokens_per_batch must be at least 1, got {tokens_per_batch}.")
        self.generator, self.conditioner, self.codec, self.patch = generator, conditioner, codec, patch
        self.tokens_per_batch = tokens_per_batch

    def __call__(
        self,
        requests: Sequence[ClipRequest],
        names: Sequence[str],
        num_steps: int,
        sampler: str,
        *,
        guided_values: Bool[np.ndarray, " values"] | None = None,
        interval: tuple[float, float] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Float[NumpyArray, "frames height width channels"]]:
        """Returns the clips, with values in about [-1, 1], neither clipped nor rounded.

        Args:
            requests: the clips.
            names: what messages call them.
            num_steps: of the sampler's whole way from noise.
            sampler: a name of `sora_jax.diffusion.samplers.SAMPLERS`.
            guided_values: see `Generator`.
            interval: (lowest, highest) time of guidance; None for all times.
            progress: called with (steps done, steps in all).

        Raises:
            ValueError: a request, a number of steps or a sampler that cannot be.
            FloatingPointError: clips that are not finite, naming the first and the step from which on it is not.
        """
        method = self.generator.process.sampler(sampler)
        if not is_number(num_steps, np.integer):
            raise ValueError(f"num_steps must be a whole number of at least 1, got {num_steps!r}.")
        if interval is not None and not (np.shape(interval) == (2,) and interval[0] <= interval[1]):
            raise ValueError(f"the interval of guidance must be (lowest, highest), lowest <= highest, got {interval}.")
        canvas, at_once = self._canvas(requests, int(num_steps))
        draw = canvas_draw(canvas, [r.seed for r in requests], [r.guidance_scale for r in requests])
        patches = self.generator(
            draw, method, names, at_once=at_once, guided_values=guided_values, interval=interval, progress=progress
        )
        sizes = [self.codec.latent_size(r.num_frames, r.height, r.width) for r in requests]
        clips = by_shape(unpack_clips(patches, canvas.rows, sizes, self.patch), self.codec.decode)
        broken = [name for name, clip in zip(names, clips, strict=True) if not np.isfinite(clip).all()]
        if broken:
            raise FloatingPointError(
                f"the samples are not finite: {broken[0]} is finite until it is decoded "
                f"({len(broken)} of {len(names)}); the autoencoder makes it so."
            )
        return clips

    def _canvas(self, requests: Sequence[ClipRequest], num_steps: int) -> tuple[Canvas, int]:
        """Returns the rows of all clips, and how many of them are sampled at once."""
        null, of = self.conditioner.null, (self.codec, self.patch, self.generator.process, num_steps)
        conditions = self.conditioner(requests)
        segments = [canvas_segment(r, i, conditions[i], null, *of) for i, r in enumerate(requests)]
        num_devices = self.generator.num_devices
        longest = max(len(s.segment.patches) for s in segments)
        most_rows = num_devices * max(1, self.tokens_per_batch // longest)
        canvas = pack_canvas(segments, num_devices)
        if len(canvas.rows.patches) > most_rows:  # equal batches, so that one function serves them all
            canvas = pack_canvas(segments, most_rows)
        return canvas, min(len(canvas.rows.patches), most_rows)
