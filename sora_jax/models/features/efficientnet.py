"""EfficientNet-Lite0, the feature network of the offline metrics.

EfficientNet-B0 (arXiv:1905.11946) without squeeze-and-excitation, with ReLU6 and a stem and head of fixed width
(tensorflow/tpu, models/official/efficientnet/lite). For inference only: batch norms are folded into the convolutions
before them, so every convolution has a bias. Padding is TensorFlow's SAME. Metrics made of its features carry its
name: they are not comparable with those of Inception.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from sora_jax.array_types import Array, Float, PyTree

IMAGE_SIZE = 224
FEATURE_DIM = 1280


class Stage(NamedTuple):
    """Blocks of one width; the first one strides."""

    num_blocks: int
    kernel: int
    stride: int
    expansion: int
    width: int


STAGES = (
    Stage(1, 3, 1, 1, 16),
    Stage(2, 3, 2, 6, 24),
    Stage(2, 5, 2, 6, 40),
    Stage(3, 3, 2, 6, 80),
    Stage(3, 5, 1, 6, 112),
    Stage(4, 5, 2, 6, 192),
    Stage(1, 3, 1, 6, 320),
)


class EfficientNetLite0(nn.Module):
    """Images to features and ImageNet logits.

    Attributes:
        stages: the inverted-residual blocks.
        stem_width: channels of the stem.
        num_classes: of the classifier.
    """

    stages: tuple[Stage, ...] = STAGES
    stem_width: int = 32
    num_classes: int = 1000

    @nn.compact
    def __call__(
        self, images: Float[Array, "batch height width 3"]
    ) -> tuple[Float[Array, "batch features"], Float[Array, "batch classes"]]:
        """Returns ((N, 1280) features, (N, classes) logits).

        Args:
            images: (N, H, W, 3) float32, (pixel - 127) / 128 for pixels 0 ... 255; trained at 224x224.
        """
        x = nn.relu6(nn.Conv(self.stem_width, (3, 3), (2, 2), name="stem")(images))
        index = 0
        for stage in self.stages:
            for number in range(stage.num_blocks):
                stride = stage.stride if number == 0 else 1
                x = InvertedResidual(stage.kernel, stride, stage.expansion, stage.width, name=f"block_{index}")(x)
                index += 1
        x = nn.relu6(nn.Conv(FEATURE_DIM, (1, 1), name="head")(x))
        features = x.mean(axis=(1, 2))
        return features, nn.Dense(self.num_classes, name="classifier")(features)


class InvertedResidual(nn.Module):
    """Expand, convolve depthwise, project (arXiv:1801.04381, Fig. 3)."""

    kernel: int
    stride: int
    expansion: int
    width: int

    @nn.compact
    def __call__(self, inputs: Float[Array, "batch height width in"]) -> Float[Array, "batch h w out"]:
        """Returns (N, H / stride, W / stride, width)."""
        hidden = inputs.shape[-1] * self.expansion
        x = inputs
        if self.expansion > 1:
            x = nn.relu6(nn.Conv(hidden, (1, 1), name="expand")(x))
        x = nn.relu6(DepthwiseConv(self.kernel, self.stride, name="depthwise")(x))
        x = nn.Conv(self.width, (1, 1), name="project")(x)
        return x + inputs if x.shape == inputs.shape else x


class DepthwiseConv(nn.Module):
    """A convolution of each channel with its own window, as a sum of shifted and scaled images.

    On a CPU this is 3 to 15 times as fast as XLA's grouped convolution, at this network's sizes.
    """

    kernel: int
    stride: int

    @nn.compact
    def __call__(self, x: Float[Array, "batch height width channels"]) -> Float[Array, "batch h w channels"]:
        """Returns (N, ceil(H / stride), ceil(W / stride), C)."""
        k, s = self.kernel, self.stride
        height, width, channels = x.shape[1:]
        weight = self.param("kernel", nn.initializers.lecun_normal(), (k, k, 1, channels))
        out = self.param("bias", nn.initializers.zeros_init(), (channels,))
        x = jnp.pad(x, ((0, 0), *jax.lax.padtype_to_pads((height, width), (k, k), (s, s), "SAME"), (0, 0)))
        rows, columns = ((n - 1) // s * s + 1 for n in (height, width))  # what a window's corner runs over
        for i in range(k):
            for j in range(k):
                out = out + x[:, i : i + rows : s, j : j + columns : s] * weight[i, j, 0]
        return out


def preprocess(frames: Iterable[np.ndarray]) -> Float[np.ndarray, "frames 224 224 3"]:
    """Returns frames as the network's input, (N, 224, 224, 3) float32.

    Args:
        frames: (H, W, 3) uint8 each, of any size; resized bicubically to the square (the aspect is not kept, so that
            nothing is cut away or added).
    """
    resized = [
        np.asarray(Image.fromarray(frame).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BICUBIC))
        for frame in frames
    ]
    return (np.stack(resized).astype(np.float32) - 127.0) / 128.0


def feature_function(params: PyTree, batch_size: int = 16) -> Callable[[list[np.ndarray]], np.ndarray]:
    """Returns a function from uint8 frames (H, W, 3) of any sizes to their features (N, 1280) float32.

    Args:
        params: of `EfficientNetLite0`.
        batch_size: frames per call of the compiled network; the last batch is filled up by repetition.
    """
    network = jax.jit(lambda params, images: EfficientNetLite0().apply({"params": params}, images)[0])

    def features(frames: list[np.ndarray]) -> np.ndarray:
        outputs = [np.zeros((0, FEATURE_DIM), np.float32)]
        for start in range(0, len(frames), batch_size):
            part = list(frames[start : start + batch_size])
            images = preprocess(part + part[-1:] * (batch_size - len(part)))
            outputs.append(np.asarray(network(params, jnp.asarray(images)))[: len(part)])
        return np.concatenate(outputs)

    return features
