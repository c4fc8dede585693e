"""What part of a picture a sample is, drawn before it is read; the same for every frame of a clip.

A random part is that of Inception's training (arXiv:1409.4842, section 6), as ViT's code takes it too: its share of the
area is uniform, its aspect log-uniform, and it lies anywhere. What does not fit the picture is drawn again; after ten
draws the largest part in the middle is taken.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from sora_jax.config import PackedDataConfig, PatchConfig

ATTEMPTS = 10


class Box(NamedTuple):
    """A part of a picture, in the cells that it is stored in (pixels, or latent cells).

    Attributes:
        top, left: of its first cell.
        height, width: of it; both 0 stand for the whole picture.
    """

    top: int = 0
    left: int = 0
    height: int = 0
    width: int = 0


WHOLE = Box()


def center_box(height: int, width: int, aspect: float) -> Box:
    """Returns the largest part of an aspect, width over height, in the middle of a picture."""
    box_height = min(height, max(round(width / aspect), 1))
    box_width = min(width, max(round(height * aspect), 1))
    return Box((height - box_height) // 2, (width - box_width) // 2, box_height, box_width)


def random_box(
    rng: np.random.Generator,
    height: int,
    width: int,
    aspect: float,
    area: tuple[float, float],
    aspects: tuple[float, float],
) -> Box:
    """Draws a part of a picture.

    Args:
        rng: of this draw.
        height: of the picture.
        width: of the picture.
        aspect: width over height, that of what the part will be resized to.
        area: (least, most) share of the picture's area.
        aspects: (least, most) of the part's aspect over `aspect`.

    Returns:
        A part that lies in the picture.
    """
    low, high = np.log(aspects)
    for share, ratio, top, left in rng.random((ATTEMPTS, 4)).tolist():
        cells = height * width * (area[0] + share * (area[1] - area[0]))
        drawn = aspect * float(np.exp(low + ratio * (high - low)))
        box_height, box_width = round((cells / drawn) ** 0.5), round((cells * drawn) ** 0.5)
        if 1 <= box_height <= height and 1 <= box_width <= width:
            return window(height, width, box_height, box_width, top, left)
    return center_box(height, width, aspect)


def window(height: int, width: int, box_height: int, box_width: int, top: float, left: float) -> Box:
    """Returns a part of a given size: of all its places, as far down and right as shares in [0, 1) say."""
    room = height - box_height, width - box_width
    return Box(int(top * (room[0] + 1)), int(left * (room[1] + 1)), box_height, box_width)


def part_of_aspect_kept(
    rng: np.random.Generator, height: int, width: int, data: PackedDataConfig, patch: PatchConfig, resizable: bool
) -> Box | None:
    """Returns the part that a sample is whose aspect is its picture's.

    Args:
        rng: draws it where `data.crop` is `random`.
        height: of the stored picture.
        width: of it.
        data: says what is taken.
        patch: of the model.
        resizable: whether the part may be resized; else its sides are multiples of the patch's, in the middle of what
            would be taken otherwise.

    Returns:
        The part; None where it is smaller than a patch and cannot be resized.
    """
    box = Box(0, 0, height, width)
    if data.crop == "random":
        box = random_box(rng, height, width, width / height, data.crop_area, data.crop_aspect)
    if resizable:
        return WHOLE if box == (0, 0, height, width) else box
    _, ph, pw = patch.size
    inner = box.height // ph * ph, box.width // pw * pw
    if min(inner) == 0:
        return None
    return Box(box.top + (box.height - inner[0]) // 2, box.left + (box.width - inner[1]) // 2, *inner)


def part_of_size(
    rng: np.random.Generator,
    height: int,
    width: int,
    size: tuple[int, int],
    data: PackedDataConfig,
    resizable: bool,
) -> Box | None:
    """Returns the part that a sample of a given size is.

    Args:
        rng: draws it where `data.crop` is `random`.
        height: of the stored picture.
        width: of it.
        size: (height, width) of the sample.
        data: says what is taken.
        resizable: whether the part is resized to the sample's size; else it is a window of that size.

    Returns:
        The part; None where there is no such window, or `data.crop` is `none` and the picture has another size.
    """
    if resizable and data.crop == "none":
        return WHOLE
    if resizable:
        aspect = size[1] / size[0]
        if data.crop == "center":
            return center_box(height, width, aspect)
        return random_box(rng, height, width, aspect, data.crop_area, data.crop_aspect)
    if height < size[0] or width < size[1] or (data.crop == "none" and (height, width) != size):
        return None
    if data.crop == "random":
        return window(height, width, *size, *rng.random(2).tolist())
    return Box((height - size[0]) // 2, (width - size[1]) // 2, *size)
