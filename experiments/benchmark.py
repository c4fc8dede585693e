"""Measures what training costs, what samplers are worth and how fast DiT is, on the machine at hand.

Each suite is a file in experiments/benchmarks/; `benchmark.py SUITE --help` shows its options.

Examples:
    python experiments/benchmark.py packing --data.path data/fluent_emoji
    python experiments/benchmark.py packing --data.path data/fluent_emoji --row-lengths 512 --rows 1000 --num-steps 3
    python experiments/benchmark.py data --data.path data/fluent_emoji --json data.json
    python experiments/benchmark.py samplers --reference-steps 200
    python experiments/benchmark.py dit --config dit_s_2 --json dit.json
    python experiments/benchmark.py waste --path data/stills/1.0.0 --row-lengths 1024
"""

from __future__ import annotations

import json
import sys

import tyro
from benchmarks import data, dit, packing, samplers, waste

from sora_jax.commands.host_memory import keep_freed_memory
from sora_jax.commands.process import prepare_process
from sora_jax.files import check_writable, write_whole

SUITES = {
    "packing": (packing.PackingOptions, packing.run),
    "data": (data.DataOptions, data.run),
    "dit": (dit.DiTOptions, dit.run),
    "samplers": (samplers.SamplersOptions, samplers.run),
    "waste": (waste.WasteOptions, waste.run),
}


def main(argv: list[str]) -> int:
    """Runs the command line; returns the exit code."""
    try:
        options = tyro.extras.subcommand_cli_from_dict(
            {name: suite for name, (suite, _) in SUITES.items()}, args=argv, description=__doc__
        )
        if options.json is not None:
            check_writable("--json", options.json)
        suite = next(run for kind, run in SUITES.values() if isinstance(options, kind))
        figures = suite(options)
        if options.json is not None:
            write_whole(options.json, json.dumps(figures, indent=2) + "\n")
    except (ValueError, OSError) as error:
        print(f"benchmark.py: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    return 0


if __name__ == "__main__":
    prepare_process()
    keep_freed_memory()
    sys.exit(main(sys.argv[1:]))
