"""Data sets of latents made on the spot: as they are prepared today, and as they were before clips could be stored."""

import json

import numpy as np
import tensorflow_datasets as tfds
from etils import epath

from sora_jax.data.builders import writer
from sora_jax.data.builders.latents import latent_features

CHANNELS = 2
SIZES = ((1, 4, 6), (3, 4, 4), (5, 6, 4), (1, 5, 7), (2, 4, 4), (4, 4, 6), (1, 4, 4), (6, 6, 6))  # (T, h, w), by turns
CLASSES = ("cat", "dog")


def posteriors(index, shape, views=2, dtype=np.float32, channels=CHANNELS):
    """Returns (views, 2, T, h, w, C): random means, and deviations between 0.1 and 0.5; the second view is mirrored."""
    rng = np.random.default_rng(index)
    mean, std = rng.standard_normal((*shape, channels)), rng.uniform(0.1, 0.5, (*shape, channels))
    one = np.stack([mean, std]).astype(dtype)
    return np.stack([one, one[:, :, :, ::-1]][:views])


def write_latents(root, counts=(("train", 16), ("unseen", 4)), views=2, sizes=SIZES, factor=0.5, states=None):
    """Writes a data set of labelled, captioned stills and clips; returns its directory.

    Args:
        root: directory above it.
        counts: clips of each split.
        views: of a clip.
        sizes: of the clips, by turns.
        factor: scaling factor.
        states: from a caption to its token states, which the records then hold.
    """
    directory = epath.Path(root) / "clips_latents" / "1.0.0"
    directory.mkdir(parents=True)
    features, splits, first = latent_features(views, CHANNELS, "float32", CLASSES), [], 0
    if states is not None:
        dim = states("").shape[1]
        tensor = tfds.features.Tensor(shape=(None, dim), dtype=np.float16, encoding="bytes")
        features = tfds.features.FeaturesDict({**features, "caption_states": tensor})
        with (directory / "null_caption_states.npy").open("wb") as file:
            np.save(file, states("").astype(np.float16))
    for split, count in counts:
        records = []
        for i in range(first, first + count):
            size = sizes[i % len(sizes)]
            example = {"clip_id": i, "name": f"clip-{i}", "caption": f"clip {i}", "label": i % 2}
            example |= {"fps": 1.0 if size[0] == 1 else 8.0, "latents": posteriors(i, size, views)}
            if states is not None:
                example["caption_states"] = states(f"clip {i}").astype(np.float16)
            records.append((i, writer.serialize(features, example)))
        path = directory / writer.shard_name("clips_latents", split, 0, 1)
        writer.write_part(path, records)
        splits.append(writer.split_of_parts(split, [writer.Part.read(path)]))
        writer.forget_summary(path)
        first += count
    writer.write_metadata(directory, "clips_latents", "1.0.0", features, splits, "Latents of a test.")
    request = {"views": "both" if views == 2 else "image", "dtype": "float32"}
    request["autoencoder"] = {"scaling_factor": factor, "sha256": "of the weights"}
    report = {"latents": {"views": views, "channels": CHANNELS}, "request": request}
    (directory / "report.json").write_text(json.dumps(report))
    return str(directory)


def write_older_latents(root, count=8, shape=(4, 4)):
    """Writes labelled stills of one size, whose records do not say it; returns the directory."""
    directory = epath.Path(root) / "stills_latents" / "1.0.0"
    directory.mkdir(parents=True)
    features = tfds.features.FeaturesDict(
        {
            "clip_id": np.int64,
            "name": tfds.features.Text(),
            "caption": tfds.features.Text(),
            "latents": tfds.features.Tensor(shape=(2, 2, *shape, CHANNELS), dtype=np.float32, encoding="bytes"),
            "label": tfds.features.ClassLabel(names=list(CLASSES)),
        }
    )
    path = directory / writer.shard_name("stills_latents", "train", 0, 1)
    records = []
    for i in range(count):
        example = {"clip_id": i, "name": f"{i}.png", "caption": f"clip {i}", "label": i % 2}
        example["latents"] = posteriors(i, (1, *shape))[:, :, 0]
        records.append((i, writer.serialize(features, example)))
    writer.write_part(path, records)
    split = writer.split_of_parts("train", [writer.Part.read(path)])
    writer.forget_summary(path)
    writer.write_metadata(directory, "stills_latents", "1.0.0", features, [split], "Latents of a test.")
    request = {"views": "both", "dtype": "float32", "autoencoder": {"scaling_factor": 0.5}}
    (directory / "report.json").write_text(json.dumps({"shape": [2, 2, *shape, CHANNELS], "request": request}))
    return str(directory)
