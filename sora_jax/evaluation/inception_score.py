"""The Inception Score (arXiv:1606.03498): how sure a classifier is of each sample, and how unlike the samples are.

(1)  IS = exp( mean over x of  KL( p(y | x) || p(y) ) ),   p(y) = mean over x of p(y | x)
"""

from __future__ import annotations

import numpy as np

from sora_jax.array_types import Float

SPLIT_SIZE = 5000


def inception_score(logits: Float[np.ndarray, "samples classes"], *, split_size: int = SPLIT_SIZE) -> float:
    """Returns the mean of equation 1 over consecutive splits of the samples, in float64.

    guided-diffusion's evaluator splits in this way, 50,000 samples into ten. Fewer samples in a split give a lower
    score, and so does an order by class.

    Args:
        logits: (N, classes).
        split_size: samples of a split; what is left over is a shorter one.

    Raises:
        ValueError: another shape, no samples, or a value that is not finite.
    """
    logits = np.asarray(logits)
    if logits.ndim != 2 or not logits.size:
        raise ValueError(f"logits must be (samples, classes) of at least one each, got shape {logits.shape}.")
    if split_size < 1:
        raise ValueError(f"split_size must be at least 1, got {split_size}.")
    if not np.isfinite(logits).all():
        raise ValueError("logits must be finite.")
    scores = []
    for start in range(0, len(logits), split_size):
        part = logits[start : start + split_size].astype(np.float64)
        part -= part.max(axis=1, keepdims=True)
        log_sums = np.log(np.exp(part).sum(axis=1, keepdims=True))
        log_p = part - log_sums
        p = np.exp(log_p)
        marginal = p.mean(axis=0)  # 0 only where all p of a class are, and then they count 0
        log_marginal = np.log(np.where(marginal > 0, marginal, 1.0))
        scores.append(np.exp((p * (log_p - log_marginal)).sum(axis=1).mean()))
    return float(np.mean(scores))
