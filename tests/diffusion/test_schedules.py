"""Schedules: literal values of the papers, closed forms, and what samples must follow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from sora_jax.diffusion import schedules


def test_ddpm_betas_leave_almost_nothing():
    betas = schedules.linear_betas()
    assert (betas[0], betas[-1], len(betas)) == (1e-4, 0.02, 1000)
    # arXiv:2006.11239, section 4: D_KL(q(x_T | x_0) || N(0, I)) is about 1e-5 bits a dimension, for data in [-1, 1].
    left = schedules.alpha_bar(betas)[-1]
    kl = 0.5 * (left * 0.5 - left - np.log(1 - left)) / np.log(2)
    assert 1e-5 < kl < 5e-5


@pytest.mark.parametrize("num_steps", [21, 100, 500, 2000, 4000])
def test_linear_betas_leave_as_little_whatever_the_number_of_steps(num_steps):
    """The sum of betas, the integral that sets what is left, is that of 1000 steps; arXiv:2102.09672 has 4000."""
    betas = schedules.linear_betas(num_steps)
    assert betas.sum() == pytest.approx(schedules.linear_betas().sum())
    assert schedules.alpha_bar(betas)[-1] < 5e-5
    if num_steps == 4000:
        np.testing.assert_allclose(betas[[0, -1]], [0.25e-4, 0.005])
    assert schedules.linear_betas(num_steps, 0.1, 0.2)[[0, -1]].tolist() == [0.1, 0.2]


def official_steps(num_steps, count):
    """`space_timesteps` of improved-diffusion, guided-diffusion and DiT, for one section."""
    frac_stride = 1 if count <= 1 else (num_steps - 1) / (count - 1)
    cur_idx, taken = 0.0, []
    for _ in range(count):
        taken.append(round(cur_idx))
        cur_idx += frac_stride
    return taken


def test_linspace_is_the_official_rule_to_the_step():
    for count in range(1, 1001):
        assert schedules.respaced_steps(1000, count, "linspace").tolist() == official_steps(1000, count), count
    assert schedules.respaced_steps(4000, 334, "linspace").tolist() == official_steps(4000, 334)
    # Ties go to the even step: 999 / 2 and half of that.
    assert schedules.respaced_steps(1000, 3, "linspace").tolist() == [0, 500, 999]
    assert schedules.respaced_steps(10, 3, "linspace").tolist() == [0, 4, 9]


def test_leading_is_the_official_ddim_where_the_count_divides_the_steps():
    for count in (10, 25, 50, 100, 250):
        stride = next(i for i in range(1, 1000) if len(range(0, 1000, i)) == count)
        assert schedules.respaced_steps(1000, count).tolist() == list(range(0, 1000, stride))


def test_cosine_betas_follow_the_curve_until_they_are_cut():
    t, bar = np.arange(1, 1001) / 1000, schedules.alpha_bar(schedules.cosine_betas())
    curve = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2 / np.cos(0.008 / 1.008 * np.pi / 2) ** 2
    np.testing.assert_allclose(bar[:990], curve[:990], rtol=1e-9)
    assert schedules.cosine_betas()[-1] == 0.999


def test_harmonic_betas_erase_a_constant_share_a_step():
    np.testing.assert_allclose(np.cumprod(1 - schedules.harmonic_betas(5)), [0.8, 0.6, 0.4, 0.2, 0.0], atol=1e-12)


def test_log_snr_falls_evenly_between_its_ends():
    bar = schedules.alpha_bar(schedules.log_snr_betas(23, 14.0, -8.0))
    # rtol of 1 - alpha_bar, which is 8e-7 at the first step, as a sampler needs it.
    np.testing.assert_allclose(1 - bar, scipy.special.expit(-np.arange(14.0, -9.0, -1.0)), rtol=1e-9)
    # Two steps by hand: SNR 3, then SNR 1 / 3.
    betas = schedules.log_snr_betas(2, np.log(3.0), -np.log(3.0))
    np.testing.assert_allclose(betas, [1 / 4, 2 / 3])


def test_learned_betas_keep_the_first():
    betas = schedules.learned_betas(jnp.array([0.0, 100.0]), first=0.01)
    np.testing.assert_allclose(betas, [0.01, 0.5, 1.0])
    assert jax.grad(lambda x: schedules.learned_betas(x)[1])(jnp.zeros(2))[0] == 0.25


def test_a_late_start_keeps_the_times_below_its_strength():
    times = schedules.flow_times(4)
    np.testing.assert_array_equal(schedules.start_at(times, 1.0), times)
    np.testing.assert_array_equal(schedules.start_at(times, 0.5), [0.5, 0.25, 0])
    np.testing.assert_allclose(schedules.start_at(times, 0.6), [0.6, 0.5, 0.25, 0])
    with pytest.raises(ValueError, match="strength must be above 0 and at most 1, got 0"):
        schedules.start_at(times, 0.0)


def test_zero_terminal_snr_keeps_the_first_step_and_nothing_of_the_data():
    betas = schedules.linear_betas(50, 0.001, 0.2)
    bar, new = schedules.alpha_bar(betas), schedules.alpha_bar(schedules.zero_terminal_snr(betas))
    assert new[-1] == 0.0
    assert new[0] == pytest.approx(bar[0])
    # sqrt(alpha_bar) is shifted and scaled: differences keep their ratios.
    ratios = np.diff(np.sqrt(new)) / np.diff(np.sqrt(bar))
    np.testing.assert_allclose(ratios, ratios[0])


def test_respaced_steps_by_eye():
    assert schedules.respaced_steps(10, 5).tolist() == [0, 2, 4, 6, 8]
    assert schedules.respaced_steps(1000, 4, offset=1).tolist() == [1, 251, 501, 751]
    assert schedules.respaced_steps(10, 5, "trailing").tolist() == [1, 3, 5, 7, 9]
    assert schedules.respaced_steps(10, 4, "linspace").tolist() == [0, 3, 6, 9]
    assert schedules.respaced_steps(1000, 250, "linspace")[[0, 1, -1]].tolist() == [0, 4, 999]


def test_a_respaced_process_has_the_noise_of_the_whole_one_where_it_looks():
    betas, steps = schedules.linear_betas(100, 1e-3, 0.1), [3, 10, 42, 99]
    kept = schedules.respaced_betas(betas, steps)
    np.testing.assert_allclose(schedules.alpha_bar(kept), schedules.alpha_bar(betas)[steps])
    np.testing.assert_allclose(schedules.respaced_betas(betas, range(100)), betas)


def test_flow_times_by_eye():
    np.testing.assert_allclose(schedules.flow_times(4), [1, 0.75, 0.5, 0.25, 0])
    np.testing.assert_allclose(schedules.flow_times(2, shift=3.0), [1, 0.75, 0])  # 3 * 0.5 / (1 + 2 * 0.5)
    assert schedules.resolution_shift(4096, 256) == 4.0


def test_a_shift_moves_the_logit_by_its_logarithm():
    t = np.linspace(0.01, 0.99, 7)
    moved = scipy.special.logit(schedules.shift_times(t, 3.0)) - scipy.special.logit(t)
    np.testing.assert_allclose(moved, np.log(3.0))


def test_times_follow_their_laws():
    times = np.asarray(schedules.logit_normal_times(jax.random.key(0), (4000,), 0.5, 0.8), np.float64)
    assert scipy.stats.kstest(scipy.special.logit(times), scipy.stats.norm(0.5, 0.8).cdf).pvalue > 0.01
    times = np.asarray(schedules.uniform_times(jax.random.key(0), (4000,)))
    assert scipy.stats.kstest(times, scipy.stats.uniform().cdf).pvalue > 0.01


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: schedules.linear_betas(20), "num_steps must be at least 21 .* got 20"),
        (lambda: schedules.linear_betas(0), "num_steps must be at least 1, got 0"),
        (lambda: schedules.linear_betas(3, 0.1, 1.5), r"betas must be in \(0, 1\], got betas\[2\] = 1.5"),
        (lambda: schedules.check_betas(np.array([0.1, np.nan])), r"betas\[1\] = nan"),
        (lambda: schedules.check_betas(np.array([])), "at least one number"),
        (lambda: schedules.respaced_steps(10, 11), "count must be between 1 and the process's 10 steps, got 11"),
        (lambda: schedules.respaced_steps(10, 2, "even"), "spacing must be leading, trailing or linspace, got 'even'"),
        (
            lambda: schedules.respaced_betas(schedules.linear_betas(4, 0.1, 0.2), [0, 4]),
            r"within 0 ... 3, got \[0, 4\]",
        ),
        (lambda: schedules.respaced_betas(schedules.linear_betas(4, 0.1, 0.2), [2, 1]), "must increase strictly"),
        (lambda: schedules.log_snr_betas(1, 4.0, -4.0), "num_steps must be at least 2, got 1"),
        (lambda: schedules.log_snr_betas(9, -4.0, 4.0), r"first above last, got -4\.0 and 4\.0"),
        (lambda: schedules.log_snr_betas(9, np.inf, 0.0), "finite log SNRs, first above last, got inf and 0"),
        (lambda: schedules.flow_times(0), "num_steps must be at least 1, got 0"),
        (lambda: schedules.flow_times(3, -1.0), r"shift must be positive, got -1\.0"),
        (lambda: schedules.zero_terminal_snr(schedules.linear_betas(1, 0.1, 0.1)), "at least 2 steps"),
        (lambda: schedules.resolution_shift(0, 4), "must be positive"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()
