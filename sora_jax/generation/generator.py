"""One generator: whatever a family makes goes through its sampler here, on all devices.

A family gives its network call `network(params, rows, x, levels)`, its process, and perhaps a codec. What is sampled is
a `Draw`: states, what the network is conditioned on, and the levels they are taken down, which may differ from clip to
clip and from frame to frame. States are packed rows of clips, or plain examples of one shape.

Noise is drawn from (a clip's or example's own seed, the step), so what one comes out as depends on neither its
neighbours nor the devices.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from sora_jax.array_types import Array, Bool, Float, Int, NumpyArray, PyTree
from sora_jax.config import MeshConfig
from sora_jax.diffusion.gaussian import Levels, expand
from sora_jax.diffusion.guidance import classifier_free, limited_interval
from sora_jax.diffusion.process import Process
from sora_jax.diffusion.samplers import Denoise, Sampler, State, sample, sample_chunk, start
from sora_jax.generation.canvas import CLEAN, Canvas
from sora_jax.parallel.mesh import make_mesh
from sora_jax.parallel.rules import batch_sharding, replicated
from sora_jax.pixels import check_steps

LONGEST_CHUNK = 5  # sampler steps in one compiled scan, and between two calls of `progress`

FamilyNetwork = Callable[[PyTree, PyTree, Array, Array], Array]


class Draw(NamedTuple):
    """States that are sampled together: N packed rows of L patches and K clips, or N plain examples.

    Attributes:
        x: (N, L, P) or (N, ...) float32, the states at their first levels.
        rows: what the network is conditioned on; leaves (N, ...).
        null_rows: the same without what is guided towards; None for no guidance.
        levels: (S + 1, N, J) or (S + 1, N), the level tables before the first step and after each.
        seeds: (N, K) or (N,) uint32, of the clips or examples.
        scales: (N, K) or (N,) float32, of their guidance.
        names: (N, K) or (N,) int32, which of the names in messages is theirs; -1 for none.
        segment_ids: (N, L), the clip of each patch, 0 for padding; None for plain examples.
        level_ids: (N, L), the column of each patch; None for plain examples.
    """

    x: Float[Array, "rows ..."]
    rows: PyTree
    null_rows: PyTree | None
    levels: Levels
    seeds: Int[Array, "rows ..."]
    scales: Float[Array, "rows ..."]
    names: Int[Array, "rows ..."]
    segment_ids: Int[Array, "rows length"] | None = None
    level_ids: Int[Array, "rows length"] | None = None


def canvas_draw(canvas: Canvas, seeds: Sequence[int], scales: Sequence[float]) -> Draw:
    """Returns the draw of packed clips; there is no guidance where all scales are 1.

    Args:
        canvas: the rows; `clip_ids` are places among the seeds and scales.
        seeds: of the clips.
        scales: of their guidance.
    """
    rows, ids = canvas.rows, canvas.rows.clip_ids
    return Draw(
        x=rows.patches,
        rows=rows._replace(patches=None),
        null_rows=canvas.null_rows._replace(patches=None) if any(scale != 1 for scale in scales) else None,
        levels=canvas.levels,
        seeds=np.asarray(seeds, np.uint32)[ids],
        scales=np.asarray(scales, np.float32)[ids],
        names=ids,
        segment_ids=rows.segment_ids,
        level_ids=rows.level_ids,
    )


def plain_draw(shape: tuple[int, ...], ladder: Levels, seeds: Int[np.ndarray, " examples"], multiple: int = 1) -> Draw:
    """Returns the draw of plain examples from noise, of a network that is conditioned on the step alone.

    Args:
        shape: of an example.
        ladder: (n + 1,) each, the levels.
        seeds: of the examples, which their noise is drawn from.
        multiple: the number of examples is made a multiple of this by repeating the last.
    """
    seeds = np.asarray(seeds, np.uint32)
    names = np.pad(np.arange(len(seeds), dtype=np.int32), (0, -len(seeds) % multiple), constant_values=-1)
    seeds = np.pad(seeds, (0, len(names) - len(seeds)), mode="edge")
    x = np.stack([np.random.default_rng(seed).standard_normal(shape, np.float32) for seed in seeds])
    levels = Levels(*(np.repeat(np.asarray(a)[:, None], len(seeds), axis=1) for a in ladder))
    return Draw(x, (), None, levels, seeds, np.ones(len(seeds), np.float32), names)


def sampling_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns the mesh that rows are split over: one axis of the devices (default: all of this host)."""
    return make_mesh(MeshConfig(data=-1), jax.local_devices() if devices is None else devices)


class Generator:
    """Takes states through a sampler, on a mesh.

    Calls of equal shapes and equal samplers share one compiled function; `params` may be replaced by others of the same
    shapes between calls, which costs no compilation either.

    Args:
        network: of the family: (params, rows, x, levels) to its output, at the levels of `Draw.levels`.
        process: what the output stands for.
        params: of the network, unboxed.
        devices: the rows are split over them (default: all of this host).
    """

    def __init__(
        self, network: FamilyNetwork, process: Process, params: PyTree, devices: Sequence[jax.Device] | None = None
    ) -> None:
        self.network, self.process = network, process
        self._mesh = sampling_mesh(devices)
        self.params = params
        split = batch_sharding(self._mesh)
        self._state_shardings = State(split, split, index=replicated(self._mesh), first_bad=split)
        self._chunk = jax.jit(
            self._sample_chunk,
            static_argnames=("sampler", "interval", "wrap"),
            donate_argnames="state",
            out_shardings=self._state_shardings,  # what goes in, or the second chunk would compile again
        )

    @property
    def num_devices(self) -> int:
        """Devices that rows are split over: a draw's rows are a multiple of it."""
        return self._mesh.size

    @property
    def num_compiled(self) -> int:
        """Functions that were compiled so far."""
        return self._chunk._cache_size()

    @property
    def params(self) -> PyTree:
        """The network's parameters, on every device."""
        return self._params

    @params.setter
    def params(self, params: PyTree) -> None:
        self._params = jax.device_put(params, replicated(self._mesh))

    def __call__(
        self,
        draw: Draw,
        sampler: Sampler,
        names: Sequence[str],
        *,
        at_once: int | None = None,
        guided_values: Bool[np.ndarray, " values"] | None = None,
        interval: tuple[float, float] | None = None,
        wrap: Callable[[Denoise], Denoise] | None = None,
        first_step: int = 0,
        longest_chunk: int = LONGEST_CHUNK,
        progress: Callable[[int, int], None] | None = None,
    ) -> NumpyArray:
        """Returns the states at the last levels, float32.

        Args:
            draw: what is sampled.
            sampler: that steps.
            names: what messages call the clips or examples.
            at_once: rows that are sampled together, a divisor of the draw's; the rest follows (default: all).
            guided_values: of the last axis of what the network puts out, which are guided; None for all.
            interval: (lowest, highest) time at which there is guidance (arXiv:2404.07724); None for all.
            wrap: of the denoise function, such as `sora_jax.diffusion.guidance.inpainting`; another compiles anew.
            first_step: number of the first step, where these states have made others before; a multi-step sampler
                begins anew.
            longest_chunk: most steps between two calls of `progress`.
            progress: called with (steps done, steps in all).

        Raises:
            FloatingPointError: states that are not finite, naming the first and the step from which on it is not.
        """
        num_rows, num_steps = len(draw.x), len(draw.levels.sigma) - 1
        at_once = num_rows if at_once is None else at_once
        firsts = range(0, num_rows, at_once)
        sampled = []
        for number, first in enumerate(firsts):
            part, done = slice(first, first + at_once), number * num_steps
            levels = Levels(*(np.asarray(a)[:, part] for a in draw.levels))
            some = jax.tree.map(lambda a, part=part: a[part], draw._replace(levels=None))._replace(levels=levels)
            report = progress and (lambda step, done=done: progress(done + step, len(firsts) * num_steps))
            options = dict(sampler=sampler, interval=interval, wrap=wrap)
            state = self._sample(some, guided_values, options, first_step, longest_chunk, report)
            self._check(np.asarray(state.first_bad), some, names, first_step + num_steps)
            sampled.append(np.asarray(state.x))
        return np.concatenate(sampled)

    def _sample(
        self,
        draw: Draw,
        guided_values: Bool[np.ndarray, " values"] | None,
        options: dict[str, Any],
        first_step: int,
        longest_chunk: int,
        report: Callable[[int], None] | None,
    ) -> State:
        """Returns the state of one batch at its last levels; `options` are what a function is compiled for."""
        levels = draw.levels
        first = cell_levels(Levels(*(a[:1] for a in levels)), draw.segment_ids, draw.level_ids)
        state = start(options["sampler"], jnp.asarray(draw.x), first)._replace(index=jnp.int32(first_step))
        state = jax.device_put(state, self._state_shardings)
        conditioning = jax.device_put(draw._replace(x=None, levels=None, names=None), batch_sharding(self._mesh))

        def chunk(state: State, levels: Levels) -> State:
            return self._chunk(self._params, state, levels, conditioning, guided_values, **options)

        return sample(chunk, state, levels, longest_chunk, report)

    def _sample_chunk(
        self,
        params: PyTree,
        state: State,
        levels: Levels,
        draw: Draw,
        guided_values: Array | None,
        sampler: Sampler,
        interval: tuple[float, float] | None,
        wrap: Callable[[Denoise], Denoise] | None,
    ) -> State:
        """Takes a state through `levels`, (n + 1, N, J) or (n + 1, N)."""
        denoise = self.process.denoiser(functools.partial(self._guided(draw, guided_values, interval), params))
        noise = functools.partial(_noise, draw.seeds, draw.segment_ids, state.x.shape)
        levels = cell_levels(levels, draw.segment_ids, draw.level_ids)
        return sample_chunk(denoise if wrap is None else wrap(denoise), state, levels, sampler, noise)

    def _guided(
        self, draw: Draw, values: Array | None, interval: tuple[float, float] | None
    ) -> Callable[[PyTree, Array, Array], Array]:
        """Returns the function of (params, x, levels) with guidance."""
        if draw.null_rows is None:
            return lambda params, x, levels: self.network(params, draw.rows, x, levels)
        # A row and the same without its condition side by side, so that both are on its device.
        pair = lambda a, b: jnp.stack([a, b], axis=1).reshape(2 * len(a), *a.shape[1:])  # noqa: E731
        rows = jax.tree.map(pair, draw.rows, draw.null_rows)
        scales = _of_cells(draw.scales, draw.segment_ids)

        def network(params: PyTree, x: Array, levels: Array) -> Array:
            both = self.network(params, rows, pair(x, x), pair(levels, levels)).reshape(len(x), 2, *x.shape[1:-1], -1)
            conditional, null = both[:, 0], both[:, 1]
            scale = expand(scales, conditional)
            guided = classifier_free(lambda *_: conditional, lambda *_: null, scale, values)
            if interval is not None:
                guided = limited_interval(guided, lambda *_: conditional, *interval)
            return guided(x, levels if draw.level_ids is None else jnp.take_along_axis(levels, draw.level_ids, axis=1))

        return network

    def _check(self, first_bad: NumpyArray, draw: Draw, names: Sequence[str], num_steps: int) -> None:
        """Raises FloatingPointError where something of the batch is not finite."""
        owners = draw.names
        if draw.segment_ids is None:
            owners = np.broadcast_to(owners.reshape(-1, *[1] * (first_bad.ndim - 1)), first_bad.shape)
        else:
            owners = np.where(draw.segment_ids > 0, _of_cells(owners, draw.segment_ids, np), -1)
        bad = (first_bad >= 0) & (owners >= 0)
        steps = np.full(len(names), num_steps)
        np.minimum.at(steps, owners[bad], first_bad[bad])
        scale = max(np.unique(draw.scales[draw.names >= 0]).tolist(), key=abs, default=1)
        guided = draw.null_rows is not None and scale != 1
        advice = f"a smaller guidance_scale than {scale:g} may help" if guided else "the model itself makes them so"
        check_steps(np.where(steps < num_steps, steps, -1), list(names), num_steps, advice)


def cell_levels(
    levels: Levels, segment_ids: Int[Array, "rows length"] | None, level_ids: Int[Array, "rows length"] | None
) -> Levels:
    """Returns the levels of patches, (n, N, L), of those of columns, (n, N, J); `time` stays that of columns.

    Padding is clean, so that it stays as it is. The levels of plain examples are theirs already.
    """
    if level_ids is None:
        return levels
    ids, real = jnp.asarray(level_ids)[None], jnp.asarray(segment_ids)[None] > 0
    cells = (
        jnp.where(real, jnp.take_along_axis(jnp.asarray(table), ids, axis=2), clean)
        for table, clean in zip(levels[1:], CLEAN[1:], strict=True)
    )
    return Levels(levels.time, *cells)


def _of_cells(values: Array, segment_ids: Array | None, xp: Any = jnp) -> Array:
    """Returns the values (N, K) of clips for each of their patches, (N, L); those of plain examples as they are."""
    return values if segment_ids is None else xp.take_along_axis(values, xp.maximum(segment_ids - 1, 0), axis=1)


def _noise(seeds: Array, segment_ids: Array | None, shape: tuple[int, ...], step: Int[Array, ""]) -> Array:
    """Returns the standard normal noise of a step, of the shape of the state."""
    if segment_ids is not None:
        return token_noise(seeds, step, segment_ids, shape[-1])
    return jax.vmap(lambda seed: jax.random.normal(jax.random.fold_in(jax.random.key(seed), step), shape[1:]))(seeds)


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

    def one(seed: Array, number: Array) -> Array:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), step), number)
        return jax.random.normal(key, (values,))

    return jax.vmap(jax.vmap(one))(_of_cells(seeds, segment_ids), number)


def sample_seeds(seed: int, indices: Int[np.ndarray, " samples"]) -> Int[np.ndarray, " samples"]:
    """Returns the seeds of samples of a set, uint32: no two of a set are equal, and sets of other seeds have others."""
    first = np.random.SeedSequence(seed).generate_state(1, np.uint32)[0]
    return (np.asarray(indices, np.uint64) + first).astype(np.uint32)


def by_shape(arrays: Sequence[NumpyArray], function: Callable[[NumpyArray], NumpyArray]) -> list[NumpyArray]:
    """Returns a function of batches, (N, ...) to (N, ...), of each of some arrays; those of one shape go together."""
    results: list = [None] * len(arrays)
    order = sorted(range(len(arrays)), key=lambda i: arrays[i].shape)
    for _, group in itertools.groupby(order, key=lambda i: arrays[i].shape):
        places = list(group)
        for place, result in zip(places, function(np.stack([arrays[i] for i in places])), strict=True):
            results[place] = result
    return results
