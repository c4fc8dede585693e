"""Samplers against distributions whose optimal denoiser is known."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.spatial.distance
from analytic import COVARIANCE, MEAN, exact_flow, gaussian_denoiser, mixture_denoiser, mixture_samples

from sora_jax.diffusion import samplers
from sora_jax.diffusion.gaussian import Levels, discrete_levels, flow_levels
from sora_jax.diffusion.samplers import DDIM, SAMPLERS, Ancestral, DPMSolver, Heun, UniPC, sample_chunk, start
from sora_jax.diffusion.schedules import cosine_betas, flow_times, linear_betas, zero_terminal_snr

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")

EVERY = {**SAMPLERS, "ddim, eta 1": DDIM(1.0), "ancestral, large": Ancestral("large")}


def run(denoise, x, levels, sampler, seed=0):
    """Samples in one compiled scan."""

    def noise(index):
        return jax.random.normal(jax.random.fold_in(jax.random.key(seed), index), x.shape, x.dtype)

    chunk = jax.jit(lambda state: sample_chunk(denoise, state, levels, sampler, noise))
    return chunk(start(sampler, x, levels)).x


def paths(num_steps):
    return {
        "discrete": discrete_levels(cosine_betas(num_steps)),
        "flow": flow_levels(flow_times(num_steps)),
    }


@pytest.mark.parametrize("path", ["discrete", "flow"])
@pytest.mark.parametrize("name", EVERY)
def test_every_sampler_reproduces_mean_and_covariance(name, path):
    x = jax.random.normal(jax.random.key(1), (20_000, 2))
    samples = np.asarray(run(gaussian_denoiser, x, paths(150)[path], EVERY[name]), np.float64)
    # Five standard errors of 20,000 draws, and what 150 steps leave.
    np.testing.assert_allclose(samples.mean(0), MEAN, atol=0.02)
    np.testing.assert_allclose(np.cov(samples.T), COVARIANCE, atol=0.035)


@pytest.mark.parametrize("name", ["euler", "heun", "dpm++", "dpm++sde", "unipc", "ancestral"])
def test_samples_of_a_mixture_match_by_a_two_sample_test(name):
    """The energy distance (Szekely and Rizzo) of samples to fresh ones, within what permutations of both give."""
    rng = np.random.default_rng(0)
    x = jax.random.normal(jax.random.key(2), (400, 2))
    samples = np.asarray(run(mixture_denoiser, x, paths(100)["flow"], SAMPLERS[name]))
    both = np.concatenate([samples, mixture_samples(rng, 400)])
    distances = scipy.spatial.distance.cdist(both, both)

    def energy(order):
        signs = np.where(np.arange(800) < 400, 1, -1)[order]
        return -(distances * np.outer(signs, signs)).sum()

    permuted = [energy(rng.permutation(800)) for _ in range(200)]
    assert (np.array(permuted) >= energy(np.arange(800))).mean() > 0.02


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("heun", 2), ("dpm++", 2), ("unipc", 3)])
@pytest.mark.parametrize("path", ["flow", "discrete"])
def test_order_of_convergence(name, order, path):
    """The error against the exact ODE, between two levels that are neither clean nor all noise.

    A multi-step sampler's first step has a lower order, which a start from steps half as long each hides.
    """
    with jax.enable_x64():
        x = np.random.default_rng(0).standard_normal((5, 2))
        errors, counts = [], [16, 32, 64, 128]
        for n in counts:
            # Evenly spaced in log-SNR, as the exponential integrators' theory has it.
            snr = np.linspace(-2.0, 3.0, n + 1)
            if path == "flow":
                t = 1 / (1 + np.exp(snr))
                levels = flow_levels(t)
            else:
                alpha = np.sqrt(1 / (1 + np.exp(-2 * snr)))
                levels = Levels(snr, alpha, np.sqrt(1 - alpha**2), alpha)
            ends = [Levels(*(a[i] for a in levels)) for i in (0, -1)]
            got = run(gaussian_denoiser, jnp.asarray(x), levels, SAMPLERS[name])
            errors.append(np.abs(got - exact_flow(x, *ends)).max())
    slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
    assert slope == pytest.approx(order, abs=0.2), (slope, errors)


def test_deterministic_ddim_is_eulers_method_on_a_flow():
    rng = np.random.default_rng(3)
    x, times = jnp.asarray(rng.standard_normal((4, 2)), jnp.float32), flow_times(7)
    got = run(gaussian_denoiser, x, flow_levels(times), SAMPLERS["euler"])
    for t, s in itertools.pairwise(times):
        said = gaussian_denoiser(x, Levels(t, 1 - t, t, np.float32(1)))
        x = x + (s - t) * (said.noise - said.x0)
    np.testing.assert_allclose(got, x, atol=1e-5)


def test_full_ddim_and_a_small_variance_are_the_ancestral_sampler():
    x, levels = jax.random.normal(jax.random.key(0), (6, 2)), paths(20)["discrete"]
    first = run(gaussian_denoiser, x, levels, DDIM(1.0))
    np.testing.assert_allclose(first, run(gaussian_denoiser, x, levels, Ancestral("small")), atol=2e-4)


@pytest.mark.parametrize("name", EVERY)
def test_every_sampler_lands_on_a_known_answer_from_a_terminal_snr_of_zero(name):
    levels = discrete_levels(zero_terminal_snr(linear_betas(12, 0.01, 0.5)))

    def certain(x, level):
        x0 = jnp.full_like(x, 0.25)
        return samplers.Denoised(x0, (x - level.alpha * x0) / level.sigma)

    got = run(certain, jax.random.normal(jax.random.key(0), (3, 5)), levels, EVERY[name])
    np.testing.assert_allclose(got, 0.25, atol=1e-4)


@pytest.mark.parametrize("name", EVERY)
def test_levels_of_tokens(name):
    """A token's own level: those without noise stay, and those with it go where they would go in a row of their own."""
    x = jax.random.normal(jax.random.key(0), (2, 3, 2))
    times = flow_times(6)
    asked = np.array([[1, 0, 1], [0, 1, 1]], np.float32)
    mixed = run(gaussian_denoiser, x, flow_levels(times[:, None, None] * asked), EVERY[name])
    alone = run(gaussian_denoiser, x, flow_levels(times), EVERY[name])
    expected = np.where(asked[..., None] > 0, alone, x)
    np.testing.assert_allclose(mixed, expected, atol=1e-5)
    assert (np.asarray(mixed)[asked == 0] == np.asarray(x)[asked == 0]).all()


@pytest.mark.parametrize("path", ["discrete", "flow"])
@pytest.mark.parametrize("name", EVERY)
def test_a_token_that_begins_late_rests_or_stops_early_goes_where_it_goes_on_its_own_ladder(name, path):
    """Three tokens of one state: each on a ladder of four steps, of which it makes one only where its level changes."""
    ladder, x = paths(4)[path], jax.random.normal(jax.random.key(0), (3, 2))
    places = np.array([[0, 1, 2, 3, 4, 4, 4, 4], [0, 0, 0, 1, 2, 3, 4, 4], [0, 1, 2, 2, 2, 3, 3, 4]])
    levels = Levels(*(np.broadcast_to(a, 5)[places.T] for a in ladder))
    fresh = jax.random.normal(jax.random.key(1), (4, 3, 2))

    def noise(index):  # that of a token's own step
        return jnp.take_along_axis(fresh, jnp.asarray(places.T)[index, None, :, None], axis=0, mode="clip")[0]

    mixed = jax.jit(lambda s: sample_chunk(gaussian_denoiser, s, levels, EVERY[name], noise))(
        start(EVERY[name], x, levels)
    )
    alone = jax.jit(lambda s: sample_chunk(gaussian_denoiser, s, ladder, EVERY[name], lambda index: fresh[index]))(
        start(EVERY[name], x, ladder)
    )
    np.testing.assert_allclose(mixed.x, alone.x, atol=1e-5)
    assert (mixed.first_bad == -1).all()


@pytest.mark.parametrize("prediction", ["x0", "velocity"])
@pytest.mark.parametrize("name", EVERY)
def test_a_network_always_sees_what_does_not_move_as_it_is(name, prediction):
    """Prompts and padding at t = 0: whatever the network says of them, they reach it unchanged."""
    levels = flow_levels(flow_times(4)[:, None] * np.array([1, 0, 1], np.float32))
    x, seen = jax.random.normal(jax.random.key(0), (3, 2)), []

    def network(x, time):
        seen.append(np.asarray(x))
        return jnp.full_like(x, 0.3) + 0.1 * x.mean()

    denoise, state = samplers.denoiser(network, prediction), start(EVERY[name], x, levels)
    memory, now_x = state.memory, x
    for i in range(4):
        now, to = (Levels(*(a[j] for a in levels)) for j in (i, i + 1))
        moved, memory = EVERY[name].step(denoise, now_x, memory, now, to, jnp.int32(i), jnp.ones_like(x))
        now_x = jnp.where(np.array([[1], [0], [1]]) > 0, moved, now_x)
        assert np.isfinite(now_x).all()
    assert len(seen) == 4 * EVERY[name].evaluations
    for inputs in seen:
        np.testing.assert_array_equal(inputs[1], x[1])


@pytest.mark.parametrize("name", EVERY)
def test_chunks_make_a_whole_and_compile_once(name):
    sampler, levels = EVERY[name], paths(20)["discrete"]
    x = jax.random.normal(jax.random.key(1), (3, 2))
    noise = functools.partial(lambda x, i: jax.random.normal(jax.random.fold_in(jax.random.key(7), i), x.shape), x)
    step = lambda state, levels: sample_chunk(gaussian_denoiser, state, levels, sampler, noise)  # noqa: E731
    chex.clear_trace_counter()
    chunk = jax.jit(chex.assert_max_traces(step, n=1))
    done = []
    got = samplers.sample(chunk, start(sampler, x, levels), levels, longest_chunk=6, progress=done.append)
    assert done == [0, 5, 10, 15, 20]
    np.testing.assert_allclose(got.x, run(gaussian_denoiser, x, levels, sampler, seed=7), atol=1e-5)
    assert got.index == 20 and (got.first_bad == -1).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e25])  # the last has no square in float32
def test_the_step_from_which_a_cell_is_not_finite_is_kept(bad):
    """Rows of two cells: one goes wrong at step 3, another at 5, the third cell at no step; the fourth never moves."""
    times = np.linspace(1, 0, 9, dtype=np.float32)
    levels = flow_levels(times[:, None, None] * np.array([[1, 1], [1, 0]], np.float32))
    begins = np.array([[3, 5], [99, 0]])

    def denoise(x, level):
        step = jnp.round((1 - level.time) * 8)
        x0 = jnp.where((step >= begins)[..., None], bad, 0.5 * jnp.ones_like(x))
        return samplers.Denoised(x0, jnp.zeros_like(x))

    x = jnp.ones((2, 2, 3))
    chunk = jax.jit(lambda state, levels: sample_chunk(denoise, state, levels, DDIM()))
    got = samplers.sample(chunk, start(DDIM(), x, levels), levels, longest_chunk=2)
    assert got.first_bad.tolist() == [[3, 5], [-1, -1]] and got.first_bad.dtype == jnp.int32
    assert not np.isfinite(jnp.square(got.x[0])).any() and np.isfinite(got.x[1]).all()


def test_a_denoiser_clips_and_keeps_the_noise_consistent():
    level = Levels(np.float32(3), np.float32(0.6), np.float32(0.8), np.float32(0.6))
    x = jnp.array([[0.9, -0.3]])
    denoise = samplers.denoiser(lambda x, t: jnp.full_like(x, -1.0) * t, "noise", clip=(-1.0, 1.0))
    said = denoise(x, level)
    np.testing.assert_allclose(said.x0, [[1.0, 1.0]])  # (0.9 + 0.8 * 3) / 0.6 and (-0.3 + 2.4) / 0.6
    np.testing.assert_allclose(level.alpha * said.x0 + level.sigma * said.noise, x, rtol=1e-6)


def test_a_learned_range_lies_between_the_two_variances():
    """v = 0 is the small variance, v = 1 the large one; the network puts out 2 v - 1."""
    levels, x = paths(10)["discrete"], jax.random.normal(jax.random.key(0), (4, 2))
    for v, variance in ((0.0, "small"), (1.0, "large")):

        def network(x, time, v=v):
            return jnp.concatenate([jnp.zeros_like(x), jnp.full_like(x, 2 * v - 1)], axis=-1)

        denoise = samplers.denoiser(network, "x0", learned_range=True)
        plain = samplers.denoiser(lambda x, time: jnp.zeros_like(x), "x0")
        got = run(denoise, x, levels, Ancestral("learned"))
        np.testing.assert_allclose(got, run(plain, x, levels, Ancestral(variance)), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DDIM(1.5), "eta must be between 0 and 1, got 1.5"),
        (lambda: Ancestral("medium"), "variance must be small, large or learned, got 'medium'"),
        (
            lambda: sample_chunk(gaussian_denoiser, start(DDIM(1.0), jnp.ones((1, 2)), paths(2)["flow"]),
                                 paths(2)["flow"], DDIM(1.0)),
            "stochastic: sample_chunk needs its noise",
        ),
        (
            lambda: run(samplers.denoiser(lambda x, t: x[:1], "noise"), jnp.ones((2, 2)), paths(2)["discrete"], Heun()),
            r"shape of its input \(2, 2\), got \(1, 2\)",
        ),
        (
            lambda: run(samplers.denoiser(lambda x, t: x, "x0"), jnp.ones((2, 2)), paths(2)["discrete"],
                        Ancestral("learned")),
            "needs a network that learns its range",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_evaluations_are_what_a_step_asks_of_the_network():
    for sampler in (*EVERY.values(), DPMSolver(), UniPC()):
        calls = []

        def counted(x, level, calls=calls):
            calls.append(1)
            return gaussian_denoiser(x, level)

        levels = paths(4)["flow"]
        state, pair = start(sampler, jnp.ones((1, 2)), levels), [Levels(*(a[i] for a in levels)) for i in (1, 2)]
        sampler.step(counted, state.x, state.memory, *pair, state.index, jnp.ones((1, 2)))
        assert len(calls) == sampler.evaluations
