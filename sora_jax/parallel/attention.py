"""The one place that chooses an attention kernel: by its name, the platform that is compiled for, and the rows.

All kernels compute the same (`sora_jax.models.attention`). A config names one:

    xla        the whole matrix of scores
    blockwise  blocks of it, without those of other segments; memory grows with a row's length, not its square
    splash     JAX's Pallas kernel for TPUs, which holds no matrix either
    auto       xla while a row has at most `DENSE_KEYS` keys, whose matrix is small, and beyond splash on a TPU and
               blockwise elsewhere; on a CPU blockwise from the first key on, where rows are packed

On a CPU, leaving out other segments' blocks is what makes packed rows cheap; where a row is one segment, nothing can
be left out. With a bias auto is xla: a bias is as large as the matrix.

On a GPU blockwise computes many blocks at a time. No fused kernel stands there in its place: cuDNN's attention, as
`jax.nn.dot_product_attention` calls it, takes lengths of rows or a whole mask, which is the matrix again, and Pallas'
one takes the ids of self-attention alone.
"""

from __future__ import annotations

import functools
from typing import Any, Literal, get_args

import jax
from jax.sharding import Mesh

from sora_jax.array_types import Array
from sora_jax.models.attention import AttentionFn, xla_attention
from sora_jax.models.blockwise_attention import blockwise_attention
from sora_jax.parallel.splash import splash_attention

DENSE_KEYS = 1024  # 16 heads of as many queries and keys are 64 MiB of weights a row
GPU_BLOCKS = 1024  # at a time: 64 K queries, whose scores of a block of keys are 16 MiB a head

Kernel = Literal["xla", "blockwise", "splash"]
NAMES = ("auto", *get_args(Kernel))


def attention_for(name: str, mesh: Mesh | None = None, platform: str | None = None, packed: bool = True) -> AttentionFn:
    """Returns the attention kernel for a model, in training, sampling and planning alike.

    Args:
        name: of the kernel, as a config gives it.
        mesh: the rows are split over its axes `data` and `fsdp`; None for rows on one device.
        platform: that is compiled for, which need not be this machine's: `cpu`, `gpu` or `tpu`; None for the mesh's,
            or JAX's default without a mesh.
        packed: whether rows hold several segments.

    Raises:
        ValueError: an unknown name, or `splash` for another platform than a TPU.
    """
    if platform is None:
        platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    if name not in NAMES:
        raise ValueError(f"attention must be one of {', '.join(NAMES)}, got {name!r}.")
    if name == "splash" and platform != "tpu":
        raise ValueError(f"attention splash needs TPUs, got {platform}; attention auto works everywhere.")
    return _attention(name, mesh, platform, packed)


def kernel_of(name: str, platform: str, num_keys: int, packed: bool = True, biased: bool = False) -> Kernel:
    """Returns the name of the kernel that a config's name stands for; see the module.

    Args:
        name: of the kernel, as a config gives it.
        platform: that is compiled for.
        num_keys: of a row.
        packed: whether rows hold several segments.
        biased: whether there is a bias.
    """
    if name != "auto":
        return name
    if biased:
        return "xla"
    if platform == "cpu" and packed:
        return "blockwise"
    if num_keys <= DENSE_KEYS:
        return "xla"
    return "splash" if platform == "tpu" else "blockwise"


@functools.cache  # equal kernels are one function, and models with them equal
def _attention(name: str, mesh: Mesh | None, platform: str, packed: bool) -> AttentionFn:
    """Returns what `attention_for` does."""
    if name != "auto":
        return _kernel(name, mesh, platform)

    def attend(
        q: Array, k: Array, v: Array, query_ids: Array, key_ids: Array, *, bias: Array | None = None, **options: Any
    ) -> Array | tuple[Array, Array]:
        chosen = kernel_of(name, platform, k.shape[1], packed, bias is not None)
        return _kernel(chosen, mesh, platform)(q, k, v, query_ids, key_ids, bias=bias, **options)

    return attend


def _kernel(name: Kernel, mesh: Mesh | None, platform: str) -> AttentionFn:
    """Returns a kernel by its own name."""
    if name == "xla":
        return xla_attention
    if name == "splash":
        return splash_attention(mesh)
    return functools.partial(blockwise_attention, side_by_side=GPU_BLOCKS) if platform == "gpu" else blockwise_attention
