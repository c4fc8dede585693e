"""Rounding a matrix so that its products, rather than its entries, stay close: GPTQ (arXiv:2210.17323).

For inputs X (n, in) and a kernel W (in, out), rows of W are rounded one after another, and the rows not yet rounded
take up the error so as to minimise |X W - X Q|^2:

    (1)  H = X^T X + damping mean(diag X^T X) I,   U = the upper Cholesky factor of H^-1
    (2)  W_j <- W_j - (U_ij / U_ii) (W_i - Q_i)    for rows j > i, once row i is rounded to Q_i
"""

from __future__ import annotations

import numpy as np

from sora_jax.array_types import NumpyArray
from sora_jax.models.quantize import dequantize, quantize


def compensated_rounding(
    kernel: NumpyArray, second_moment: NumpyArray, bits: int, group: int, damping: float = 0.1
) -> NumpyArray:
    """Rounds a kernel to the grid of `quantize`, equations 1 and 2.

    Args:
        kernel: (in, out) float.
        second_moment: (in, in) float, X^T X of the inputs that the kernel meets.
        bits: of the grid.
        group: of the grid; a divisor of `out`.
        damping: share of the mean diagonal that is added to it; larger trusts the inputs less.

    Returns:
        (in, out) float32, which `quantize` stores without further error.

    Raises:
        ValueError: shapes that do not fit, or a damping that is not positive.
    """
    size = len(kernel)
    if second_moment.shape != (size, size):
        raise ValueError(f"second_moment must be {(size, size)}, got {second_moment.shape}.")
    if damping <= 0:
        raise ValueError(f"damping must be positive, got {damping}.")
    moment = second_moment.astype(np.float64)
    hessian = moment + np.eye(size) * (damping * np.trace(moment) / size)
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
    spread = (upper / np.diag(upper)[:, None]).astype(np.float32)
    rounded = np.array(kernel, np.float32)
    for i in range(size):
        row = dequantize(*quantize(rounded[i], bits, group), bits)
        rounded[i + 1 :] -= spread[i, i + 1 :, None] * (rounded[i] - row)
        rounded[i] = row
    return rounded
