"""Inception v3 as the Frechet Inception Distance has it: TensorFlow's graph of 2015-12-05.

The network of arXiv:1512.00567 as it was ported to PyTorch (mseitzer/pytorch-fid), whose weights file
`experiments/convert_checkpoint.py inception` reads. It differs from torchvision's Inception v3: average pools count no
padding, the last block has a maximum pool, and there are 1008 classes. For inference only: batch norms are folded into
the convolutions before them, so every convolution has a bias. Layers have torchvision's names.

How images become its input is part of a score, and the evaluators differ; none of these filters before it shrinks:

- `tensorflow`: ResizeBilinear of TensorFlow 1, in which pixel i of 299 is at i size / 299 (not its centre), then
  (x - 128) / 128. So do the graph itself, and with it TTUR and guided-diffusion's evaluator: the papers' numbers.
- `pytorch`: bilinear between the centres of pixels (align_corners=False), then 2 x / 255 - 1. So does pytorch-fid.

clean-fid (arXiv:2104.11222) resizes bicubically with a filter and is not offered.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from sora_jax.array_types import Array, Float, PyTree, Shaped
from sora_jax.models.weights import WEIGHTS_FILE, check_shapes, read_params

IMAGE_SIZE = 299
FEATURE_DIM = 2048
NUM_CLASSES = 1008
SPATIAL_CHANNELS = 7
SPATIAL_DIM = 17 * 17 * SPATIAL_CHANNELS  # 2023
SMALLEST_SIZE = 75  # of the network's input, below which the last block has no pixel left
Convention = Literal["tensorflow", "pytorch"]


class InceptionOutputs(NamedTuple):
    """What scores are made of.

    Attributes:
        pool: (N, 2048), means over the pixels of the last block; FID, precision and recall.
        spatial: (N, 2023) for inputs of 299 x 299, the first 7 channels of the block `mixed_6` of TensorFlow's graph
            (torchvision's `Mixed_6d`), 17 x 17 pixels in raster order; sFID (arXiv:2103.03841).
        logits: (N, 1008), without the classifier's bias, as the Inception Score has been computed since
            arXiv:1606.03498's own code.
    """

    pool: Float[Array, "batch features"]
    spatial: Float[Array, "batch cells"]
    logits: Float[Array, "batch classes"]


class FIDInception(nn.Module):
    """Images to features and logits, in float32 at the highest precision of the device."""

    @nn.compact
    def __call__(self, images: Float[Array, "batch height width 3"]) -> InceptionOutputs:
        """Returns the outputs.

        Args:
            images: (N, H, W, 3) float32 in about [-1, 1], of 299 x 299 (`prepare`); `SMALLEST_SIZE` at least.

        Raises:
            ValueError: smaller images.
        """
        if min(images.shape[1:3]) < SMALLEST_SIZE:
            raise ValueError(f"images must be at least {SMALLEST_SIZE} pixels high and wide, got {images.shape[1:3]}.")
        x = Conv(32, (3, 3), stride=2, padding="VALID", name="Conv2d_1a_3x3")(images)
        x = Conv(32, (3, 3), padding="VALID", name="Conv2d_2a_3x3")(x)
        x = Conv(64, (3, 3), name="Conv2d_2b_3x3")(x)
        x = nn.max_pool(x, (3, 3), (2, 2))
        x = Conv(80, (1, 1), name="Conv2d_3b_1x1")(x)
        x = Conv(192, (3, 3), padding="VALID", name="Conv2d_4a_3x3")(x)
        x = nn.max_pool(x, (3, 3), (2, 2))  # (N, 35, 35, 192)
        for name, pool_width in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
            x = BlockA(pool_width, name=name)(x)  # (N, 35, 35, 256), then 288
        x = BlockB(name="Mixed_6a")(x)  # (N, 17, 17, 768)
        x = BlockC(128, name="Mixed_6b")(x)
        x = BlockC(160, name="Mixed_6c")(x)
        x = BlockC(160, name="Mixed_6d")(x)
        spatial = x[..., :SPATIAL_CHANNELS].reshape(len(x), -1)
        x = BlockC(192, name="Mixed_6e")(x)
        x = BlockD(name="Mixed_7a")(x)  # (N, 8, 8, 1280)
        x = BlockE(_average_pool, name="Mixed_7b")(x)  # (N, 8, 8, 2048)
        x = BlockE(_max_pool, name="Mixed_7c")(x)
        pool = x.mean(axis=(1, 2))
        logits = nn.Dense(NUM_CLASSES, use_bias=False, precision="highest", name="fc")(pool)
        return InceptionOutputs(pool, spatial, logits)


class Conv(nn.Module):
    """A convolution and ReLU; the batch norm between them is folded into its kernel and bias."""

    width: int
    kernel: tuple[int, int]
    stride: int = 1
    padding: str = "SAME"

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width in"]) -> Float[Array, "batch h w out"]:
        """Returns (N, h, w, width)."""
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (*self.kernel, x.shape[-1], self.width))
        bias = self.param("bias", nn.initializers.zeros_init(), (self.width,))
        strides = (self.stride, self.stride)
        x = jax.lax.conv_general_dilated(
            x, kernel, strides, self.padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), precision="highest"
        )
        return nn.relu(x + bias)


class BlockA(nn.Module):
    """1x1, 5x5, two 3x3 and pooled (arXiv:1512.00567, Fig. 5)."""

    pool_width: int

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width in"]) -> Float[Array, "batch height width out"]:
        """Returns (N, H, W, 224 + pool_width)."""
        five = Conv(48, (1, 1), name="branch5x5_1")(x)
        three = Conv(64, (1, 1), name="branch3x3dbl_1")(x)
        three = Conv(96, (3, 3), name="branch3x3dbl_2")(three)
        branches = [
            Conv(64, (1, 1), name="branch1x1")(x),
            Conv(64, (5, 5), name="branch5x5_2")(five),
            Conv(96, (3, 3), name="branch3x3dbl_3")(three),
            Conv(self.pool_width, (1, 1), name="branch_pool")(_average_pool(x)),
        ]
        return jnp.concatenate(branches, axis=-1)


class BlockB(nn.Module):
    """Halves the grid of the A blocks (arXiv:1512.00567, Fig. 10)."""

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width in"]) -> Float[Array, "batch h w out"]:
        """Returns (N, h, w, in + 480)."""
        three = Conv(64, (1, 1), name="branch3x3dbl_1")(x)
        three = Conv(96, (3, 3), name="branch3x3dbl_2")(three)
        branches = [
            Conv(384, (3, 3), stride=2, padding="VALID", name="branch3x3")(x),
            Conv(96, (3, 3), stride=2, padding="VALID", name="branch3x3dbl_3")(three),
            nn.max_pool(x, (3, 3), (2, 2)),
        ]
        return jnp.concatenate(branches, axis=-1)


class BlockC(nn.Module):
    """7x7 as 1x7 and 7x1, once and twice (arXiv:1512.00567, Fig. 6).

    Attributes:
        width: of what lies between.
    """

    width: int

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width in"]) -> Float[Array, "batch height width 768"]:
        """Returns (N, H, W, 768)."""
        seven = Conv(self.width, (1, 1), name="branch7x7_1")(x)
        seven = Conv(self.width, (1, 7), name="branch7x7_2")(seven)
        twice = Conv(self.width, (1, 1), name="branch7x7dbl_1")(x)
        for number, kernel in ((2, (7, 1)), (3, (1, 7)), (4, (7, 1))):
            twice = Conv(self.width, kernel, name=f"branch7x7dbl_{number}")(twice)
        branches = [
            Conv(192, (1, 1), name="branch1x1")(x),
            Conv(192, (7, 1), name="branch7x7_3")(seven),
            Conv(192, (1, 7), name="branch7x7dbl_5")(twice),
            Conv(192, (1, 1), name="branch_pool")(_average_pool(x)),
        ]
        return jnp.concatenate(branches, axis=-1)


class BlockD(nn.Module):
    """Halves the grid of the C blocks."""

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width in"]) -> Float[Array, "batch h w out"]:
        """Returns (N, h, w, in + 512)."""
        three = Conv(192, (1, 1), name="branch3x3_1")(x)
        seven = Conv(192, (1, 1), name="branch7x7x3_1")(x)
        seven = Conv(192, (1, 7), name="branch7x7x3_2")(seven)
        seven = Conv(192, (7, 1), name="branch7x7x3_3")(seven)
        branches = [
            Conv(320, (3, 3), stride=2, padding="VALID", name="branch3x3_2")(three),
            Conv(192, (3, 3), stride=2, padding="VALID", name="branch7x7x3_4")(seven),
            nn.max_pool(x, (3, 3), (2, 2)),
        ]
        return jnp.concatenate(branches, axis=-1)


class BlockE(nn.Module):
    """3x3 as 1x3 beside 3x1 (arXiv:1512.00567, Fig. 7).

    Attributes:
        pool: 3x3 and of stride 1; an average in the first of these blocks and a maximum in the second.
    """

    pool: Callable[[Array], Array]

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width in"]) -> Float[Array, "batch height width 2048"]:
        """Returns (N, H, W, 2048)."""
        three = Conv(384, (1, 1), name="branch3x3_1")(x)
        twice = Conv(448, (1, 1), name="branch3x3dbl_1")(x)
        twice = Conv(384, (3, 3), name="branch3x3dbl_2")(twice)
        branches = [
            Conv(320, (1, 1), name="branch1x1")(x),
            Conv(384, (1, 3), name="branch3x3_2a")(three),
            Conv(384, (3, 1), name="branch3x3_2b")(three),
            Conv(384, (1, 3), name="branch3x3dbl_3a")(twice),
            Conv(384, (3, 1), name="branch3x3dbl_3b")(twice),
            Conv(192, (1, 1), name="branch_pool")(self.pool(x)),
        ]
        return jnp.concatenate(branches, axis=-1)


def prepare(
    images: Shaped[Array, "batch height width 3"], convention: Convention = "tensorflow"
) -> Float[Array, "batch 299 299 3"]:
    """Returns the network's input, (N, 299, 299, 3) float32.

    Args:
        images: (N, H, W, 3), values 0 ... 255.
        convention: of the resizing and of the range (see the module).
    """
    x = jnp.asarray(images, jnp.float32)
    for axis in (1, 2):
        x = _resize(x, axis, convention)
    return (x - 128) / 128 if convention == "tensorflow" else x * (2 / 255) - 1


def load_inception(path: epath.PathLike) -> PyTree:
    """Returns the params of `FIDInception` from a directory that `convert_checkpoint.py inception` wrote.

    Raises:
        FileNotFoundError: no such file in it.
        ValueError: a file of another network; the message names it.
    """
    file = epath.Path(path) / WEIGHTS_FILE
    if not file.is_file():
        raise FileNotFoundError(f"no Inception at {path}: {WEIGHTS_FILE} is missing (convert_checkpoint.py inception).")
    params = read_params(file)
    check_shapes(params, abstract_params(), str(file))
    return params


@functools.cache
def abstract_params() -> PyTree:
    """Returns the shapes of the params of `FIDInception`."""
    images = jnp.zeros((1, SMALLEST_SIZE, SMALLEST_SIZE, 3))
    return jax.eval_shape(lambda: FIDInception().init(jax.random.key(0), images))["params"]


def _average_pool(x: Array) -> Array:
    """Returns the means of 3 x 3 pixels; at the edges of those that there are."""
    return nn.avg_pool(x, (3, 3), padding="SAME", count_include_pad=False)


def _max_pool(x: Array) -> Array:
    """Returns the maxima of 3 x 3 pixels."""
    return nn.max_pool(x, (3, 3), padding="SAME")


def _resize(x: Array, axis: int, convention: Convention) -> Array:
    """Returns `x` with `axis` interpolated linearly to `IMAGE_SIZE`."""
    size = x.shape[axis]
    places = np.arange(IMAGE_SIZE, dtype=np.float32) * np.float32(size / IMAGE_SIZE)
    if convention == "pytorch":
        places = np.maximum((np.arange(IMAGE_SIZE) + 0.5) * (size / IMAGE_SIZE) - 0.5, 0).astype(np.float32)
    below = np.minimum(places.astype(int), size - 1)
    above = np.minimum(below + 1, size - 1)
    weight = np.expand_dims(places - below, [n for n in range(x.ndim) if n != axis])
    low, high = jnp.take(x, below, axis), jnp.take(x, above, axis)
    return low + (high - low) * weight
