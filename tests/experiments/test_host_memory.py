import pathlib
import platform
import subprocess
import sys

import pytest

EXPERIMENTS = pathlib.Path(__file__).parents[2] / "experiments"
# Counts the pages that four steps of 64 MiB touch for the first time, after as many as it takes to settle.
STEPS = """
import resource, sys
sys.path.insert(0, sys.argv[1])
from sora_jax.commands.host_memory import keep_freed_memory
kept = keep_freed_memory()
import jax, jax.numpy as jnp
steps = int(sys.argv[2])
step = jax.jit(lambda x: x * 2 + 1)
x = jnp.ones(1 << 24)
faults = [resource.getrusage(resource.RUSAGE_SELF).ru_minflt]
for _ in range(steps):
    step(x).block_until_ready()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(kept, faults[-1] - faults[-5] if steps else 0)
"""
PAGES = 4 * (1 << 26) // 4096  # of the results alone


def run(steps, **environment):
    plain = {"JAX_PLATFORMS": "cpu", "PATH": "", **environment}
    out = subprocess.run(
        [sys.executable, "-c", STEPS, str(EXPERIMENTS), str(steps)],
        env=plain,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    kept, faults = out.split()
    return kept == "True", int(faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told what to do with freed memory")
def test_steps_use_the_memory_of_those_before():
    kept, faults = run(60)
    assert kept
    assert faults < PAGES / 2  # at times a block moves


def test_settings_of_the_user_stay():
    kept, faults = run(8, MALLOC_ARENA_MAX="8")
    assert not kept
    assert faults > PAGES / 2 or platform.libc_ver()[0] != "glibc"


def test_nothing_is_done_where_there_may_be_an_accelerator():
    assert not run(0, JAX_PLATFORMS="cpu,cuda")[0]
