"""Latents of a prepared data set, computed once: the posteriors of an autoencoder, as ArrayRecord.

Stills and clips alike are encoded frame by frame. Those of each split are cut into parts, each a shard of the finished
data set; one that is whole is not computed again. Several processes share the parts out. The data set is complete, and
can be opened, when the first of them has written the metadata behind the last part.

The autoencoder is a function, so that nothing here knows of models.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from etils import epath
from tqdm import tqdm

from sora_jax.array_types import TEXT_DTYPE, Float, NumpyArray
from sora_jax.data.builders import writer
from sora_jax.data.builders.latent_options import LatentOptions, center_crop
from sora_jax.data.decode import UnreadableClipError, decode_frames
from sora_jax.data.layout import NULL_STATES, STATES_KEY
from sora_jax.data.records import MOST_BYTES, ClipMetadata, write_index
from sora_jax.data.sources import ClipSource, find_dataset, split_names
from sora_jax.files import write_whole

VERSION = "1.0.0"
REPORT, REQUEST = "report.json", "request.json"

Encode = Callable[[Float[np.ndarray, "batch height width 3"]], tuple[NumpyArray, NumpyArray]]
"""From frames in [-1, 1] to mean and standard deviation of their latents, (B, h, w, c) each."""


class CaptionEncoder(NamedTuple):
    """What gives the token states of captions, where the records hold them.

    Attributes:
        encode: from captions to their token states, (m, dim) each.
        dim: width of a token state.
        facts: what the states depend on, as JSON: it is kept in the report, and a restart with another is an error.
    """

    encode: Callable[[list[str]], Sequence[NumpyArray]]
    dim: int
    facts: dict[str, Any]


def latent_features(
    num_views: int, channels: int, dtype: str, names: Sequence[str] = (), states_dim: int = 0
) -> tfds.features.FeaturesDict:
    """Returns the TFDS features of a record.

    Args:
        num_views: of a clip.
        channels: values of a latent cell.
        dtype: of the latents, (views, 2, T, h, w, channels); of the second axis, 0 is the mean and 1 the standard
            deviation.
        names: of the classes, in the order of their indices; without any there is no feature `label`.
        states_dim: width of the token states of captions, 0 where they are not stored.
    """
    shape = (num_views, 2, None, None, None, channels)
    return tfds.features.FeaturesDict(
        {
            "clip_id": np.int64,
            "name": tfds.features.Text(),
            "caption": tfds.features.Text(),
            "fps": np.float32,
            "latents": tfds.features.Tensor(shape=shape, dtype=np.dtype(dtype), encoding="bytes"),
        }
        | ({"label": tfds.features.ClassLabel(names=list(names))} if names else {})
        | (
            {STATES_KEY: tfds.features.Tensor(shape=(None, states_dim), dtype=TEXT_DTYPE, encoding="bytes")}
            if states_dim
            else {}
        )
    )


def prepare_latents(
    path: str,
    encode: Encode,
    strides: tuple[int, int, int],
    channels: int,
    autoencoder: dict[str, Any],
    output: str,
    options: LatentOptions,
    batch_size: int = 16,
    process_index: int = 0,
    process_count: int = 1,
    captions: CaptionEncoder | None = None,
) -> dict[str, Any] | None:
    """Writes the latents of a data set's stills and clips, all splits, under `output`.

    Args:
        path: of the prepared data set, as `ClipSource` takes it.
        encode: the autoencoder; it is called with `batch_size` frames of one size each time.
        strides: (1, h, w), frames and pixels that a latent cell stands for.
        channels: values of a latent cell.
        autoencoder: what the latents depend on of it, as JSON: it is kept in the report, and a restart with another is
            an error. `scaling_factor` is what `sora_jax.data.content` multiplies the latents by.
        output: directory that will hold `<name>_latents/1.0.0`.
        options: what is stored.
        batch_size: frames that are encoded at once.
        process_index: number of this process.
        process_count: processes that share the parts out, each with the same arguments. The first waits for the others.
        captions: encodes captions, whose token states the records then hold too.

    Returns:
        The report: `name`, `path`, `fingerprint` (of the clips and arguments), `request` (the arguments), `latents`
        (their views and channels), `splits` (clips, stills and latent frames of each) and `num_bytes`; None in the
        other processes.

    Raises:
        ValueError: no data set at `path`, no clips in it, one that cannot be decoded (it is named), sides that the
            autoencoder cannot halve, or `output` holds another data set of this name.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}.")
    if not 0 <= process_index < process_count:
        raise ValueError(f"process_index must be in 0 ... {process_count - 1}, got {process_index}.")
    side = options.image_size if options.fit == "crop" else options.multiple
    if any(side % stride for stride in strides[1:]):
        name = "image_size" if options.fit == "crop" else "multiple"
        raise ValueError(f"{name} must be a multiple of the autoencoder's strides {tuple(strides[1:])}, got {side}.")
    found = find_dataset(path)
    name = f"{json.loads((found / 'dataset_info.json').read_text())['name']}_latents"
    sources = {split: ClipSource(str(found), split) for split in split_names(str(found))}
    sources = {split: source for split, source in sources.items() if len(source)}
    if not sources:
        raise ValueError(f"{found} has no clips.")
    request = {"source": name.removesuffix("_latents"), "autoencoder": autoencoder} | dataclasses.asdict(options)
    request |= {"captions": captions.facts} if captions else {}
    mark = _fingerprint(sources, request)
    target = epath.Path(output) / name / VERSION
    if (target / REPORT).exists():
        report = json.loads((target / REPORT).read_text())
        if report["fingerprint"] == mark:
            return report if process_index == 0 else None
    _claim(target, {"fingerprint": mark, "request": request})

    plans = {split: _metadata(source.metadata, strides, options) for split, source in sources.items()}
    parts = [part for split, plan in plans.items() for part in _parts(name, split, plan, options.part_size)]
    mine = parts[process_index::process_count]
    done = [part for part in mine if writer.is_finished(target / part.file)]
    count = sum(part.num_frames for part in mine)
    with tqdm(total=count, initial=sum(p.num_frames for p in done), desc="encoding", unit="frame", delay=1.0) as bar:
        for part in mine:
            if part not in done:
                source, plan = sources[part.split], plans[part.split]
                records = _records(source, plan, part.indices, encode, captions, channels, options, batch_size, bar)
                writer.write_part(target / part.file, records)
    if process_index > 0:
        return None
    for part in tqdm(parts, desc="waiting for other processes", unit="part", delay=5.0):
        while not writer.is_finished(target / part.file):
            time.sleep(1.0)
    mark = {"fingerprint": mark, "request": request}
    return _finish(target, name, sources, plans, parts, captions, channels, options, mark)


def _metadata(meta: ClipMetadata, strides: tuple[int, int, int], options: LatentOptions) -> ClipMetadata:
    """Returns what will be known of the latents of clips: frames, rates and sizes in latent cells."""
    taken = [options.frames_of(int(n), float(fps)) for n, fps in zip(meta.num_frames, meta.fps, strict=True)]
    sizes = [options.size_of(int(h), int(w)) for h, w in zip(meta.height, meta.width, strict=True)]
    cells = np.array(sizes, np.int32).reshape(-1, 2) // np.array(strides[1:], np.int32)
    return dataclasses.replace(
        meta,
        num_frames=np.array([len(frames) for frames, _ in taken], np.int32),
        fps=np.array([fps for _, fps in taken], np.float32),
        height=cells[:, 0],
        width=cells[:, 1],
        caption_tokens=None,
    )


@dataclasses.dataclass(frozen=True, eq=False)
class _Part:
    """Clips that one file holds: their indices in a split, their latent frames together, and its name."""

    split: str
    indices: NumpyArray
    num_frames: int
    file: str


def _parts(name: str, split: str, plan: ClipMetadata, part_size: int) -> list[_Part]:
    """Cuts the clips of a split, in their order; files are called as TFDS calls those of a data set."""
    cuts, frames = [0], 0
    for index, count in enumerate(plan.num_frames.tolist()):
        if frames and frames + count > part_size:
            cuts.append(index)
            frames = 0
        frames += count
    ranges = [np.arange(*ends) for ends in itertools.pairwise([*cuts, len(plan)])]
    return [
        _Part(split, indices, int(plan.num_frames[indices].sum()), writer.shard_name(name, split, i, len(ranges)))
        for i, indices in enumerate(ranges)
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
    plan: ClipMetadata,
    indices: NumpyArray,
    encode: Encode,
    captions: CaptionEncoder | None,
    channels: int,
    options: LatentOptions,
    batch_size: int,
    bar: tqdm,
) -> Iterator[tuple[int, bytes]]:
    """Yields the ids and the serialised latents of some clips of a split."""
    dim = captions.dim if captions else 0
    features = latent_features(options.num_views, channels, options.dtype, source.label_names, dim)
    distinct = sorted({plan.captions[index] for index in indices})
    states = dict(zip(distinct, captions.encode(distinct), strict=True)) if captions else {}
    pictures = (view for index in indices for view in _views(source, int(index), options))
    latents = _encoded(pictures, encode, options.dtype, batch_size)
    for index in indices:
        count = int(plan.num_frames[index])
        frames = np.stack(list(itertools.islice(latents, count * options.num_views)))  # (T * views, 2, h, w, c)
        shape = (2, int(plan.height[index]), int(plan.width[index]), channels)
        if frames.shape[1:] != shape:
            raise ValueError(f"latents must be {shape[1:]}, the autoencoder gives {frames.shape[2:]}.")
        stored = np.moveaxis(frames.reshape(count, options.num_views, *shape), 0, 2)
        if stored.nbytes > MOST_BYTES:
            raise ValueError(
                f"{plan.names[index]!r} is too large for a record: its latents take {stored.nbytes:,} bytes."
            )
        example = {
            "clip_id": int(plan.clip_ids[index]),
            "name": plan.names[index],
            "caption": plan.captions[index],
            "fps": float(plan.fps[index]),
            "latents": stored,
        }
        if source.label_names:
            example["label"] = int(plan.labels[index])
        if captions:
            example[STATES_KEY] = states[plan.captions[index]].astype(TEXT_DTYPE)
        yield example["clip_id"], writer.serialize(features, example)
        bar.update(count)


def _encoded(pictures: Iterator[NumpyArray], encode: Encode, dtype: str, batch_size: int) -> Iterator[NumpyArray]:
    """Yields mean and standard deviation, (2, h, w, c), of each picture; those of one size are encoded together."""
    for shape, run in itertools.groupby(pictures, key=np.shape):
        while batch := list(itertools.islice(run, batch_size)):
            images = np.zeros((batch_size, *shape), np.float32)  # always as many: compiled once a size
            images[: len(batch)] = np.stack(batch).astype(np.float32) / 127.5 - 1
            mean, std = (np.asarray(part, np.float32)[: len(batch)] for part in encode(images))
            with np.errstate(over="ignore"):
                latents = np.stack([mean, std], axis=1).astype(dtype)  # (batch, 2, h, w, c)
            if not np.isfinite(latents).all():
                raise ValueError(f"the autoencoder gives latents that are not finite in {dtype}.")
            yield from latents


def _views(source: ClipSource, index: int, options: LatentOptions) -> Iterator[NumpyArray]:
    """Yields the views of each frame that is taken of a clip, (H, W, 3) uint8."""
    meta = source.metadata
    size = int(meta.height[index]), int(meta.width[index])
    frames, _ = options.frames_of(int(meta.num_frames[index]), float(meta.fps[index]))
    encoded = source.read_frames(index, frames.tolist())
    try:
        for data in encoded:
            if options.fit == "crop":
                picture = center_crop(decode_frames([data], *size)[0], options.image_size)
            else:
                picture = decode_frames([data], *options.size_of(*size))[0]
            yield from options.views_of(picture)
    except UnreadableClipError as error:
        raise UnreadableClipError(f"{meta.names[index]!r} in {source.path}: {error}") from error


def _finish(
    target: epath.Path,
    name: str,
    sources: dict[str, ClipSource],
    plans: dict[str, ClipMetadata],
    parts: Sequence[_Part],
    captions: CaptionEncoder | None,
    channels: int,
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
    names, dim = next(iter(sources.values())).label_names, captions.dim if captions else 0
    features = latent_features(options.num_views, channels, options.dtype, names, dim)
    if captions:  # how many tokens each caption has is counted when the data set is first opened
        with (target / NULL_STATES).open("wb") as file:
            np.save(file, captions.encode([""])[0].astype(TEXT_DTYPE))
    else:
        for split, plan in plans.items():
            write_index(target, split, plan)
    description = f"Latents of the clips of {mark['request']['source']}."
    writer.write_metadata(target, name, VERSION, features, splits, description)
    report = {"name": name, "path": str(target), **mark}
    report["latents"] = {"views": options.num_views, "channels": channels}
    report["splits"] = {
        split: {
            "num_clips": len(plan),
            "num_stills": int((plan.num_frames == 1).sum()),
            "num_frames": int(plan.num_frames.sum()),
        }
        for split, plan in plans.items()
    }
    report["num_bytes"] = {split.name: split.num_bytes for split in splits}
    for field in ("height", "width"):
        sides = np.concatenate([getattr(plan, field) for plan in plans.values()])
        report[field] = {"min": int(sides.min()), "max": int(sides.max())}
    write_whole(target / REPORT, json.dumps(report, indent=2, ensure_ascii=False) + "\n")
    for part in parts:
        writer.forget_summary(target / part.file)
    return report
