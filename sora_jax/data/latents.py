"""Latents that `experiments/prepare_data.py latents` stored, by index.

A record holds the posteriors of a still or a clip: for each of its views (the clip, its mirror image) the means and the
standard deviations of all latent frames. Its own size and rate stand beside them, in latent cells and frames. In data
sets of before, all records are stills of the one size that the report names.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from sora_jax.array_types import Float
from sora_jax.data.decode import STILL_FPS
from sora_jax.data.records import parse_example
from sora_jax.data.sources import RecordSource, find_dataset

REPORT, LABELS = "report.json", "label.labels.txt"
_MEAN_AND_STD = 2


class LatentLayout:
    """What the report of a data set of latents says of its records.

    Args:
        directory: of the data set.
        report: of it; has `latents` or, in those of before, `shape`.

    Attributes:
        views: of a clip: itself, its mirror image.
        channels: values of a latent cell.
        scaling_factor: a diffusion model is trained on latents times this number.
        request: what the data set was made from and how.
        label_names: of the classes, in the order of their indices; () where the data set has no labels.
    """

    def __init__(self, directory: epath.Path, report: dict[str, Any]) -> None:
        self.request: dict[str, Any] = report["request"]
        self.views = ("image", "flip") if self.request["views"] == "both" else (self.request["views"],)
        self._size = None  # of every record; else it stands in each
        if "latents" in report:
            self.channels = int(report["latents"]["channels"])
        else:
            *_, height, width, self.channels = report["shape"]
            self._size = (1, height, width)
        self.dtype = np.dtype(self.request["dtype"])
        self.scaling_factor = float(self.request["autoencoder"]["scaling_factor"])
        names = directory / LABELS
        self.label_names = tuple(names.read_text().split("\n")[:-1]) if names.exists() else ()

    def facts(self) -> dict[str, Any]:
        """Returns by what the numbers of the records are known beside themselves."""
        facts = {"scaling_factor": self.scaling_factor, "dtype": self.request["dtype"]}
        if self._size is None:
            return facts | {"views": self.views, "channels": self.channels}
        return facts | {"shape": [len(self.views), *self._size[1:], self.channels]}

    @property
    def is_older(self) -> bool:
        """Whether all records are stills of one size."""
        return self._size is not None

    def posteriors(self, values: dict[str, Any]) -> Float[np.ndarray, "views 2 frames height width channels"]:
        """Returns means and standard deviations of a record's values, as they are stored."""
        if self._size is None:
            shape, stored = values["latents/shape"], values["latents/value"][0]
        else:
            shape, stored = (len(self.views), _MEAN_AND_STD, *self._size, self.channels), values["latents"][0]
        return np.frombuffer(stored, self.dtype).reshape(shape)

    def row(self, index: int, serialized: bytes) -> dict[str, Any]:
        """Returns the metadata of one record; no latents are touched."""
        values = parse_example(serialized)
        shape = values["latents/shape"][_MEAN_AND_STD:-1] if self._size is None else self._size
        return {
            "clip_ids": values["clip_id"][0],
            "name": values["name"][0].decode(),
            "caption": values["caption"][0].decode(),
            "fps": values["fps"][0] if "fps" in values else STILL_FPS,
            "num_frames": shape[0],
            "height": shape[1],
            "width": shape[2],
            "labels": int(values["label"][0]) if "label" in values else -1,
        }


def latent_report(directory: epath.Path) -> dict[str, Any] | None:
    """Returns the report of a data set of latents, None where it holds something else."""
    path = directory / REPORT
    report = json.loads(path.read_text()) if path.exists() else {}
    return report if "latents" in report or len(report.get("shape", ())) == 5 else None


class LatentSource(RecordSource):
    """The latents of one split, by index; see `RecordSource`, whose sizes and rates are of latent cells and frames.

    Args:
        path: directory of a data set that `experiments/prepare_data.py latents` wrote, or one above it.
        split: name of a split, or what TFDS makes of names (`train[:100]`).

    Attributes:
        layout: of the records: their channels, views and scaling factor.

    Raises:
        ValueError: as of `RecordSource`, or a data set that holds no latents.
    """

    def __init__(self, path: str, split: str = "train"):
        directory = find_dataset(path)
        report = latent_report(directory)
        if report is None:
            raise ValueError(f"{directory} holds no latents; run experiments/prepare_data.py latents.")
        self.layout = LatentLayout(directory, report)
        super().__init__(path, split, self.layout)

    def posterior(
        self, index: int, frames: Sequence[int] | None = None, view: int = 0
    ) -> Float[np.ndarray, "2 frames height width channels"]:
        """Returns mean and standard deviation of a clip's latents, unscaled, in the dtype that they are stored in.

        Args:
            index: of the clip.
            frames: of the clip, in any order (None: all).
            view: place among `layout.views`.

        Raises:
            IndexError, ValueError: as of `RecordSource.record`.
        """
        stored = self.layout.posteriors(self.record(index))[view]
        return stored if frames is None else stored[:, frames]
