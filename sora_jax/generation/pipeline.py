"""From prompts to clips.

In short:

pipeline = SoraPipeline.from_pretrained()
clips = pipeline(["frog", "rocket"], num_frames=[8, 1], height=48, width=48, seed=0)
(frog,) = pipeline("frog")
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from textwrap import shorten

import jax
import numpy as np
from etils import epath

from sora_jax.array_types import NumpyArray, PyTree
from sora_jax.components import Components, TextEncoderComponent, warn_of_difference
from sora_jax.diffusion.process import FlowProcess
from sora_jax.families.sora import SoraConfig, network
from sora_jax.generation.canvas import make_requests
from sora_jax.generation.clips import ClipGenerator, TextConditioner, TextEncoder
from sora_jax.generation.generator import Generator, sampling_mesh
from sora_jax.models.attention import AttentionFn
from sora_jax.models.autoencoder.codec import Codec, IdentityCodec
from sora_jax.models.sora import SoraTransformer
from sora_jax.parallel.attention import attention_for
from sora_jax.pixels import RGB, from_pixels, to_pixels

DEFAULT_MODEL = epath.Path(__file__).parent.parent / "assets" / "sora_emoji"


class SoraPipeline:
    """A trained model, ready to be asked for clips.

    Calls of equal shapes (and sampler) share one compiled function; `params` may be replaced by others of the same
    shapes between calls (`pipeline.params = ema_params`), which costs no compilation either.

    Args:
        config: of the experiment that trained the model.
        params: its (EMA) parameters, unboxed.
        text_encoder: of the captions.
        codec: decodes what the model makes (default: that is pixels).
        devices: the rows are split over them (default: all of this host).
        tokens_per_batch: most tokens that one device samples at once; more clips are sampled batch after batch.
        attention_fn: the attention kernel (default: one for the platform).

    Attributes:
        config: of the experiment.
        clips: makes the clips of requests, as values in about [-1, 1].

    Raises:
        ValueError: a model of latents without their codec, or a text encoder of another width than it reads.
    """

    def __init__(
        self,
        config: SoraConfig,
        params: PyTree,
        text_encoder: TextEncoder,
        codec: Codec | None = None,
        devices: Sequence[jax.Device] | None = None,
        tokens_per_batch: int = 16_384,
        attention_fn: AttentionFn | None = None,
    ):
        if codec is None and config.patch.channels != RGB:
            raise ValueError(
                f"patch.channels must be 3 to make RGB pixels, got {config.patch.channels}: latents need their "
                "autoencoder, vae."
            )
        if text_encoder.dim != config.model.text_dim:
            raise ValueError(
                f"the text encoder gives tokens of width {text_encoder.dim}; the model's text_dim is "
                f"{config.model.text_dim}."
            )
        self.config = config
        # The kernel that trained the model need not exist here; all of them compute the same.
        kernel = attention_fn or attention_for("auto", sampling_mesh(devices))
        model = SoraTransformer(dataclasses.replace(config.model, remat="none"), config.patch.dim, kernel)
        self.clips = ClipGenerator(
            Generator(functools.partial(network, model), FlowProcess(config.flow), params, devices),
            TextConditioner(text_encoder, config.data.max_caption_tokens),
            IdentityCodec() if codec is None else codec,
            config.patch,
            tokens_per_batch,
        )

    @classmethod
    def from_pretrained(
        cls,
        path: str | epath.PathLike | None = None,
        vae: str | epath.PathLike | None = None,
        devices: Sequence[jax.Device] | None = None,
    ) -> SoraPipeline:
        """Loads a run directory or an exported model directory; without `path`, the released default.

        Args:
            path: of the model.
            vae: directory of the autoencoder that decodes a model's latents.
            devices: the rows are split over them (default: all of this host).

        Raises:
            FileNotFoundError: there is no model at `path`, or no autoencoder at `vae`.
            ValueError: the files there do not make a model; a model of latents without `vae`, or of pixels with it, or
                an autoencoder of another number of channels.
        """
        from sora_jax.families.load import codec_of, load
        from sora_jax.models.text.minilm import load_text_encoder

        loaded = load(DEFAULT_MODEL if path is None else path, kinds=("sora",))
        if vae is None and loaded.pixels is False:
            raise ValueError(f"{loaded.path} makes latents: name the autoencoder that decodes them, vae.")
        channels = loaded.config.patch.channels
        codec = None if vae is None else codec_of(loaded, vae, channels, devices, pixels=channels == RGB)
        encoder = load_text_encoder()
        component = TextEncoderComponent(encoder.name, encoder.fingerprint, loaded.config.data.max_caption_tokens)
        warn_of_difference(loaded.components, Components(text_encoder=component), str(loaded.path))
        return cls(loaded.config, loaded.params, encoder, codec, devices)

    @property
    def params(self) -> PyTree:
        """The model's parameters, on every device."""
        return self.clips.generator.params

    @params.setter
    def params(self, params: PyTree) -> None:
        self.clips.generator.params = params

    def __call__(
        self,
        prompts: str | Sequence[str],
        num_frames: int | Sequence[int] | None = None,
        height: int | Sequence[int] | None = None,
        width: int | Sequence[int] | None = None,
        fps: float | Sequence[float] | None = None,
        num_steps: int | None = None,
        guidance_scale: float | Sequence[float] | None = None,
        seed: int | Sequence[int] = 0,
        sampler: str = "euler",
        strength: float | Sequence[float] = 1.0,
        known_frames: int | Sequence[int] = 0,
        stagger: int | Sequence[int] = 0,
        content: Sequence[NumpyArray | None] | None = None,
        guidance_interval: tuple[float, float] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[np.ndarray]:
        """Makes one clip a prompt.

        Where an argument is None, the model's `config.sample` says what it is best asked for.

        Args:
            prompts: a caption, or several; an empty one gives an unconditional sample. They are cut to the model's
                caption length with a warning.
            num_frames: of the clips, one value or one for each prompt (so all that follow, but for `num_steps` and
                `sampler`); 1 is an image.
            height: in pixels, a multiple of the patch's.
            width: in pixels, a multiple of the patch's.
            fps: frames a second.
            num_steps: of the sampler.
            guidance_scale: of classifier-free guidance; 1 is none, which takes half the time.
            seed: a single one s gives prompt i the seed s + i.
            sampler: a name of `sora_jax.diffusion.samplers.SAMPLERS`: `euler`; `heun`, which is of second order and
                evaluates the model twice a step; `dpm++` and `unipc`, which get there by looking back; `dpm++sde` and
                `ancestral`, which add noise on the way.
            strength: share of the way to noise that `content` is taken before it is made anew; 1 leaves nothing of it
                but what is known.
            known_frames: so many first frames are those of `content`.
            stagger: steps by which each latent frame begins later than the one before it.
            content: for each prompt a given clip, (T, H, W, 3) uint8, or None.
            guidance_interval: (lowest, highest) time at which there is guidance (arXiv:2404.07724); None for all.
            progress: called with (steps done, steps in all) from time to time, for a progress bar.

        Returns:
            For each prompt a (T, H, W, 3) uint8 array.

        Raises:
            ValueError: an argument that cannot be, naming it and what would work.
            FloatingPointError: clips that are not finite, naming the first and the step from which on it is not.
        """
        sample = self.config.sample
        given = {"num_frames": num_frames, "height": height, "width": width, "fps": fps}
        given["guidance_scale"] = guidance_scale
        given = {name: getattr(sample, name) if value is None else value for name, value in given.items()}
        given |= {"strength": strength, "known_frames": known_frames, "stagger": stagger}
        if content is not None:
            given["content"] = [None if clip is None else from_pixels(clip) for clip in content]
        requests = make_requests([prompts] if isinstance(prompts, str) else list(prompts), seed, **given)
        names = [f"prompt {i} ({shorten(request.prompt, 60)!r})" for i, request in enumerate(requests, 1)]
        num_steps = sample.num_steps if num_steps is None else num_steps
        made = self.clips(requests, names, num_steps, sampler, interval=guidance_interval, progress=progress)
        return [to_pixels(clip) for clip in made]
