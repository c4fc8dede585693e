"""The Swiss roll of Sohl-Dickstein et al. 2015."""

from sora_jax.config import OptimizerConfig, SwissRollConfig
from sora_jax.models.mlp import MLPConfig
from sora_jax.training.tasks.diffusion import DiffusionConfig, GaussianConfig


def config() -> DiffusionConfig:
    """Returns the experiment."""
    return DiffusionConfig(
        data=SwissRollConfig(batch_size=512, noise=0.0025),
        model=MLPConfig(2, 2, width=128, depth=3, num_steps=1000, num_frequencies=128),
        process=GaussianConfig(
            num_levels=1000, schedule="log_snr", log_snr_range=(-8.0, 14.0), variance="large", loss="simple"
        ),
        optimizer=OptimizerConfig(
            learning_rate=2e-3, warmup_steps=200, weight_decay=0.0, ema_decay=0.999, final_share=0.0
        ),
        num_steps=6000,
        log_every=500,
        eval_every=2000,
        save_every=2000,
        num_seeds=3,
        num_held_out=4000,
        beside=("swiss_roll_rbf",),
        num_samples=1000,
    )
