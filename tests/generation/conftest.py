import dataclasses

import jax
import pytest
from tiny_model import TEXT_DIM, WordEncoder, random_params

from sora_jax.config import DataConfig, PatchConfig
from sora_jax.families.sora import SampleConfig, SoraConfig
from sora_jax.generation.pipeline import SoraPipeline
from sora_jax.models.sora import ModelConfig


def make_config():
    return SoraConfig(
        model=ModelConfig(width=32, depth=1, num_heads=2, mlp_dim=64, text_dim=TEXT_DIM, frequency_dim=16),
        patch=PatchConfig(size=(2, 4, 4)),
        data=DataConfig(max_caption_tokens=8, text_length=32),
        sample=SampleConfig(num_frames=2, height=8, width=8, fps=8.0, num_steps=2),
    )


@pytest.fixture(scope="session")
def tiny_config():
    return make_config()


@pytest.fixture(scope="session")
def pipeline(tiny_config):
    return SoraPipeline(tiny_config, random_params(tiny_config), WordEncoder(), devices=jax.devices()[:1])


@pytest.fixture
def with_config(tiny_config):
    """Returns a pipeline whose config has some fields replaced."""
    return lambda **changes: SoraPipeline(
        dataclasses.replace(tiny_config, **changes), random_params(tiny_config), WordEncoder()
    )
