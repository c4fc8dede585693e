import functools
import json
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from helpers.compilation import on_devices

from sora_jax.training.contrastive import classification_loss, contrastive_loss

pytestmark = pytest.mark.slow

ROWS, SEGMENTS, WIDTH = 4, 3, 5
PRESENT = np.array([[1, 1, 1], [1, 0, 0], [0, 0, 0], [1, 1, 0]], bool)


def embeddings(shape=(ROWS, SEGMENTS)):
    """Unit embeddings, with garbage where absent."""
    rng = np.random.default_rng(0)
    u, v = rng.normal(size=(2, *shape, WIDTH))
    v += u  # a pair is more alike than two strangers
    u, v = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (u, v))
    if shape == PRESENT.shape:
        u[~PRESENT], v[~PRESENT] = 1e3, -1e3
    return u.astype(np.float32), v.astype(np.float32)


def in_float64(u, v, present, scale):
    """CLIP's loss, pair by pair."""
    u, v = (x[present].astype(np.float64) for x in (u, v))
    logits = scale * u @ v.T
    by_row, by_column = (scipy.special.log_softmax(logits, axis=axis).diagonal() for axis in (1, 0))
    return -(by_row + by_column).mean() / 2


@functools.partial(jax.jit, static_argnames="chunk")
def value_and_gradients(u, v, scale, present=PRESENT, chunk=None):
    return jax.value_and_grad(contrastive_loss, argnums=(0, 1, 3))(u, v, present, scale, chunk=chunk)


def test_loss_and_gradients_are_those_of_float64():
    u, v = embeddings()
    loss, gradients = value_and_gradients(u, v, 7.0)
    assert loss == pytest.approx(in_float64(u, v, PRESENT, 7.0), rel=1e-5)
    assert 0.1 < loss
    step = 1e-5
    for place in [(0, 1, 2), (3, 0, 4), (1, 0, 0)]:
        for which in (0, 1):
            moved = [[x.astype(np.float64) for x in (u, v)] for _ in range(2)]
            moved[0][which][place] += step
            moved[1][which][place] -= step
            slope = (in_float64(*moved[0], PRESENT, 7.0) - in_float64(*moved[1], PRESENT, 7.0)) / (2 * step)
            assert gradients[which][place] == pytest.approx(slope, rel=1e-3, abs=1e-5)
    slope = (in_float64(u, v, PRESENT, 7 + step) - in_float64(u, v, PRESENT, 7 - step)) / (2 * step)
    assert gradients[2] == pytest.approx(slope, rel=1e-3)
    assert not np.asarray(gradients[0])[~PRESENT].any()
    assert not np.asarray(gradients[1])[~PRESENT].any()


@pytest.mark.parametrize("chunk", [1, 5, 12, 50])
def test_chunks_change_neither_loss_nor_gradients(chunk):
    """Five does not divide the twelve pairs."""
    whole, chunked = (value_and_gradients(*embeddings(), 7.0, chunk=c) for c in (None, chunk))
    chex.assert_trees_all_close(chunked, whole, rtol=1e-5, atol=1e-6)


def test_alike_pairs_give_the_logarithm_of_their_number():
    u = np.tile(np.eye(WIDTH, dtype=np.float32)[0], (6, 1))
    assert contrastive_loss(u, u, np.ones(6, bool), jnp.float32(9.0)) == pytest.approx(np.log(6), rel=1e-6)
    assert contrastive_loss(u, u, np.arange(6) < 2, jnp.float32(9.0)) == pytest.approx(np.log(2), rel=1e-6)


def test_no_pair_gives_zero_and_no_gradient():
    loss, gradients = value_and_gradients(*embeddings(), 7.0, present=np.zeros_like(PRESENT))
    assert loss == 0
    assert not any(np.asarray(leaf).any() for leaf in gradients)


def test_a_chunk_of_nothing_is_refused():
    with pytest.raises(ValueError, match="chunk must be at least 1 or None, got 0"):
        contrastive_loss(*embeddings(), PRESENT, jnp.float32(1.0), chunk=0)


def temporary_bytes(count, chunk):
    shape = jax.ShapeDtypeStruct((count, WIDTH), jnp.float32)
    args = shape, shape, jax.ShapeDtypeStruct((), jnp.float32), jax.ShapeDtypeStruct((count,), jnp.bool_)
    return value_and_gradients.lower(*args, chunk=chunk).compile().memory_analysis().temp_size_in_bytes


def test_memory_grows_with_the_chunk_and_not_with_the_square_of_the_batch():
    matrix = 2048 * 2048 * 4
    assert temporary_bytes(2048, None) > matrix
    few, many, long = temporary_bytes(2048, 16), temporary_bytes(2048, 128), temporary_bytes(4096, 16)
    assert few < matrix / 16
    assert many > 2 * few
    assert many < matrix / 2
    assert long < 2.2 * few  # twice the batch: twice the memory, not four times


SHARDED = """
import json, sys
import jax, numpy as np
from jax.sharding import PartitionSpec as P
from sora_jax.config import MeshConfig
from sora_jax.parallel.mesh import make_mesh
from sora_jax.training.contrastive import contrastive_loss

u, v, present = (np.asarray(x) for x in json.load(sys.stdin))
u, v = u.astype(np.float32), v.astype(np.float32)
mesh = make_mesh(MeshConfig(data=2, fsdp=2), jax.devices())
axes = ("data", "fsdp")

def local(u, v, present, scale):
    return contrastive_loss(u, v, present, scale, chunk=2, axis_name=axes)

mapped = jax.shard_map(local, mesh=mesh, in_specs=(P(axes), P(axes), P(axes), P()), out_specs=P())
grad = jax.jit(jax.value_and_grad(mapped, argnums=(0, 1, 3)))
found = grad(u, v, present, np.float32(7.0))
print(json.dumps([len(jax.devices()), *(np.asarray(x).tolist() for x in jax.tree.leaves(found))]))
"""


def test_four_devices_give_the_loss_and_gradients_of_one():
    """Each holds a row, and one of them none that is present."""
    u, v = embeddings()
    text = json.dumps([u.tolist(), v.tolist(), PRESENT.tolist()])
    command = [sys.executable, "-c", SHARDED]
    done = subprocess.run(command, env=on_devices(4), input=text, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    devices, *found = json.loads(done.stdout.splitlines()[-1])
    assert devices == 4
    for ours, want in zip(found, jax.tree.leaves(value_and_gradients(u, v, 7.0)), strict=True):
        np.testing.assert_allclose(ours, want, rtol=1e-5, atol=1e-6)


LOGITS = np.random.default_rng(1).normal(0, 2, (ROWS, SEGMENTS, 4)).astype(np.float32)
LABELS = np.random.default_rng(2).integers(0, 4, (ROWS, SEGMENTS))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_softmax_classification(smoothing):
    log_p = scipy.special.log_softmax(LOGITS.astype(np.float64), axis=-1)
    picked = np.take_along_axis(log_p, LABELS[..., None], -1)[..., 0]
    want = -((1 - smoothing) * picked + smoothing * log_p.mean(-1))[PRESENT].mean()
    ours = classification_loss(LOGITS, LABELS, PRESENT, label_smoothing=smoothing)
    assert ours == pytest.approx(want, rel=1e-5)


def test_sigmoid_classification():
    p = scipy.special.expit(LOGITS.astype(np.float64))
    right = np.where(np.arange(4) == LABELS[..., None], p, 1 - p)
    ours = classification_loss(LOGITS, LABELS, PRESENT, kind="sigmoid")
    assert ours == pytest.approx(-np.log(right).sum(-1)[PRESENT].mean(), rel=1e-5)


@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_absent_segments_count_nothing(kind):
    logits, labels = np.where(PRESENT[..., None], LOGITS, 1e4), np.where(PRESENT, LABELS, -1)
    clean, garbled = (
        jax.value_and_grad(classification_loss)(*args, PRESENT, kind=kind)
        for args in ((LOGITS, LABELS), (logits, labels))
    )
    chex.assert_trees_all_equal(clean, garbled)
    assert not np.asarray(garbled[1])[~PRESENT].any()
    assert classification_loss(LOGITS, LABELS, np.zeros_like(PRESENT), kind=kind) == 0


@pytest.mark.parametrize(
    ("options", "match"),
    [({"kind": "hinge"}, "kind must be softmax or sigmoid"), ({"label_smoothing": 1.0}, "label_smoothing must be in")],
)
def test_what_cannot_work_is_refused(options, match):
    with pytest.raises(ValueError, match=match):
        classification_loss(LOGITS, LABELS, PRESENT, **options)
