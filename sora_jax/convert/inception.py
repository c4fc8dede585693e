"""The FID network's weights into `sora_jax.models.features.inception`.

The standard file is pytorch-fid's `pt_inception-2015-12-05-6726825d.pth`: TensorFlow's weights of 2015-12-05 under
the names of torchvision's `Inception3`. A batch norm (scale g, bias b, mean m, variance s, eps 1e-3) behind a
convolution W is folded into it:

    (1)  W' = W g / sqrt(s + eps),   bias' = b - m g / sqrt(s + eps)

The bias of the classifier is left out, as scores are computed without it.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from etils import epath

from sora_jax.array_types import NumpyArray
from sora_jax.convert.state_dict import missing, unknown
from sora_jax.convert.weight_files import read_weights
from sora_jax.models.features.inception import NUM_CLASSES, abstract_params
from sora_jax.models.weights import WEIGHTS_FILE, tensor_bytes
from sora_jax.provenance import flat_names

BATCH_NORM_EPS = 1e-3


def convert_inception(source: epath.PathLike) -> dict[str, bytes]:
    """Converts a weights file; no pickle is executed.

    Args:
        source: the `.pth` file.

    Returns:
        The contents of the file that `load_inception` reads, by name.

    Raises:
        FileNotFoundError: no file.
        ValueError: a file that does not hold this network; the message names it and the first tensor that does not fit.
    """
    state, path = read_weights(source, "Inception", ("Conv2d_1a_3x3.conv.weight",))
    try:
        tensors = convert_tensors(state)
    except ValueError as error:
        raise ValueError(f"{path} does not hold the weights of the FID network: {error}") from error
    return {WEIGHTS_FILE: tensor_bytes(tensors)}


def convert_tensors(state: Mapping[str, NumpyArray]) -> dict[str, NumpyArray]:
    """Renames, transposes and folds the state dict of pytorch-fid's network.

    Returns:
        The parameters of `FIDInception` by flat names; float32.

    Raises:
        ValueError: a tensor that is missing, left over, of another shape or not finite; the message names it.
    """
    state = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    expected = []

    def take(name: str, shape: tuple[int, ...]) -> NumpyArray:
        expected.append(name)
        if name not in state:
            raise missing("Inception weights", [name], state)
        value = np.asarray(state.pop(name), np.float64)
        if value.shape != shape:
            raise ValueError(f"the tensor {name} must be {shape}, got {value.shape}.")
        if not np.isfinite(value).all():
            raise ValueError(f"the tensor {name} has a value that is not finite.")
        return value

    tensors = {}
    for name, leaf in flat_names(abstract_params()).items():
        layer, kind = name.rsplit(".", 1)
        if layer == "fc":
            tensors[name] = take("fc.weight", leaf.shape[::-1]).T
            take("fc.bias", (NUM_CLASSES,))
        elif kind == "kernel":
            height, width, inputs, outputs = leaf.shape
            kernel = take(f"{layer}.conv.weight", (outputs, inputs, height, width)).transpose(2, 3, 1, 0)
            parts = ("weight", "bias", "running_mean", "running_var")
            scale, bias, mean, variance = (take(f"{layer}.bn.{part}", (outputs,)) for part in parts)
            if (variance < 0).any():
                raise ValueError(f"the tensor {layer}.bn.running_var has a negative value.")
            scale = scale / np.sqrt(variance + BATCH_NORM_EPS)
            tensors |= {name: kernel * scale, f"{layer}.bias": bias - mean * scale}
    if state:
        raise unknown("Inception weights", state, expected)
    return {name: value.astype(np.float32) for name, value in tensors.items()}
