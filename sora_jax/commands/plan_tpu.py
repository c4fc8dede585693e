"""Compiles a config's training step for TPUs on this machine, which needs none, and says whether it fits.

CONFIG and the values that can be set are those of train.py. Needs the extra `tpu` (pip install -e '.[tpu]').
Exit codes: 0 when the step fits, 1 when it does not or could not be compiled, 2 for an unusable command line.

Examples:
    python experiments/plan_tpu.py sora_xl --topology v5e:2x4
    python experiments/plan_tpu.py sora_xl --topology v5p:2x2x2 --data.batch-size 64 --json plan.json
    python experiments/plan_tpu.py sora_nano --topology v5e:2x2 --model.attention splash
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import sys
from typing import Annotated, NoReturn

import jax
import rich.console
import rich.table
import tyro

from sora_jax.commands.arguments import REGISTRY, UnusableArgumentError
from sora_jax.commands.process import prepare_process
from sora_jax.config import ExperimentConfig
from sora_jax.configs import config_names, load_config
from sora_jax.families.sora import SoraConfig
from sora_jax.files import check_writable, write_whole
from sora_jax.runs.plan import MissingCompilerError, OutOfMemoryError, StepPlan, plan_step
from sora_jax.training.chips import GIB


@dataclasses.dataclass(frozen=True)
class Arguments:
    """The command line.

    Attributes:
        name: name of a file in sora_jax/configs/ or path of a Python file; comes first.
        config: the values of that config; each can be set.
        topology: chip and layout, like v5e:2x4.
        json: write the figures of the table, in bytes, to this file.
    """

    name: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="CONFIG")]
    config: Annotated[ExperimentConfig, tyro.conf.arg(name="")]
    topology: str
    json: pathlib.Path | None = None


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    try:
        arguments = parse(sys.argv[1:] if argv is None else argv)
        if arguments.json is not None:
            check_writable("--json", arguments.json)
        jax.config.update("jax_platforms", "cpu")  # the compiler runs here; a chip that is here stays free
        with rich.console.Console(stderr=True).status(f"compiling for {arguments.topology}"):
            plan = plan_step(arguments.config, arguments.topology)
    except (ValueError, UnusableArgumentError, MissingCompilerError, OutOfMemoryError) as error:
        print(f"plan_tpu.py: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError | UnusableArgumentError) else 1
    rich.console.Console().print(plan_table(arguments.name, plan))
    if arguments.json is not None:
        write_whole(arguments.json, json.dumps(dataclasses.asdict(plan), indent=2) + "\n")
    return 0 if plan.total_bytes <= plan.hbm_bytes else 1


def parse(argv: list[str]) -> Arguments:
    """Reads the command line.

    Raises:
        ValueError: CONFIG is missing or unknown.
        UnusableArgumentError: a value that cannot be read.
    """
    default: ExperimentConfig = SoraConfig()
    if argv and not argv[0].startswith("-"):
        default = load_config(argv[0])
    elif not {"-h", "--help"} & set(argv):
        raise ValueError(f"CONFIG comes first, one of {', '.join(config_names())} or the path of a Python file.")
    return tyro.cli(
        Arguments,
        args=argv,
        description=__doc__,
        default=Arguments(name=tyro.MISSING, config=default, topology=tyro.MISSING),
        config=(tyro.conf.AvoidSubcommands,),  # a config's own kinds of data and model
        registry=REGISTRY,
    )


def plan_table(name: str, plan: StepPlan) -> rich.table.Table:
    """Returns what a person reads: memory of one device, and the program's kernels and collectives."""
    table = rich.table.Table("", name, title=f"one training step on {plan.num_devices} x {plan.device_kind}")
    table.add_row("mesh", ", ".join(f"{axis} {size}" for axis, size in plan.mesh.items()))
    for label, size in (
        ("arguments (state and batch)", plan.argument_bytes),
        ("outputs", plan.output_bytes),
        ("  in place of arguments", -plan.aliased_bytes),
        ("temporaries", plan.temporary_bytes),
        ("program", plan.code_bytes),
    ):
        table.add_row(label, f"{size / GIB:.2f} GiB")
    share = plan.total_bytes / plan.hbm_bytes
    table.add_row("memory per device", f"{plan.total_bytes / GIB:.2f} of {plan.hbm_bytes / GIB:.0f} GiB ({share:.0%})")
    table.add_row("Pallas kernels (loop bodies once)", f"{plan.num_pallas_calls}")
    for kind, count in plan.collectives.items():
        if count:
            table.add_row(f"{kind} (loop bodies once)", f"{count}")
    table.add_row("compiled in", f"{plan.compile_seconds:.0f} s")
    return table


def script() -> NoReturn:
    """Runs the command line of this process and ends it."""
    prepare_process()
    sys.exit(main())
