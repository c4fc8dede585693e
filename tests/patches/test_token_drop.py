import itertools

import numpy as np
import pytest
import scipy.stats

from sora_jax.patches.token_drop import BetaDrop, ConstantDrop, ResolutionDrop, kept_tokens, truncated_normal

DRAWS = 2000


def rates(drop, num_tokens=100):
    rng = np.random.default_rng(0)
    return [drop.draw_rate(rng, num_tokens) for _ in range(DRAWS)]


def assert_distributed(values, distribution):
    assert scipy.stats.kstest(values, distribution.cdf).pvalue > 0.01


def test_constant_rate():
    assert set(rates(ConstantDrop(0.3))) == {0.3}


def test_beta_rates():
    """By moments that are worked out here: of u the mean is 2/3 and the variance 0.3 of 2/9."""
    drawn = rates(BetaDrop(mean=0.6, highest=0.9))
    a, b = 2 / 3 * (7 / 3), 1 / 3 * (7 / 3)
    distribution = scipy.stats.beta(a, b, scale=0.9)
    assert distribution.mean() == pytest.approx(0.6)
    assert distribution.var() == pytest.approx(0.81 * 0.3 * 2 / 9)
    assert_distributed(drawn, distribution)
    assert 0 < min(drawn)
    assert max(drawn) <= 0.9


@pytest.mark.parametrize(("num_tokens", "mean"), [(10, 0.2), (100, 0.2), (150, 0.35), (300, 0.8), (999, 0.8)])
def test_rates_by_resolution(num_tokens, mean):
    drop = ResolutionDrop(num_tokens=(100, 300), rates=(0.2, 0.8))
    assert_distributed(rates(drop, num_tokens), scipy.stats.truncnorm(-2, 2, loc=mean, scale=0.02))


def test_rates_by_resolution_stay_shares():
    drawn = rates(ResolutionDrop(num_tokens=(100, 300), rates=(0.0, 0.99)), 100)
    assert min(drawn) >= 0
    assert_distributed(drawn, scipy.stats.truncnorm(0, 2, loc=0, scale=0.02))


@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (-0.5, 0.2), (2.0, 3.0)])
def test_truncated_normal(low, high):
    rng = np.random.default_rng(0)
    drawn = [truncated_normal(rng, -0.5, 1.0, low, high) for _ in range(DRAWS)]
    assert_distributed(drawn, scipy.stats.truncnorm(low + 0.5, high + 0.5, loc=-0.5))
    assert low <= min(drawn)
    assert max(drawn) <= high


@pytest.mark.parametrize(
    ("num_tokens", "rate", "count"),
    [(10, 0.0, 10), (10, 0.3, 7), (7, 0.5, 4), (1, 0.9, 1), (3, 1.0, 1), (64, 0.75, 16)],
)
def test_so_many_tokens_stay(num_tokens, rate, count):
    kept = kept_tokens(np.random.default_rng(0), num_tokens, rate)
    assert len(kept) == count
    assert set(kept) <= set(range(num_tokens))
    assert np.all(np.diff(kept) > 0)


def test_every_set_of_tokens_is_as_likely():
    rng = np.random.default_rng(0)
    drawn = [tuple(kept_tokens(rng, 5, 0.4).tolist()) for _ in range(DRAWS)]
    counts = [drawn.count(each) for each in itertools.combinations(range(5), 3)]
    assert sum(counts) == DRAWS
    assert scipy.stats.chisquare(counts).pvalue > 0.01


def test_a_seed_gives_the_same_tokens():
    a, b, c = (kept_tokens(np.random.default_rng(seed), 50, 0.5).tolist() for seed in (3, 3, 4))
    assert a == b != c


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: ConstantDrop(1.0), r"ConstantDrop.rate must be in \[0, 1\), got 1.0"),
        (lambda: ConstantDrop(-0.1), "rate must be in"),
        (lambda: BetaDrop(mean=0.9, highest=0.9), r"mean must be in \(0, highest = 0.9\)"),
        (lambda: BetaDrop(highest=1.0), "highest must be in"),
        (lambda: BetaDrop(variance_share=1.0), "variance_share must be in"),
        (lambda: ResolutionDrop(rates=(0.2, 1.0)), "rates must be both in"),
        (lambda: ResolutionDrop(num_tokens=(5, 5)), "num_tokens must be"),
        (lambda: ResolutionDrop(std=0.0), "std must be positive"),
        (lambda: kept_tokens(np.random.default_rng(0), 0, 0.5), "num_tokens must be at least 1, got 0"),
        (lambda: kept_tokens(np.random.default_rng(0), 4, 1.2), r"rate must be in \[0, 1\], got 1.2"),
        (lambda: truncated_normal(np.random.default_rng(0), 0.0, 1.0, 1.0, 1.0), "low and high must bound"),
        (lambda: truncated_normal(np.random.default_rng(0), 0.0, 1.0, 20.0, 30.0), "low and high must bound"),
    ],
)
def test_what_cannot_work_is_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()
