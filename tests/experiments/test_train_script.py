import json
import pathlib

import pytest
import rich.console

from sora_jax.commands import train
from sora_jax.config import MixturePart
from sora_jax.families.sora import SoraConfig
from sora_jax.runs.packed import without_missing_splits

ROOT = pathlib.Path(__file__).parents[2]
CLIPS = str(ROOT / "tests" / "fixtures" / "clip_folder")


@pytest.fixture(scope="module")
def script():
    return train


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sora_nano", "--dry-run", "--model.widht", "64"], "--model.widht"),
        (["sora_nano", "--dry-run", "--model.width", "65"], "divisor of width"),
        (["sora_nano", "--dry-run", "--data.still-share", "2"], "still_share must be between 0 and 1"),
        (["sora_nano", "--dry-run", "--flow.prediction", "noise"], "noise"),
        (["sora_nano", "--dry-run", "--num-steps", "0"], "num_steps must be at least 1, got 0"),
        (["sora_nano", "--dry-run", "--sample.height", "50"], "sample.height must be a multiple of the 8 pixels"),
        (["nothing_like_it", "--dry-run"], "no config 'nothing_like_it': give one of"),
        (["--dry-run"], "CONFIG comes first"),
        (["sora_nano"], "--data.path is needed"),
        (
            ["sora_nano", "--data.mixture", "data/clips"],
            "--data.mixture must be PATH=WEIGHT ..., got 'data/clips':",
        ),
        (["sora_nano", "--data.mixture", "a=0"], "got 'a=0': MixturePart.weight must be positive and finite, got 0.0"),
        (["sora_nano", "--data.mixture", "a=1", "=3"], "got '=3', without a path"),
        (["sora_nano", "--data.path", "a", "--data.mixture", "b=1"], "mixture must be () where path names one"),
        (["sora_nano", "--workdir", "runs/x"], "--data.path is needed"),
        (["sora_nano", "--dry-run", "--json", "/dev/null/x.json"], "--json '/dev/null/x.json' cannot be written"),
    ],
)
def test_unusable_command_lines(script, capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        script.main(arguments)
    assert stopped.value.code == 2
    captured = capsys.readouterr()
    assert message in " ".join((captured.err + captured.out).replace("│", " ").split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.path", "no/such/data"], "'no/such/data' holds no prepared TFDS data set"),
        (
            ["--data.path", CLIPS, "--data.eval-splits", "unseen", "--patch.channels", "16"],
            "patch.channels must be the 3 of the RGB pixels in",
        ),
        (["--data.mixture", f"{CLIPS}=1", "no/such/data=2"], "'no/such/data' holds no prepared TFDS data set"),
        (["--dry-run", "--mesh.fsdp", "3", "--data.batch-size", "6"], "cannot be split evenly"),
        (["--dry-run", "--mesh.fsdp", "8"], "data.batch_size must be a multiple of the 8 devices"),
    ],
)
def test_what_cannot_work_leaves_nothing_behind(script, capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert script.main(["sora_nano", "--workdir", "runs/x", *arguments]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_mixture_is_paths_and_weights(script):
    parts = script.parse(["sora_nano", "--data.mixture", "a/b=3", "odd=name=0.5"]).config.data.mixture
    assert parts == (MixturePart("a/b", 3.0), MixturePart("odd=name", 0.5))
    assert script.parse(["sora_nano", "--data.path", "a"]).config.data.mixture == ()


def test_every_config_that_comes_along_is_one(script):
    names = script.config_names()
    assert len(names) >= 30
    for name in names:
        script.load_config(name)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "num_params"),
    [
        ("vit_b_16", 86_567_656),
        ("vit_l_16", 304_326_632),
        ("vit_h_14", 632_045_800),
        ("vivit_b_16x2_model1", 88_954_000),
        ("vivit_b_16x2_model2", 115_062_928),
        ("vivit_b_16x2_model3", 117_319_312),
        ("vivit_b_16x2_model4", 88_952_464),
        ("dit_s_2", 32_865_056),
        ("dit_xl_2", 674_834_720),
    ],
)
def test_dry_run_says_how_many_parameters_published_models_have(script, tmp_path, name, num_params):
    assert script.main([name, "--dry-run", "--json", str(tmp_path / "plan.json")]) == 0
    figures = json.loads((tmp_path / "plan.json").read_text())
    assert figures["num_params"] == num_params and figures["forward_macs"] > 1e9
    assert figures.get("num_table_params", 0) == {"dit_s_2": 98_304, "dit_xl_2": 294_912}.get(name, 0)


def test_help_shows_examples(script, capsys):
    with pytest.raises(SystemExit) as stopped:
        script.main(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    assert "python experiments/train.py sora_nano --workdir" in shown
    assert "--optimizer.learning-rate" in shown


def test_dry_run_of_14_billion_parameters(script, capsys, tmp_path):
    (tmp_path / "large.py").write_text(
        "import dataclasses\n"
        "from sora_jax.config import MeshConfig, PatchConfig\n"
        "from sora_jax.data.captioned import DataConfig\n"
        "from sora_jax.families.sora import SoraConfig\n"
        "from sora_jax.models.sora import SORA_SIZES\n"
        "def config():\n"
        "    model = dataclasses.replace(SORA_SIZES['wan_14b'], attention='splash', remat='full')\n"
        "    data = DataConfig(row_length=32768, text_length=2048, batch_size=64, num_shards=64)\n"
        "    patch = PatchConfig(size=(1, 2, 2), channels=16)\n"
        "    return SoraConfig(model=model, data=data, patch=patch, mesh=MeshConfig(data=-1, fsdp=32))\n"
    )
    arguments = [str(tmp_path / "large.py"), "--dry-run", "--json", str(tmp_path / "new" / "plan.json")]
    assert script.main(arguments) == 0
    plan = json.loads((tmp_path / "new" / "plan.json").read_text())
    remat = {"flops_per_step", "flops_per_step_without_remat"}
    assert set(plan) == {"num_params", "tokens_per_step", "mesh"} | remat
    assert 14.0e9 < plan["num_params"] < 14.6e9
    assert plan["tokens_per_step"] == 64 * 32768
    assert plan["mesh"] == {"data": 1, "fsdp": 32}
    # Six operations a parameter and token, a third more for rematerialisation, and attention over whole rows.
    products = 6 * plan["num_params"] * plan["tokens_per_step"]
    attention = 12 * 40 * 5120 * 32768 * plan["tokens_per_step"]
    assert 0.9 < plan["flops_per_step"] / ((products + attention) * 4 / 3) < 1.2
    assert 0.9 < plan["flops_per_step_without_remat"] / (products + attention) < 1.2
    shown = capsys.readouterr().out
    assert "14," in shown and "FLOPs, remat full" in shown


def test_a_config_file_must_have_a_function_config(script, capsys, tmp_path):
    (tmp_path / "values.py").write_text("config = 3\n")
    with pytest.raises(SystemExit) as stopped:
        script.main([str(tmp_path / "values.py"), "--dry-run"])
    assert stopped.value.code == 2
    assert "must have a function `config() -> ExperimentConfig`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def config()\n    return 3\n", "values.py, line 1: expected ':'."),
        ("import no_such_module\n", "values.py, line 1: ModuleNotFoundError: No module named 'no_such_module'"),
        (
            "from sora_jax.data.captioned import DataConfig\n\ndef config():\n    return DataConfig(bach_size=3)\n",
            "values.py, line 4: TypeError: DataConfig.__init__() got an unexpected keyword argument 'bach_size'",
        ),
        (
            "from sora_jax.data.captioned import DataConfig\n\ndef config():\n    return DataConfig(batch_size=0)\n",
            "values.py, line 4: ValueError: DataConfig.batch_size must be",
        ),
    ],
)
def test_a_config_file_that_cannot_be_run_names_the_line(script, capsys, tmp_path, text, message):
    (tmp_path / "values.py").write_text(text)
    with pytest.raises(SystemExit) as stopped:
        script.main([str(tmp_path / "values.py"), "--dry-run"])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in error and str(tmp_path) in error and len(error.splitlines()) == 1


def test_several_hosts_that_nothing_names_are_an_error(script, capsys, monkeypatch):
    def initialize():
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr("jax.distributed.initialize", initialize)
    assert script.main(["sora_nano", "--workdir", "runs/x", "--data.path", "data", "--multihost"]) == 1
    assert "--multihost: coordinator_address should be defined." in (error := capsys.readouterr().err)
    assert "on one machine leave --multihost out" in error


def test_held_out_splits_that_the_data_lacks_are_left_out_and_named(capsys, monkeypatch):
    monkeypatch.setattr("sora_jax.data.sources.split_names", lambda path: ["train", "unseen"])
    data = without_missing_splits(SoraConfig().data, rich.console.Console(stderr=True))
    assert data.eval_splits == ("unseen",)
    assert "no held-out loss of compositional: the data set has train, unseen" in capsys.readouterr().err
