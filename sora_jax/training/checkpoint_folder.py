"""The folder of a run's checkpoints: which of what stands there is a step, and what to say when none can be written."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import re
import sys
import textwrap
import traceback
from collections.abc import Container, Iterator
from typing import Any

import orbax.checkpoint as ocp
from etils import epath

FOLDER = "checkpoints"
STEP_FILE = "data/metadata"  # JSON that holds the step, of the item that holds the place in the data
COMMIT_FILE = "_CHECKPOINT_METADATA"  # which Orbax writes into each step
_NUMBER = re.compile(r"0|[1-9]\d*")


class CheckpointNotWrittenError(OSError):
    """A checkpoint could not be written."""


class OwnSteps(ocp.path.step.NameFormat):
    """Steps by their numbers, of which only those count that a run has saved whole, under the name that they have now.

    So a folder `99` of something else, a copy of another step and a file are not steps: Orbax's manager, which asks
    this class, neither reads them nor removes them.
    """

    def build_name(self, step: int) -> str:
        """Returns the name of a step's folder."""
        return str(step)

    def find_all(self, base_path: epath.PathLike) -> Iterator[ocp.path.step.Metadata]:
        """Yields all steps."""
        for path in _numbered(epath.Path(base_path)):
            if is_step(path):
                yield ocp.path.step.Metadata(step=int(path.name), path=path)

    def find_step(self, base_path: epath.PathLike, step: int) -> ocp.path.step.Metadata:
        """Returns a step; ValueError where it is none."""
        path = epath.Path(base_path) / self.build_name(step)
        if not is_step(path):
            raise ValueError(f"{path} is no checkpoint.")
        return ocp.path.step.Metadata(step=step, path=path)


def is_step(path: epath.Path) -> bool:
    """Returns whether a folder is a checkpoint of the step that it is named by; it may still be damaged."""
    if not (path.is_dir() and ocp.path.step.is_path_finalized(path) and (path / COMMIT_FILE).exists()):
        return False
    try:
        return json.loads((path / STEP_FILE).read_text())["step"] == int(path.name)
    except (ValueError, KeyError, TypeError, FileNotFoundError):
        return True  # reading it says what is wrong with it


def strangers(workdir: epath.PathLike) -> list[epath.Path]:
    """Returns what is called by a number among a run's checkpoints and is none of them."""
    paths = _numbered(epath.Path(workdir).absolute() / FOLDER)
    return [path for path in paths if not (is_step(path) or ocp.path.step.is_path_temporary(path))]


def check_places(workdir: epath.PathLike, steps: Container[int]) -> None:
    """Raises ValueError where something else stands at a place where one of `steps` will be saved."""
    for path in strangers(workdir):
        if int(path.name) in steps:
            raise ValueError(f"{path} is no checkpoint of this run, and step {path.name} will be saved there: move it.")


def what_is_kept(workdir: epath.PathLike) -> str:
    """Returns which checkpoint a run will go on from, in words."""
    steps = OwnSteps().find_all(epath.Path(workdir).absolute() / FOLDER)
    newest = max((found.step for found in steps), default=None)
    return "there is no checkpoint yet" if newest is None else f"the last whole checkpoint is step {newest}"


@contextlib.contextmanager
def writing(workdir: epath.PathLike) -> Iterator[None]:
    """Raises OSError naming the run, the reason and the checkpoint that is left where one cannot be written."""
    try:
        yield
    except (OSError, ValueError) as error:  # TensorStore's errors of all kinds are ValueErrors
        where = epath.Path(workdir) / FOLDER
        raise CheckpointNotWrittenError(
            f"a checkpoint cannot be written to {where} ({_reason(error)}); {what_is_kept(workdir)}."
        ) from error


@contextlib.contextmanager
def naming_what_is_kept(workdir: epath.PathLike) -> Iterator[None]:
    """Adds to an OSError (a full disk, a quota) which file or run it is about and the checkpoint that is left."""
    try:
        yield
    except CheckpointNotWrittenError:
        raise
    except OSError as error:
        raise OSError(f"{error.filename or workdir}: {_reason(error)}; {what_is_kept(workdir)}.") from error


@functools.cache
def drop_echoes() -> None:
    """Keeps off the terminal what Orbax, asyncio and TensorStore write beside the error that is raised for it.

    Orbax logs the exception of each of its threads, with a traceback. TensorStore's other writes, which end after the
    first one has failed, each complain of the event loop that was closed meanwhile, and asyncio, whenever they are
    collected as garbage (at the end of the process, at times), that nobody has asked for their errors.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_is_no_echo)
    hook = sys.unraisablehook

    def tell(unraisable: Any) -> None:
        if not (unraisable.exc_type is RuntimeError and str(unraisable.exc_value) == "Event loop is closed"):
            hook(unraisable)

    sys.unraisablehook = tell


def _is_no_echo(record: logging.LogRecord) -> bool:
    """Returns whether a record is of anything but an exception that has passed through Orbax."""
    if not record.exc_info or record.exc_info[2] is None:
        return True
    frames = traceback.extract_tb(record.exc_info[2])
    return not any(f"{os.sep}orbax{os.sep}" in frame.filename for frame in frames)


def _numbered(folder: epath.Path) -> list[epath.Path]:
    """Returns what is called by a number in a folder, in the order of the numbers."""
    paths = folder.iterdir() if folder.is_dir() else ()
    return sorted((path for path in paths if _NUMBER.fullmatch(path.name)), key=lambda path: int(path.name))


def system_error(error: Exception) -> int | None:
    """Returns the system's number of what Python or TensorStore raised `error` for, None where there is none."""
    if isinstance(error, OSError):
        return error.errno
    code = re.search(r"os_error_code='(\d+)'", str(error))
    return int(code[1]) if code else None


def _reason(error: Exception) -> str:
    """Returns why something could not be written: what the system says, where it has said something."""
    code = system_error(error)
    return textwrap.shorten(str(error), 200) if code is None else os.strerror(code)
