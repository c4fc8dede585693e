"""DiT-S/2, B/2, L/2, XL/2, S/8 and XL/8 (arXiv:2212.09748) on ImageNet at 256x256, with the paper's values.

The model is trained in the latents of the SD-VAE; what differs from size to size is its name and how it is split.

python experiments/convert_checkpoint.py sd-vae --source sd-vae-ft-ema --output models/sd_vae
python experiments/prepare_data.py latents --source data/imagenet2012/5.1.0 --vae models/sd_vae --output data
python experiments/train.py dit_s_2 --data.path data/imagenet2012_latents/1.0.0 --workdir runs/dit_s_2
"""

import dataclasses

from sora_jax.config import MeshConfig, OptimizerConfig, PatchConfig
from sora_jax.data.latents import LatentDataConfig
from sora_jax.families.dit import ClassConditionalConfig, ClassSampleConfig
from sora_jax.models.dit import DIT_SIZES

NAMES = ("dit_s_2", "dit_b_2", "dit_l_2", "dit_xl_2", "dit_s_8", "dit_xl_8")


def config(name: str) -> ClassConditionalConfig:
    """Returns the experiment of a size."""
    size = DIT_SIZES[name]
    patch = size.patch_size
    return ClassConditionalConfig(
        data=LatentDataConfig(batch_size=256, row_length=(32 // patch) ** 2),
        patch=PatchConfig(size=(1, patch, patch), channels=4),
        model=dataclasses.replace(size, dtype="bfloat16", remat="full" if name == "dit_xl_2" else "dots"),
        optimizer=OptimizerConfig(
            learning_rate=1e-4, warmup_steps=0, b2=0.999, weight_decay=0.0, final_share=1.0, ema_decay=0.9999
        ),
        mesh=MeshConfig(data=-1, fsdp=4 if size.width >= 1024 else 1),
        sample=ClassSampleConfig(labels=(207, 360, 387, 974), columns=4, guidance_scale=4.0),
        num_steps=400_000,
        log_every=100,
        eval_every=0,
        save_every=5000,
        sample_every=10_000,
    )
