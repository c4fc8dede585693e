"""The Swiss roll of Sohl-Dickstein et al. 2015 (arXiv:1503.03585, section 3.1.1), its network beside a larger one.

    python experiments/train.py swiss_roll --json swiss_roll.json

The paper does not say how much noise its roll has, and less of it allows a higher K. Here each coordinate has unit
variance and the noise a standard deviation of 0.0025: the exact log-likelihood is 2.942 bits a point, of the 4000 held
out. Mean of three seeds: K = 2.801 +- 0.028, 0.141 +- 0.023 below it and 6.892 above N(0, I).
The paper has K = 2.35, 6.45 above that of N(0, I), with T = 40 and the network of `swiss_roll_rbf`, run beside it.
Eight minutes for all six runs on two busy CPU cores.

T is 1000, evenly spaced in log SNR, where the squared error of the noise is the bound but for a constant. The reverse
variance is beta: along the roll, where data has width, that is the true one.
"""

from sora_jax.config import OptimizerConfig
from sora_jax.data.toy import SwissRollConfig
from sora_jax.families.diffusion import DiffusionConfig, GaussianConfig
from sora_jax.models.mlp import MLPConfig


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
