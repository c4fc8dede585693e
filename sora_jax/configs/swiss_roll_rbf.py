"""The Swiss roll with the network of Sohl-Dickstein et al. 2015 (arXiv:1503.03585, appendix D.1.1) and its T = 40.

    python experiments/train.py swiss_roll_rbf --json swiss_roll_rbf.json

Sixteen radial basis functions for all steps, a readout for each; a learned diagonal variance; learned betas but for the
first. `swiss_roll` runs it beside a larger network and says what the data is. Mean of three seeds: K = 0.51 +- 0.05.
It draws a roll with a few points astray, but cannot place a point to within the roll's noise of 0.0025.

Of what it may predict, x_0 is best: what an RBF network can say is an average of a few places.
"""

from sora_jax.config import OptimizerConfig
from sora_jax.data.toy import SwissRollConfig
from sora_jax.families.diffusion import DiffusionConfig, GaussianConfig
from sora_jax.models.mlp import RBFConfig


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
