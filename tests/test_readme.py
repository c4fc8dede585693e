"""The README's block for a TPU VM, run as it stands on eight fake devices."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
from helpers.compilation import on_devices

ROOT = pathlib.Path(__file__).parents[1]
FIXTURES = ROOT / "tests" / "fixtures" / "fluent_emoji"
# The same run in small: what the block itself asks for takes a TPU.
SMALL = (
    "--num-steps 2 --log-every 1 --save-every 2 --sample-every 2 --eval-every 0 --data.row-length 128 "
    "--data.text-length 64 --data.long-side 8 16 --data.num-frames 1 4 --data.batch-size 8 --data.num-workers 0 "
    "--model.width 32 --model.depth 1 --model.num-heads 2 --model.mlp-dim 32 --sample.num-steps 1 "
    "--sample.height 8 --sample.width 8 --sample.num-frames 2"
)


def tpu_block():
    section = re.search(r"## You are on a TPU VM\n(.*?)\n## ", (ROOT / "README.md").read_text(), re.S)[1]
    return re.search(r"```\n(.*?)```", section, re.S)[1].splitlines()


@pytest.mark.slow
def test_the_block_for_a_tpu_vm_runs_on_eight_fake_devices(tmp_path):
    install, *commands = tpu_block()
    assert install == "pip install -e '.[tpu]'" and "jax.devices()" in commands[0]
    clips = tmp_path / "clips"
    clips.mkdir()
    lines = []
    for number, path in enumerate(sorted(FIXTURES.glob("*.webp"))):
        (clips / path.name).write_bytes(path.read_bytes())
        lines.append(json.dumps({"file": path.name, "caption": f"emoji number {number}", "split": "train"}))
    (clips / "captions.jsonl").write_text("\n".join(lines))
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    environment = {
        **on_devices(8),
        "HOME": str(tmp_path),
        "PATH": os.pathsep.join([str(pathlib.Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": str(ROOT),
    }
    shown = []
    for command in commands:
        small = f"{command} {SMALL}" if "train.py" in command else command
        done = subprocess.run(["bash", "-c", small], cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{small}\n{done.stdout}{done.stderr}"
        shown.append(done.stdout)
    assert shown[0].count("CpuDevice") == 8
    assert shown[-1].split() == ["00000002.png"]
