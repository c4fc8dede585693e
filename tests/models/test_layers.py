"""Norms against float64 NumPy where the mean is large, and where there is nothing to norm."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.models.layers import group_norm, layer_norm, rms_norm

X = np.random.default_rng(0).standard_normal((64, 384))


def moments(x, axes):
    return x.mean(axes, keepdims=True), x.std(axes, keepdims=True)


@pytest.mark.parametrize(("mean", "tolerance"), [(0, 1e-6), (100, 2e-5), (-3000, 6e-4)])
def test_a_large_mean_does_not_cancel_in_a_layer_norm(mean, tolerance):
    """What stays is the rounding of the mean itself: a few units in the last place of float32."""
    x = np.float32(X + mean)
    got = layer_norm(name="norm", eps=1e-6, affine=False).apply({}, x)
    centre, spread = moments(np.float64(x), -1)
    np.testing.assert_allclose(got, (x - centre) / np.sqrt(spread**2 + 1e-6), atol=tolerance)


def test_a_large_mean_does_not_cancel_in_a_group_norm():
    x = np.float32(X.reshape(4, 8, 16, 48) + 100)
    norm = group_norm(name="norm", num_groups=6, eps=1e-6)
    got = norm.apply(norm.init(jax.random.key(0), x), x)
    groups = np.float64(x).reshape(4, 8, 16, 6, 8)
    centre, spread = moments(groups, (1, 2, 4))
    np.testing.assert_allclose(got, ((groups - centre) / np.sqrt(spread**2 + 1e-6)).reshape(x.shape), atol=1e-4)


@pytest.mark.parametrize("value", [0.0, 7.0])
def test_norms_of_what_does_not_vary_are_finite_and_so_are_their_gradients(value):
    x = jnp.full((2, 4, 4, 8), value)
    norms = [layer_norm(name="n", eps=1e-6, affine=True), rms_norm(name="n", axis="width", eps=1e-6),
             group_norm(name="n", num_groups=2, eps=1e-6)]  # fmt: skip
    for norm in norms:
        params = norm.init(jax.random.key(0), x)
        out, gradient = jax.value_and_grad(lambda x, norm=norm, params=params: norm.apply(params, x).sum())(x)
        assert np.isfinite(out) and np.isfinite(gradient).all()
