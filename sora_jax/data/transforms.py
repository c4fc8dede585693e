"""What is taken of a clip: its duration, frame rate, size and start; `captioned` and `labelled` say how it is drawn.

A `Sample` is a plan: it is drawn from metadata alone, and says how many patches the clip will have before any
frame is decoded.
"""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import numpy as np

from sora_jax.array_types import NumpyArray
from sora_jax.config import PackedDataConfig, PatchConfig
from sora_jax.data.augment import WHOLE, Box
from sora_jax.patches.patchify import num_tokens
from sora_jax.patches.token_drop import truncated_normal

TOO_LARGE = "more patches than a row of data.row_length has"
TOO_SMALL = "smaller than a patch"


class StoredClip(NamedTuple):
    """What a data set says of a clip before any frame is decoded.

    Attributes:
        index: of the clip in its content.
        num_frames: frames it has.
        fps: frames a second it is stored with.
        height: in pixels, or latent cells.
        width: in pixels, or latent cells.
        label: its class, -1 for none.
    """

    index: int
    num_frames: int
    fps: float
    height: int
    width: int
    label: int = -1


@dataclasses.dataclass(frozen=True)
class Sample:
    """What is taken of a clip.

    Attributes:
        clip: its index in the source.
        start: seconds from the clip's beginning to the first frame.
        num_frames: frames taken.
        fps: frames a second taken.
        height, width: in pixels, multiples of the patch's.
        caption_dropped: whether it goes with the null caption.
        speed: at which the clip is played: 2 skips every other moment, below 0 it runs backwards.
        label: class, -1 for none.
        num_kept: patches that are kept, 0 for all.
        drop_seed: of the draw of these.
        flip: whether it is the mirror image.
        crop_top, crop_left, crop_height, crop_width: the part of the stored picture that it is, 0 for all of it.
        draw_seed: of the draw from a stored posterior.
        table: of its noise levels, a place of `sora_jax.patches.levels.TABLES`.
        reduced: whether it was made smaller than drawn to fit a row; the row that is packed does not say.
    """

    clip: int
    start: float
    num_frames: int
    fps: float
    height: int
    width: int
    caption_dropped: bool
    speed: float = 1.0
    label: int = -1
    num_kept: int = 0
    drop_seed: int = 0
    flip: bool = False
    crop_top: int = 0
    crop_left: int = 0
    crop_height: int = 0
    crop_width: int = 0
    draw_seed: int = 0
    table: int = 0
    reduced: bool = False

    def frame_indices(self, clip_fps: float, clip_frames: int) -> list[int]:
        """Returns the stored frame shown at each moment of the sample."""
        moments = np.arange(self.num_frames) * abs(self.speed) / self.fps
        moments = self.start + (moments if self.speed > 0 else moments[::-1])
        # The small term keeps a moment that falls on a frame from slipping to the one before it by rounding.
        return np.clip(np.floor(moments * clip_fps + 1e-4), 0, clip_frames - 1).astype(int).tolist()

    def num_tokens(self, patch: PatchConfig) -> int:
        """Returns the patches that the sample gives a row."""
        return self.num_kept or num_tokens(self.num_frames, self.height, self.width, patch.size)

    def shares(self, height: int, width: int) -> tuple[float, float, float, float] | None:
        """Returns (top, left, bottom, right) of its part as shares of the stored height and width, None for all."""
        if not self.crop_height:
            return None
        bottom, right = self.crop_top + self.crop_height, self.crop_left + self.crop_width
        return self.crop_top / height, self.crop_left / width, bottom / height, right / width

    def to_row(self) -> NumpyArray:
        """Returns it as a row of float64 numbers, without `reduced`."""
        return np.array(dataclasses.astuple(self)[: len(_ROW)], np.float64)

    @classmethod
    def from_row(cls, row: NumpyArray) -> Sample:
        """Reads what `to_row` gave."""
        return cls(*(kind(value) for kind, value in zip(_ROW, row, strict=True)))


_ROW = (int, float, int, float, int, int, bool, float, *(int,) * 3, bool, *(int,) * 6)  # of the fields but the last


def fit_size(
    height: int, width: int, long_side: float, patch: PatchConfig, num_frames: int, budget: int
) -> tuple[int, int] | None:
    """Returns the size at which a clip of this aspect has about this long side and at most `budget` patches.

    Both sides are rounded to multiples of the patch's, so the aspect is kept to within half a patch.

    Args:
        height: stored height in pixels.
        width: stored width in pixels.
        long_side: wanted, in pixels; never above the stored one.
        patch: gives the multiples.
        num_frames: of the sample.
        budget: most patches.

    Returns:
        (height, width), smaller than wanted where the budget asks for it, or None where not even one patch a frame
        fits.
    """
    _, ph, pw = patch.size
    long_side = min(long_side, max(height, width))
    while True:
        scale = long_side / max(height, width)
        size = max(round(height * scale / ph), 1) * ph, max(round(width * scale / pw), 1) * pw
        tokens = num_tokens(num_frames, *size, patch.size)
        if tokens <= budget:
            return size
        if size == (ph, pw):
            return None
        long_side = min(long_side * math.sqrt(budget / tokens), long_side - 1)


def augmented(rng: np.random.Generator, sample: Sample, box: Box, data: PackedDataConfig, resizable: bool) -> Sample:
    """Returns a sample as a part of its picture, flipped or not as `data` says, and with a seed where it needs one.

    Args:
        rng: of this draw.
        sample: without these.
        box: the part.
        data: says how often it is flipped.
        resizable: pixels are; latents are drawn from posteriors.
    """
    if resizable and not data.flip and box == WHOLE:
        return sample
    flip = data.flip > 0 and bool(rng.random() < data.flip)
    seed = 0 if resizable else int(rng.integers(2**32))
    place = dict(crop_top=box.top, crop_left=box.left, crop_height=box.height, crop_width=box.width)
    return dataclasses.replace(sample, flip=flip, draw_seed=seed, **place)


def sample_size(
    rng: np.random.Generator,
    height: int,
    width: int,
    sides: tuple[float, float],
    patch: PatchConfig,
    mean: float = -0.5,
    std: float = 1.0,
    enlarge: bool = False,
) -> tuple[int, int]:
    """Draws the size of an image or clip as NaViT does (arXiv:2307.06304, section 3.2): its area is a side squared.

    The side is linear in a normal number within [-1, 1], which the bounds of `sides` stand for (64 and 384 in the
    paper). The best of those compared (Fig. 7) has the mean -0.5, which prefers small images; the runs of Fig. 1 draw
    the side uniformly (Appendix A.1). Deviation: without `enlarge` the side stops at that of the stored image.

    Args:
        rng: of this draw.
        height: stored height in pixels.
        width: stored width in pixels.
        sides: (smallest, largest) side in pixels.
        patch: gives the multiples.
        mean: of the normal number.
        std: of the normal number.
        enlarge: images that are smaller than what is drawn.

    Returns:
        (height, width), multiples of the patch's and at least one; the aspect is kept to within a patch.

    Raises:
        ValueError: sides that are not positive or fall, or an image smaller than a patch.
    """
    _, ph, pw = patch.size
    smallest, largest = sides
    if not 0 < smallest <= largest:
        raise ValueError(f"sides must be (smallest, largest) with 0 < smallest <= largest, got {sides}.")
    if height < ph or width < pw:
        raise ValueError(f"an image of {height} x {width} pixels is smaller than a patch of {ph} x {pw}.")
    share = (truncated_normal(rng, mean, std, -1.0, 1.0) + 1) / 2
    scale = (smallest + share * (largest - smallest)) / math.sqrt(height * width)
    if enlarge:
        return max(round(height * scale / ph), 1) * ph, max(round(width * scale / pw), 1) * pw
    scale = min(scale, 1.0)
    # Rounding must not make it larger than it is stored either.
    return tuple(
        max(min(round(value * scale / size), value // size), 1) * size for value, size in ((height, ph), (width, pw))
    )


def select_clips(num_clips: int, max_clips: int | None, seed: int) -> NumpyArray:
    """Returns the indices, in order, of `max_clips` clips drawn by `seed`, or of all."""
    if max_clips is None or max_clips >= num_clips:
        return np.arange(num_clips)
    return np.sort(np.random.default_rng(seed).permutation(num_clips)[:max_clips])


def log_uniform(u: float, low: float, high: float) -> float:
    """Maps u in [0, 1) to a number whose logarithm is uniform between those of `low` and `high`."""
    return float(np.exp(np.log(low) + u * (np.log(high) - np.log(low))))
