import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn
from flax.core import meta
from jax.sharding import AbstractMesh, PartitionSpec

from sora_jax.models import unet
from sora_jax.models.sora import SORA_SIZES, SoraTransformer, abstract_params
from sora_jax.parallel.rules import LOGICAL_RULES, param_shardings, partition_spec


def mesh(**shape):
    return AbstractMesh(tuple(shape.values()), tuple(shape))


def test_specs():
    assert partition_spec(("batch", None)) == PartitionSpec(("data", "fsdp"), None)
    assert partition_spec(("layers", "width", "mlp")) == PartitionSpec(None, "fsdp", None)


def test_unknown_axis_is_named():
    with pytest.raises(ValueError, match="unknown logical axis 'wdith'"):
        partition_spec(("wdith",))


def test_two_dimensions_cannot_share_a_mesh_axis():
    with pytest.raises(ValueError, match="mesh axis 'fsdp' would split two dimensions"):
        partition_spec(("batch", "width"))


def test_uneven_parameter_is_named():
    params = {"a": {"kernel": nn.LogicallyPartitioned(jax.ShapeDtypeStruct((6, 2), jnp.float32), ("width", "mlp"))}}
    with pytest.raises(ValueError, match=r"parameter a.kernel of shape \(6, 2\)"):
        param_shardings(params, mesh(data=1, fsdp=4))


@pytest.mark.parametrize(
    "shapes",
    [
        lambda: abstract_params(SoraTransformer(SORA_SIZES["sora_xl"], 64)),
        lambda: unet.abstract_params(unet.UNet(unet.UNetConfig())),
    ],
    ids=["sora_xl", "unet"],
)
def test_large_kernels_of_the_models_are_all_split(shapes):
    shapes = shapes()
    shardings = param_shardings(shapes, mesh(data=2, fsdp=8))
    plain = meta.unbox(shapes)
    whole = [
        (path, leaf.shape)
        for (path, leaf), sharding in zip(
            jax.tree_util.tree_leaves_with_path(plain), jax.tree.leaves(shardings), strict=True
        )
        if "fsdp" not in jax.tree.leaves(tuple(sharding.spec)) and leaf.size > 500_000
    ]
    assert not whole
    assert set(LOGICAL_RULES["batch"]) == {"data", "fsdp"}
