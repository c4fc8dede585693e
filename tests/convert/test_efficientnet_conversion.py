import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sora_jax.convert.efficientnet import convert_efficientnet, load_efficientnet
from sora_jax.models.features.efficientnet import STAGES, EfficientNetLite0, feature_function, preprocess


def random_state(seed=0):
    """A state dict under the names and shapes of efficientnet-lite-pytorch, drawn at random."""
    rng = np.random.default_rng(seed)
    state = {}

    def conv(name, norm, out, inner, kernel):
        fan = inner * kernel * kernel
        state[f"{name}.weight"] = (rng.standard_normal((out, inner, kernel, kernel)) * (2 / fan) ** 0.5).astype("f")
        state[f"{norm}.weight"] = rng.uniform(0.5, 1.5, out).astype("f")
        state[f"{norm}.bias"] = rng.normal(0, 0.5, out).astype("f")
        state[f"{norm}.running_mean"] = rng.normal(0, 0.5, out).astype("f")
        state[f"{norm}.running_var"] = rng.uniform(0.5, 2, out).astype("f")
        state[f"{norm}.num_batches_tracked"] = np.array(1)

    conv("_conv_stem", "_bn0", 32, 3, 3)
    width, index = 32, 0
    for stage in STAGES:
        for _ in range(stage.num_blocks):
            block, hidden = f"_blocks.{index}", width * stage.expansion
            if stage.expansion > 1:
                conv(f"{block}._expand_conv", f"{block}._bn0", hidden, width, 1)
            conv(f"{block}._depthwise_conv", f"{block}._bn1", hidden, 1, stage.kernel)
            conv(f"{block}._project_conv", f"{block}._bn2", stage.width, hidden, 1)
            width, index = stage.width, index + 1
    conv("_conv_head", "_bn1", 1280, width, 1)
    state["_fc.weight"] = rng.normal(0, 0.03, (1000, 1280)).astype("f")
    state["_fc.bias"] = rng.normal(0, 0.5, 1000).astype("f")
    return state


@pytest.fixture(scope="module")
def state():
    return random_state()


def test_the_tree_is_the_networks(state):
    params = convert_efficientnet(state)
    expected = jax.eval_shape(lambda: EfficientNetLite0().init(jax.random.key(0), jnp.zeros((1, 32, 32, 3))))["params"]
    assert jax.tree.map(lambda leaf: leaf.shape, params) == jax.tree.map(lambda leaf: leaf.shape, expected)
    # 4,652,008 weights in the published network; folding replaces each norm's scale and bias by a bias.
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 4_652_008 - sum(
        len(value) for name, value in state.items() if "running_mean" in name
    )


def test_a_missing_or_foreign_tensor_is_named(state, tmp_path):
    with pytest.raises(ValueError, match=r"_blocks\.3\._bn1\.running_var"):
        convert_efficientnet({k: v for k, v in state.items() if k != "_blocks.3._bn1.running_var"})
    with pytest.raises(ValueError, match="_se_reduce"):
        convert_efficientnet(state | {"_blocks.0._se_reduce.weight": np.zeros(3)})
    with pytest.raises(FileNotFoundError, match=r"missing\.pth"):
        load_efficientnet(tmp_path / "missing.pth")
    with zipfile.ZipFile(tmp_path / "empty.whl", "w") as wheel:
        wheel.writestr("package/__init__.py", "")
    with pytest.raises(ValueError, match=r"empty\.whl.*found 0"):
        load_efficientnet(tmp_path / "empty.whl")


def test_features_do_not_depend_on_the_batch(state):
    params = convert_efficientnet(state)
    frames = [np.random.default_rng(i).integers(0, 256, (6 + i, 9, 3)).astype(np.uint8) for i in range(3)]
    features = feature_function(params, batch_size=2)
    together = features(frames)
    assert together.shape == (3, 1280) and features([]).shape == (0, 1280)
    for i, frame in enumerate(frames):
        np.testing.assert_allclose(features([frame])[0], together[i], rtol=1e-4, atol=1e-4)
    assert np.abs(together[0] - together[1]).max() > 0.01


def test_preprocessing_keeps_colours_and_their_order():
    red = np.zeros((5, 7, 3), np.uint8)
    red[..., 0] = 255
    images = preprocess([red])
    assert images.shape == (1, 224, 224, 3) and images.dtype == np.float32
    np.testing.assert_allclose(images, np.broadcast_to([1.0, -127 / 128, -127 / 128], images.shape))


@pytest.mark.parity
@pytest.mark.parametrize("size", (224, 97))
def test_parity_with_pytorch(state, size, tmp_path):
    """An independent statement of the network in PyTorch, norms unfolded, from a file that torch.save wrote."""
    torch = pytest.importorskip("torch", reason="the reference is in PyTorch: pip install .[parity]")
    functional = torch.nn.functional
    weights = {name: torch.from_numpy(value) for name, value in state.items()}

    def conv(x, name, norm, stride=1, depthwise=False, activation=True):
        weight = weights[f"{name}.weight"]
        kernel = weight.shape[-1]
        padding = []
        for length in (x.shape[3], x.shape[2]):  # TensorFlow's SAME: the odd one goes behind
            whole = max((-(-length // stride) - 1) * stride + kernel - length, 0)
            padding += [whole // 2, whole - whole // 2]
        x = functional.pad(x, padding)
        x = functional.conv2d(x, weight, stride=stride, groups=x.shape[1] if depthwise else 1)
        values = [weights[f"{norm}.{part}"] for part in ("running_mean", "running_var", "weight", "bias")]
        x = functional.batch_norm(x, *values, training=False, eps=1e-3)
        return functional.relu6(x) if activation else x

    frames = np.random.default_rng(1).integers(0, 256, (2, size, size, 3)).astype(np.float32)
    images = (frames - 127) / 128
    with torch.no_grad():
        x = conv(torch.from_numpy(images).permute(0, 3, 1, 2), "_conv_stem", "_bn0", stride=2)
        index = 0
        for blocks, _, stride, expansion, _ in STAGES:
            for number in range(blocks):
                block, y = f"_blocks.{index}", x
                if expansion > 1:
                    y = conv(y, f"{block}._expand_conv", f"{block}._bn0")
                step = stride if number == 0 else 1
                y = conv(y, f"{block}._depthwise_conv", f"{block}._bn1", step, depthwise=True)
                y = conv(y, f"{block}._project_conv", f"{block}._bn2", activation=False)
                x = x + y if number else y
                index += 1
        features = conv(x, "_conv_head", "_bn1").mean((2, 3))
        logits = functional.linear(features, weights["_fc.weight"], weights["_fc.bias"])

    for zipped in (True, False):
        path = tmp_path / f"weights_{zipped}.pth"
        torch.save(weights, path, _use_new_zipfile_serialization=zipped)
        ours = EfficientNetLite0().apply({"params": load_efficientnet(path)}, images)
        for found, expected in zip(ours, (features, logits), strict=True):
            scale = float(expected.abs().max())
            np.testing.assert_allclose(found, expected.numpy(), atol=2e-5 * scale, rtol=0)
