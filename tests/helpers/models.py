"""Models on the disk, as tests look at them."""

from sora_jax.families.load import load


def read_model(path, **options):
    """Returns the config and the parameters of whatever is at a path."""
    loaded = load(path, **options)
    return loaded.config, loaded.params
