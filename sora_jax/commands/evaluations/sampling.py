"""Samples of any family by the thousand, drawn over all devices and resumed where they stopped; and their scores."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import numpy as np
import tyro
from etils import epath
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from sora_jax.array_types import Int, NumpyArray
from sora_jax.commands.evaluations.fid import NetworkOptions, Reference
from sora_jax.config_json import to_json
from sora_jax.data.sources import ClipSource, open_source
from sora_jax.evaluation import plots
from sora_jax.evaluation.image_files import ImageFiles
from sora_jax.evaluation.manifest import SampleManifest, manifest_path, read_manifest
from sora_jax.evaluation.sample_store import SampleStore
from sora_jax.files import check_writable, write_whole
from sora_jax.generation.sets import Chosen, SetOptions, open_set
from sora_jax.generation.video_io import write_image
from sora_jax.provenance import Environment, file_hash, params_hash

SAMPLES_FILE, SHEET_FILE = "samples.npz", "sheet.png"
SHEET_COLUMNS, SHEET_ROWS = 8, 8
LABELS_STREAM = 1  # of the seed, beside the noise


@dataclasses.dataclass(frozen=True, kw_only=True)
class DrawOptions:
    """What is drawn, but for steps and guidance.

    Attributes:
        checkpoint: a run or an exported model of a Sora, a DiT or discrete diffusion, or what `convert_checkpoint.py`
            wrote of a DiT or of DDPM.
        output: directory; started again on the same one, it goes on where it stopped, with another `num_samples` or
            `batch_size` too.
        num_samples: images; the first of more are the same.
        vae: autoencoder of a model of latents, what `convert_checkpoint.py sd-vae` wrote.
        weights_of_run: which of a run's: the average (`ema`) or the last.
        labels_of: a prepared data set whose classes are asked for as often as its training split has them (default:
            all classes alike, drawn at random as in the official code).
        sampler: `ancestral` is DDPM, with the variance that was learned; by default a Sora takes `euler` and all else
            `ancestral`.
        prompts: of a Sora: sample i shows prompt i modulo their number (default: none).
        guided_channels: of a DiT: guidance is of so many of the first channels, as in the official code; 0 for all.
        size: height and width in pixels (default: what the model was trained on, which DDPM weights do not say).
        seed: of noise and labels.
        batch_size: images that are drawn at once, over all devices of a host. Those of another size differ by rounding
            alone, so by one level of a pixel at most and rarely; the manifest records it.
        multihost: this is one of several hosts, each running this command on one `output`.
    """

    checkpoint: str
    output: str
    num_samples: int = 50_000
    vae: str | None = None
    weights_of_run: Literal["ema", "last"] = "ema"
    labels_of: str | None = None
    sampler: Literal["ancestral", "euler", "heun", "dpm++", "dpm++sde", "unipc"] | None = None
    prompts: tuple[str, ...] = ("",)
    guided_channels: int = 3
    size: tuple[int, int] | None = None
    seed: int = 0
    batch_size: int = 64
    multihost: bool = False

    def __post_init__(self) -> None:
        for field in ("num_samples", "batch_size"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} must be at least 1, got {getattr(self, field)}.")
        if self.guided_channels < 0:
            raise ValueError(f"guided_channels must be 0 (all) or more, got {self.guided_channels}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleOptions(DrawOptions):
    """Draws samples: OUTPUT/samples.npz, which the community's evaluators take, its manifest and a sheet.

    Attributes:
        num_steps: of the sampler (default: DiT 250, Sora its sample settings, else all).
        guidance_scale: of classifier-free guidance, where there is a condition; 1 is none (default: DiT 1.5, Sora its
            sample settings).
        json: also write the manifest to this file.
    """

    num_steps: int | None = None
    guidance_scale: float | None = None
    json: Path | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweepOptions(DrawOptions, NetworkOptions):
    """Draws and scores samples for every number of steps with every scale of guidance.

    Attributes:
        reference: statistics (.npz with mu and sigma), a folder of pictures or an .npz of them.
        num_steps: of the sampler.
        guidance_scales: of classifier-free guidance; 1 is none.
    """

    reference: str
    num_samples: int = 2000
    num_steps: Annotated[tuple[int, ...], tyro.conf.arg(metavar="STEPS ...")] = (10, 25, 50, 250)
    guidance_scales: Annotated[tuple[float, ...], tyro.conf.arg(metavar="SCALES ...")] = (1.0, 1.5, 2.0, 4.0)

    def __post_init__(self) -> None:
        DrawOptions.__post_init__(self)
        NetworkOptions.__post_init__(self)
        for field in ("num_steps", "guidance_scales"):
            values = getattr(self, field)
            if not values or len(set(values)) < len(values):
                raise ValueError(f"{field} must be one or more different numbers, got {values}.")
        if self.multihost:
            raise ValueError("a sweep runs on one host; draw each of its sets with `sample --multihost`.")


class Drawing:
    """A loaded model and what of it is asked for.

    Args:
        options: of the command.

    Raises:
        FileNotFoundError: no model, autoencoder or data set.
        ValueError: one that does not fit; see `sora_jax.generation.sets.open_set`.
    """

    def __init__(self, options: DrawOptions) -> None:
        self._options = options
        self.set = open_set(
            options.checkpoint,
            SetOptions(
                seed=options.seed,
                size=options.size,
                vae=options.vae,
                averaged=options.weights_of_run == "ema",
                sampler=options.sampler,
                guided_channels=options.guided_channels,
                prompts=options.prompts,
            ),
        )
        self._source = None if options.labels_of is None else open_source(options.labels_of, "train")
        self.labels = draw_labels(options, self.set.num_classes, self._source)
        self._model_hash = params_hash(self.set.params)
        self._vae_hash = None if self.set.codec_params is None else params_hash(self.set.codec_params)

    def manifest(self, chosen: Chosen) -> SampleManifest:
        """Returns what the samples are made of."""
        options = self._options
        of = self._source and file_hash(epath.Path(self._source.path) / "dataset_info.json")
        labels = {"labels": "uniform" if of is None else f"as often as in the data set {of}"}
        choices = (labels if self.set.num_classes else {}) | self.set.choices
        return SampleManifest(
            model=self.set.name,
            checkpoint=self._model_hash,
            ema=options.weights_of_run == "ema",
            vae=self._vae_hash,
            sampler=self.set.sampler,
            num_steps=chosen.num_steps,
            guidance_scale=chosen.guidance_scale,
            options=", ".join(f"{name}: {value}" for name, value in choices.items()),
            seed=options.seed,
            num_samples=options.num_samples,
            height=self.set.size[0],
            width=self.set.size[1],
            precision=self.set.precision,
            environment=Environment.here(),
        )

    def fill(self, directory: epath.PathLike, num_steps: int | None, guidance_scale: float | None) -> epath.Path | None:
        """Draws the samples that a directory lacks, and puts all together.

        Returns:
            The path of the `.npz`, on the first host; None on the others.
        """
        options = self._options
        # A shard is one call of the sampler: what is interrupted loses one batch.
        chosen = self.set.chosen(num_steps, guidance_scale)
        manifest = self.manifest(chosen)
        store = SampleStore(directory, manifest, shard_size=options.batch_size)
        for name in store.damaged:
            print(f"{store.directory / name} is cut short: its samples are drawn again.")
        if (more := store.num_beyond) > 0:
            print(f"{store.directory} holds {more} samples more than --num-samples {manifest.num_samples}: left out.")
        missing = sum(map(len, store.missing()))
        label = f"{chosen.num_steps} steps, guidance {chosen.guidance_scale:g}"
        with tqdm(desc=label, total=manifest.num_samples, initial=manifest.num_samples - missing, unit="image") as bar:
            store.fill(
                self._drawn(chosen),
                process_index=jax.process_index(),
                process_count=jax.process_count(),
                progress=bar.update,
            )
        if jax.process_count() > 1:
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices("samples are drawn")
        if jax.process_index() > 0:
            return None
        path = store.assemble(epath.Path(directory) / SAMPLES_FILE)
        write_image(epath.Path(directory) / SHEET_FILE, sheet(store, self.labels), scale=1)
        return path

    def _drawn(self, chosen: Chosen) -> Callable[[Int[np.ndarray, " n"]], NumpyArray]:
        """Returns the function of indices that draws samples."""

        def draw(indices: Int[np.ndarray, " n"]) -> NumpyArray:
            # Always as many, so that the last part compiles nothing anew.
            padded = np.pad(indices, (0, self._options.batch_size - len(indices)), mode="edge")
            return self.set.draw(padded, self.labels[padded], chosen)[: len(indices)]

        return draw


def draw_labels(options: DrawOptions, num_classes: int, source: ClipSource | None) -> Int[np.ndarray, " samples"]:
    """Returns the class of each sample, which does not depend on how many there are.

    Args:
        options: of the command.
        num_classes: of the model; 0 for one without classes, whose labels are all 0.
        source: whose classes are asked for as often as it has them; None for all alike.

    Raises:
        ValueError: a source of other classes.
    """
    rng = np.random.default_rng((options.seed, LABELS_STREAM))
    if source is None:
        return rng.integers(max(num_classes, 1), size=options.num_samples)
    if len(source.label_names) != num_classes:
        raise ValueError(
            f"--labels-of {options.labels_of} has {len(source.label_names)} classes and the model {num_classes}."
        )
    return rng.choice(source.metadata.labels, size=options.num_samples)


def sheet(store: SampleStore, labels: Int[np.ndarray, " samples"]) -> NumpyArray:
    """Returns a picture of the first samples of some classes, a class a row, (H, W, 3) uint8."""
    classes = np.unique(labels)
    classes = classes[np.linspace(0, len(classes) - 1, min(SHEET_ROWS, len(classes))).round().astype(int)]
    rows = []
    for label in classes:
        images = store.read(np.flatnonzero(labels == label)[:SHEET_COLUMNS]) / 127.5 - 1
        missing = SHEET_COLUMNS - len(images)
        rows.append(np.pad(images, ((0, missing), (0, 0), (0, 0), (0, 0)), constant_values=1))
    return plots.image_grid(rows)


def check_outputs(options: SampleOptions | SweepOptions) -> None:
    """Raises ValueError where the results could not be written."""
    check_writable("--output", options.output, directory=True)
    if options.json is not None:
        check_writable("--json", options.json)


def sample(options: SampleOptions) -> None:
    """Draws the samples, and prints their manifest."""
    check_outputs(options)
    if options.multihost:
        jax.distributed.initialize()
    path = Drawing(options).fill(options.output, options.num_steps, options.guidance_scale)
    if path is None:
        return
    manifest = to_json(read_manifest(SampleManifest, manifest_path(path)))
    print(manifest)
    print(f"{path}\n{path.parent / SHEET_FILE}  the sheet")
    if options.json is not None:
        write_whole(options.json, (manifest + "\n").encode())


def sweep(options: SweepOptions) -> None:
    """Draws and scores all, and prints a table."""
    check_outputs(options)
    reference = Reference(options.reference, options.network(), options.batch_size)
    drawing = Drawing(options)
    results: list[dict[str, Any]] = []
    for num_steps, scale in itertools.product(options.num_steps, options.guidance_scales):
        directory = epath.Path(options.output) / f"steps_{num_steps}_guidance_{scale:g}"
        path = str(drawing.fill(directory, num_steps, scale))
        figures = {"num_steps": num_steps, "guidance_scale": scale, "samples": path}
        results.append(figures | reference.score(ImageFiles(path), path))
    names = list(results[0]["scores"])
    table = Table("steps", "guidance", *names, title=f"{options.num_samples} samples, {reference.network.name}")
    for r in results:
        table.add_row(str(r["num_steps"]), f"{r['guidance_scale']:g}", *(f"{r['scores'][name]:.4f}" for name in names))
    Console().print(table)
    if options.json is not None:
        write_whole(options.json, json.dumps({"results": results}, indent=2) + "\n")
