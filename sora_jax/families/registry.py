"""Every family that can be trained, by the kind that its config names: the one place where kinds are distinguished.

A family is a file here (its config, its task and its network call), its network in `sora_jax.models`, and a line of
`FAMILIES`. What it needs to be run (data, sample sheets, a report) is a `sora_jax.runs.run.Run`.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, overload

from jax.sharding import Mesh

from sora_jax.config import ExperimentConfig
from sora_jax.models.attention import AttentionFn, xla_attention
from sora_jax.parallel.attention import attention_for
from sora_jax.training.task import Task

if TYPE_CHECKING:  # families are imported when they are asked for
    from sora_jax.families.diffusion import diffusion_task
    from sora_jax.families.dit import ClassConditionalTask
    from sora_jax.families.recognition import (
        ClassificationTask,
        ContrastiveTask,
        RecognitionConfig,
        RecognitionTask,
    )
    from sora_jax.families.sora import SoraTask

    _TASKS: tuple[Callable[..., Task], ...] = (
        SoraTask, ClassConditionalTask, diffusion_task, ClassificationTask, ContrastiveTask
    )  # fmt: skip


class Family(NamedTuple):
    """What a kind of experiment stands for; each as `module:name`, imported when it is asked for.

    Attributes:
        config: its `ExperimentConfig`, whose `kind` is the family's name.
        task: makes its `sora_jax.training.task.Task` of (config, attention_fn).
        run: its `sora_jax.runs.run.Run`.
        what: a model of it is, in words.
        use: what takes one, in words.
    """

    config: str
    task: str
    run: str
    what: str
    use: str


_CLASSIFIER = "evaluate.py classify and train.py --init-from take it"
_F, _R = "sora_jax.families", "sora_jax.runs"
FAMILIES: dict[str, Family] = {
    "sora": Family(
        f"{_F}.sora:SoraConfig", f"{_F}.sora:SoraTask", f"{_R}.sora:SoraRun",
        "a Sora", "generate.py --prompt, evaluate.py nearest and sample take it",
    ),
    "dit": Family(
        f"{_F}.dit:ClassConditionalConfig", f"{_F}.dit:ClassConditionalTask", f"{_R}.dit:DiTRun",
        "a DiT that was trained here", "generate.py --class-labels and evaluate.py sample take it",
    ),
    "diffusion": Family(
        f"{_F}.diffusion:DiffusionConfig", f"{_F}.diffusion:diffusion_task", f"{_R}.diffusion:DiffusionRun",
        "a study of discrete diffusion", "train.py reports on it and evaluate.py sample takes it",
    ),
    "classification": Family(
        f"{_F}.recognition:ClassificationConfig", f"{_F}.recognition:ClassificationTask",
        f"{_R}.recognition:RecognitionRun", "a classifier (ViT, ViViT or NaViT)", _CLASSIFIER,
    ),
    "contrastive": Family(
        f"{_F}.recognition:ContrastiveConfig", f"{_F}.recognition:ContrastiveTask",
        f"{_R}.recognition:RecognitionRun", "a contrastive NaViT", "train.py --init-from takes it",
    ),
}  # fmt: skip


# What draws sets of images of a model, by its kind: of runs and of converted weights.
SAMPLED: dict[str, str] = {
    "sora": "sora_jax.generation.sets:TextSet",
    "dit": "sora_jax.generation.sets:ClassSet",
    "dit_model": "sora_jax.generation.sets:ClassSet",
    "diffusion": "sora_jax.generation.sets:diffusion_set",
    "unet": "sora_jax.generation.sets:ddpm_set",
}


def imported(name: str) -> Any:
    """Returns what `module:name` stands for."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def family_of(config: ExperimentConfig) -> Family:
    """Returns the family of a config.

    Raises:
        ValueError: its kind is not registered.
    """
    if config.kind not in FAMILIES:
        raise ValueError(f"kind of {type(config).__name__} must be one of {', '.join(FAMILIES)}, got {config.kind!r}.")
    return FAMILIES[config.kind]


def config_class(kind: str) -> type[ExperimentConfig]:
    """Returns the class of the configs of a kind; KeyError where there is none."""
    return imported(FAMILIES[kind].config)


@overload
def make_task(
    config: RecognitionConfig, mesh: Mesh | None = ..., platform: str | None = ...
) -> RecognitionTask[Any]: ...
@overload
def make_task(config: ExperimentConfig, mesh: Mesh | None = ..., platform: str | None = ...) -> Task: ...
def make_task(config: ExperimentConfig, mesh: Mesh | None = None, platform: str | None = None) -> Task:
    """Returns what an experiment trains.

    Args:
        config: of the experiment.
        mesh: that it is to run on, with the attention kernel that the config names; None where only shapes or counts
            are wanted, for which the reference serves.
        platform: that is compiled for; None for the mesh's.

    Raises:
        ValueError: a config of a kind that is not registered, or an attention kernel that the platform does not have.
    """
    name = getattr(config.model, "attention", None)  # of the families that can choose
    kernel: AttentionFn = xla_attention
    if mesh is not None and name is not None:
        kernel = attention_for(name, mesh, platform, packed=config.data.packs_several)
    return imported(family_of(config).task)(config, kernel)


def task_for(config: ExperimentConfig) -> Callable[[Mesh], Task]:
    """Returns what makes the task of an experiment for a mesh, with the attention kernel that is chosen for it."""
    return functools.partial(make_task, config)
