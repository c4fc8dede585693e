"""A run small enough for tests: the nano model on rows drawn from a seed."""

import dataclasses

import chex
import jax
import numpy as np

from sora_jax.config import OptimizerConfig, PatchConfig
from sora_jax.data.captioned import DataConfig
from sora_jax.families.registry import make_task
from sora_jax.families.sora import SoraConfig
from sora_jax.models.sora import ModelConfig
from sora_jax.patches.levels import one_level
from sora_jax.patches.rows import Segment, fill_row, stack_rows
from sora_jax.training import state as states
from sora_jax.training.checkpoint import Checkpointer
from sora_jax.training.optimizer import make_optimizer

CONFIG = SoraConfig(
    model=ModelConfig(width=16, depth=2, num_heads=2, mlp_dim=32, text_dim=8, frequency_dim=8, attention="xla"),
    patch=PatchConfig(size=(1, 2, 2), channels=1),
    data=DataConfig(
        row_length=12, text_length=8, max_segments=3, max_caption_tokens=2, batch_size=8, num_shards=2,
        eval_splits=("unseen",),
    ),
    optimizer=OptimizerConfig(learning_rate=1e-2, warmup_steps=2),
    num_steps=6, log_every=2, eval_every=0, eval_batches=2, save_every=100, sample_every=0,
)  # fmt: skip


def config(**changes):
    """Returns CONFIG with changed fields; `data`, `optimizer` ... take dicts."""
    for name, value in changes.items():
        if isinstance(value, dict):
            changes[name] = dataclasses.replace(getattr(CONFIG, name), **value)
    return dataclasses.replace(CONFIG, **changes)


def random_batch(seed, experiment=CONFIG):
    """Returns rows of one to three clips of random lengths, as the pipeline packs them."""
    rng, data = np.random.default_rng(seed), experiment.data
    rows = []
    for _ in range(data.batch_size):
        segments = [
            Segment(
                patches=rng.standard_normal((n, experiment.patch.dim)).astype(np.float32),
                positions=rng.integers(0, 4, (n, 3)).astype(np.float32),
                text=rng.standard_normal((2, experiment.model.text_dim)).astype(np.float32),
                levels=one_level(int(n)),
                clip_id=int(rng.integers(100)),
            )
            for n in rng.integers(1, 5, rng.integers(1, 4))
        ]
        rows.append(
            fill_row(
                segments, row_length=data.row_length, text_length=data.text_length, max_segments=data.max_segments,
                patch_dim=experiment.patch.dim, text_dim=experiment.model.text_dim,
            )
        )  # fmt: skip
    return stack_rows(rows)


class RandomBatches:
    """Batches that depend on their number alone; the number is the state."""

    def __init__(self, experiment, seed=0, length=None):
        self.experiment, self.seed, self.length, self.index = experiment, seed, length, 0

    def __iter__(self):
        return self

    def __next__(self):
        if self.index == self.length:
            raise StopIteration
        self.index += 1
        return random_batch((self.seed, self.index), self.experiment)

    def get_state(self):
        return {"index": self.index}

    def set_state(self, state):
        self.index = state["index"]

    def summary(self):
        return f"{self.index} batches"

    def close(self):
        pass


def opener(experiment, length=None):
    """Returns the `open_batches` of `sora_jax.training.loop.train`."""
    return lambda split, training: RandomBatches(experiment, len(split), None if training else 4)


def whole_state(workdir, experiment):
    """Returns all that the newest checkpoint of a run holds."""
    tx = make_optimizer(experiment.optimizer, experiment.num_steps)
    shapes = jax.eval_shape(lambda: states.fresh_state(states.unboxed_params(make_task(experiment)), tx))
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shapes = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=device), shapes)
    checkpointer = Checkpointer(workdir, keep=1)
    state, data = checkpointer.restore(shapes)
    checkpointer.close()
    return state, data


def assert_same_runs(a, b, experiment):
    """Compares the newest checkpoints of two runs bitwise: parameters, EMA, optimizer, step and place in the data."""
    (state_a, data_a), (state_b, data_b) = whole_state(a, experiment), whole_state(b, experiment)
    chex.assert_trees_all_equal(state_a, state_b)
    assert data_a == data_b
