"""Processes as one object, against closed forms in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from analytic import MEAN, gaussian_denoiser

from sora_jax.config import FlowConfig
from sora_jax.diffusion.gaussian import flow_levels, from_x0_and_noise
from sora_jax.diffusion.process import DiscreteProcess, FlowProcess, GaussianConfig, named_sampler
from sora_jax.diffusion.samplers import Ancestral, sample_chunk, start


def test_a_flows_ladder_falls_evenly_from_its_strength():
    process = FlowProcess(FlowConfig())
    np.testing.assert_array_equal(process.ladder(4).time, [1, 0.75, 0.5, 0.25, 0])
    late = process.ladder(4, strength=0.6)
    np.testing.assert_allclose(late.time, [0.6, 0.5, 0.25, 0])
    np.testing.assert_allclose([late.alpha, late.sigma], [[0.4, 0.5, 0.75, 1], late.time], rtol=1e-6)


def test_times_of_a_larger_clip_have_the_signal_to_noise_ratio_that_its_size_asks_for():
    """Averaged over n tokens, noise of the odds t / (1 - t) leaves odds / sqrt(n): equal for all sizes."""
    process = FlowProcess(FlowConfig(base_tokens=9))
    times, sizes = np.array([0.1, 0.5, 0.9]), np.array([9, 36, 225])
    odds = [np.asarray(process.shift(times, n), np.float64) / (1 - np.asarray(process.shift(times, n))) for n in sizes]
    for n, found in zip(sizes, odds, strict=True):
        np.testing.assert_allclose(found / np.sqrt(n), times / (1 - times) / 3, rtol=1e-5)
    np.testing.assert_array_equal(FlowProcess(FlowConfig()).shift(times, 225), times)
    several = jax.jit(process.shift)(jnp.asarray(times)[:, None], jnp.asarray(sizes))
    np.testing.assert_allclose(several, np.stack([process.shift(times, n) for n in sizes], axis=1), rtol=1e-6)
    # Trained and sampled alike.
    sampled = process.ladder(10, num_tokens=36).time[[9, 5, 1]]
    np.testing.assert_allclose(sampled, process.shift(times, 36), rtol=1e-6)


def test_a_discrete_ladder_visits_evenly_spaced_steps():
    process = DiscreteProcess(GaussianConfig(num_levels=100))
    whole = np.cumprod(1 - np.linspace(1e-3, 0.2, 100))
    ladder = process.ladder(4)
    steps = [99, 66, 33, 0]
    np.testing.assert_array_equal(ladder.time, [*steps, 0])
    np.testing.assert_allclose(ladder.alpha, [*np.sqrt(whole[steps]), 1], rtol=1e-6)
    np.testing.assert_allclose(ladder.sigma, [*np.sqrt(1 - whole[steps]), 0], rtol=1e-5)
    np.testing.assert_array_equal(process.ladder(4, strength=0.5).time, [33, 0, 0])
    assert process.most_steps == 100 and FlowProcess(FlowConfig()).most_steps is None
    for strength in (0.001, 1.5):
        with pytest.raises(ValueError, match=f"strength must leave one of 4 steps and be at most 1, got {strength}"):
            process.ladder(4, strength=strength)


def test_a_terminal_signal_of_zero_is_reached_and_sampled_from():
    config = GaussianConfig(num_levels=50, prediction="v", zero_terminal_snr=True)
    process = DiscreteProcess(config)
    ladder = process.ladder(50)
    assert (
        ladder.alpha[0] == 0
        and ladder.sigma[0] == 1
        and DiscreteProcess(GaussianConfig(num_levels=50)).levels.alpha[0] > 0
    )

    def network(x, time):
        level = jax.tree.map(lambda a: jnp.asarray(a)[49 - time.astype(int)], process.levels)
        said = gaussian_denoiser(x, level)
        return from_x0_and_noise(said.x0, said.noise, level.alpha, level.sigma, "v")

    x = jax.random.normal(jax.random.key(0), (4000, 2))
    sampler = process.sampler("euler")
    done = sample_chunk(process.denoiser(network), start(sampler, x, ladder), ladder, sampler)
    np.testing.assert_allclose(np.asarray(done.x).mean(axis=0), MEAN, atol=0.05)
    with pytest.raises(ValueError, match="zero_terminal_snr must be false for noise or learned betas, got True"):
        GaussianConfig(zero_terminal_snr=True)


@pytest.mark.parametrize("prediction", ["noise", "x0", "v"])
def test_min_snr_weighs_the_error_of_the_data(prediction):
    """Whatever is predicted, the loss is min(SNR, gamma) |x_0 - told|^2 (in float64)."""
    config = GaussianConfig(num_levels=100, prediction=prediction, min_snr=5.0)
    process, steps = DiscreteProcess(config), np.array([2, 30, 90])
    rng = np.random.default_rng(0)
    x0, noise, told = rng.standard_normal((3, 3, 4)).astype(np.float32)
    ab = np.cumprod(1 - np.linspace(1e-3, 0.2, 100))[steps][:, None]
    xt = np.sqrt(ab) * x0 + np.sqrt(1 - ab) * noise
    told_noise = (xt - np.sqrt(ab) * told) / np.sqrt(1 - ab)
    output = {"x0": told, "noise": told_noise, "v": np.sqrt(ab) * told_noise - np.sqrt(1 - ab) * told}[prediction]
    error = process.error(lambda x, time: jnp.asarray(output, jnp.float32), x0, noise, steps, 1.0)
    snr = (ab / (1 - ab))[:, 0]
    assert snr[0] > 5 > snr[-1]
    np.testing.assert_allclose(error, np.minimum(snr, 5) * np.square(told - x0).mean(axis=1), rtol=2e-3)
    plain = DiscreteProcess(GaussianConfig(num_levels=100, prediction="x0"))
    error = plain.error(lambda x, time: jnp.asarray(told), x0, noise, steps, 1.0)
    np.testing.assert_allclose(error, np.square(told - x0).mean(axis=1), rtol=1e-5)


def test_options_that_do_not_go_together_are_named():
    for changes, message in (
        (dict(min_snr=0.0), "min_snr must be None or positive, got 0"),
        (dict(min_snr=5.0, variance="learned", loss="hybrid"), "min_snr must be None where loss is not simple, got 5"),
    ):
        with pytest.raises(ValueError, match=message):
            GaussianConfig(**changes)
    with pytest.raises(ValueError, match=r"base_tokens must be None or at least 1, got 0"):
        FlowConfig(base_tokens=0)


def test_a_sampler_has_the_variance_of_its_process():
    assert named_sampler("ancestral", "large") == Ancestral("large")
    learned = DiscreteProcess(GaussianConfig(variance="learned", loss="hybrid"))
    assert learned.sampler("ancestral") == Ancestral("learned")
    with pytest.raises(ValueError, match=r"sampler must be one of euler, .*, got 'magic'"):
        learned.sampler("magic")


def test_levels_of_steps_are_those_above_and_below():
    process = DiscreteProcess(GaussianConfig(num_levels=30))
    now, to = process.at(jnp.array([0, 29, 7]))
    np.testing.assert_array_equal(now.time, [0, 29, 7])
    np.testing.assert_array_equal(to.time, [0, 28, 6])
    np.testing.assert_array_equal(to.sigma[0], 0)
    assert set(np.asarray(process.draw(jax.random.key(0), (500,))).tolist()) == set(range(30))
    assert flow_levels(np.array([0.25])).alpha == 0.75
