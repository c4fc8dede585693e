"""What chips can hold and compute, by `jax.Device.device_kind` (vendors' data sheets and Google's architecture pages).

A device is what JAX calls one, and not always a chip. A TPU7x is two. A TPU v4 is one on a machine, whose cores work as
one, and two in a topology that is compiled for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """A kind of chip.

    Attributes:
        peak_flops: dense bfloat16 peak in FLOP/s.
        hbm_bytes: memory of one that programs are compiled for without it, else None.
        num_devices: that it always is.
    """

    peak_flops: float
    hbm_bytes: int | None = None
    num_devices: int = 1


CHIPS: dict[str, Chip] = {
    "TPU v4": Chip(275e12, 32 * GIB),
    "TPU v5 lite": Chip(197e12, 16 * GIB),
    "TPU v5e": Chip(197e12, 16 * GIB),
    "TPU v5": Chip(459e12, 95 * GIB),
    "TPU v5p": Chip(459e12, 95 * GIB),
    "TPU v6 lite": Chip(918e12, 32 * GIB),
    "TPU v6e": Chip(918e12, 32 * GIB),
    "TPU7x": Chip(2307e12, 192 * GIB, num_devices=2),
    "NVIDIA A100-SXM4-40GB": Chip(312e12),
    "NVIDIA A100-SXM4-80GB": Chip(312e12),
    "NVIDIA H100 80GB HBM3": Chip(989e12),
    "NVIDIA H200": Chip(989e12),
}


def peak_flops(devices: Sequence[jax.Device]) -> float | None:
    """Returns the bfloat16 peak of a device in FLOP/s, or None where it is not known (CPUs among them).

    Args:
        devices: of one kind; which chips they lie on tells what share of a chip one is.
    """
    chip = CHIPS.get(devices[0].device_kind)
    return None if chip is None else chip.peak_flops / _devices_of_chip(chip, devices)


def hbm_bytes(devices: Sequence[jax.Device]) -> int | None:
    """Returns the memory of a device, or None where it is not known; see `peak_flops`."""
    chip = CHIPS.get(devices[0].device_kind)
    return None if chip is None or chip.hbm_bytes is None else chip.hbm_bytes // _devices_of_chip(chip, devices)


def _devices_of_chip(chip: Chip, devices: Sequence[jax.Device]) -> int:
    """Returns how many devices a chip is: TPUs number the cores that are devices of their own."""
    cores = 1 + max(getattr(device, "core_on_chip", 0) for device in devices)
    return max(cores, chip.num_devices)
