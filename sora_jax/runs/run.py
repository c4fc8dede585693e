"""What a run of a family is to the training command: data, sample sheets and, of a study, a report."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import rich.console
from etils import epath
from jax.sharding import Mesh

from sora_jax.array_types import PyTree
from sora_jax.components import Components
from sora_jax.config import ExperimentConfig
from sora_jax.families.registry import family_of, imported
from sora_jax.training.loop import Batches

Report = dict[str, Any]

if TYPE_CHECKING:  # what `FAMILIES` names is checked against `Run` and `Study`, and imported when it is asked for
    from sora_jax.runs.diffusion import DiffusionRun
    from sora_jax.runs.dit import DiTRun
    from sora_jax.runs.packed import PackedRun
    from sora_jax.runs.recognition import RecognitionRun
    from sora_jax.runs.sora import SoraRun

    _RUNS: tuple[Callable[..., Run], ...] = (SoraRun, DiTRun, PackedRun)
    _STUDIES: tuple[Callable[..., Study], ...] = (DiffusionRun, RecognitionRun)


class Run(Protocol):
    """Made of (config, workdir, console); raises ValueError where the data or the config cannot work.

    Attributes:
        config: of the experiment, without what its data lacks.
    """

    config: Any

    @property
    def sample_sheet(self) -> Callable[[PyTree], np.ndarray] | None:
        """Draws a sheet, (H, W, 3) uint8, of the averaged parameters; None where there is nothing to draw."""

    def data_fingerprints(self) -> dict[str, str]:
        """Returns digests of the splits that are read (`sora_jax.data.identity`)."""

    def components(self) -> Components:
        """Returns what the model is trained with."""

    def open_batches(self, split: str, training: bool) -> Batches:
        """Opens a split: endless where it is trained on."""

    def initial_params(self, path: str) -> Callable[[Mesh], PyTree]:
        """Returns what gives the parameters that a new run starts from, on its mesh or on the host.

        Args:
            path: of a run, an exported model or whatever else the family starts from.
        """


class Study(Run, Protocol):
    """A run of a `sora_jax.config.StudyConfig`, which ends with a report."""

    @property
    def unit(self) -> str:
        """Of the report's figures."""

    @property
    def headline(self) -> tuple[str, str]:
        """Key and name of the figure that the report is about."""

    def selection_score(self) -> float:
        """Returns the headline of the finished run on the split that learning rates are compared on."""

    def prepare_report(self) -> None:
        """Does, on every host at once, what the report needs of all of them."""

    def report(self) -> Report:
        """Scores the finished run; writes its figures and pictures into its directory and returns the figures."""

    @staticmethod
    def beside(config: Any, other: Any, name: str) -> Any:
        """Returns another experiment as it is run beside one; ValueError where the two cannot be compared."""

    @staticmethod
    def compare(means: dict[str, Report], workdir: epath.Path) -> None:
        """Adds to the figures what only several experiments say, and draws them in one picture."""


def run_class(config: ExperimentConfig) -> Any:
    """Returns the class of the runs of a config's family."""
    return imported(family_of(config).run)


def make_run(config: ExperimentConfig, workdir: epath.Path, console: rich.console.Console) -> Any:
    """Returns a run of an experiment: a `Run`, of a study a `Study`."""
    return run_class(config)(config, workdir, console)
