"""The toy data: what their constants promise, against quadrature, brute force and the draws themselves."""

import numpy as np
import pytest
import scipy.integrate
import scipy.special

from sora_jax.data.toy import heartbeat, heartbeat_sequences, swiss_roll, swiss_roll_log_density


def spiral(t, noise):
    """The noiseless point at t as the docstring says it, with moments by adaptive quadrature."""

    def mean(f):
        return scipy.integrate.quad(f, 1.5 * np.pi, 4.5 * np.pi, epsabs=1e-12)[0] / (3 * np.pi)

    columns = []
    for wave in (np.cos, np.sin):
        first = mean(lambda s, wave=wave: s * wave(s))
        second = mean(lambda s, wave=wave: (s * wave(s)) ** 2)
        columns.append((t * wave(t) - first) / np.sqrt(second - first**2))
    return np.sqrt(1 - noise**2) * np.stack(columns, axis=-1)


def test_draws_lie_around_the_spiral_with_the_noise_that_was_asked_for():
    """Drawn again by the same generator, the noise is what is left of a point without its spiral."""
    x = swiss_roll(np.random.default_rng(0), 2000, 0.01)
    assert (x.shape, x.dtype) == ((2000, 2), np.float32)
    rng = np.random.default_rng(0)
    t = rng.uniform(1.5 * np.pi, 4.5 * np.pi, 2000)
    left = (x - spiral(t, 0.01)) / 0.01
    np.testing.assert_allclose(left, rng.standard_normal((2000, 2)), atol=1e-3)


@pytest.mark.parametrize("noise", [0.0025, 0.5])
def test_the_law_has_mean_0_and_variance_1(noise):
    """By the trapezoidal rule over t, to which blurring adds its variance."""
    t = np.linspace(1.5 * np.pi, 4.5 * np.pi, 200_001)
    centre = spiral(t, noise)
    np.testing.assert_allclose(np.trapezoid(centre, t, axis=0) / (3 * np.pi), 0, atol=1e-8)
    np.testing.assert_allclose(np.trapezoid(centre**2, t, axis=0) / (3 * np.pi) + noise**2, 1, atol=1e-8)
    x = swiss_roll(np.random.default_rng(1), 40_000, noise).astype(np.float64)
    np.testing.assert_allclose(x.mean(axis=0), 0, atol=0.02)
    np.testing.assert_allclose(x.var(axis=0), 1, atol=0.02)


def test_the_density_integrates_to_1_and_has_the_moments_of_the_law():
    side = np.linspace(-4, 4, 201)
    x = np.stack(np.meshgrid(side, side, indexing="ij"), axis=-1).reshape(-1, 2)
    mass = np.exp(swiss_roll_log_density(x, 0.2)) * (side[1] - side[0]) ** 2
    assert mass.sum() == pytest.approx(1, abs=1e-6)
    np.testing.assert_allclose(mass @ x, 0, atol=1e-6)
    np.testing.assert_allclose(mass @ x**2, 1, atol=1e-5)


@pytest.mark.parametrize("noise", [0.0025, 0.05])
def test_the_density_is_that_of_brute_force(noise):
    """A million nodes; points of the data, at the ends of the spiral, and off it by up to six times the noise."""
    ends = spiral(np.array([1.5, 4.5]) * np.pi, noise)
    x = swiss_roll(np.random.default_rng(2), 6, noise).astype(np.float64)
    off = x + 6 * noise * np.array([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0], [0.5, 0.5], [-0.5, -0.5]])
    t = (np.arange(1_000_000) + 0.5) * 3 * np.pi / 1_000_000 + 1.5 * np.pi
    centre = spiral(t, noise)
    for point in np.concatenate([ends, x, off]):
        squared = ((point - centre) ** 2).sum(axis=1)
        expected = scipy.special.logsumexp(-squared / (2 * noise**2)) - np.log(len(t) * 2 * np.pi * noise**2)
        assert swiss_roll_log_density(point[None], noise)[0] == pytest.approx(expected, abs=1e-5)


def test_many_points_are_each_what_they_are_alone():
    x = swiss_roll(np.random.default_rng(3), 2000, 0.02)
    logs = swiss_roll_log_density(x, 0.02)  # in several chunks
    assert (logs.shape, logs.dtype) == ((2000,), np.float64)
    for i in (0, 1023, 1999):
        np.testing.assert_allclose(swiss_roll_log_density(x[i : i + 1], 0.02), logs[i : i + 1], rtol=1e-12)
    assert swiss_roll_log_density(x[:0], 0.02).shape == (0,)


def test_heartbeats_by_eye():
    rows = ["".join(str(int(bit)) for bit in row) for row in heartbeat_sequences()]
    assert rows == [
        "10000100001000010000",
        "01000010000100001000",
        "00100001000010000100",
        "00010000100001000010",
        "00001000010000100001",
    ]


def test_heartbeats_are_drawn_equally():
    x = heartbeat(np.random.default_rng(0), 5000)
    assert (x.shape, x.dtype) == ((5000, 20), np.float32)
    matches = (x[:, None] == heartbeat_sequences()).all(axis=-1)  # (5000, 5)
    assert (matches.sum(axis=1) == 1).all()
    np.testing.assert_allclose(matches.mean(axis=0), 0.2, atol=0.02)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda rng: swiss_roll(rng, -1, 0.1), "count must be at least 0, got -1"),
        (lambda rng: swiss_roll(rng, 1, 0.0), r"noise must be above 0 and below 1, got 0\.0"),
        (lambda rng: swiss_roll(rng, 1, float("nan")), "got nan"),
        (lambda rng: swiss_roll_log_density(np.zeros((2, 2)), 1.0), r"noise must be above 0 and below 1, got 1\.0"),
        (lambda rng: swiss_roll_log_density(np.zeros((2, 3)), 0.1), r"x must be \(count, 2\), got shape \(2, 3\)"),
        (lambda rng: heartbeat(rng, -2), "count must be at least 0, got -2"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make(np.random.default_rng(0))
