"""Bit packing and quantised matrices."""

import numpy as np
import pytest
import safetensors.numpy

from sora_jax.models.quantize import (
    dequantize,
    dequantize_tensors,
    pack_bits,
    quantize,
    quantize_tensors,
    unpack_bits,
)


@pytest.mark.parametrize("bits", range(2, 9))
def test_packing_round_trip(bits):
    codes = np.random.default_rng(bits).integers(0, 2**bits, (3, 5, 16)).astype(np.uint8)
    packed = pack_bits(codes, bits)
    assert packed.shape == (3, 5, 2 * bits)
    np.testing.assert_array_equal(unpack_bits(packed, bits), codes)


def test_packed_layout():
    # Codes 1, 2, 3 of 6 bits, then zeros: 000011 000010 000001 read from the right are 24 bits, 3 bytes.
    codes = np.array([1, 2, 3, 0, 0, 0, 0, 0], np.uint8)
    number = 1 + (2 << 6) + (3 << 12)
    assert pack_bits(codes, 6).tobytes() == number.to_bytes(6, "little")


def test_error_is_within_half_a_step():
    weights = np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    packed, scale = quantize(weights, 6, 32)
    assert packed.shape == (4, 2, 24) and scale.shape == (4, 2) and scale.dtype == np.float16
    error = np.abs(dequantize(packed, scale, 6) - weights).reshape(4, 2, 32)
    largest = np.abs(weights.reshape(4, 2, 32)).max(-1, keepdims=True)
    assert (error <= 0.51 * largest / 31).all()  # half a step, and float16's rounding of the scale


def test_quantising_twice_changes_nothing():
    once = dequantize(*quantize(np.random.default_rng(0).normal(size=(8, 64)), 7, 64), 7)
    np.testing.assert_array_equal(dequantize(*quantize(once, 7, 64), 7), once)


def test_zeros_stay_zeros():
    np.testing.assert_array_equal(dequantize(*quantize(np.zeros((2, 32)), 6, 32), 6), np.zeros((2, 32)))


def test_tensors_round_trip():
    rng = np.random.default_rng(0)
    tensors = {"a.kernel": rng.normal(size=(2, 8, 16)).astype(np.float32), "a.bias": np.arange(3.0, dtype=np.float32)}
    stored = quantize_tensors(tensors, {"a.kernel": (8, 8)})
    assert sorted(stored) == ["a.bias", "a.kernel.codes8", "a.kernel.scale"]
    back = dequantize_tensors(stored)
    np.testing.assert_array_equal(back["a.bias"], tensors["a.bias"])
    np.testing.assert_allclose(back["a.kernel"], tensors["a.kernel"], atol=0.02)
    del stored["a.kernel.scale"]
    with pytest.raises(ValueError, match=r"a\.kernel\.scale"):
        dequantize_tensors(stored)


def test_transposed_tensors_survive_a_file():
    value = np.random.default_rng(0).normal(size=(2, 16, 24)).astype(np.float32).transpose(0, 2, 1)  # a view
    stored = quantize_tensors({"a": value, "b": value}, {"a": (8, 8)})
    back = dequantize_tensors(safetensors.numpy.load(safetensors.numpy.save(stored)))
    np.testing.assert_array_equal(back["b"], value)
    np.testing.assert_allclose(back["a"], value, atol=0.02)


def test_bad_input():
    with pytest.raises(ValueError, match="multiple of 8"):
        pack_bits(np.zeros(7, np.uint8), 6)
    with pytest.raises(ValueError, match=r"below 2\^3, got 9"):
        pack_bits(np.full(8, 9, np.uint8), 3)
    with pytest.raises(ValueError, match="bits must be between 2 and 8, got 9"):
        unpack_bits(np.zeros(9, np.uint8), 9)
    with pytest.raises(ValueError, match="divides 48, got 32"):
        quantize(np.zeros((1, 48)), 6, 32)
    with pytest.raises(ValueError, match="need scales of shape"):
        dequantize(np.zeros((2, 6), np.uint8), np.zeros(3, np.float16), 6)
