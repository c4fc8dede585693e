"""What makes values on a (t, y, x) grid of a clip, and a clip of them: nothing for pixels, an autoencoder for latents.

A clip is (T, H, W, channels) with values in [-1, 1], an image a clip of one frame; a batch of clips has an axis more in
front. Latents are scaled: a diffusion model sees `scale` times what the autoencoder's posterior gives, and what it
makes is divided by it before it is decoded.

`ImageCodec` takes a clip for a stack of frames. Frames are encoded and decoded a few at a time, as many as
`MOST_PIXELS` hold together, and a frame of more than these by tiles (`sora_jax.models.autoencoder.tiling`): so what it
takes of a device's memory is bounded, whatever the duration and the size.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from sora_jax.array_types import Array, Float, NumpyArray, PyTree
from sora_jax.models.autoencoder.image_vae import ImageVAE, ImageVAEConfig
from sora_jax.models.autoencoder.protocol import Posterior
from sora_jax.models.autoencoder.tiling import TILE, tiled_decode, tiled_encode

MOST_PIXELS = 1024 * 1024
"""Pixels that a device encodes or decodes at once without tiles, of one frame or of several."""


@runtime_checkable
class Codec(Protocol):
    """Clips to latents and back.

    Attributes:
        kind: its name in files: `identity`, `image`.
        channels: values of a latent cell.
        strides: (t, h, w), frames and pixels that a latent cell stands for.
        scale: a diffusion model sees the autoencoder's latents times this number.
    """

    kind: str

    @property
    def channels(self) -> int: ...  # noqa: D102

    @property
    def strides(self) -> tuple[int, int, int]: ...  # noqa: D102

    @property
    def scale(self) -> float: ...  # noqa: D102

    def valid_frames(self, num_frames: int) -> int:
        """Returns the largest number of frames, at most `num_frames`, that a clip may have."""
        ...

    def latent_size(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Returns (t, h, w) of the latents of a clip; ValueError for a clip that it does not take."""
        ...

    def encode(
        self, clip: Float[Array, "*batch frames height width 3"], key: jax.Array | None = None
    ) -> Float[NumpyArray, "*batch t h w channels"]:
        """Returns scaled latents, float32: drawn from the posterior by `key`, or its mean without one."""
        ...

    def decode(
        self, latents: Float[Array, "*batch t h w channels"]
    ) -> Float[NumpyArray, "*batch frames height width 3"]:
        """Returns the clips of scaled latents, float32, with values in about [-1, 1]."""
        ...


@dataclasses.dataclass(frozen=True)
class IdentityCodec:
    """Pixels are their own latents.

    Attributes:
        channels: values of a pixel.
    """

    channels: int = 3
    kind = "identity"
    strides = (1, 1, 1)
    scale = 1.0

    def valid_frames(self, num_frames: int) -> int:
        """Returns `num_frames`: there may be any number of them."""
        return _check_count(num_frames)

    def latent_size(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Returns the size of the clip itself."""
        return _latent_size(self.strides, num_frames, height, width)

    def encode(self, clip: Array, key: jax.Array | None = None) -> NumpyArray:
        """Returns the clip itself; there is nothing to draw."""
        del key
        return _check_clip(clip, self.channels, "clip")

    def decode(self, latents: Array) -> NumpyArray:
        """Returns the pixels themselves."""
        return _check_clip(latents, self.channels, "latents")


class ImageCodec:
    """An `ImageVAE`, frame by frame.

    Frames are shared out among the devices. There is one compiled function for a size of frames and a number of them
    at once; the latter is a power of two (times the devices).

    Args:
        config: of the autoencoder.
        params: its parameters.
        devices: that frames are split over (default: all of this host).
        most_pixels: of the frames that a device takes at once; a larger frame is taken by tiles.
        tile: side of a tile, see `sora_jax.models.autoencoder.tiling`.

    Attributes:
        config: of the autoencoder.
        params: its parameters, on every device.
    """

    kind = "image"

    def __init__(
        self,
        config: ImageVAEConfig,
        params: PyTree,
        devices: Sequence[jax.Device] | None = None,
        most_pixels: int = MOST_PIXELS,
        tile: int = TILE,
    ) -> None:
        if most_pixels < 1:
            raise ValueError(f"most_pixels must be at least 1, got {most_pixels}.")
        self.config = config
        mesh = jax.sharding.Mesh(np.array(jax.local_devices() if devices is None else devices), ("frames",))
        self._num_devices, self._most_pixels = mesh.size, most_pixels
        self._split = NamedSharding(mesh, PartitionSpec("frames"))
        self.params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
        self._functions: dict[tuple[str, bool], Callable[[PyTree, Array], Any]] = {
            ("encode", False): jax.jit(functools.partial(_apply, config, "encode")),
            ("decode", False): jax.jit(functools.partial(_apply, config, "decode")),
            ("encode", True): jax.jit(lambda params, x: tiled_encode(config, params, x, tile)),
            ("decode", True): jax.jit(lambda params, z: tiled_decode(config, params, z, tile)),
        }

    @property
    def channels(self) -> int:
        """Values of a latent cell."""
        return self.config.latent_channels

    @property
    def strides(self) -> tuple[int, int, int]:
        """(1, s, s): pixels along the sides of the square that a latent cell stands for, one frame."""
        return self.config.strides

    @property
    def scale(self) -> float:
        """What a diffusion model's latents are multiplied by."""
        return self.config.scaling_factor

    def valid_frames(self, num_frames: int) -> int:
        """Returns `num_frames`: there may be any number of them."""
        return _check_count(num_frames)

    def latent_size(self, num_frames: int, height: int, width: int) -> tuple[int, int, int]:
        """Returns (T, H / s, W / s); ValueError for sides that s does not divide."""
        return _latent_size(self.strides, num_frames, height, width)

    def posterior(self, clip: Float[Array, "*batch frames height width channels"]) -> Posterior:
        """Returns the posterior over the unscaled latents of a clip or a batch of clips, as NumPy arrays.

        Raises:
            ValueError: a clip of another shape.
        """
        clip = _check_clip(clip, self.config.channels, "clip")
        self.latent_size(*clip.shape[-4:-1])
        return Posterior(*self._frame_by_frame("encode", clip, clip.shape[-3] * clip.shape[-2]))

    def encode(
        self, clip: Float[Array, "*batch frames height width channels"], key: jax.Array | None = None
    ) -> Float[NumpyArray, "*batch frames h w latent"]:
        """Returns scaled latents, float32: drawn from the posterior by `key`, or its mean without one."""
        posterior = self.posterior(clip)
        latents = posterior.mean if key is None else np.asarray(posterior.sample(key))
        return latents * np.float32(self.scale)

    def decode(
        self, latents: Float[Array, "*batch frames h w latent"]
    ) -> Float[NumpyArray, "*batch frames height width channels"]:
        """Returns the clips of scaled latents, float32, with values in about [-1, 1].

        Raises:
            ValueError: latents of another shape.
        """
        latents = _check_clip(latents, self.channels, "latents")
        _, sh, sw = self.strides
        (clip,) = self._frame_by_frame(
            "decode", latents / np.float32(self.scale), latents.shape[-3] * sh * latents.shape[-2] * sw
        )
        return clip

    def _frame_by_frame(self, method: str, frames: NumpyArray, num_pixels: int) -> list[NumpyArray]:
        """Returns what the network gives of frames (..., H, W, C) of so many pixels, each of its outputs (..., ...)."""
        batch = frames.shape[:-3]
        frames = frames.reshape(-1, *frames.shape[-3:])
        tiled = num_pixels > self._most_pixels
        most = 1 if tiled else self._most_pixels // num_pixels
        needed = -(-len(frames) // self._num_devices)
        at_once = self._num_devices * min(most, 1 << (needed - 1).bit_length())
        outputs: list[NumpyArray] = []
        for begin in range(0, len(frames), at_once):
            part = frames[begin : begin + at_once]
            padded = np.pad(part, ((0, at_once - len(part)), (0, 0), (0, 0), (0, 0)))
            given = self._functions[method, tiled](self.params, jax.device_put(padded, self._split))
            for place, values in enumerate(jax.tree.leaves(given)):
                values = np.asarray(values)
                if not begin:
                    outputs.append(np.empty((len(frames), *values.shape[1:]), np.float32))
                outputs[place][begin : begin + at_once] = values[: len(part)]
        return [values.reshape(*batch, *values.shape[1:]) for values in outputs]


def _apply(config: ImageVAEConfig, method: str, params: PyTree, x: Array) -> Any:
    return ImageVAE(config).apply({"params": params}, jnp.asarray(x), method=method)


def _check_count(num_frames: int) -> int:
    if num_frames < 1:
        raise ValueError(f"num_frames must be at least 1, got {num_frames}.")
    return num_frames


def _latent_size(strides: tuple[int, int, int], num_frames: int, height: int, width: int) -> tuple[int, int, int]:
    """Returns what strides that divide a clip's size make of it; ValueError where they do not."""
    size = _check_count(num_frames), height, width
    if min(size) < 1 or any(n % stride for n, stride in zip(size, strides, strict=True)):
        raise ValueError(
            f"a clip's (frames, height, width) must be positive multiples of the codec's strides {tuple(strides)}, "
            f"got {size}."
        )
    return tuple(n // stride for n, stride in zip(size, strides, strict=True))


def _check_clip(values: Array, channels: int, name: str) -> NumpyArray:
    """Returns values of (T, h, w, channels), or of a batch of such, as float32; ValueError for another shape."""
    values = np.asarray(values, np.float32)
    if values.ndim not in (4, 5) or values.shape[-1] != channels or not values.size:
        raise ValueError(
            f"{name} must be (T, H, W, {channels}) or (N, T, H, W, {channels}), none of them 0, got shape "
            f"{values.shape}."
        )
    return values
