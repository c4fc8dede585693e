"""Which platform JAX starts on, where `libtpu` is installed and there is no TPU.

JAX then loads libtpu, which looks for chips, writes a page of errors and gives up, before JAX takes the CPU. A process
that runs on nothing but the CPU can say so beforehand.
"""

from __future__ import annotations

import glob
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Mapping

GOOGLE = "0x1ae0"  # PCI vendor, also of the virtual disks and network cards of its machines without a TPU
DISK_OR_NETWORK = ("0x01", "0x02")  # first byte of a PCI class
# Environment variables that begin like those of a TPU machine and say nothing of chips; JAX sets the first itself.
_SAY_NOTHING = ("TPU_SKIP_MDS_QUERY", "TPU_LIBRARY_PATH", "TPU_MIN_LOG_LEVEL", "TPU_STDERR_LOG_LEVEL")


def skip_missing_tpu() -> bool:
    """Makes this process use the CPU where JAX could use nothing else but would look for a TPU first.

    To be called before JAX has started its backends. Nothing is done where `JAX_PLATFORMS` (or JAX's config) names a
    platform, without libtpu, where there may be a TPU (`may_have_tpu`), or with a plugin for GPUs or other devices,
    which JAX is left to choose from.

    Returns:
        Whether it was done.
    """
    jax = sys.modules.get("jax")
    if "JAX_PLATFORMS" in os.environ or (jax is not None and jax.config.jax_platforms):
        return False
    if not (importlib.util.find_spec("libtpu") or "TPU_LIBRARY_PATH" in os.environ):
        return False
    if (
        may_have_tpu()
        or importlib.util.find_spec("jax_plugins")
        or importlib.metadata.entry_points(group="jax_plugins")
    ):
        return False
    if jax is None:
        os.environ["JAX_PLATFORMS"] = "cpu"
    else:  # it has read the environment already
        jax.config.update("jax_platforms", "cpu")
    return True


def may_have_tpu(root: str = "/", environment: Mapping[str, str] = os.environ) -> bool:
    """Returns whether anything speaks for a TPU: a device file, a chip on the PCI bus, or variables of a TPU machine.

    Args:
        root: of the file system.
        environment: variables by name.
    """
    prefixes = ("TPU_", "CLOUD_TPU_", "JAX_FORCE_TPU_INIT")
    if any(name.startswith(prefixes) and name not in _SAY_NOTHING for name in environment):
        return True
    devices = ("dev/accel[0-9]*", "dev/vfio/[0-9]*")
    if any(glob.glob(os.path.join(root, pattern)) for pattern in devices):
        return True
    return any(map(_may_be_tpu, glob.glob(os.path.join(root, "sys/bus/pci/devices/*"))))


def _may_be_tpu(device: str) -> bool:
    """Returns whether a folder of the PCI bus is of a device of Google's that is neither a disk nor a network card."""
    try:
        with open(os.path.join(device, "vendor")) as vendor, open(os.path.join(device, "class")) as kind:
            return vendor.read().strip() == GOOGLE and not kind.read().startswith(DISK_OR_NETWORK)
    except OSError:  # nothing is known of it
        return False
