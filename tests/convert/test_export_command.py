import dataclasses
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from helpers.models import read_model

from sora_jax.commands import convert_checkpoint
from sora_jax.commands.evaluations import classification
from sora_jax.config import OptimizerConfig, PatchConfig
from sora_jax.config_json import to_json
from sora_jax.data.recognition import FixedSize, NativeSize, RecognitionDataConfig
from sora_jax.data.toy import SwissRollConfig
from sora_jax.families.diffusion import DiffusionConfig, GaussianConfig
from sora_jax.families.dit import ClassConditionalConfig, ClassSampleConfig
from sora_jax.families.load import export_model
from sora_jax.families.recognition import ClassificationConfig, ContrastiveConfig
from sora_jax.families.registry import make_task
from sora_jax.families.sora import SoraConfig, SoraTask
from sora_jax.generation.class_conditional import ClassConditionalSampler, LatentDecoder
from sora_jax.generation.pipeline import SoraPipeline
from sora_jax.models.dit import DiTConfig
from sora_jax.models.mlp import MLPConfig
from sora_jax.models.navit import NaViTConfig
from sora_jax.models.sora import ModelConfig
from sora_jax.models.vit import ViTConfig
from sora_jax.models.vivit import ViViTConfig
from sora_jax.training.state import abstract_params, unboxed_params

CONFIG = SoraConfig(
    model=ModelConfig(width=16, depth=1, num_heads=2, mlp_dim=16, text_dim=8, frequency_dim=8),
    patch=PatchConfig(size=(1, 2, 2), channels=1),
)


@pytest.fixture(scope="module")
def main():
    return convert_checkpoint.main


def test_export_halves_a_model(main, tmp_path, capsys):
    export_model(tmp_path / "full", CONFIG, unboxed_params(SoraTask(CONFIG)))
    source, output, table = (str(tmp_path / name) for name in ("full", "half", "table.json"))
    command = ["export", "--source", source, "--output", output, "--storage-dtype", "bfloat16", "--json", table]
    assert main(command) == 0
    config, params = read_model(output)
    assert config == CONFIG
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2**-8), params, read_model(source)[1])
    sizes = json.loads(pathlib.Path(table).read_text())["files"]
    assert sizes == {p.name: p.stat().st_size for p in (tmp_path / "half").iterdir()}
    assert "model.safetensors" in capsys.readouterr().out


RUN = dict(optimizer=OptimizerConfig(warmup_steps=2), num_steps=6)
SMALL = dict(width=12, depth=1, num_heads=2, mlp_dim=16, num_classes=3)
PICTURES = RecognitionDataConfig(
    path="/here/data", sampling=FixedSize((4, 6)), row_length=6, max_segments=1, batch_size=4, num_shards=1
)
PATCH = PatchConfig(size=(1, 2, 2), channels=1)
NAVIT = dict(max_grid=(1, 6, 6), num_fractions=5)
CAPTIONED = dict(sampling=NativeSize((4.0, 8.0)), text_length=8, max_caption_tokens=2, label="none")
RUNS = {
    "dit": ClassConditionalConfig(
        data=PICTURES, patch=PATCH, sample=ClassSampleConfig(labels=(0,), size=(4, 4), num_steps=4, vae="/here/vae"),
        model=DiTConfig(image_size=(4, 6), in_channels=1, frequency_dim=8, **SMALL), **RUN,
    ),
    "vit": ClassificationConfig(
        data=PICTURES, patch=PATCH, model=ViTConfig(image_size=(4, 6), patch_size=2, channels=1, **SMALL), **RUN
    ),
    "vivit": ClassificationConfig(
        data=dataclasses.replace(PICTURES, num_frames=4, row_length=12), patch=PatchConfig((2, 2, 2), channels=1),
        model=ViViTConfig(num_frames=4, image_size=(4, 6), tubelet_size=(2, 2, 2), channels=1, **SMALL), **RUN,
    ),
    "pairs": ContrastiveConfig(
        data=dataclasses.replace(PICTURES, **CAPTIONED), patch=PATCH,
        model=NaViTConfig(**SMALL | NAVIT | {"num_classes": 1}), embedding_dim=6, text_dim=5, **RUN,
    ),
    "study": DiffusionConfig(
        data=SwissRollConfig(batch_size=8), model=MLPConfig(out_channels=4, width=16, depth=1, num_steps=20),
        process=GaussianConfig(num_levels=20, schedule="cosine", variance="learned", loss="bound"),
        sample_every=0, **RUN,
    ),
}  # fmt: skip


def random_params(config):
    rng = np.random.default_rng(0)
    shapes = abstract_params(make_task(config))
    return jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape).astype(np.float32), shapes)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A model of each kind, as export writes it."""
    folder = tmp_path_factory.mktemp("runs")
    for name, config in RUNS.items():
        export_model(folder / name, config, random_params(config))
    export_model(folder / "sora", CONFIG, random_params(CONFIG))
    (folder / "weights").mkdir()
    shutil.copy(folder / "dit" / "model.safetensors", folder / "weights")
    (folder / "weights" / "config.json").write_text(to_json(RUNS["dit"].model))
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_every_kind_of_run_is_exported(main, runs, tmp_path, name):
    assert main(["export", "--source", str(runs / name), "--output", str(tmp_path / "out")]) == 0
    config, params = read_model(tmp_path / "out")
    assert "/here" not in (tmp_path / "out" / "config.json").read_text()
    assert (config.model, config.num_steps) == (RUNS[name].model, 6)
    jax.tree.map(np.testing.assert_array_equal, params, random_params(RUNS[name]))


def classify(path):
    classification.classify(classification.ClassifyOptions(str(path)))


def export(path):
    convert_checkpoint.ExportCommand(str(path), str(path.parent / "out")).run()


@pytest.mark.parametrize(
    ("load", "name", "words"),
    [
        (SoraPipeline.from_pretrained, "dit", "is a DiT that was trained here, not a Sora: generate.py --class-labels"),
        (SoraPipeline.from_pretrained, "vit", r"is a classifier .*, not a Sora: evaluate.py classify"),
        (SoraPipeline.from_pretrained, "study", "is a study of discrete diffusion, not a Sora: train.py reports"),
        (ClassConditionalSampler.from_pretrained, "sora", "is a Sora, not a DiT .*: generate.py --prompt"),
        (ClassConditionalSampler.from_pretrained, "vivit", r"is a classifier .*, not a DiT"),
        (LatentDecoder.from_pretrained, "weights", "is a converted DiT, not an image autoencoder: generate.py --class"),
        (
            ClassConditionalSampler.from_pretrained,
            "pairs",
            "is a contrastive NaViT, not a DiT that was trained here or a converted DiT: train.py --init-from",
        ),
        (classify, "sora", "is a Sora, not a classifier .* or a converted ViT or a converted ViViT: generate.py"),
        (export, "weights", "is a converted DiT, not a Sora or a DiT that was trained here or"),
    ],
)
def test_a_model_of_another_kind_is_called_by_its_name(runs, load, name, words):
    with pytest.raises(ValueError, match=words) as error:
        load(runs / name)
    assert str(error.value).startswith(str(runs / name))


def test_where_nothing_can_be_written_is_named_before_the_run_is_read(main, tmp_path, capsys):
    for option, other in (("--output", []), ("--json", ["--output", str(tmp_path / "out")])):
        assert main(["export", "--source", str(tmp_path / "no_run"), option, "/dev/null/x", *other]) == 1
        assert f"{option} '/dev/null/x' cannot be written" in capsys.readouterr().err


def test_export_of_nothing(main, tmp_path, capsys):
    assert main(["export", "--source", str(tmp_path / "no_run"), "--output", str(tmp_path / "out")]) == 1
    assert "no run, checkpoint or exported model at" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("output", "message"), [(".", "--output must be outside of the run"), ("../other", "--output")]
)
def test_export_over_a_run(main, tmp_path, capsys, output, message):
    export_model(tmp_path / "full", CONFIG, unboxed_params(SoraTask(CONFIG)))
    for name in ("run", "other"):
        (tmp_path / name / "checkpoints" / "3").mkdir(parents=True)
    source = {".": "run/checkpoints/3", "../other": "full"}[output]
    assert main(["export", "--source", str(tmp_path / source), "--output", str(tmp_path / "run" / output)]) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("*/config.json"))[1:]
