import json
import pathlib
import subprocess
import sys

import numpy as np
from helpers.compilation import on_devices
from helpers.models import RUNS, SORA, random_params

from sora_jax.config_json import to_json
from sora_jax.families.load import export_model
from sora_jax.models.weights import tensor_bytes
from sora_jax.provenance import flat_names
from sora_jax.training.checkpoint import Checkpointer
from sora_jax.training.state import TrainState

SCRIPT = pathlib.Path(__file__).parent / "sharded_load.py"


def write_run(path, config):
    path.mkdir()
    (path / "config.json").write_text(to_json(config))
    params = random_params(config)
    checkpointer = Checkpointer(path, keep=1)
    checkpointer.save(3, TrainState(np.int32(3), params, params, {"count": np.int32(3)}, np.int32(-1)), {})
    checkpointer.close()


def test_eight_devices_get_their_share_of_what_one_host_reads(tmp_path):
    """A run, exported models of two dtypes and of 8 bits, and converted weights."""
    write_run(tmp_path / "run", SORA)
    for dtype in ("float32", "bfloat16", "int8"):
        export_model(tmp_path / dtype, SORA, random_params(SORA), dtype)
    (tmp_path / "vit").mkdir()
    (tmp_path / "vit" / "config.json").write_text(to_json(RUNS["vit"].model))
    (tmp_path / "vit" / "model.safetensors").write_bytes(tensor_bytes(flat_names(random_params(RUNS["vit"]))))
    paths = [str(tmp_path / name) for name in ("run", "run/checkpoints/3", "float32", "bfloat16", "int8", "vit")]
    done = subprocess.run([sys.executable, SCRIPT, *paths], env=on_devices(8), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = {"devices": [8], "share_of_the_largest": 0.25, "dtypes": ["bfloat16", "float32"]}
    assert json.loads(done.stdout.splitlines()[-1]) == dict.fromkeys(paths, expected)
