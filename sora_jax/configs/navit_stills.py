"""NaViT on stills of digits and emoji at their native aspect, beside the fixed-size ViT.

    python experiments/prepare_data.py stills --output data
    python experiments/train.py navit_stills --data.path data/stills/1.0.0 --json navit_stills.json

About an hour on two cores: 0.745 of the held-out images with 45% of the compute of the ViT, which has 0.715.
"""

from sora_jax.config import OptimizerConfig, PatchConfig
from sora_jax.data.recognition import NativeSize, RecognitionDataConfig
from sora_jax.families.recognition import ClassificationConfig
from sora_jax.models.navit import NaViTConfig
from sora_jax.patches.token_drop import ResolutionDrop


def config() -> ClassificationConfig:
    """Returns the experiment."""
    return ClassificationConfig(
        data=RecognitionDataConfig(
            sampling=NativeSize(
                sides=(16.0, 32.0),
                mean=0.0,
                enlarge=True,
                token_drop=ResolutionDrop(num_tokens=(16, 64), rates=(0.0, 0.4)),
            ),
            row_length=128,
            max_segments=16,
            batch_size=12,
            num_shards=1,
        ),
        patch=PatchConfig(size=(1, 4, 4)),
        model=NaViTConfig(
            width=64, depth=4, num_heads=2, mlp_dim=256, num_classes=19, max_grid=(1, 40, 40), num_fractions=16
        ),
        optimizer=OptimizerConfig(
            learning_rate=1e-3, warmup_steps=100, weight_decay=0.05, ema_decay=0.99, final_share=0.01
        ),
        num_seeds=3,
        learning_rates=(1e-3, 2e-3, 4e-3, 8e-3),
        beside=("vit_stills",),
        test_sides=(12, 16, 20, 24, 32, 40, 48, 64),
        num_steps=2000,
        log_every=20,
        eval_every=200,
        eval_batches=64,
        save_every=500,
    )
