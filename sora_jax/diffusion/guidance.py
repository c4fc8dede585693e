"""Guidance, as wrappers of denoise functions."""

from __future__ import annotations

from sora_jax.array_types import Array
from sora_jax.diffusion.samplers import Denoise


def classifier_free(conditional: Denoise, unconditional: Denoise, scale: float | Array) -> Denoise:
    """Returns a denoise function that moves `scale` times from the unconditional to the conditional velocity.

    v = v_null + scale (v_text - v_null), which is arXiv:2207.12598, Eq. 6 with scale = 1 + w: 1 is no guidance.
    """

    def denoise(x: Array, t: Array) -> Array:
        null = unconditional(x, t)
        return null + scale * (conditional(x, t) - null)

    return denoise
