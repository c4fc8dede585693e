"""How captioned clips are sampled: any duration, size and rate, with the aspect kept."""

from __future__ import annotations

import dataclasses

import numpy as np

from sora_jax.config import PackedDataConfig, PatchConfig, check, check_range
from sora_jax.data.augment import part_of_aspect_kept
from sora_jax.data.transforms import TOO_LARGE, TOO_SMALL, Sample, StoredClip, augmented, fit_size, log_uniform
from sora_jax.patches.patchify import num_tokens


@dataclasses.dataclass(frozen=True)
class DataConfig(PackedDataConfig):
    """Clips of any duration, size and rate, as a generator is trained on them.

    Attributes:
        num_frames: (fewest, most) frames of a sample, log-uniform.
        fps: (lowest, highest) frames a second of a sample, log-uniform; the clip's own rate is never exceeded.
        long_side: (shortest, longest) long side of a sample in pixels, log-uniform; the aspect is kept. Latents keep
            the size that they are stored with.
        still_share: share of samples that are single frames.
        known_first_share: share of samples whose first latent frame is known, so that the model learns to animate it.
        free_frames_share: share of samples each of whose latent frames has a noise level of its own, so that the model
            learns to go on from frames of any level. The rest have one level, and so have stills.
    """

    eval_splits: tuple[str, ...] = ("unseen", "compositional")
    num_frames: tuple[int, int] = (1, 24)
    fps: tuple[float, float] = (6.0, 12.0)
    long_side: tuple[int, int] = (32, 96)
    still_share: float = 0.2
    known_first_share: float = 0.0
    free_frames_share: float = 0.0

    def __post_init__(self) -> None:
        tokens = self.max_caption_tokens
        check(self.text_length >= tokens, self, "text_length", f"at least max_caption_tokens ({tokens})")
        super().__post_init__()
        check_range(self, "num_frames", 1)
        check_range(self, "fps", 1e-3)
        check_range(self, "long_side", 1)
        for field in ("still_share", "known_first_share", "free_frames_share"):
            check(0 <= getattr(self, field) <= 1, self, field, "between 0 and 1")
        rest = 1 - self.known_first_share
        check(self.free_frames_share <= rest, self, "free_frames_share", f"at most 1 - known_first_share = {rest:g}")
        several = self.known_first_share + self.free_frames_share > 0
        check(not several or self.max_levels is not None, self, "max_levels", "given where clips have several levels")

    @property
    def how_to_fit(self) -> str:
        """What to change where no clip fits a row."""
        return (
            f"raise data.row_length ({self.row_length}) or data.text_length ({self.text_length}), lower "
            f"data.num_frames {self.num_frames} or data.long_side {self.long_side}, or set data.oversize to 'resize'."
        )

    def draw(
        self, rng: np.random.Generator, clip: StoredClip, patch: PatchConfig, resizable: bool = True
    ) -> Sample | str:
        """Draws what is taken of a clip; see `PackedDataConfig.draw`.

        There is none where it does not fit a row and `oversize` is `skip`, or nothing smaller fits. What is not
        resizable has fewer frames instead.
        """
        still, frames, rate, side, start, dropped, table = rng.random(7)
        fps = min(log_uniform(rate, *self.fps), clip.fps)
        if clip.num_frames == 1 or still < self.still_share:
            num_frames = 1
        else:
            most = max(int(clip.num_frames / clip.fps * fps), 1)
            num_frames = min(round(log_uniform(frames, *self.num_frames)), most)
        box = part_of_aspect_kept(rng, clip.height, clip.width, self, patch, resizable)
        if box is None:
            return TOO_SMALL
        height, width = (box.height, box.width) if box.height else (clip.height, clip.width)
        long_side = log_uniform(side, *self.long_side)
        size = fit_size(height, width, long_side, patch, num_frames, budget=2**31) if resizable else (height, width)
        reduced = num_tokens(num_frames, *size, patch.size) > self.row_length
        if reduced and self.oversize != "resize":
            return TOO_LARGE
        if reduced and resizable:
            size = fit_size(height, width, long_side, patch, num_frames, self.row_length)
        elif reduced:
            num_frames = self.row_length // num_tokens(1, *size, patch.size) * patch.size[0]
        if size is None or not num_frames:
            return TOO_LARGE
        last_start = max(clip.num_frames / clip.fps - num_frames / fps, 0.0)
        bounds = 1 - self.known_first_share - self.free_frames_share, 1 - self.free_frames_share
        sample = Sample(
            clip.index,
            start * last_start,
            num_frames,
            fps,
            *size,
            bool(dropped < self.caption_dropout),
            table=int(np.searchsorted(bounds, table, side="right")),
            reduced=reduced,
        )
        return augmented(rng, sample, box, self, resizable)
