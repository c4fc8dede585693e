"""ViT on stills of digits and emoji, all stretched to 32x32 pixels: what `navit_stills` is measured against."""

from sora_jax.config import OptimizerConfig, PatchConfig
from sora_jax.data.recognition import FixedSize, RecognitionDataConfig
from sora_jax.families.recognition import ClassificationConfig
from sora_jax.models.vit import ViTConfig


def config() -> ClassificationConfig:
    """Returns the experiment."""
    return ClassificationConfig(
        data=RecognitionDataConfig(
            sampling=FixedSize((32, 32)),
            row_length=64,
            max_segments=1,
            num_bins=1,
            batch_size=64,
            num_shards=1,
        ),
        patch=PatchConfig(size=(1, 4, 4)),
        model=ViTConfig(image_size=(32, 32), patch_size=4, width=64, depth=4, num_heads=2, mlp_dim=256, num_classes=19),
        optimizer=OptimizerConfig(
            learning_rate=1e-3, warmup_steps=100, weight_decay=0.05, ema_decay=0.99, final_share=0.01
        ),
        test_sides=(12, 16, 20, 24, 32, 40, 48, 64),
        num_steps=2000,
        log_every=20,
        eval_every=200,
        eval_batches=64,
        save_every=500,
    )
