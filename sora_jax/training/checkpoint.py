"""Checkpoints of a run by Orbax.

A checkpoint's items stand apart (`params`, `ema_params`, `opt_state`, `data`), so that what only samples reads the
averaged parameters alone. Saving is asynchronous; a directory that a killed process left half written has a
temporary name, is never taken for a checkpoint and is removed at the next start. What else stands among the
checkpoints, whatever its name, is the user's: it is neither read nor removed.
"""

from __future__ import annotations

import contextlib
import errno
import math
import os
import textwrap
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint.checkpoint_managers import preservation_policy

from sora_jax.array_types import PyTree
from sora_jax.models.weights import WEIGHTS_FILE, check_finite, check_shapes
from sora_jax.training.checkpoint_folder import FOLDER, OwnSteps, check_places, drop_echoes, system_error, writing
from sora_jax.training.state import TrainState


class Checkpointer:
    """Saves and restores a run's state; keeps the last checkpoints and the best.

    Args:
        workdir: directory of the run.
        keep: newest checkpoints that are kept, beside the one with the lowest held-out loss.
        track_best: whether there will be held-out losses.
    """

    def __init__(self, workdir: epath.PathLike, keep: int, track_best: bool = True) -> None:
        policies = [
            preservation_policy.LatestN(keep),
            preservation_policy.BestN(
                get_metric_fn=lambda metrics: metrics["held_out_loss"],
                reverse=True,
                n=1,
                keep_checkpoints_without_metrics=False,
            ),
        ]
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
            best_fn=(lambda metrics: metrics["held_out_loss"]) if track_best else None,
            best_mode="min",
            step_name_format=OwnSteps(),
            cleanup_tmp_directories=True,
            enable_async_checkpointing=True,
        )
        self._workdir = epath.Path(workdir)
        self._directory = self._workdir.absolute() / FOLDER
        handlers = {name: ocp.StandardCheckpointHandler() for name in ("params", "ema_params", "opt_state")}
        handlers["data"] = ocp.JsonCheckpointHandler()
        drop_echoes()
        with writing(self._workdir):
            self._manager = ocp.CheckpointManager(self._directory, options=options, item_handlers=handlers)

    @property
    def latest_step(self) -> int | None:
        """The step of the newest whole checkpoint, None where there is none."""
        return self._manager.latest_step()

    @property
    def best_loss(self) -> float:
        """The lowest held-out loss among the checkpoints, infinite where none has one."""
        losses = [self._manager.metrics(step) for step in self._manager.all_steps()]
        return min((loss["held_out_loss"] for loss in losses if loss), default=math.inf)

    def save(self, step: int, state: TrainState, data: Any, held_out_loss: float | None = None) -> None:
        """Starts to save; returns once the state may be overwritten. A step that is already saved is left alone.

        Args:
            step: updates made.
            state: after them.
            data: JSON-able state of the data iterator after the last batch of them.
            held_out_loss: at this step, if it was measured.

        Raises:
            OSError: this or an earlier checkpoint cannot be written, or something else stands in its place.
        """
        if step == self.latest_step:
            return
        check_places(self._workdir, (step,))
        with writing(self._workdir):
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardSave(state.params),
                    ema_params=ocp.args.StandardSave(state.ema_params),
                    opt_state=ocp.args.StandardSave(state.opt_state),
                    data=ocp.args.JsonSave({"step": step, "state": data}),
                ),
                metrics=None if held_out_loss is None else {"held_out_loss": held_out_loss},
            )

    def restore(self, abstract: TrainState, step: int | None = None) -> tuple[TrainState, Any]:
        """Restores a checkpoint, bitwise as it was saved.

        Args:
            abstract: shapes, dtypes and shardings of the state.
            step: of the checkpoint (default: the newest).

        Returns:
            The state, and the data iterator's.

        Raises:
            FileNotFoundError: there is no checkpoint.
            ValueError: the checkpoint is damaged, or of another model, naming the first parameter that differs.
        """
        step = self.latest_step if step is None else step
        if step is None:
            raise FileNotFoundError(f"{self._directory} has no checkpoint.")
        directory = self._directory / str(step)
        with _reading(directory):
            params = self._manager.item_metadata(step)["params"].tree
        check_shapes(params, abstract.params, f"checkpoint {step}")
        with _reading(directory):
            restored = self._manager.restore(
                step,
                args=ocp.args.Composite(
                    params=ocp.args.StandardRestore(abstract.params),
                    ema_params=ocp.args.StandardRestore(abstract.ema_params),
                    opt_state=ocp.args.StandardRestore(abstract.opt_state),
                    data=ocp.args.JsonRestore(),
                ),
            )
        scalars = {"step": step, "bad_step": -1}
        scalars = {k: jax.device_put(np.int32(v), getattr(abstract, k).sharding) for k, v in scalars.items()}
        items = {name: restored[name] for name in ("params", "ema_params", "opt_state")}
        return TrainState(**scalars, **items), restored["data"]["state"]

    def check(self) -> None:
        """Raises OSError where a checkpoint that was being saved could not be written; does not wait."""
        with writing(self._workdir):
            self._manager.check_for_errors()

    def wait(self) -> None:
        """Waits until what was saved is on disk; OSError where it could not be written."""
        with writing(self._workdir):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits and ends the saving threads."""
        with writing(self._workdir):
            self._manager.close()


def latest_step(workdir: epath.PathLike) -> int | None:
    """Returns the step of a run's newest whole checkpoint, None where there is none."""
    steps = OwnSteps().find_all(epath.Path(workdir).absolute() / FOLDER)
    return max((found.step for found in steps), default=None)


def run_directory_of(path: epath.PathLike) -> epath.Path:
    """Returns the directory of the run of a checkpoint (`WORKDIR/checkpoints/STEP`), and any other path as it is."""
    path = epath.Path(path)
    return path.parent.parent if path.parent.name == FOLDER else path


def read_checkpoint(path: epath.PathLike, averaged: bool = True, like: PyTree | None = None) -> PyTree:
    """Returns the parameters of a run's newest checkpoint, or of the checkpoint at `path`.

    Args:
        path: a run, or one of its checkpoints (`WORKDIR/checkpoints/STEP`).
        averaged: read the EMA of the parameters rather than the parameters.
        like: shapes, dtypes and shardings (`jax.ShapeDtypeStruct`) of the parameters; each device then gets its share
            straight from the disk.

    Returns:
        Arrays like `like`; without it NumPy arrays, float32, whatever mesh they were saved from.

    Raises:
        FileNotFoundError: a run without checkpoints.
        ValueError: a damaged checkpoint, parameters of other shapes than `like`, or one that is not finite, named.
    """
    checkpoint = _checkpoint_directory(epath.Path(path))
    params = _read_orbax(checkpoint / ("ema_params" if averaged else "params"), like)
    check_finite(params, str(checkpoint))
    return params


def _checkpoint_directory(path: epath.Path) -> epath.Path:
    """Returns the directory of a run's newest checkpoint, or `path` where it is a checkpoint."""
    if path.parent.name == FOLDER:
        return path
    step = latest_step(path)
    if step is None:
        raise FileNotFoundError(f"{path} holds a run without checkpoints and no {WEIGHTS_FILE}.")
    return path / FOLDER / str(step)


def _read_orbax(path: epath.Path, like: PyTree | None) -> PyTree:
    """Returns one item of a checkpoint, see `read_checkpoint`."""
    handler = ocp.PyTreeCheckpointHandler()
    with _reading(path.parent):
        tree = handler.metadata(path.absolute()).tree
    if like is None:
        arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    else:
        check_shapes(tree, like, str(path.parent))
        arguments = jax.tree.map(lambda x: ocp.ArrayRestoreArgs(sharding=x.sharding, dtype=x.dtype), like)
    with _reading(path.parent):
        return handler.restore(path.absolute(), args=ocp.args.PyTreeRestore(restore_args=arguments))


@contextlib.contextmanager
def _reading(checkpoint: epath.Path) -> Iterator[None]:
    """Raises ValueError naming the checkpoint where one of its files is missing or is not what Orbax wrote.

    Where the system cannot read it (permissions, a disk or a network that fails), that is an OSError: nothing is known
    of what the files hold.
    """
    try:
        yield
    except RuntimeError:  # of the devices
        raise
    except Exception as error:  # Orbax and TensorStore raise all kinds, `Exception` itself among them
        code = system_error(error)
        if code is not None and code not in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR):
            raise OSError(f"checkpoint {checkpoint} cannot be read: {os.strerror(code)}.") from error
        raise ValueError(
            f"checkpoint {checkpoint} is damaged or cannot be read ({textwrap.shorten(str(error), 100)}); once it is "
            "removed, the run goes on from the one before it."
        ) from error
