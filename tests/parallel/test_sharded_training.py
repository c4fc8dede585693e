import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest

SCRIPT = pathlib.Path(__file__).parent / "sharded_losses.py"


@pytest.fixture(scope="module")
def found():
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=8"}
    done = subprocess.run([sys.executable, SCRIPT], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("kind", ["clips", "images"])
@pytest.mark.parametrize("mesh", ["data", "fsdp"])
def test_eight_devices_give_the_losses_of_one(found, kind, mesh):
    assert found["devices"] == 8
    np.testing.assert_allclose(found[kind][mesh]["losses"], found[kind]["one"]["losses"], rtol=2e-5)
    np.testing.assert_allclose(found[kind][mesh]["held_out"], found[kind]["one"]["held_out"], rtol=2e-5)


@pytest.mark.parametrize("kind", ["clips", "images"])
def test_parameters_are_split_over_fsdp_alone(found, kind):
    shares = {name: run["share"] for name, run in found[kind].items()}
    assert shares == {"one": 1, "data": 1, "fsdp": 0.25}
