"""Makes clips from text, or images of classes: `python experiments/generate.py --help`."""

from sora_jax.commands.generate import script

if __name__ == "__main__":
    script()
