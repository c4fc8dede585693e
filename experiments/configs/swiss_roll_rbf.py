"""Swiss roll, RBF."""

from sora_jax.config import OptimizerConfig, SwissRollConfig
from sora_jax.models.mlp import RBFConfig
from sora_jax.training.tasks.diffusion import DiffusionConfig, GaussianConfig


def config() -> DiffusionConfig:
    """Returns the experiment."""
    return DiffusionConfig(
        data=SwissRollConfig(batch_size=1024, noise=0.0025),
        model=RBFConfig(2, 4, num_units=16, num_steps=40),
        process=GaussianConfig(
            num_levels=40,
            schedule="log_snr",
            log_snr_range=(-6.0, 10.0),
            learn_betas=True,
            prediction="x0",
            variance="learned",
            loss="bound",
        ),
        optimizer=OptimizerConfig(
            learning_rate=3e-2, warmup_steps=200, weight_decay=0.0, ema_decay=0.999, final_share=0.0
        ),
        num_steps=40_000,
        log_every=4000,
        eval_every=20_000,
        save_every=20_000,
        num_seeds=3,
        num_held_out=4000,
        num_samples=1000,
    )
