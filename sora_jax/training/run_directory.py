"""A run's directory: which config it belongs to, and whether it is done.

WORKDIR/config.json           the ExperimentConfig, and the components beside it
WORKDIR/data.json             a fingerprint of each split that was read (sora_jax.data.identity)
WORKDIR/checkpoints/STEP/     params, ema_params, opt_state, data (sora_jax.training.checkpoint)
WORKDIR/metrics.jsonl         a line of figures each `log_every` steps; tensorboard/ holds the same
WORKDIR/samples/              sample sheets
WORKDIR/DONE                  the step at which the run finished
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, TypeVar

from etils import epath

from sora_jax.components import Components, difference
from sora_jax.config import ExperimentConfig
from sora_jax.config_json import to_json, to_values
from sora_jax.files import write_whole
from sora_jax.models.weights import read_config_file, read_document

Config = TypeVar("Config", bound=ExperimentConfig)

# What may change when a run is continued: how long it is, what is written and when, and how the same numbers are
# computed. A longer run stretches its cosine over the new `num_steps` from where it stands.
CHANGEABLE = (
    "num_steps", "log_every", "eval_every", "eval_batches", "save_every", "keep", "sample_every", "sample.",
    "num_seeds", "num_held_out", "num_draws", "num_samples", "beside", "learning_rates", "selection_split",
    "test_sides", "mesh.", "model.remat", "model.attention", "data.num_workers", "data.prefetch", "data.eval_splits",
)  # fmt: skip


DATA_FILE = "data.json"


class ConfigChangedError(ValueError):
    """A run was started again with a config that is not its own."""


class ComponentChangedError(ValueError):
    """A run was started again with a text encoder, a codec or a process that is not its own."""


class DataChangedError(ValueError):
    """A run was started again with data that is not its own."""


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested dicts as one with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def read_config(directory: epath.PathLike, kind: type[Config]) -> Config:
    """Reads `config.json` of a run or of an exported model.

    Args:
        directory: of the run or the model.
        kind: of the experiment that trained it.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not a config of this version, naming the file and the key; or another kind's, which is named.
    """
    path = epath.Path(directory) / "config.json"
    if not path.exists():
        raise FileNotFoundError(f"{directory} is neither a run nor an exported model: it has no config.json.")
    return read_config_file(path, kind)


def write_config(directory: epath.PathLike, config: ExperimentConfig, components: Components) -> None:
    """Writes `config.json`, with the components that the model is trained with, whole or not at all."""
    write_whole(epath.Path(directory) / "config.json", to_json(config, components))


def check_config(
    directory: epath.PathLike, config: ExperimentConfig, latest_step: int, path_may_change: bool = False
) -> None:
    """Checks that a run may be continued with `config`.

    Args:
        directory: of the run.
        config: asked for now.
        latest_step: of the run's newest checkpoint. (A run without one may be started anew with any config.)
        path_may_change: what is at `data.path` is checked otherwise (`check_data`).

    Raises:
        ConfigChangedError: a field differs that would make this another run (all but `CHANGEABLE`), or `num_steps`
            is below the step already reached; names the field and both values.
    """
    own = read_config(directory, type(config))
    changeable: tuple[str, ...] = CHANGEABLE
    if path_may_change:
        own, changeable = _at_places_of(own, config), (*CHANGEABLE, "data.path")
    before, asked = flatten(to_values(own)), flatten(to_values(config))
    for name in sorted(asked, key=lambda name: not name.endswith("kind")):  # another class says more than its fields
        value = asked[name]
        may_change = any(name.startswith(c) if c.endswith(".") else name == c for c in changeable)
        if value != before.get(name) and not may_change:
            raise ConfigChangedError(
                f"{directory} holds a run with {name} = {before.get(name)!r}, now it is {value!r}: "
                "restore the value or choose another --workdir."
            )
    if config.num_steps < latest_step:
        raise ConfigChangedError(
            f"{directory} holds a run at step {latest_step}; num_steps must be at least that, got {config.num_steps}."
        )


def read_components(directory: epath.PathLike) -> Components:
    """Returns what a run or an exported model was trained with."""
    return read_document(epath.Path(directory) / "config.json").components


def check_components(directory: epath.PathLike, components: Components) -> None:
    """Checks that a run may be continued with components.

    Raises:
        ComponentChangedError: one is not that which the run was trained with so far, saying which.
    """
    if words := difference(read_components(directory), components):
        raise ComponentChangedError(f"{directory} holds a run that was {words}; or choose another --workdir.")


def read_data(directory: epath.PathLike) -> dict[str, str]:
    """Returns the fingerprint of each split that a run has read, none where it recorded none.

    Raises:
        ValueError: a damaged file.
    """
    path = epath.Path(directory) / DATA_FILE
    if not path.exists():
        return {}
    try:
        fingerprints = json.loads(path.read_text())["fingerprints"]
        if all(isinstance(value, str) for value in fingerprints.values()):
            return fingerprints
    except (ValueError, TypeError, KeyError, AttributeError):
        pass
    raise ValueError(
        f"{path} is damaged: restore it, or remove it where the data is surely the run's own, whose "
        "fingerprints are then recorded anew."
    )


def write_data(directory: epath.PathLike, fingerprints: Mapping[str, str]) -> None:
    """Records the fingerprint of each split that a run reads."""
    text = json.dumps({"fingerprints": dict(fingerprints)}, indent=2) + "\n"
    write_whole(epath.Path(directory) / DATA_FILE, text)


def write_moved(directory: epath.PathLike, config: ExperimentConfig, fingerprints: Mapping[str, str]) -> None:
    """Records where the data of a finished run is now, and its fingerprints; `config` may differ in other ways."""
    own, components = read_config(directory, type(config)), read_components(directory)
    write_config(directory, _at_places_of(own, config), components)
    write_data(directory, fingerprints)


def _at_places_of(own: Config, other: Config) -> Config:
    """Returns a config whose data lies where that of another does: the path, or those of a mixture's parts.

    It is `own` where the two are mixtures of other parts, or of the same in another order.
    """
    mixtures = getattr(own.data, "mixture", ()), getattr(other.data, "mixture", ())
    paths = [[part.path for part in mixture] for mixture in mixtures]
    if len(paths[0]) != len(paths[1]) or (paths[0] != paths[1] and sorted(paths[0]) == sorted(paths[1])):
        return own
    places: dict[str, Any] = {"path": other.data.path} if hasattr(other.data, "path") else {}
    if paths[0]:
        parts = zip(*mixtures, strict=True)
        places["mixture"] = tuple(dataclasses.replace(part, path=there.path) for part, there in parts)
    return dataclasses.replace(own, data=dataclasses.replace(own.data, **places))


def place_of(data: Any) -> str:
    """Returns where the data of a config lies, for messages."""
    return ", ".join(part.path for part in data.mixture) if getattr(data, "mixture", ()) else data.path


def check_data(
    directory: epath.PathLike, config: ExperimentConfig, recorded: Mapping[str, str], found: Mapping[str, str]
) -> list[str]:
    """Checks that the data at `config.data.path` is what a run has read before, wherever it lies now.

    Args:
        directory: of the run.
        config: asked for now.
        recorded: fingerprints that the run recorded of its splits.
        found: fingerprints of the splits that it would read now; a split that was not recorded is new to it.

    Returns:
        What there is to say: that the data has moved, or that nothing was recorded.

    Raises:
        DataChangedError: a split holds something else, naming both fingerprints.
    """
    if not found:
        return []
    path, before = place_of(config.data), place_of(read_config(directory, type(config)).data)
    changed = [split for split, fingerprint in found.items() if recorded.get(split, fingerprint) != fingerprint]
    if changed:
        split = changed[0]
        raise DataChangedError(
            f"data.path {path!r} holds other data than {directory} was run on: split {split!r} has the fingerprint "
            f"{found[split]}, the run's has {recorded[split]}. Name the run's data by --data.path or choose another "
            "--workdir."
        )
    fingerprints = ", ".join(f"{split} {fingerprint}" for split, fingerprint in found.items())
    if not recorded:
        moved = f"data.path was {before}, and whether {path} holds the same is unknown: " if path != before else ""
        return [f"{moved}the run recorded no fingerprint of its data; from now on it is that of {path}: {fingerprints}"]
    if path == before:
        return []
    return [f"the data has moved from {before} to {path}: the same by its fingerprints ({fingerprints})"]


def done_step(directory: epath.PathLike) -> int | None:
    """Returns the step at which a run finished, None where it has not; ValueError where the file does not say."""
    path = epath.Path(directory) / "DONE"
    if not path.exists():
        return None
    text = path.read_text()
    try:
        return int(json.loads(text)["step"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f'{path} must hold the step at which the run finished, like {{"step": 100}}, got {text[:80]!r}; remove it, '
            "and the run goes on."
        ) from None


def mark_done(directory: epath.PathLike, step: int) -> None:
    """Says that the run has finished at `step`."""
    write_whole(epath.Path(directory) / "DONE", json.dumps({"step": step}) + "\n")
