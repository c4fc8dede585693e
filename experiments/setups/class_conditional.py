"""What a run of DiT needs: rows of pixels or of latents, and sample sheets."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
from etils import epath

from setups import packed
from sora_jax.array_types import Array, PyTree
from sora_jax.data.latents import LatentDataConfig, LatentRows, LatentSource
from sora_jax.data.sources import open_source
from sora_jax.diffusion.gaussian import Levels, discrete_levels
from sora_jax.diffusion.guidance import classifier_free
from sora_jax.diffusion.samplers import DDIM, denoiser, sample_chunk, start
from sora_jax.diffusion.schedules import respaced_steps
from sora_jax.evaluation import plots
from sora_jax.models.dit import DiT
from sora_jax.training.tasks.class_conditional import ClassConditionalConfig

HELD_OUT_SEED = 20_221_219  # of the latents of held-out splits


class ClassConditionalSetup:
    """A run on labelled pictures or latents.

    Args:
        config: of the experiment.
        workdir: of the run.
        console: for messages.

    Attributes:
        config: without the held-out splits that the data set lacks.

    Raises:
        ValueError: no data set at `config.data.path`, other classes than the model's, or latents of another size.
    """

    def __init__(self, config: ClassConditionalConfig, workdir: epath.Path, console: rich.console.Console) -> None:
        del workdir
        self.config = packed.without_missing_splits(config, console)
        data = self.config.data
        latents = isinstance(data, LatentDataConfig)
        source = (LatentSource if latents else open_source)(data.path, data.split)
        if len(source.label_names) != config.model.num_classes:
            raise ValueError(
                f"model.num_classes must be the {len(source.label_names)} classes of {source.path}, "
                f"got {config.model.num_classes}."
            )
        if latents and source.shape[:2] != config.model.image_size:
            raise ValueError(
                f"model.image_size must be that of the latents of {source.path}, {source.shape[:2]}, "
                f"got {config.model.image_size}."
            )

    def initial_params(self, path: str) -> str:
        """Returns where the parameters are that a new run starts from: a run or an exported model of its own kind."""
        return path

    def open_batches(self, split: str, training: bool) -> Any:
        """Opens the rows of a split: endless where it is trained on."""
        config = self.config
        if not isinstance(config.data, LatentDataConfig):
            return packed.open_pipeline(config, None, split, training)
        return LatentRows(
            LatentSource(config.data.path, split),
            config.patch,
            seed=config.data.seed if training else HELD_OUT_SEED,
            batch_size=config.data.batch_size,
            length=None if training else config.eval_batches,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
        )

    def attention_for(self, mesh: jax.sharding.Mesh) -> Any:
        """Returns the attention kernel that needs a mesh, where the config names one."""
        return packed.attention_for(self.config, mesh)

    def sample_sheet(self, params: PyTree) -> np.ndarray:
        """Returns a picture of guided samples by few steps of DDIM, a class a row, (H, W, 3) uint8."""
        c = self.config.sample
        samples = np.asarray(self._sample(params)).clip(-1, 1)
        if c.vae:
            samples = self._decode(samples)
        elif samples.shape[-1] not in (1, 3):
            samples = samples[..., :3]
        return plots.image_grid(list(samples.reshape(len(c.labels), c.columns, *samples.shape[1:])))

    @functools.cached_property
    def _sample(self) -> Any:
        """The compiled sampler: parameters to samples (N, H, W, C), always of the same noise."""
        config, c, process = self.config, self.config.sample, self.config.process
        model = DiT(config.model)
        labels = jnp.repeat(jnp.asarray(c.labels), c.columns)
        num_levels = process.num_levels
        steps = respaced_steps(num_levels, min(c.num_steps, num_levels), "linspace")
        places = [*(num_levels - 1 - steps[::-1]), num_levels]
        levels = Levels(*(np.asarray(a)[places] for a in discrete_levels(process.betas())))

        def network_of(params: PyTree, labels: Array) -> Any:
            def network(x: Array, time: Array) -> Array:
                times = jnp.broadcast_to(time, labels.shape)
                out = model.apply({"params": params}, x, times, labels, method=DiT.on_images)
                return out[..., : config.model.in_channels]

            return network

        @jax.jit
        def sample(params: PyTree) -> Array:
            null = jnp.full_like(labels, config.model.num_classes)
            guided = classifier_free(network_of(params, labels), network_of(params, null), c.guidance_scale)
            denoise = denoiser(guided, process.prediction, clip=(-1.0, 1.0) if process.discrete else None)
            shape = (len(labels), *c.size, config.model.in_channels)
            noise = jax.random.normal(jax.random.key(config.seed), shape)
            return sample_chunk(denoise, start(DDIM(), noise, levels), levels, DDIM()).x

        return sample

    def _decode(self, latents: np.ndarray) -> np.ndarray:
        """Returns the images of scaled latents."""
        from sora_jax.models.autoencoder.image_vae import ImageVAE, load_image_vae

        config, params = load_image_vae(self.config.sample.vae)
        decode = jax.jit(lambda z: ImageVAE(config).apply({"params": params}, z, method=ImageVAE.decode))
        return np.asarray(decode(latents / config.scaling_factor)).clip(-1, 1)


Setup = ClassConditionalSetup
