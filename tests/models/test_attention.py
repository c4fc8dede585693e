import numpy as np

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


def test_blockwise_stays_finite_with_huge_scores():
    q, k, v = inputs()
    out = blockwise_attention(100 * q, 100 * k, v, QUERY_IDS, KEY_IDS)
    np.testing.assert_allclose(out, numpy_attention(100 * q, 100 * k, v, QUERY_IDS, KEY_IDS), atol=2e-3)
