"""The densities that a generative model is compared with: closed forms, and mass one."""

import numpy as np
import pytest
from scipy import integrate, stats

from sora_jax.evaluation.density import MCGSMConfig, fit_gaussian, fit_mcgsm, neighbourhoods

CONFIG = MCGSMConfig(
    radius=1, num_components=2, num_scales=2, num_features=2, learning_rate=1e-2, num_steps=400, batch_size=32
)


def test_a_fitted_gaussian_has_the_density_of_the_true_one():
    rng = np.random.default_rng(0)
    mean, root = rng.normal(size=6), rng.normal(size=(6, 6))
    true = stats.multivariate_normal(mean, root @ root.T)
    train, held_out = rng.normal(size=(200_000, 6)) @ root.T + mean, rng.normal(size=(50, 6)) @ root.T + mean
    gaussian = fit_gaussian(train.reshape(-1, 2, 3, 1))
    np.testing.assert_allclose(
        gaussian.log_density(held_out.reshape(-1, 2, 3, 1)), true.logpdf(held_out) / np.log(2), atol=0.06
    )
    fitted = stats.multivariate_normal(gaussian.mean, np.cov(train.T, bias=True))
    np.testing.assert_allclose(gaussian.log_density(held_out), fitted.logpdf(held_out) / np.log(2), rtol=1e-9)


def test_a_gaussian_needs_more_images_than_values():
    with pytest.raises(ValueError, match="more than their 4 values, got 4"):
        fit_gaussian(np.zeros((4, 2, 2, 1)))


def test_neighbours_come_before_the_pixel_and_the_missing_are_marked():
    image = np.arange(1.0, 10.0).reshape(1, 3, 3, 1)
    c = np.asarray(neighbourhoods(image, 1))[0]
    assert c.shape == (3, 3, 8)
    assert c[1, 1].tolist() == [1, 2, 3, 4, 0, 0, 0, 0]  # of 5
    assert c[0, 0].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]  # of 1, which has none
    assert c[2, 2].tolist() == [5, 6, 0, 8, 0, 0, 1, 0]  # of 9
    assert neighbourhoods(image, 2).shape[-1] == 2 * 12


def moving_image(rng, count, size=6):
    """x_i = 0.8 left + e, e of standard deviation 0.2 where the left one is positive and 1 elsewhere (0 before it)."""
    x = np.zeros((count, size, size + 1))
    for i in range(size):
        left = x[:, :, i]
        x[:, :, i + 1] = 0.8 * left + np.where(left > 0, 0.2, 1.0) * rng.normal(size=left.shape)
    return x[:, :, 1:, None].astype(np.float32)


def true_bits(images):
    x = np.pad(images[..., 0].astype(np.float64), ((0, 0), (0, 0), (1, 0)))
    left, x = x[:, :, :-1], x[:, :, 1:]
    return stats.norm(0.8 * left, np.where(left > 0, 0.2, 1.0)).logpdf(x).sum(axis=(1, 2)) / np.log(2)


@pytest.fixture(scope="module")
def fitted():
    return fit_mcgsm(moving_image(np.random.default_rng(0), 2000), CONFIG)


def test_mcgsm_recovers_a_conditional_whose_variance_depends_on_a_neighbour(fitted):
    held_out = moving_image(np.random.default_rng(1), 500)
    loss = (true_bits(held_out) - fitted.log_density(held_out)) / 36  # bits a pixel
    assert -4 * loss.std() / 500**0.5 < loss.mean() < 0.06
    gaussian = fit_gaussian(moving_image(np.random.default_rng(0), 2000)).log_density(held_out)
    assert (true_bits(held_out) - gaussian).mean() / 36 > 0.2  # which a Gaussian cannot


def test_mcgsm_integrates_to_one(fitted):
    """Without the last pixel, over which it is integrated, a row is left; two pixels, without neighbours, leave 1."""
    grid = np.linspace(-12, 12, 6001)
    images = np.repeat(moving_image(np.random.default_rng(2), 1), len(grid), axis=0)[:, :1]  # one row
    images[:, 0, -1, 0] = grid
    given = integrate.simpson(np.exp2(fitted.log_density(images)), x=grid)
    assert given == pytest.approx(np.exp2(fitted.log_density(images[:1, :, :-1])[0]), rel=1e-3)
    y, x = np.meshgrid(np.linspace(-8, 8, 401), np.linspace(-8, 8, 401), indexing="ij")
    pairs = np.stack([y.ravel(), x.ravel()], axis=1).reshape(-1, 1, 2, 1).astype(np.float32)
    assert np.exp2(fitted.log_density(pairs)).sum() * 0.04**2 == pytest.approx(1, abs=2e-3)


def test_images_of_more_channels_are_refused(fitted):
    for refuses in (fitted.log_density, lambda images: fit_mcgsm(images, CONFIG)):
        with pytest.raises(ValueError, match=r"\(N, H, W, 1\).*got shape \(2, 4, 4, 3\)"):
            refuses(np.zeros((2, 4, 4, 3), np.float32))


@pytest.mark.parametrize(("field", "value"), [("radius", 0), ("learning_rate", 0.0)])
def test_a_config_names_what_is_wrong(field, value):
    with pytest.raises(ValueError, match=f"MCGSMConfig.{field} must be"):
        MCGSMConfig(**{field: value})
