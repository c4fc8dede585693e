"""Sora-XL (width 1152, depth 28) on latents of 16 channels in patches of 1x2x2, for eight chips.

    python experiments/plan_tpu.py sora_xl --topology v5e:2x4

Nothing here prepares such latents or decodes them to pixels: the step can be planned and compiled, and train.py refuses
to run it on pixels.

Hardware: TPU v5e-8. Parameters, optimizer and batch are all split over the eight chips (`mesh.fsdp`).
"""

import dataclasses

from sora_jax.config import MeshConfig, OptimizerConfig, PatchConfig
from sora_jax.data.captioned import DataConfig
from sora_jax.families.sora import SoraConfig
from sora_jax.models.sora import SORA_SIZES


def config() -> SoraConfig:
    """Returns the experiment."""
    return SoraConfig(
        model=dataclasses.replace(SORA_SIZES["sora_xl"], dtype="bfloat16", remat="full", attention="splash"),
        patch=PatchConfig(size=(1, 2, 2), channels=16),
        data=DataConfig(row_length=4096, text_length=512, max_segments=32, batch_size=16, num_shards=8),
        optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=1000, ema_decay=0.9999),
        mesh=MeshConfig(data=1, fsdp=8),
        num_steps=400_000,
        sample_every=0,
    )
