"""Dead leaves: images of discs that fall on each other, drawn without end and without a file.

Discs of radius r, of density p(r) ~ r^-3 between two bounds, fall on the plane at uniform places. What is seen from
above once the plane is covered is the dead leaves model (Lee, Mumford and Huang, IJCV 2001), which scales like natural
images; arXiv:1503.03585 trains on it (section 3.2.3). With gamma(h) the measure of the discs that cover two points at
distance h:

(1)  gamma(h) ~ int p(r) A_r(h) dr,   A_r(h) = 2 r^2 acos(h / 2r) - h / 2 sqrt(4 r^2 - h^2) where h < 2r, else 0
(2)  P(both points show the same disc) = gamma(h) / (2 gamma(0) - gamma(h))
(3)  image = sqrt(3 (1 - noise^2)) u + noise eps,   u ~ U(-1, 1) a disc, eps ~ N(0, 1) a pixel

By (3) every pixel has mean 0 and variance 1 by construction, nothing is taken from a batch, and the covariance of two
pixels is (1 - noise^2) times (2). Without the noise the pixels of one disc would be equal, and the image have no
density. Seen from above the first disc of the falling order comes last: drawing from the front, until every pixel is
covered, draws the stationary model exactly (Kendall and Thoennes, 1999).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import ClassVar

import numpy as np

from sora_jax.array_types import Float
from sora_jax.config import BatchConfig, check
from sora_jax.data.examples import Draw, Values, from_images

_CHUNK = 4096  # images drawn together: their masks stay in the cache


@dataclasses.dataclass(frozen=True)
class DeadLeavesConfig(BatchConfig):
    """Images of the dead leaves model (`sora_jax.data.dead_leaves`), made once.

    Attributes:
        size: of the square images, in pixels.
        radii: (smallest, largest) of the discs, in pixels.
        pixel_noise: standard deviation of the noise of each pixel, where that of the image is 1.
        num_images: that are trained on.
        image_seed: of the images.
    """

    kind: ClassVar[str] = "dead_leaves"
    values: ClassVar[Values] = "numbers"

    eval_splits: tuple[str, ...] = ("held_out",)
    size: int = 16
    radii: tuple[float, float] = (2.0, 16.0)
    pixel_noise: float = 0.05
    num_images: int = 20_000
    image_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.size >= 1, self, "size", "at least 1")
        pixels = self.size**2
        check(self.num_images > pixels, self, "num_images", f"more than an image's {pixels} pixels, for the Gaussian")
        check(self.image_seed >= 0, self, "image_seed", "at least 0")
        low, high = self.radii
        check(0 < low < high < math.inf, self, "radii", "(smallest, largest), finite, with 0 < smallest < largest")
        check(0 < self.pixel_noise < 1, self, "pixel_noise", "between 0 and 1")

    @property
    def shape(self) -> tuple[int, ...]:
        """Of an example."""
        return (self.size, self.size, 1)

    def images(self, split: str, count: int | None = None) -> Float[np.ndarray, "images size size 1"]:
        """Returns the images of a split, each time the same array; any but `train` is a set of its own.

        Args:
            split: its name.
            count: of images (default: `num_images`).
        """
        return _images(self, split, self.num_images if count is None else count)

    def source(self, split: str) -> Draw:
        """Returns what draws images of a split with replacement."""
        return from_images(self.images(split))

    def held_out(self, count: int, seed: int) -> Float[np.ndarray, "count size size 1"]:
        """Returns images that a model is scored on; `image_seed` draws them."""
        del seed
        return self.images(self.eval_splits[0], count)

    def log_density(self, x: Float[np.ndarray, "count size size 1"]) -> None:
        """Returns None: it is not known."""

    def facts(self) -> dict[str, float]:
        """Returns what a report says of the data."""
        return {
            "size": self.size,
            "smallest_radius": self.radii[0],
            "largest_radius": self.radii[1],
            "pixel_noise": self.pixel_noise,
            "num_images": self.num_images,
        }


@functools.lru_cache(maxsize=4)
def _images(config: DeadLeavesConfig, split: str, count: int) -> Float[np.ndarray, "images size size 1"]:
    """Returns what `DeadLeavesConfig.images` does."""
    rng = np.random.default_rng((config.image_seed, *split.encode()))
    return dead_leaves(rng, count, config.size, radii=config.radii, noise=config.pixel_noise)


def dead_leaves(
    rng: np.random.Generator,
    count: int,
    size: int,
    *,
    radii: tuple[float, float] = (2.0, 16.0),
    noise: float = 0.05,
) -> Float[np.ndarray, "count size size 1"]:
    """Returns independent images of the dead leaves model, normalised by equation 3.

    The cost is proportional to the discs that an image takes, which is why r_min must not be small beside a pixel.

    Args:
        rng: what is drawn from.
        count: number of images.
        size: height and width, in pixels. A pixel shows the foremost disc that covers its centre.
        radii: (r_min, r_max), in pixels, r_min < r_max.
        noise: standard deviation of the pixel noise, in [0, 1): a share of the image's standard deviation, 1.

    Returns:
        (count, size, size, 1) float32 of mean 0 and variance 1.

    Raises:
        ValueError: a size, count, radius or noise out of range.
    """
    low, high = radii
    if count < 0 or size < 1:
        raise ValueError(f"count must be at least 0 and size at least 1, got count = {count}, size = {size}.")
    if not 0 < low < high < math.inf:
        raise ValueError(f"radii must be (r_min, r_max) with 0 < r_min < r_max, got {radii}.")
    if not 0 <= noise < 1:
        raise ValueError(f"noise must be at least 0 and below 1, got {noise}.")
    images = np.empty((count, size, size), np.float32)
    for start in range(0, count, _CHUNK):
        images[start : start + _CHUNK] = _leaves(rng, min(_CHUNK, count - start), size, low, high)
    images *= math.sqrt(3 * (1 - noise**2))
    images += noise * rng.standard_normal(images.shape, np.float32)
    return images[..., None]


def _leaves(rng: np.random.Generator, count: int, size: int, low: float, high: float) -> Float[np.ndarray, "n s s"]:
    """Returns (count, size, size) grey levels in (-1, 1): each disc's own, from the front until all is covered."""
    places = np.arange(size, dtype=np.float32)
    images = np.zeros((count, size, size), np.float32)
    active, bare = np.arange(count), np.ones((count, size, size), bool)  # images with pixels that no disc covers yet
    while len(active):
        n = len(active)
        radius = _touching_radii(rng, n, size - 1, low, high)
        y, x = rng.uniform(-radius, size - 1 + radius, (2, n))  # a disc whose centre lies farther out touches nothing
        up = (places - y[:, None].astype(np.float32)) ** 2  # (n, size)
        across = (places - x[:, None].astype(np.float32)) ** 2
        inside = up[:, :, None] + across[:, None] <= (radius**2).astype(np.float32)[:, None, None]
        fresh = inside & bare
        images[active] += fresh * rng.uniform(-1, 1, n).astype(np.float32)[:, None, None]
        bare &= ~inside
        left = bare.any(axis=(1, 2))
        if not left.all():
            active, bare = active[left], bare[left]
    return images


def _touching_radii(rng: np.random.Generator, count: int, side: float, low: float, high: float) -> np.ndarray:
    """Returns (count,) radii of discs that are centred on a square of side `side` or within r of it (in each axis).

    More of the large discs than of the small ones come near, so the density is that of radii times the area of their
    centres, r^-3 (side + 2r)^2 = side^2 r^-3 + 4 side r^-2 + 4 r^-1: three power laws, each by inversion.
    """
    cubic = side**2 * (low**-2 - high**-2) / 2
    square = 4 * side * (1 / low - 1 / high)
    logarithmic = 4 * math.log(high / low)
    which = rng.uniform(0, cubic + square + logarithmic, count)
    u = rng.uniform(size=count)
    by_cubic = (low**-2 + u * (high**-2 - low**-2)) ** -0.5
    by_square = 1 / (1 / low + u * (1 / high - 1 / low))
    by_logarithm = low * (high / low) ** u
    return np.where(which < cubic, by_cubic, np.where(which < cubic + square, by_square, by_logarithm))
