"""Figures of an experiment's seeds together, and beside those of others."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np
import rich.table

from sora_jax.runs.run import Report


def mean_over_seeds(reports: list[Report], key: str, name: str) -> Report:
    """Returns the means of the figures of several seeds; what is the same for all stays as it is.

    Args:
        reports: of each seed.
        key: of the figure that the experiment is about.
        name: of it, in the names of what is added: `<name>_by_seed` and, of two seeds and more, `<name>_seed_std`, its
            standard deviation from seed to seed. A standard error in a report is the mean of the seeds' own, since
            these are taken over the same examples.
    """
    first = reports[0]
    means = {
        name: value
        if all(report[name] == value for report in reports)
        else np.mean([report[name] for report in reports], axis=0).tolist()
        for name, value in first.items()
    }
    values = [report[key] for report in reports]
    means |= {"num_seeds": len(values), f"{name}_by_seed": values}
    return means | ({f"{name}_seed_std": float(np.std(values, ddof=1))} if len(values) > 1 else {})


def report_table(means: dict[str, Report], unit: str) -> rich.table.Table:
    """Returns the figures of experiments side by side; lists are left to their pictures and to the JSON."""
    heads = [pathlib.Path(name).stem for name in means]
    table = rich.table.Table(title="means over seeds")
    table.add_column(unit, overflow="fold")  # a narrow terminal cuts no name and no figure off
    for head in heads:
        table.add_column(head, overflow="fold")
    names = dict.fromkeys(name for figures in means.values() for name in figures)
    for name in names:
        cells = [figures.get(name, "") for figures in means.values()]
        if not any(isinstance(cell, list | dict) for cell in cells):
            table.add_row(name, *(_cell(cell) for cell in cells))
    return table


def _cell(value: Any) -> str:
    """Returns a figure as it stands in a table."""
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    return f"{value:.4g}" if value and not 1e-3 <= abs(value) < 1e5 else f"{value:.4f}"
