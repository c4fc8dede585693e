"""Parameters in safetensors files."""

import dataclasses
import hashlib
import json

import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

from sora_jax.config_json import to_json
from sora_jax.models.tensor_file import TensorFile, read_sharded
from sora_jax.models.unet import UNetConfig
from sora_jax.models.weights import check_shapes, read_params, read_tensors, tensor_bytes, weights_fingerprint
from sora_jax.provenance import flat_names


def test_flat_names():
    assert flat_names({"b": {"x": 1}, "a": 2}) == {"a": 2, "b.x": 1}


def test_tensors_come_back(tmp_path):
    table = np.arange(6, dtype=np.float32).reshape(2, 3)
    written = {"a.kernel": table.T, "a.bias": np.array([1.5], ml_dtypes.bfloat16), "step": np.array(0.5, np.float16)}
    (tmp_path / "w").write_bytes(tensor_bytes(written))
    read = read_tensors(tmp_path / "w")
    assert {name: value.dtype for name, value in read.items()} == {k: v.dtype for k, v in written.items()}
    params = read_params(tmp_path / "w")
    np.testing.assert_array_equal(params["a"]["kernel"], [[0, 3], [1, 4], [2, 5]])
    assert params["a"]["bias"] == 1.5 and params["a"]["bias"].dtype == np.float32 and params["step"].shape == ()


def test_errors_name_file_and_tensor(tmp_path):
    data = tensor_bytes({"a": np.zeros(4, np.float32)})
    for broken in (b"", b"text", data[:-1], data + b"\0"):
        (tmp_path / "broken").write_bytes(broken)
        with pytest.raises(ValueError, match="broken is not a whole safetensors file"):
            read_tensors(tmp_path / "broken")
    (tmp_path / "wide").write_bytes(safetensors.numpy.save({"a": np.zeros(2, np.complex64)}))
    with pytest.raises(ValueError, match=r"wide: a has dtype C64; this reads F64, F32, BF16"):
        read_tensors(tmp_path / "wide")


def test_what_a_file_is_instead_is_said(tmp_path):
    data = tensor_bytes({"a": np.zeros(4, np.float32)})
    for broken, words in (
        (data[:-3], f"truncated: {len(data) - 3} of its {len(data)} bytes are there"),
        (data[:20], f"truncated: its header alone has {int.from_bytes(data[:8], 'little')} bytes, the file 20"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer, not the file: run git lfs pull"),
        (b"<!doctype html>", "a web page"),
    ):
        (tmp_path / "w").write_bytes(broken)
        with pytest.raises(ValueError, match=f"w is not a whole safetensors file: it is {words}"):
            read_tensors(tmp_path / "w")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_parameter_that_is_not_finite_is_named(tmp_path, value):
    tensors = {"a.bias": np.zeros(4, np.float32), "a.kernel": np.array([0, value], np.float32)}
    (tmp_path / "w").write_bytes(tensor_bytes(tensors))
    with pytest.raises(ValueError, match=r"w: parameter a\.kernel has a value that is not finite"):
        read_params(tmp_path / "w")


def test_the_first_parameter_that_differs_is_named():
    value = np.zeros((2, 3))
    check_shapes({"a": {"b": value}}, {"a": {"b": value}}, "it")
    with pytest.raises(ValueError, match=r"it is of another model: it lacks parameter a\.b"):
        check_shapes({"c": value}, {"a": {"b": value}}, "it")
    with pytest.raises(ValueError, match="it has an unknown parameter c"):
        check_shapes({"c": value, "d": value}, {"d": value}, "it")
    with pytest.raises(ValueError, match=r"a has shape \(3, 2\), the config asks \(2, 3\)"):
        check_shapes({"a": value.T}, {"a": value}, "it")


def test_a_file_of_tensors_is_read_by_tensor_and_checked_as_strictly(tmp_path):
    written = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.array([1.5], ml_dtypes.bfloat16)}
    data = tensor_bytes(written)
    (tmp_path / "w").write_bytes(data)
    file = TensorFile(tmp_path / "w")
    for name, value in read_tensors(tmp_path / "w").items():
        assert file[name].dtype == value.dtype
        np.testing.assert_array_equal(file[name], value)
    gap = data.replace(b"[24,26]", b"[25,27]").replace(b"[0,2]", b"[1,3]")
    shape = data.replace(b"[2,3]", b"[2,4]")
    for broken in (b"", b"text", data[:-1], data[:12], data + b"\0", gap, shape, b"\xff" * 16):
        assert broken != data
        (tmp_path / "broken").write_bytes(broken)
        with pytest.raises(ValueError, match="broken is not a whole safetensors file"):
            TensorFile(tmp_path / "broken")


def test_shares_of_parameters_are_checked_like_whole_ones(tmp_path):
    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])

    def read(value, shape=(2,)):
        (tmp_path / "w").write_bytes(tensor_bytes({"a.kernel": np.array(value, np.float32)}))
        expected = {"a": {"kernel": jax.ShapeDtypeStruct(shape, np.float32)}}
        return read_sharded(tmp_path / "w", expected, {"a": {"kernel": one}}, np.float32)

    np.testing.assert_array_equal(read([1, 2])["a"]["kernel"], [1, 2])
    with pytest.raises(ValueError, match=r"w: parameter a\.kernel has a value that is not finite"):
        read([1, np.inf])
    with pytest.raises(ValueError, match=r"a\.kernel has shape \(2,\), the config asks \(3,\)"):
        read([1, 2], (3,))


def test_the_version_of_a_config_does_not_change_a_fingerprint(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    old = json.dumps({"version": 1, **dataclasses.asdict(UNetConfig())}, indent=2) + "\n"
    found = set()
    for text in (old, to_json(UNetConfig())):
        (tmp_path / "config.json").write_text(text)
        found.add(weights_fingerprint(tmp_path))
    assert found == {hashlib.sha256(old.encode() + b"weights").hexdigest()}
