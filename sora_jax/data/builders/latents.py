"""Latents of the stills of a prepared data set, computed once: the posteriors of an autoencoder, as ArrayRecord.

The stills of each split are cut into parts, each a shard of the finished data set; one that is whole is not computed
again. Several processes share the parts out. The data set is complete, and can be opened, when the first of them has
written the metadata behind the last part.

The autoencoder is a function, so that nothing here knows of models.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from PIL import Image
from tqdm import tqdm

from sora_jax.array_types import Float, NumpyArray
from sora_jax.data.builders import writer
from sora_jax.data.decode import UnreadableClipError, decode_frames
from sora_jax.data.sources import ClipSource, find_dataset, split_names
from sora_jax.files import write_whole

VERSION = "1.0.0"
REPORT, REQUEST = "report.json", "request.json"

Encode = Callable[[Float[np.ndarray, "batch size size 3"]], tuple[NumpyArray, NumpyArray]]
"""From images in [-1, 1] to mean and standard deviation of their latents, (B, h, w, c) each."""


@dataclasses.dataclass(frozen=True)
class LatentOptions:
    """What is stored of each still.

    Attributes:
        image_size: height and width that it is resized and cropped to, in pixels.
        views: the still itself, its mirror image, or both.
        dtype: of the stored means and standard deviations.
        part_size: stills of a file.
    """

    image_size: int = 256
    views: Literal["image", "flip", "both"] = "both"
    dtype: Literal["float16", "float32"] = "float32"
    part_size: int = 1024

    def __post_init__(self) -> None:
        for field in ("image_size", "part_size"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}.")
        if self.views not in ("image", "flip", "both"):
            raise ValueError(f"views must be image, flip or both, got {self.views!r}.")
        if self.dtype not in ("float16", "float32"):
            raise ValueError(f"dtype must be float16 or float32, got {self.dtype!r}.")

    @property
    def num_views(self) -> int:
        """Views of a still."""
        return 2 if self.views == "both" else 1

    def views_of(self, picture: NumpyArray) -> list[NumpyArray]:
        """Returns the views of a picture (H, W, 3)."""
        both = {"image": picture, "flip": picture[:, ::-1]}
        return list(both.values()) if self.views == "both" else [both[self.views]]


def center_crop(picture: NumpyArray, size: int) -> NumpyArray:
    """Returns the middle of a picture as DiT and ADM (arXiv:2105.05233, its code) train on it.

    It is halved by a box filter while its short side is at least twice `size`, resized so that this side is `size` by a
    bicubic filter, and cropped.

    Args:
        picture: (H, W, 3) uint8.
        size: height and width of the result, in pixels.

    Returns:
        (size, size, 3) uint8.
    """
    image = Image.fromarray(picture)
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    pixels = np.asarray(image)
    top, left = ((n - size) // 2 for n in pixels.shape[:2])
    return pixels[top : top + size, left : left + size]


def latent_features(shape: tuple[int, ...], dtype: str, label_names: Sequence[str] = ()) -> tfds.features.FeaturesDict:
    """Returns the TFDS features of a record.

    Args:
        shape: (views, 2, h, w, c); of the second axis, 0 is the mean and 1 the standard deviation.
        dtype: of the latents.
        label_names: of the classes, in the order of their indices; without any there is no feature `label`.
    """
    return tfds.features.FeaturesDict(
        {
            "clip_id": np.int64,
            "name": tfds.features.Text(),
            "caption": tfds.features.Text(),
            "latents": tfds.features.Tensor(shape=shape, dtype=np.dtype(dtype), encoding="bytes"),
        }
        | ({"label": tfds.features.ClassLabel(names=list(label_names))} if label_names else {})
    )


def prepare_latents(
    path: str,
    encode: Encode,
    latent_shape: tuple[int, int, int],
    autoencoder: dict[str, Any],
    output: str,
    options: LatentOptions = LatentOptions(),
    batch_size: int = 16,
    process_index: int = 0,
    process_count: int = 1,
) -> dict[str, Any] | None:
    """Writes the latents of a data set's stills, all splits, under `output`.

    Args:
        path: of the prepared data set, as `ClipSource` takes it. Its clips of several frames are left out.
        encode: the autoencoder; it is called with the same number of images each time, `batch_size` where that is even.
        latent_shape: (h, w, c) of an image's latents.
        autoencoder: what the latents depend on of it, as JSON: it is kept in the report, and a restart with another is
            an error. `scaling_factor` is what `sora_jax.data.latents` multiplies the latents by.
        output: directory that will hold `<name>_latents/1.0.0`.
        options: what is stored.
        batch_size: images that are encoded at once.
        process_index: number of this process.
        process_count: processes that share the parts out, each with the same arguments. The first waits for the others.

    Returns:
        The report: `name`, `path`, `fingerprint` (of the stills and arguments), `request` (the arguments),
        `splits` (examples of each), `num_bytes`, `shape` and `num_left_out`; None in the other processes.

    Raises:
        ValueError: no data set at `path`, no stills in it, a still that cannot be decoded (it is named), or `output`
            holds another data set of this name.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index must be in 0 ... {process_count - 1}, got {process_index}.")
    found = find_dataset(path)
    name = f"{json.loads((found / 'dataset_info.json').read_text())['name']}_latents"
    sources = {split: ClipSource(str(found), split) for split in split_names(str(found))}
    stills = {split: np.flatnonzero(source.metadata.num_frames == 1) for split, source in sources.items()}
    stills = {split: indices for split, indices in stills.items() if len(indices)}
    if not stills:
        raise ValueError(f"{found} has no stills, but clips of several frames alone.")
    request = {"source": name.removesuffix("_latents"), "autoencoder": autoencoder} | dataclasses.asdict(options)
    mark = _fingerprint(sources, request)
    target = epath.Path(output) / name / VERSION
    if (target / REPORT).exists():
        report = json.loads((target / REPORT).read_text())
        if report["fingerprint"] == mark:
            return report if process_index == 0 else None
    _claim(target, {"fingerprint": mark, "request": request})

    shape = (options.num_views, 2, *latent_shape)
    parts = [part for split, indices in stills.items() for part in _parts(name, split, indices, options.part_size)]
    mine = parts[process_index::process_count]
    done = [part for part in mine if writer.is_finished(target / part.file)]
    count = sum(len(part.indices) for part in mine)
    with tqdm(total=count, initial=sum(len(p.indices) for p in done), desc="encoding", unit="still", delay=1.0) as bar:
        for part in mine:
            if part not in done:
                latents = _encoded(sources[part.split], part.indices, encode, shape, options, batch_size)
                records = _records(sources[part.split], part.indices, latents, shape, options, bar)
                writer.write_part(target / part.file, records)
    if process_index > 0:
        return None
    for part in tqdm(parts, desc="waiting for other processes", unit="part", delay=5.0):
        while not writer.is_finished(target / part.file):
            time.sleep(1.0)
    return _finish(target, name, sources, parts, shape, options, {"fingerprint": mark, "request": request})


@dataclasses.dataclass(frozen=True, eq=False)
class _Part:
    """Stills that one file holds: their indices in a split, and its name."""

    split: str
    indices: NumpyArray
    file: str


def _parts(name: str, split: str, indices: NumpyArray, part_size: int) -> list[_Part]:
    """Cuts the stills of a split, in their order; files are called as TFDS calls those of a data set."""
    count = -(-len(indices) // part_size)
    return [
        _Part(split, indices[i * part_size : (i + 1) * part_size], writer.shard_name(name, split, i, count))
        for i in range(count)
    ]


def _fingerprint(sources: dict[str, ClipSource], request: dict[str, Any]) -> str:
    """Returns a digest of what would be written: the arguments, and which clips there are."""
    digest = hashlib.sha256(json.dumps(request, sort_keys=True).encode())
    for split, source in sources.items():
        meta = source.metadata
        digest.update(json.dumps([split, meta.captions, meta.names, list(source.label_names)]).encode())
        for values in (meta.clip_ids, meta.num_frames, meta.height, meta.width, meta.labels):
            digest.update(np.ascontiguousarray(values).tobytes())
    return digest.hexdigest()[:16]


def _claim(target: epath.Path, mark: dict[str, Any]) -> None:
    """Makes the directory for this data set, or goes on with it; ValueError where it is another's."""
    if (target / REQUEST).exists():
        if json.loads((target / REQUEST).read_text()) == mark:
            return
        raise ValueError(f"output {target} holds other latents already; remove it or name another directory.")
    if target.exists() and any(target.iterdir()):
        raise ValueError(f"output {target} holds another data set already; remove it or name another directory.")
    target.mkdir(parents=True, exist_ok=True)
    write_whole(target / REQUEST, json.dumps(mark, indent=2) + "\n")


def _records(
    source: ClipSource,
    indices: NumpyArray,
    stored: Iterator[NumpyArray],
    shape: tuple[int, ...],
    options: LatentOptions,
    bar: tqdm,
) -> Iterator[tuple[int, bytes]]:
    """Yields the ids and the serialised latents of some stills of a split."""
    features, meta = latent_features(shape, options.dtype, source.label_names), source.metadata
    for index, latents in zip(indices, stored, strict=True):
        example = {
            "clip_id": int(meta.clip_ids[index]),
            "name": meta.names[index],
            "caption": meta.captions[index],
            "latents": latents,
        }
        if source.label_names:
            example["label"] = int(meta.labels[index])
        yield example["clip_id"], writer.serialize(features, example)
        bar.update(1)


def _encoded(
    source: ClipSource,
    indices: NumpyArray,
    encode: Encode,
    shape: tuple[int, ...],
    options: LatentOptions,
    batch_size: int,
) -> Iterator[NumpyArray]:
    """Yields the latents (views, 2, h, w, c) of each still."""
    stills_at_once = max(1, batch_size // options.num_views)
    for begin in range(0, len(indices), stills_at_once):
        pictures = [_picture(source, int(index)) for index in indices[begin : begin + stills_at_once]]
        views = [v for p in pictures for v in options.views_of(center_crop(p, options.image_size))]
        images = np.zeros(
            (stills_at_once * options.num_views, *views[0].shape), np.float32
        )  # of one shape: compiled once
        images[: len(views)] = np.stack(views).astype(np.float32) / 127.5 - 1
        mean, std = (np.asarray(part, np.float32)[: len(views)] for part in encode(images))
        with np.errstate(over="ignore"):
            latents = np.stack([mean, std], axis=1).astype(options.dtype)  # (stills * views, 2, h, w, c)
        if not np.isfinite(latents).all():
            raise ValueError(f"the autoencoder gives latents that are not finite in {options.dtype}.")
        if latents.shape[1:] != shape[1:]:
            raise ValueError(f"latents must be {shape[2:]}, the autoencoder gives {latents.shape[2:]}.")
        yield from latents.reshape(-1, *shape)


def _picture(source: ClipSource, index: int) -> NumpyArray:
    """Returns a still, (H, W, 3) uint8."""
    meta = source.metadata
    try:
        return decode_frames(source.read_frames(index, [0]), int(meta.height[index]), int(meta.width[index]))[0]
    except UnreadableClipError as error:
        raise UnreadableClipError(f"{meta.names[index]!r} in {source.path}: {error}") from error


def _finish(
    target: epath.Path,
    name: str,
    sources: dict[str, ClipSource],
    parts: Sequence[_Part],
    shape: tuple[int, ...],
    options: LatentOptions,
    mark: dict[str, Any],
) -> dict[str, Any]:
    """Writes the metadata, which completes the data set, and returns the report."""
    for left in target.glob("*.incomplete"):  # by processes that were killed
        left.unlink()
    files: dict[str, list[writer.Part]] = {}
    for part in parts:
        files.setdefault(part.split, []).append(writer.Part.read(target / part.file))
    splits = [writer.split_of_parts(split, members) for split, members in files.items()]
    label_names = next(iter(sources.values())).label_names
    features = latent_features(shape, options.dtype, label_names)
    description = f"Latents of the stills of {mark['request']['source']}."
    writer.write_metadata(target, name, VERSION, features, splits, description)
    left_out = sum(int((source.metadata.num_frames > 1).sum()) for source in sources.values())
    report = {"name": name, "path": str(target), **mark}
    report["splits"] = {split.name: {"num_examples": sum(split.lengths)} for split in splits}
    report["num_bytes"] = {split.name: split.num_bytes for split in splits}
    report |= {"shape": list(shape), "num_left_out": {"clips of several frames": left_out} if left_out else {}}
    write_whole(target / REPORT, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    for part in parts:
        writer.forget_summary(target / part.file)
    return report
