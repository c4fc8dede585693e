"""The smallest Sora, for trying things out: 0.2 M parameters on stills and short clips of up to 48 pixels.

    python experiments/train.py sora_nano --workdir runs/nano --data.path DATA

A CPU is enough.
"""

from sora_jax.config import OptimizerConfig, PatchConfig
from sora_jax.data.captioned import DataConfig
from sora_jax.families.sora import SoraConfig
from sora_jax.models.sora import SORA_SIZES


def config() -> SoraConfig:
    """Returns the experiment."""
    return SoraConfig(
        model=SORA_SIZES["sora_nano"],
        patch=PatchConfig(size=(2, 8, 8)),
        data=DataConfig(num_frames=(1, 8), long_side=(32, 48), row_length=256, text_length=96, max_segments=8),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=100),
        num_steps=2_000,
        eval_every=500,
        save_every=500,
        sample_every=0,
    )
