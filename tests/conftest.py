"""Fixtures that several tests share; shapes written in signatures are checked at run time."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

from jaxtyping import install_import_hook

for package in ("patches", "diffusion", "models"):
    install_import_hook(f"sora_jax.{package}", "beartype.beartype")
