"""Dead leaves against the closed form of their two-point statistics."""

import numpy as np
import pytest
from scipy import integrate, stats

from sora_jax.data.dead_leaves import dead_leaves

COUNT, SIZE = 6000, 8


def same_disc(distance, low, high):
    """P(two points show the same disc): what covers both, over what covers either, by numerical integration."""

    def lens(r):
        half = min(distance / (2 * r), 1)
        return 2 * r**2 * np.arccos(half) - 2 * r**2 * half * np.sqrt(1 - half**2)

    both = integrate.quad(lambda r: lens(r) * r**-3, low, high, points=[min(max(distance / 2, low), high)])[0]
    one = integrate.quad(lambda r: np.pi * r**-1, low, high)[0]
    return both / (2 * one - both)


@pytest.fixture(scope="module")
def flat():
    return dead_leaves(np.random.default_rng(0), COUNT, SIZE, radii=(1.5, 6.0), noise=0.0)[..., 0]


@pytest.mark.parametrize(("dy", "dx"), [(0, 1), (1, 0), (1, 1), (0, 3), (3, 4), (7, 0)])
def test_two_pixels_show_the_same_disc_as_often_as_the_radii_say(flat, dy, dx):
    same = (flat[:, : SIZE - dy, : SIZE - dx] == flat[:, dy:, dx:]).mean(axis=(1, 2))
    error = same.std() / COUNT**0.5
    assert abs(same.mean() - same_disc(np.hypot(dy, dx), 1.5, 6.0)) < 4 * error
    assert error < 0.01


def test_the_corners_are_as_the_middle(flat):
    """Discs whose centres lie outside the image are not missing at its edges."""
    along_the_edge, inside = ((flat[:, y, 1:] == flat[:, y, :-1]).mean(axis=1) for y in (0, SIZE // 2))
    assert abs(along_the_edge.mean() - inside.mean()) < 4 * np.hypot(along_the_edge.std(), inside.std()) / COUNT**0.5


def test_covariance_is_that_of_same_discs_and_variance_is_one():
    images = dead_leaves(np.random.default_rng(1), COUNT, SIZE, radii=(2.0, 16.0), noise=0.3)[..., 0]
    assert abs(images.mean()) < 4 * images.mean(axis=(1, 2)).std() / COUNT**0.5
    for distance, expected in ((0, 1.0), (1, 0.91 * same_disc(1, 2.0, 16.0)), (5, 0.91 * same_disc(5, 2.0, 16.0))):
        products = (images[:, :, : SIZE - distance] * images[:, :, distance:]).mean(axis=(1, 2))
        assert abs(products.mean() - expected) < 4 * products.std() / COUNT**0.5


def test_grey_levels_are_uniform_and_the_noise_is_gaussian(flat):
    assert stats.kstest(flat[:, 3, 3], stats.uniform(-(3**0.5), 2 * 3**0.5).cdf).pvalue > 1e-3
    noisy = dead_leaves(np.random.default_rng(0), 400, 1, radii=(2.0, 16.0), noise=0.2)[:, 0, 0, 0]
    clean = dead_leaves(np.random.default_rng(0), 400, 1, radii=(2.0, 16.0), noise=0.0)[:, 0, 0, 0]
    noise = noisy - clean * 0.96**0.5
    assert stats.kstest(noise, stats.norm(0, 0.2).cdf).pvalue > 1e-3


def test_images_are_drawn_from_the_generator_given():
    a, b, c = (dead_leaves(np.random.default_rng(seed), 3, 4) for seed in (1, 1, 2))
    assert a.shape == (3, 4, 4, 1) and a.dtype == np.float32
    np.testing.assert_array_equal(a, b)
    assert (a != c).all()
    assert dead_leaves(np.random.default_rng(0), 0, 4).shape == (0, 4, 4, 1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [({"size": 0}, "size = 0"), ({"radii": (2.0, 2.0)}, r"got \(2.0, 2.0\)"), ({"noise": 1.0}, "got 1.0")],
)
def test_what_is_out_of_range_is_named(wrong, message):
    with pytest.raises(ValueError, match=message):
        dead_leaves(np.random.default_rng(0), **{"count": 1, "size": 4, **wrong})
