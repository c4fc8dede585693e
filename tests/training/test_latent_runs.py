"""Runs on stored latents, of stills and of clips, alone and in a weighted mixture with flips: exact after any stop."""

import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import shutil
import signal
import types

import jax
import numpy as np
import pytest
import rich.console
import tiny_run
from etils import epath
from helpers.models import random_params
from helpers.runs import train
from helpers.trees import random_tree
from PIL import Image

from sora_jax.components import ComponentWarning
from sora_jax.config import MixturePart, PatchConfig
from sora_jax.config_json import to_json
from sora_jax.data.builders import clip_dataset, folder
from sora_jax.data.builders.latent_options import LatentOptions
from sora_jax.data.builders.latents import prepare_latents
from sora_jax.data.builders.parts import Encoding
from sora_jax.data.captions import CaptionTable
from sora_jax.data.content import open_content
from sora_jax.data.identity import data_fingerprints
from sora_jax.data.labelled import FixedSize, LabelledDataConfig
from sora_jax.data.pipeline import make_pipeline
from sora_jax.families.dit import ClassConditionalConfig, ClassSampleConfig
from sora_jax.families.sora import SampleConfig
from sora_jax.models.autoencoder.codec import ImageCodec
from sora_jax.models.autoencoder.image_vae import ImageVAE, ImageVAEConfig, abstract_params
from sora_jax.models.dit import DiTConfig
from sora_jax.models.weights import tensor_bytes
from sora_jax.provenance import flat_names
from sora_jax.runs.sora import SoraRun
from sora_jax.training.checkpoint import latest_step
from sora_jax.training.loop import Outcome
from sora_jax.training.run_directory import ConfigChangedError

EMOJI = pathlib.Path(__file__).parents[1] / "fixtures" / "fluent_emoji"
CLIPS = ("1f4a7.webp", "1f528.webp")
VAE = ImageVAEConfig(latent_channels=2, widths=(4, 4, 4), num_blocks=1, num_groups=2, scaling_factor=0.5)


@pytest.fixture(scope="module")
def codec():
    return ImageCodec(VAE, random_tree(abstract_params(ImageVAE(VAE)), 0.05, 0.2), jax.devices()[:1])


@pytest.fixture(scope="module")
def paths(tmp_path_factory, codec):
    """Latents of moving clips and of labelled stills, both of an autoencoder with random weights."""
    root = tmp_path_factory.mktemp("latents")

    def prepared(name, files, options):
        lines = [json.dumps({"file": f, "caption": f"a {f}", "split": "train", "label": "ab"[i % 2]})
                 for i, f in enumerate(files)]  # fmt: skip
        (root / name / "captions.jsonl").write_text("\n".join(lines))
        tasks, _ = folder.make_tasks(str(root / name))
        clips = clip_dataset.prepare(
            folder.ClipFolder, tasks, folder.Converter(6), Encoding(32, 92), str(root / f"{name}_data"), 0, [], {}
        )

        def encode(frames):
            posterior = codec.posterior(frames)
            return posterior.mean, posterior.std

        out, facts = str(root / f"{name}_latents"), {"scaling_factor": codec.scale, "sha256": "of random weights"}
        return prepare_latents(clips["path"], encode, codec.strides, codec.channels, facts, out, options, 8)["path"]

    for name in ("clips", "stills"):
        (root / name).mkdir()
    for file in CLIPS:
        shutil.copy(EMOJI / file, root / "clips" / file)
    rng = np.random.default_rng(0)
    stills = [f"{i}.png" for i in range(6)]
    for file in stills:
        Image.fromarray(rng.integers(0, 256, (16, 24, 3), np.uint8)).save(root / "stills" / file)
    keep = LatentOptions(32, fit="keep", multiple=8)
    return prepared("clips", CLIPS, keep), prepared("stills", stills, keep)


def opener(config, table=None, stop_at=0):
    """Returns the `open_batches` of `train`, with a SIGTERM before the batch number `stop_at`."""

    class Interrupted:
        def __init__(self, batches):
            self.batches, self.numbers = batches, itertools.count(1)

        def __next__(self):
            if next(self.numbers) == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            return next(self.batches)

        def __getattr__(self, name):
            return getattr(self.batches, name)

    return lambda split, training: Interrupted(
        make_pipeline(config.data, config.patch, table, split, training=training)
    )


def check_exact(config, tmp_path, table=None):
    """Trains once through and once with a stop in the middle, and compares the two."""
    assert train(config, tmp_path / "straight", opener(config, table)) is Outcome.FINISHED
    assert train(config, tmp_path / "stopped", opener(config, table, stop_at=3)) is Outcome.PREEMPTED
    assert latest_step(tmp_path / "stopped") == 3
    assert train(config, tmp_path / "stopped", opener(config, table)) is Outcome.FINISHED
    tiny_run.assert_same_runs(tmp_path / "straight", tmp_path / "stopped", config)
    lines = [json.loads(line) for line in (tmp_path / "straight" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses and np.isfinite(losses).all()


def sora(**data):
    """Returns an experiment of Sora on latents; rows of a few clips."""
    fields = dict(
        eval_splits=(), num_frames=(1, 6), fps=(4, 30), still_share=0.2, row_length=48, text_length=16, max_segments=6,
        max_caption_tokens=2, num_bins=4, batch_size=2, num_shards=2, num_workers=1, flip=0.5,
    )  # fmt: skip
    return tiny_run.config(
        patch=dataclasses.asdict(PatchConfig(size=(1, 2, 2), channels=2)),
        data=fields | data, num_steps=6, save_every=100,
    )  # fmt: skip


def caption_table(config, *paths):
    captions = [caption for path in paths for caption in open_content(path).metadata.captions]
    dim = config.model.text_dim
    return CaptionTable.build(captions, lambda texts: [np.full((2, dim), len(t) % 5, np.float32) for t in texts])


@pytest.mark.slow
def test_sora_on_a_mixture_of_latents_of_clips_and_stills(paths, codec, tmp_path):
    config = sora(mixture=(MixturePart(paths[0], 3.0), MixturePart(paths[1], 1.0)))
    table = caption_table(config, *paths)
    clips = open_content(paths[0]).metadata
    assert clips.num_frames.max() > 1
    with contextlib.closing(make_pipeline(config.data, config.patch, table)) as rows:
        batch = next(rows)
    moving = [np.unique(batch.positions[r][batch.segment_ids[r] == k + 1][:, 0]).size for r, k in np.ndindex(2, 6)]
    assert max(moving) > 1  # rows hold clips, not stills alone
    check_exact(config, tmp_path, table)


def test_a_mixture_may_move_but_not_change(paths, tmp_path):
    config = sora(mixture=(MixturePart(paths[0], 3.0), MixturePart(paths[1], 1.0)), num_workers=0)
    table = caption_table(config, *paths)

    def run(config, **options):
        found = lambda: data_fingerprints(config.data, ("train",))  # noqa: E731
        return train(config, tmp_path / "run", opener(config, table, **options), data_fingerprints=found)

    assert run(config, stop_at=3) is Outcome.PREEMPTED
    moved = shutil.copytree(paths[1], tmp_path / "moved")
    parts = (MixturePart(paths[0], 3.0), MixturePart(str(moved), 1.0))
    weighted = dataclasses.replace(config.data, mixture=(MixturePart(paths[0], 1.0), parts[1]))
    turned = dataclasses.replace(config.data, mixture=config.data.mixture[::-1])
    for data in (weighted, turned, dataclasses.replace(config.data, mixture=(), path=paths[0])):
        with pytest.raises(
            ConfigChangedError, match=rf"a run with data\.mixture = \[{{'path': '{paths[0]}', 'weight': 3"
        ):
            run(dataclasses.replace(config, data=data))
    there = dataclasses.replace(config, data=dataclasses.replace(config.data, mixture=parts))
    assert run(there) is Outcome.FINISHED
    kept = json.loads((tmp_path / "run" / "config.json").read_text())["data"]["mixture"]
    assert [part["path"] for part in kept] == [paths[0], str(moved)]


def test_what_sora_makes_of_latents_is_decoded_to_its_size(paths, codec):
    content = open_content(paths[0])
    m = content.metadata
    mean, _ = content.source.posterior(1)
    assert mean.shape == (m.num_frames[1], m.height[1], m.width[1], 2)
    assert codec.decode(mean * np.float32(codec.scale)).shape == (m.num_frames[1], 4 * m.height[1], 4 * m.width[1], 3)


def test_sheets_of_latents_are_decoded(paths, codec, tmp_path, monkeypatch, capsys):
    def draw(width=VAE.latent_channels, vae=True):
        """The sheet that a run draws of random parameters, of an autoencoder with so many latent channels."""
        folder = tmp_path / str(width)
        folder.mkdir(exist_ok=True)
        config = dataclasses.replace(VAE, latent_channels=width)
        (folder / "config.json").write_text(to_json(config))
        params = random_tree(abstract_params(ImageVAE(config)))
        (folder / "model.safetensors").write_bytes(tensor_bytes(flat_names(params)))
        sample = SampleConfig(("frog",), num_frames=2, height=8, width=16, num_steps=1, vae=str(folder) if vae else "")
        experiment = dataclasses.replace(sora(path=paths[0], num_workers=0), sample=sample, sample_every=1)
        run = SoraRun(experiment, epath.Path(tmp_path / "run"), rich.console.Console(stderr=True))
        return run.sample_sheet and run.sample_sheet(random_params(experiment))

    words = types.SimpleNamespace(dim=8, encode=lambda captions, most: [np.ones((2, 8), np.float32) for _ in captions])
    monkeypatch.setattr("sora_jax.models.text.minilm.load_text_encoder", lambda: words)
    with pytest.warns(ComponentWarning, match="trained on latents of the autoencoder of fingerprint of random we, and"):
        sheet = draw()
    assert sheet.dtype == np.uint8 and sheet.shape[2] == 3 and sheet.std() > 1
    with pytest.raises(ValueError, match=r"makes latents of 2 channels, and those of the autoencoder .* have 3"):
        draw(width=3)
    assert draw(vae=False) is None
    assert "no sample sheets: this model makes latents; --sample.vae decodes them" in capsys.readouterr().err


@pytest.mark.slow
def test_dit_on_latents(paths, tmp_path):
    config = ClassConditionalConfig(
        data=LabelledDataConfig(
            path=paths[1], eval_splits=(), sampling=FixedSize((4, 4)), crop="random", flip=0.5, row_length=4,
            max_segments=1, num_bins=1, batch_size=2, num_shards=2, num_workers=1,
        ),
        patch=PatchConfig((1, 2, 2), 2),
        model=DiTConfig(
            image_size=(4, 4), patch_size=2, in_channels=2, width=12, depth=1, num_heads=2, mlp_dim=16, num_classes=2,
            frequency_dim=8, attention="xla",
        ),
        sample=ClassSampleConfig(labels=(0, 1), columns=2, size=(4, 4), num_steps=4),
        optimizer=tiny_run.CONFIG.optimizer,
        num_steps=6, log_every=2, eval_every=0, save_every=100, sample_every=0,
    )  # fmt: skip
    assert not config.makes_pixels
    check_exact(config, tmp_path)
