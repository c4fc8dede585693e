"""What a run of discrete diffusion needs: its examples, its sample sheets, and the report on its likelihood."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Callable

import jax
import numpy as np
import rich.console
from etils import epath
from jax.sharding import Mesh

from sora_jax.array_types import PyTree
from sora_jax.components import CodecComponent, Components, ProcessComponent
from sora_jax.data.dead_leaves import DeadLeavesConfig
from sora_jax.data.examples import TRAIN, ExampleBatches
from sora_jax.data.identity import data_fingerprints
from sora_jax.diffusion import likelihood
from sora_jax.diffusion.binomial import null_bits
from sora_jax.evaluation.bound import BoundEstimate, estimate_bound
from sora_jax.evaluation.density import MCGSM, Gaussian, MCGSMConfig, fit_gaussian, fit_mcgsm
from sora_jax.families.diffusion import DiffusionConfig, diffusion_task
from sora_jax.families.load import load
from sora_jax.files import write_whole
from sora_jax.generation.progress import ProgressBar
from sora_jax.runs import pictures
from sora_jax.runs.run import Report

HELD_OUT_SEED = 20_150_312  # of generated examples, which no run is trained on
BATCH = 256  # examples that the bound is taken of at a time


class DiffusionRun:
    """A run on examples of one shape.

    Args:
        config: of the experiment.
        workdir: of the run.
        console: for messages.

    Attributes:
        config: of the experiment.
        data_fingerprints: returns digests of the splits that are read, none of examples that are generated.
        sample_sheet: draws a picture of images sampled by few steps, (H, W, 3) uint8; None for what is no image.
        unit: of the report's figures.
        headline: key and name of the figure that the report is about.

    Raises:
        ValueError: no data set at `config.data.path`, or too few held-out examples in it.
    """

    unit, headline = "bits", ("k_bits", "k")

    def __init__(self, config: DiffusionConfig, workdir: epath.Path, console: rich.console.Console) -> None:
        self.config = config
        self._workdir, self._console = workdir, console
        self._task = task = diffusion_task(config)
        self.sample_sheet: Callable[[PyTree], np.ndarray] | None = None
        if not task.of_bits and len(config.data.shape) == 3:
            self.sample_sheet = functools.partial(pictures.sample_sheet, task)
        splits = (config.data.split, *config.data.eval_splits)
        self.data_fingerprints = functools.partial(data_fingerprints, config.data, splits)
        self._held_out = config.data.held_out(
            config.num_held_out, HELD_OUT_SEED
        )  # before a run that could not be scored

    def components(self) -> Components:
        """Returns what the model is trained with."""
        return Components(codec=CodecComponent("identity"), process=ProcessComponent(self.config.process.kind))

    def initial_params(self, path: str) -> Callable[[Mesh], PyTree]:
        """Returns what reads the parameters of a run or an exported model of the same kind."""
        return lambda mesh: load(path, mesh, kinds=(self.config.kind,)).params

    def open_batches(self, split: str, training: bool) -> ExampleBatches:
        """Opens the examples of a split: endless where it is trained on, else drawn with a seed of their own."""
        return ExampleBatches(
            self.config.data.source(split),
            self.config.seed if training else HELD_OUT_SEED,
            self.config.data.batch_size,
            None if training else self.config.eval_batches,
            jax.process_index(),
            jax.process_count(),
        )

    def selection_score(self) -> float:
        """Raises ValueError: no grid of learning rates is run."""
        raise ValueError("an experiment in diffusion has no learning_rates to choose from.")

    def prepare_report(self) -> None:
        """Does nothing: no host needs another for it."""

    def report(self) -> Report:
        """Scores the finished run; writes its figures and pictures into its directory.

        Returns:
            `k_bits` and `k_stderr`, the bound and its standard error over the held-out examples, and what else is known
            of the data, all per `unit`.
        """
        params = jax.device_put(load(self._workdir).params)
        held_out = self._held_out
        bar = ProgressBar("bound")
        batches = self.config.num_draws * math.ceil(len(held_out) / min(BATCH, len(held_out)))
        estimate = estimate_bound(
            lambda x, key: self._task.bound(params, x, key),
            held_out,
            jax.random.key(HELD_OUT_SEED),
            num_draws=self.config.num_draws,
            batch_size=BATCH,
            progress=lambda done: bar(done, batches),
        )
        figures = score(self.config, estimate, held_out, self._console)
        write_whole(self._workdir / "report.json", json.dumps(figures, indent=2) + "\n")
        for name, png in pictures.draw(self._task, params, estimate, held_out).items():
            write_whole(self._workdir / name, png)
        return figures

    @staticmethod
    def compare(means: dict[str, Report], workdir: epath.Path) -> None:
        """Does nothing: what stands side by side says it."""

    @staticmethod
    def beside(config: DiffusionConfig, other: DiffusionConfig, name: str) -> DiffusionConfig:
        """Returns another experiment as it is run beside one: on its data, seeds and held-out examples.

        Raises:
            ValueError: it is on another kind of data.
        """
        if type(config.data) is not type(other.data):
            kinds = f"{type(config.data).__name__}, got {name!r} with {type(other.data).__name__}"
            raise ValueError(f"beside must name experiments on the same kind of data, {kinds}.")
        return dataclasses.replace(
            other,
            data=dataclasses.replace(config.data, batch_size=other.data.batch_size),
            **{field: getattr(config, field) for field in ("seed", "num_seeds", "num_held_out", "num_draws")},
        )


def score(
    config: DiffusionConfig, estimate: BoundEstimate, held_out: np.ndarray, console: rich.console.Console
) -> Report:
    """Returns the bound of held-out examples beside what else is known of their log-likelihood, in bits a unit."""
    data = config.data
    images = len(data.shape) == 3
    num_values = held_out[0].size if images else 1
    figures: Report = {
        "unit": "value" if images else "example",
        "k_bits": estimate.mean / num_values,
        "k_stderr": estimate.standard_error / num_values,
    }
    if data.values == "8-bit":
        figures["bits_per_dim"] = -figures["k_bits"]
        curve = likelihood.rate_distortion(estimate.terms, num_values)
        figures |= {"rate": np.asarray(curve.rate).tolist(), "distortion": np.asarray(curve.distortion).tolist()}
    elif data.values == "bits":
        figures["null_bits"] = null_bits(held_out.shape[1])
    else:
        figures["null_bits"] = float(np.mean(likelihood.null_bits(held_out))) / num_values
    log_density = data.log_density(held_out)
    if log_density is not None:
        true = likelihood.bits(log_density)
        gap = true - estimate.k  # of the same examples, so that its error is smaller than that of either
        figures["true_bits"] = float(true.mean())
        figures["gap_stderr"] = float(gap.std(ddof=1) / math.sqrt(len(gap)))
    figures |= data.facts()
    if images and data.values == "numbers":
        console.print("fitting the Gaussian and the autoregressive baseline", highlight=False)
        figures |= baselines(data)(held_out)
    if "null_bits" in figures:
        figures["gain_bits"] = figures["k_bits"] - figures["null_bits"]
    if "true_bits" in figures:
        figures["gap_bits"] = figures["true_bits"] - figures["k_bits"]
    return figures


@functools.cache
def baselines(data: DeadLeavesConfig) -> Callable[[np.ndarray], Report]:
    """Returns what gives the mean log-likelihood of images under densities fitted to those that are trained on."""
    images = data.images(TRAIN)
    densities: dict[str, Gaussian | MCGSM] = {"gaussian_bits": fit_gaussian(images)}
    densities["mcgsm_bits"] = fit_mcgsm(images, MCGSMConfig())
    return lambda held_out: {
        name: float(density.log_density(held_out).mean()) / held_out[0].size for name, density in densities.items()
    }
