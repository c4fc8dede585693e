"""The Frechet distance between Gaussians fitted to features (arXiv:1706.08500), and their statistics as a stream.

A set of n features has the mean m and the scatter S, from which its covariance is S / (n - 1), as `np.cov` has it:

(1)  m = sum_i x_i / n,   S = sum_i (x_i - m) (x_i - m)^T
(2)  of sets a and b together, d = m_b - m_a,   m = m_a + d n_b / n,   S = S_a + S_b + d d^T n_a n_b / n
(3)  d^2 = |m_1 - m_2|^2 + Tr C_1 + Tr C_2 - 2 Tr (C_1 C_2)^(1/2)
(4)  Tr (C_1 C_2)^(1/2) = sum of the singular values of A_1^T A_2,   C_i = A_i A_i^T

Equation 2 (Chan, Golub and LeVeque 1979) has errors in proportion to the covariance, whatever the mean; the sums of x
and of x x^T lose the digits that the mean takes, and sums about a shift need one that all hosts agree on beforehand.
It is commutative, and associative up to rounding, so chunks, devices and hosts merge in any order.

Equation 4 takes no root of a matrix that is not symmetric. Covariances may be singular: nothing is added to their
diagonals, where pytorch-fid adds 1e-6 if its root fails.
"""

from __future__ import annotations

import dataclasses
import warnings
import zipfile
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from etils import epath

from sora_jax.array_types import Float, NumpyArray
from sora_jax.files import writing

# A covariance that was stored as float32 has eigenvalues down to about -5e-6 of the largest, for 2048 features.
NEGATIVE_TOLERANCE = 1e-5


class Moments(NamedTuple):
    """A Gaussian.

    Attributes:
        mean: (D,) float64.
        covariance: (D, D) float64.
    """

    mean: Float[np.ndarray, " dim"]
    covariance: Float[np.ndarray, "dim dim"]


@dataclasses.dataclass(frozen=True)
class FeatureStatistics:
    """Count, mean and scatter of the features seen so far (equation 1).

    Attributes:
        count: n, 0 at the beginning.
        mean: (D,) float64.
        scatter: (D, D) float64, S.
    """

    count: int
    mean: Float[np.ndarray, " dim"]
    scatter: Float[np.ndarray, "dim dim"]

    @classmethod
    def empty(cls, dim: int) -> FeatureStatistics:
        """Returns the statistics of no features of `dim` values."""
        return cls(0, np.zeros(dim), np.zeros((dim, dim)))

    @classmethod
    def of(cls, features: Float[np.ndarray, "count dim"]) -> FeatureStatistics:
        """Returns the statistics of one chunk, computed in float64.

        Args:
            features: (n, D), of any float dtype.

        Raises:
            ValueError: another number of axes, or a value that is not finite.
        """
        x = np.asarray(features, np.float64)
        if x.ndim != 2:
            raise ValueError(f"features must be (count, dim), got shape {x.shape}.")
        if not len(x):
            return cls.empty(x.shape[1])
        if not np.isfinite(x).all():
            raise ValueError(f"features must be finite; those of row {np.argwhere(~np.isfinite(x))[0][0]} are not.")
        mean = x.mean(axis=0)
        centred = x - mean
        return cls(len(x), mean, centred.T @ centred)

    def merge(self, other: FeatureStatistics) -> FeatureStatistics:
        """Returns the statistics of both sets together (equation 2).

        Raises:
            ValueError: features of another length.
        """
        if self.mean.shape != other.mean.shape:
            raise ValueError(f"statistics of {len(self.mean)} and of {len(other.mean)} features do not merge.")
        if not self.count or not other.count:
            return self if self.count else other
        count = self.count + other.count
        difference = other.mean - self.mean
        mean = self.mean + difference * (other.count / count)
        between = np.outer(difference, difference) * (self.count * other.count / count)
        return FeatureStatistics(count, mean, self.scatter + other.scatter + between)

    def update(self, features: Float[np.ndarray, "count dim"]) -> FeatureStatistics:
        """Returns the statistics with one more chunk, (n, D); a merge costs D^2, so chunks of tens are worth it."""
        return self.merge(FeatureStatistics.of(features))

    def moments(self) -> Moments:
        """Returns the mean and the unbiased covariance, S / (n - 1).

        Warns:
            UserWarning: no more samples than features, for which the covariance is singular and a distance biased.

        Raises:
            ValueError: fewer than two samples.
        """
        dim = len(self.mean)
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 samples, got {self.count}.")
        if self.count <= dim:
            warnings.warn(
                f"{self.count} samples of {dim} features: the covariance is singular, and a Frechet distance is biased "
                f"upwards; more than {dim} are needed, and 50,000 are usual.",
                stacklevel=2,
            )
        return Moments(self.mean, self.scatter / (self.count - 1))


def frechet_distance(first: Moments, second: Moments) -> float:
    """Returns the squared Frechet distance of two Gaussians (equation 3), the FID of Inception's features.

    Args:
        first: mean (D,) and covariance (D, D), which may be singular.
        second: as well.

    Raises:
        ValueError: shapes that differ, values that are not finite, or a covariance that is not symmetric or has an
            eigenvalue below -`NEGATIVE_TOLERANCE` times the largest.
    """
    for name, moments in (("first", first), ("second", second)):
        _check_moments(name, moments)
    if len(first.mean) != len(second.mean):
        raise ValueError(f"first has {len(first.mean)} features and second {len(second.mean)}; they must be the same.")
    mean1, mean2 = (np.asarray(moments.mean, np.float64) for moments in (first, second))
    factor1, factor2 = (_factor(name, moments) for name, moments in (("first", first), ("second", second)))
    overlap = np.linalg.svd(factor1.T @ factor2, compute_uv=False).sum()
    traces = np.trace(first.covariance, dtype=np.float64) + np.trace(second.covariance, dtype=np.float64)
    return max(float(np.square(mean1 - mean2).sum() + traces - 2 * overlap), 0.0)  # rounding may take it below


def save_moments(
    path: epath.PathLike,
    moments: Mapping[str, Moments],
    features: str,
    pool: Float[np.ndarray, "count dim"] | None = None,
) -> epath.Path:
    """Writes reference statistics as the community's `.npz` files have them.

    Args:
        path: of the file.
        moments: by the suffix of their keys: `""` for `mu` and `sigma`, `"_s"` for `mu_s` and `sigma_s`, which
            guided-diffusion's evaluator has for the spatial features of sFID.
        features: name of the feature network, which stands beside them under the key `features`.
        pool: features of some of the images, for precision and recall; under the key `pool`.

    Returns:
        The path.
    """
    arrays = {"features": np.array(features)} | ({} if pool is None else {"pool": pool})
    for suffix, (mean, covariance) in moments.items():
        arrays |= {f"mu{suffix}": mean, f"sigma{suffix}": covariance}
    with writing(path) as stream:
        np.savez(stream, **arrays)
    return epath.Path(path)


def load_moments(path: epath.PathLike, features: str) -> dict[str, Moments]:
    """Reads reference statistics, of this project or of pytorch-fid, guided-diffusion or ADM.

    Args:
        path: an `.npz` file with `mu` and `sigma`, and `mu_s` and `sigma_s` or not. Other arrays are not read.
        features: name of the feature network that they must be of; a file that does not say is believed.

    Returns:
        The moments, float64, by suffix as `save_moments` takes them.

    Raises:
        FileNotFoundError: no file.
        ValueError: another file, one without statistics, or statistics of other features; the message names the file.
    """
    path = epath.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no reference statistics at {path}.")
    found = {}
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            stored = str(arrays["features"]) if "features" in arrays else features
            if stored != features:
                raise ValueError(f"its statistics are of {stored} features, not of {features}.")
            for suffix in ("", "_s"):
                if f"mu{suffix}" in arrays and f"sigma{suffix}" in arrays:
                    pair = (np.asarray(arrays[f"{name}{suffix}"], np.float64) for name in ("mu", "sigma"))
                    found[suffix] = Moments(*pair)
                    _check_moments(f"mu{suffix} and sigma{suffix}", found[suffix])
        if "" not in found:
            raise ValueError("it holds no mu and sigma.")
    except (ValueError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a file of reference statistics: {error}") from error
    return found


def load_pool(path: epath.PathLike) -> Float[np.ndarray, "count dim"] | None:
    """Returns the features of a file that `save_moments` wrote; None if it holds none."""
    with epath.Path(path).open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
        return arrays["pool"] if "pool" in arrays else None


def _check_moments(name: str, moments: Moments) -> None:
    """Raises ValueError unless the shapes fit, the values are finite and the covariance is symmetric."""
    mean, covariance = (np.asarray(part) for part in moments)
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise ValueError(f"{name} must be a mean (D,) and a covariance (D, D), got {mean.shape}, {covariance.shape}.")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise ValueError(f"{name} must be finite.")
    if not np.allclose(covariance, covariance.T, rtol=0, atol=NEGATIVE_TOLERANCE * np.abs(covariance).max(initial=0)):
        raise ValueError(f"{name} must have a symmetric covariance.")


def _factor(name: str, moments: Moments) -> NumpyArray:
    """Returns A (D, D) with A A^T the covariance, of which rounding's negative eigenvalues are taken for 0."""
    covariance = np.asarray(moments.covariance, np.float64)
    values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
    if values[0] < -NEGATIVE_TOLERANCE * max(values[-1], 0.0):
        raise ValueError(f"{name}'s covariance has the eigenvalue {values[0]:g}; none may be negative.")
    return vectors * np.sqrt(np.maximum(values, 0.0))
