"""Manifests there and back, hashes that see every change, and the fields that differ."""

import dataclasses
import hashlib

import jax
import ml_dtypes
import numpy as np
import pytest

from sora_jax.evaluation.manifest import SampleManifest, ScoreManifest, differences, read_manifest, write_manifest
from sora_jax.provenance import Environment, file_hash, params_hash

ENVIRONMENT = Environment("8 x TPU v5 lite", "0.10.2", "0.1.0", "2.3")
SAMPLES = SampleManifest(
    "DiT-XL/2", "ab", True, "cd", "ddpm", 250, 1.5, "guidance_channels=3", 0, 50_000, 256, 256, "bfloat16", ENVIRONMENT
)
SCORE = ScoreManifest("Inception", "ef", "01", 50_000, "23", "float32", ENVIRONMENT, SAMPLES)


def test_there_and_back(tmp_path):
    for manifest in (SAMPLES, SCORE, dataclasses.replace(SCORE, samples=None)):
        write_manifest(tmp_path / "new" / "m.json", manifest)
        assert read_manifest(type(manifest), tmp_path / "new" / "m.json") == manifest
    with pytest.raises(ValueError, match=r"m\.json is no SampleManifest: .*unknown key 'features'"):
        read_manifest(SampleManifest, tmp_path / "new" / "m.json")


def test_the_fields_that_differ_are_named():
    assert differences(SCORE, dataclasses.replace(SCORE)) == {}
    other = dataclasses.replace(SAMPLES, num_steps=50, environment=dataclasses.replace(ENVIRONMENT, jax="0.11"))
    expected = {"samples.environment.jax": ("0.10.2", "0.11"), "samples.num_steps": (250, 50)}
    assert differences(SCORE, dataclasses.replace(SCORE, samples=other)) == expected
    assert differences(dataclasses.replace(SCORE, samples=None), SCORE)["samples.ema"] == (None, True)


def test_the_environment_is_this_one():
    found = Environment.here()
    assert found.jax == jax.__version__ and found.numpy == np.__version__ and found.sora_jax
    assert found.device == f"{jax.device_count()} x {jax.devices()[0].device_kind}"


def test_the_hash_of_parameters_sees_names_shapes_dtypes_and_values():
    params = {"b": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}, "a": np.ones(2, ml_dtypes.bfloat16)}
    expected = b"a bfloat16 (2,)\n" + params["a"].tobytes() + b"b.kernel float32 (2, 3)\n"
    expected += params["b"]["kernel"].tobytes()
    assert params_hash(params) == hashlib.sha256(expected).hexdigest()
    assert params_hash(jax.tree.map(jax.numpy.asarray, dict(reversed(params.items())))) == params_hash(params)
    turned = {"b": {"kernel": np.asfortranarray(params["b"]["kernel"])}, "a": params["a"]}
    assert params_hash(turned) == params_hash(params)  # the numbers are the same, wherever they lie
    changed = [
        {"b": {"bias": params["b"]["kernel"]}, "a": params["a"]},
        {"b": {"kernel": params["b"]["kernel"].reshape(3, 2)}, "a": params["a"]},
        {"b": {"kernel": params["b"]["kernel"].view(np.int32)}, "a": params["a"]},
        {"b": {"kernel": np.nextafter(params["b"]["kernel"], 9)}, "a": params["a"]},
    ]
    assert len({params_hash(p) for p in (params, *changed)}) == 5


def test_the_hash_of_files(tmp_path):
    (tmp_path / "a").write_bytes(b"12")
    assert file_hash(tmp_path / "a") == hashlib.sha256(b"12").hexdigest()
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "x").write_bytes(b"12")
    (tmp_path / "f" / "y").write_bytes(b"3")
    whole = file_hash(tmp_path / "f")
    (tmp_path / "f" / "x").write_bytes(b"1")
    (tmp_path / "f" / "y").write_bytes(b"23")
    assert file_hash(tmp_path / "f") != whole
    with pytest.raises(FileNotFoundError, match=r"nothing at .*none"):
        file_hash(tmp_path / "none")
