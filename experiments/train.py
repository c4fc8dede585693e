"""Trains a model, or continues a run.

CONFIG is the name of a file in experiments/configs/ or the path of a Python file with a function
`config() -> ExperimentConfig`. Every value of the config can be set on the command line by its dotted name.
An experiment on a likelihood (swiss_roll, heartbeat, dead_leaves, ddpm_digits) or on recognition (ViT, ViViT, NaViT)
trains a run for each of its seeds, and for each of a grid of learning rates where it has one, and ends with a report: a
table, pictures in WORKDIR and, with --json, its figures. Starting again in the same WORKDIR
continues exactly where the run stopped; its data may have moved meanwhile (--data.path), but must hold the same.
Exit codes: 0 when the run has finished or was preempted (SIGTERM; its last
line says which, and WORKDIR/DONE exists only when it has finished), 1 when it failed, 2 for an unusable command line.

Examples:
    python experiments/train.py sora_nano --workdir runs/nano --data.path data/fluent_emoji
    python experiments/train.py sora_nano --workdir runs/wide --data.path data/fluent_emoji --model.width 128
    python experiments/train.py my_config.py --workdir runs/tuned --data.path data/mine --init-from runs/nano
    python experiments/train.py sora_nano --dry-run --json plan.json
    python experiments/train.py swiss_roll --json swiss_roll.json
    python experiments/train.py navit_stills --data.path data/stills/1.0.0 --json navit_stills.json
    python experiments/train.py vivit_b_16x2_model1 --data.path data/kinetics --init-from models/vit_b_16
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import pathlib
import sys
import traceback
from typing import Annotated, Any, NoReturn

import jax
import rich.console
import rich.table
import tyro
from etils import epath
from setups.host_memory import keep_freed_memory
from setups.process import prepare_process
from setups.sora import SoraSetup

from sora_jax.config import ExperimentConfig, PackedDataConfig, SoraConfig, StudyConfig
from sora_jax.data.latents import LatentDataConfig
from sora_jax.generation.video_io import check_writable, write_whole
from sora_jax.parallel.mesh import MESH_AXES, check_batch_size, mesh_shape
from sora_jax.parallel.rules import param_shardings

CONFIGS = pathlib.Path(__file__).parent / "configs"


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The command line.

    Attributes:
        name: name of a file in experiments/configs/ or path of a Python file; comes first.
        config: the values of that config; each can be set.
        workdir: directory of the run (default: runs/ and the config's name).
        init_from: run, exported model or (for ViT and ViViT) converted weights that a new run starts from.
        dry_run: only check the config and print the model's parameters, tokens and FLOPs a step and the mesh.
        json: write the figures of the report, or of --dry-run, to this file.
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
    default: ExperimentConfig = SoraConfig()
    if argv and not argv[0].startswith("-"):
        try:
            default = load_config(argv[0])
        except ValueError as error:
            unusable(str(error))
    elif argv and not {"-h", "--help"} & set(argv):
        unusable(f"CONFIG comes first, one of {', '.join(config_names())} or the path of a Python file.")
    try:
        arguments = tyro.cli(
            Arguments,
            args=argv,
            description=__doc__,
            default=Arguments(name=tyro.MISSING, config=default),
            config=(tyro.conf.AvoidSubcommands,),  # a config's own kinds of data and model
        )
    except ValueError as error:  # of the config as a whole; tyro itself reports those of its parts
        unusable(str(error))
    if not arguments.dry_run:
        if arguments.workdir is None:
            arguments = dataclasses.replace(arguments, workdir=f"runs/{pathlib.Path(arguments.name).stem}")
        if getattr(arguments.config.data, "path", None) == "":
            unusable("--data.path is needed, the directory of a prepared data set (experiments/prepare_data.py).")
        if arguments.json and not isinstance(arguments.config, StudyConfig):
            unusable("--json belongs to --dry-run here; a run writes its figures to WORKDIR/metrics.jsonl.")
    if arguments.json is not None:
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


def load_config(name: str, kind: type[ExperimentConfig] = ExperimentConfig) -> Any:
    """Returns the config that a name or a path stands for.

    Args:
        name: of a config, or the path of its file.
        kind: what it must be.

    Raises:
        ValueError: there is no such config, its file cannot be run (naming the line), or it has no function `config`
            that returns one of the `kind`.
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
    if not isinstance(config, kind):
        raise ValueError(f"{path} must have a function `config() -> {kind.__name__}`.")
    return config


def dry_run(arguments: Arguments) -> int:
    """Checks the config and prints what a step costs; allocates nothing."""
    from sora_jax.models.dit import num_table_params
    from sora_jax.training.flops import step_flops
    from sora_jax.training.state import init_params
    from sora_jax.training.tasks.class_conditional import ClassConditionalTask
    from sora_jax.training.tasks.make import make_task
    from sora_jax.training.tasks.recognition import RecognitionTask

    config = arguments.config
    packed = isinstance(config.data, PackedDataConfig | LatentDataConfig)
    num_devices = jax.device_count()
    try:
        mesh = mesh_shape(config.mesh, num_devices)
    except ValueError:  # planned for another machine: the smallest mesh with these sizes
        mesh = {axis: max(getattr(config.mesh, axis), 1) for axis in MESH_AXES}
    check_batch_size(config.data.batch_size, mesh)
    task = make_task(config)
    boxed = jax.eval_shape(lambda: init_params(task))
    param_shardings(boxed, jax.sharding.AbstractMesh(tuple(mesh.values()), tuple(mesh)))
    rows = config.optimizer.accumulation_steps * config.data.batch_size
    remat = getattr(config.model, "remat", "none") != "none"
    kept = dataclasses.replace(config, model=dataclasses.replace(config.model, remat="none")) if remat else config
    figures = {
        "num_params": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(boxed)),
        **({"tokens_per_step": rows * config.data.row_length} if packed else {"examples_per_step": rows}),
        "flops_per_step": step_flops(task),
        **({"flops_per_step_without_remat": step_flops(make_task(kept))} if remat else {}),
        "mesh": mesh,
    }
    if isinstance(task, ClassConditionalTask):
        figures["num_table_params"] = num_table_params(config.model)
    kinds = RecognitionTask | ClassConditionalTask
    if isinstance(task, kinds) and (operations := task.forward_flops_of_one()):
        figures["forward_macs"] = operations // 2
    table = rich.table.Table("", arguments.name, title="one training step")
    table.add_row("parameters", f"{figures['num_params']:,}")
    if "num_table_params" in figures:
        table.add_row("fixed table of positions", f"{figures['num_table_params']:,}")
    if packed:
        table.add_row("tokens (slots of rows)", f"{figures['tokens_per_step']:,}")
    else:
        table.add_row("examples", f"{rows:,}")
    label = "FLOPs, dense attention" if packed else "FLOPs"
    if remat:
        table.add_row(label, f"{figures['flops_per_step_without_remat']:.4g}")
        label = f"FLOPs, remat {config.model.remat}"  # with what the backward pass computes again
    table.add_row(label, f"{figures['flops_per_step']:.4g}")
    if "forward_macs" in figures:
        table.add_row("multiply-accumulates, forward, of one", f"{figures['forward_macs']:.4g}")
    table.add_row("mesh", ", ".join(f"{axis} {size}" for axis, size in mesh.items()))
    needed = math.prod(mesh.values())
    if needed != num_devices:
        table.add_row("devices", f"{needed} needed, {num_devices} here")
    rich.console.Console().print(table)
    if arguments.json is not None:
        write_whole(arguments.json, (json.dumps(figures, indent=2) + "\n").encode())
    return 0


def join_hosts() -> None:
    """Makes this process one of several hosts; ValueError where nothing says which the others are."""
    try:
        jax.distributed.initialize()
    except ValueError as error:
        raise ValueError(
            f"--multihost: {error} Nothing here (TPU pod, Slurm, Open MPI, Kubernetes) says which the other hosts are; "
            "on one machine leave --multihost out."
        ) from error


def setup_module(config: ExperimentConfig) -> Any:
    """Returns the module with the setup of this kind of experiment, and how it stands beside others."""
    from sora_jax.training.tasks.class_conditional import ClassConditionalConfig
    from sora_jax.training.tasks.recognition import RecognitionConfig

    if isinstance(config, RecognitionConfig):
        from setups import recognition

        return recognition
    if isinstance(config, ClassConditionalConfig):
        from setups import class_conditional

        return class_conditional
    from setups import diffusion

    return diffusion


def make_setup(config: ExperimentConfig, workdir: epath.Path, console: rich.console.Console) -> SoraSetup | Any:
    """Returns what a run of this kind of experiment needs."""
    if isinstance(config, SoraConfig):
        return SoraSetup(config, workdir, console)
    return setup_module(config).Setup(config, workdir, console)


def run(arguments: Arguments) -> int:
    """Trains, and reports where the experiment has a report; returns the exit code."""
    if arguments.multihost:
        join_hosts()
    console = rich.console.Console(stderr=True)
    config, workdir = arguments.config, epath.Path(arguments.workdir)
    if isinstance(config, StudyConfig):
        return run_study(arguments, console)
    train_one(config, workdir, arguments.init_from, console)
    return 0


def run_study(arguments: Arguments, console: rich.console.Console) -> int:
    """Trains every seed of an experiment, and of those beside it, and reports on all; returns the exit code."""
    from setups.study import mean_over_seeds, report_table

    config, workdir = arguments.config, epath.Path(arguments.workdir)
    module = setup_module(config)
    configs = {arguments.name: config}
    for name in config.beside:
        if pathlib.Path(name).stem in {pathlib.Path(other).stem for other in configs}:
            raise ValueError(f"beside must name other experiments than those already run, got {name!r}.")
        configs[name] = module.beside(config, load_config(name, type(config)), name)
    for name, experiment in configs.items():
        count = experiment.num_seeds + max(len(getattr(experiment, "learning_rates", ())) - 1, 0)
        runs = f"{name}: {count} x {experiment.num_steps:,} steps"
        console.print(runs if name == arguments.name else f"{runs}, beside it", highlight=False)
    for experiment in configs.values():  # what one of them lacks is said before any is trained
        make_setup(experiment, workdir, console)
    means = {}
    for name, experiment in configs.items():
        setups = run_seeds(name, experiment, workdir, arguments.init_from if name == arguments.name else None, console)
        if setups is None:
            return 0
        for setup in setups:
            setup.prepare_report()
        if jax.process_index() == 0:
            reports = [setup.report() for setup in setups]
            means[name] = mean_over_seeds(reports, *setups[0].headline)
    if jax.process_index() > 0:
        return 0
    module.compare(means, workdir)
    rich.console.Console().print(report_table(means, setups[0].unit))
    console.print(f"figures and pictures: {workdir}", highlight=False, soft_wrap=True)
    figures = means.pop(arguments.name) | {"beside": means}
    if arguments.json is not None:
        write_whole(arguments.json, (json.dumps(figures, indent=2) + "\n").encode())
    return 0


def run_seeds(
    name: str, config: StudyConfig, workdir: epath.Path, init_from: str | None, console: rich.console.Console
) -> list[Any] | None:
    """Trains the seeds of one experiment, after the best of its learning rates was found with the first.

    Returns:
        The setup of each seed's finished run; None after a preemption.
    """
    from sora_jax.training.loop import Outcome

    stem = pathlib.Path(name).stem

    def train_seed(config: StudyConfig, rate: float | None, seed: int) -> Any | None:
        middle = "" if rate is None else f"_rate_{rate:g}"
        directory = workdir / f"{stem}{middle}_seed_{seed}"
        if rate is not None:
            config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, learning_rate=rate))
        setup, outcome = train_one(dataclasses.replace(config, seed=seed), directory, init_from, console)
        return None if outcome is Outcome.PREEMPTED else setup

    best = None
    rates = getattr(config, "learning_rates", ())
    if rates:
        scores = {}
        for rate in rates:
            setup = train_seed(config, rate, config.seed)
            if setup is None:
                return None
            scores[rate] = setup.selection_score()
            console.print(f"{stem}, learning rate {rate:g}: {scores[rate]:.4f}", highlight=False)
        best = max(scores, key=scores.get)
    setups = []
    for seed in range(config.seed, config.seed + config.num_seeds):
        setup = train_seed(config, best, seed)
        if setup is None:
            return None
        setups.append(setup)
    return setups


def train_one(
    config: ExperimentConfig, workdir: epath.Path, init_from: str | None, console: rich.console.Console
) -> tuple[Any, Outcome]:
    """Trains one run to its end (or to a preemption), unless it is there already."""
    from sora_jax.training.loop import train

    setup = make_setup(config, workdir, console)
    outcome = train(
        setup.config,
        workdir,
        setup.open_batches,
        data_fingerprints=setup.data_fingerprints,
        init_from=setup.initial_params(init_from) if init_from else None,
        sample_sheet=setup.sample_sheet,
        console=console,
    )
    if jax.process_index() == 0:
        print(f"{outcome.value}: {workdir}")
    return setup, outcome


if __name__ == "__main__":
    prepare_process()
    keep_freed_memory()
    sys.exit(main())
