"""Derivatives through samplers, guidance and losses are finite, and right, where something divides by zero."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.diffusion import gaussian, guidance, likelihood
from sora_jax.diffusion.gaussian import Levels, discrete_levels
from sora_jax.diffusion.samplers import DDIM, SAMPLERS, Ancestral, Denoised, denoiser, sample_chunk, start
from sora_jax.diffusion.schedules import linear_betas, zero_terminal_snr

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")

EVERY = {**SAMPLERS, "ddim, eta 1": DDIM(1.0), "ancestral, learned": Ancestral("learned")}


def token_levels(strength, xp=jnp):
    """(6, 6) levels, of tokens: a flow, a prompt, one that stops half way, one that rests at first, one whose noise
    stays, and a variance preserving one from a terminal SNR of zero. `strength` moves all that is neither 0 nor 1."""
    t = xp.asarray([1, 0.8, 0.55, 0.3, 0.1, 0])
    columns = [t, 0 * t, xp.asarray([1, 0.8, 0.5, 0.5, 0.5, 0.5]), xp.asarray([1, 1, 1, 0.6, 0.3, 0]), 0 * t + 0.4]
    times = xp.stack(columns, axis=1)
    times = strength * times / (1 + (strength - 1) * times)
    vp = discrete_levels(zero_terminal_snr(linear_betas(5, 0.02, 0.5)))
    alpha = xp.concatenate([1 - times, xp.asarray(vp.alpha)[:, None]], axis=1)
    sigma = xp.concatenate([times, xp.asarray(vp.sigma)[:, None]], axis=1)
    return Levels(xp.concatenate([times, xp.asarray(vp.sigma)[:, None]], axis=1), alpha, sigma, xp.ones_like(alpha))


def slow_but(fast, every):
    marks = {case: () if case in fast else pytest.mark.slow for case in every}
    return [pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=m) for case, m in marks.items()]


@pytest.mark.parametrize("name", slow_but({"heun", "unipc"}, EVERY))
def test_gradients_through_a_sampler_are_the_finite_differences(name):
    """Of the network's weight, the start and the levels, in float64, around tokens whose level does not move."""
    sampler = EVERY[name]
    with jax.enable_x64():
        rng = np.random.default_rng(0)
        x, drawn = rng.standard_normal((6, 2)), jnp.asarray(rng.standard_normal((5, 6, 2)))

        def loss(weight, x, strength):
            def network(x, time):
                output = jnp.tanh(weight * x + time[:, None] + 0.1 * x.mean())
                return jnp.concatenate([output, jnp.sin(output)], axis=-1) if name.endswith("learned") else output

            denoise = denoiser(network, "v", learned_range=name.endswith("learned"))
            levels = token_levels(strength)
            state = sample_chunk(denoise, start(sampler, x, levels), levels, sampler, lambda index: drawn[index])
            return jnp.sin(state.x).sum()

        args = (jnp.float64(0.7), jnp.asarray(x), jnp.float64(1.3))
        found = jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*args)
        loss, h = jax.jit(loss), 1e-5
        for number in (0, 2):
            ends = [loss(*(a + sign * h * (n == number) for n, a in enumerate(args))) for sign in (1, -1)]
            assert float(found[number]) == pytest.approx(float(ends[0] - ends[1]) / (2 * h), rel=1e-5, abs=1e-7)
        along = rng.standard_normal(x.shape)
        ends = [loss(args[0], args[1] + sign * h * along, args[2]) for sign in (1, -1)]
        assert float((found[1] * along).sum()) == pytest.approx(float(ends[0] - ends[1]) / (2 * h), rel=1e-5)
        assert np.isfinite(found[1]).all()


@pytest.mark.parametrize("name", slow_but({"dpm++sde", "ancestral, learned"}, EVERY))
def test_a_state_that_does_not_move_passes_its_gradient_on(name):
    sampler, levels = EVERY[name], token_levels(1.0)

    def moved(x):
        def denoise(x, level):
            return Denoised(0.1 * x, x, jnp.full_like(x, 0.5))

        return sample_chunk(denoise, start(sampler, x, levels), levels, sampler, lambda index: 0 * x).x[1].sum()

    gradient = jax.grad(moved)(jnp.ones((6, 2)))
    np.testing.assert_array_equal(gradient, np.eye(6)[1, :, None] * np.ones(2))


def test_what_is_not_known_may_be_anything():
    known, mask = jnp.array([0.5, jnp.nan, jnp.inf]), jnp.array([True, False, False])

    def told(alpha, x):
        level = Levels(jnp.float32(0), alpha, jnp.float32(0.6), jnp.float32(1))
        wrapped = guidance.inpainting(lambda x, level: Denoised(2 * x, x), known, mask, lambda level: jnp.ones(3))
        return wrapped(x, level).x0.sum()

    value, gradients = jax.value_and_grad(told, argnums=(0, 1))(jnp.float32(0.8), jnp.arange(3.0))
    assert float(value) == pytest.approx(0.5 + 2 * 1 + 2 * 2)
    assert float(gradients[0]) == 0
    np.testing.assert_array_equal(gradients[1], [0, 2, 2])


@pytest.mark.parametrize(
    ("variance", "step"),
    slow_but({("learned", 0), ("small", 9)}, [(v, s) for v in ("small", "large", "learned") for s in (0, 8, 9)]),
)
def test_the_bounds_terms_have_finite_gradients(variance, step):
    """Steps 0 of a terminal SNR of zero, the last but one, and the last, whose posterior has no variance."""
    levels = discrete_levels(zero_terminal_snr(linear_betas(10, 1e-4, 0.5)))
    now, to = (Levels(*(jnp.asarray(a)[step + n] for a in levels)) for n in (0, 1))
    x0, noise = jnp.array([[-1.0, 1 / 255, 1.0]]), jnp.array([[0.3, -1.0, 2.0]])

    def term(output, x0, alpha):
        denoise = denoiser(lambda x, time: output, "v", learned_range=True)
        level = now._replace(alpha=now.alpha + alpha)
        return likelihood.step_term(denoise, x0, noise, level, to, variance, discrete=True)[0].sum()

    output = jnp.array([[0.1, -0.2, 4.0, -1.0, 0.0, 1.0]])
    for gradient in jax.grad(term, argnums=(0, 1, 2))(output, x0, jnp.float32(0)):
        assert np.isfinite(gradient).all()


def test_the_root_of_a_variance():
    value, gradient = jax.vmap(jax.value_and_grad(gaussian.root))(jnp.array([4.0, 0.0, -1e-9]))
    np.testing.assert_array_equal(value, [2, 0, 0])
    np.testing.assert_array_equal(gradient, [0.25, 0, 0])
