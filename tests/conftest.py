"""Compilation of the fast tests, and the check of shapes written in signatures at run time."""

import gc
import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest
from helpers.compilation import compile_quickly
from jaxtyping import install_import_hook

for package in ("patches", "diffusion", "models"):
    install_import_hook(f"sora_jax.{package}", "beartype.beartype")


def pytest_configure(config):
    """The tests of the README spend their time on compiling programs that run for milliseconds.

    The heavier ones (`-m slow`, `-m parity`) compile as users do.
    """
    if "not slow" in config.option.markexpr:
        compile_quickly()


@pytest.fixture(scope="module", autouse=True)
def compiled_programs_end_with_their_file():
    """Kept to the end, they would take gigabytes."""
    yield
    jax.clear_caches()
    gc.collect()
