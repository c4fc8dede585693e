"""Random parameters."""

import jax
import numpy as np
from flax.core import meta


def random_tree(shapes, mean=0.1, std=0.3, seed=0):
    """Returns a tree of some shapes, boxed or not, in which nothing is zero, one or symmetric.

    At the initialisation, gates that are closed and heads that are zero would let any mask pass.
    """
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.normal(mean, std, leaf.shape).astype(np.float32), meta.unbox(shapes))
