import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from sora_jax.models.attention import xla_attention
from sora_jax.parallel.splash import _block_size, splash_attention


def one_device_mesh():
    devices = np.array(jax.devices()[:1]).reshape(1, 1)
    return Mesh(devices, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def rows(num_queries, num_keys, query_ids, key_ids, head_dim=6, num_heads=2):
    """Two rows with the given ids, the second without padding at all; garbage where padded."""
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = [(2, n, num_heads, head_dim) for n in (num_queries, num_keys, num_keys, num_queries)]
    q, k, v, weights = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
    query_ids = jnp.array([query_ids, [1] * num_queries])
    key_ids = jnp.array([key_ids, [1] * num_keys])
    q = jnp.where(query_ids[..., None, None] > 0, q, 1e4)
    k, v = (jnp.where(key_ids[..., None, None] > 0, x, 1e4) for x in (k, v))
    return q, k, v, query_ids, key_ids, weights


# Interleaved segments, padding between and behind; segment 3 has queries and no key, segment 4 a key and no query.
QUERY_IDS = [1, 1, 2, 0, 1, 2, 3, 3, 0, 5]
KEY_IDS = [5, 1, 0, 2, 2, 4, 1, 0]


@pytest.mark.parametrize("kind", ["self", "cross", "blocks"])
def test_same_values_and_gradients_as_the_reference(kind):
    if kind == "self":
        case = rows(10, 10, QUERY_IDS, QUERY_IDS)
    elif kind == "cross":
        case = rows(10, 8, QUERY_IDS, KEY_IDS)
    else:  # several blocks of 128 of which one holds nothing but padding
        ids = [1] * 100 + [2] * 150 + [0] * 140 + [3] * 200 + [0] * 50
        case = rows(640, 640, ids, ids, num_heads=1)
    q, k, v, query_ids, key_ids, weights = case

    def both(attention):
        def loss(q, k, v):
            out = attention(q, k, v, query_ids, key_ids)
            return (out * weights).sum(), out

        (_, out), gradients = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(q, k, v)
        return out, *gradients

    with jax.default_matmul_precision("float32"):
        ours = jax.jit(lambda: both(splash_attention(one_device_mesh(), interpret=True)))()
        expected = jax.jit(lambda: both(xla_attention))()
    for name, a, b in zip(("output", "dq", "dk", "dv"), ours, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5, err_msg=name)


def test_queries_without_keys_give_zeros_and_no_gradient():
    q, k, v, query_ids, key_ids, _ = rows(10, 8, QUERY_IDS, KEY_IDS)
    attention = jax.jit(splash_attention(one_device_mesh(), interpret=True))
    lonely = jnp.isin(query_ids, jnp.array([0, 3]))
    assert lonely.sum() == 4
    assert (jnp.where(lonely[..., None, None], attention(q, k, v, query_ids, key_ids), 0) == 0).all()

    def loss(q, k, v):
        return jnp.where(lonely[..., None, None], attention(q, k, v, query_ids, key_ids), 0).sum()

    # Finite, though the largest numbers of float32 would overflow in a mean over the padding.
    v = jnp.where(key_ids[..., None, None] > 0, v, jnp.finfo(jnp.float32).max)
    for gradient in jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v):
        assert (gradient == 0).all()


def test_bfloat16_keeps_its_dtype_and_a_float32_softmax():
    q, k, v, query_ids, key_ids, _ = rows(10, 10, QUERY_IDS, QUERY_IDS)
    low = [x.astype(jnp.bfloat16) for x in (q, k, v)]
    out = jax.jit(splash_attention(one_device_mesh(), interpret=True))(*low, query_ids, key_ids)
    assert out.dtype == jnp.bfloat16
    expected = xla_attention(*(x.astype(jnp.float32) for x in low), query_ids, key_ids)
    np.testing.assert_allclose(out.astype(jnp.float32), expected, rtol=0.02, atol=0.02)


def test_blocks_divide_the_length():
    assert [_block_size(n) for n in (128, 256, 384, 512, 640, 768, 1024, 4096)] == [
        128, 256, 384, 512, 128, 384, 512, 512,
    ]  # fmt: skip


def test_a_mesh_without_tpus_is_named():
    with pytest.raises(ValueError, match="needs a mesh of TPUs, got cpu; attention auto works everywhere"):
        splash_attention(one_device_mesh())
