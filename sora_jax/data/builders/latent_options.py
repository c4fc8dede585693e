"""What is stored of the frames of a clip whose latents are prepared: their size, rate and views."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import numpy as np
from PIL import Image

from sora_jax.array_types import NumpyArray


@dataclasses.dataclass(frozen=True)
class LatentOptions:
    """What is stored of each clip.

    Attributes:
        image_size: side of the square, or the longest side, that a frame is resized to, in pixels.
        fit: `crop` takes the middle square, `keep` keeps the aspect and enlarges nothing.
        multiple: that both sides of a frame are rounded to where `fit` is `keep`, in pixels.
        fps: most frames a second that are taken of a clip (None: all).
        views: the clip itself, its mirror image, or both.
        dtype: of the stored means and standard deviations.
        part_size: frames of a file, or one clip where that has more.
    """

    image_size: int = 256
    fit: Literal["crop", "keep"] = "crop"
    multiple: int = 16
    fps: float | None = None
    views: Literal["image", "flip", "both"] = "both"
    dtype: Literal["float16", "float32"] = "float32"
    part_size: int = 1024

    def __post_init__(self) -> None:
        for field in ("image_size", "multiple", "part_size"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}.")
        for field, allowed in (
            ("fit", ("crop", "keep")),
            ("views", ("image", "flip", "both")),
            ("dtype", ("float16", "float32")),
        ):
            if getattr(self, field) not in allowed:
                words = f"{', '.join(allowed[:-1])} or {allowed[-1]}"
                raise ValueError(f"{field} must be {words}, got {getattr(self, field)!r}.")
        if self.fps is not None and not 0 < self.fps < math.inf:
            raise ValueError(f"fps must be None or positive and finite, got {self.fps}.")

    @property
    def num_views(self) -> int:
        """Views of a clip."""
        return 2 if self.views == "both" else 1

    def views_of(self, picture: NumpyArray) -> list[NumpyArray]:
        """Returns the views of a picture (H, W, 3)."""
        both = {"image": picture, "flip": picture[:, ::-1]}
        return list(both.values()) if self.views == "both" else [both[self.views]]

    def size_of(self, height: int, width: int) -> tuple[int, int]:
        """Returns (height, width) in pixels that a frame is encoded at."""
        if self.fit == "crop":
            return self.image_size, self.image_size
        scale = min(self.image_size / max(height, width), 1.0) / self.multiple
        return tuple(max(round(side * scale), 1) * self.multiple for side in (height, width))

    def frames_of(self, num_frames: int, fps: float) -> tuple[NumpyArray, float]:
        """Returns the indices of the frames that are taken of a clip, and how many a second these are."""
        if self.fps is None or self.fps >= fps:
            return np.arange(num_frames), fps
        count = max(int(num_frames / fps * self.fps), 1)
        return np.minimum(np.arange(count) / self.fps * fps + 1e-4, num_frames - 1).astype(int), self.fps


def center_crop(picture: NumpyArray, size: int) -> NumpyArray:
    """Returns the middle of a picture as DiT and ADM (arXiv:2105.05233, its code) train on it.

    It is halved by a box filter while its short side is at least twice `size`, resized so that this side is `size` by a
    bicubic filter, and cropped.

    Args:
        picture: (H, W, 3) uint8.
        size: height and width of the result, in pixels.

    Returns:
        (size, size, 3) uint8.
    """
    image = Image.fromarray(picture)
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    pixels = np.asarray(image)
    top, left = ((n - size) // 2 for n in pixels.shape[:2])
    return pixels[top : top + size, left : left + size]
