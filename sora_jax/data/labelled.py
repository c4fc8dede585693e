"""How labelled images and clips are sampled: all at one size (ViT, ViViT, DiT), or each at its own (NaViT)."""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, Literal

import numpy as np

from sora_jax.config import PackedDataConfig, PatchConfig, check, check_range
from sora_jax.data.augment import part_of_aspect_kept, part_of_size
from sora_jax.data.transforms import (
    TOO_LARGE,
    TOO_SMALL,
    Sample,
    StoredClip,
    augmented,
    fit_size,
    sample_size,
)
from sora_jax.patches.patchify import num_tokens
from sora_jax.patches.token_drop import TokenDrop, kept_tokens

NO_LABEL = "its data set gives it no label"
OTHER_SIZE = "of another size than data.sampling.size; data.crop center or random takes a window of larger ones"
TOO_SHORT = "shorter than data.min_seconds, or than data.num_frames at data.fps and the highest of data.speeds"


@dataclasses.dataclass(frozen=True)
class FixedSize:
    """Every image or frame, or what `crop` takes of it, is stretched to one size, whatever its aspect.

    Latents are not stretched: they have this size, or `crop` takes a window of it.

    Attributes:
        size: (height, width) in pixels or latent cells.
    """

    kind: ClassVar[str] = "fixed_size"
    one_size: ClassVar[Literal[True]] = True
    enlarge: ClassVar[bool] = True
    size: tuple[int, int] = (224, 224)

    def __post_init__(self) -> None:
        check(min(self.size) >= 1, self, "size", "positive (height, width)")

    @property
    def largest_side(self) -> float:
        """Square root of the area in pixels."""
        return math.sqrt(math.prod(self.size))


@dataclasses.dataclass(frozen=True)
class NativeSize:
    """The aspect is kept, the size drawn and tokens dropped (arXiv:2307.06304); see `sample_size`.

    Latents keep the size that they are stored with.

    Attributes:
        sides: (smallest, largest) of what is drawn, the square root of the area in pixels; held-out images have the
            largest.
        mean: of the normal number in [-1, 1] that the side is linear in.
        std: of that number.
        enlarge: images that are smaller than what is drawn; without it they keep the size that they are stored at.
        token_drop: how many patches of a sample are left out in training (None: none).
    """

    kind: ClassVar[str] = "native_size"
    one_size: ClassVar[Literal[False]] = False
    size: ClassVar[None] = None  # each has its own
    sides: tuple[float, float] = (64.0, 256.0)
    mean: float = -0.5
    std: float = 1.0
    enlarge: bool = False
    token_drop: TokenDrop | None = None

    def __post_init__(self) -> None:
        check_range(self, "sides", 1.0)
        check(self.sides[1] < math.inf, self, "sides", "finite")
        check(-1 <= self.mean <= 1, self, "mean", "between -1 and 1")
        check(self.std > 0, self, "std", "positive")

    @property
    def largest_side(self) -> float:
        """Of what is drawn, the square root of the area in pixels."""
        return self.sides[1]


@dataclasses.dataclass(frozen=True)
class LabelledDataConfig(PackedDataConfig):
    """Images, or clips of one length, with a class each.

    Attributes:
        sampling: at one size, or each at its own.
        num_frames: of a sample; 1 takes a frame of a clip as an image.
        fps: frames a second of a sample.
        speeds: at which clips are played, each as likely as another: 2 takes the frames of twice the time, -1 runs
            backwards. Positions do not show it.
        min_seconds: clips that are shorter are left out.
        label: `class` of the data set, or the `speed`, by its index in `speeds`; or `none`.
    """

    kind: ClassVar[str] = "recognition"

    eval_splits: tuple[str, ...] = ("unseen",)
    text_length: int = 0
    caption_dropout: float = 0.0
    sampling: FixedSize | NativeSize = FixedSize()
    num_frames: int = 1
    fps: float = 12.0
    speeds: tuple[float, ...] = (1.0,)
    min_seconds: float = 0.0
    label: Literal["class", "speed", "none"] = "class"

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.num_frames >= 1, self, "num_frames", "at least 1")
        check(0 < self.fps < math.inf, self, "fps", "positive and finite")
        proper = all(0 < abs(speed) < math.inf for speed in self.speeds)
        check(bool(self.speeds) and proper, self, "speeds", "numbers other than 0")
        if self.label == "speed":
            distinct = len(set(self.speeds)) == len(self.speeds) > 1
            check(distinct, self, "speeds", "several, and each once, where label is 'speed'")
        check(0 <= self.min_seconds < math.inf, self, "min_seconds", "at least 0 and finite")
        shared = all(part.still_share is None for part in self.mixture)
        check(shared, self, "mixture", "parts without still_share, where data.num_frames is one number")

    @property
    def how_to_fit(self) -> str:
        """What to change where nothing fits a row."""
        return "choose another data.sampling, data.label or data.row_length."

    def for_evaluation(self) -> LabelledDataConfig:
        """Returns how held-out data is sampled: at the largest size and whole."""
        held_out = super().for_evaluation()
        if self.sampling.one_size:
            return held_out
        return held_out.at_side(self.sampling.sides[1])

    def at_side(self, side: float) -> LabelledDataConfig:
        """Returns the config of whole images whose area is `side` squared, in pixels.

        Small ones keep the size that they are stored at where none is enlarged.

        Images of one size are stretched to (side, side).
        """
        if self.sampling.one_size:
            sampling = FixedSize((round(side), round(side)))
        else:
            sampling = dataclasses.replace(self.sampling, sides=(side, side), token_drop=None)
        return dataclasses.replace(self, sampling=sampling)

    def draw(
        self, rng: np.random.Generator, clip: StoredClip, patch: PatchConfig, resizable: bool = True
    ) -> Sample | str:
        """Draws what is taken of an image or clip; see `PackedDataConfig.draw`."""
        speed_share, start, dropped = rng.random(3)
        index = int(speed_share * len(self.speeds))
        speed = self.speeds[index]
        if self.label == "class" and clip.label < 0:
            return NO_LABEL
        label = {"class": clip.label, "speed": index, "none": -1}[self.label]
        # Seconds from the first frame to the last; a clip that is too short for one speed would give the others away.
        whole, length = (clip.num_frames - 1) / clip.fps, (self.num_frames - 1) / self.fps
        needed = length * max(map(abs, self.speeds)) if self.label == "speed" else 0.0
        if whole + 1e-3 < max(needed, self.min_seconds):
            return TOO_SHORT
        room = whole - length * abs(speed)
        sample = Sample(
            clip.index,
            start * max(room, 0.0),
            self.num_frames,
            self.fps,
            clip.height,
            clip.width,
            bool(dropped < self.caption_dropout),
            speed,
            label,
        )
        if self.sampling.one_size:
            size = self.sampling.size
            box = part_of_size(rng, clip.height, clip.width, size, self, resizable)
            if box is None:
                return OTHER_SIZE
            sample = dataclasses.replace(sample, height=size[0], width=size[1])
            if sample.num_tokens(patch) > self.row_length:
                return TOO_LARGE
            return augmented(rng, sample, box, self, resizable)

        sampling = self.sampling
        box = part_of_aspect_kept(rng, clip.height, clip.width, self, patch, resizable)
        if box is None:
            return TOO_SMALL
        size = height, width = (box.height, box.width) if box.height else (clip.height, clip.width)
        if resizable:
            try:
                size = sample_size(
                    rng, height, width, sampling.sides, patch, sampling.mean, sampling.std, sampling.enlarge
                )
            except ValueError as error:
                return str(error).rstrip(".")  # smaller than a patch
        reduced = num_tokens(self.num_frames, *size, patch.size) > self.row_length
        if reduced:
            resize = resizable and self.oversize == "resize"
            size = fit_size(*size, max(size), patch, self.num_frames, self.row_length) if resize else None
            if size is None:
                return TOO_LARGE
        num_kept = drop_seed = 0
        if sampling.token_drop is not None:
            tokens = num_tokens(self.num_frames, *size, patch.size)
            rate = sampling.token_drop.draw_rate(rng, tokens)
            drop_seed = int(rng.integers(2**32))
            num_kept = len(kept_tokens(np.random.default_rng(drop_seed), tokens, rate))
        sample = dataclasses.replace(
            sample, height=size[0], width=size[1], num_kept=num_kept, drop_seed=drop_seed, reduced=reduced
        )
        return augmented(rng, sample, box, self, resizable)
