"""What a score was made of: a manifest is written beside samples and beside every score, as JSON.

Two scores can be compared if `differences` of their manifests are none, or such as the comparison is about.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any, TypeVar

from etils import epath

from sora_jax.config_json import from_json, to_json
from sora_jax.files import writing
from sora_jax.provenance import Environment

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class SampleManifest:
    """What samples were made of. A field that a model has no use for is None.

    Attributes:
        model: its name, such as "DiT-XL/2".
        checkpoint: `params_hash` or `file_hash` of the parameters.
        ema: whether they are the averaged ones.
        vae: hash of the autoencoder.
        sampler: its name.
        num_steps: of it.
        guidance_scale: of classifier-free guidance; 1 is none.
        options: whatever else the samples depend on, as text, such as "guidance_channels=3 labels=uniform".
        seed: of the noise and the labels.
        num_samples: that were asked for.
        height, width: in pixels.
        precision: the dtype that the model computes in.
        environment: where they were drawn.
        batch_sizes: of the calls that drew them, rising. A batch of another size is another compiled program, whose
            rounding may differ: by about a millionth before pixels are rounded, so by one level of a pixel at a tie.
    """

    model: str
    checkpoint: str
    ema: bool | None
    vae: str | None
    sampler: str
    num_steps: int
    guidance_scale: float | None
    options: str
    seed: int
    num_samples: int
    height: int
    width: int
    precision: str
    environment: Environment
    batch_sizes: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class ScoreManifest:
    """What scores were made of.

    Attributes:
        features: the feature network, with how it takes its input, such as "Inception, tensorflow resize".
        features_hash: of its parameters.
        samples_hash: of the samples' file or folder.
        num_samples: that were scored.
        reference_hash: of the reference's file or folder.
        precision: of the features.
        environment: where the scores were computed.
        samples: the manifest that the samples came with; None where they came with none.
    """

    features: str
    features_hash: str
    samples_hash: str
    num_samples: int
    reference_hash: str
    precision: str
    environment: Environment
    samples: SampleManifest | None = None


def write_manifest(path: epath.PathLike, manifest: SampleManifest | ScoreManifest) -> None:
    """Writes a manifest as indented JSON."""
    with writing(path) as stream:
        stream.write(to_json(manifest).encode())


def read_manifest(kind: type[T], path: epath.PathLike) -> T:
    """Returns the manifest of a file.

    Args:
        kind: `SampleManifest` or `ScoreManifest`.
        path: of the file.

    Raises:
        FileNotFoundError: no file.
        ValueError: a file that holds none; the message names it and the field.
    """
    path = epath.Path(path)
    try:
        return from_json(kind, path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no {kind.__name__}: {error}") from error


def differences(first: Any, second: Any) -> dict[str, tuple[Any, Any]]:
    """Returns the fields in which two manifests of one kind differ, by their dotted paths, with both values."""
    a, b = (_flatten(json.loads(to_json(manifest))) for manifest in (first, second))
    return {name: (a.get(name), b.get(name)) for name in sorted(a.keys() | b.keys()) if a.get(name) != b.get(name)}


def manifest_path(path: epath.PathLike) -> epath.Path:
    """Returns where the manifest of a file or folder of samples stands: beside it."""
    path = epath.Path(path)
    return path.parent / f"{path.name}.manifest.json"


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the leaves of nested dicts by dotted path."""
    leaves = {}
    for name, value in values.items():
        leaves |= _flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return leaves
