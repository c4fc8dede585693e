"""Binomial diffusion against sums over all states."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.diffusion import binomial
from sora_jax.diffusion.schedules import harmonic_betas

BETAS = np.array([0.1, 0.3, 0.5])


def transition(beta):
    """q(x_t | x_{t-1}) as a matrix of (from, to)."""
    return np.array([[1 - beta / 2, beta / 2], [beta / 2, 1 - beta / 2]])


def test_marginals_are_products_of_transitions():
    whole = np.eye(2)
    for beta, a in zip(BETAS, binomial.kept(BETAS), strict=True):
        whole = whole @ transition(beta)
        np.testing.assert_allclose(binomial.marginal(np.array([0.0, 1.0]), a), whole[:, 1], rtol=1e-6)
    np.testing.assert_allclose(binomial.marginal(np.array([0.0, 1.0]), binomial.kept(harmonic_betas(7))[-1]), 0.5)


@pytest.mark.parametrize("f", [0.0, 1.0, 0.3])
def test_posterior_by_bayes_rule(f):
    for t in (1, 2):
        before = np.linalg.multi_dot([np.eye(2), *(transition(b) for b in BETAS[:t])])
        for xt in (0, 1):
            joint = before * transition(BETAS[t])[:, xt]  # (x_0, x_{t-1})
            given = joint[:, 1] / joint.sum(axis=1)
            expected = (1 - f) * given[0] + f * given[1]
            got = binomial.posterior(np.array(float(xt)), np.array(f), BETAS[t], binomial.kept(BETAS)[t - 1])
            assert float(got) == pytest.approx(expected, rel=1e-5)
    # Before the first step stands x_0 itself.
    assert float(binomial.posterior(np.array(1.0), np.array(f), BETAS[0], np.array(1.0))) == pytest.approx(f)


def test_kl_by_its_definition():
    q, p = np.array([0.3, 0.0, 1.0]), np.array([0.6, 0.2, 0.9])
    expected = [0.3 * np.log(0.3 / 0.6) + 0.7 * np.log(0.7 / 0.4), np.log(1 / 0.8), np.log(1 / 0.9)]
    np.testing.assert_allclose(binomial.bernoulli_kl(q, p), expected, rtol=1e-5)


TOY = np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1]], np.float32)  # one of three bits is on, each as likely


def exact_network(betas):
    """Logits of the true p(x_0 | x_t), each bit's, by a sum over the three sequences."""
    table = jnp.asarray(binomial.kept(betas), jnp.float32)

    def network(x, step):
        p = binomial.marginal(jnp.asarray(TOY), table[step])  # (3, bits)
        log_likelihood = jnp.where(x[:, None] > 0.5, jnp.log(p), jnp.log(1 - p)).sum(-1)
        on = jax.nn.softmax(log_likelihood, axis=-1) @ TOY
        return jnp.log(on) - jnp.log1p(-on)

    return network


def test_the_bound_nears_the_entropy_as_steps_grow():
    """With the true p(x_0 | x_t) only the independence of bits within a step is lost, and that with the steps' size."""
    gaps = []
    for num_steps in (10, 100, 1000):
        betas = harmonic_betas(num_steps)
        run = jax.jit(lambda x, betas=betas: binomial.bound(exact_network(betas), x, betas, jax.random.key(0)).total)
        totals = np.float64(run(jnp.asarray(np.tile(TOY, (3000, 1)))))
        gaps.append(totals.mean() - np.log(3))
        assert gaps[-1] > -3 * totals.std() / np.sqrt(len(totals))
    assert gaps[0] > 2 * gaps[1] > 2 * 2 * gaps[2]
    assert gaps[2] < 0.02


def test_samples_of_the_reverse_chain_follow_the_data():
    betas = harmonic_betas(200)
    drawn = np.asarray(
        jax.jit(lambda key: binomial.sample(exact_network(betas), (6000, 3), betas, key))(jax.random.key(1))
    )
    shares = {bits: (drawn == bits).all(axis=1).mean() for bits in itertools.product((0, 1), repeat=3)}
    for row in TOY:
        assert shares[tuple(row)] == pytest.approx(1 / 3, abs=0.03)
    assert binomial.null_bits(20) == -20.0


def test_a_bit_drawn_is_one_as_often_as_asked():
    p = jnp.array([0.0, 0.2, 1.0])
    drawn = binomial.draw(jax.random.key(0), jnp.broadcast_to(p, (20_000, 3)))
    np.testing.assert_allclose(drawn.mean(0), p, atol=0.01)


def test_bad_betas_are_named():
    with pytest.raises(ValueError, match=r"betas must be in \(0, 1\], got betas\[1\] = 1.2"):
        binomial.kept(np.array([0.1, 1.2]))
