"""Models on the disk: runs, their checkpoints, and exported models (safetensors and the run's JSON)."""

from __future__ import annotations

import math

import jax
import numpy as np
from etils import epath

from sora_jax.array_types import PyTree
from sora_jax.config import ExperimentConfig
from sora_jax.families.registry import FAMILIES, load, make_task
from sora_jax.families.sora import SoraConfig
from sora_jax.files import write_whole
from sora_jax.models.kinds import kind_of
from sora_jax.models.quantize import quantize_tensors
from sora_jax.models.weights import WEIGHTS_FILE, check_shapes, read_params, tensor_bytes
from sora_jax.provenance import flat_names
from sora_jax.training.checkpoint import read_checkpoint, run_directory_of
from sora_jax.training.checkpoint_folder import FOLDER
from sora_jax.training.run_directory import Config, read_config, read_keys, write_config
from sora_jax.training.state import abstract_params

STORAGE_DTYPES = ("float32", "bfloat16", "float16", "int8")
INT8_GROUP = 64  # numbers of a kernel's row that share a scale, or as many as divide the row


def config_class(path: epath.PathLike) -> type[ExperimentConfig]:
    """Returns the class of the config of a run, one of its checkpoints or an exported model.

    Raises:
        FileNotFoundError: there is none of them at `path`.
        ValueError: what is there is something else, which is named.
    """
    if not epath.Path(path).exists():
        raise FileNotFoundError(f"no run, checkpoint or exported model at {path}.")
    keys = read_keys(path)
    if not keys:
        raise FileNotFoundError(f"{path} is neither a run nor an exported model: it has no config.json.")
    kind = kind_of(keys)
    if kind is None or not kind.run:
        what = "of no kind that is known" if kind is None else kind.what
        raise ValueError(f"{path} is neither a run nor an exported model: it is {what}.")
    return next(load(family.config) for family in FAMILIES.values() if family.config.endswith(f":{kind.config}"))


def load_model(path: epath.PathLike, averaged: bool = True, kind: type[Config] = SoraConfig) -> tuple[Config, PyTree]:
    """Reads a model's config and parameters.

    Args:
        path: a run (its newest checkpoint is read), one checkpoint of a run (`WORKDIR/checkpoints/STEP`) or an
            exported model.
        averaged: of a run, read the EMA of the parameters rather than the parameters.
        kind: of the experiment that trained it.

    Returns:
        The config, and the parameters as NumPy arrays, float32.

    Raises:
        FileNotFoundError: there is no model at `path`.
        ValueError: another kind of model, which is named, or parameters that are not those of its config or not finite,
            naming the first.
    """
    path = epath.Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no run, checkpoint or exported model at {path}.")
    if (path / WEIGHTS_FILE).exists():
        config = read_config(path, kind)
        params = read_params(path / WEIGHTS_FILE)
    else:
        config = read_config(run_directory_of(path), kind)
        params = read_checkpoint(path, averaged)
    check_shapes(params, abstract_params(make_task(config)), str(path))
    return config, params


def export_model(
    path: epath.PathLike, config: ExperimentConfig, params: PyTree, storage_dtype: str = "float32"
) -> None:
    """Writes a model as `model.safetensors` (names joined by dots) and `config.json`.

    Args:
        path: directory; made if needed.
        config: of the model.
        params: float32.
        storage_dtype: of the numbers in the file, `float32`, `bfloat16`, `float16`, or `int8`, which stores kernels in
            8 bits with a scale for each 64 numbers (`sora_jax.models.quantize`) and the rest as float32. Reading
            gives float32 again.

    Raises:
        ValueError: a run at `path`, an unknown `storage_dtype`, parameters that are not those of `config`, or one that
            it cannot hold.
    """
    path = epath.Path(path)
    if (path / FOLDER).exists():
        raise ValueError(f"{path} holds a run, and its config.json would be replaced: choose another --output.")
    if storage_dtype not in STORAGE_DTYPES:
        raise ValueError(f"storage_dtype must be one of {', '.join(STORAGE_DTYPES)}, got {storage_dtype!r}.")
    check_shapes(params, abstract_params(make_task(config)), "the model to export")
    values = {name: np.asarray(leaf) for name, leaf in flat_names(params).items()}
    with np.errstate(over="ignore", invalid="ignore"):
        if storage_dtype == "int8":
            kernels = [name for name in values if name.endswith(".kernel") and values[name].shape[-1] % 8 == 0]
            groups = {name: math.gcd(values[name].shape[-1], INT8_GROUP) for name in kernels}
            tensors = quantize_tensors(values, {name: (8, group) for name, group in groups.items()})
        else:
            tensors = {name: value.astype(jax.numpy.dtype(storage_dtype)) for name, value in values.items()}
    for name, value in tensors.items():
        if not np.isfinite(value).all():
            raise ValueError(f"parameter {name} cannot be stored as {storage_dtype}: a value is not finite.")
    path.mkdir(parents=True, exist_ok=True)
    write_whole(path / WEIGHTS_FILE, tensor_bytes(tensors))
    write_config(path, config)
