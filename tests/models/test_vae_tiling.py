"""Encoding and decoding by tiles: the whole image's numbers, and the memory that it takes."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from PIL import Image

from sora_jax.models.autoencoder.image_vae import (
    ImageVAE,
    ImageVAEConfig,
    abstract_params,
    decoder_layers,
    encoder_layers,
)
from sora_jax.models.autoencoder.tiling import _Grid, _image_moments, _segments, tiled_decode, tiled_encode

pytestmark = pytest.mark.slow

PICTURE = pathlib.Path(__file__).parents[1] / "fixtures" / "fluent_emoji" / "1f30c.webp"
CONFIG = ImageVAEConfig(widths=(4, 8, 8), num_blocks=1, num_groups=4)
TILE = 16


@functools.partial(jax.jit, static_argnums=0)
def whole_encode(config, params, x):
    return ImageVAE(config).apply({"params": params}, x, method="encode")


@functools.partial(jax.jit, static_argnums=0)
def whole_decode(config, params, z):
    return ImageVAE(config).apply({"params": params}, z, method="decode")


tiled_encode_fn = jax.jit(tiled_encode, static_argnums=(0, 3))
tiled_decode_fn = jax.jit(tiled_decode, static_argnums=(0, 3))


@pytest.fixture(scope="module")
def params():
    """Parameters in which nothing is zero."""
    rng = np.random.default_rng(0)

    def draw(leaf):
        scale = 1.2 / np.sqrt(np.prod(leaf.shape[:-1])) if len(leaf.shape) > 1 else 0.3
        return rng.normal(0.2 * (len(leaf.shape) == 1), scale, leaf.shape).astype(np.float32)

    return jax.tree.map(draw, nn.meta.unbox(abstract_params(ImageVAE(CONFIG))))


@pytest.fixture(scope="module")
def pictures():
    """Two crops (2, 60, 76, 3) of a picture, in [-1, 1]."""
    with Image.open(PICTURE) as image:
        pixels = np.asarray(image.convert("RGB").resize((96, 96)), np.float32) / 127.5 - 1
    return np.stack([pixels[:60, :76], pixels[30:90, 10:86]])


def relative_error(found, expected):
    return float(np.abs(found - expected).max() / np.sqrt((np.asarray(expected) ** 2).mean()))


def test_tiled_decode_equals_the_whole_and_so_do_its_seams(params, pictures):
    z = whole_encode(CONFIG, params, pictures).mean  # (2, 15, 19, 4): five tiles of 15 x 19 ... 60 x 76 a side
    whole, tiled = whole_decode(CONFIG, params, z), tiled_decode_fn(CONFIG, params, z, TILE)
    assert tiled.shape == whole.shape == pictures.shape and tiled.dtype == whole.dtype
    assert relative_error(tiled, whole) < 2e-5
    # A tile that is decoded alone, as an image, differs from the whole far from its seam too.
    alone = whole_decode(CONFIG, params, z[:, :12, :12])
    assert relative_error(alone[:, :8, :8], whole[:, :8, :8]) > 1e-2


def test_tiled_encode_equals_the_whole(params, pictures):
    whole, tiled = whole_encode(CONFIG, params, pictures), tiled_encode_fn(CONFIG, params, pictures, TILE)
    assert relative_error(tiled.mean, whole.mean) < 2e-5 and relative_error(tiled.logvar, whole.logvar) < 2e-5
    alone = whole_encode(CONFIG, params, pictures[:, :48, :48])
    assert relative_error(alone.mean[:, :4, :4], whole.mean[:, :4, :4]) > 1e-2


@pytest.mark.parametrize(
    ("size", "tile", "halo"), [((44, 16), 16, 2), ((18, 90), 16, 6), ((7, 5), 16, 3), ((33, 17), 16, 3)]
)
def test_tiles_share_an_image_out(size, tile, halo):
    grid, seen = _Grid(size, tile, halo), np.zeros(size, int)
    for index in range(grid.counts[0] * grid.counts[1]):
        starts, _ = grid.place(jnp.int32(index))
        (top, left), (height, width) = map(int, starts), grid.tile
        mask = np.asarray(grid.mask(jnp.int32(index), 1, 1))[0, :, :, 0]
        assert mask.shape == (height, width) and top + height <= size[0] and left + width <= size[1]
        seen[top : top + height, left : left + width] += mask
        rows, columns = np.nonzero(mask)
        # What is kept lies a halo away from each side of the tile that is not one of the image.
        assert top == 0 or rows.min() >= halo
        assert left == 0 or columns.min() >= halo
        assert top + height == size[0] or rows.max() < height - halo
        assert left + width == size[1] or columns.max() < width - halo
    assert (seen == 1).all()


def test_moments_are_those_of_numpy_where_a_mean_is_large():
    x = np.random.default_rng(0).normal(300, 0.5, (2, 6, 9, 8)).astype(np.float32)  # 3 tiles of 6 x 3, 5 columns wide
    tiles = jnp.stack([jnp.pad(x, ((0, 0), (0, 0), (1, 1), (0, 0)))[:, :, i : i + 5] for i in (0, 3, 6)])
    mask = jnp.broadcast_to(jnp.array([False, True, True, True, False])[None, None, :, None], (1, 6, 5, 1))
    found = _image_moments(lambda i: (tiles[i], mask), 3, 2, 4)
    groups = x.astype(np.float64).reshape(2, 54, 4, 2)
    np.testing.assert_allclose(found["mean"], groups.mean((1, 3)), rtol=1e-6)
    np.testing.assert_allclose(found["var"], groups.var((1, 3)), rtol=1e-4)


def test_segments_hold_every_layer_once():
    for layers in (encoder_layers(CONFIG)[:-5], decoder_layers(CONFIG)[5:]):
        segments = _segments(layers)
        assert [layer.name for segment in segments for layer in segment] == [layer.name for layer in layers]
        assert all(sum("block" in layer.name for layer in segment) == 1 for segment in segments)


def test_tiles_and_shapes_that_cannot_be_are_named(params):
    z = np.zeros((1, 8, 8, 4), np.float32)
    for tile in (14, 17):
        with pytest.raises(ValueError, match=f"tile must be even and at least 16, got {tile}"):
            tiled_decode(CONFIG, params, z, tile)
    with pytest.raises(ValueError, match=r"z must be \(B, h, w, 4\), got shape \(1, 8, 8, 3\)"):
        tiled_decode(CONFIG, params, z[..., :3])
    with pytest.raises(ValueError, match=r"multiples of 4, got shape \(1, 8, 6, 3\)"):
        tiled_encode(CONFIG, params, np.zeros((1, 8, 6, 3), np.float32))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_coding_2048_x_2048_fits(dtype):
    """By the CPU compiler's plan, beside the weights; it keeps bfloat16 as float32. Decoded whole: 14 and 12 GiB."""
    config = ImageVAEConfig(dtype=dtype)
    params = nn.meta.unbox(abstract_params(ImageVAE(config)))
    for function, shape in ((tiled_decode, (1, 256, 256, 4)), (tiled_encode, (1, 2048, 2048, 3))):
        x = jax.ShapeDtypeStruct(shape, jnp.float32)
        memory = jax.jit(functools.partial(function, config)).lower(params, x).compile().memory_analysis()
        gibibytes = (memory.temp_size_in_bytes + memory.output_size_in_bytes) / 2**30
        print(f"{function.__name__}, {dtype}: {gibibytes:.2f} GiB")
        assert gibibytes < 4.25
