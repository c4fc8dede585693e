"""Experiments, one file each: values alone, with the command, the hardware and what was measured at its top.

A file has a function `config() -> ExperimentConfig` and its name is the experiment's. A file of several experiments
that differ by size has `config(name)` and names them in `NAMES`.
"""

from __future__ import annotations

import ast
import functools
import importlib.util
import pathlib
import sys
import traceback
from typing import Any

from sora_jax.config import ExperimentConfig

FOLDER = pathlib.Path(__file__).parent


@functools.cache
def _files() -> dict[str, pathlib.Path]:
    """Returns the file of each name; files are read, not run."""
    found = {}
    for path in sorted(FOLDER.glob("[a-z]*.py")):
        names = [path.stem]
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "NAMES":
                names = ast.literal_eval(node.value)
        found |= dict.fromkeys(names, path)
    return found


def config_names() -> list[str]:
    """Returns the names of the experiments that come with the package."""
    return sorted(_files())


def load_config(name: str, kind: type[ExperimentConfig] = ExperimentConfig) -> Any:
    """Returns the config that a name or a path stands for.

    Args:
        name: of an experiment, or the path of a Python file.
        kind: what it must be.

    Raises:
        ValueError: there is no such config, its file cannot be run (naming the line), or it has no function `config`
            that returns one of the `kind`.
    """
    path = pathlib.Path(name) if name.endswith(".py") else _files().get(name)
    if path is None or not path.is_file():
        raise ValueError(f"no config {name!r}: give one of {', '.join(config_names())} or the path of a Python file.")
    spec = importlib.util.spec_from_file_location(f"experiment_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses defined in the file look themselves up
    try:
        spec.loader.exec_module(module)
        function, names = getattr(module, "config", None), getattr(module, "NAMES", None)
        if names is not None and name not in names:
            raise ValueError(f"a file of several experiments is asked for by one of their names, {', '.join(names)}.")
        config = (function() if names is None else function(name)) if callable(function) else None
    except SyntaxError as error:
        raise ValueError(f"{error.filename}, line {error.lineno}: {error.msg}.") from error
    except Exception as error:  # whatever it is, it comes from the file
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == spec.origin]
        place = f"{path}, line {lines[-1]}" if lines else path
        raise ValueError(f"{place}: {type(error).__name__}: {error}") from error
    if not isinstance(config, kind):
        raise ValueError(f"{path} must have a function `config() -> {kind.__name__}`.")
    return config
