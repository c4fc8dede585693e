"""Rounding that keeps products."""

import numpy as np
import pytest

from sora_jax.convert.rounding import compensated_rounding
from sora_jax.models.quantize import dequantize, quantize


def test_products_are_closer_than_with_nearest_rounding():
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(200, 4)) @ rng.normal(size=(4, 32)) + 0.1 * rng.normal(size=(200, 32))  # near rank 4
    kernel = rng.normal(size=(32, 16)).astype(np.float32)
    nearest = dequantize(*quantize(kernel, 4, 16), 4)
    rounded = compensated_rounding(kernel, inputs.T @ inputs, bits=4, group=16, damping=0.01)
    error = [np.linalg.norm(inputs @ (kernel - q)) for q in (nearest, rounded)]
    assert error[1] < 0.6 * error[0]
    np.testing.assert_array_equal(dequantize(*quantize(rounded, 4, 16), 4), rounded)  # it lies on the grid


def test_uncorrelated_inputs_leave_nearest_rounding():
    kernel = np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    rounded = compensated_rounding(kernel, np.eye(16), bits=6, group=8)
    np.testing.assert_array_equal(rounded, dequantize(*quantize(kernel, 6, 8), 6))


def test_bad_input():
    with pytest.raises(ValueError, match=r"second_moment must be \(16, 16\), got \(8, 8\)"):
        compensated_rounding(np.zeros((16, 8)), np.eye(8), bits=6, group=8)
    with pytest.raises(ValueError, match="damping must be positive, got 0"):
        compensated_rounding(np.zeros((8, 8)), np.eye(8), bits=6, group=8, damping=0)
