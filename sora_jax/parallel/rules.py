"""Which mesh axes each logical axis of an array is split over: one table, and the shardings that follow from it.

Models name the logical axes of their parameters and know no mesh; a mesh is made elsewhere. This table is the only
place where the two meet.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from sora_jax.array_types import PyTree

Rules = Mapping[str, tuple[str, ...]]

# The width of a token (of a pixel, in convolutions) is the one axis that every large kernel has, so splitting it alone
# shares out all of them. Where a layer has it on both sides, its output goes by what it is there.
LOGICAL_RULES: Rules = {
    "batch": ("data", "fsdp"),
    "layers": (),  # of a scan
    "width": ("fsdp",),
    "channels": (),  # that a layer puts out as wide as what it takes in, which is "width"
    "heads_width": (),  # heads times their size: queries, keys, values and what comes out of attention
    "head_dim": (),  # of one head
    "mlp": (),  # hidden layer of an MLP
    "conditioning": (),  # embedding of a noise level
    "modulation": (),  # shifts, scales and gates that are projected from it
    "parts": (),  # rows of a table of such vectors
    "features": (),  # sinusoids (or bumps) of a time or a place
    "patch": (),  # values of a patch or a pixel
    "text": (),  # token states of the text encoder
    "text_width": (),  # what they become in the model
    "classes": (),
    "representation": (),  # hidden layer of a ViT's head
    "embedding": (),  # of images and captions, in one space
}


def partition_spec(names: Sequence[str | None], rules: Rules = LOGICAL_RULES) -> PartitionSpec:
    """Returns how an array with these logical axes is split.

    Args:
        names: one a dimension; None is not split.
        rules: from logical axis to mesh axes.

    Raises:
        ValueError: a name that the rules do not have, or a mesh axis that two dimensions would be split over.
    """
    for name in names:
        if name is not None and name not in rules:
            raise ValueError(f"unknown logical axis {name!r} in {tuple(names)}; the rules have {', '.join(rules)}.")
    axes = [() if name is None else rules[name] for name in names]
    used = [axis for dimension in axes for axis in dimension]
    for axis in used:
        if used.count(axis) > 1:
            raise ValueError(f"mesh axis {axis!r} would split two dimensions of an array with axes {tuple(names)}.")
    return PartitionSpec(*(None if not a else a[0] if len(a) == 1 else a for a in axes))


def param_shardings(boxed_params: PyTree, mesh: Mesh | AbstractMesh, rules: Rules = LOGICAL_RULES) -> PyTree:
    """Returns the sharding of every parameter.

    Args:
        boxed_params: what a model's `init` gives (or `jax.eval_shape` of it): leaves boxed by
            `nn.with_logical_partitioning`, whose names say how they are split; unboxed leaves are copied to all
            devices.
        mesh: the mesh; one without devices suffices to see what it would split.
        rules: from logical axis to mesh axes.

    Returns:
        A tree of `NamedSharding` in the shape of the unboxed parameters.

    Raises:
        ValueError: like `partition_spec`, or a dimension that its mesh axes do not divide, naming the parameter.
    """

    def sharding(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        if not isinstance(leaf, nn.LogicallyPartitioned):
            return NamedSharding(mesh, PartitionSpec())
        spec = partition_spec(leaf.names, rules)
        result = NamedSharding(mesh, spec)
        try:
            result.shard_shape(leaf.value.shape)
        except ValueError as error:
            sizes = dict(mesh.shape)
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            raise ValueError(
                f"parameter {name} of shape {tuple(leaf.value.shape)} with axes {leaf.names} cannot be split evenly "
                f"as {spec} over the mesh {sizes}."
            ) from error
        return result

    return jax.tree_util.tree_map_with_path(
        sharding, boxed_params, is_leaf=lambda leaf: isinstance(leaf, nn.LogicallyPartitioned)
    )


def batch_sharding(mesh: Mesh, stacked: bool = False, rules: Rules = LOGICAL_RULES) -> NamedSharding:
    """Returns the sharding of an array whose leading axis is the batch (the second, where batches are `stacked`)."""
    return NamedSharding(mesh, partition_spec((None, "batch") if stacked else ("batch",), rules))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())
