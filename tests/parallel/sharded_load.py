"""Loads models (arguments) onto eight devices and without a mesh; prints how the two compare, as JSON."""

import json
import sys

import chex
import jax
import numpy as np

from sora_jax import load
from sora_jax.config import MeshConfig
from sora_jax.parallel.mesh import make_mesh

mesh = make_mesh(MeshConfig(data=2, fsdp=4))
found = {}
for path in sys.argv[1:]:
    whole, shared, half = load(path), load(path, mesh), load(path, mesh, "bfloat16")
    chex.assert_trees_all_equal(shared.params, whole.params)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, b.astype(a.dtype)), half.params, whole.params)
    leaves = jax.tree.leaves(shared.params)
    split = [leaf.addressable_shards[0].data.size / leaf.size for leaf in leaves]
    found[path] = {
        "devices": sorted({len(leaf.sharding.device_set) for leaf in leaves}),
        "share_of_the_largest": split[int(np.argmax([leaf.size for leaf in leaves]))],
        "dtypes": sorted({str(leaf.dtype) for loaded in (shared, half) for leaf in jax.tree.leaves(loaded.params)}),
    }
print(json.dumps(found))
