"""Large sets of images of any family: sample i of a set is drawn from (seed of the set, i), in whatever batch.

A set knows its model and what is asked of it beside steps and guidance; `open_set` finds the one of what lies at a path
(`sora_jax.families.registry.SAMPLED`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np
from etils import epath

from sora_jax.array_types import Array, Int, NumpyArray, PyTree
from sora_jax.diffusion.process import DiscreteProcess, GaussianConfig, Process
from sora_jax.families.diffusion import diffusion_task
from sora_jax.families.load import codec_of, describe, expect, load
from sora_jax.families.registry import SAMPLED, imported
from sora_jax.generation.canvas import make_requests
from sora_jax.generation.dit_pipeline import DiTPipeline
from sora_jax.generation.generator import Generator, plain_draw, sample_seeds
from sora_jax.generation.pipeline import SoraPipeline
from sora_jax.models.unet import UNet
from sora_jax.pixels import RGB, to_pixels


@dataclasses.dataclass(frozen=True)
class SetOptions:
    """What is asked of a set beside steps and guidance; a family takes what it has a use for.

    Attributes:
        seed: of the set.
        size: (height, width) in pixels; None for what the model was trained on.
        vae: directory of the autoencoder that latents are decoded by.
        averaged: of a run, take the EMA of the parameters.
        sampler: its name; None for the family's own.
        guided_channels: of a DiT: guidance is of so many of the first channels; 0 for all.
        prompts: of a Sora: sample i has prompt i modulo their number.
    """

    seed: int = 0
    size: tuple[int, int] | None = None
    vae: str | None = None
    averaged: bool = True
    sampler: str | None = None
    guided_channels: int = 3
    prompts: tuple[str, ...] = ("",)


class Chosen(NamedTuple):
    """Steps and guidance of a set.

    Attributes:
        num_steps: of the sampler.
        guidance_scale: of classifier-free guidance; 1 is none.
    """

    num_steps: int
    guidance_scale: float


class ImageSet(Protocol):
    """A set of images to be drawn.

    Attributes:
        name: of the model.
        params: of the model.
        codec_params: of the autoencoder; None without one.
        precision: the dtype that the model computes in.
        size: (height, width) in pixels.
        sampler: name of the sampler.
        choices: what else the images depend on, by name.
        num_classes: of a model of classes; 0 for another.
    """

    name: str
    params: PyTree
    codec_params: PyTree | None
    precision: str
    size: tuple[int, int]
    sampler: str
    choices: dict[str, Any]
    num_classes: int

    def chosen(self, num_steps: int | None, guidance_scale: float | None) -> Chosen:
        """Returns steps and guidance, the family's own where they are None; ValueError for what cannot be."""
        ...

    def draw(self, indices: Int[np.ndarray, " n"], labels: Int[np.ndarray, " n"], chosen: Chosen) -> NumpyArray:
        """Returns images of a set, (n, height, width, 3) uint8.

        Args:
            indices: of the samples.
            labels: their classes; of a model of classes alone.
            chosen: steps and guidance.
        """
        ...


def open_set(path: str | epath.PathLike, options: SetOptions) -> ImageSet:
    """Returns the set of a model: a Sora, a DiT, a run of discrete diffusion, or converted weights of DiT or DDPM.

    Raises:
        FileNotFoundError: no model, or no autoencoder.
        ValueError: a model of another kind, or options that do not fit it.
    """
    found = describe(path)
    expect(found, *SAMPLED)
    return imported(SAMPLED[found.kind])(path, options)


class ClassSet:
    """Images of classes, of a DiT; see `ImageSet`."""

    def __init__(self, path: str | epath.PathLike, options: SetOptions) -> None:
        self._options, self._pipeline = options, DiTPipeline.from_pretrained(path, options.vae, options.averaged)
        config, codec = self._pipeline.config, self._pipeline.codec
        self.name = f"DiT width {config.width} depth {config.depth} patch {config.patch_size}"
        self.params, self.precision, self.num_classes = self._pipeline.params, config.dtype, config.num_classes
        self.codec_params = codec.params if options.vae is not None else None
        self.size = self._pipeline.image_size if options.size is None else options.size
        self._pipeline.check_size(self.size)
        self.sampler = options.sampler or "ancestral"
        most = self._pipeline.process.most_steps
        self.choices = {"guided_channels": options.guided_channels or "all", "num_levels": most}

    def chosen(self, num_steps: int | None, guidance_scale: float | None) -> Chosen:
        """Returns what is asked for, 250 steps and a scale of 1.5 by default, as in the paper."""
        default = 1.5 if self._pipeline.config.has_null_class else 1.0
        scale = default if guidance_scale is None else guidance_scale
        return Chosen(min(250, self._pipeline.process.most_steps) if num_steps is None else num_steps, scale)

    def draw(self, indices: Int[np.ndarray, " n"], labels: Int[np.ndarray, " n"], chosen: Chosen) -> NumpyArray:
        """Returns images of classes."""
        images = self._pipeline(
            labels,
            self._options.seed,
            indices=indices,
            image_size=self.size,
            sampler=self.sampler,
            guided_channels=self._options.guided_channels or None,
            **chosen._asdict(),
        )
        return rgb(images)


class TextSet:
    """Images of prompts, of a Sora; see `ImageSet`."""

    num_classes, codec_params = 0, None

    def __init__(self, path: str | epath.PathLike, options: SetOptions) -> None:
        from sora_jax.models.text.minilm import load_text_encoder

        loaded = load(path, averaged=options.averaged, kinds=("sora",))
        config, params = loaded.config, loaded.params
        channels = config.patch.channels
        codec = None if options.vae is None else codec_of(loaded, options.vae, channels, pixels=channels == RGB)
        self._options, self._pipeline = options, SoraPipeline(config, params, load_text_encoder(), codec)
        self.name, self.precision = f"Sora width {config.model.width} depth {config.model.depth}", config.model.dtype
        self.params = self._pipeline.params
        if codec is not None:
            self.codec_params = codec.params
        self.size = (config.sample.height, config.sample.width) if options.size is None else options.size
        self.sampler = options.sampler or "euler"
        self.choices = {"prompts": list(options.prompts)}

    def chosen(self, num_steps: int | None, guidance_scale: float | None) -> Chosen:
        """Returns what is asked for, the model's sample settings by default."""
        sample = self._pipeline.config.sample
        return Chosen(
            sample.num_steps if num_steps is None else num_steps,
            sample.guidance_scale if guidance_scale is None else guidance_scale,
        )

    def draw(self, indices: Int[np.ndarray, " n"], labels: Int[np.ndarray, " n"], chosen: Chosen) -> NumpyArray:
        """Returns images of the prompts."""
        prompts = [self._options.prompts[i % len(self._options.prompts)] for i in indices]
        height, width = self.size
        requests = make_requests(
            prompts, sample_seeds(self._options.seed, indices), num_frames=1, height=height, width=width,
            fps=self._pipeline.config.sample.fps, guidance_scale=float(chosen.guidance_scale),
        )  # fmt: skip
        clips = self._pipeline.clips(requests, sample_names(indices), chosen.num_steps, self.sampler)
        return rgb(np.stack(clips)[:, 0])


class PlainSet:
    """Images of a network that is conditioned on the step alone; see `ImageSet`.

    Args:
        options: of the set.
        network: (params, rows, x, levels) to its output.
        process: of the model.
        params: of the model.
        shape: (height, width, channels) of an image.
        scale: of images that are no pixels, from what the model makes to [-1, 1].
    """

    num_classes, codec_params, precision = 0, None, "float32"

    def __init__(
        self,
        options: SetOptions,
        network: Callable[[PyTree, PyTree, Array, Array], Array],
        process: Process,
        params: PyTree,
        shape: tuple[int, ...],
        name: str,
        scale: float = 1.0,
    ) -> None:
        if options.vae is not None:
            raise ValueError(f"vae must be left out for a model of pixels, got {options.vae!r}.")
        self._options, self._generator = options, Generator(network, process, params)
        self._shape, self._scale, self.name, self.size = shape, scale, name, shape[:2]
        self.params, self.sampler = self._generator.params, options.sampler or "ancestral"
        self.choices = {"num_levels": process.most_steps}

    def chosen(self, num_steps: int | None, guidance_scale: float | None) -> Chosen:
        """Returns what is asked for, all steps of the process by default; there is no guidance."""
        if guidance_scale not in (None, 1):
            raise ValueError(f"guidance_scale must be 1 for a model without a condition, got {guidance_scale:g}.")
        return Chosen(self._generator.process.most_steps if num_steps is None else num_steps, 1.0)

    def draw(self, indices: Int[np.ndarray, " n"], labels: Int[np.ndarray, " n"], chosen: Chosen) -> NumpyArray:
        """Returns images."""
        process = self._generator.process
        draw = plain_draw(
            self._shape,
            process.ladder(chosen.num_steps),
            sample_seeds(self._options.seed, indices),
            self._generator.num_devices,
        )
        x = self._generator(draw, process.sampler(self.sampler), sample_names(indices))
        return rgb(self._scale * x[: len(indices)])


def diffusion_set(path: str | epath.PathLike, options: SetOptions) -> PlainSet:
    """Returns the set of a run of discrete diffusion of images."""
    loaded = load(path, averaged=options.averaged, kinds=("diffusion",))
    config, params = loaded.config, loaded.params
    shape, task = config.data.shape, diffusion_task(config)
    if len(shape) != 3:
        raise ValueError(f"{path} makes no images, but examples of shape {shape}.")
    size = tuple(shape[:2] if options.size is None else options.size)
    multiple = config.model.size_multiple
    _check_size(size, multiple)
    # What are no pixels is shown within two standard deviations, as the pictures of a run show them.
    scale = 1.0 if config.process.discrete else 0.5
    name = f"discrete diffusion, {config.process.num_levels} levels"
    return PlainSet(options, task.network, task.process(params), params, (*size, shape[2]), name, scale)


def ddpm_set(path: str | epath.PathLike, options: SetOptions) -> PlainSet:
    """Returns the set of converted DDPM weights: the chain of the paper, of 1000 steps with the largest variance."""
    loaded = load(path, kinds=("unet",))
    config, params = loaded.config, loaded.params
    if options.size is None:
        raise ValueError("size must be given for DDPM weights, which do not say what images they make.")
    _check_size(options.size, config.size_multiple)
    model = UNet(config)

    def network(params: PyTree, rows: tuple[()], x: Array, levels: Array) -> Array:
        steps = jnp.broadcast_to(levels, x.shape[:1])
        return model.apply({"params": params}, x, steps, deterministic=True)

    process = DiscreteProcess(GaussianConfig(variance="large"), clip=(-1.0, 1.0))
    return PlainSet(options, network, process, params, (*options.size, config.in_channels), "DDPM U-Net")


def _check_size(size: Sequence[int], multiple: int) -> None:
    if any(side < 1 or side % multiple for side in size):
        raise ValueError(f"size must be (height, width), positive multiples of {multiple} pixels, got {tuple(size)}.")


def sample_names(indices: Int[np.ndarray, " n"]) -> list[str]:
    """Returns what messages call the samples of a set."""
    return [f"sample {index}" for index in indices]


def rgb(images: NumpyArray) -> NumpyArray:
    """Returns images with values in about [-1, 1], of one or three channels, as (n, height, width, 3) uint8."""
    return to_pixels(np.broadcast_to(images, (*images.shape[:-1], 3)))
