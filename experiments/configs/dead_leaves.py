"""Dead leaves."""

from sora_jax.config import DeadLeavesConfig, OptimizerConfig
from sora_jax.models.multiscale import MultiscaleConfig
from sora_jax.training.tasks.diffusion import DiffusionConfig, GaussianConfig


def config() -> DiffusionConfig:
    """Returns the experiment."""
    return DiffusionConfig(
        data=DeadLeavesConfig(batch_size=32, size=16, radii=(2.0, 16.0), pixel_noise=0.05, num_images=100_000),
        model=MultiscaleConfig(1, 2, width=32, num_layers=6, num_steps=500),
        process=GaussianConfig(
            num_levels=500, schedule="log_snr", log_snr_range=(-8.0, 9.0), variance="learned", loss="hybrid"
        ),
        optimizer=OptimizerConfig(
            learning_rate=3e-3, warmup_steps=100, weight_decay=0.0, ema_decay=0.999, final_share=0.02
        ),
        num_steps=5000,
        log_every=250,
        eval_every=2000,
        save_every=2000,
        num_seeds=3,
        num_held_out=256,
        num_samples=32,
    )
