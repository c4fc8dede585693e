import dataclasses
import json
import pathlib
import shutil

import chex
import numpy as np
import pytest
from helpers.models import RUNS, SORA, random_params, read_model

from sora_jax.commands import convert_checkpoint
from sora_jax.commands.evaluations import classification
from sora_jax.components import CodecComponent, Components, ComponentWarning, TextEncoderComponent
from sora_jax.config import MixturePart, PatchConfig
from sora_jax.config_json import to_json
from sora_jax.convert.vit import from_npz
from sora_jax.families.load import export_model, load, load_codec
from sora_jax.families.sora import SoraTask
from sora_jax.generation.dit_pipeline import DiTPipeline
from sora_jax.generation.pipeline import SoraPipeline
from sora_jax.training.state import unboxed_params


@pytest.fixture(scope="module")
def main():
    return convert_checkpoint.main


def test_export_halves_a_model(main, tmp_path, capsys):
    export_model(tmp_path / "full", SORA, unboxed_params(SoraTask(SORA)))
    source, output, table = (str(tmp_path / name) for name in ("full", "half", "table.json"))
    command = ["export", "--source", source, "--output", output, "--storage-dtype", "bfloat16", "--json", table]
    assert main(command) == 0
    config, params = read_model(output)
    assert config == SORA
    chex.assert_trees_all_close(params, read_model(source)[1], rtol=2**-8)
    sizes = json.loads(pathlib.Path(table).read_text())["files"]
    assert sizes == {p.name: p.stat().st_size for p in (tmp_path / "half").iterdir()}
    whole = (tmp_path / "full" / "model.safetensors").stat().st_size
    assert 0.45 < sizes["model.safetensors"] / whole < 0.75  # names and shapes are not halved
    assert "model.safetensors" in capsys.readouterr().out


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A model of each kind, as export writes it."""
    folder = tmp_path_factory.mktemp("runs")
    for name, config in RUNS.items():
        export_model(folder / name, config, random_params(config))
    export_model(folder / "sora", SORA, random_params(SORA))
    (folder / "weights").mkdir()
    shutil.copy(folder / "dit" / "model.safetensors", folder / "weights")
    (folder / "weights" / "config.json").write_text(to_json(RUNS["dit"].model))
    return folder


def test_components_come_along_and_another_text_encoder_is_told(main, tmp_path):
    components = Components(TextEncoderComponent("all-MiniLM-L6-v2", "f00d", 32), CodecComponent("identity"))
    export_model(tmp_path / "run", SORA, random_params(SORA), components=components)
    assert main(["export", "--source", str(tmp_path / "run"), "--output", str(tmp_path / "out")]) == 0
    assert load(tmp_path / "out").components == components
    words = r"out was trained with the text encoder all-MiniLM-L6-v2 of fingerprint f00d, and the one here is"
    with pytest.warns(ComponentWarning, match=words), pytest.raises(ValueError, match=r"patch\.channels must be 3"):
        SoraPipeline.from_pretrained(tmp_path / "out")


def test_a_mixture_is_exported_without_the_way_to_it(main, tmp_path):
    parts = (MixturePart("/here/data/clips/1.0.0", 3.0), MixturePart("/here/stills", 1.0))
    config = dataclasses.replace(SORA, data=dataclasses.replace(SORA.data, mixture=parts))
    export_model(tmp_path / "run", config, random_params(config))
    assert main(["export", "--source", str(tmp_path / "run"), "--output", str(tmp_path / "out")]) == 0
    assert [part.path for part in load(tmp_path / "out").config.data.mixture] == ["clips/1.0.0", "here/stills"]


def test_what_a_model_was_trained_on_decides_whether_it_makes_pixels(tmp_path):
    latents = Components(codec=CodecComponent("image", "f00d", 0.2))
    rgb = PatchConfig(SORA.patch.size, channels=3)
    sora = dataclasses.replace(SORA, patch=rgb)
    export_model(tmp_path / "sora", sora, random_params(sora), components=latents)
    with pytest.raises(ValueError, match=r"sora makes latents: name the autoencoder that decodes them, vae\."):
        SoraPipeline.from_pretrained(tmp_path / "sora")
    dit = RUNS["dit"]
    dit = dataclasses.replace(dit, sample=dataclasses.replace(dit.sample, vae=""))
    for components, bounds in ((latents, None), (Components(codec=CodecComponent("identity")), (-1.0, 1.0))):
        export_model(tmp_path / "dit", dit, random_params(dit), components=components)
        assert DiTPipeline.from_pretrained(tmp_path / "dit").process.clip == bounds
    with pytest.raises(ValueError, match="dit makes pixels, which no autoencoder decodes"):
        DiTPipeline.from_pretrained(tmp_path / "dit", vae="anything")


@pytest.mark.parametrize("dtype", ["int8", "bool"])
def test_parameters_are_real_numbers(tmp_path, dtype):
    export_model(tmp_path, SORA, random_params(SORA))
    with pytest.raises(ValueError, match=f"dtype must be that of real numbers, .*, got {dtype}"):
        load(tmp_path, dtype=dtype)


@pytest.mark.parametrize("name", RUNS)
def test_every_kind_of_run_is_exported(main, runs, tmp_path, name):
    assert main(["export", "--source", str(runs / name), "--output", str(tmp_path / "out")]) == 0
    config, params = read_model(tmp_path / "out")
    assert "/here" not in (tmp_path / "out" / "config.json").read_text()
    assert (config.model, config.num_steps) == (RUNS[name].model, 6)
    chex.assert_trees_all_equal(params, random_params(RUNS[name]))


def test_a_vit_is_written_as_official_files_are(main, runs, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert main(["vit-npz", "--source", str(runs / "vit"), "--output", out]) == 0
    with np.load(tmp_path / "out" / "model.npz") as file:
        official = dict(file)
    model, params = RUNS["vit"].model, random_params(RUNS["vit"])
    assert official["embedding/kernel"].shape == (2, 2, 1, 12)  # (height, width, channels, width of the model)
    np.testing.assert_array_equal(official["head/bias"], params["head"]["bias"])
    chex.assert_trees_all_equal(from_npz(official, model), params)
    assert main(["vit-npz", "--source", str(runs / "vivit"), "--output", out]) == 1
    assert "vivit is a vivit: official .npz files are of ViTs." in capsys.readouterr().err
    assert main(["vit-npz", "--source", str(runs / "sora"), "--output", out]) == 1
    assert "sora is a Sora, not a classifier (ViT, ViViT or NaViT) or a converted ViT: " in capsys.readouterr().err


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
        (DiTPipeline.from_pretrained, "sora", "is a Sora, not a DiT .*: generate.py --prompt"),
        (DiTPipeline.from_pretrained, "vivit", r"is a classifier .*, not a DiT"),
        (load_codec, "weights", "is a converted DiT, not an image autoencoder: generate.py --class"),
        (
            DiTPipeline.from_pretrained,
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
    export_model(tmp_path / "full", SORA, unboxed_params(SoraTask(SORA)))
    for name in ("run", "other"):
        (tmp_path / name / "checkpoints" / "3").mkdir(parents=True)
    source = {".": "run/checkpoints/3", "../other": "full"}[output]
    assert main(["export", "--source", str(tmp_path / source), "--output", str(tmp_path / "run" / output)]) == 1
    assert message in capsys.readouterr().err
    assert not list(tmp_path.glob("*/config.json"))[1:]
