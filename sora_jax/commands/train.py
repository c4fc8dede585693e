"""Trains a model, or continues a run.

CONFIG is the name of a file in sora_jax/configs/ or the path of a Python file with a function
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
    python experiments/train.py sora_nano --data.mixture data/clips=0.8 data/stills=0.2
    python experiments/train.py sora_nano --dry-run --json plan.json
    python experiments/train.py swiss_roll --json swiss_roll.json
    python experiments/train.py navit_stills --data.path data/stills/1.0.0 --json navit_stills.json
    python experiments/train.py vivit_b_16x2_model1 --data.path data/kinetics --init-from models/vit_b_16
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import sys
from typing import Annotated, Any, NoReturn

import jax
import rich.console
import rich.table
import tyro
from etils import epath

from sora_jax.commands.arguments import REGISTRY, UnusableArgumentError
from sora_jax.commands.host_memory import keep_freed_memory
from sora_jax.commands.process import prepare_process
from sora_jax.config import ExperimentConfig, StudyConfig
from sora_jax.configs import config_names, load_config
from sora_jax.families.load import check_family
from sora_jax.families.registry import task_for
from sora_jax.families.sora import SoraConfig
from sora_jax.files import check_writable, write_whole
from sora_jax.runs.costs import step_costs
from sora_jax.runs.run import make_run, run_class
from sora_jax.runs.study import mean_over_seeds, report_table
from sora_jax.training.loop import Outcome, train


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The command line.

    Attributes:
        name: name of a file in sora_jax/configs/ or path of a Python file; comes first.
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
            registry=REGISTRY,
        )
    except (ValueError, UnusableArgumentError) as error:  # of the config as a whole; tyro reports those of its parts
        unusable(str(error))
    if not arguments.dry_run:
        if arguments.workdir is None:
            arguments = dataclasses.replace(arguments, workdir=f"runs/{pathlib.Path(arguments.name).stem}")
        data = arguments.config.data
        if getattr(data, "path", None) == "" and not getattr(data, "mixture", ()):
            unusable("--data.path is needed, the directory of a prepared data set (experiments/prepare_data.py).")
        if arguments.json and not arguments.config.is_study:
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


def dry_run(arguments: Arguments) -> int:
    """Checks the config and prints what a step costs; allocates nothing."""
    figures = step_costs(arguments.config)
    table = rich.table.Table("", arguments.name, title="one training step")
    remat = getattr(arguments.config.model, "remat", "none")
    dense = "FLOPs, dense attention" if "tokens_per_step" in figures else "FLOPs"
    again = f"FLOPs, remat {remat}" if "flops_per_step_without_remat" in figures else dense
    for key, label, form in (
        ("num_params", "parameters", ","),
        ("num_table_params", "fixed table of positions", ","),
        ("tokens_per_step", "tokens (slots of rows)", ","),
        ("examples_per_step", "examples", ","),
        ("flops_per_step_without_remat", dense, ".4g"),
        ("flops_per_step", again, ".4g"),  # with what the backward pass computes again
        ("forward_macs", "multiply-accumulates, forward, of one", ".4g"),
    ):
        if key in figures:
            table.add_row(label, format(figures[key], form))
    mesh, num_devices = figures["mesh"], jax.device_count()
    table.add_row("mesh", ", ".join(f"{axis} {size}" for axis, size in mesh.items()))
    needed = math.prod(mesh.values())
    if needed != num_devices:
        table.add_row("devices", f"{needed} needed, {num_devices} here")
    rich.console.Console().print(table)
    if arguments.json is not None:
        write_whole(arguments.json, json.dumps(figures, indent=2) + "\n")
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


def run(arguments: Arguments) -> int:
    """Trains, and reports where the experiment has a report; returns the exit code."""
    if arguments.multihost:
        join_hosts()
    console = rich.console.Console(stderr=True)
    config, workdir = arguments.config, epath.Path(arguments.workdir)
    if config.is_study:
        return run_study(arguments, console)
    train_one(config, workdir, arguments.init_from, console)
    return 0


def run_study(arguments: Arguments, console: rich.console.Console) -> int:
    """Trains every seed of an experiment, and of those beside it, and reports on all; returns the exit code."""
    config, workdir = arguments.config, epath.Path(arguments.workdir)
    check_family(workdir, config)
    kind = run_class(config)
    configs = {arguments.name: config}
    for name in config.beside:
        if pathlib.Path(name).stem in {pathlib.Path(other).stem for other in configs}:
            raise ValueError(f"beside must name other experiments than those already run, got {name!r}.")
        configs[name] = kind.beside(config, load_config(name, type(config)), name)
    for name, experiment in configs.items():
        count = experiment.num_seeds + max(len(getattr(experiment, "learning_rates", ())) - 1, 0)
        runs = f"{name}: {count} x {experiment.num_steps:,} steps"
        console.print(runs if name == arguments.name else f"{runs}, beside it", highlight=False)
    for experiment in configs.values():  # what one of them lacks is reported before any is trained
        make_run(experiment, workdir, console)
    means = {}
    for name, experiment in configs.items():
        runs = run_seeds(name, experiment, workdir, arguments.init_from if name == arguments.name else None, console)
        if runs is None:
            return 0
        for run in runs:
            run.prepare_report()
        if jax.process_index() == 0:
            reports = [run.report() for run in runs]
            means[name] = mean_over_seeds(reports, *runs[0].headline)
    if jax.process_index() > 0:
        return 0
    kind.compare(means, workdir)
    rich.console.Console().print(report_table(means, runs[0].unit))
    console.print(f"figures and pictures: {workdir}", highlight=False, soft_wrap=True)
    figures = means.pop(arguments.name) | {"beside": means}
    if arguments.json is not None:
        write_whole(arguments.json, json.dumps(figures, indent=2) + "\n")
    return 0


def run_seeds(
    name: str, config: StudyConfig, workdir: epath.Path, init_from: str | None, console: rich.console.Console
) -> list[Any] | None:
    """Trains the seeds of one experiment, after the best of its learning rates was found with the first.

    Returns:
        The run of each seed's finished run; None after a preemption.
    """
    stem = pathlib.Path(name).stem

    def train_seed(config: StudyConfig, rate: float | None, seed: int) -> Any | None:
        middle = "" if rate is None else f"_rate_{rate:g}"
        directory = workdir / f"{stem}{middle}_seed_{seed}"
        if rate is not None:
            config = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, learning_rate=rate))
        run, outcome = train_one(dataclasses.replace(config, seed=seed), directory, init_from, console)
        return None if outcome is Outcome.PREEMPTED else run

    best = None
    rates = getattr(config, "learning_rates", ())
    if rates:
        scores = {}
        for rate in rates:
            run = train_seed(config, rate, config.seed)
            if run is None:
                return None
            scores[rate] = run.selection_score()
            console.print(f"{stem}, learning rate {rate:g}: {scores[rate]:.4f}", highlight=False)
        best = max(scores, key=scores.get)
    runs = []
    for seed in range(config.seed, config.seed + config.num_seeds):
        run = train_seed(config, best, seed)
        if run is None:
            return None
        runs.append(run)
    return runs


def train_one(
    config: ExperimentConfig, workdir: epath.Path, init_from: str | None, console: rich.console.Console
) -> tuple[Any, Outcome]:
    """Trains one run to its end (or to a preemption), unless it is there already."""
    check_family(workdir, config)
    run = make_run(config, workdir, console)
    outcome = train(
        run.config,
        workdir,
        run.open_batches,
        task_for(run.config),
        data_fingerprints=run.data_fingerprints,
        components=run.components(),
        init_from=run.initial_params(init_from) if init_from else None,
        sample_sheet=run.sample_sheet,
        console=console,
    )
    if jax.process_index() == 0:
        print(f"{outcome.value}: {workdir}")
    return run, outcome


def script() -> NoReturn:
    """Runs the command line of this process and ends it."""
    prepare_process()
    keep_freed_memory()
    sys.exit(main())
