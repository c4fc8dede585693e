"""From classes to images: samples of a DiT, as the official code draws them (arXiv:2212.09748, section 5.1).

That is: the chain of 1000 steps with linear betas respaced to 250, each step drawn with the variance that the network
learned, from noise onwards; classifier-free guidance of the first three channels of the noise alone; nothing clipped.
Every sampler of `sora_jax.diffusion.samplers`, any number of steps and guidance of all channels may be asked for.

In short:

pipeline = DiTPipeline.from_pretrained("models/dit_xl_2", vae="models/sd_vae")
images = pipeline([207, 360, 387], seed=0, guidance_scale=4.0)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import numpy as np
from etils import epath

from sora_jax.array_types import Int, NumpyArray, PyTree
from sora_jax.config import PatchConfig
from sora_jax.diffusion.process import DiscreteProcess, GaussianConfig
from sora_jax.families.dit import ClassConditionalConfig, network
from sora_jax.families.load import codec_of, load
from sora_jax.generation.canvas import ClipRequest
from sora_jax.generation.clips import ClassConditioner, ClipGenerator
from sora_jax.generation.generator import Generator, sample_seeds, sampling_mesh
from sora_jax.models.attention import AttentionFn
from sora_jax.models.autoencoder.codec import Codec, IdentityCodec
from sora_jax.models.dit import DiT, DiTConfig
from sora_jax.parallel.attention import attention_for


class DiTPipeline:
    """A trained DiT, ready to be asked for samples of classes.

    Calls of equal shapes, sampler and number of images share one compiled function, whatever their labels, seed and
    scale; `params` may be replaced by others of the same shapes between calls.

    Args:
        config: of the model.
        params: its (EMA) parameters, unboxed.
        codec: decodes what the model makes; None to return that itself.
        process: that the model was trained on (default: the paper's).
        devices: samples are split over them (default: all of this host).
        tokens_per_batch: most tokens that one device samples at once; more images are sampled batch after batch.
        attention_fn: the attention kernel (default: one for the platform).

    Attributes:
        config: of the model.
        codec: that decodes what the model makes.
        clips: makes the images of requests.
    """

    def __init__(
        self,
        config: DiTConfig,
        params: PyTree,
        codec: Codec | None = None,
        process: DiscreteProcess | None = None,
        devices: Sequence[jax.Device] | None = None,
        tokens_per_batch: int = 65_536,
        attention_fn: AttentionFn | None = None,
    ):
        self.config = config
        self.codec = IdentityCodec(config.in_channels) if codec is None else codec
        self.process = paper_process(config) if process is None else process
        # The kernel that trained the model need not exist here; all of them compute the same.
        kernel = attention_fn or attention_for("auto", sampling_mesh(devices), packed=False)
        model = DiT(dataclasses.replace(config, remat="none"), kernel)
        self.clips = ClipGenerator(
            Generator(functools.partial(network, model), self.process, params, devices),
            ClassConditioner(config.num_classes),
            self.codec,
            PatchConfig(size=(1, config.patch_size, config.patch_size), channels=config.in_channels),
            tokens_per_batch,
        )

    @classmethod
    def from_pretrained(
        cls,
        path: str | epath.PathLike,
        vae: str | epath.PathLike | None = None,
        averaged: bool = True,
        devices: Sequence[jax.Device] | None = None,
    ) -> DiTPipeline:
        """Loads a run, an exported model or the weights that `experiments/convert_checkpoint.py dit` wrote.

        Args:
            path: of the model.
            vae: directory of the autoencoder that latents are decoded by; without it latents are returned.
            averaged: of a run, take the EMA of the parameters.
            devices: samples are split over them (default: all of this host).

        Raises:
            FileNotFoundError: there is no model at `path`, or no autoencoder at `vae`.
            ValueError: the files there do not make a model; or an autoencoder for a model of pixels, or of latents of
                another number of channels.
        """
        loaded = load(path, averaged=averaged, kinds=("dit", "dit_model"))
        experiment, params = loaded.config if loaded.trained_here else None, loaded.params
        config, pixels = (experiment.model, experiment.makes_pixels) if experiment else (loaded.config, False)
        codec = None if vae is None else codec_of(loaded, vae, config.in_channels, devices, pixels)
        if experiment is None:
            return cls(config, params, codec, devices=devices)
        return cls.of_experiment(experiment, params, codec, devices, loaded.pixels is not False)

    @classmethod
    def of_experiment(
        cls,
        config: ClassConditionalConfig,
        params: PyTree,
        codec: Codec | None = None,
        devices: Sequence[jax.Device] | None = None,
        pixels: bool = True,
    ) -> DiTPipeline:
        """Returns the pipeline of what an experiment trains, on its process.

        Args:
            config: of the experiment.
            params: of its model, unboxed.
            codec: see the class.
            devices: see the class.
            pixels: whether values may be clipped to those of pixels, where the config takes them for such.
        """
        return cls(config.model, params, codec, config.sampled_process(pixels and codec is None), devices)

    @property
    def params(self) -> PyTree:
        """The model's parameters, on every device."""
        return self.clips.generator.params

    @params.setter
    def params(self, params: PyTree) -> None:
        self.clips.generator.params = params

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of what the model was trained on, in pixels."""
        return tuple(n * stride for n, stride in zip(self.config.image_size, self.codec.strides[1:], strict=True))

    def check_size(self, size: tuple[int, int]) -> None:
        """Raises ValueError for a model whose latents have no autoencoder, or (height, width) that patches do not fill.

        Of latents without an autoencoder no pictures can be made.
        """
        if self.codec.kind == "identity" and self.codec.channels not in (1, 3):
            raise ValueError(f"latents of {self.config.in_channels} channels: name an autoencoder, vae.")
        self._check_multiple(size)

    def _check_multiple(self, size: tuple[int, int]) -> None:
        unit = self.codec.strides[1] * self.config.patch_size
        if len(size) != 2 or any(side < 1 or side % unit for side in size):
            raise ValueError(
                f"image_size must be (height, width), positive multiples of {unit} pixels, got {tuple(size)}."
            )

    def __call__(
        self,
        labels: Sequence[int] | Int[np.ndarray, " samples"],
        seed: int = 0,
        *,
        indices: Sequence[int] | Int[np.ndarray, " samples"] | None = None,
        image_size: tuple[int, int] | None = None,
        sampler: str = "ancestral",
        num_steps: int = 250,
        guidance_scale: float = 1.5,
        guided_channels: int | None = 3,
        guidance_interval: tuple[float, float] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> NumpyArray:
        """Draws one sample a label.

        Args:
            labels: classes; `config.num_classes` is the null class, for an unconditional sample, where there is one.
            seed: of the set of samples.
            indices: of the samples, which pick their noise (default: 0, 1 ...). A large set is drawn in parts by
                giving each its indices.
            image_size: (height, width) of the images, in pixels (default: what the model was trained on).
            sampler: a name of `sora_jax.diffusion.samplers.SAMPLERS`. `ancestral` draws with the variance of the
                process.
            num_steps: of the trained process that are visited, evenly spaced.
            guidance_scale: of classifier-free guidance; 1 is none, which takes half the time, and all that a model
                without a null class can do.
            guided_channels: so many of the first channels of what is predicted are guided; None for all.
            guidance_interval: (lowest, highest) step of the trained process at which there is guidance; None for all.
            progress: called with (steps done, steps in all) from time to time, for a progress bar.

        Returns:
            (N, H, W, channels) float32, images with values in about [-1, 1] (latents without a codec).

        Raises:
            ValueError: an argument that cannot be, naming it and what would work.
            FloatingPointError: samples that are not finite, naming the first.
        """
        labels, c = np.asarray(labels), self.config
        indices = np.arange(len(labels)) if indices is None else np.asarray(indices)
        height, width = size = self.image_size if image_size is None else image_size
        for name, values, most in (
            ("labels", labels, c.num_classes - (not c.has_null_class)),
            ("indices", indices, np.iinfo(np.int32).max),
        ):
            whole = values.ndim == 1 and len(values) and np.issubdtype(values.dtype, np.integer)
            if not whole or values.min() < 0 or values.max() > most:
                raise ValueError(f"{name} must be a list of whole numbers between 0 and {most}, got {values.tolist()}.")
        if len(indices) != len(labels):
            raise ValueError(f"indices must be one for each of {len(labels)} labels, got {len(indices)}.")
        self._check_multiple(size)
        if guidance_scale != 1 and np.isfinite(guidance_scale) and not c.has_null_class:
            raise ValueError(
                f"guidance_scale must be 1, got {guidance_scale:g}: the model has no null class to guide away from."
            )
        if guided_channels is not None and not 1 <= guided_channels:
            raise ValueError(f"guided_channels must be None or at least 1, got {guided_channels}.")
        requests = [
            ClipRequest("", 1, height, width, 1.0, int(own), guidance_scale, label=int(label))
            for own, label in zip(sample_seeds(seed, indices), labels, strict=True)
        ]
        names = [f"sample {index} (class {label})" for index, label in zip(indices, labels, strict=True)]
        # Patches hold whole cells, channels last; the variance is never guided.
        guided = np.arange(c.patch_size**2 * c.in_channels) % c.in_channels < (guided_channels or c.in_channels)
        if c.learned_variance:
            guided = np.concatenate([guided, np.zeros_like(guided)])
        images = self.clips(
            requests,
            names,
            num_steps,
            sampler,
            guided_values=guided,
            interval=guidance_interval,
            progress=progress,
        )
        return np.stack(images)[:, 0]


def paper_process(config: DiTConfig) -> DiscreteProcess:
    """Returns the process of the paper; where no variance is learned, the largest one is drawn with."""
    learned = config.learned_variance
    return DiscreteProcess(
        GaussianConfig(variance="learned" if learned else "large", loss="hybrid" if learned else "simple")
    )
