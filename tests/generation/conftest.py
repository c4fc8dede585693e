import dataclasses

import jax
import pytest
from tiny_model import WordEncoder, make_config, random_params

from sora_jax.generation.pipeline import SoraPipeline


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
