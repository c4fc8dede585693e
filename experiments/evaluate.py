"""Scores models and samples: `python experiments/evaluate.py --help`."""

from sora_jax.commands.evaluate import script

if __name__ == "__main__":
    script()
