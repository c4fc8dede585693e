"""Recognition runs small enough for tests: ViT, ViViT and NaViT on rows drawn from a seed."""

import dataclasses

import numpy as np

from sora_jax.config import OptimizerConfig, PatchConfig
from sora_jax.data.recognition import FixedSize, NativeSize, RecognitionDataConfig
from sora_jax.families.recognition import ClassificationConfig, ContrastiveConfig
from sora_jax.models.navit import NaViTConfig
from sora_jax.models.vit import ViTConfig
from sora_jax.models.vivit import ViViTConfig
from sora_jax.patches.rows import Segment, fill_row, stack_rows
from sora_jax.patches.token_drop import ConstantDrop

OPTIMIZER = OptimizerConfig(learning_rate=1e-2, warmup_steps=2)
RUN = dict(optimizer=OPTIMIZER, num_steps=6, log_every=2, eval_every=3, eval_batches=2, save_every=100)
NATIVE = RecognitionDataConfig(
    sampling=NativeSize((4.0, 8.0), token_drop=ConstantDrop(0.3)), row_length=24, max_segments=4, batch_size=4,
    num_shards=1,
)  # fmt: skip
MODEL = NaViTConfig(
    width=12, depth=1, num_heads=2, mlp_dim=16, num_classes=3, max_grid=(1, 6, 6), num_fractions=5, attention="xla"
)
PATCH = PatchConfig(size=(1, 2, 2), channels=1)
NAVIT = ClassificationConfig(data=NATIVE, patch=PATCH, model=MODEL, **RUN)
VIT = ClassificationConfig(
    data=dataclasses.replace(NATIVE, sampling=FixedSize((4, 6)), row_length=6, max_segments=1),
    patch=PATCH,
    model=ViTConfig(
        image_size=(4, 6), patch_size=2, channels=1, width=12, depth=1, num_heads=2, mlp_dim=16, num_classes=3
    ),
    **RUN,
)
VIVIT = dataclasses.replace(
    VIT,
    data=dataclasses.replace(VIT.data, num_frames=4, row_length=12, label="speed", speeds=(1.0, 2.0, -1.0)),
    patch=PatchConfig(size=(2, 2, 2), channels=1),
    model=ViViTConfig(
        num_frames=4, image_size=(4, 6), tubelet_size=(2, 2, 2), channels=1, width=12, depth=1, num_heads=2,
        mlp_dim=16, num_classes=3,
    ),
)  # fmt: skip
PAIRS = ContrastiveConfig(
    data=dataclasses.replace(NATIVE, text_length=8, max_caption_tokens=2, label="none"),
    patch=PATCH, model=dataclasses.replace(MODEL, num_classes=1), embedding_dim=6, text_dim=5, chunk=3, **RUN,
)  # fmt: skip


def random_segment(rng, config, number):
    """An image of random patches, some of them dropped, or a whole clip of the model's size."""
    data, text_dim = config.data, getattr(config, "text_dim", 0)
    if isinstance(data.sampling, FixedSize):
        size = (data.num_frames, *data.sampling.size)
        grid = [n // p for n, p in zip(size, config.patch.size, strict=True)]
    else:
        grid = [1, *rng.integers(1, 4, 2)]
    positions = np.stack(np.meshgrid(*map(np.arange, grid), indexing="ij"), -1).reshape(-1, 3).astype(np.float32)
    extent = positions.max(axis=0) + 1
    if isinstance(data.sampling, NativeSize):
        positions = positions[np.sort(rng.permutation(len(positions))[: max(len(positions) * 2 // 3, 1)])]
    text = rng.standard_normal((2 if data.text_length else 0, text_dim)).astype(np.float32)
    patches = rng.standard_normal((len(positions), config.patch.dim)).astype(np.float32)
    return Segment(patches, positions, text, np.zeros(len(patches), bool), number, number % 3, extent)


def random_rows(seed, config):
    """The segments of each row of a batch."""
    rng, most = np.random.default_rng(seed), config.data.max_segments
    return [
        [random_segment(rng, config, int(rng.integers(100))) for _ in range(1 if most == 1 else rng.integers(1, 4))]
        for _ in range(config.data.batch_size)
    ]


def fill(rows, config):
    data = config.data
    budgets = dict(row_length=data.row_length, text_length=data.text_length, max_segments=data.max_segments)
    budgets |= dict(patch_dim=config.patch.dim, text_dim=getattr(config, "text_dim", 0))
    return stack_rows([fill_row(row, **budgets) for row in rows])


def random_batch(seed, config):
    return fill(random_rows(seed, config), config)


class RandomRows:
    """Batches that depend on their number alone; the number is the state."""

    def __init__(self, config, length=None, stop_at=None):
        self.config, self.length, self.stop_at, self.index = config, length, stop_at, 0

    def __iter__(self):
        return self

    def __next__(self):
        if self.index == self.length:
            raise StopIteration
        if self.index == self.stop_at:
            raise KeyboardInterrupt
        self.index += 1
        return random_batch(self.index, self.config)

    def get_state(self):
        return {"index": self.index}

    def set_state(self, state):
        self.index = state["index"]

    def summary(self):
        return f"{self.index} batches"

    def close(self):
        pass
