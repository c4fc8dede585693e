"""Trains a model, or continues a run: `python experiments/train.py --help`; the recipe is `sora_jax.training.loop`."""

from sora_jax.commands.train import script

if __name__ == "__main__":
    script()
