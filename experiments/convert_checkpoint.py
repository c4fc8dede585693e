"""Converts weights between formats: `python experiments/convert_checkpoint.py --help`."""

from sora_jax.commands.convert_checkpoint import script

if __name__ == "__main__":
    script()
