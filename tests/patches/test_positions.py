import math

import numpy as np
import pytest
import scipy.ndimage

from sora_jax.config import PatchConfig
from sora_jax.patches.positions import grid_positions, interpolate_positions
from sora_jax.patches.rotary import apply_rope, rope_angles, rope_pairs


def test_positions_are_seconds_and_patch_indices():
    # Two frames a patch at 8 frames a second: a patch every quarter of a second, four a second.
    positions = grid_positions((2, 1, 2), 8.0, PatchConfig(size=(2, 8, 8), reference_rate=4.0))
    np.testing.assert_array_equal(positions, [[0, 0, 0], [0, 0, 1], [1, 0, 0], [1, 0, 1]])
    assert positions.dtype == np.float32


def test_the_same_moment_has_the_same_coordinate_at_any_frame_rate():
    patch = PatchConfig(size=(2, 8, 8))
    slow, fast = grid_positions((3, 1, 1), 6.0, patch), grid_positions((5, 1, 1), 12.0, patch)
    np.testing.assert_allclose(slow[:, 0], fast[::2, 0], rtol=1e-6)


def test_a_frame_rate_must_be_positive():
    with pytest.raises(ValueError, match="fps must be positive, got 0"):
        grid_positions((1, 1, 1), 0.0, PatchConfig())


def test_pairs_of_a_wan_head():
    assert rope_pairs(128) == (22, 21, 21)


def rotate_by_complex_numbers(x, positions, theta):
    """The textbook form in float64: pairs as complex numbers times exp(i p theta^(-k/n))."""
    pairs = x.astype(np.float64).reshape(*x.shape[:-1], -1, 2)
    z = pairs[..., 0] + 1j * pairs[..., 1]
    turn, n_y = [], (x.shape[-1] // 2) // 3
    for axis, n in enumerate((x.shape[-1] // 2 - 2 * n_y, n_y, n_y)):
        turn += [np.exp(1j * positions[:, axis] * theta ** (-k / n)) for k in range(n)]
    z = z * np.stack(turn, axis=-1)[:, None]
    return np.stack([z.real, z.imag], axis=-1).reshape(x.shape)


def test_rope_against_complex_numbers():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(5, 2, 16)).astype(np.float32)
    positions = rng.uniform(0, 9, size=(5, 3)).astype(np.float32)
    turned = apply_rope(x, rope_angles(positions, 16, 10_000.0))
    np.testing.assert_allclose(turned, rotate_by_complex_numbers(x, positions, 10_000.0), atol=1e-5)


def test_products_depend_on_differences_alone():
    rng = np.random.default_rng(1)
    q, k = rng.normal(size=(2, 1, 1, 32)).astype(np.float32)
    p, shift = rng.uniform(0, 5, size=(2, 1, 3)).astype(np.float32), np.array([[3.0, -2.0, 7.0]], np.float32)

    def product(offset):
        turned = [apply_rope(x, rope_angles(at + offset, 32, 100.0)) for x, at in ((q, p[0]), (k, p[1]))]
        return float((turned[0] * turned[1]).sum())

    assert product(shift) == pytest.approx(product(0 * shift), abs=1e-4)
    assert abs(product(0 * shift) - float((q * k).sum())) > 1e-2


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ((3, 5), (6, 4)),
        ((4, 2), (4, 2)),
        ((14, 14), (24, 24)),
        ((3, 2), (1, 5)),
        ((1, 3), (4, 2)),
        ((2, 3, 4), (5, 2, 3)),
    ],
)
def test_interpolated_positions_against_scipy(old, new):
    table = np.random.default_rng(0).normal(size=(1 + math.prod(old), 3))
    found = interpolate_positions(table, old, new)
    zoom = [n / o for n, o in zip(new, old, strict=True)]
    expected = scipy.ndimage.zoom(table[1:].reshape(*old, 3), (*zoom, 1), order=1).reshape(-1, 3)
    np.testing.assert_array_equal(found[0], table[0])
    np.testing.assert_allclose(found[1:], expected, atol=1e-12)
    np.testing.assert_array_equal(interpolate_positions(table[1:], old, new), found[1:])


def test_interpolation_of_a_plane_is_exact():
    y, x = np.meshgrid(np.arange(4), np.arange(3), indexing="ij")
    plane = np.stack([y + 2 * x, 5 - x], axis=-1).reshape(-1, 2).astype(np.float32)
    fine = interpolate_positions(plane, (4, 3), (7, 5))
    assert fine.dtype == np.float32
    y, x = np.meshgrid(np.arange(7) / 2, np.arange(5) / 2, indexing="ij")
    np.testing.assert_allclose(fine, np.stack([y + 2 * x, 5 - x], axis=-1).reshape(-1, 2), rtol=1e-6)


def test_positions_of_another_grid_are_refused():
    with pytest.raises(ValueError, match=r"table must have 6 rows, or 7, for old_grid \(2, 3\); got 8"):
        interpolate_positions(np.zeros((8, 2)), (2, 3), (4, 4))
    with pytest.raises(ValueError, match=r"got \(2, 3\) and \(2, 3, 1\)"):
        interpolate_positions(np.zeros((6, 2)), (2, 3), (2, 3, 1))
    with pytest.raises(ValueError, match=r"at least 1, got \(2, 3\) and \(0, 3\)"):
        interpolate_positions(np.zeros((6, 2)), (2, 3), (0, 3))
