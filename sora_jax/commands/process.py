"""What every script does first."""

from __future__ import annotations

import warnings

from sora_jax.parallel.platform import skip_missing_tpu


def prepare_process() -> None:
    """Has warnings printed in a line each and, where no TPU is, none looked for; before JAX is started."""
    warnings.formatwarning = lambda message, *_: f"warning: {message}\n"
    skip_missing_tpu()
