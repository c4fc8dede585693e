"""The bound against exact log-likelihoods, sums over all values, and counting."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from analytic import COVARIANCE, MEAN, gaussian_denoiser

from sora_jax.diffusion import likelihood
from sora_jax.diffusion.gaussian import Levels, discrete_levels
from sora_jax.diffusion.samplers import Denoised
from sora_jax.diffusion.schedules import alpha_bar, betas_of, cosine_betas, linear_betas


def test_kl_and_density_against_numerical_integrals():
    grid = np.linspace(-12, 12, 100_001)
    q, p = scipy.stats.norm(0.4, 0.7), scipy.stats.norm(-0.3, 1.1)
    expected = np.trapezoid(q.pdf(grid) * (q.logpdf(grid) - p.logpdf(grid)), grid)
    args = (np.array(0.4), np.log(0.49), np.array(-0.3), np.log(1.21))
    assert float(likelihood.gaussian_kl(*args)) == pytest.approx(expected, rel=1e-5)
    density = likelihood.gaussian_log_density(np.array([0.9]), np.array(0.4), np.log(0.49))
    np.testing.assert_allclose(density, q.logpdf(0.9), rtol=1e-5)


@pytest.mark.parametrize(("mean", "std"), [(0.3, 0.5), (-0.999, 0.01), (2.5, 0.2), (0.1, 0.002)])
def test_the_bins_of_the_decoder_share_out_all_of_the_mass(mean, std):
    values = np.linspace(-1, 1, 256)
    log_mass = likelihood.discretized_log_likelihood(jnp.asarray(values), jnp.array(mean), jnp.log(std**2))
    assert np.isfinite(log_mass).all()
    assert np.exp(np.float64(log_mass)).sum() == pytest.approx(1, abs=2e-4)
    edges = np.concatenate([[-np.inf], (values[:-1] + values[1:]) / 2, [np.inf]])
    law = scipy.stats.norm(mean, std)
    mass = np.where(edges[1:] > mean, law.sf(edges[:-1]) - law.sf(edges[1:]), law.cdf(edges[1:]) - law.cdf(edges[:-1]))
    well = mass > 1e-30
    np.testing.assert_allclose(np.float64(log_mass)[well], np.log(mass[well]), rtol=2e-3, atol=2e-3)


def even_levels(num_steps):
    """Levels evenly spaced in log-SNR, so that steps shrink everywhere as they grow in number."""
    bar = 1 / (1 + np.exp(np.linspace(-9, 9, num_steps)))
    return discrete_levels(betas_of(bar))


def gap(num_steps, variance):
    """How far the bound with the optimal denoiser is from the exact log-likelihood, in nats, and its standard error."""
    x0 = np.random.default_rng(0).multivariate_normal(MEAN, COVARIANCE, 20_000)
    levels = even_levels(num_steps)
    total = jax.jit(
        lambda x: likelihood.bound(gaussian_denoiser, x, levels, jax.random.key(0), variance=variance).total
    )
    difference = np.float64(total(jnp.asarray(x0, jnp.float32)))
    difference += scipy.stats.multivariate_normal(MEAN, COVARIANCE).logpdf(x0)
    return difference.mean(), difference.std() / np.sqrt(len(x0))


@pytest.mark.parametrize("variance", ["small", "large"])
def test_the_bound_becomes_the_exact_log_likelihood_as_steps_grow(variance):
    gaps = [gap(num_steps, variance) for num_steps in (10, 60, 360)]  # a wrong variance costs its square: 1 / T in all
    for value, error in gaps:
        assert value > -3 * error  # it is a bound
    assert gaps[0][0] > 3 * gaps[1][0] > 3 * 3 * gaps[2][0]
    assert gaps[2][0] < 0.2


@pytest.mark.parametrize(("variance", "v"), [("small", 0.0), ("large", 1.0), ("learned", 0.3)])
def test_what_a_wrong_variance_costs(variance, v):
    """A network that knows x_0 has the right means: each step costs (r - 1 - log r) / 2 a value, by its variances."""
    x0, levels = jnp.ones((2, 3)), discrete_levels(linear_betas(10, 0.05, 0.5))

    def knows(x, level):
        return Denoised(x0, (x - level.alpha * x0) / level.sigma, jnp.full_like(x, v))

    terms = likelihood.bound(knows, x0, levels, jax.random.key(0), variance=variance)
    bar = alpha_bar(linear_betas(10, 0.05, 0.5))[::-1]
    ratio = (1 - bar[1:]) / (1 - bar[:-1])  # small over large, at each step but the last
    ratio = ratio**v
    np.testing.assert_allclose(terms.steps[:-1, 0], 3 * (ratio - 1 - np.log(ratio)) / 2, rtol=1e-3, atol=1e-5)


def test_prior_term_of_ddpm_is_nearly_nothing():
    x0 = jnp.ones((1, 3))
    terms = likelihood.bound(
        lambda x, level: Denoised(x, x), x0, discrete_levels(linear_betas(50, 0.02, 0.3)), jax.random.key(0)
    )
    left = alpha_bar(linear_betas(50, 0.02, 0.3))[-1]
    expected = 3 * 0.5 * (1 - left + left * 1 - 1 - np.log(1 - left))
    assert float(terms.prior[0]) == pytest.approx(expected, rel=1e-3)


def test_8_bit_values_are_coded_in_no_more_bits_than_they_have_by_a_network_that_knows_them():
    values = np.random.default_rng(0).integers(0, 256, (4, 6)) / 127.5 - 1
    x0 = jnp.asarray(values, jnp.float32)
    levels = discrete_levels(linear_betas(100, 1e-4, 0.2))

    def knows(x, level):
        return Denoised(x0, (x - level.alpha * x0) / level.sigma)

    terms = likelihood.bound(knows, x0, levels, jax.random.key(0), discrete=True)
    np.testing.assert_allclose(terms.steps[:-1], 0, atol=1e-4)
    assert (np.asarray(terms.steps[-1]) < 6 * np.log(256)).all()
    np.testing.assert_allclose(terms.squared_errors, 0)
    assert (likelihood.bits(terms.steps[-1]) / 6 < 3).all()


def test_masked_values_do_not_count():
    x0 = jnp.asarray(np.random.default_rng(0).standard_normal((2, 4)), jnp.float32)
    levels, mask = discrete_levels(linear_betas(5, 0.1, 0.5)), jnp.array([[1, 1, 0, 0], [1, 0, 1, 1]], bool)

    def denoise(x, level):
        return Denoised(0.5 * x, x)

    def total(mask):
        return likelihood.bound(denoise, x0, levels, jax.random.key(0), mask=mask).total

    np.testing.assert_allclose(total(mask) + total(~mask), total(None), rtol=1e-5)
    poisoned = jnp.where(mask, x0, 1e3)
    other = likelihood.bound(denoise, poisoned, levels, jax.random.key(0), mask=mask).total
    np.testing.assert_allclose(other, total(mask), rtol=1e-5)


def test_null_model_of_the_papers_swiss_roll():
    """arXiv:1503.03585, Table 1: two dimensions of unit variance have -4.09 bits under N(0, I)."""
    x = np.random.default_rng(0).standard_normal((200_000, 2)).astype(np.float32)
    assert float(likelihood.null_bits(jnp.asarray(x)).mean()) == pytest.approx(-4.09, abs=0.01)


def test_rate_grows_and_distortion_falls():
    x0 = jnp.asarray(np.random.default_rng(1).multivariate_normal(MEAN, COVARIANCE, 2000), jnp.float32)
    terms = likelihood.bound(gaussian_denoiser, x0, discrete_levels(cosine_betas(50)), jax.random.key(0))
    curve = likelihood.rate_distortion(terms, 2)
    assert (np.diff(curve.rate) > 0).all() and (np.diff(curve.distortion[::7]) < 0).all()
    # Before anything is sent the receiver has the mean: the error is the data's variance.
    assert float(curve.distortion[0]) == pytest.approx(127.5 * np.sqrt(np.trace(COVARIANCE) / 2), rel=0.03)
    sent = float(curve.rate[-1]) * 2 * np.log(2)
    assert sent == pytest.approx(float((terms.prior + terms.steps[:-1].sum(0)).mean()), rel=1e-4)


def test_an_unknown_variance_is_named():
    level = Levels(*(np.float32(v) for v in (0, 0.6, 0.8, 0.6)))
    with pytest.raises(ValueError, match="variance must be small, large or learned, got 'tiny'"):
        likelihood.step_term(gaussian_denoiser, jnp.ones((1, 2)), jnp.ones((1, 2)), level, level, "tiny")


@pytest.mark.parametrize("variance", ["small", "large"])
def test_the_last_step_of_ddpms_code(variance):
    """L_0 in float64 with its `model_log_variance` at step 0: `posterior_variance[1]`, whichever variance is fixed."""
    betas = linear_betas(10, 0.01, 0.3)
    bar = np.cumprod(1 - betas)
    posterior_variance = betas * (1 - np.append(1.0, bar[:-1])) / (1 - bar)
    rest = {"small": posterior_variance, "large": betas}[variance][1:]
    model_variance = np.append(posterior_variance[1], rest)
    x0, told = jnp.array([[0.3, -0.2, 0.9]]), jnp.array([[0.28, -0.1, 0.95]])

    def last_terms(**options):
        args = lambda x, level: Denoised(told, x), x0, discrete_levels(betas), jax.random.key(0)
        return likelihood.bound(*args, variance=variance, **options).steps[:, 0]

    default, theirs = last_terms(), last_terms(last_variance="posterior")
    # q(x_0 | x_1, x_0) has all of its mass at x_0, so that the mean is what is told.
    for found, std in ((theirs, np.sqrt(model_variance[0])), (default, np.sqrt(betas[0]))):
        expected = -scipy.stats.norm(np.float64(told), std).logpdf(np.float64(x0)).sum()
        assert float(found[-1]) == pytest.approx(expected, rel=1e-4)
    np.testing.assert_allclose(default[:-1], theirs[:-1], rtol=1e-5)  # of two programs, each rounds in its own way
    with pytest.raises(ValueError, match="last_variance must be beta or posterior, got 'first'"):
        last_terms(last_variance="first")
