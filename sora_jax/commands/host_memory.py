"""What the C library does with memory that JAX frees, on machines without an accelerator.

There a compiled step takes its arrays from `malloc` and gives them back each time. glibc returns large blocks to the
operating system at once, so that each step touches all its memory for the first time again: a sixth of the training
step of DiT-S/2, and half of it where a virtual machine was slow to give pages.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os

import jax

# Parameters of mallopt(3).
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8
_OWN_SETTINGS = ("MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD")


def keep_freed_memory() -> bool:
    """Lets this process keep the memory that it frees, for the next step; of use before JAX has started its threads.

    The process stays as large as it ever was, up to twice what it needs at once, since free blocks lie between used
    ones; it takes about ten steps until none needs new memory. Nothing is done where JAX may find an accelerator, where
    the user has chosen an allocator or its settings by the environment (`MALLOC_*`, `GLIBC_TUNABLES`, `LD_PRELOAD`),
    or without glibc.

    Returns:
        Whether it was done.
    """
    if _may_have_accelerator() or any(name.startswith(_OWN_SETTINGS) for name in os.environ):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return False
    # Blocks of any size come from the one heap that can grow to any size, and its end is not cut off.
    settings = {_ARENA_MAX: 1, _MMAP_MAX: 0, _TRIM_THRESHOLD: -1, _TOP_PAD: 1 << 28}
    return all(mallopt(parameter, value) == 1 for parameter, value in settings.items())


def _may_have_accelerator() -> bool:
    """Returns whether JAX could run on anything but the CPU, without starting it."""
    if jax.config.jax_platforms:
        return jax.config.jax_platforms != "cpu"
    return any(importlib.util.find_spec(name) for name in ("libtpu", "jax_plugins"))
