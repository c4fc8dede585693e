"""Prepares data sets, which training reads: `python experiments/prepare_data.py --help`."""

from sora_jax.commands.prepare_data import script

if __name__ == "__main__":
    script()
