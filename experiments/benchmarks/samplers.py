"""How near each sampler comes to a sample of very many steps, by how often it asks the network.

Two questions, each at the same numbers of evaluations (Heun takes half as many steps):

    model    clips of a trained model. A deterministic sampler follows the ODE from its noise to one clip: the root mean
             squared distance to that clip, as Heun's method gives it with `reference_steps`, pixels being in [-1, 1].
             (Samplers that add noise lead elsewhere each time.)
    mixture  a mixture of Gaussians whose optimal denoiser is known, in two dimensions: the energy distance of samples
             to the mixture's own, in units of what two sets of its own samples have between them (1 is perfect).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from benchmarks.training_step import device_name
from sora_jax.config import FlowConfig
from sora_jax.diffusion.exact import mixture_denoiser
from sora_jax.diffusion.gaussian import flow_levels
from sora_jax.diffusion.process import FlowProcess
from sora_jax.diffusion.samplers import SAMPLERS, Sampler
from sora_jax.generation.canvas import make_requests
from sora_jax.generation.generator import Generator, plain_draw, sample_seeds
from sora_jax.generation.pipeline import SoraPipeline

WEIGHTS, STD = np.array([0.4, 0.25, 0.2, 0.15]), 0.1
MEANS = np.array([[1.0, 0.3], [-0.8, 0.9], [-0.5, -1.1], [0.6, -0.7]])


@dataclasses.dataclass(frozen=True)
class SamplersOptions:
    """Measures the error of each sampler by evaluations of the network.

    Attributes:
        checkpoint: a run directory or an exported model (default: the released model).
        prompts: a clip each, at the model's own sample settings.
        evaluations: of the network; what is not a multiple of a step's is rounded down.
        reference_steps: of Heun's method, for the reference clips.
        guidance_scale: of the clips (default: the model's sample settings).
        num_points: drawn of the mixture.
        seed: of all noise.
        json: also write the table's figures to this file.
    """

    checkpoint: str | None = None
    prompts: tuple[str, ...] = ("frog", "bus")
    evaluations: tuple[int, ...] = (5, 10, 20, 50)
    reference_steps: int = 1000
    guidance_scale: float | None = None
    num_points: int = 4000
    seed: int = 0
    json: Path | None = None

    def __post_init__(self) -> None:
        most = max(sampler.evaluations for sampler in SAMPLERS.values())
        if not self.evaluations or min(self.evaluations) < most:
            raise ValueError(f"evaluations must be at least {most} each, got {self.evaluations}.")
        for name, least in (("reference_steps", 1), ("num_points", 2)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}.")
        if not self.prompts:
            raise ValueError("prompts must be one or more.")


def run(options: SamplersOptions) -> dict[str, Any]:
    """Runs the suite, prints its table and returns its figures."""
    rows = [*model_rows(options), *mixture_rows(options)]
    return report(rows, options)


def model_rows(options: SamplersOptions) -> list[dict[str, Any]]:
    """Measures the deterministic samplers on the model's clips."""
    pipeline = SoraPipeline.from_pretrained(options.checkpoint)
    asked = pipeline.config.sample
    requests = make_requests(
        options.prompts,
        options.seed,
        guidance_scale=asked.guidance_scale if options.guidance_scale is None else options.guidance_scale,
        **{name: getattr(asked, name) for name in ("num_frames", "height", "width", "fps")},
    )

    def clips(name: str, num_steps: int, description: str) -> np.ndarray:
        with tqdm(total=num_steps, desc=description, unit="step") as bar:
            made = pipeline.clips(
                requests, options.prompts, num_steps, name, progress=lambda done, total: bar.update(done - bar.n)
            )
        return np.stack(made)

    reference = clips("heun", options.reference_steps, f"reference of {options.reference_steps} steps")
    rows = []
    for name, sampler in SAMPLERS.items():
        for evaluations in () if sampler.stochastic else options.evaluations:
            made = clips(name, evaluations // sampler.evaluations, f"{name}, {evaluations} evaluations")
            error = float(np.sqrt(((made - reference) ** 2).mean()))
            rows.append({"what": "model", "sampler": name, "evaluations": evaluations, "error": error})
    return rows


def mixture_rows(options: SamplersOptions) -> list[dict[str, Any]]:
    """Measures every sampler on the mixture."""
    rng = np.random.default_rng(options.seed)

    def draw() -> np.ndarray:
        which = rng.choice(len(WEIGHTS), options.num_points, p=WEIGHTS)
        return MEANS[which] + STD * rng.standard_normal((options.num_points, 2))

    true = draw()
    # Two sets of the mixture's own samples are not at zero from each other: what is left is the unit.
    unit = float(np.mean([energy_distance(true, draw()) for _ in range(4)]))
    rows = []
    for name, sampler in tqdm(SAMPLERS.items(), desc="mixture", unit="sampler"):
        for evaluations in options.evaluations:
            points = sample_mixture(sampler, evaluations // sampler.evaluations, options)
            error = energy_distance(points, true) / unit
            rows.append({"what": "mixture", "sampler": name, "evaluations": evaluations, "error": error})
    return rows


def sample_mixture(sampler: Sampler, num_steps: int, options: SamplersOptions) -> np.ndarray:
    """Returns (num_points, 2) samples of the mixture."""
    process, denoise = FlowProcess(FlowConfig()), mixture_denoiser(WEIGHTS, MEANS, STD)

    def velocity(params: tuple[()], rows: tuple[()], x: jax.Array, t: jax.Array) -> jax.Array:
        predicted = denoise(x, flow_levels(t))
        return predicted.noise - predicted.x0

    generator = Generator(velocity, process, (), jax.local_devices()[:1])
    draw = plain_draw((2,), process.ladder(num_steps), sample_seeds(options.seed, np.arange(options.num_points)))
    names = [f"point {i}" for i in range(options.num_points)]
    return generator(draw, sampler, names, longest_chunk=num_steps).astype(np.float64)


def energy_distance(x: np.ndarray, y: np.ndarray) -> float:
    """Returns 2 E|X - Y| - E|X - X'| - E|Y - Y'| between two sets of points, 0 where they are one."""

    def mean(a: np.ndarray, b: np.ndarray) -> float:
        return float(jnp.sqrt(((a[:, None] - b[None]) ** 2).sum(-1)).mean())

    return 2 * mean(x, y) - mean(x, x) - mean(y, y)


def report(rows: list[dict[str, Any]], options: SamplersOptions) -> dict[str, Any]:
    """Prints the table; returns what goes into the JSON file."""
    titles = {
        "model": f"released model, RMS distance to {options.reference_steps} steps of Heun",
        "mixture": "mixture, energy distance to its own samples (1: theirs to each other)",
    }
    if options.checkpoint:
        titles["model"] = titles["model"].replace("released model", options.checkpoint)
    for what, title in titles.items():
        table = Table("sampler", *(f"{n} evaluations" for n in options.evaluations), title=title)
        for name in SAMPLERS:
            errors = [row["error"] for row in rows if (row["what"], row["sampler"]) == (what, name)]
            if errors:
                table.add_row(name, *(f"{error:.4f}" if what == "model" else f"{error:.2f}" for error in errors))
        Console().print(table)
    return {"rows": rows, "reference_steps": options.reference_steps, "device": device_name()}
