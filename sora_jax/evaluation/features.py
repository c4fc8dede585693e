"""Feature networks behind one protocol, and the features of many images: streamed, over all local devices.

A score is called what its network makes it: FID is of Inception's features alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple, Protocol

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from sora_jax.array_types import Array, Float, Int, NumpyArray, PyTree
from sora_jax.evaluation.frechet import FeatureStatistics, Moments, frechet_distance
from sora_jax.evaluation.inception_score import inception_score
from sora_jax.evaluation.precision_recall import precision_recall
from sora_jax.models.features import efficientnet, inception

SPATIAL = "_s"  # suffix of the keys of spatial features in files of statistics


class Features(NamedTuple):
    """What a network says of images.

    Attributes:
        pool: (N, D) float32.
        spatial: (N, S) float32, or None where the network has none.
        logits: (N, classes) float32.
    """

    pool: Float[Array, "batch dim"]
    spatial: Float[Array, "batch cells"] | None
    logits: Float[Array, "batch classes"]


class FeatureNetwork(Protocol):
    """A network whose features images are compared by.

    Attributes:
        name: of it and of how it takes its input; statistics of another name are not compared with.
        dim: D, of the pooled features.
        metrics: names of its scores, by `frechet`, `spatial` (where it has spatial features), `score`, `precision`
            and `recall`.
        params: of the network.
    """

    name: str
    dim: int
    metrics: Mapping[str, str]
    params: PyTree

    def preprocess(self, images: Int[np.ndarray, "batch height width 3"]) -> NumpyArray:
        """Returns the input of `apply` for uint8 images; what is done on the host."""

    def apply(self, params: PyTree, inputs: Array) -> Features:
        """Returns the features; pure, so that it can be compiled."""


@dataclasses.dataclass(frozen=True)
class InceptionNetwork:
    """`FIDInception`, whose scores have the names that they have in papers."""

    params: PyTree
    convention: inception.Convention = "tensorflow"
    dim: int = inception.FEATURE_DIM

    @property
    def name(self) -> str:
        """Of the network and its resizing."""
        return f"Inception ({self.convention})"

    @property
    def metrics(self) -> Mapping[str, str]:
        """Of all five scores."""
        names = {"frechet": "FID", "spatial": "sFID", "score": "Inception Score"}
        return names | {"precision": "Precision", "recall": "Recall"}

    def preprocess(self, images: Int[np.ndarray, "batch height width 3"]) -> NumpyArray:
        """Returns the images: they are resized on the device."""
        return images

    def apply(self, params: PyTree, inputs: Array) -> Features:
        """Returns the features of uint8 images."""
        return Features(*inception.FIDInception().apply({"params": params}, inception.prepare(inputs, self.convention)))


@dataclasses.dataclass(frozen=True)
class EfficientNetNetwork:
    """`EfficientNetLite0`, whose scores carry its name."""

    params: PyTree
    name: str = "EffNetLite0"
    dim: int = efficientnet.FEATURE_DIM

    @property
    def metrics(self) -> Mapping[str, str]:
        """Of all four scores; it has no spatial features."""
        names = {"frechet": "FD", "score": "IS", "precision": "Precision", "recall": "Recall"}
        return {kind: f"{name}-{self.name}" for kind, name in names.items()}

    def preprocess(self, images: Int[np.ndarray, "batch height width 3"]) -> NumpyArray:
        """Returns images resized bicubically on the host, (N, 224, 224, 3) float32."""
        return efficientnet.preprocess(images)

    def apply(self, params: PyTree, inputs: Array) -> Features:
        """Returns the features of preprocessed images."""
        pool, logits = efficientnet.EfficientNetLite0().apply({"params": params}, inputs)
        return Features(pool, None, logits)


class FeatureSet(NamedTuple):
    """What scores are made of, of one set of images.

    Attributes:
        moments: of the pooled features under `""`, and of spatial ones, where there are such, under `SPATIAL`.
        pool: (n, D) float32, the pooled features of all images or of some; None where they were not kept.
        logits: (N, classes) float32; None where they were not kept.
    """

    moments: dict[str, Moments]
    pool: Float[np.ndarray, "kept dim"] | None = None
    logits: Float[np.ndarray, "images classes"] | None = None


def extract_features(
    network: FeatureNetwork,
    batches: Iterable[Int[np.ndarray, "batch height width 3"]],
    *,
    batch_size: int = 64,
    progress: Callable[[int], None] | None = None,
) -> Iterator[Features]:
    """Yields the features of images in their order, NumPy float32.

    Args:
        network: compiled here, for one size of images.
        batches: (n, H, W, 3) uint8 each, of any n.
        batch_size: images of a call of the network, over all local devices, whose number divides it after rounding up;
            the last call is filled up with copies that do not count.
        progress: called with the number of images of each call that is done.

    Raises:
        ValueError: images of another size than the first, or of another shape or dtype.
    """
    devices = jax.local_devices()
    batch_size = -(-batch_size // len(devices)) * len(devices)
    mesh = jax.make_mesh((len(devices),), ("batch",), devices=devices)
    split, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("batch",), ()))
    params = jax.device_put(network.params, whole)
    compiled = jax.jit(network.apply, out_shardings=split)
    for images in _rebatch(batches, batch_size):
        count = len(images)
        images = np.concatenate([images, np.repeat(images[-1:], batch_size - count, axis=0)])
        inputs = jax.device_put(network.preprocess(images), split)
        yield jax.tree.map(lambda a, count=count: np.asarray(a)[:count], compiled(params, inputs))
        if progress is not None:
            progress(count)


def collect_features(
    features: Iterable[Features], *, keep: Int[np.ndarray, " kept"] | None = None, keep_logits: bool = True
) -> FeatureSet:
    """Returns the statistics of a stream of features, in float64, and what else scores need of it.

    Args:
        features: of chunks of images, at least two images together.
        keep: ascending indices of the images whose pooled features are kept (default: all).
        keep_logits: of all images, for the score of the classifier.
    """
    statistics: dict[str, FeatureStatistics] = {}
    pools, logits, start = [], [], 0
    for chunk in features:
        parts = {"": chunk.pool} | ({} if chunk.spatial is None else {SPATIAL: chunk.spatial})
        for suffix, values in parts.items():
            statistics[suffix] = statistics.get(suffix, FeatureStatistics.empty(values.shape[1])).update(values)
        stop = start + len(chunk.pool)
        inside = slice(None) if keep is None else keep[(keep >= start) & (keep < stop)] - start
        pools.append(np.asarray(chunk.pool)[inside])
        if keep_logits:
            logits.append(np.asarray(chunk.logits))
        start = stop
    if not pools:
        raise ValueError("there are no images.")
    moments = {suffix: part.moments() for suffix, part in statistics.items()}
    return FeatureSet(moments, np.concatenate(pools), np.concatenate(logits) if keep_logits else None)


def scores(network: FeatureNetwork, samples: FeatureSet, reference: FeatureSet) -> dict[str, float]:
    """Returns the scores of samples by their names, of `network.metrics`.

    Those that the reference holds nothing for are left out: spatial ones where it has no such moments, precision and
    recall where it has no features.
    """
    found = {"frechet": frechet_distance(samples.moments[""], reference.moments[""])}
    if SPATIAL in samples.moments and SPATIAL in reference.moments:
        found["spatial"] = frechet_distance(samples.moments[SPATIAL], reference.moments[SPATIAL])
    if samples.logits is not None:
        found["score"] = inception_score(samples.logits)
    if samples.pool is not None and reference.pool is not None:
        found |= precision_recall(reference.pool, samples.pool)._asdict()
    return {network.metrics[kind]: value for kind, value in found.items()}


def _rebatch(batches: Iterable[NumpyArray], size: int) -> Iterator[NumpyArray]:
    """Yields the same images, `size` at a time (the last ones fewer)."""
    held: list[NumpyArray] = []
    first = None
    for images in batches:
        if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
            raise ValueError(f"images must be (N, H, W, 3) uint8, got {images.shape} {images.dtype}.")
        first = images.shape[1:3] if first is None else first
        if images.shape[1:3] != first:
            sizes = (f"{height} x {width}" for height, width in (first, images.shape[1:3]))
            raise ValueError("images must be of one size, got {} and {} pixels.".format(*sizes))
        held.append(images)
        while sum(map(len, held)) >= size:
            together = np.concatenate(held)
            held = [together[size:]]
            yield together[:size]
    if sum(map(len, held)):
        yield np.concatenate(held)
