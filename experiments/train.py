"""Trains a model, or continues a run.

CONFIG is the name of a file in experiments/configs/ or the path of a Python file with a function
`config() -> ExperimentConfig`. Every value of the config can be set on the command line by its dotted name.
Starting again in the same WORKDIR continues exactly where the run stopped. Exit codes: 0 when the run has finished
or was preempted (SIGTERM; its last line says which, and WORKDIR/DONE exists only when it has finished), 1 when it
failed, 2 for an unusable command line.

Examples:
    python experiments/train.py sora_nano --workdir runs/nano --data.path data/fluent_emoji
    python experiments/train.py sora_nano --workdir runs/wide --data.path data/fluent_emoji --model.width 128
    python experiments/train.py my_config.py --workdir runs/tuned --data.path data/mine --init-from runs/nano
    python experiments/train.py sora_nano --dry-run --json plan.json
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import json
import math
import pathlib
import sys
import traceback
from typing import Annotated, Any, NoReturn

import jax
import numpy as np
import rich.console
import rich.table
import tyro
from etils import epath

from sora_jax.array_types import PyTree
from sora_jax.config import ExperimentConfig
from sora_jax.generation.video_io import check_writable, write_whole
from sora_jax.parallel.mesh import MESH_AXES, check_batch_size, mesh_shape
from sora_jax.parallel.multihost import first_process_first
from sora_jax.parallel.rules import param_shardings

CONFIGS = pathlib.Path(__file__).parent / "configs"


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The command line.

    Attributes:
        name: name of a file in experiments/configs/ or path of a Python file; comes first.
        config: the values of that config; each can be set.
        workdir: directory of the run.
        init_from: run or exported model whose parameters a new run starts from.
        dry_run: only check the config and print the model's parameters, tokens and FLOPs a step and the mesh.
        json: with --dry-run, write the same figures to this file.
        multihost: this is one of several hosts, each running this command (jax.distributed.initialize()).
    """

    name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CONFIG")]
    config: Annotated[ExperimentConfig, tyro.conf.arg(name="")]
    workdir: str | None = None
    init_from: str | None = None
    dry_run: bool = False
    json: pathlib.Path | None = None
    multihost: bool = False


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    arguments = parse(sys.argv[1:] if argv is None else argv)
    try:
        return dry_run(arguments) if arguments.dry_run else run(arguments)
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 1


def parse(argv: list[str]) -> Arguments:
    """Reads the command line; ends the process with code 2 where it is not usable."""
    default = ExperimentConfig()
    if argv and not argv[0].startswith("-"):
        try:
            default = load_config(argv[0])
        except ValueError as error:
            unusable(str(error))
    elif argv and not {"-h", "--help"} & set(argv):
        unusable(f"CONFIG comes first, one of {', '.join(config_names())} or the path of a Python file.")
    try:
        arguments = tyro.cli(
            Arguments, args=argv, description=__doc__, default=Arguments(name=tyro.MISSING, config=default)
        )
    except ValueError as error:  # of the config as a whole; tyro itself reports those of its parts
        unusable(str(error))
    if not arguments.dry_run:
        if arguments.workdir is None:
            unusable("--workdir is needed, the directory of the run (or --dry-run).")
        if not arguments.config.data.path:
            unusable("--data.path is needed, the directory of a prepared data set (experiments/prepare_data.py).")
        if arguments.json:
            unusable("--json belongs to --dry-run; a run writes its figures to WORKDIR/metrics.jsonl.")
    elif arguments.json is not None:
        try:
            check_writable("--json", arguments.json)
        except ValueError as error:
            unusable(str(error))
    return arguments


def unusable(message: str) -> NoReturn:
    """Ends the process: the command line cannot be used."""
    print(f"train.py: {message}", file=sys.stderr)
    sys.exit(2)


def config_names() -> list[str]:
    """Returns the names of the configs that come with the repository."""
    return sorted(path.stem for path in CONFIGS.glob("*.py"))


def load_config(name: str) -> ExperimentConfig:
    """Returns the config that a name or a path stands for.

    Raises:
        ValueError: there is no such config, its file cannot be run (naming the line), or it has no function `config`
            that returns one.
    """
    path = pathlib.Path(name) if name.endswith(".py") else CONFIGS / f"{name}.py"
    if not path.is_file():
        raise ValueError(f"no config {name!r}: give one of {', '.join(config_names())} or the path of a Python file.")
    spec = importlib.util.spec_from_file_location(f"experiment_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses defined in the file look themselves up
    try:
        spec.loader.exec_module(module)
        config = module.config() if callable(getattr(module, "config", None)) else None
    except SyntaxError as error:
        raise ValueError(f"{error.filename}, line {error.lineno}: {error.msg}.") from error
    except Exception as error:  # whatever it is, it comes from the file
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == spec.origin]
        place = f"{path}, line {lines[-1]}" if lines else path
        raise ValueError(f"{place}: {type(error).__name__}: {error}") from error
    if not isinstance(config, ExperimentConfig):
        raise ValueError(f"{path} must have a function `config() -> ExperimentConfig`.")
    return config


def dry_run(arguments: Arguments) -> int:
    """Checks the config and prints what a step costs; allocates nothing."""
    from sora_jax.training.flops import step_flops
    from sora_jax.training.state import build_model, init_params

    # The kernel changes neither parameters nor what they are split over, and may need the devices it is made for.
    config = dataclasses.replace(arguments.config, model=dataclasses.replace(arguments.config.model, attention="xla"))
    num_devices = jax.device_count()
    try:
        mesh = mesh_shape(config.mesh, num_devices)
    except ValueError:  # planned for another machine: the smallest mesh with these sizes
        mesh = {axis: max(getattr(config.mesh, axis), 1) for axis in MESH_AXES}
    check_batch_size(config.data.batch_size, mesh)
    boxed = jax.eval_shape(lambda: init_params(build_model(config), config))
    param_shardings(boxed, jax.sharding.AbstractMesh(tuple(mesh.values()), tuple(mesh)))
    figures = {
        "num_params": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(boxed)),
        "tokens_per_step": config.optimizer.accumulation_steps * config.data.batch_size * config.data.row_length,
        "flops_per_step": step_flops(config),
        "mesh": mesh,
    }
    table = rich.table.Table("", arguments.name, title="one training step")
    table.add_row("parameters", f"{figures['num_params']:,}")
    table.add_row("tokens (slots of rows)", f"{figures['tokens_per_step']:,}")
    table.add_row("FLOPs, dense attention", f"{figures['flops_per_step']:.4g}")
    table.add_row("mesh", ", ".join(f"{axis} {size}" for axis, size in mesh.items()))
    needed = math.prod(mesh.values())
    if needed != num_devices:
        table.add_row("devices", f"{needed} needed, {num_devices} here")
    rich.console.Console().print(table)
    if arguments.json is not None:
        write_whole(arguments.json, (json.dumps(figures, indent=2) + "\n").encode())
    return 0


def open_batches(config: ExperimentConfig, captions: Any, split: str, training: bool) -> Any:
    """Opens the pipeline of a split: endless where it is trained on, else once through and with every caption."""
    from sora_jax.data.pipeline import make_pipeline

    return make_pipeline(
        config.data,
        config.patch,
        captions,
        split,
        training=training,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
    )


def caption_table(config: ExperimentConfig, workdir: epath.Path, console: rich.console.Console) -> Any:
    """Returns the token states of all captions of the config's splits; encodes them once and keeps them.

    The table lies beside the data set, or in the run's directory where that cannot be written. Its name is a digest
    of the captions, the text encoder and `max_caption_tokens`, so none is ever used for another.
    """
    from sora_jax.data.captions import CaptionTable
    from sora_jax.data.sources import find_dataset, open_source
    from sora_jax.models.text.minilm import load_text_encoder

    data = config.data
    dataset = find_dataset(data.path)
    evaluated = data.eval_splits if config.eval_every else ()
    captions = sorted(
        {c for split in (data.split, *evaluated) for c in open_source(data.path, split).metadata.captions}
    )
    encoder = load_text_encoder()
    if encoder.dim != config.model.text_dim:
        raise ValueError(f"model.text_dim must be the text encoder's {encoder.dim}, got {config.model.text_dim}.")
    content = json.dumps([encoder.fingerprint, data.max_caption_tokens, captions])
    name = f"captions-{hashlib.sha256(content.encode()).hexdigest()[:16]}"
    places = (dataset / name, workdir / name)

    def encode(texts: list[str]) -> list[np.ndarray]:
        return encoder.encode(texts, data.max_caption_tokens)

    def find_or_build() -> Any:
        for path in places:
            if path.exists():
                return CaptionTable.load(path)
        console.print(f"encoding {len(captions)} captions", highlight=False)
        try:
            return CaptionTable.build(captions, encode, places[0])
        except PermissionError:
            workdir.mkdir(parents=True, exist_ok=True)
            return CaptionTable.build(captions, encode, places[1])

    return first_process_first(find_or_build)


class SampleSheet:
    """Draws the clips that `config.sample` asks for as a contact sheet; compiles and reads the text encoder once.

    Args:
        config: of the experiment.
    """

    def __init__(self, config: ExperimentConfig) -> None:
        self._config = config
        self._pipeline: Any = None

    def __call__(self, params: PyTree) -> np.ndarray:
        """Returns (H, W, 3) uint8: a row a prompt, its frames from left to right."""
        from sora_jax.generation.pipeline import SoraPipeline
        from sora_jax.generation.video_io import contact_sheet
        from sora_jax.models.text.minilm import load_text_encoder

        if self._pipeline is None:
            self._pipeline = SoraPipeline(self._config, params, load_text_encoder())
        self._pipeline.params = params
        prompts = self._config.sample.prompts
        return contact_sheet(self._pipeline(prompts), prompts)


def attention_for(config: ExperimentConfig, mesh: jax.sharding.Mesh) -> Any:
    """Returns the attention kernel that needs a mesh, where the config names one."""
    if config.model.attention != "splash":
        return None
    from sora_jax.parallel.splash import splash_attention

    return splash_attention(mesh)


def without_missing_splits(config: ExperimentConfig, console: rich.console.Console) -> ExperimentConfig:
    """Returns the config without the held-out splits that the data set does not have, and says which these are."""
    from sora_jax.data.sources import split_names

    there = split_names(config.data.path)
    missing = [split for split in config.data.eval_splits if split not in there]
    if missing:
        console.print(f"no held-out loss of {', '.join(missing)}: the data set has {', '.join(there)}", highlight=False)
    kept = tuple(split for split in config.data.eval_splits if split in there)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, eval_splits=kept))


def join_hosts() -> None:
    """Makes this process one of several hosts; ValueError where nothing says which the others are."""
    try:
        jax.distributed.initialize()
    except ValueError as error:
        raise ValueError(
            f"--multihost: {error} Nothing here (TPU pod, Slurm, Open MPI, Kubernetes) says which the other hosts are; "
            "on one machine leave --multihost out."
        ) from error


def run(arguments: Arguments) -> int:
    """Trains; returns the exit code."""
    if arguments.multihost:
        join_hosts()
    from sora_jax.data.pipeline import check_channels
    from sora_jax.training import run_directory
    from sora_jax.training.loop import Outcome, train

    check_channels(arguments.config.patch)  # before the captions are encoded, which takes a while
    console = rich.console.Console(stderr=True)
    config = without_missing_splits(arguments.config, console)
    workdir = epath.Path(arguments.workdir)
    done = run_directory.done_step(workdir)
    if done is None or config.num_steps > done:
        captions = functools.cache(lambda: caption_table(config, workdir, console))  # once all else has been checked
        outcome = train(
            config,
            workdir,
            lambda split, training: open_batches(config, captions(), split, training),
            init_from=arguments.init_from,
            sample_sheet=SampleSheet(config),
            attention_for=lambda mesh: attention_for(config, mesh),
            console=console,
        )
    else:
        run_directory.check_config(workdir, config, done)  # another config would be another run, not a finished one
        outcome = Outcome.ALREADY_FINISHED
    if jax.process_index() == 0:
        print(f"{outcome.value}: {workdir}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
