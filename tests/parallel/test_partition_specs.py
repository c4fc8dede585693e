"""How every family's parameters are split over eight devices, against a table that was written down.

What is split where is a matter of memory and of what devices have to tell each other, so giving an axis a better name
must not change it.
"""

import json
import pathlib

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh

from sora_jax.models import dit, navit, sora, vit, vivit
from sora_jax.models.autoencoder import image_vae
from sora_jax.models.mlp import MLP, RBF, MLPConfig, RBFConfig
from sora_jax.models.multiscale import MultiscaleConfig, MultiscaleConvolution
from sora_jax.models.resnet_stem import ResNetStemConfig
from sora_jax.models.sora import ModelConfig
from sora_jax.models.text.minilm import MiniLM, MiniLMConfig
from sora_jax.models.unet import UNet, UNetConfig
from sora_jax.parallel.rules import param_shardings

TABLE = pathlib.Path(__file__).parent.parent / "fixtures" / "partition_specs.json"
SMALL = dict(width=16, depth=2, num_heads=2, mlp_dim=32)


def initialised(model, *shapes):
    """Returns the shapes and logical axes of a model's parameters."""
    arrays = [jnp.zeros(shape) if isinstance(shape, tuple) else shape for shape in shapes]
    return jax.eval_shape(lambda: model.init(jax.random.key(0), *arrays)["params"])


def of_dit(conditioning):
    config = dit.DiTConfig(image_size=(4, 4), num_classes=7, conditioning=conditioning, frequency_dim=8, **SMALL)
    return dit.abstract_params(dit.DiT(config))


def of_vivit(model):
    options = dict(model=model, num_frames=2, tubelet_size=(1, 4, 4), image_size=(8, 8), num_classes=4, **SMALL)
    return vivit.abstract_params(vivit.ViViT(vivit.ViViTConfig(**options)))


def of_vit(**options):
    return vit.abstract_params(vit.ViT(vit.ViTConfig(num_classes=4, **SMALL, **options)))


FAMILIES = {
    "sora": lambda: sora.abstract_params(sora.SoraTransformer(ModelConfig(text_dim=8, frequency_dim=8, **SMALL), 12)),
    "dit": lambda: of_dit("adaln_zero"),
    "dit_cross_attention": lambda: of_dit("cross_attention"),
    "navit": lambda: navit.abstract_params(navit.NaViT(navit.NaViTConfig(num_classes=4, **SMALL), 12, 3)),
    "contrastive": lambda: initialised(
        navit.ContrastiveHead(8), (1, 1, 16), (1, 1, 8), jnp.ones((1, 1), jnp.int32)
    ),
    "vit": lambda: of_vit(image_size=(8, 8), patch_size=4, representation_dim=8),
    "vit_hybrid": lambda: of_vit(image_size=(16, 16), patch_size=8, stem=ResNetStemConfig((1,), width=32)),
    "vivit": lambda: of_vivit(2),
    "unet": lambda: initialised(
        UNet(UNetConfig(width=8, multipliers=(1, 2), num_blocks=1, num_groups=4)), (1, 8, 8, 3), (1,)
    ),
    "multiscale": lambda: initialised(
        MultiscaleConvolution(MultiscaleConfig(1, 2, width=8, num_layers=1, num_scales=1, num_bumps=4, num_steps=10)),
        (1, 4, 4, 1), (1,),
    ),
    "mlp": lambda: initialised(MLP(MLPConfig(2, 2, width=8, depth=2, num_frequencies=4)), (1, 2), (1,)),
    "rbf": lambda: initialised(RBF(RBFConfig(2, 2, num_units=4)), (1, 2), (1,)),
    "image_vae": lambda: image_vae.abstract_params(
        image_vae.ImageVAE(image_vae.ImageVAEConfig(widths=(8, 16), num_blocks=1, num_groups=4))
    ),
    "minilm": lambda: initialised(
        MiniLM(MiniLMConfig(vocab_size=11, max_positions=8, **SMALL)),
        jnp.ones((1, 4), jnp.int32),
        jnp.ones((1, 4), bool),
    ),
}  # fmt: skip


def split_parameters(family):
    """Returns how many parameters a family has, and the specs of those that are split, by name."""
    shardings = param_shardings(FAMILIES[family](), AbstractMesh((2, 4), ("data", "fsdp")))
    leaves = jax.tree_util.tree_leaves_with_path(shardings)
    named = {jax.tree_util.keystr(path, simple=True, separator="."): leaf.spec for path, leaf in leaves}
    split = {name: list(spec) for name, spec in sorted(named.items()) if any(spec)}
    return {"num_params": len(named), "split": split}


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_split_as_the_table_says(family):
    assert split_parameters(family) == json.loads(TABLE.read_text())[family]
