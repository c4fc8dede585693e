"""The FID network: its outputs against PyTorch, its input against closed forms."""

import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.convert.inception import convert_inception, convert_tensors
from sora_jax.models.features.inception import FIDInception, abstract_params, load_inception, prepare
from sora_jax.provenance import flat_names

SCRIPT = Path(__file__).parents[2] / "experiments" / "convert_checkpoint.py"
# Convolutions of torchvision's Inception3: outputs, inputs, kernel.
TOP = [
    ("Conv2d_1a_3x3", 32, 3, 3, 3), ("Conv2d_2a_3x3", 32, 32, 3, 3), ("Conv2d_2b_3x3", 64, 32, 3, 3),
    ("Conv2d_3b_1x1", 80, 64, 1, 1), ("Conv2d_4a_3x3", 192, 80, 3, 3),
]  # fmt: skip


def block_a(width, pool):
    return [
        ("branch1x1", 64, width, 1, 1), ("branch5x5_1", 48, width, 1, 1), ("branch5x5_2", 64, 48, 5, 5),
        ("branch3x3dbl_1", 64, width, 1, 1), ("branch3x3dbl_2", 96, 64, 3, 3), ("branch3x3dbl_3", 96, 96, 3, 3),
        ("branch_pool", pool, width, 1, 1),
    ]  # fmt: skip


def block_c(c):
    return [
        ("branch1x1", 192, 768, 1, 1), ("branch7x7_1", c, 768, 1, 1), ("branch7x7_2", c, c, 1, 7),
        ("branch7x7_3", 192, c, 7, 1), ("branch7x7dbl_1", c, 768, 1, 1), ("branch7x7dbl_2", c, c, 7, 1),
        ("branch7x7dbl_3", c, c, 1, 7), ("branch7x7dbl_4", c, c, 7, 1), ("branch7x7dbl_5", 192, c, 1, 7),
        ("branch_pool", 192, 768, 1, 1),
    ]  # fmt: skip


def block_e(width):
    return [
        ("branch1x1", 320, width, 1, 1), ("branch3x3_1", 384, width, 1, 1), ("branch3x3_2a", 384, 384, 1, 3),
        ("branch3x3_2b", 384, 384, 3, 1), ("branch3x3dbl_1", 448, width, 1, 1), ("branch3x3dbl_2", 384, 448, 3, 3),
        ("branch3x3dbl_3a", 384, 384, 1, 3), ("branch3x3dbl_3b", 384, 384, 3, 1), ("branch_pool", 192, width, 1, 1),
    ]  # fmt: skip


BLOCKS = {
    "Mixed_5b": block_a(192, 32),
    "Mixed_5c": block_a(256, 64),
    "Mixed_5d": block_a(288, 64),
    "Mixed_6a": [
        ("branch3x3", 384, 288, 3, 3), ("branch3x3dbl_1", 64, 288, 1, 1), ("branch3x3dbl_2", 96, 64, 3, 3),
        ("branch3x3dbl_3", 96, 96, 3, 3),
    ],
    "Mixed_6b": block_c(128),
    "Mixed_6c": block_c(160),
    "Mixed_6d": block_c(160),
    "Mixed_6e": block_c(192),
    "Mixed_7a": [
        ("branch3x3_1", 192, 768, 1, 1), ("branch3x3_2", 320, 192, 3, 3), ("branch7x7x3_1", 192, 768, 1, 1),
        ("branch7x7x3_2", 192, 192, 1, 7), ("branch7x7x3_3", 192, 192, 7, 1), ("branch7x7x3_4", 192, 192, 3, 3),
    ],
    "Mixed_7b": block_e(1280),
    "Mixed_7c": block_e(2048),
}  # fmt: skip


@pytest.fixture(scope="module")
def state():
    """A state dict under the names and shapes of pytorch-fid's file, nowhere zero."""
    rng = np.random.default_rng(0)
    state = {}
    layers = TOP + [(f"{block}.{name}", *shape) for block, convs in BLOCKS.items() for name, *shape in convs]
    for name, *shape in layers:
        fan = np.prod(shape[1:])
        state[f"{name}.conv.weight"] = rng.standard_normal(shape, np.float32) * np.float32((2 / fan) ** 0.5)
        state[f"{name}.bn.weight"] = rng.uniform(0.5, 1.5, shape[0]).astype("f")
        state[f"{name}.bn.bias"] = rng.normal(0, 0.3, shape[0]).astype("f")
        state[f"{name}.bn.running_mean"] = rng.normal(0, 0.3, shape[0]).astype("f")
        state[f"{name}.bn.running_var"] = rng.uniform(0.5, 2, shape[0]).astype("f")
        state[f"{name}.bn.num_batches_tracked"] = np.array(1)
    state["fc.weight"] = rng.normal(0, 0.03, (1008, 2048)).astype("f")
    state["fc.bias"] = rng.normal(0, 0.5, 1008).astype("f")
    return state


def test_the_tree_is_the_networks(state):
    tensors = convert_tensors(state)
    assert {k: v.shape for k, v in tensors.items()} == {k: v.shape for k, v in flat_names(abstract_params()).items()}
    assert all(value.dtype == np.float32 for value in tensors.values())
    trained = [v.size for k, v in state.items() if not k.endswith(("running_mean", "running_var", "tracked"))]
    assert sum(trained) == 23_834_568 + 8 * 2049  # torchvision's without the auxiliary head, and 8 classes more


def test_a_convolution_is_folded_with_its_norm(state):
    """Equation 1, at one channel of one layer."""
    tensors, layer = convert_tensors(state), "Mixed_6b.branch7x7_2"
    part = {name: float(state[f"{layer}.bn.{name}"][5]) for name in ("weight", "bias", "running_mean", "running_var")}
    factor = part["weight"] / (part["running_var"] + 1e-3) ** 0.5
    assert tensors[f"{layer}.kernel"][0, 6, 9, 5] == pytest.approx(state[f"{layer}.conv.weight"][5, 9, 0, 6] * factor)
    assert tensors[f"{layer}.bias"][5] == pytest.approx(part["bias"] - part["running_mean"] * factor, rel=1e-5)


def test_what_does_not_fit_is_named(state, tmp_path):
    name = "Mixed_7c.branch3x3_2b.bn.running_var"
    with pytest.raises(ValueError, match=rf"tensor {name} is missing; the file has Mixed_7c"):
        convert_tensors({k: v for k, v in state.items() if k != name})
    with pytest.raises(ValueError, match=rf"the tensor {name} must be \(384,\), got \(3,\)"):
        convert_tensors(state | {name: np.ones(3)})
    with pytest.raises(ValueError, match=rf"{name} has a negative"):
        convert_tensors(state | {name: -state[name]})
    with pytest.raises(ValueError, match=rf"{name} has a value that is not finite"):
        convert_tensors(state | {name: np.full(384, np.nan)})
    with pytest.raises(ValueError, match=r"AuxLogits\.fc\.bias is unknown"):
        convert_tensors(state | {"AuxLogits.fc.bias": np.ones(3)})
    (tmp_path / "text.pth").write_bytes(b"text")
    with pytest.raises(ValueError, match=r"text\.pth cannot be read: it is text, not weights"):
        convert_inception(tmp_path / "text.pth")
    with pytest.raises(FileNotFoundError, match=r"none\.pth"):
        convert_inception(tmp_path / "none.pth")
    with pytest.raises(FileNotFoundError, match=r"no Inception at .*model\.safetensors is missing"):
        load_inception(tmp_path)
    with pytest.raises(ValueError, match=r"at least 75 pixels high and wide, got \(74, 80\)"):
        jax.eval_shape(lambda: FIDInception().init(jax.random.key(0), jnp.zeros((1, 74, 80, 3))))


def test_the_input_of_tensorflow():
    """Pixel i of 299 is at i size / 299; behind the last one the image goes on as it ends."""
    ramp = np.broadcast_to(np.arange(23, dtype=np.uint8)[None, None, :, None] * 10, (1, 5, 23, 3))
    found = np.asarray(prepare(ramp))
    expected = (10 * np.minimum(np.arange(299) * 23 / 299, 22) - 128) / 128
    np.testing.assert_allclose(found, np.broadcast_to(expected[None, None, :, None], found.shape), atol=1e-5)
    turned = np.asarray(prepare(ramp.transpose(0, 2, 1, 3)))
    np.testing.assert_array_equal(turned, found.transpose(0, 2, 1, 3))
    same = np.random.default_rng(0).integers(0, 256, (1, 299, 299, 3)).astype(np.uint8)
    np.testing.assert_array_equal(np.asarray(prepare(same)), (same.astype(np.float32) - 128) / 128)


def test_the_input_of_pytorch():
    """Pixel i of 299 is at the centre of its share; what lies outside of the outer centres is as they are."""
    ramp = np.broadcast_to(np.arange(23, dtype=np.uint8)[None, :, None, None] * 10, (1, 23, 5, 3))
    found = np.asarray(prepare(ramp, "pytorch"))
    expected = 10 * np.clip((np.arange(299) + 0.5) * 23 / 299 - 0.5, 0, 22) * 2 / 255 - 1
    np.testing.assert_allclose(found, np.broadcast_to(expected[None, :, None, None], found.shape), atol=1e-5)


def torch_inception(functional, torch, weights, x):
    """pytorch-fid's network, norms unfolded, (N, 3, 299, 299) to its pool, its spatial features and its logits."""

    def conv(x, name, stride=1, valid=False):
        kernel = weights[f"{name}.conv.weight"]
        padding = 0 if valid else tuple(n // 2 for n in kernel.shape[2:])
        norm = [weights[f"{name}.bn.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
        x = functional.conv2d(x, kernel, stride=stride, padding=padding)
        return functional.relu(functional.batch_norm(x, *norm, eps=0.001))

    def chain(x, *names, last_stride=1):
        for name in names:
            stride = last_stride if name == names[-1] else 1
            x = conv(x, name, stride, valid=stride == 2)
        return x

    def halved(x, block, *branches):
        found = [chain(x, *(f"{block}.{name}" for name in names), last_stride=2) for names in branches]
        return torch.cat([*found, functional.max_pool2d(x, 3, 2)], 1)

    def average(x):
        return functional.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)

    def mixed(x, block, *branches, pool=average):
        """Each branch is a chain, of which a last tuple forks."""
        found = []
        for *names, last in (*branches, ("branch_pool",)):
            y = chain(pool(x) if last == "branch_pool" else x, *(f"{block}.{name}" for name in names))
            found += [conv(y, f"{block}.{name}") for name in ((last,) if isinstance(last, str) else last)]
        return torch.cat(found, 1)

    x = conv(x, "Conv2d_1a_3x3", 2, valid=True)
    x = conv(conv(x, "Conv2d_2a_3x3", valid=True), "Conv2d_2b_3x3")
    x = conv(functional.max_pool2d(x, 3, 2), "Conv2d_3b_1x1")
    x = functional.max_pool2d(conv(x, "Conv2d_4a_3x3", valid=True), 3, 2)
    three = [f"branch3x3dbl_{n}" for n in (1, 2, 3)]
    for block in ("Mixed_5b", "Mixed_5c", "Mixed_5d"):
        x = mixed(x, block, ["branch1x1"], ["branch5x5_1", "branch5x5_2"], three)
    x = halved(x, "Mixed_6a", ["branch3x3"], three)
    for block in ("Mixed_6b", "Mixed_6c", "Mixed_6d", "Mixed_6e"):
        once, twice = [f"branch7x7_{n}" for n in (1, 2, 3)], [f"branch7x7dbl_{n}" for n in (1, 2, 3, 4, 5)]
        x = mixed(x, block, ["branch1x1"], once, twice)
        if block == "Mixed_6d":
            spatial = x[:, :7].permute(0, 2, 3, 1).flatten(1)
    x = halved(x, "Mixed_7a", ["branch3x3_1", "branch3x3_2"], [f"branch7x7x3_{n}" for n in (1, 2, 3, 4)])
    for block in ("Mixed_7b", "Mixed_7c"):
        once = ["branch3x3_1", ("branch3x3_2a", "branch3x3_2b")]
        twice = [*three[:2], ("branch3x3dbl_3a", "branch3x3dbl_3b")]
        pool = average if block == "Mixed_7b" else lambda x: functional.max_pool2d(x, 3, stride=1, padding=1)
        x = mixed(x, block, ["branch1x1"], once, twice, pool=pool)
    pool = x.mean((2, 3))
    return pool, spatial, functional.linear(pool, weights["fc.weight"])


@pytest.mark.parity
def test_outputs_equal_pytorch(state, tmp_path):
    """From images of another size, by PyTorch's resizing, and from a file that torch.save wrote."""
    torch = pytest.importorskip("torch", reason="needs .[parity]")
    functional = torch.nn.functional
    images = np.random.default_rng(1).integers(0, 256, (2, 64, 80, 3)).astype(np.uint8)
    weights = {name: torch.from_numpy(np.asarray(value)) for name, value in state.items()}
    with torch.no_grad():
        x = torch.from_numpy(images).permute(0, 3, 1, 2) / 255.0
        x = functional.interpolate(x, (299, 299), mode="bilinear", align_corners=False)
        expected = torch_inception(functional, torch, weights, 2 * x - 1)

    torch.save(weights, tmp_path / "inception.pth")
    command = [
        sys.executable,
        SCRIPT,
        "inception",
        "--source",
        tmp_path / "inception.pth",
        "--output",
        tmp_path / "new",
    ]
    subprocess.run(command, check=True)
    params = load_inception(tmp_path / "new")
    ours = jax.jit(lambda params, x: FIDInception().apply({"params": params}, prepare(x, "pytorch")))(params, images)
    for found, theirs in zip(ours, expected, strict=True):
        theirs = theirs.numpy()
        assert found.shape == theirs.shape and np.std(theirs, axis=0).max() > 0
        error = np.abs(np.asarray(found) - theirs).max() / np.sqrt(np.mean(np.square(theirs)))
        print(f"largest error over RMS {error:.2e}")
        assert error < 1e-4
