"""Encodes and decodes large images tile by tile, to the numbers that the whole image would give.

Tiles that are encoded or decoded alone and blended differ from the whole everywhere, not at their seams alone: every
group norm takes its moments over the image it is given, and the mid block attends to all of it. Here a tile is not an
image of its own. The network is cut along its depth into segments of one residual block each, with the convolution
that comes before it (the first, or one that resamples) or behind it (the last), and each segment runs over all tiles of
its input before the next one begins:

    (1)  a pass over the tiles for each norm of a segment merges the norm's moments over the image: the means m and
         sums of squares s of n_a values and n_b others make  m = m_a + (m_b - m_a) n_b / (n_a + n_b),
         s = s_a + s_b + (m_b - m_a)^2 n_a n_b / (n_a + n_b)  (Chan, Golub and LeVeque 1979, Eq. 2.1)
    (2)  a last pass, with all moments known, writes the segment's output

A tile overlaps its neighbours by the reach of its convolutions, and of what it gives only the part is kept that does
not know of the cut. Where the image ends, the tile ends too, and the convolutions pad as they do there. So nothing is
blended, and the seams are exact as well: results differ from the whole's by rounding. The mid block runs whole, at the
size of the latents, with attention a few rows at a time.

A norm's pass computes no more than what comes before the norm. With Stable Diffusion's decoder and tiles of 128 all
passes and overlaps multiply 2.1 times as much as the whole does. Held at once are a segment's input, its output and
what belongs to one tile: of that decoder at most 2 x 128 values a pixel. At 2048 x 2048 XLA plans 4.1 GiB beside the
weights (on a CPU, in float32), where the whole takes 14.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

from sora_jax.array_types import Array, Float, PyTree
from sora_jax.models.autoencoder.image_vae import (
    Downsample,
    ImageVAEConfig,
    Out,
    ResidualBlock,
    Upsample,
    check_image_shape,
    check_latent_shape,
    decoder_layers,
    encoder_layers,
    to_posterior,
)
from sora_jax.models.autoencoder.protocol import Posterior

TILE = 128
"""Side of a tile of a segment's input, where no other is asked for."""

_REACH = 3  # 3x3 convolutions of a segment, at most; all but one that resamples lie at its output's resolution


def tiled_decode(
    config: ImageVAEConfig, params: PyTree, z: Float[Array, "batch height width latent"], tile: int = TILE
) -> Float[Array, "batch image_height image_width channels"]:
    """Computes `ImageVAE.decode` in little memory.

    Args:
        config: of the model.
        params: of the model.
        z: (B, h, w, latent_channels), unscaled latents.
        tile: side of the tiles that every segment's input is cut into, in its own cells; even, at least 16.

    Returns:
        (B, h s, w s, channels) float32.

    Raises:
        ValueError: latents of another shape, or a tile that cannot be.
    """
    check_latent_shape(z.shape, config)
    layers = decoder_layers(config)
    first = 1 + _index(layers, "mid_block_1")
    x = _whole(layers[:first], params["decoder"], z)
    return _tiled(layers[first:], params["decoder"], x, tile)


def tiled_encode(
    config: ImageVAEConfig, params: PyTree, x: Float[Array, "batch height width channels"], tile: int = TILE
) -> Posterior:
    """Computes `ImageVAE.encode` in little memory.

    Args:
        config: of the model.
        params: of the model.
        x: (B, H, W, channels), values in [-1, 1].
        tile: as of `tiled_decode`.

    Returns:
        The posterior over (B, H / s, W / s, latent_channels) unscaled latents.

    Raises:
        ValueError: images of another shape, or a tile that cannot be.
    """
    check_image_shape(x.shape, config)
    layers = encoder_layers(config)
    mid = _index(layers, "mid_block_0")
    h = _tiled(layers[:mid], params["encoder"], x, tile)
    return to_posterior(_whole(layers[mid:], params["encoder"], h))


def _index(layers: Sequence[nn.Module], name: str) -> int:
    return [layer.name for layer in layers].index(name)


def _whole(layers: Sequence[nn.Module], params: PyTree, x: Array) -> Array:
    """Returns what layers give of the whole image."""
    for layer in layers:
        x = layer.apply({"params": params[layer.name]}, x)
    return x


def _tiled(layers: Sequence[nn.Module], params: PyTree, x: Array, tile: int) -> Array:
    """Returns what layers give of an image that is cut into tiles."""
    if tile < 16 or tile % 2:
        raise ValueError(f"tile must be even and at least 16, got {tile}.")
    for segment in _segments(layers):
        x = _tiled_segment(segment, params, x, tile)
    return x


def _segments(layers: Sequence[nn.Module]) -> list[list[nn.Module]]:
    """Cuts a list of layers: a residual block each, with the convolutions before it; the last has `Out`."""
    segments: list[list[nn.Module]] = []
    for layer in layers:
        waits = segments and not any(isinstance(other, ResidualBlock) for other in segments[-1])
        if waits or isinstance(layer, Out):
            segments[-1].append(layer)
        else:
            segments.append([layer])
    return segments


class _Grid:
    """Where the tiles of an image lie.

    Their kept parts share the image out; a tile that would reach beyond the image is moved inward.

    Args:
        size: (height, width) of the image.
        tile: side of a tile.
        halo: width of the border that is not kept.
    """

    def __init__(self, size: tuple[int, int], tile: int, halo: int):
        self.size, self.halo = size, halo
        self.tile = tuple(min(tile, n) for n in size)
        self.step = tuple(n if n <= tile else tile - 2 * halo for n in size)
        self.counts = tuple(-(-n // step) for n, step in zip(size, self.step, strict=True))

    def place(self, index: Array) -> tuple[list[Array], list[Array]]:
        """Returns the first row and column of a tile, and of its kept part."""
        kept = [n * step for n, step in zip(divmod(index, self.counts[1]), self.step, strict=True)]
        starts = [jnp.clip(k - self.halo, 0, n - t) for k, n, t in zip(kept, self.size, self.tile, strict=True)]
        return starts, kept

    def mask(self, index: Array, up: int, down: int) -> Array:
        """Returns (1, rows, columns, 1) bool: what of a tile is kept, after it was resampled by `up / down`."""
        sides = []
        for start, kept, step, tile in zip(*self.place(index), self.step, self.tile, strict=True):
            cell = start * up // down + jnp.arange(tile * up // down)
            sides.append((cell >= kept * up // down) & (cell < (kept + step) * up // down))
        return (sides[0][:, None] & sides[1])[None, :, :, None]


def _tiled_segment(layers: Sequence[nn.Module], params: PyTree, x: Array, tile: int) -> Array:
    """Returns what a segment gives of `x`: (1) for each of its norms in order, then (2)."""
    up = 2 if any(isinstance(layer, Upsample) for layer in layers) else 1
    down = 2 if any(isinstance(layer, Downsample) for layer in layers) else 1
    grid = _Grid(x.shape[1:3], tile, -(-_REACH // up) * down)
    num_tiles = grid.counts[0] * grid.counts[1]
    norms = [(layer.name, norm) for layer in layers for norm in getattr(layer, "NORMS", ())]
    moments: dict[str, dict[str, Any]] = {layer.name: {} for layer in layers}

    def run(index: Array) -> tuple[Array, dict[str, Any]]:
        """Returns a tile's output and the inputs of its norms. What is not used of them is not computed."""
        starts, _ = grid.place(index)
        h, inputs = lax.dynamic_slice(x, (0, *starts, 0), (x.shape[0], *grid.tile, x.shape[-1])), {}
        for layer in layers:
            variables = {"params": params[layer.name], "moments": moments[layer.name]}
            h, state = layer.apply(variables, h, mutable=["intermediates"])
            inputs[layer.name] = state.get("intermediates", {})
        return h, inputs

    def mask_of(index: Array, part: Array) -> Array:
        """Returns the mask of a tile at the resolution of one of its arrays."""
        larger = part.shape[1] > grid.tile[0]
        return grid.mask(index, up if larger else 1, down if part.shape[1] < grid.tile[0] else 1)

    for layer, norm in norms:

        def norm_input(index: Array, layer: str = layer, norm: str = norm) -> tuple[Array, Array]:
            (part,) = run(index)[1][layer][norm]["input"]
            return part, mask_of(index, part)

        num_groups = next(other.config.num_groups for other in layers if other.name == layer)
        moments[layer][norm] = _image_moments(norm_input, num_tiles, x.shape[0], num_groups)

    def write(index: Array, out: Array) -> Array:
        h, _ = run(index)
        starts, _ = grid.place(index)
        starts = (0, *(start * up // down for start in starts), 0)
        there = lax.dynamic_slice(out, starts, h.shape)
        return lax.dynamic_update_slice(out, jnp.where(mask_of(index, h), h, there), starts)

    tile_out = jax.eval_shape(run, jnp.int32(0))[0]
    shape = (x.shape[0], *(n * up // down for n in x.shape[1:3]), tile_out.shape[-1])
    # All of it is written over; that it depends on `x` keeps XLA from making every segment's output at the beginning.
    empty = jnp.full(shape, x[0, 0, 0, 0], tile_out.dtype)
    return lax.fori_loop(0, num_tiles, write, empty)


def _image_moments(
    norm_input: Callable[[Array], tuple[Array, Array]], num_tiles: int, batch: int, num_groups: int
) -> dict[str, Array]:
    """Merges moments over an image (equation 1).

    Args:
        norm_input: from the number of a tile to what a norm takes of it, and a mask of what counts of that.
        num_tiles: of the image.
        batch: images.
        num_groups: of the norm.

    Returns:
        `mean` and `var` of each image's groups, (B, groups) float32.
    """

    def merge(index: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        count, mean, squares = carry
        part, mask = norm_input(index)
        groups = part.astype(jnp.float32).reshape(*part.shape[:3], num_groups, -1)
        weights = mask[..., None].astype(jnp.float32)
        added = weights.sum() * groups.shape[-1]
        tile_mean = (groups * weights).sum((1, 2, 4)) / added  # (B, groups)
        deviation = (groups - tile_mean[:, None, None, :, None]) * weights
        total, change = count + added, tile_mean - mean
        squares = squares + jnp.square(deviation).sum((1, 2, 4)) + jnp.square(change) * (count * (added / total))
        return total, mean + change * (added / total), squares

    zeros = jnp.zeros((batch, num_groups), jnp.float32)
    count, mean, squares = lax.fori_loop(0, num_tiles, merge, (jnp.float32(0), zeros, zeros))
    return {"mean": mean, "var": squares / count}
