import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.diffusion.likelihood import BoundTerms
from sora_jax.evaluation.bound import estimate_bound

X = np.arange(10, dtype=np.float32)[:, None]


def told(x, key):
    """Terms that are the example's own number, and a coin."""
    coin = jax.random.bernoulli(key, 0.5, (3, len(x))).astype(jnp.float32)
    return BoundTerms(x[:, 0], jnp.zeros((3, len(x))).at[1].set(2 * x[:, 0]), coin)


@pytest.mark.parametrize("batch_size", [1, 3, 10, 64])
def test_every_example_counts_once_whatever_the_batches(batch_size):
    estimate = estimate_bound(told, X, jax.random.key(0), num_draws=2, batch_size=batch_size)
    np.testing.assert_allclose(estimate.k, -3 * X[:, 0] / np.log(2), rtol=1e-6)
    assert estimate.mean == pytest.approx(-3 * 4.5 / np.log(2))
    assert estimate.standard_error == pytest.approx(3 * X.std(ddof=1) / np.log(2) / np.sqrt(10))
    np.testing.assert_allclose(estimate.terms.prior, [4.5])
    np.testing.assert_allclose(estimate.terms.steps[:, 0], [0, 9, 0])


def test_draws_are_independent_and_averaged():
    calls = []
    one, many = (
        estimate_bound(told, X, jax.random.key(0), num_draws=n, batch_size=2, progress=calls.append) for n in (1, 200)
    )
    assert calls == [*range(1, 6), *range(1, 1001)]
    assert np.abs(many.terms.squared_errors - 0.5).max() < 4 * 0.5 / np.sqrt(2000)
    assert not np.array_equal(one.terms.squared_errors, many.terms.squared_errors)


@pytest.mark.parametrize(("examples", "num_draws"), [(X[:0], 1), (X, 0)])
def test_nothing_to_average_is_an_error(examples, num_draws):
    with pytest.raises(ValueError, match="needs an example and a draw"):
        estimate_bound(told, examples, jax.random.key(0), num_draws=num_draws)
