"""Sora-S (width 384, depth 12) in pixels, for the eight chips of one TPU host and a folder of short captioned clips.

    python experiments/prepare_data.py folder --source ~/clips --output data
    python experiments/train.py sora_s --data.path data/clip_folder --workdir runs/sora_s
    python experiments/plan_tpu.py sora_s --topology v5e:2x4

Hardware: TPU v5e-8 or any other eight chips; the batch is split over them and parameters are copied. Not run yet.
"""

import dataclasses

from sora_jax.config import FlowConfig, MeshConfig, OptimizerConfig, PatchConfig
from sora_jax.data.captioned import DataConfig
from sora_jax.families.sora import SoraConfig
from sora_jax.models.sora import SORA_SIZES


def config() -> SoraConfig:
    """Returns the experiment."""
    return SoraConfig(
        model=dataclasses.replace(SORA_SIZES["sora_s"], dtype="bfloat16", remat="dots"),
        patch=PatchConfig(size=(2, 8, 8)),
        data=DataConfig(
            num_frames=(1, 32),
            long_side=(32, 128),
            row_length=2048,
            text_length=512,
            batch_size=32,
            num_shards=8,
            num_workers=8,
        ),
        flow=FlowConfig(prediction="x0", time_mean=0.8),
        optimizer=OptimizerConfig(learning_rate=3e-4, warmup_steps=1000, ema_decay=0.999),
        mesh=MeshConfig(data=8),
        num_steps=50_000,
        log_every=50,
        sample_every=1000,
    )
