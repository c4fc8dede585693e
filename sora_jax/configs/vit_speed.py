"""A ViT that sees one frame, on playback speed: see `vivit_speed_model1`."""

from sora_jax.config import OptimizerConfig, PatchConfig
from sora_jax.data.recognition import FixedSize, RecognitionDataConfig
from sora_jax.families.recognition import ClassificationConfig
from sora_jax.models.vit import ViTConfig


def config() -> ClassificationConfig:
    """Returns the experiment."""
    return ClassificationConfig(
        data=RecognitionDataConfig(
            sampling=FixedSize((32, 32)),
            num_frames=1,
            fps=24.0,
            speeds=(1.0, 6.0),
            min_seconds=1.75,  # as long as the clips of the ViViTs
            label="speed",
            row_length=16,
            max_segments=1,
            num_bins=1,
            batch_size=64,
            num_shards=1,
        ),
        patch=PatchConfig(size=(1, 8, 8)),
        model=ViTConfig(image_size=(32, 32), patch_size=8, width=64, depth=2, num_heads=4, mlp_dim=256, num_classes=2),
        optimizer=OptimizerConfig(learning_rate=1.5e-4, warmup_steps=100, weight_decay=0.05, ema_decay=0.99),
        num_steps=600,
        log_every=20,
        eval_every=200,
        eval_batches=8,
        save_every=200,
    )
