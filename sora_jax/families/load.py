"""Models on the disk: runs, their checkpoints, exported models (safetensors and JSON) and converted weights."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np
from etils import epath
from flax import linen as nn
from jax.sharding import Mesh

from sora_jax.array_types import PyTree
from sora_jax.components import UNKNOWN, CodecComponent, Components, warn_of_difference
from sora_jax.config import ExperimentConfig
from sora_jax.config_json import config_of
from sora_jax.families.registry import FAMILIES, Family, config_class, make_task
from sora_jax.files import write_whole
from sora_jax.models.autoencoder.codec import ImageCodec
from sora_jax.models.networks import NETWORKS, Network
from sora_jax.models.quantize import quantize_tensors
from sora_jax.models.tensor_file import read_sharded
from sora_jax.models.weights import (
    CONFIG_FILE,
    WEIGHTS_FILE,
    check_shapes,
    read_document,
    read_params,
    tensor_bytes,
    weights_fingerprint,
)
from sora_jax.parallel.rules import param_shardings
from sora_jax.provenance import flat_names
from sora_jax.training.checkpoint import latest_step, read_checkpoint, run_directory_of
from sora_jax.training.checkpoint_folder import FOLDER
from sora_jax.training.run_directory import write_config
from sora_jax.training.state import abstract_params, init_params

STORAGE_DTYPES = ("float32", "bfloat16", "float16", "int8")
INT8_GROUP = 64  # numbers of a kernel's row that share a scale, or as many as divide the row


@dataclasses.dataclass(frozen=True)
class Description:
    """What a directory says that it holds.

    Attributes:
        path: of the run, the checkpoint, the exported model or the converted weights.
        kind: of `FAMILIES`, of what was trained here, or of `NETWORKS`, of converted weights.
        config: of the experiment that trained it; of converted weights, the network's.
        components: that it was trained with.
    """

    path: epath.Path
    kind: str
    config: Any
    components: Components

    @property
    def trained_here(self) -> bool:
        """Whether the config is an experiment's, rather than a network's."""
        return self.kind in FAMILIES

    @property
    def pixels(self) -> bool | None:
        """Whether it was trained on pixels, rather than on latents; None where it is too old to say so."""
        codec = self.components.codec
        return None if codec is None else codec.kind == "identity"


@dataclasses.dataclass(frozen=True)
class Loaded(Description):
    """A model.

    Attributes:
        params: nested parameters, unboxed; of runs, those of the task.
    """

    params: PyTree


def describe(path: epath.PathLike) -> Description:
    """Reads what is at a path, without its parameters.

    Args:
        path: a run, one of its checkpoints (`WORKDIR/checkpoints/STEP`), an exported model or converted weights.

    Raises:
        FileNotFoundError: there is none of them at `path`.
        ValueError: a config of no kind that is known, or one that cannot be read; or several runs.
    """
    path = epath.Path(path)
    if not path.exists():
        raise FileNotFoundError(f"no run, checkpoint or exported model at {path}.")
    if not path.is_dir():
        raise ValueError(f"{path} is a file: name the directory of a run, an exported model or converted weights.")
    file = run_directory_of(path) / CONFIG_FILE
    if not file.is_file():
        if runs := [run.parent.name for run in sorted(path.glob(f"*/{CONFIG_FILE}"))]:
            raise ValueError(f"{path} holds several runs or models, name one of them: {', '.join(runs)}.")
        raise FileNotFoundError(
            f"{path} is neither a run, an exported model nor converted weights: it has no config.json."
        )
    document = read_document(file)
    if document.kind not in {**FAMILIES, **NETWORKS}:
        raise ValueError(
            f"{file} is of {'no kind' if document.kind is None else f'an unknown kind, {document.kind!r}'}; those that "
            f"are known are {', '.join([*FAMILIES, *NETWORKS])}."
        )
    in_family = document.kind in FAMILIES
    cls = config_class(document.kind) if in_family else NETWORKS[document.kind].config_class()
    try:
        config: Any = config_of(cls, document)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return Description(path, document.kind, config, document.components)


def expect(found: Description, *kinds: str) -> None:
    """Checks that a model is of one of some kinds.

    Args:
        found: of `describe` or `load`.
        kinds: of `FAMILIES` and `NETWORKS`.

    Raises:
        ValueError: it is of another, saying what it is, what was wanted and what takes it.
    """
    if found.kind not in kinds:
        words: dict[str, Family | Network] = {**FAMILIES, **NETWORKS}
        wanted = " or ".join(words[kind].what for kind in kinds)
        raise ValueError(f"{found.path} is {words[found.kind].what}, not {wanted}: {words[found.kind].use}.")


def load(
    path: epath.PathLike,
    mesh: Mesh | None = None,
    dtype: Any = None,
    *,
    averaged: bool = True,
    kinds: Sequence[str] = (),
) -> Loaded:
    """Reads a model, whatever it is: its directory says so.

    Args:
        path: a run (its newest checkpoint is read), one checkpoint of a run (`WORKDIR/checkpoints/STEP`), an exported
            model, or weights that `experiments/convert_checkpoint.py` wrote; local or `gs://`.
        mesh: devices that the parameters are read to, each getting its share (`sora_jax.parallel.rules`).
        dtype: of the parameters (None: float32).
        averaged: of a run, read the EMA of the parameters rather than the parameters.
        kinds: that are wanted; see `expect`, which is asked before any parameter is read.

    Returns:
        The model; its parameters are arrays of the mesh, or NumPy arrays without one.

    Raises:
        FileNotFoundError: there is no model at `path`.
        ValueError: another kind of model, a dtype of no real numbers, or parameters that are not those of its config or
            not finite, naming the first.
    """
    found = describe(path)
    if kinds:
        expect(found, *kinds)
    path, dtype = found.path, jax.numpy.dtype(dtype or np.float32)
    if not jax.numpy.issubdtype(dtype, jax.numpy.floating):
        raise ValueError(f"dtype must be that of real numbers, such as float32 or bfloat16, got {dtype}.")
    boxed = _boxed_params(found)
    expected = nn.meta.unbox(boxed)
    weights = path / WEIGHTS_FILE
    if not weights.exists() and not found.trained_here:
        raise FileNotFoundError(f"{path} lacks {WEIGHTS_FILE}, which experiments/convert_checkpoint.py writes.")
    if mesh is None:
        params = read_params(weights) if weights.exists() else read_checkpoint(path, averaged)
        check_shapes(params, expected, str(path))
        params = jax.tree.map(lambda leaf: np.asarray(leaf, dtype), params)
    elif weights.exists():
        params = read_sharded(weights, expected, param_shardings(boxed, mesh), dtype)
    else:
        shardings = param_shardings(boxed, mesh)
        like = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding), expected, shardings
        )
        params = read_checkpoint(path, averaged, like)
    return Loaded(path, found.kind, found.config, found.components, params)


def load_codec(
    path: epath.PathLike,
    dtype: Literal["float32", "bfloat16"] | None = None,
    devices: Sequence[jax.Device] | None = None,
) -> ImageCodec:
    """Loads the codec of an autoencoder that `experiments/convert_checkpoint.py sd-vae` wrote.

    Args:
        path: of the directory.
        dtype: of the computation (default: what the files say).
        devices: that frames are split over (default: all of this host).

    Raises:
        FileNotFoundError: a file that is missing.
        ValueError: files that do not make an autoencoder.
    """
    found = load(path, kinds=("image_vae",))
    config = found.config if dtype is None else dataclasses.replace(found.config, dtype=dtype)
    return ImageCodec(config, found.params, devices)


def codec_of(
    model: Description,
    vae: epath.PathLike,
    channels: int,
    devices: Sequence[jax.Device] | None = None,
    pixels: bool = False,
) -> ImageCodec:
    """Loads the codec that is to decode the latents which a model makes.

    It warns, by a `ComponentWarning`, where it is another than the model was trained with.

    Args:
        model: whose latents are decoded.
        vae: directory of the autoencoder.
        channels: of the model's latents.
        devices: that frames are split over (default: all of this host).
        pixels: whether the model makes pixels, where it is too old to say so itself.

    Raises:
        FileNotFoundError: a file that is missing.
        ValueError: files that do not make an autoencoder, a model of pixels, or latents of another number of channels.
    """
    if pixels if model.pixels is None else model.pixels:
        raise ValueError(f"{model.path} makes pixels, which no autoencoder decodes: leave vae out, got {str(vae)!r}.")
    codec = load_codec(vae, devices=devices)
    if codec.channels != channels:
        raise ValueError(
            f"{model.path} makes latents of {channels} channels, and those of the autoencoder {vae} have "
            f"{codec.channels}."
        )
    warn_of_difference(model.components, Components(codec=_component(vae, codec)), str(model.path))
    return codec


def _component(path: epath.PathLike, codec: ImageCodec) -> CodecComponent:
    """Returns what says of the codec that was loaded from `path` which one it is."""
    return CodecComponent(codec.kind, weights_fingerprint(path), codec.scale)


def _boxed_params(found: Description) -> PyTree:
    """Returns the shapes and logical axes of a model's parameters."""
    if not found.trained_here:
        return NETWORKS[found.kind].abstract_params(found.config)
    task = make_task(found.config)
    return jax.eval_shape(lambda: init_params(task))


def check_family(workdir: epath.PathLike, config: ExperimentConfig) -> None:
    """Checks that a directory, where it has checkpoints, holds a run of the family that is to be trained in it.

    Raises:
        ValueError: the run is another family's, saying which.
    """
    if latest_step(workdir) is None:
        return
    found = describe(workdir)
    if found.kind != config.kind:
        raise ValueError(
            f"{workdir} holds {FAMILIES[found.kind].what}, and {FAMILIES[config.kind].what} was to be trained in it: "
            "choose another --workdir."
        )


def export_model(
    path: epath.PathLike,
    config: ExperimentConfig,
    params: PyTree,
    storage_dtype: str = "float32",
    components: Components = UNKNOWN,
) -> None:
    """Writes a model as `model.safetensors` (names joined by dots) and `config.json`.

    Args:
        path: directory; made if needed.
        config: of the model.
        params: float32.
        storage_dtype: of the numbers in the file, `float32`, `bfloat16`, `float16`, or `int8`, which stores kernels in
            8 bits with a scale for each 64 numbers (`sora_jax.models.quantize`) and the rest as float32. Reading
            gives float32 again.
        components: that the model was trained with.

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
    write_config(path, config, components)
