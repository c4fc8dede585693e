"""Pictures of an experiment in discrete diffusion: samples, the way to noise and back, and the bound's terms."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from sora_jax.array_types import Array, PyTree
from sora_jax.diffusion import binomial, likelihood
from sora_jax.diffusion.gaussian import Levels, corrupt, posterior
from sora_jax.diffusion.guidance import Multiplied, inpainting
from sora_jax.diffusion.samplers import DDIM, Ancestral, Denoise, Sampler
from sora_jax.evaluation import plots
from sora_jax.evaluation.bound import BoundEstimate
from sora_jax.families.diffusion import BinomialTask, DiffusionTask, GaussianTask
from sora_jax.generation.generator import Generator, plain_draw, sample_seeds
from sora_jax.generation.progress import ProgressBar

Pictures = dict[str, bytes]  # PNGs by the names of their files
SEED = 0
PARTS = 4  # of a trajectory
SHEET_STEPS = 50  # of a sample sheet
NOISE = 0.5  # standard deviation of what is removed again


def draw(task: GaussianTask | BinomialTask, params: PyTree, estimate: BoundEstimate, held_out: np.ndarray) -> Pictures:
    """Returns all pictures of a trained model.

    Args:
        task: what was trained.
        params: of the model.
        estimate: of its bound.
        held_out: examples, (N, ...).
    """
    data, count = task.config.data, task.config.num_samples
    num_values = held_out[0].size if held_out.ndim == 4 else 1
    terms = np.asarray(likelihood.bits(estimate.terms.steps))[::-1, 0] / num_values
    pictures = {"bound.png": plots.bound_terms(terms, "value" if num_values > 1 else "example")}
    if task.of_bits:
        return pictures | {"trajectories.png": heartbeat_trajectories(task, params, held_out[:count])}
    if len(data.shape) == 1:
        return pictures | {"trajectories.png": point_trajectories(task, params, held_out[:count])}
    path = reverse_path(task, params, count, "samples")
    columns = min(count, len(held_out), 8)
    samples = path[-1][: count // columns * columns]
    pictures["samples.png"] = plots.png_bytes(
        plots.image_grid(list(scaled(task, samples).reshape(-1, columns, *samples.shape[1:])))
    )
    forward = [scaled(task, x[:columns]) for x in forward_path(task, params, held_out[:columns])]
    reverse = [scaled(task, x[:columns]) for x in path]
    pictures["trajectories.png"] = plots.png_bytes(plots.image_grid([*forward, *reverse]))
    if data.values == "numbers":
        pictures["inpainting.png"] = inpainted(task, params, held_out[:columns])
        pictures["denoising.png"] = denoised(task, params, held_out[:columns])
    else:
        curve = likelihood.rate_distortion(estimate.terms, num_values)
        pictures["rate_distortion.png"] = plots.rate_distortion(np.asarray(curve.rate), np.asarray(curve.distortion))
    return pictures


def sample_sheet(task: GaussianTask, params: PyTree) -> np.ndarray:
    """Returns a picture of images sampled by few steps of DDIM, (H, W, 3) uint8."""
    levels = task.process(params).ladder(min(SHEET_STEPS, task.config.process.num_levels))
    samples = run_chain(task, params, levels, DDIM(), task.config.num_samples, 1, "samples")[-1]
    columns = min(len(samples), 8)
    kept = scaled(task, samples[: len(samples) // columns * columns])
    return plots.image_grid(list(kept.reshape(-1, columns, *kept.shape[1:])))


def scaled(task: DiffusionTask, x: np.ndarray) -> np.ndarray:
    """Returns images in [-1, 1]: 8-bit ones as they are, others within two standard deviations."""
    return x if task.config.process.discrete else x / 2


def run_chain(
    task: GaussianTask,
    params: PyTree,
    levels: Levels,
    sampler: Sampler,
    count: int,
    num_parts: int,
    title: str,
    wrap: Callable[[Denoise], Denoise] | None = None,
) -> list[np.ndarray]:
    """Samples from noise and returns the states after each of equal parts of the way, the noise first.

    The samplers here remember nothing, so that a way may be cut into parts.
    """
    generator = Generator(task.network, task.process(params), params, jax.local_devices()[:1])
    draw = plain_draw(task.config.data.shape, levels, sample_seeds(SEED, np.arange(count)))
    names, bar = [f"sample {i} ({title})" for i in range(count)], ProgressBar(title)
    num_steps = len(levels.sigma) - 1
    ends = [round(num_steps * part / num_parts) for part in range(num_parts + 1)]
    path = [draw.x]
    for first, last in itertools.pairwise(ends):
        bar(first, num_steps)
        part = draw._replace(x=path[-1], levels=Levels(*(a[first : last + 1] for a in draw.levels)))
        path.append(generator(part, sampler, names, wrap=wrap, first_step=first, longest_chunk=last - first))
    bar(num_steps, num_steps)
    return path


def reverse_path(task: GaussianTask, params: PyTree, count: int, title: str) -> list[np.ndarray]:
    """Returns samples of the reverse chain along the way."""
    sampler = Ancestral(task.config.process.variance)
    return run_chain(task, params, task.levels(params), sampler, count, PARTS, title)


def forward_path(task: GaussianTask, params: PyTree, x0: np.ndarray) -> list[np.ndarray]:
    """Returns data on its way to noise, at the places of `reverse_path` from data on."""
    levels = task.levels(params)
    num_steps = len(levels.sigma) - 1
    noise = np.random.default_rng(SEED).standard_normal(x0.shape).astype(np.float32)
    places = [num_steps - round(num_steps * part / PARTS) for part in range(PARTS + 1)]
    return [np.asarray(corrupt(x0, noise, levels.alpha[i], levels.sigma[i])) for i in places]


def titles(num_steps: int) -> list[str]:
    """Returns the names of the places of a path, from data on."""
    return [f"t = {round(num_steps * part / PARTS)}" for part in range(PARTS + 1)]


def point_trajectories(task: GaussianTask, params: PyTree, x0: np.ndarray) -> bytes:
    """Returns Figure 1 of the paper: forward, reverse, and the drift of the reverse mean, by columns of time."""
    levels = Levels(*(jnp.asarray(a) for a in task.levels(params)))
    num_steps = len(levels.sigma) - 1
    names = titles(num_steps)
    forward = dict(zip(names, forward_path(task, params, x0), strict=True))
    reverse = dict(zip(names, reverse_path(task, params, len(x0), "samples")[::-1], strict=True))
    at = np.stack(np.meshgrid(*[np.linspace(-2.7, 2.7, 13, dtype=np.float32)] * 2), axis=-1).reshape(-1, 2)

    @jax.jit
    def drift(index: Array) -> Array:
        now, to = (Levels(*(a[i] for a in levels)) for i in (index, index + 1))
        q = posterior(now, to)
        return q.xt * at + q.x0 * task.denoise(params)(at, now).x0 - at

    places = [max(num_steps - 1 - round(num_steps * part / PARTS), 0) for part in range(PARTS + 1)]
    arrows = {name: (at, np.asarray(drift(i))) for name, i in zip(names, places, strict=True)}
    return plots.point_trajectories(forward, reverse, arrows)


def heartbeat_trajectories(task: BinomialTask, params: PyTree, x0: np.ndarray) -> bytes:
    """Returns Figure 2 of the paper: heartbeats on their way to coins, and coins on their way to heartbeats."""
    betas = task.config.process.betas()
    shape, num_steps = x0.shape, len(betas)
    path = np.asarray(
        jax.jit(lambda: binomial.trajectory(task.network_of(params), shape, betas, jax.random.key(SEED)))()
    )
    kept = np.append(1.0, binomial.kept(betas))
    places = [round(num_steps * part / PARTS) for part in range(PARTS + 1)]
    keys = jax.random.split(jax.random.key(SEED + 1), len(places))
    forward = [np.asarray(binomial.draw(k, binomial.marginal(x0, kept[t]))) for k, t in zip(keys, places, strict=True)]
    names = titles(num_steps)
    reverse = {name: path[num_steps - t] for name, t in zip(names, places, strict=True)}
    return plots.bit_trajectories(dict(zip(names, forward, strict=True)), reverse)


def inpainted(task: GaussianTask, params: PyTree, images: np.ndarray) -> bytes:
    """Returns images, the same with a square hole, and the hole filled by the reverse chain (section 2.5)."""
    size = images.shape[1]
    known = np.ones((1, size, size, 1), bool)
    known[:, size // 4 : size - size // 4, size // 4 : size - size // 4] = False
    key = jax.random.key(SEED + 1)

    def noise(level: Levels) -> Array:  # all examples are at one level
        return jax.random.normal(jax.random.fold_in(key, jnp.int32(level.time[0])), images.shape)

    def around(denoise: Denoise) -> Denoise:
        return inpainting(denoise, jnp.asarray(images), jnp.asarray(known), noise)

    sampler = Ancestral(task.config.process.variance)
    filled = run_chain(task, params, task.levels(params), sampler, len(images), 1, "inpainting", around)[-1]
    rows = [scaled(task, x) for x in (images, np.where(known, images, 2.0), filled)]
    return plots.png_bytes(plots.image_grid(rows))


def denoised(task: GaussianTask, params: PyTree, images: np.ndarray) -> bytes:
    """Returns images, the same with noise, and draws of p(x) r(x), r = N(noisy; x, s^2) (section 2.5)."""
    noise = np.random.default_rng(SEED).standard_normal(images.shape).astype(np.float32)
    noisy = images + NOISE * noise
    sampler = Multiplied(lambda x: (noisy - x) / NOISE**2)
    path = run_chain(task, params, task.levels(params), sampler, len(images), 1, "denoising")
    rows = [scaled(task, x) for x in (images, noisy, path[-1])]
    return plots.png_bytes(plots.image_grid(rows))
