"""No TPU is looked for where nothing speaks for one, and none is ever hidden."""

import importlib.metadata
import importlib.util
import os
import sys
import types

import pytest

from sora_jax.parallel.platform import may_have_tpu, skip_missing_tpu


def pci(root, vendor, kind):
    folder = root / "sys/bus/pci/devices/0000:00:05.0"
    folder.mkdir(parents=True)
    (folder / "vendor").write_text(f"{vendor}\n")
    (folder / "class").write_text(f"{kind}\n")


@pytest.mark.parametrize("device", ["dev/accel0", "dev/vfio/0", "dev/vfio/12"])
def test_device_files_speak_for_a_tpu(tmp_path, device):
    assert not may_have_tpu(str(tmp_path), {})
    (tmp_path / device).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "dev/vfio").mkdir(exist_ok=True)
    (tmp_path / "dev/vfio/vfio").touch()  # any machine has it where the driver is loaded
    (tmp_path / "dev/accel").mkdir()
    (tmp_path / "dev/accel/accel0").touch()  # what Linux calls other makers' accelerators
    assert not may_have_tpu(str(tmp_path), {})
    (tmp_path / device).touch()
    assert may_have_tpu(str(tmp_path), {})


@pytest.mark.parametrize(
    ("vendor", "kind", "found"),
    [
        ("0x1ae0", "0x120000", True),  # a chip
        ("0x1ae0", "0x088000", True),
        ("0x1ae0", "0x020000", False),  # gVNIC, a network card of any Google machine
        ("0x1ae0", "0x010802", False),  # and a disk
        ("0x10de", "0x030200", False),  # somebody else's
    ],
)
def test_chips_on_the_bus_speak_for_a_tpu(tmp_path, vendor, kind, found):
    pci(tmp_path, vendor, kind)
    assert may_have_tpu(str(tmp_path), {}) == found


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("TPU_WORKER_ID", True),
        ("TPU_ACCELERATOR_TYPE", True),
        ("CLOUD_TPU_TASK_ID", True),
        ("JAX_FORCE_TPU_INIT", True),
        ("TPU_SKIP_MDS_QUERY", False),  # JAX sets it itself where it sees no chip
        ("TPU_LIBRARY_PATH", False),
        ("HOME", False),
    ],
)
def test_the_environment_speaks_for_a_tpu(tmp_path, name, found):
    assert may_have_tpu(str(tmp_path), {name: "0"}) == found


@pytest.fixture
def machine(monkeypatch):
    """A machine with libtpu, without plugins, JAX imported and not told what to use."""
    installed, config = {"libtpu"}, types.SimpleNamespace(jax_platforms=None)
    config.update = lambda name, value: setattr(config, name, value)
    monkeypatch.setitem(sys.modules, "jax", types.SimpleNamespace(config=config))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name if name in installed else None)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: ())
    monkeypatch.setattr("sora_jax.parallel.platform.may_have_tpu", lambda: False)
    for name in ("JAX_PLATFORMS", "TPU_LIBRARY_PATH"):
        monkeypatch.delenv(name, raising=False)
    return types.SimpleNamespace(installed=installed, config=config)


def test_the_cpu_is_chosen_where_there_is_nothing_else(machine, monkeypatch):
    assert skip_missing_tpu() and machine.config.jax_platforms == "cpu"
    assert not skip_missing_tpu()  # it is chosen already
    monkeypatch.delitem(sys.modules, "jax")
    monkeypatch.setenv("JAX_PLATFORMS", "to be restored")
    monkeypatch.delenv("JAX_PLATFORMS")
    assert skip_missing_tpu()
    assert os.environ["JAX_PLATFORMS"] == "cpu"  # for the JAX that is imported later


@pytest.mark.parametrize("reason", ["tpu", "gpu", "plugin", "user", "automatic", "config", "no libtpu"])
def test_nothing_is_done_otherwise(machine, monkeypatch, reason):
    if reason == "tpu":
        monkeypatch.setattr("sora_jax.parallel.platform.may_have_tpu", lambda: True)
    elif reason == "gpu":
        machine.installed.add("jax_plugins")
    elif reason == "plugin":
        monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: ("a device",))
    elif reason in ("user", "automatic"):
        monkeypatch.setenv("JAX_PLATFORMS", "tpu" if reason == "user" else "")
    elif reason == "config":
        machine.config.jax_platforms = "tpu,cpu"  # as JAX sets it on a TPU machine
    else:
        machine.installed.clear()
    before = machine.config.jax_platforms
    assert not skip_missing_tpu()
    assert machine.config.jax_platforms == before
