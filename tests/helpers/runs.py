"""Training as the command runs it: the loop on the task of the config's family."""

from sora_jax.families.registry import task_for
from sora_jax.training import loop


def train(config, workdir, open_batches, **options):
    """Runs `sora_jax.training.loop.train` on the task that the registry makes of the config."""
    return loop.train(config, workdir, open_batches, task_for(config), **options)
