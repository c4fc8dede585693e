"""Networks whose weights stand on their own, as `experiments/convert_checkpoint.py` writes them, by kind."""

from __future__ import annotations

import importlib
from typing import Any, NamedTuple

from sora_jax.array_types import PyTree


class Network(NamedTuple):
    """A kind of converted weights.

    Attributes:
        module: of the network, with its `abstract_params`.
        config: name of its config, whose `kind` is the table's.
        network: name of the module that is made of the config.
        what: such weights are, in words.
        use: what takes them, in words.
    """

    module: str
    config: str
    network: str
    what: str
    use: str

    def config_class(self) -> type:
        """Returns the class of its configs."""
        return getattr(importlib.import_module(self.module), self.config)

    def abstract_params(self, config: Any) -> PyTree:
        """Returns the shapes and logical axes of the parameters of a config's network."""
        module = importlib.import_module(self.module)
        return module.abstract_params(getattr(module, self.network)(config))


_CLASSIFIER = "evaluate.py classify and train.py --init-from take it"
_M = "sora_jax.models"
NETWORKS = {
    "vit": Network(f"{_M}.vit", "ViTConfig", "ViT", "a converted ViT", _CLASSIFIER),
    "vivit": Network(f"{_M}.vivit", "ViViTConfig", "ViViT", "a converted ViViT", _CLASSIFIER),
    "dit_model": Network(
        f"{_M}.dit", "DiTConfig", "DiT", "a converted DiT",
        "generate.py --class-labels and evaluate.py sample take it",
    ),
    "unet": Network(f"{_M}.unet", "UNetConfig", "UNet", "a converted U-Net", "evaluate.py sample takes it"),
    "image_vae": Network(
        f"{_M}.autoencoder.image_vae", "ImageVAEConfig", "ImageVAE", "an image autoencoder", "--vae takes it"
    ),
    "minilm": Network(f"{_M}.text.minilm", "MiniLMConfig", "MiniLM", "a text encoder", "load_text_encoder reads it"),
}  # fmt: skip
