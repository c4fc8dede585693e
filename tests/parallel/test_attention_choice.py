import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from sora_jax.models.attention import xla_attention
from sora_jax.models.blockwise_attention import blockwise_attention
from sora_jax.parallel import attention
from sora_jax.parallel.attention import DENSE_KEYS, attention_for, kernel_of

SHORT, LONG = DENSE_KEYS, DENSE_KEYS + 1


@pytest.mark.parametrize(
    ("platform", "num_keys", "packed", "biased", "kernel"),
    [
        ("cpu", SHORT, True, False, "blockwise"),  # which leaves out other segments
        ("cpu", SHORT, False, False, "xla"),
        ("cpu", LONG, False, False, "blockwise"),
        ("gpu", SHORT, True, False, "xla"),
        ("gpu", LONG, True, False, "blockwise"),
        ("gpu", LONG, False, False, "blockwise"),
        ("tpu", SHORT, True, False, "xla"),
        ("tpu", LONG, True, False, "splash"),
        ("tpu", LONG, False, False, "splash"),
        ("tpu", LONG, True, True, "xla"),  # which splash does not take, and which is as large as the matrix
        ("cpu", SHORT, True, True, "xla"),
    ],
)
def test_what_auto_is(platform, num_keys, packed, biased, kernel):
    assert kernel_of("auto", platform, num_keys, packed, biased) == kernel
    for name in ("xla", "blockwise", "splash"):
        assert kernel_of(name, platform, num_keys, packed, biased) == name


def mesh_of_one():
    devices = np.array(jax.devices()[:1]).reshape(1, 1)
    return Mesh(devices, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def test_the_platform_is_what_is_compiled_for(monkeypatch):
    assert attention_for("xla") is attention_for("xla", mesh_of_one(), "tpu") is xla_attention
    assert attention_for("blockwise") is blockwise_attention
    assert attention_for("blockwise", platform="gpu").keywords == {"side_by_side": attention.GPU_BLOCKS}
    assert attention_for("auto") is attention_for("auto", platform="cpu") is attention_for("auto", platform="cpu")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert attention_for("auto") is attention_for("auto", platform="gpu")
    assert attention_for("auto", mesh_of_one()) is attention_for("auto", mesh_of_one(), "cpu")


def test_what_there_is_not_is_named():
    with pytest.raises(ValueError, match="attention must be one of auto, xla, blockwise, splash, got 'flash'"):
        attention_for("flash")
    for where in (dict(), dict(mesh=mesh_of_one()), dict(platform="gpu")):
        with pytest.raises(ValueError, match=r"attention splash needs TPUs, got [cg]pu; attention auto works every"):
            attention_for("splash", **where)


@pytest.mark.parametrize(("platform", "packed"), [("cpu", False), ("cpu", True), ("gpu", True)])
def test_no_matrix_of_long_rows(platform, packed):
    """Neither forward nor backward is there an array as large as the matrix of scores."""
    length = 2 * DENSE_KEYS
    q = jax.ShapeDtypeStruct((1, length, 2, 8), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
    kernel = attention_for("auto", platform=platform, packed=packed)
    largest = {
        name: largest_array(jax.make_jaxpr(jax.grad(lambda q, ids, f=f: f(q, q, q, ids, ids).sum()))(q, ids).jaxpr)
        for name, f in (("auto", kernel), ("xla", xla_attention))
    }
    assert largest["xla"] == 2 * length**2
    assert largest["auto"] <= length * max(8, 64) * 2


def largest_array(jaxpr):
    """Returns the size of the largest array in a jaxpr and those inside it."""
    sizes = [math.prod(v.aval.shape) for eqn in jaxpr.eqns for v in eqn.outvars]
    inner = [j for eqn in jaxpr.eqns for p in eqn.params.values() for j in jax.tree.leaves(p, is_leaf=is_jaxpr)]
    return max(sizes + [largest_array(getattr(j, "jaxpr", j)) for j in inner if is_jaxpr(j)], default=0)


def is_jaxpr(value):
    return hasattr(value, "eqns") or hasattr(value, "jaxpr")


def test_short_rows_of_one_segment_are_those_of_the_reference():
    kernel = attention_for("auto", platform="cpu", packed=False)
    shapes = [jax.ShapeDtypeStruct((1, 8, 1, 4), jnp.float32)] * 3 + [jax.ShapeDtypeStruct((1, 8), jnp.int32)] * 2
    options = dict(causal=True, scale=0.5, with_logsumexp=True)
    texts = [str(jax.make_jaxpr(functools.partial(f, **options))(*shapes)) for f in (kernel, xla_attention)]
    assert texts[0] == texts[1]
