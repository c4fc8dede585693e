import pytest

from sora_jax.config import MeshConfig
from sora_jax.parallel.mesh import check_batch_size, mesh_shape


@pytest.mark.parametrize(
    ("config", "devices", "shape"),
    [
        (MeshConfig(), 1, {"data": 1, "fsdp": 1}),
        (MeshConfig(), 8, {"data": 8, "fsdp": 1}),
        (MeshConfig(data=-1, fsdp=4), 8, {"data": 2, "fsdp": 4}),
        (MeshConfig(data=2, fsdp=-1), 8, {"data": 2, "fsdp": 4}),
        (MeshConfig(data=2, fsdp=4), 8, {"data": 2, "fsdp": 4}),
    ],
)
def test_shapes(config, devices, shape):
    assert mesh_shape(config, devices) == shape


@pytest.mark.parametrize("config", [MeshConfig(data=-1, fsdp=3), MeshConfig(data=2, fsdp=2), MeshConfig(4, 4)])
def test_sizes_that_do_not_fit_are_named(config):
    with pytest.raises(ValueError, match=rf"mesh.fsdp {config.fsdp} do not fit 8 devices"):
        mesh_shape(config, 8)


def test_batch_must_split_evenly():
    check_batch_size(16, {"data": 2, "fsdp": 4})
    with pytest.raises(ValueError, match=r"data.batch_size must be a multiple of the 8 devices .* got 12"):
        check_batch_size(12, {"data": 2, "fsdp": 4})
