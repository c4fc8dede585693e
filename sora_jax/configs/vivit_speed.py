"""How fast an animated emoji is played: ViViT's Model 1 beside the other three and a ViT that sees one frame.

    python experiments/prepare_data.py fluent-emoji --output data --max-side 40 --no-stills
    python experiments/train.py vivit_speed_model1 --data.path data/fluent_emoji/1.0.0 --json vivit_speed.json

Eight frames of 32x32 pixels, 1/24 of a second apart or, with the clip played six times as fast, 1/4: the class is
which. The emoji that are scored (the split `unseen`) were never trained on. About half an hour on two cores, most of it
spent on decoding JPEGs: Model 1 names the speed of 0.843 of the held-out clips, the ViT does no better than chance.
"""

from sora_jax.config import OptimizerConfig, PatchConfig
from sora_jax.data.recognition import FixedSize, RecognitionDataConfig
from sora_jax.families.recognition import ClassificationConfig
from sora_jax.models.vivit import ViViTConfig

NAMES = ("vivit_speed_model1", "vivit_speed_model2", "vivit_speed_model3", "vivit_speed_model4")


def config(name: str) -> ClassificationConfig:
    """Returns the experiment of a model; that of the first reports on all of them."""
    first = name == NAMES[0]
    return ClassificationConfig(
        data=RecognitionDataConfig(
            sampling=FixedSize((32, 32)),
            num_frames=8,
            fps=24.0,
            speeds=(1.0, 6.0),
            label="speed",
            row_length=32,
            max_segments=1,
            num_bins=1,
            batch_size=64,
            num_shards=1,
        ),
        patch=PatchConfig(size=(4, 8, 8)),
        model=ViViTConfig(
            model=NAMES.index(name) + 1,
            num_frames=8,
            image_size=(32, 32),
            tubelet_size=(4, 8, 8),
            width=64,
            depth=2,
            temporal_depth=1,
            num_heads=4,
            mlp_dim=256,
            num_classes=2,
        ),
        optimizer=OptimizerConfig(learning_rate=1.5e-4, warmup_steps=100, weight_decay=0.05, ema_decay=0.99),
        num_steps=600,
        log_every=20,
        eval_every=200,
        eval_batches=8,
        save_every=200,
        num_seeds=2 if first else 1,
        beside=(*NAMES[1:], "vit_speed") if first else (),
    )
