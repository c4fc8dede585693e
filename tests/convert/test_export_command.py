import importlib.util
import json
import pathlib
import sys

import jax
import numpy as np
import pytest

from sora_jax.config import ModelConfig, PatchConfig, SoraConfig
from sora_jax.training.checkpoint import export_model, load_model
from sora_jax.training.state import unboxed_params
from sora_jax.training.tasks.sora import SoraTask

SCRIPT = pathlib.Path(__file__).parents[2] / "experiments" / "convert_checkpoint.py"
CONFIG = SoraConfig(
    model=ModelConfig(width=16, depth=1, num_heads=2, mlp_dim=16, text_dim=8, frequency_dim=8),
    patch=PatchConfig(size=(1, 2, 2), channels=1),
)


@pytest.fixture(scope="module")
def main():
    spec = importlib.util.spec_from_file_location("convert_script", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module.main
    del sys.modules[spec.name]


def test_export_halves_a_model(main, tmp_path, capsys):
    export_model(tmp_path / "full", CONFIG, unboxed_params(SoraTask(CONFIG)))
    source, output, table = (str(tmp_path / name) for name in ("full", "half", "table.json"))
    command = ["export", "--source", source, "--output", output, "--storage-dtype", "bfloat16", "--json", table]
    assert main(command) == 0
    config, params = load_model(output)
    assert config == CONFIG
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2**-8), params, load_model(source)[1])
    sizes = json.loads(pathlib.Path(table).read_text())["files"]
    assert sizes == {p.name: p.stat().st_size for p in (tmp_path / "half").iterdir()}
    assert "model.safetensors" in capsys.readouterr().out


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
