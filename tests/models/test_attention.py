import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.models import attention
from sora_jax.models.attention import attention_kernel, whole_row_attention, xla_attention
from sora_jax.models.blockwise_attention import blockwise_attention

QUERY_IDS = np.repeat([[1, 2, 3, 4, 0, 5], [2, 0, 1, 1, 3, 3]], 50, axis=1)
KEY_IDS = np.repeat([[1, 2, 2, 4, 0], [0, 1, 1, 3, 2]], 30, axis=1)  # query segments 3 and 5 have no keys


def inputs(dtype=np.float32):
    rng = np.random.default_rng(0)
    q = rng.normal(size=(2, 300, 2, 8)).astype(dtype)
    k, v = rng.normal(size=(2, 2, 150, 2, 8)).astype(dtype)
    return q, k, v


def numpy_attention(q, k, v, query_ids, key_ids):
    """Equation 1 in float64, a query at a time."""
    out = np.zeros(q.shape)
    for b, i, h in np.ndindex(*q.shape[:3]):
        keys = np.flatnonzero((key_ids[b] == query_ids[b, i]) & (query_ids[b, i] > 0))
        if len(keys):
            scores = k[b, keys, h].astype(np.float64) @ q[b, i, h] / np.sqrt(q.shape[-1])
            weights = np.exp(scores - scores.max())
            out[b, i, h] = weights / weights.sum() @ v[b, keys, h]
    return out


@pytest.mark.parametrize("kernel", [xla_attention, blockwise_attention])
def test_against_float64(kernel):
    q, k, v = inputs()
    out = np.asarray(kernel(q, k, v, QUERY_IDS, KEY_IDS))
    np.testing.assert_allclose(out, numpy_attention(q, k, v, QUERY_IDS, KEY_IDS), atol=2e-6)
    keyless = (QUERY_IDS == 0) | (QUERY_IDS == 5) | ((QUERY_IDS == 3) & (np.arange(2)[:, None] == 0))
    assert not out[keyless].any()
    assert out[~keyless].any(axis=(-1, -2)).all()


def test_gradients_of_blockwise_equal_those_of_the_reference():
    weight = np.random.default_rng(1).normal(size=(2, 300, 2, 8)).astype(np.float32)

    def gradients(kernel):
        def total(q, k, v):
            return (kernel(q, k, v, QUERY_IDS, KEY_IDS) * weight).sum()

        return jax.jit(jax.grad(total, argnums=(0, 1, 2)))(*inputs())

    for ours, reference in zip(gradients(blockwise_attention), gradients(xla_attention), strict=True):
        assert float(jnp.abs(reference).max()) > 0.1
        np.testing.assert_allclose(ours, reference, atol=5e-6)


def test_blockwise_stays_finite_with_huge_scores():
    q, k, v = inputs()
    out = blockwise_attention(100 * q, 100 * k, v, QUERY_IDS, KEY_IDS)
    np.testing.assert_allclose(out, numpy_attention(100 * q, 100 * k, v, QUERY_IDS, KEY_IDS), atol=2e-3)


@pytest.mark.parametrize("most", [149, 150])
def test_whole_rows_take_no_matrix_that_is_too_large(monkeypatch, most):
    monkeypatch.setattr(attention, "DENSE_KEYS", most)
    jaxpr = str(jax.make_jaxpr(lambda *qkv: whole_row_attention(*qkv, QUERY_IDS, KEY_IDS))(*inputs()))
    assert ("f32[2,2,300,150]" in jaxpr) == (most >= 150)
    out = whole_row_attention(*inputs(), QUERY_IDS, KEY_IDS)
    np.testing.assert_allclose(out, numpy_attention(*inputs(), QUERY_IDS, KEY_IDS), atol=2e-6)


def test_names(monkeypatch):
    assert attention_kernel("xla") is xla_attention
    assert attention_kernel("xla", packed=False) is xla_attention
    assert attention_kernel("auto") is blockwise_attention
    assert attention_kernel("auto", packed=False) is whole_row_attention
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert attention_kernel("auto") is attention_kernel("auto", packed=False) is xla_attention
    with pytest.raises(ValueError, match="splash is built for a mesh"):
        attention_kernel("splash")
