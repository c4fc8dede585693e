"""Compiles a training step for TPUs that are not here: `python experiments/plan_tpu.py --help`."""

from sora_jax.commands.plan_tpu import script

if __name__ == "__main__":
    script()
