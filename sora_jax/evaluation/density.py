"""Densities that a generative model of images is compared with: a Gaussian, and an autoregressive mixture.

Both are normalised, so that their log-likelihoods of held-out images are exact and comparable with a bound.

(1)  log N(x; mean, C), C the covariance of the training images
(2)  log p(x) = sum over pixels i of log p(x_i | c_i),   c_i the pixels of i's neighbourhood that come before it
(3)  p(x_i | c) = sum_{k, s} g_ks(c) N(x_i; a_k^T c + b_k, 1 / lambda_ks)
     g_ks(c) = softmax over (k, s) of  eta_ks + w_ks^T c - lambda_ks |L_k^T c|^2 / 2

(3) is the mixture of conditional Gaussian scale mixtures, MCGSM, of Theis, Hosseini and Bethge (PLOS ONE 2012), with
w, b and an L for each component k as deviations: theirs follows from a joint density of zero mean. At the edges of an
image the neighbourhood is short. The missing pixels are zeros in c, and c says beside every pixel whether it is
missing, so each conditional is still a density of x_i, and (2) one of the whole image.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm.auto import tqdm

from sora_jax.array_types import Array, Float, PyTree
from sora_jax.config import check

LOG_2 = math.log(2)


class Gaussian(NamedTuple):
    """A Gaussian density of whole images.

    Attributes:
        mean: (D,) float64.
        factor: (D, D) float64, the lower Cholesky factor of the covariance.
    """

    mean: Float[np.ndarray, " dim"]
    factor: Float[np.ndarray, "dim dim"]

    def log_density(self, images: Float[np.ndarray, " count *shape"]) -> Float[np.ndarray, " count"]:
        """Returns the log density of each image by equation 1, in bits an image (float64)."""
        x = np.asarray(images, np.float64).reshape(len(images), -1) - self.mean
        white = np.linalg.solve(self.factor, x.T)  # (D, count)
        nats = -0.5 * (white**2).sum(axis=0) - np.log(np.diag(self.factor)).sum() - 0.5 * x.shape[1] * _LOG_2PI
        return nats / LOG_2


def fit_gaussian(images: Float[np.ndarray, " count *shape"]) -> Gaussian:
    """Returns the maximum likelihood Gaussian with a full covariance.

    Args:
        images: (N, ...), of D values each, N > D. Its held-out likelihood is about D^2 / 4N nats below the best one.

    Raises:
        ValueError: not more images than values, with which the covariance is singular.
    """
    x = np.asarray(images, np.float64).reshape(len(images), -1)
    count, dim = x.shape
    if count <= dim:
        raise ValueError(f"images must be more than their {dim} values, got {count}.")
    mean = x.mean(axis=0)
    return Gaussian(mean, np.linalg.cholesky((x - mean).T @ (x - mean) / count))


@dataclasses.dataclass(frozen=True)
class MCGSMConfig:
    """Size and training of an `MCGSM`.

    Attributes:
        radius: the neighbourhood has the pixels of `radius` rows above and `radius` columns to either side, and those
            of the same row to the left.
        num_components: k of equation 3, each with a predictor of its own.
        num_scales: s, variances of a component.
        num_features: columns of L_k.
        learning_rate: peak of Adam's; it falls to 0 with a cosine.
        num_steps: updates.
        batch_size: images of an update, all of whose pixels count.
    """

    radius: int = 3
    num_components: int = 12
    num_scales: int = 4
    num_features: int = 16
    learning_rate: float = 5e-3
    num_steps: int = 4000
    batch_size: int = 32

    def __post_init__(self) -> None:
        for field in ("radius", "num_components", "num_scales", "num_features", "num_steps", "batch_size"):
            check(getattr(self, field) >= 1, self, field, "at least 1")
        check(self.learning_rate > 0, self, "learning_rate", "positive")


@dataclasses.dataclass(frozen=True)
class MCGSM:
    """A fitted mixture of conditional Gaussian scale mixtures (equations 2 and 3), of images of one channel.

    Attributes:
        config: its size.
        whitening: what makes c white and x_i a residual, fixed before training: `mean` and `transform` of c, and
            `slope`, `offset` and `scale` of the linear prediction of x_i, in whose residual over `scale` (3) is.
        params: of equation 3, in those coordinates.
    """

    config: MCGSMConfig
    whitening: dict[str, Float[np.ndarray, "..."]]
    params: PyTree

    def log_density(self, images: Float[np.ndarray, "count height width 1"]) -> Float[np.ndarray, " count"]:
        """Returns the log density of each image, in bits an image (float64), a sum of those of its pixels."""
        check_images(images)
        pixels = jax.jit(functools.partial(_log_densities, self.config.radius))
        parts = [
            np.asarray(pixels(self.params, self.whitening, jnp.asarray(images[i : i + 256])), np.float64)
            for i in range(0, len(images), 256)
        ]
        return np.concatenate(parts).sum(axis=(1, 2)) / LOG_2


def fit_mcgsm(images: Float[np.ndarray, "count height width 1"], config: MCGSMConfig, seed: int = 0) -> MCGSM:
    """Returns an MCGSM fitted by maximum likelihood: Adam on random batches of images. Shows its progress.

    Args:
        images: (N, H, W, 1) float32.
        config: size and training.
        seed: of the initialisation and the batches.

    Raises:
        ValueError: images of another shape.
    """
    check_images(images)
    rng = np.random.default_rng(seed)
    whitening = _whitening(images[:4096], config.radius)
    dim = whitening["transform"].shape[1]
    k, s = config.num_components, config.num_scales
    params = {
        "predictors": rng.normal(0, 0.01, (dim, k)),
        "biases": np.zeros(k),
        "log_precisions": rng.normal(0, 0.1, (k, s)) + 2.0 * np.arange(s),
        "log_weights": np.zeros((k, s)),
        "linear": rng.normal(0, 0.1, (dim, k, s)),
        "features": rng.normal(0, 0.1, (dim, k, config.num_features)),
    }
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adam(optax.cosine_decay_schedule(config.learning_rate, config.num_steps)),
    )

    @jax.jit
    def update(params: PyTree, state: PyTree, batch: Array) -> tuple[PyTree, PyTree]:
        gradient = jax.grad(lambda p: -_log_densities(config.radius, p, whitening, batch).mean())(params)
        change, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, change), state

    state = optimizer.init(params)
    for _ in tqdm(range(config.num_steps), desc="fitting the MCGSM", unit="update"):
        batch = images[rng.integers(0, len(images), config.batch_size)]
        params, state = update(params, state, batch)
    return MCGSM(config, whitening, jax.device_get(params))


def neighbourhoods(images: Float[Array, "count height width 1"], radius: int) -> Float[Array, "count height width d"]:
    """Returns c of every pixel: its neighbours that come before it in raster order, then 1 for each that is missing.

    Args:
        images: (N, H, W, 1).
        radius: n, of the neighbourhood.

    Returns:
        (N, H, W, 2 D), D = 2 n (n + 1) neighbours, row by row from the farthest above.
    """
    height, width = images.shape[1:3]
    values = jnp.concatenate([images, jnp.zeros_like(images)], axis=-1)
    padded = jnp.pad(values, ((0, 0), (radius, 0), (radius, radius), (0, 0)))
    there = jnp.pad(values[..., 1:], ((0, 0), (radius, 0), (radius, radius), (0, 0)), constant_values=1)
    offsets = [(y, x) for y in range(radius + 1) for x in range(2 * radius + 1) if (y, x) < (radius, radius)]

    def shifted(whole: Array) -> list[Array]:
        return [whole[:, y : y + height, x : x + width, 0] for y, x in offsets]

    return jnp.stack(shifted(padded) + shifted(there), axis=-1)


def check_images(images: Float[Array, "count height width 1"]) -> None:
    """Raises ValueError unless images are (N, H, W, 1), N at least 1."""
    if images.ndim != 4 or images.shape[-1] != 1 or not len(images):
        raise ValueError(f"images must be (N, H, W, 1) with N at least 1, got shape {tuple(images.shape)}.")


_LOG_2PI = math.log(2 * math.pi)


def _whitening(images: Array, radius: int) -> dict[str, Array]:
    """Returns the fixed linear maps of an `MCGSM`, float32."""
    c = np.asarray(neighbourhoods(jnp.asarray(images), radius), np.float64)
    c, x = c.reshape(-1, c.shape[-1]), np.asarray(images, np.float64).reshape(-1)
    mean, offset = c.mean(axis=0), x.mean()
    covariance = (c - mean).T @ (c - mean) / len(c) + 1e-5 * np.eye(c.shape[1])  # indicators repeat each other
    slope = np.linalg.solve(covariance, (c - mean).T @ (x - offset) / len(c))
    variances, axes = np.linalg.eigh(covariance)
    scale = np.std(x - offset - (c - mean) @ slope)
    whitening = {"mean": mean, "transform": axes / np.sqrt(variances), "slope": slope, "offset": offset, "scale": scale}
    return {name: np.asarray(value, np.float32) for name, value in whitening.items()}


def _log_densities(radius: int, params: PyTree, whitening: dict[str, Array], images: Array) -> Array:
    """Returns log p(x_i | c_i) of every pixel, (N, H, W), in nats."""
    centred = neighbourhoods(images, radius) - whitening["mean"]
    residual = (images[..., 0] - whitening["offset"] - centred @ whitening["slope"]) / whitening["scale"]
    c = centred @ whitening["transform"]
    precisions = jnp.exp(params["log_precisions"])  # (k, s)
    energies = jnp.square(jnp.einsum("...d,dkr->...kr", c, params["features"])).sum(axis=-1)
    gates = params["log_weights"] + jnp.einsum("...d,dks->...ks", c, params["linear"])
    gates = jax.nn.log_softmax(gates - precisions * energies[..., None] / 2, axis=(-2, -1))
    errors = residual[..., None] - c @ params["predictors"] - params["biases"]  # (..., k)
    densities = -0.5 * (precisions * jnp.square(errors)[..., None] - params["log_precisions"] + _LOG_2PI)
    return jax.nn.logsumexp(gates + densities, axis=(-2, -1)) - jnp.log(whitening["scale"])
