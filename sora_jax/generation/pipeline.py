"""From prompts to clips: text encoder, packed canvas, sampler, pixels.

In short:

pipeline = SoraPipeline.from_pretrained()
clips = pipeline(["frog", "rocket"], num_frames=[8, 1], height=48, width=48, seed=0)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from textwrap import shorten
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from sora_jax.array_types import Array, Float, Int, PackedBatch, PyTree
from sora_jax.components import Components, TextEncoderComponent, warn_of_difference
from sora_jax.config import MeshConfig
from sora_jax.diffusion.gaussian import flow_levels
from sora_jax.diffusion.guidance import classifier_free
from sora_jax.diffusion.samplers import SAMPLERS, Levels, State, denoiser, sample, sample_chunk, start
from sora_jax.diffusion.schedules import flow_times
from sora_jax.families.sora import SoraConfig
from sora_jax.generation.canvas import ClipRequest, blank_segment, is_number, make_requests, pack_canvas, unpack_clips
from sora_jax.models.sora import SoraTransformer
from sora_jax.parallel.mesh import make_mesh
from sora_jax.parallel.rules import batch_sharding, replicated
from sora_jax.pixels import check_steps, to_pixels

DEFAULT_MODEL = epath.Path(__file__).parent.parent / "assets" / "sora_emoji"
LONGEST_CHUNK = 5  # sampler steps in one compiled scan, and between two calls of `progress`


class TextEncoder(Protocol):
    """What the pipeline needs of a text encoder."""

    dim: int

    def encode(self, captions: list[str], max_tokens: int) -> list[Float[np.ndarray, "tokens dim"]]:
        """Returns each caption's token states, cut to `max_tokens` with a warning."""
        ...


class SoraPipeline:
    """A trained model, ready to be asked for clips.

    Calls of equal shapes (and sampler) share one compiled function; `params` may be replaced by others of the same
    shapes between calls (`pipeline.params = ema_params`), which costs no compilation either.

    Args:
        config: of the experiment that trained the model.
        params: its (EMA) parameters, unboxed.
        text_encoder: of the captions.
        devices: the rows are split over them (default: all of this host).
        tokens_per_batch: most tokens that one device samples at once; more clips are sampled batch after batch.

    Raises:
        ValueError: a model of latents rather than pixels, or a text encoder of another width than it reads.
    """

    def __init__(
        self,
        config: SoraConfig,
        params: PyTree,
        text_encoder: TextEncoder,
        devices: Sequence[jax.Device] | None = None,
        tokens_per_batch: int = 16_384,
    ):
        if config.patch.channels != 3:
            raise ValueError(
                f"patch.channels must be 3 to make RGB pixels, got {config.patch.channels}: nothing decodes latents."
            )
        if text_encoder.dim != config.model.text_dim:
            raise ValueError(
                f"the text encoder gives tokens of width {text_encoder.dim}; the model's text_dim is "
                f"{config.model.text_dim}."
            )
        if tokens_per_batch < 1:
            raise ValueError(f"tokens_per_batch must be at least 1, got {tokens_per_batch}.")
        self.config = config
        self.text_encoder = text_encoder
        self.tokens_per_batch = tokens_per_batch
        self._mesh = make_mesh(MeshConfig(data=-1), jax.local_devices() if devices is None else devices)
        self.params = params
        # The kernel that trained the model need not exist here; all of them compute the same.
        model_config = dataclasses.replace(config.model, attention="auto", remat="none")
        self._model = SoraTransformer(model_config, config.patch.dim)
        split = batch_sharding(self._mesh)
        self._state_shardings = State(split, split, index=replicated(self._mesh), first_bad=split)
        self._sample = jax.jit(
            self._sample_chunk,
            static_argnames="sampler",
            donate_argnames="state",
            out_shardings=self._state_shardings,  # what goes in, or the second chunk would compile again
        )

    @classmethod
    def from_pretrained(cls, path: str | epath.PathLike | None = None) -> SoraPipeline:
        """Loads a run directory or an exported model directory; without `path`, the released default.

        Raises:
            FileNotFoundError: there is no model at `path`.
            ValueError: the files there do not make a model.
        """
        from sora_jax.families.load import load
        from sora_jax.models.text.minilm import load_text_encoder

        loaded = load(DEFAULT_MODEL if path is None else path, kinds=("sora",))
        encoder = load_text_encoder()
        component = TextEncoderComponent(encoder.name, encoder.fingerprint, loaded.config.data.max_caption_tokens)
        warn_of_difference(loaded.components, Components(text_encoder=component), str(loaded.path))
        return cls(loaded.config, loaded.params, encoder)

    @property
    def params(self) -> PyTree:
        """The model's parameters, on every device."""
        return self._params

    @params.setter
    def params(self, params: PyTree) -> None:
        self._params = jax.device_put(params, replicated(self._mesh))

    def __call__(
        self,
        prompts: Sequence[str],
        num_frames: int | Sequence[int] | None = None,
        height: int | Sequence[int] | None = None,
        width: int | Sequence[int] | None = None,
        fps: float | Sequence[float] | None = None,
        num_steps: int | None = None,
        guidance_scale: float | None = None,
        seed: int | Sequence[int] = 0,
        sampler: str = "euler",
        progress: Callable[[int, int], None] | None = None,
    ) -> list[np.ndarray]:
        """Makes one clip a prompt.

        Where an argument is None, the model's `config.sample` says what it is best asked for.

        Args:
            prompts: captions; an empty one gives an unconditional sample. Cut to the model's caption length with a
                warning.
            num_frames: of the clips, one value or one for each prompt (so `height`, `width`, `fps` and `seed`);
                1 is an image.
            height: in pixels, a multiple of the patch's.
            width: in pixels, a multiple of the patch's.
            fps: frames a second.
            num_steps: of the sampler.
            guidance_scale: of classifier-free guidance; 1 is none, which takes half the time.
            seed: a single one s gives prompt i the seed s + i.
            sampler: a name of `sora_jax.diffusion.samplers.SAMPLERS`: `euler`; `heun`, which is of second order and
                evaluates the model twice a step; `dpm++` and `unipc`, which get there by looking back; `dpm++sde` and
                `ancestral`, which add noise on the way.
            progress: called with (steps done, steps in all) from time to time, for a progress bar.

        Returns:
            For each prompt a (T, H, W, 3) uint8 array.

        Raises:
            ValueError: an argument that cannot be, naming it and what would work.
            FloatingPointError: clips that are not finite, naming the first and the step from which on it is not.
        """
        sample = self.config.sample
        given = {"num_frames": num_frames, "height": height, "width": width, "fps": fps}
        given = {name: getattr(sample, name) if value is None else value for name, value in given.items()}
        requests = make_requests(list(prompts) if not isinstance(prompts, str) else prompts, seed, **given)
        num_steps = sample.num_steps if num_steps is None else num_steps
        scale = sample.guidance_scale if guidance_scale is None else guidance_scale
        if sampler not in SAMPLERS:
            raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, got {sampler!r}.")
        if not is_number(num_steps, np.integer):
            raise ValueError(f"num_steps must be a whole number of at least 1, got {num_steps!r}.")
        if not is_number(scale) or not np.isfinite(scale):
            raise ValueError(f"guidance_scale must be finite, got {scale!r}.")
        times = flow_times(num_steps)
        return [to_pixels(clip) for clip in self.sample(requests, times, float(scale), sampler, progress)]

    def sample(
        self,
        requests: Sequence[ClipRequest],
        times: Float[np.ndarray, " times"],
        scale: float,
        sampler: str,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Float[np.ndarray, "frames height width channels"]]:
        """Returns the sampled clips in the range that the model was trained on, neither clipped nor rounded.

        Args:
            requests: the clips.
            times: falling from 1 to 0 (`sora_jax.diffusion.schedules.flow_times`).
            scale: of classifier-free guidance; 1 is none.
            sampler: a name of `sora_jax.diffusion.samplers.SAMPLERS`.
            progress: called with (steps done, steps in all).

        Raises:
            FloatingPointError: see `__call__`.
        """
        patch = self.config.patch
        captions = list(dict.fromkeys(["", *(request.prompt.strip() for request in requests)]))
        text = dict(zip(captions, self.text_encoder.encode(captions, self.config.data.max_caption_tokens), strict=True))
        segments = [blank_segment(r, i, text[r.prompt.strip()], patch) for i, r in enumerate(requests)]

        num_devices = self._mesh.size
        longest = max(len(segment.patches) for segment in segments)
        most_rows = num_devices * max(1, self.tokens_per_batch // longest)
        rows, null_rows = pack_canvas(segments, text[""], num_devices)
        if len(rows.patches) > most_rows:  # equal batches, so that one function serves them all
            rows, null_rows = pack_canvas(segments, text[""], most_rows)
        size = min(len(rows.patches), most_rows)

        firsts = range(0, len(rows.patches), size)
        num_steps, sampled = len(times) - 1, []
        for number, first in enumerate(firsts):

            def report(step: int, done: int = number * num_steps) -> None:
                progress(done + step, len(firsts) * num_steps)

            batch, null = (PackedBatch(*(a[first : first + size] for a in some)) for some in (rows, null_rows))
            null = null if scale != 1 else None
            seeds = np.array([request.seed for request in requests], np.uint32)[batch.clip_ids]  # (B, K)
            x, first_bad = self._sample_batch(batch, null, seeds, times, scale, sampler, report if progress else None)
            _check_clips(first_bad, batch, requests, num_steps, scale)
            sampled.append(x)
        return unpack_clips(np.concatenate(sampled), rows, requests, patch)

    def _sample_batch(
        self,
        batch: PackedBatch,
        null: PackedBatch | None,
        seeds: Int[np.ndarray, "rows segments"],
        times: Float[np.ndarray, " times"],
        scale: float,
        sampler: str,
        report: Callable[[int], None] | None,
    ) -> tuple[Float[np.ndarray, "rows length values"], Int[np.ndarray, "rows length"]]:
        """Samples the rows of one batch; `null` holds them with the null caption, None for no guidance.

        Returns:
            The rows, and `first_bad` of their tokens (see `sora_jax.diffusion.samplers.State`).
        """
        split = batch_sharding(self._mesh)
        arrays, seeds = jax.device_put((batch, seeds), split)
        null_text = None if null is None else jax.device_put((null.text, null.text_segment_ids), split)
        # What is asked for goes from noise to data; known patches and padding are at t = 0 and stay as they are.
        levels = flow_levels(times[:, None, None] * batch.loss_mask)._replace(time=times)
        state = jax.device_put(start(SAMPLERS[sampler], jnp.asarray(batch.patches), levels), self._state_shardings)

        def chunk(state: State, levels: Levels) -> State:
            return self._sample(
                self.params, state, levels, arrays, null_text, seeds, np.float32(scale), sampler=sampler
            )

        state = sample(chunk, state, levels, LONGEST_CHUNK, report)
        return np.asarray(state.x), np.asarray(state.first_bad)

    def _sample_chunk(
        self,
        params: PyTree,
        state: State,
        levels: Levels,
        batch: PackedBatch,
        null_text: tuple[Float[Array, "rows text dim"], Int[Array, "rows text"]] | None,
        seeds: Int[Array, "rows segments"],
        scale: Float[Array, ""],
        sampler: str,
    ) -> State:
        """Takes rows through `levels`, whose times are one for all that is asked."""

        def network(x: Array, t: Array, text: Array, text_segment_ids: Array) -> Array:
            copies = len(text) // len(x)  # the rows with their captions and, under guidance, once more without
            x, positions, segment_ids, level_ids = (
                jnp.concatenate([array] * copies) for array in (x, batch.positions, batch.segment_ids, batch.level_ids)
            )
            table = jnp.tile(jnp.stack([t, jnp.zeros_like(t)]), (len(x), batch.clip_ids.shape[1]))  # asked, known
            return self._model.apply(
                {"params": params}, x, positions, segment_ids, table, level_ids, text, text_segment_ids
            )

        def guided(x: Array, t: Array) -> Array:
            if null_text is None:
                return network(x, t, batch.text, batch.text_segment_ids)
            text = jnp.concatenate([batch.text, null_text[0]])
            ids = jnp.concatenate([batch.text_segment_ids, null_text[1]])
            conditional, unconditional = jnp.split(network(x, t, text, ids), 2)
            return classifier_free(lambda *_: conditional, lambda *_: unconditional, scale)(x, t)

        def noise(step: Array) -> Array:
            return token_noise(seeds, step, batch.segment_ids, batch.patches.shape[-1])

        return sample_chunk(denoiser(guided, self.config.flow.prediction), state, levels, SAMPLERS[sampler], noise)


def token_noise(
    seeds: Int[Array, "rows segments"], step: Int[Array, ""], segment_ids: Int[Array, "rows length"], values: int
) -> Float[Array, "rows length values"]:
    """Draws the noise of a step from (clip's seed, step, patch's number in its clip), wherever the clip is packed.

    Args:
        seeds: (B, K), of the segments.
        step: of the sampler.
        segment_ids: (B, L), each segment's tokens side by side, 0 for padding.
        values: P, of a patch.
    """
    index = jnp.arange(segment_ids.shape[1])
    is_first = jnp.diff(segment_ids, axis=1, prepend=0) != 0
    number = index - jax.lax.cummax(jnp.where(is_first, index, 0), axis=1)
    seed = jnp.take_along_axis(seeds, jnp.maximum(segment_ids - 1, 0), axis=1)

    def one(seed: Array, number: Array) -> Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), number)
        return jax.random.normal(key, (values,))

    return jax.vmap(jax.vmap(one))(seed, number)


def _check_clips(
    first_bad: Int[np.ndarray, "rows length"],
    batch: PackedBatch,
    requests: Sequence[ClipRequest],
    num_steps: int,
    scale: float,
) -> None:
    """Raises FloatingPointError where a clip of the batch is not finite."""
    ids = np.concatenate([np.full((len(first_bad), 1), -1), batch.clip_ids], axis=1)
    clips = np.take_along_axis(ids, batch.segment_ids, axis=1)  # (B, L), of each token; -1 for padding
    bad = (first_bad >= 0) & (clips >= 0)
    steps = np.full(len(requests), num_steps)
    np.minimum.at(steps, clips[bad], first_bad[bad])
    names = [f"prompt {i} ({shorten(request.prompt, 60)!r})" for i, request in enumerate(requests, 1)]
    advice = f"a smaller guidance_scale than {scale:g} may help" if scale != 1 else "the model itself makes them so"
    check_steps(np.where(steps < num_steps, steps, -1), names, num_steps, advice)
