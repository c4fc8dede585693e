import types

import pytest

from sora_jax.training.chips import GIB, hbm_bytes, peak_flops


def devices(kind, cores=(None,)):
    """Devices of a kind: of a TPU's core, or of what numbers none."""
    return [
        types.SimpleNamespace(device_kind=kind, **({} if core is None else {"core_on_chip": core})) for core in cores
    ]


@pytest.mark.parametrize(
    ("kind", "cores", "peak", "gib"),
    [
        ("TPU v4", (0, 0), 275e12, 32),  # a machine's, whose cores work as one
        ("TPU v4", (0, 1), 137.5e12, 16),  # a topology's
        ("TPU7x", (0, 1), 1153.5e12, 96),
        ("TPU7x", (0,), 1153.5e12, 96),
        ("TPU v5 lite", (0,), 197e12, 16),
    ],
)
def test_a_device_has_its_share_of_a_chip(kind, cores, peak, gib):
    assert peak_flops(devices(kind, cores)) == peak
    assert hbm_bytes(devices(kind, cores)) == gib * GIB


def test_what_is_not_known_is_none():
    assert peak_flops(devices("NVIDIA H200")) == 989e12 and hbm_bytes(devices("NVIDIA H200")) is None
    assert peak_flops(devices("cpu")) is hbm_bytes(devices("cpu")) is None
