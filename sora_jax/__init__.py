"""sora_jax: text-conditioned diffusion transformers over packed spacetime patches.

What stands here is imported when it is first asked for, so that data workers and `--help` need no accelerator.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import Any

_MODULES = {"DiTPipeline": "generation.dit_pipeline", "SoraPipeline": "generation.pipeline", "load": "families.load"}

__all__ = ["DiTPipeline", "SoraPipeline", "__version__", "load"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.metadata.version("sora_jax")
    if name in _MODULES:
        return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}.")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
