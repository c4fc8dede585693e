"""How the tests' programs are compiled, and on how many devices those of other processes run."""

import importlib.util
import mmap
import os
import pathlib

QUICK = ("--xla_cpu_use_fusion_emitters=false", "--xla_backend_optimization_level=0")


def compile_quickly():
    """Lets XLA compile for the CPU in less time and memory to slower code, in this process and those that it starts.

    XLA ends the process at a flag that it does not know, so a flag which its library has not is left out.
    """
    libraries = pathlib.Path(importlib.util.find_spec("jaxlib").origin).parent.glob("*.so")
    library = max(libraries, key=lambda path: path.stat().st_size)
    with library.open() as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as text:
        known = [flag for flag in QUICK if text.find(flag.strip("-").split("=")[0].encode()) >= 0]
    os.environ["XLA_FLAGS"] = " ".join([*known, os.environ.get("XLA_FLAGS", "")]).strip()


def on_devices(count):
    """Returns the environment of a process of the tests with several devices, all of them this machine's CPU."""
    devices = f"--xla_force_host_platform_device_count={count}"
    flags = f"{os.environ.get('XLA_FLAGS', '')} {devices}".strip()
    tests = pathlib.Path(__file__).parent.parent
    path = os.pathsep.join([str(tests.parent), str(tests), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": path}
