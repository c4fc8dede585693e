"""A model with random parameters and a text encoder without weights."""

import jax
import numpy as np
from flax.core import meta

from sora_jax.config import PatchConfig
from sora_jax.data.captioned import DataConfig
from sora_jax.families.sora import SampleConfig, SoraConfig
from sora_jax.models.sora import ModelConfig, SoraTransformer, init_params

TEXT_DIM = 8


def make_config():
    return SoraConfig(
        model=ModelConfig(width=32, depth=1, num_heads=2, mlp_dim=64, text_dim=TEXT_DIM, frequency_dim=16),
        patch=PatchConfig(size=(2, 4, 4)),
        data=DataConfig(max_caption_tokens=8, text_length=32),
        sample=SampleConfig(num_frames=2, height=8, width=8, fps=8.0, num_steps=2),
    )


class WordEncoder:
    """A text encoder whose tokens are numbers drawn from each word."""

    dim = TEXT_DIM

    def encode(self, captions, max_tokens):
        tokens = [["[CLS]", *caption.split(), "[SEP]"][:max_tokens] for caption in captions]
        return [
            np.stack([np.random.default_rng([*map(ord, word)]).standard_normal(TEXT_DIM) for word in words]).astype("f")
            for words in tokens
        ]


def random_params(config, seed=0):
    """Every parameter drawn at random: at initialisation the gates and the head are zero, and anything passes."""
    model = SoraTransformer(config.model, config.patch.dim)
    shapes = jax.eval_shape(lambda: meta.unbox(init_params(model, jax.random.key(0))))
    rng = np.random.default_rng(seed)
    scale = lambda leaf: 1 / np.sqrt(leaf.shape[-2] if len(leaf.shape) > 1 else 4)  # noqa: E731
    return jax.tree.map(lambda leaf: (scale(leaf) * rng.standard_normal(leaf.shape)).astype(np.float32), shapes)
