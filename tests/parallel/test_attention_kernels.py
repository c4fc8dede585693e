"""What every attention kernel keeps to (`AttentionFn`), each against float64 in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.models.attention import NO_KEYS, xla_attention
from sora_jax.models.blockwise_attention import blockwise_attention
from sora_jax.parallel.splash import splash_attention

KERNELS = {
    "xla": xla_attention,
    "blockwise": blockwise_attention,
    "splash": splash_attention(None, interpret=True),
}
HEADS, HEAD_DIM = 2, 6
# Of several blocks, interleaved; segment 3 has queries without keys and segment 4 a key without queries.
QUERY_IDS = np.repeat([[1, 2, 1, 0, 3, 2, 0], [1, 1, 2, 2, 2, 5, 5]], 20, axis=1)
KEY_IDS = np.repeat([[2, 1, 4, 0, 1], [5, 1, 2, 1, 0]], 20, axis=1)
SELF_IDS = np.repeat([[1, 1, 2, 0, 1, 3, 0], [1] * 7], 20, axis=1)


def draw(query_ids, key_ids, bias_rows, seed=0):
    """Queries, keys, values and a bias (or None), with garbage where padded, and weights of the outputs."""
    rng = np.random.default_rng(seed)
    (rows, length), keys = query_ids.shape, key_ids.shape[1]
    q, k, v = (rng.normal(size=(rows, n, HEADS, HEAD_DIM)).astype(np.float32) for n in (length, keys, keys))
    q[query_ids == 0] = 1e3
    k[key_ids == 0], v[key_ids == 0] = -1e3, 1e3
    bias = rng.normal(size=(bias_rows, HEADS, length, keys)).astype(np.float32) if bias_rows else None
    weights = rng.normal(size=q.shape).astype(np.float32), rng.normal(size=q.shape[:3]).astype(np.float32)
    return (q, k, v, bias), weights


def in_float64(q, k, v, bias, query_ids, key_ids, causal, scale):
    """Equations 1 to 3 of `sora_jax.models.attention`, a query at a time, from that query's keys alone."""
    out, total = np.zeros(q.shape), np.full(q.shape[:3], NO_KEYS)
    for b, i in np.argwhere(query_ids > 0):
        keys = np.flatnonzero(key_ids[b] == query_ids[b, i])
        keys = keys[keys <= i] if causal else keys
        if len(keys):
            scores = np.einsum("hd,khd->hk", q[b, i], k[b, keys]) * scale
            if bias is not None:
                scores = scores + bias[b % len(bias)][:, i, keys]
            total[b, i] = np.log(np.exp(scores).sum(axis=1))
            out[b, i] = np.einsum("hk,khd->hd", np.exp(scores - total[b, i][:, None]), v[b, keys])
    return out, total


CASES = {
    "cross": dict(query_ids=QUERY_IDS, key_ids=KEY_IDS, bias_rows=2, causal=False, scale=0.7),
    "causal": dict(query_ids=SELF_IDS, key_ids=SELF_IDS, bias_rows=1, causal=True, scale=None),
}


@pytest.mark.parametrize(
    ("kernel", "case"),
    [
        ("xla", "cross"),
        ("xla", "causal"),
        ("blockwise", "cross"),
        ("blockwise", "causal"),
        ("splash", "causal"),
        pytest.param("many blocks", "causal", marks=pytest.mark.slow),
    ],
)
def test_values_and_gradients_are_those_of_float64(kernel, case):
    case = dict(CASES[case])
    ids, bias_rows = (case.pop("query_ids"), case.pop("key_ids")), case.pop("bias_rows")
    arrays, weights = draw(*ids, 0 if kernel == "splash" else bias_rows)
    attention = {**KERNELS, "many blocks": functools.partial(blockwise_attention, side_by_side=100)}[kernel]
    has_key = in_float64(*arrays, *ids, case["causal"], 1)[1] > NO_KEYS

    @jax.jit
    def ours(q, k, v, bias):
        def loss(q, k, v, bias):
            out, total = attention(q, k, v, *ids, bias=bias, with_logsumexp=True, **case)
            return (out * weights[0]).sum() + (jnp.where(has_key, total, 0) * weights[1]).sum(), (out, total)

        return jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True)(q, k, v, bias)

    with jax.default_matmul_precision("float32"):
        (_, (out, total)), gradients = ours(*arrays)

    def oracle(arrays):
        return in_float64(*arrays, *ids, case["causal"], case["scale"] or HEAD_DIM**-0.5)

    wide = [None if a is None else a.astype(np.float64) for a in arrays]
    expected, expected_total = oracle(wide)
    np.testing.assert_allclose(out, expected, atol=3e-6)
    np.testing.assert_allclose(total, np.float32(expected_total), atol=3e-6)
    assert not np.asarray(out)[~has_key].any() and (np.asarray(total)[~has_key] == np.float32(NO_KEYS)).all()

    # Each gradient along two random directions, by central differences; those of what is padded must be zero.
    rng = np.random.default_rng(1)
    real = [has_key[..., None], *[(ids[1] > 0)[..., None, None]] * 2, True]
    for n, gradient in enumerate(gradients):
        if gradient is None:
            continue
        assert not np.asarray(gradient)[~np.broadcast_to(real[n], gradient.shape)].any()
        for _ in range(2):
            direction, step = rng.normal(size=gradient.shape) * real[n], 1e-6
            losses = [0.0, 0.0]
            for side, sign in enumerate((1, -1)):
                moved = [a + sign * step * direction if m == n else a for m, a in enumerate(wide)]
                o, z = oracle(moved)
                losses[side] = (o * weights[0]).sum() + (np.where(has_key, z, 0) * weights[1]).sum()
            slope = (losses[0] - losses[1]) / (2 * step)
            np.testing.assert_allclose((gradient * direction).sum(), slope, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("kernel", KERNELS)
def test_packed_is_alone(kernel):
    """Of causal attention, whose order is the row's: each segment in a row of its own gives the same."""
    ids = np.repeat([[2, 1, 0]], [65, 65, 20], axis=1)
    (q, k, v, bias), _ = draw(ids, ids, 0 if kernel == "splash" else 1)
    attention = jax.jit(functools.partial(KERNELS[kernel], causal=True, with_logsumexp=True))
    packed = attention(q, k, v, ids, ids, bias=bias)
    for part in (slice(0, 65), slice(65, 130)):
        own = None if bias is None else bias[:, :, part, part]
        alone = attention(q[:, part], k[:, part], v[:, part], *[np.ones_like(ids[:, part])] * 2, bias=own)
        for whole, single in zip(packed, alone, strict=True):
            np.testing.assert_allclose(whole[:, part], single, atol=1e-5)


def put_together(parts):
    """Attention to all keys from that to each part of them: what a ring of devices does."""
    outs, totals = (jnp.stack(x) for x in zip(*parts, strict=True))
    shares = jax.nn.softmax(totals, axis=0)
    return (shares[..., None] * outs).sum(axis=0), jax.nn.logsumexp(totals, axis=0)


@pytest.mark.parametrize("kernel", KERNELS)
def test_two_halves_of_the_keys_make_the_whole(kernel):
    (q, k, v, bias), _ = draw(QUERY_IDS, KEY_IDS, 0 if kernel == "splash" else 2)
    attention = jax.jit(functools.partial(KERNELS[kernel], with_logsumexp=True))
    with jax.default_matmul_precision("float32"):
        whole = attention(q, k, v, QUERY_IDS, KEY_IDS, bias=bias)
        parts = [
            attention(
                q, k[:, half], v[:, half], QUERY_IDS, KEY_IDS[:, half], bias=None if bias is None else bias[..., half]
            )
            for half in (slice(0, 50), slice(50, 100))
        ]
    for ours, expected in zip(put_together(parts), whole, strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


def test_the_gradient_of_halves_is_finite_where_there_is_no_key():
    (q, k, v, _), _ = draw(QUERY_IDS, KEY_IDS, 0)

    def total(q):
        attention = functools.partial(xla_attention, q, with_logsumexp=True)
        halves = [attention(k[:, h], v[:, h], QUERY_IDS, KEY_IDS[:, h]) for h in (slice(0, 50), slice(50, 100))]
        return sum(x.sum() for x in put_together(halves))

    assert np.isfinite(jax.jit(jax.grad(total))(q)).all()


@pytest.mark.parametrize("kernel", KERNELS)
def test_what_a_kernel_cannot_do_is_said(kernel):
    (q, k, v, bias), _ = draw(QUERY_IDS, KEY_IDS, 1)
    with pytest.raises(ValueError, match="causal attention needs as many keys as queries, got 100 and 140"):
        KERNELS[kernel](q, k, v, QUERY_IDS, KEY_IDS, causal=True)
    if kernel == "splash":
        with pytest.raises(ValueError, match="splash takes no bias; attention xla and blockwise do"):
            KERNELS[kernel](q, k, v, QUERY_IDS, KEY_IDS, bias=bias)
