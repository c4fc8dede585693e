"""ViViT-B/16x2 (arXiv:2103.15691) on Kinetics-400: the paper's four models.

1 is joint space-time attention, 2 the factorised encoder, 3 factorised self-attention, 4 factorised dot-product
attention.

    python experiments/train.py vivit_b_16x2_model1 --data.path data/kinetics --workdir runs/vivit \
        --init-from models/vit_b_16

The data set is a folder of clips with labels (`prepare_data.py folder`). `--init-from` names a converted ViT-B/16
(`convert_checkpoint.py vit`), as section 3.4 has it: central-frame tubelets, positions repeated in time. Clips are 32
frames at 12.5 a second, stretched to 224x224. The paper trains with SGD, random crops and stochastic depth; this has
AdamW and none of them.
"""

from sora_jax.config import MeshConfig, OptimizerConfig, PatchConfig
from sora_jax.data.recognition import FixedSize, RecognitionDataConfig
from sora_jax.families.recognition import ClassificationConfig
from sora_jax.models.vivit import ViViTConfig

NAMES = ("vivit_b_16x2_model1", "vivit_b_16x2_model2", "vivit_b_16x2_model3", "vivit_b_16x2_model4")


def config(name: str) -> ClassificationConfig:
    """Returns the experiment of a model."""
    return ClassificationConfig(
        data=RecognitionDataConfig(
            sampling=FixedSize((224, 224)),
            num_frames=32,
            fps=12.5,
            row_length=3136,
            max_segments=1,
            num_bins=1,
            batch_size=64,
            num_shards=64,
            num_workers=8,
        ),
        patch=PatchConfig(size=(2, 16, 16)),
        model=ViViTConfig(model=NAMES.index(name) + 1, dtype="bfloat16", remat="dots"),
        optimizer=OptimizerConfig(
            learning_rate=3e-5, warmup_steps=2500, b2=0.999, weight_decay=0.05, final_share=0.0, ema_decay=0.9999
        ),
        mesh=MeshConfig(data=-1, fsdp=1),
        num_steps=110_000,
        log_every=50,
        eval_every=5000,
        eval_batches=32,
        save_every=5000,
    )
