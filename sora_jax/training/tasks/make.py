"""The task of each kind of experiment."""

from __future__ import annotations

from sora_jax.config import ExperimentConfig, SoraConfig
from sora_jax.models.attention import AttentionFn
from sora_jax.training.tasks.class_conditional import ClassConditionalConfig, ClassConditionalTask
from sora_jax.training.tasks.diffusion import DiffusionConfig, diffusion_task
from sora_jax.training.tasks.recognition import (
    ClassificationConfig,
    ContrastiveConfig,
    RecognitionConfig,
    recognition_task,
)
from sora_jax.training.tasks.sora import SoraTask
from sora_jax.training.tasks.task import Task

CONFIGS: dict[str, type[ExperimentConfig]] = {
    config.__name__: config
    for config in (SoraConfig, DiffusionConfig, ClassConditionalConfig, ClassificationConfig, ContrastiveConfig)
}


def make_task(config: ExperimentConfig, attention_fn: AttentionFn | None = None) -> Task:
    """Returns what an experiment trains.

    Args:
        config: of the experiment.
        attention_fn: replaces the attention kernel that the config names.

    Raises:
        TypeError: a config of a kind that nothing trains.
    """
    if isinstance(config, SoraConfig):
        return SoraTask(config, attention_fn)
    if isinstance(config, DiffusionConfig):
        return diffusion_task(config)
    if isinstance(config, ClassConditionalConfig):
        return ClassConditionalTask(config, attention_fn)
    if isinstance(config, RecognitionConfig):
        return recognition_task(config, attention_fn)
    raise TypeError(f"no task for a config of type {type(config).__name__}.")
