"""ViT-B/16, L/16 and H/14 (arXiv:2010.11929) trained from scratch on ImageNet-1k, with the values of its appendix B.1.

    python experiments/train.py vit_b_16 --data.path data/imagenet2012/5.1.0 --workdir runs/vit_b_16

The data set is TFDS's, prepared with `--file_format=array_record`. Images are stretched to 224x224: the paper's random
crops and flips, its dropout and its stochastic depth are left out.
"""

import dataclasses

from sora_jax.config import MeshConfig, OptimizerConfig, PatchConfig
from sora_jax.data.recognition import FixedSize, RecognitionDataConfig
from sora_jax.families.recognition import ClassificationConfig
from sora_jax.models.vit import VIT_SIZES

NAMES = ("vit_b_16", "vit_l_16", "vit_h_14")


def config(name: str) -> ClassificationConfig:
    """Returns the experiment of a size."""
    size = VIT_SIZES[name]
    patch = size.patch_size
    return ClassificationConfig(
        data=RecognitionDataConfig(
            eval_splits=("validation",),
            sampling=FixedSize((224, 224)),
            row_length=(224 // patch) ** 2,
            max_segments=1,
            num_bins=1,
            batch_size=4096,
            num_shards=64,
            num_workers=8,
        ),
        patch=PatchConfig(size=(1, patch, patch)),
        model=dataclasses.replace(size, dtype="bfloat16", remat="full" if name == "vit_h_14" else "dots"),
        optimizer=OptimizerConfig(
            learning_rate=3e-3, warmup_steps=10_000, b2=0.999, weight_decay=0.3, final_share=0.0, ema_decay=0.9999
        ),
        mesh=MeshConfig(data=-1, fsdp={"vit_b_16": 1, "vit_l_16": 4, "vit_h_14": 8}[name]),
        num_steps=94_000,
        log_every=50,
        eval_every=5000,
        eval_batches=12,
        save_every=5000,
    )
