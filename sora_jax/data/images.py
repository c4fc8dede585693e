"""All stills of a prepared data set in memory, on canvases of one size: for data sets of small pictures."""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar, NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from sora_jax.array_types import Float, NumpyArray
from sora_jax.config import BatchConfig, check
from sora_jax.data.decode import decode_frames
from sora_jax.data.examples import Draw, Values, from_images
from sora_jax.data.sources import open_source


class Images(NamedTuple):
    """Pictures and what they show.

    Attributes:
        pixels: (N, size, size, channels) uint8.
        captions: N strings.
    """

    pixels: NumpyArray
    captions: list[str]


@dataclasses.dataclass(frozen=True)
class StillsConfig(BatchConfig):
    """Small stills of a prepared data set, all in memory (`sora_jax.data.images`), 8-bit values as numbers in [-1, 1].

    Attributes:
        path: directory of a prepared TFDS data set (`experiments/prepare_data.py` prints it).
        size: of the square canvas that each still is centred on, in pixels.
        channels: 1 for grey, 3 for RGB.
    """

    kind: ClassVar[str] = "stills"
    values: ClassVar[Values] = "8-bit"

    eval_splits: tuple[str, ...] = ("unseen",)
    path: str = ""
    size: int = 32
    channels: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.size >= 1, self, "size", "at least 1")
        check(self.channels in (1, 3), self, "channels", "1 or 3")

    @property
    def shape(self) -> tuple[int, ...]:
        """Of an example."""
        return (self.size, self.size, self.channels)

    def images(self, split: str) -> Float[np.ndarray, "images size size channels"]:
        """Returns the stills of a split, each time the same array."""
        return _images(self, split)

    def source(self, split: str) -> Draw:
        """Returns what draws stills of a split with replacement."""
        return from_images(self.images(split))

    def held_out(self, count: int, seed: int) -> Float[np.ndarray, "count size size channels"]:
        """Returns the first stills of the first held-out split.

        Raises:
            ValueError: it has fewer.
        """
        del seed
        images = self.images(self.eval_splits[0])[:count]
        if len(images) < count:
            raise ValueError(
                f"num_held_out must be at most the {len(images)} images of {self.eval_splits[0]}, got {count}."
            )
        return images

    def log_density(self, x: Float[np.ndarray, "count size size channels"]) -> None:
        """Returns None: it is not known."""

    def facts(self) -> dict[str, float]:
        """Returns what a report says of the data: nothing more."""
        return {}


@functools.lru_cache(maxsize=4)
def _images(config: StillsConfig, split: str) -> Float[np.ndarray, "images size size channels"]:
    """Returns what `StillsConfig.images` does."""
    images, _ = load_images(config.path, split, config.size, config.channels)
    return images.astype(np.float32) / 127.5 - 1


def load_images(path: str, split: str, size: int, channels: int = 3) -> Images:
    """Decodes the clips of one frame, each in the middle of a black square.

    Nothing is scaled. Where the margin is odd, the smaller part of it lies above and on the left.

    Args:
        path: of the data set, as `sora_jax.data.sources.ClipSource` takes it.
        split: as it takes it.
        size: height and width of the canvas, in pixels.
        channels: 3 for RGB, 1 for grey (ITU-R 601 luma, which leaves grey pixels as they are).

    Returns:
        The stills, in the order of the records.

    Raises:
        ValueError: other channels, no data set or split (as of `ClipSource`), no still in it, or one that is larger
            than the canvas; or a picture cannot be decoded (`UnreadableClipError`).
    """
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 or 3, got {channels}.")
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}.")
    source = open_source(path, split)
    meta = source.metadata
    stills = np.flatnonzero(meta.num_frames == 1)
    if not len(stills):
        raise ValueError(f"split {split!r} of {source.path} has no stills, but {len(source)} clips of several frames.")
    sides = np.maximum(meta.height, meta.width)[stills]
    if sides.max() > size:
        place = stills[int(np.argmax(sides))]
        raise ValueError(
            f"size must be at least {sides.max()}, the long side of {meta.names[place]!r} in {source.path}, got {size}."
        )
    pixels = np.zeros((len(stills), size, size, channels), np.uint8)
    for canvas, i in zip(pixels, tqdm(stills, desc=f"reading {split}", unit="still", delay=2.0), strict=True):
        height, width = int(meta.height[i]), int(meta.width[i])
        top, left = (size - height) // 2, (size - width) // 2
        (picture,) = decode_frames(source.read_frames(int(i), [0]), height, width)
        if channels == 1:
            picture = np.asarray(Image.fromarray(picture).convert("L"))[..., None]
        canvas[top : top + height, left : left + width] = picture
    return Images(pixels, [meta.captions[i] for i in stills])
