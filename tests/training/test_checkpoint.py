import errno
import json
import os
import pathlib
import shutil
import subprocess
import sys

import chex
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import safetensors.numpy
import tiny_run
from helpers.models import read_model

from sora_jax.config_json import to_json
from sora_jax.families.load import export_model
from sora_jax.families.sora import SoraTask
from sora_jax.provenance import flat_names
from sora_jax.training import state as states
from sora_jax.training.checkpoint import FOLDER, Checkpointer
from sora_jax.training.optimizer import make_optimizer

CONFIG = tiny_run.CONFIG


@pytest.fixture(scope="module")
def state():
    """Returns a state in which no two numbers are alike."""
    shapes = jax.eval_shape(
        lambda: states.fresh_state(states.unboxed_params(SoraTask(CONFIG)), make_optimizer(CONFIG.optimizer, 5))
    )
    rng = np.random.default_rng(0)
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    state = jax.tree.map(
        lambda s: jax.device_put(rng.standard_normal(s.shape).astype(s.dtype) + rng.integers(9), device), shapes
    )
    return state.replace(bad_step=np.int32(-1))


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=DEVICE), state)


DEVICE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def write_run(directory, state, losses, keep=2):
    """Saves a checkpoint for each step of `losses`."""
    directory.mkdir()
    (directory / "config.json").write_text(to_json(CONFIG))
    checkpointer = Checkpointer(directory, keep)
    for step, loss in losses.items():
        checkpointer.save(step, state, {"index": step}, loss)
        checkpointer.wait()
    checkpointer.close()


def equal(a, b):
    chex.assert_trees_all_equal(a, b)


def test_restores_bitwise_and_only_whole_checkpoints(tmp_path, state):
    write_run(tmp_path / "run", state, {3: None, 5: None})
    left_over = tmp_path / "run" / FOLDER / "7.orbax-checkpoint-tmp"  # as `kill -9` leaves it
    (left_over / "params.orbax-checkpoint-tmp").mkdir(parents=True)
    (left_over / "params.orbax-checkpoint-tmp" / "manifest.ocdbt").write_bytes(b"half")
    checkpointer = Checkpointer(tmp_path / "run", keep=2)
    assert checkpointer.latest_step == 5
    restored, data = checkpointer.restore(abstract(state))
    assert data == {"index": 5}
    assert int(restored.step) == 5
    for name in ("params", "ema_params", "opt_state"):
        equal(getattr(restored, name), getattr(state, name))
    checkpointer.save(7, state, {"index": 7})  # the name of the left-over is free again
    checkpointer.wait()
    assert checkpointer.latest_step == 7
    assert not left_over.exists()
    checkpointer.close()


def test_keeps_the_last_and_the_best(tmp_path, state):
    write_run(tmp_path / "run", state, {1: 0.5, 2: 0.2, 3: 0.9, 4: None, 5: 0.7}, keep=2)
    assert sorted(p.name for p in (tmp_path / "run" / FOLDER).iterdir()) == ["2", "4", "5"]
    checkpointer = Checkpointer(tmp_path / "run", keep=2)
    assert checkpointer.best_loss == pytest.approx(0.2)
    checkpointer.close()


def test_state_may_be_overwritten_once_save_returns(tmp_path, state):
    copy = jax.tree.map(lambda x: jax.numpy.array(x, copy=True), state)
    expected = jax.device_get(jax.tree.map(lambda x: np.array(x, copy=True), copy))
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0, tree), donate_argnums=0)
    (tmp_path / "run").mkdir()
    checkpointer = Checkpointer(tmp_path / "run", keep=1)
    checkpointer.save(1, copy, {})
    overwrite(copy)
    checkpointer.wait()
    restored, _ = checkpointer.restore(abstract(state))
    equal(restored.params, expected.params)
    equal(restored.opt_state, expected.opt_state)
    checkpointer.close()


@pytest.mark.parametrize("damage", ["opt_state", "params/_METADATA", "ema_params/_METADATA", "params/d"])
def test_a_damaged_checkpoint_is_named(tmp_path, state, damage):
    write_run(tmp_path / "run", state, {2: None, 3: None})
    damaged = tmp_path / "run" / FOLDER / "3"
    if damage == "opt_state":
        shutil.rmtree(damaged / damage)
    for path in (damaged / damage).rglob("*") if damage == "params/d" else [damaged / damage]:
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    message = f"checkpoint {damaged} is damaged or cannot be read .* the run goes on from the one before it"
    checkpointer = Checkpointer(tmp_path / "run", keep=2)
    if not damage.startswith("ema"):  # Orbax does without that file where it is told what to expect
        with pytest.raises(ValueError, match=message):
            checkpointer.restore(abstract(state))
    checkpointer.close()
    if damage != "opt_state":
        with pytest.raises(ValueError, match=message):
            read_model(tmp_path / "run", averaged=damage.startswith("ema"))
    shutil.rmtree(damaged)
    equal(read_model(tmp_path / "run")[1], state.ema_params)


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.ESTALE])
@pytest.mark.parametrize("tensorstore", [True, False])
def test_a_checkpoint_that_the_system_cannot_read_is_not_called_damaged(
    tmp_path, state, monkeypatch, number, tensorstore
):
    """To remove it, as is right for a damaged one, would lose it."""
    write_run(tmp_path / "run", state, {3: None})

    def fail(*args, **kwargs):
        if tensorstore:
            raise ValueError(f"INTERNAL: Error reading local file: Failed to open [os_error_code='{number}']")
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(ocp.PyTreeCheckpointHandler, "restore", fail)
    where = tmp_path / "run" / FOLDER / "3"
    with pytest.raises(OSError, match=f"^checkpoint {where} cannot be read: {os.strerror(number)}.$"):
        read_model(tmp_path / "run")


@pytest.mark.slow
def test_a_disk_that_is_full_leaves_one_error_and_no_echo(tmp_path):
    """TensorStore, Orbax and asyncio each tell of a write that failed, some of them at the very end of the process."""
    program = tmp_path / "program.py"
    program.write_text(
        "import resource, signal, sys\n"
        "import numpy as np, orbax.checkpoint as ocp\n"
        "import test_checkpoint as tests\n"
        "from sora_jax.training.checkpoint import Checkpointer\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "state = tests.state.__wrapped__()\n"
        "checkpointer = Checkpointer(sys.argv[1], 9, track_best=False)\n"
        "checkpointer.save(1, state, {})\n"
        "checkpointer.wait()\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "try:\n"
        "    checkpointer.save(2, state, {})\n"
        "    checkpointer.close()\n"
        "except OSError as error:\n"
        "    print(error, file=sys.stderr)\n"
    )
    run = tmp_path / "run"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    out = subprocess.run([sys.executable, program, run], env=environment, capture_output=True, text=True)
    told = [line for line in out.stderr.splitlines(True) if "Waiting for previous save" not in line]
    assert "".join(told) == (
        f"a checkpoint cannot be written to {run / FOLDER} (File too large); the last whole checkpoint is step 1.\n"
    )


def test_another_model_is_named(tmp_path, state):
    write_run(tmp_path / "run", state, {1: None})
    checkpointer = Checkpointer(tmp_path / "run", keep=1)
    wider = abstract(state)
    wider.params["head"]["bias"] = jax.ShapeDtypeStruct((7,), np.float32, sharding=DEVICE)
    with pytest.raises(ValueError, match=r"head.bias has shape \(4,\), the config asks \(7,\)"):
        checkpointer.restore(wider)
    checkpointer.close()


def test_load_model_reads_runs_steps_and_exports(tmp_path, state):
    run = tmp_path / "run"
    write_run(run, state, {1: None, 2: None})
    for path in (run, run / FOLDER / "1", str(run)):
        config, params = read_model(path)
        assert config == CONFIG
        equal(params, state.ema_params)
    equal(read_model(run, averaged=False)[1], state.params)
    export_model(tmp_path / "exported", *read_model(run))
    config, params = read_model(tmp_path / "exported")
    assert config == CONFIG
    equal(params, state.ema_params)


@pytest.mark.parametrize(("dtype", "precision"), [("bfloat16", 2**-8), ("float16", 2**-11)])
def test_export_in_half_the_size(tmp_path, state, dtype, precision):
    for name in (dtype, "float32"):
        export_model(tmp_path / name, CONFIG, state.params, name)
    full, half = ((tmp_path / name / "model.safetensors").stat().st_size for name in ("float32", dtype))
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    assert abs(full - half - 2 * count) < 200  # two bytes a number; the header names the dtypes
    params = read_model(tmp_path / dtype)[1]
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(params))
    chex.assert_trees_all_close(params, state.params, rtol=precision, atol=1e-6)


def test_export_of_kernels_in_eight_bits(tmp_path, state):
    params = jax.tree.map(lambda x: x + 0.1 * np.random.default_rng(0).standard_normal(x.shape), state.params)
    export_model(tmp_path, CONFIG, params, "int8")
    stored = safetensors.numpy.load_file(tmp_path / "model.safetensors")
    # A row of 32 numbers in a group of its own; a row of 4 (the patch) fills no eight codes and stays as it is.
    assert stored["blocks.mlp.mlp.fc1.kernel.codes8"].shape == (2, 16, 1, 32)
    assert stored["blocks.mlp.mlp.fc1.kernel.scale"].shape == (2, 16, 1)
    assert stored["head.kernel"].dtype == stored["blocks.modulation"].dtype == np.float32
    read, exact = flat_names(read_model(tmp_path)[1]), flat_names(params)
    assert all(leaf.dtype == np.float32 for leaf in read.values())
    for name, value in exact.items():
        if f"{name}.codes8" in stored:  # half a step of the grid, and what float16 rounds the scale by
            bound = 0.51 / 127 * np.abs(value).max(axis=-1, keepdims=True) + 1e-7
            assert (np.abs(read[name] - value) <= bound).all() and (read[name] != value).any()
        else:
            np.testing.assert_array_equal(read[name], value.astype(np.float32))


def test_bad_models_are_named(tmp_path, state):
    with pytest.raises(FileNotFoundError, match="no run, checkpoint or exported model at"):
        read_model(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no config.json"):
        read_model(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_text(to_json(CONFIG))
    with pytest.raises(FileNotFoundError, match="without checkpoints"):
        read_model(tmp_path / "empty")

    params = {**state.params}
    params.pop("head")
    with pytest.raises(ValueError, match=r"lacks parameter head\.bias"):
        export_model(tmp_path / "part", CONFIG, params)
    assert not (tmp_path / "part").exists()
    with pytest.raises(ValueError, match=r"storage_dtype must be one of .* got 'int4'"):
        export_model(tmp_path / "part", CONFIG, state.params, "int4")
    huge = jax.tree.map(lambda x: x * 1e6, state.params)
    with pytest.raises(ValueError, match="cannot be stored as float16"):
        export_model(tmp_path / "part", CONFIG, huge, "float16")
    infinite = jax.tree.map(lambda x: np.full_like(x, np.inf), state.params)
    with pytest.raises(ValueError, match=r"parameter \S+ cannot be stored as int8"):
        export_model(tmp_path / "part", CONFIG, infinite, "int8")

    (tmp_path / "run" / FOLDER).mkdir(parents=True)
    with pytest.raises(ValueError, match=r"holds a run, .* choose another --output"):
        export_model(tmp_path / "run", CONFIG, state.params)
    assert not (tmp_path / "run" / "config.json").exists()

    export_model(tmp_path / "exported", CONFIG, state.params)
    text = json.loads((tmp_path / "exported" / "config.json").read_text())
    text["model"]["mlp_dim"] = 33
    (tmp_path / "exported" / "config.json").write_text(json.dumps(text))
    with pytest.raises(ValueError, match=r"is of another model: blocks\.mlp\.mlp\.fc1\.bias has shape"):
        read_model(tmp_path / "exported")
    weights: pathlib.Path = tmp_path / "exported" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        read_model(tmp_path / "exported")
    safetensors.numpy.save_file({name: np.zeros(1, np.float32) for name in ("a", "a-b", "a.b")}, weights)
    with pytest.raises(ValueError, match=r"model\.safetensors: a is a tensor and also the beginning of other"):
        read_model(tmp_path / "exported")
