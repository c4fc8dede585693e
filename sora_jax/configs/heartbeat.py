"""The binary heartbeat of Sohl-Dickstein et al. 2015 (arXiv:1503.03585, section 3.1.2), by binomial diffusion.

    python experiments/train.py heartbeat --json heartbeat.json

Twenty bits, a one in every fifth bin, at one of five phases. The paper's K is -2.414 bits a sequence at T = 2000, the
limit log2(1/5) = -2.322. Here, mean of three seeds, all five sequences counted alike: -2.336 +- 0.001.
Two and a half minutes for all three on two busy CPU cores.

The network gives the logits of x_0 instead of the paper's of x_{t-1}.
"""

from sora_jax.config import OptimizerConfig
from sora_jax.data.toy import HeartbeatConfig
from sora_jax.families.diffusion import BinomialConfig, DiffusionConfig
from sora_jax.models.mlp import MLPConfig


def config() -> DiffusionConfig:
    """Returns the experiment."""
    return DiffusionConfig(
        data=HeartbeatConfig(batch_size=512),
        model=MLPConfig(20, 20, width=64, depth=3, num_steps=2000, time_dim=32),
        process=BinomialConfig(num_levels=2000),
        optimizer=OptimizerConfig(
            learning_rate=2e-3, warmup_steps=200, weight_decay=0.0, ema_decay=0.999, final_share=0.0
        ),
        num_steps=4000,
        log_every=500,
        eval_every=2000,
        save_every=2000,
        num_seeds=3,
        num_held_out=10_000,
        num_samples=40,
    )
