"""A small model of each family, and models on the disk as tests look at them."""

import dataclasses

from helpers.trees import random_tree
from sora_jax.config import OptimizerConfig, PatchConfig
from sora_jax.data.labelled import FixedSize, LabelledDataConfig, NativeSize
from sora_jax.data.toy import SwissRollConfig
from sora_jax.families.diffusion import DiffusionConfig, GaussianConfig
from sora_jax.families.dit import ClassConditionalConfig, ClassSampleConfig
from sora_jax.families.load import load
from sora_jax.families.recognition import ClassificationConfig, ContrastiveConfig
from sora_jax.families.registry import make_task
from sora_jax.families.sora import SoraConfig
from sora_jax.models.dit import DiTConfig
from sora_jax.models.mlp import MLPConfig
from sora_jax.models.navit import NaViTConfig
from sora_jax.models.sora import ModelConfig
from sora_jax.models.vit import ViTConfig
from sora_jax.models.vivit import ViViTConfig
from sora_jax.training.state import abstract_params

SORA = SoraConfig(
    model=ModelConfig(width=16, depth=1, num_heads=2, mlp_dim=16, text_dim=8, frequency_dim=8),
    patch=PatchConfig(size=(1, 2, 2), channels=1),
)
RUN = dict(optimizer=OptimizerConfig(warmup_steps=2), num_steps=6)
SMALL = dict(width=12, depth=1, num_heads=2, mlp_dim=16, num_classes=3)
PICTURES = LabelledDataConfig(
    path="/here/data", sampling=FixedSize((4, 6)), row_length=6, max_segments=1, batch_size=4, num_shards=1
)
PATCH = PatchConfig(size=(1, 2, 2), channels=1)
NAVIT = dict(max_grid=(1, 6, 6), num_fractions=5)
CAPTIONED = dict(sampling=NativeSize((4.0, 8.0)), text_length=8, max_caption_tokens=2, label="none")
RUNS = {
    "dit": ClassConditionalConfig(
        data=PICTURES, patch=PATCH, sample=ClassSampleConfig(labels=(0,), size=(4, 4), num_steps=4, vae="/here/vae"),
        model=DiTConfig(image_size=(4, 6), in_channels=1, frequency_dim=8, **SMALL), **RUN,
    ),
    "vit": ClassificationConfig(
        data=PICTURES, patch=PATCH, model=ViTConfig(image_size=(4, 6), patch_size=2, channels=1, **SMALL), **RUN
    ),
    "vivit": ClassificationConfig(
        data=dataclasses.replace(PICTURES, num_frames=4, row_length=12), patch=PatchConfig((2, 2, 2), channels=1),
        model=ViViTConfig(num_frames=4, image_size=(4, 6), tubelet_size=(2, 2, 2), channels=1, **SMALL), **RUN,
    ),
    "pairs": ContrastiveConfig(
        data=dataclasses.replace(PICTURES, **CAPTIONED), patch=PATCH,
        model=NaViTConfig(**SMALL | NAVIT | {"num_classes": 1}), embedding_dim=6, text_dim=5, **RUN,
    ),
    "study": DiffusionConfig(
        data=SwissRollConfig(batch_size=8), model=MLPConfig(out_channels=4, width=16, depth=1, num_steps=20),
        process=GaussianConfig(num_levels=20, schedule="cosine", variance="learned", loss="bound"),
        sample_every=0, **RUN,
    ),
}  # fmt: skip


def random_params(config):
    return random_tree(abstract_params(make_task(config)), 0, 1)


def read_model(path, **options):
    """Returns the config and the parameters of whatever is at a path."""
    loaded = load(path, **options)
    return loaded.config, loaded.params
