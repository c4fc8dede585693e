"""Class-conditional samples of a DiT, as the official code draws them (arXiv:2212.09748, section 5.1).

That is: the chain of 1000 steps with linear betas respaced to 250, each step drawn with the variance that the network
learned, from noise onwards; classifier-free guidance of the first three channels of the noise alone; nothing clipped.
Every sampler of `sora_jax.diffusion.samplers`, any number of steps and guidance of all channels may be asked for.

The noise of a sample is drawn from (seed, index of the sample, step): its batch and the number of devices do not matter
to it.

In short:

sampler = ClassConditionalSampler.from_pretrained("models/dit_xl_2", vae="models/sd_vae")
images = sampler([207, 360, 387], seed=0, guidance_scale=4.0)
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from sora_jax.array_types import Array, Float, Int, NumpyArray, PyTree
from sora_jax.components import CodecComponent, Components, warn_of_difference
from sora_jax.config import MeshConfig
from sora_jax.diffusion.gaussian import Levels, Prediction, discrete_levels
from sora_jax.diffusion.guidance import classifier_free
from sora_jax.diffusion.samplers import (
    SAMPLERS,
    Ancestral,
    Sampler,
    State,
    denoiser,
    sample,
    sample_chunk,
    start,
)
from sora_jax.diffusion.schedules import linear_betas, respaced_betas, respaced_steps
from sora_jax.families.dit import ClassConditionalConfig
from sora_jax.families.load import load
from sora_jax.models.autoencoder.image_vae import ImageVAE, ImageVAEConfig
from sora_jax.models.dit import DiT, DiTConfig
from sora_jax.models.weights import weights_fingerprint
from sora_jax.parallel.mesh import make_mesh
from sora_jax.parallel.rules import batch_sharding, replicated
from sora_jax.pixels import check_steps


class LatentDecoder:
    """An autoencoder's decoder: scaled latents, (N, H, W, C), to images, of values in about [-1, 1].

    Args:
        config: of the autoencoder.
        params: its parameters.
    """

    def __init__(self, config: ImageVAEConfig, params: PyTree):
        self.config, self.params = config, params
        self._decode = jax.jit(lambda params, z: ImageVAE(config).apply({"params": params}, z, method="decode"))

    @classmethod
    def from_pretrained(cls, path: str | epath.PathLike) -> LatentDecoder:
        """Loads what `experiments/convert_checkpoint.py sd-vae` wrote; raises what `load` does."""
        vae = load(path, kinds=("image_vae",))
        return cls(vae.config, vae.params)

    @property
    def stride(self) -> int:
        """Pixels along the side of a latent cell."""
        return self.config.strides[1]

    def __call__(self, latents: Float[Array, "batch height width latent"]) -> Float[Array, "batch h w channels"]:
        """Returns the images of latents as a diffusion model makes them."""
        return self._decode(self.params, latents / self.config.scaling_factor)


class ClassConditionalSampler:
    """A trained DiT, ready to be asked for samples of classes.

    Calls of equal shapes, sampler and number of guided channels share one compiled function, whatever their labels,
    seed and scale; `params` may be replaced by others of the same shapes between calls.

    Args:
        config: of the model.
        params: its (EMA) parameters, unboxed.
        decode: from what is sampled, (N, H, W, in_channels) on the devices, to what is returned, such as a
            `LatentDecoder`; None to return the samples themselves.
        betas: of the process that the model was trained on; None for the paper's.
        prediction: what the model predicts; the paper's is the noise.
        clip: bounds that the clean data is clipped to in each step, of pixels; None for latents.
        devices: samples are split over them (default: all of this host).

    Attributes:
        config: of the model.
        decode: as above.
    """

    def __init__(
        self,
        config: DiTConfig,
        params: PyTree,
        decode: Callable[[Array], Array] | None = None,
        betas: Float[np.ndarray, " steps"] | None = None,
        prediction: Prediction = "noise",
        clip: tuple[float, float] | None = None,
        devices: Sequence[jax.Device] | None = None,
    ):
        self.config = config
        self.decode = decode
        self._betas = linear_betas() if betas is None else betas
        self._prediction, self._clip = prediction, clip
        self._mesh = make_mesh(MeshConfig(data=-1), jax.local_devices() if devices is None else devices)
        self.params = params
        # The kernel that trained the model need not exist here; all of them compute the same.
        self._model = DiT(dataclasses.replace(config, attention="auto", remat="none"))
        split = batch_sharding(self._mesh)
        self._state_shardings = State(split, split, index=replicated(self._mesh), first_bad=split)
        self._chunk = jax.jit(
            self._sample_chunk,
            static_argnames=("sampler", "guided"),
            donate_argnames="state",
            out_shardings=self._state_shardings,  # what goes in, or the second chunk would compile again
        )

    @classmethod
    def from_pretrained(
        cls,
        path: str | epath.PathLike,
        vae: str | epath.PathLike | None = None,
        averaged: bool = True,
        devices: Sequence[jax.Device] | None = None,
    ) -> ClassConditionalSampler:
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
        experiment = loaded.config if loaded.trained_here else None
        config, pixels = (experiment.model, experiment.makes_pixels) if experiment else (loaded.config, False)
        decode = None
        if vae is not None:
            if pixels:
                raise ValueError(f"{path} makes pixels, which no autoencoder decodes: leave vae out, got {str(vae)!r}.")
            decode = LatentDecoder.from_pretrained(vae)
            if decode.config.latent_channels != config.in_channels:
                raise ValueError(
                    f"{path} makes latents of {config.in_channels} channels and the autoencoder {vae} takes "
                    f"{decode.config.latent_channels}."
                )
            codec = CodecComponent("image", weights_fingerprint(vae), decode.config.scaling_factor)
            warn_of_difference(loaded.components, Components(codec=codec), str(path))
        if experiment is None:
            return cls(config, loaded.params, decode, devices=devices)
        return cls.of_experiment(experiment, loaded.params, decode, devices)

    @classmethod
    def of_experiment(
        cls,
        config: ClassConditionalConfig,
        params: PyTree,
        decode: Callable[[Array], Array] | None = None,
        devices: Sequence[jax.Device] | None = None,
    ) -> ClassConditionalSampler:
        """Returns the sampler of what an experiment trains, on its process, pixels clipped to [-1, 1].

        Args:
            config: of the experiment.
            params: of its model, unboxed.
            decode: see the class.
            devices: see the class.
        """
        clip = (-1.0, 1.0) if config.makes_pixels else None
        process = config.process
        return cls(config.model, params, decode, process.betas(), process.prediction, clip, devices)

    @property
    def num_levels(self) -> int:
        """Steps of the process, the most that can be visited."""
        return len(self._betas)

    @property
    def stride(self) -> int:
        """Pixels along the side of a cell of what is sampled."""
        return self.decode.stride if isinstance(self.decode, LatentDecoder) else 1

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of what the model was trained on, in pixels."""
        height, width = self.config.image_size
        return height * self.stride, width * self.stride

    def cells(self, size: tuple[int, int]) -> tuple[int, int]:
        """Returns `image_size` of a call for images of `size`, (height, width) in pixels.

        Raises:
            ValueError: a model whose latents have no autoencoder, or a size that is no multiple of a patch.
        """
        if self.decode is None and self.config.in_channels not in (1, 3):
            raise ValueError(f"latents of {self.config.in_channels} channels: name an autoencoder, vae.")
        unit = self.stride * self.config.patch_size
        if any(side < 1 or side % unit for side in size):
            raise ValueError(f"size must be (height, width), positive multiples of {unit} pixels, got {tuple(size)}.")
        return size[0] // self.stride, size[1] // self.stride

    @property
    def params(self) -> PyTree:
        """The model's parameters, on every device."""
        return self._params

    @params.setter
    def params(self, params: PyTree) -> None:
        self._params = jax.device_put(params, replicated(self._mesh))

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
        progress: Callable[[int], None] | None = None,
    ) -> NumpyArray:
        """Draws one sample a label, all at once.

        Args:
            labels: classes; `config.num_classes` is the null class, for an unconditional sample, where there is one.
            seed: of the noise.
            indices: of the samples, which pick their noise (default: 0, 1 ...). A large set is drawn in parts by
                giving each its indices.
            image_size: (height, width) of what is sampled, in cells (default: what the model was trained on).
            sampler: a name of `sora_jax.diffusion.samplers.SAMPLERS`. `ancestral` draws with the variance that was
                learned, or with the largest one where none was, as the official code does.
            num_steps: of the trained process that are visited, evenly spaced.
            guidance_scale: of classifier-free guidance; 1 is none, which takes half the time, and all that a model
                without a null class can do.
            guided_channels: so many of the first channels of what is predicted are guided; None for all.
            progress: called with the steps done from time to time, for a progress bar.

        Returns:
            (N, H, W, in_channels) float32, or what `decode` makes of it.

        Raises:
            ValueError: an argument that cannot be, naming it and what would work.
        """
        labels, c = np.asarray(labels), self.config
        indices = np.arange(len(labels)) if indices is None else np.asarray(indices)
        height, width = c.image_size if image_size is None else image_size
        for name, values, most in (
            ("labels", labels, c.num_classes - (not c.has_null_class)),
            ("indices", indices, np.iinfo(np.int32).max),
        ):
            whole = values.ndim == 1 and len(values) and np.issubdtype(values.dtype, np.integer)
            if not whole or values.min() < 0 or values.max() > most:
                raise ValueError(f"{name} must be a list of whole numbers between 0 and {most}, got {values.tolist()}.")
        if len(indices) != len(labels):
            raise ValueError(f"indices must be one for each of {len(labels)} labels, got {len(indices)}.")
        if min(height, width) < 1 or height % c.patch_size or width % c.patch_size:
            raise ValueError(
                f"image_size must be (height, width), positive multiples of the model's patch_size {c.patch_size}, "
                f"got {(height, width)}."
            )
        if sampler not in SAMPLERS:
            raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, got {sampler!r}.")
        if not np.isfinite(guidance_scale):
            raise ValueError(f"guidance_scale must be finite, got {guidance_scale!r}.")
        if guidance_scale != 1 and not c.has_null_class:
            raise ValueError(
                f"guidance_scale must be 1, got {guidance_scale:g}: the model has no null class to guide away from."
            )
        if guided_channels is not None and not 1 <= guided_channels:
            raise ValueError(f"guided_channels must be None or at least 1, got {guided_channels}.")

        steps = respaced_steps(len(self._betas), num_steps, "linspace")
        levels = discrete_levels(respaced_betas(self._betas, steps), steps)
        method = SAMPLERS[sampler]
        if isinstance(method, Ancestral):
            method = Ancestral("learned" if c.learned_variance else "large")
        # The same number on each device; what is too much is cut off again.
        padding = (0, -len(labels) % self._mesh.size)
        samples = tuple(np.pad(a.astype(np.int32), padding, mode="edge") for a in (labels, indices))
        samples = jax.device_put(samples, batch_sharding(self._mesh))
        # A level of its own for each sample, so that all that a sampler remembers is split like the samples.
        levels = Levels(*(np.repeat(a[:, None], len(samples[0]), axis=1) for a in levels))
        key = jax.random.key(seed)
        x = sample_noise(key, samples[1], jnp.int32(0), (height, width, c.in_channels))
        state = jax.device_put(start(method, x, levels), self._state_shardings)
        most = c.in_channels if guided_channels is None else min(guided_channels, c.in_channels)
        guided, scale = 0 if guidance_scale == 1 else most, np.float32(guidance_scale)

        def chunk(state: State, levels: Levels) -> State:
            return self._chunk(self._params, state, levels, key, samples, scale, sampler=method, guided=guided)

        state = sample(chunk, state, levels, progress=progress)
        names = [f"sample {index} (class {label})" for index, label in zip(indices, labels, strict=True)]
        self._check(np.asarray(state.first_bad)[: len(labels)], names, num_steps, guidance_scale)
        x = state.x[: len(labels)]
        if self.decode is None:
            return np.asarray(x)
        images = np.asarray(self.decode(x))
        if len(bad := np.flatnonzero(~np.isfinite(images).reshape(len(images), -1).all(axis=1))):
            raise FloatingPointError(
                f"the samples are not finite: {names[bad[0]]} is finite until it is decoded "
                f"({len(bad)} of {len(names)}); the autoencoder makes it so."
            )
        return images

    def _check(self, first_bad: Int[np.ndarray, "*cells"], names: list[str], num_steps: int, scale: float) -> None:
        """Raises FloatingPointError where a sample is not finite."""
        cells = first_bad.reshape(len(names), -1)
        steps = np.where(cells < 0, num_steps, cells).min(axis=1)
        advice = f"a smaller guidance_scale than {scale:g} may help" if scale != 1 else "the model itself makes them so"
        check_steps(np.where(steps < num_steps, steps, -1), names, num_steps, advice)

    def _sample_chunk(
        self,
        params: PyTree,
        state: State,
        levels: Levels,
        key: jax.Array,
        samples: tuple[Int[Array, " samples"], Int[Array, " samples"]],
        scale: Float[Array, ""],
        sampler: Sampler,
        guided: int,
    ) -> State:
        """Takes (labels, indices) of samples through `levels`, with so many channels guided."""
        labels, indices = samples
        null = jnp.full_like(labels, self.config.num_classes)
        apply = functools.partial(self._model.apply, {"params": params}, method="on_images")

        def network(x: Array, t: Array) -> Array:
            if not guided:
                return apply(x, t, labels)
            # A sample and the same without its class side by side, so that both are on its device.
            classes = jnp.stack([labels, null], axis=1).reshape(-1)
            both = apply(jnp.repeat(x, 2, axis=0), jnp.repeat(t, 2), classes)
            conditional, unconditional = both[::2], both[1::2]
            return classifier_free(lambda *_: conditional, lambda *_: unconditional, scale, guided)(x, t)

        def noise(step: Array) -> Array:
            return sample_noise(key, indices, step + 1, state.x.shape[1:])

        denoise = denoiser(network, self._prediction, self._clip, learned_range=self.config.learned_variance)
        return sample_chunk(denoise, state, levels, sampler, noise)


def sample_noise(
    key: jax.Array, indices: Int[Array, " samples"], number: Int[Array, ""], shape: tuple[int, ...]
) -> Float[Array, "samples *shape"]:
    """Returns standard normal noise (N, *shape), each sample's from the key, its index and the number of the draw.

    Args:
        key: of the seed.
        indices: (N,), of the samples.
        number: 0 for what a chain starts from, n for its n-th step.
        shape: of a sample.
    """

    def one(index: Array) -> Array:
        return jax.random.normal(jax.random.fold_in(jax.random.fold_in(key, index), number), shape)

    return jax.vmap(one)(indices)
