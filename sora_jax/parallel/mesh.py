"""The named device mesh: its axes are `data` (the batch) and `fsdp` (the batch and the parameters)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from sora_jax.config import MeshConfig

MESH_AXES = ("data", "fsdp")


def mesh_shape(config: MeshConfig, num_devices: int) -> dict[str, int]:
    """Returns the size of each mesh axis.

    Args:
        config: sizes, of which one may be -1: the devices that are left.
        num_devices: of all hosts together.

    Raises:
        ValueError: sizes that do not multiply to `num_devices`.
    """
    sizes = {axis: getattr(config, axis) for axis in MESH_AXES}
    fixed = math.prod(size for size in sizes.values() if size != -1)
    fits = num_devices % fixed == 0 if -1 in sizes.values() else num_devices == fixed
    if not fits:
        wanted = ", ".join(f"mesh.{axis} {size}" for axis, size in sizes.items())
        raise ValueError(f"{wanted} do not fit {num_devices} devices; their product must be {num_devices}.")
    return {axis: num_devices // fixed if size == -1 else size for axis, size in sizes.items()}


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Returns the mesh over `devices` (all devices of all hosts by default); raises like `mesh_shape`."""
    devices = jax.devices() if devices is None else list(devices)
    shape = mesh_shape(config, len(devices))
    if devices[0].device_kind == "TPU v4" and any(device.core_on_chip for device in devices):
        # Half chips, as there are in topologies that are compiled for: JAX lays out whole v4 chips only.
        places = np.array(devices).reshape(tuple(shape.values()))
        return Mesh(places, tuple(shape), axis_types=(AxisType.Auto,) * len(shape))
    return jax.make_mesh(tuple(shape.values()), tuple(shape), axis_types=(AxisType.Auto,) * len(shape), devices=devices)


def check_batch_size(batch_size: int, shape: dict[str, int]) -> None:
    """Raises ValueError where the rows of a batch cannot be split evenly over the mesh."""
    devices = math.prod(shape.values())
    if batch_size % devices:
        raise ValueError(
            f"data.batch_size must be a multiple of the {devices} devices that it is split over, got {batch_size}."
        )
