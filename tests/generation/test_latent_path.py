"""DiT on latents from the command line: pictures, latents, a run with its sheets, samples decoded and scored."""

import json

import numpy as np
import pytest
from class_models import VAE, write_autoencoder
from helpers.models import read_model
from PIL import Image

from sora_jax.commands import prepare_data, train
from sora_jax.commands.evaluations import sampling
from sora_jax.data.latents import LatentSource
from sora_jax.provenance import params_hash

CONFIG = """
from sora_jax.config import OptimizerConfig, PatchConfig
from sora_jax.data.labelled import FixedSize, LabelledDataConfig
from sora_jax.models.dit import DiTConfig
from sora_jax.families.dit import ClassConditionalConfig, ClassSampleConfig

def config():
    return ClassConditionalConfig(
        data=LabelledDataConfig(
            sampling=FixedSize((4, 4)), batch_size=4, row_length=4, max_segments=1, num_bins=1, flip=0.5,
            eval_splits=("unseen",),
        ),
        patch=PatchConfig(size=(1, 2, 2), channels=4),
        model=DiTConfig(
            image_size=(4, 4), width=12, depth=1, num_heads=2, mlp_dim=16, num_classes=2, frequency_dim=8,
            attention="xla",
        ),
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=1, ema_decay=0.5),
        sample=ClassSampleConfig(labels=(0, 1), columns=2, size=(4, 4), num_steps=2, vae={vae!r}),
        num_steps=4, log_every=2, eval_every=2, eval_batches=1, save_every=4, sample_every=4,
    )
"""


@pytest.mark.slow
def test_from_pictures_to_samples_through_the_autoencoder(tmp_path):
    pictures, lines, rng = tmp_path / "pictures", [], np.random.default_rng(0)
    pictures.mkdir()
    for i in range(10):
        Image.fromarray(rng.integers(0, 256, (12, 10 + i, 3)).astype(np.uint8)).save(pictures / f"{i}.png")
        split = "train" if i < 6 else "unseen"
        lines.append(json.dumps({"file": f"{i}.png", "caption": f"{i}", "split": split, "label": "ab"[i % 2]}))
    (pictures / "captions.jsonl").write_text("\n".join(lines) + "\n")
    data, vae = tmp_path / "data", str(write_autoencoder(tmp_path / "vae"))
    folder = ["folder", "--source", str(pictures), "--output", str(data), "--num-workers", "0"]
    assert prepare_data.main(folder) == 0
    latents = ["latents", "--source", str(data / "clip_folder"), "--vae", vae, "--image-size", "8"]
    assert prepare_data.main([*latents, "--output", str(data), "--batch-size", "4"]) == 0
    path = data / "clip_folder_latents" / "1.0.0"
    assert LatentSource(str(path), "train").layout.scaling_factor == VAE.scaling_factor

    (tmp_path / "config.py").write_text(CONFIG.replace("{vae!r}", repr(vae)))
    run = tmp_path / "run"
    assert train.main([str(tmp_path / "config.py"), "--data.path", str(path), "--workdir", str(run)]) == 0
    # Two rows of two decoded pictures of 8 pixels, drawn eight times as large.
    assert Image.open(run / "samples" / "00000004.png").size == (2 + 2 * 66,) * 2
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert all(np.isfinite(line["loss"]) for line in lines if "loss" in line)
    assert [line["step"] for line in lines if "held_out_loss/unseen" in line] == [2, 4]

    sampling.sample(
        sampling.SampleOptions(
            checkpoint=str(run), vae=vae, output=str(tmp_path / "set"), num_samples=3, num_steps=2, batch_size=2,
            labels_of=str(data / "clip_folder"), json=tmp_path / "manifest.json",
        )
    )  # fmt: skip
    with np.load(tmp_path / "set" / "samples.npz") as arrays:
        assert arrays["arr_0"].shape == (3, 8, 8, 3)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["vae"] == params_hash(read_model(vae)[1]) and "data set" in manifest["options"]
