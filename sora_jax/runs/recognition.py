"""What a run of ViT, ViViT or NaViT needs: its rows, and the report on how much it recognises."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import rich.console
from etils import epath
from jax.sharding import Mesh
from tqdm import tqdm

from sora_jax.array_types import Array, PyTree
from sora_jax.config import MeshConfig
from sora_jax.data.content import Content, check_content, open_data
from sora_jax.evaluation import plots
from sora_jax.families.load import load
from sora_jax.families.recognition import RecognitionConfig
from sora_jax.families.registry import make_task
from sora_jax.files import write_whole
from sora_jax.models.fine_tune import RecognitionModelConfig, start_from
from sora_jax.models.navit import check_positions
from sora_jax.models.vit import resize_images
from sora_jax.parallel.mesh import make_mesh
from sora_jax.patches.positions import grid_positions
from sora_jax.runs import packed
from sora_jax.runs.run import Report
from sora_jax.runs.trainer import Trainer
from sora_jax.training import streams
from sora_jax.training.flops import step_flops
from sora_jax.training.run_directory import place_of
from sora_jax.training.state import abstract_params

SCORED_ROWS = 16  # at a time
TIMED_UPDATES = 20


class RecognitionRun(packed.PackedRun):
    """A run that ends with a report; a `sora_jax.runs.run.Study`. See `PackedRun`.

    Attributes:
        unit: of the report's figures.
        headline: key and name of the figure that the report is about.

    Raises:
        ValueError: as `PackedRun`, classes that are not as many as the model's, or an image that is too large for the
            model's positions.
    """

    config: RecognitionConfig
    unit = ""

    def __init__(self, config: RecognitionConfig, workdir: epath.Path, console: rich.console.Console) -> None:
        super().__init__(config, workdir, console)
        if not self.config.data.eval_splits:
            asked = ", ".join(config.data.eval_splits) or "nothing"
            raise ValueError(
                f"data.eval_splits must name a split to score, got {asked}, which {place_of(config.data)} lacks."
            )
        self.headline = make_task(config).headline
        for split in self._splits:
            content = open_data(self.config.data, split)
            check_content(content, config.data, config.patch)
            check_source(config, content)

    def read_splits(self) -> tuple[str, ...]:
        """Returns the splits that are trained on, scored and, where there is a grid of learning rates, chosen on."""
        config = self.config
        chosen_on = (config.selection_split,) if config.learning_rates else ()
        return tuple(dict.fromkeys((config.data.split, *chosen_on, *config.data.eval_splits)))

    def prepare_report(self) -> None:
        """Reads the captions, on every host at once: where they are encoded, the hosts wait for each other."""
        self.captions()

    def initial_params(self, path: str) -> Callable[[Mesh], PyTree]:
        """Returns what gives the parameters that a new run starts from; see `sora_jax.models.fine_tune.start_from`.

        Args:
            path: of a run or an exported model of ViT, ViViT or NaViT, or of converted weights; of a contrastive run
                for another one.
        """
        if self.config.data.label == "none":  # it starts from another of its own kind
            return super().initial_params(path)

        def params(mesh: Mesh) -> PyTree:
            del mesh  # classes, sizes and kinds of networks are changed on the host
            source, params = read_recognition_model(path)
            key = streams.derive(self.config.seed, 0, streams.INIT)
            return start_from(self.config.model, source, params, key)

        return params

    def selection_score(self) -> float:
        """Returns the headline of the finished run on the split that learning rates are compared on."""
        return self._score(self._params(), self.config.selection_split)[self.headline[0]]

    def report(self) -> Report:
        """Scores the finished run on its first held-out split; writes the figures into its directory.

        Returns:
            `accuracy` and `accuracy_stderr` (binomial), or `recall_at_1` and `recall_at_5` of images' captions among
            all of the split, of `num_scored` examples; the same at `test_sides`; what the model and its training cost
            (`step_seconds` as it was trained, `update_seconds` measured again without waiting for data); and how
            held-out figures went with training (`evaluated_flops`, `evaluated_scores`).
        """
        params = self._params()
        split = self.config.data.eval_splits[0]
        figures = self._score(params, split)
        key = self.headline[0]
        for other in self.config.data.eval_splits[1:]:
            figures[f"{key}/{other}"] = self._score(params, other)[key]
        if self.config.test_sides:
            figures["test_sides"] = list(self.config.test_sides)
            figures["score_at_sides"] = [self._score(params, split, side)[key] for side in self.config.test_sides]
        figures |= self._costs(split)
        write_whole(self._workdir / "report.json", json.dumps(figures, indent=2) + "\n")
        return figures

    def _params(self) -> PyTree:
        return load(self._workdir).params

    def _score(self, params: PyTree, split: str, side: int | None = None) -> Report:
        config, params = at_side(self.config, params, side, split)
        return score(config, params, split, self.captions())

    def _costs(self, split: str) -> Report:
        """Returns what the model and its training cost, padding and attention to it included."""
        config = self.config
        task = make_task(config)
        lines = [json.loads(line) for line in (self._workdir / "metrics.jsonl").read_text().splitlines()]
        steps = [line for line in lines if "step_seconds" in line]
        kind = task.held_out_score
        curve = [
            (line["step"], line[f"held_out_{kind}/{split}"]) for line in lines if f"held_out_{kind}/{split}" in line
        ]
        flops = step_flops(task)
        one = task.forward_flops_of_one()
        return {
            **({"forward_flops": float(one)} if one else {}),
            "num_params": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(task))),
            "learning_rate": config.optimizer.learning_rate,
            "num_steps": config.num_steps,
            "examples_per_step": float(np.mean([s["examples_per_second"] * s["step_seconds"] for s in steps])),
            "real_token_share": float(np.mean([s["real_token_share"] for s in steps])),
            "step_seconds": float(np.median([s["step_seconds"] for s in steps])),
            **self._update_seconds(),
            "flops_per_step": float(flops),
            "training_flops": float(flops * config.num_steps),
            "evaluated_flops": [float(flops * step) for step, _ in curve],
            "evaluated_scores": [value for _, value in curve],
        }

    def _update_seconds(self) -> Report:
        """Returns what an update takes whose rows are at hand, where there is one host: without waiting for data."""
        if jax.process_count() > 1:  # the report is one host's; an update is of all
            return {}
        config = self.config
        with packed.open_pipeline(config, self.captions(), config.data.split, training=True) as batches:
            rows = [next(batches) for _ in range(config.optimizer.accumulation_steps)]
        trainer = Trainer(config)
        step = trainer.step(config)
        trainer.timed(step, rows)  # compiles
        return {"update_seconds": float(np.median([trainer.timed(step, rows) for _ in range(TIMED_UPDATES)]))}

    @staticmethod
    def beside(config: RecognitionConfig, other: RecognitionConfig, name: str) -> RecognitionConfig:
        """Returns another experiment as it is run beside one: on its clips, classes, seeds and learning rates.

        Raises:
            ValueError: it has another number of classes.
        """
        if other.model.num_classes != config.model.num_classes:
            raise ValueError(
                f"beside must name experiments with as many classes, {config.model.num_classes}, got {name!r} with "
                f"{other.model.num_classes}."
            )
        clips = ("path", "mixture", "split", "eval_splits", "max_clips", "clip_seed")
        data = dataclasses.replace(other.data, **{field: getattr(config.data, field) for field in clips})
        shared = ("seed", "num_seeds", "learning_rates", "selection_split")
        return dataclasses.replace(other, data=data, **{field: getattr(config, field) for field in shared})

    @staticmethod
    def compare(means: dict[str, Report], workdir: epath.Path) -> None:
        """Adds to the first experiment what share of the others' training compute it took, and draws them all.

        `compute_share` is of the operations of the whole training.
        """
        names = list(means)
        first = means[names[0]]
        key = "recall_at_1" if "recall_at_1" in first else "accuracy"
        for name in names[1:]:
            other = means[name]
            stem = epath.Path(name).stem
            first[f"compute_share/{stem}"] = first["training_flops"] / other["training_flops"]
        kind = "retrieval within a batch" if key == "recall_at_1" else "accuracy, first batches"
        curves = {epath.Path(name).stem: (m["evaluated_flops"], m["evaluated_scores"]) for name, m in means.items()}
        pictures = {"compute.png": plots.curves(curves, "training compute (FLOPs)", f"held-out {kind}")}
        if all("test_sides" in m for m in means.values()):
            sides = {epath.Path(name).stem: (m["test_sides"], m["score_at_sides"]) for name, m in means.items()}
            pictures["resolutions.png"] = plots.curves(sides, "side of the test images (pixels)", f"held-out {key}")
        for name, png in pictures.items():
            write_whole(workdir / name, png)


def read_recognition_model(path: str) -> tuple[RecognitionModelConfig, PyTree]:
    """Returns config and parameters of a network: of a run, an exported model or converted weights.

    Raises:
        FileNotFoundError: there is no model at `path`.
        ValueError: what is there is no ViT, ViViT or NaViT, or cannot be read.
    """
    loaded = load(path, kinds=("classification", "contrastive", "vit", "vivit"))
    return loaded.config.image_network(loaded.params) if loaded.trained_here else (loaded.config, loaded.params)


def check_source(config: RecognitionConfig, source: Content) -> None:
    """Raises ValueError where a split has other classes than the model, or images that its positions do not reach.

    Images are taken at the largest of `config.test_sides` and of the sides that they are trained at.
    """
    model = config.model
    if config.data.label == "class":
        names = source.label_names
        if not names:
            raise ValueError(f"{source.path} has no class labels; data.label 'speed' needs none.")
        if len(names) != model.num_classes:
            raise ValueError(
                f"model.num_classes must be the {len(names)} classes of {source.path}, got {model.num_classes}."
            )
    if model.patch is None:
        most = cells(config, source, max(config.data.sampling.largest_side, *config.test_sides, 0)).max(axis=0)
        least, largest = config.data.crop_aspect if config.data.crop == "random" else (1.0, 1.0)
        height, width = np.ceil(most * np.sqrt([max(1 / least, 1), max(largest, 1)]))
        frames = math.ceil(config.data.num_frames / config.patch.size[0])
        check_positions(model, grid_positions((frames, int(height), int(width)), config.data.fps, config.patch))


def cells(config: RecognitionConfig, source: Content, side: float) -> np.ndarray:
    """Returns how many patches each image of a split has along height and width at a side, (N, 2)."""
    sizes = np.stack([source.metadata.height, source.metadata.width], axis=1).astype(float)
    scale = side / np.sqrt(sizes.prod(axis=1, keepdims=True))
    scale = scale if config.data.sampling.enlarge else np.minimum(scale, 1)
    return np.maximum(np.round(sizes * scale / config.patch.size[1:]), 1).astype(int)


def at_side(
    config: RecognitionConfig, params: PyTree, side: int | None, split: str
) -> tuple[RecognitionConfig, PyTree]:
    """Returns config and parameters for the images of a held-out split at another size.

    A ViT's positions are interpolated to the nearest multiple of its patch; NaViT's rows are as long as the largest
    image asks for. Nothing changes where `side` is None.

    Raises:
        ValueError: another size for a ViViT.
    """
    if side is None:
        return config, params
    if not config.model.takes_any_size:
        raise ValueError("test_sides are for ViT and NaViT: a ViViT takes clips of one size.")
    if config.model.patch is not None:
        patch = config.model.patch[1]
        side = max(round(side / patch), 1) * patch
        model, params = resize_images(config.model, params, (side, side))
        data = dataclasses.replace(config.data.at_side(side), row_length=math.prod(model.grid))
        return dataclasses.replace(config, model=model, data=data), params
    frames = math.ceil(config.data.num_frames / config.patch.size[0])
    needed = frames * int(cells(config, open_data(config.data, split), side).prod(axis=1).max())
    data = dataclasses.replace(config.data.at_side(side), row_length=max(config.data.row_length, needed))
    return dataclasses.replace(config, data=data), params


def score(config: RecognitionConfig, params: PyTree, split: str, captions: Any = None) -> Report:
    """Returns how much a model recognises of a whole split.

    Args:
        config: of the model and its data.
        params: of the model.
        split: of the data set.
        captions: their token states, for contrastive models.
    """
    # On one device, whatever mesh it was trained on: few rows at a time, and a kernel that is there.
    rows = min(config.data.batch_size, SCORED_ROWS)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, batch_size=rows, num_shards=1))
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, attention="auto"))
    task = make_task(config, make_mesh(MeshConfig(), jax.local_devices()[:1]))
    params = jax.device_put(params)
    size = config.data.sampling.size if config.data.sampling.one_size else config.data.sampling.sides[1:]
    label = f"scoring {split} at {' x '.join(f'{side:g}' for side in size)}"
    compiled = jax.jit(task.scored)
    parts: list[tuple[Array, ...]] = []
    with packed.open_pipeline(config, captions, split, training=False, alone=True) as batches:
        for batch in tqdm(batches, desc=label, unit="batch", delay=2.0, leave=False):
            there = batch.clip_ids >= 0
            out = jax.device_get(compiled(params, batch))
            parts.append((*(x[there] for x in out), batch.labels[there]))
        left_out = sum(batches.statistics.skipped.values())
    if not parts or not sum(len(part[0]) for part in parts):
        raise ValueError(f"split {split!r} has nothing that can be scored; {left_out} images or clips were left out.")
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    return task.figures_of(*columns) | {"num_scored": len(columns[0]), "num_left_out": left_out}
