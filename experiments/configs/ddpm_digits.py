"""DDPM on digits."""

from sora_jax.config import OptimizerConfig, StillsConfig
from sora_jax.models.unet import UNetConfig
from sora_jax.training.tasks.diffusion import DiffusionConfig, GaussianConfig


def config() -> DiffusionConfig:
    """Returns the experiment."""
    return DiffusionConfig(
        data=StillsConfig(batch_size=32, size=32, channels=1),
        model=UNetConfig(
            1, 2, width=16, multipliers=(1, 2, 2), num_blocks=1, attention_levels=(2,), num_groups=8, dropout=0.0
        ),
        process=GaussianConfig(
            num_levels=1000, schedule="cosine", prediction="v", variance="learned", loss="hybrid", discrete=True
        ),
        optimizer=OptimizerConfig(
            learning_rate=2e-3, warmup_steps=100, weight_decay=0.0, ema_decay=0.998, final_share=0.02
        ),
        num_steps=4000,
        log_every=100,
        eval_every=1000,
        eval_batches=8,
        save_every=500,
        sample_every=1000,
        num_held_out=64,
        num_samples=32,
    )
