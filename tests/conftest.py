"""Compilation of the fast tests, and the check of shapes written in signatures at run time."""

import gc
import os
import pathlib

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax
import pytest
from helpers.compilation import compile_quickly
from jaxtyping import install_import_hook

MOST_MEMORY = 1_800_000_000

for package in ("patches", "diffusion", "models"):
    install_import_hook(f"sora_jax.{package}", "beartype.beartype")


def pytest_configure(config):
    """The tests of the README spend their time on compiling programs that run for milliseconds.

    The heavier ones (`-m slow`, `-m parity`) compile as users do.
    """
    if "not slow" in config.option.markexpr:
        compile_quickly()


@pytest.fixture(scope="module", autouse=True)
def compiled_programs_are_not_piled_up():
    """What is compiled would take gigabytes in the end; to free it takes seconds, so not after every file."""
    yield
    memory = pathlib.Path("/proc/self/statm")
    if memory.exists() and int(memory.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") > MOST_MEMORY:
        jax.clear_caches()
        gc.collect()
