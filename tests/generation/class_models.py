"""DiTs and an autoencoder small enough for tests, of random parameters, as files."""

import functools

from helpers.trees import random_tree

from sora_jax.config import PatchConfig
from sora_jax.config_json import to_json
from sora_jax.data.labelled import FixedSize, LabelledDataConfig
from sora_jax.families.diffusion import GaussianConfig
from sora_jax.families.dit import ClassConditionalConfig, ClassSampleConfig
from sora_jax.families.load import export_model
from sora_jax.models import dit
from sora_jax.models.autoencoder import image_vae
from sora_jax.models.autoencoder.image_vae import ImageVAE, ImageVAEConfig
from sora_jax.models.dit import DiT, DiTConfig
from sora_jax.models.weights import tensor_bytes
from sora_jax.provenance import flat_names

LATENTS = DiTConfig(
    image_size=(4, 6), width=16, depth=1, num_heads=2, mlp_dim=16, num_classes=5, frequency_dim=16, attention="xla"
)
VAE = ImageVAEConfig(widths=(4, 8), num_blocks=1, num_groups=2, scaling_factor=0.5)
PIXELS = ClassConditionalConfig(
    data=LabelledDataConfig(
        sampling=FixedSize((4, 4)), row_length=4, max_segments=1, num_bins=1, batch_size=4, num_shards=1
    ),
    patch=PatchConfig((1, 2, 2)),
    model=DiTConfig(
        image_size=(4, 4), patch_size=2, in_channels=3, width=12, depth=1, num_heads=2, mlp_dim=16, num_classes=3,
        frequency_dim=8, attention="xla",
    ),
    process=GaussianConfig(
        num_levels=20, schedule="cosine", prediction="v", variance="learned", loss="hybrid", discrete=True
    ),
    sample=ClassSampleConfig(labels=(0, 2), columns=2, size=(4, 4), num_steps=4),
)  # fmt: skip


random_like = functools.partial(random_tree, mean=0.05)


def _write(path, config, params):
    path.mkdir()
    (path / "config.json").write_text(to_json(config))
    (path / "model.safetensors").write_bytes(tensor_bytes(flat_names(params)))
    return path


def write_latent_model(path):
    """Writes what `convert_checkpoint.py dit` does."""
    return _write(path, LATENTS, random_like(dit.abstract_params(DiT(LATENTS))))


def write_autoencoder(path):
    """Writes what `convert_checkpoint.py sd-vae` does."""
    return _write(path, VAE, random_like(image_vae.abstract_params(ImageVAE(VAE))))


def write_pixel_model(path):
    """Writes what `convert_checkpoint.py export` makes of a run on pixels."""
    export_model(path, PIXELS, random_like(dit.abstract_params(DiT(PIXELS.model))))
    return path
