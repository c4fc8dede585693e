"""The task of each kind of experiment."""

from __future__ import annotations

from jax.sharding import Mesh

from sora_jax.config import ExperimentConfig, SoraConfig
from sora_jax.models.attention import AttentionFn, xla_attention
from sora_jax.parallel.attention import attention_for
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


def make_task(config: ExperimentConfig, mesh: Mesh | None = None, platform: str | None = None) -> Task:
    """Returns what an experiment trains.

    Args:
        config: of the experiment.
        mesh: that it is to run on, with the attention kernel that the config names; None where only shapes or counts
            are wanted, for which the reference serves.
        platform: that is compiled for; None for the mesh's.

    Raises:
        TypeError: a config of a kind that nothing trains.
        ValueError: an attention kernel that the platform does not have.
    """
    if isinstance(config, DiffusionConfig):
        return diffusion_task(config)
    attention_fn: AttentionFn = xla_attention
    if mesh is not None:
        attention_fn = attention_for(config.model.attention, mesh, platform, packed=config.data.max_segments > 1)
    if isinstance(config, SoraConfig):
        return SoraTask(config, attention_fn)
    if isinstance(config, ClassConditionalConfig):
        return ClassConditionalTask(config, attention_fn)
    if isinstance(config, RecognitionConfig):
        return recognition_task(config, attention_fn)
    raise TypeError(f"no task for a config of type {type(config).__name__}.")
