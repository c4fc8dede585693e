"""Dead leaves."""

from sora_jax.config import DeadLeavesConfig, OptimizerConfig
from sora_jax.models.multiscale import MultiscaleConfig
from sora_jax.training.tasks.diffusion import DiffusionConfig, GaussianConfig


def config() -> DiffusionConfig:
    """Returns the experiment."""
    return DiffusionConfig(
        data=DeadLeavesConfig(batch_size=32),
        model=MultiscaleConfig(1, 1, width=24, num_steps=500),
        process=GaussianConfig(
            num_levels=500, schedule="log_snr", log_snr_range=(-8.0, 8.0), variance="large", loss="simple"
        ),
        optimizer=OptimizerConfig(
            learning_rate=2e-3, warmup_steps=200, weight_decay=0.0, ema_decay=0.999, final_share=0.0
        ),
        num_steps=2000,
        log_every=200,
        eval_every=1000,
        save_every=1000,
        sample_every=0,
        num_held_out=512,
        num_samples=32,
    )
