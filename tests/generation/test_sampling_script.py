"""evaluate.py sample and sweep: sets that are stopped and resumed, their labels, manifests and scores."""

import dataclasses
import json
import types

import numpy as np
import pytest
from class_models import PIXELS, VAE, write_autoencoder, write_latent_model, write_pixel_model
from PIL import Image

from sora_jax.commands.evaluations import fid, sampling
from sora_jax.evaluation.features import Features
from sora_jax.evaluation.manifest import SampleManifest, manifest_path, read_manifest
from sora_jax.generation.class_conditional import ClassConditionalSampler
from sora_jax.pixels import to_pixels


@pytest.fixture(scope="module")
def pixels(tmp_path_factory):
    return str(write_pixel_model(tmp_path_factory.mktemp("models") / "pixels"))


def options(checkpoint, output, **changes):
    default = dict(num_samples=11, num_steps=4, guidance_scale=2.0, batch_size=4)
    return sampling.SampleOptions(checkpoint=checkpoint, output=str(output), **default | changes)


def read_samples(directory):
    with np.load(directory / "samples.npz") as arrays:
        return arrays["arr_0"]


def test_a_set_that_was_stopped_is_that_of_one_that_was_not(pixels, tmp_path, monkeypatch, capsys):
    sampling.sample(options(pixels, tmp_path / "whole", json=tmp_path / "manifest.json"))
    whole = read_samples(tmp_path / "whole")
    assert whole.shape == (11, 4, 4, 3) and whole.dtype == np.uint8 and whole.std() > 10
    assert str(tmp_path / "whole" / "samples.npz") in capsys.readouterr().out
    draw, calls = ClassConditionalSampler.__call__, []

    def stopping(self, *args, **kwargs):
        calls.append(kwargs["indices"].tolist())
        if len(calls) == 2:
            raise KeyboardInterrupt
        return draw(self, *args, **kwargs)

    monkeypatch.setattr(ClassConditionalSampler, "__call__", stopping)
    with pytest.raises(KeyboardInterrupt):
        sampling.sample(options(pixels, tmp_path / "parts"))
    assert not (tmp_path / "parts" / "samples.npz").exists()
    sampling.sample(options(pixels, tmp_path / "parts"))
    assert calls == [[0, 1, 2, 3], [4, 5, 6, 7], [4, 5, 6, 7], [8, 9, 10, 10]]
    np.testing.assert_array_equal(read_samples(tmp_path / "parts"), whole)

    manifest = read_manifest(SampleManifest, manifest_path(tmp_path / "whole" / "samples.npz"))
    assert json.loads((tmp_path / "manifest.json").read_text())["checkpoint"] == manifest.checkpoint
    assert (manifest.num_samples, manifest.num_steps, manifest.guidance_scale, manifest.height) == (11, 4, 2.0, 4)
    with pytest.raises(ValueError, match=r"holds samples with guidance_scale 2\.0, not 3\.0"):
        sampling.sample(options(pixels, tmp_path / "parts", guidance_scale=3.0))


def test_a_set_with_a_sample_that_is_not_finite_keeps_the_good_shards_alone(pixels, tmp_path, monkeypatch):
    draw = ClassConditionalSampler.__call__

    def breaking(self, *args, **kwargs):
        images = draw(self, *args, **kwargs)
        return np.where((kwargs["indices"] == bad)[:, None, None, None], np.nan, images)

    monkeypatch.setattr(ClassConditionalSampler, "__call__", breaking)
    for bad, kept in ((5, ["manifest.json", "shard_00000000_00000004.npy"]), (2, None)):
        with pytest.raises(FloatingPointError, match="not finite"):
            sampling.sample(options(pixels, tmp_path / str(bad), json=tmp_path / "manifest.json"))
        left = tmp_path / str(bad)
        assert (sorted(path.name for path in left.iterdir()) if left.exists() else None) == kept
        assert not (tmp_path / "manifest.json").exists()
    monkeypatch.setattr(ClassConditionalSampler, "__call__", draw)
    sampling.sample(options(pixels, tmp_path / "5", batch_size=3))
    assert read_samples(tmp_path / "5").shape == (11, 4, 4, 3)


@pytest.mark.slow
def test_a_set_goes_on_with_another_batch_for_more_samples_or_fewer(pixels, tmp_path, capsys):
    sampling.sample(options(pixels, tmp_path / "whole", num_samples=13))
    sampling.sample(options(pixels, tmp_path / "set", num_samples=7))
    sampling.sample(options(pixels, tmp_path / "set", num_samples=13, batch_size=5))
    assert json.loads((tmp_path / "set" / "samples.npz.manifest.json").read_text())["batch_sizes"] == [4, 5]
    whole, found = (read_samples(tmp_path / name).astype(int) for name in ("whole", "set"))
    assert np.abs(whole - found).max() <= 1  # the rounding of a batch of another size
    (tmp_path / "set" / "shard_00000004_00000007.npy").write_bytes(b"")
    sampling.sample(options(pixels, tmp_path / "set", num_samples=6))
    said = capsys.readouterr().out
    assert "shard_00000004_00000007.npy is cut short: its samples are drawn again." in said
    assert "holds 6 samples more than --num-samples 6: left out." in said
    assert np.abs(read_samples(tmp_path / "set") - whole[:6]).max() <= 1


@pytest.mark.slow
def test_samples_are_those_of_the_sampler_and_the_sheet_shows_them(pixels, tmp_path):
    chosen = options(pixels, tmp_path / "set", seed=3, num_samples=6)
    sampling.sample(chosen)
    labels = sampling.draw_labels(chosen, 3, None)
    images = ClassConditionalSampler.from_pretrained(pixels)(labels, 3, num_steps=4, guidance_scale=2.0)
    found = read_samples(tmp_path / "set")
    np.testing.assert_allclose(found.astype(int), to_pixels(images), atol=1)
    # Each class a row; the first sample of the first class is in its corner, 64 pixels wide behind a gap of 2.
    sheet = np.asarray(Image.open(tmp_path / "set" / "sheet.png"))
    first = found[np.flatnonzero(labels == labels.min())[0]]
    np.testing.assert_array_equal(sheet[2:66:16, 2:66:16], first)
    assert len(sheet) == 2 + 66 * len(set(labels.tolist())) and (sheet[2:66, -66:-2] == 255).all()


@pytest.mark.slow
def test_latents_become_pictures(tmp_path):
    model, vae = str(write_latent_model(tmp_path / "dit")), str(write_autoencoder(tmp_path / "vae"))
    with pytest.raises(ValueError, match="latents of 4 channels: name an autoencoder"):
        sampling.sample(options(model, tmp_path / "set"))
    sampling.sample(options(model, tmp_path / "set", vae=vae, num_samples=2, size=(4, 8)))
    stride = VAE.strides[1]
    assert stride == 2 and read_samples(tmp_path / "set").shape == (2, 4, 8, 3)
    assert read_manifest(SampleManifest, manifest_path(tmp_path / "set" / "samples.npz")).vae is not None


def test_labels_are_uniform_or_as_often_as_in_a_data_set(pixels):
    many = options(pixels, "nowhere", num_samples=6000)
    uniform = np.bincount(sampling.draw_labels(many, 3, None), minlength=3) / 6000
    np.testing.assert_allclose(uniform, 1 / 3, atol=0.03)
    source = types.SimpleNamespace(
        label_names=["a", "b", "c"], metadata=types.SimpleNamespace(labels=np.array([0, 2, 2, 2]))
    )
    skewed = np.bincount(sampling.draw_labels(many, 3, source), minlength=3) / 6000
    np.testing.assert_allclose(skewed, [0.25, 0, 0.75], atol=0.03)
    with pytest.raises(ValueError, match="has 3 classes and the model 4"):
        sampling.draw_labels(many, 4, source)
    # A larger set begins like a smaller one.
    few = sampling.draw_labels(dataclasses.replace(many, num_samples=9), 3, None)
    np.testing.assert_array_equal(few, sampling.draw_labels(many, 3, None)[:9])


class Means:
    """A feature network of the mean colour."""

    name, dim, params = "Means", 3, {"none": np.zeros(1, np.float32)}
    metrics = {"frechet": "FD", "score": "S", "precision": "P", "recall": "R"}  # noqa: RUF012

    def preprocess(self, images):
        return images.astype(np.float32)

    def apply(self, params, inputs):
        means = inputs.mean(axis=(1, 2))
        return Features(means, None, means / 255)


@pytest.mark.slow
def test_a_sweep_is_a_set_and_its_scores_for_each_pair(pixels, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fid.NetworkOptions, "network", lambda self: Means())
    np.savez(tmp_path / "real.npz", np.random.default_rng(0).integers(0, 256, (40, 4, 4, 3)).astype(np.uint8))
    sweep = sampling.SweepOptions(
        checkpoint=pixels, output=str(tmp_path / "sweep"), reference=str(tmp_path / "real.npz"), weights="x",
        num_samples=8, batch_size=4, num_steps=(2, 4), guidance_scales=(1.0, 3.0), json=tmp_path / "sweep.json",
    )  # fmt: skip
    sampling.sweep(sweep)
    results = json.loads((tmp_path / "sweep.json").read_text())["results"]
    assert [(r["num_steps"], r["guidance_scale"]) for r in results] == [(2, 1.0), (2, 3.0), (4, 1.0), (4, 3.0)]
    fid.fid(
        fid.FidOptions(
            samples=results[3]["samples"], reference=str(tmp_path / "real.npz"), weights="x", json=tmp_path / "one.json"
        )
    )
    one = json.loads((tmp_path / "one.json").read_text())
    assert one["scores"] == pytest.approx(results[3]["scores"]) and one["manifest"] == results[3]["manifest"]
    assert len({r["scores"]["FD"] for r in results}) == 4
    assert "steps_4_guidance_3" in results[3]["samples"] and "8 samples, Means" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(num_samples=0), "num_samples must be at least 1, got 0"),
        (dict(batch_size=0), "batch_size must be at least 1, got 0"),
        (dict(guided_channels=-1), r"guided_channels must be 0 \(all\) or more, got -1"),
        (dict(size=(4, 5)), r"positive multiples of 2 pixels, got \(4, 5\)"),
        (dict(num_steps=21), "between 1 and the process's 20 steps, got 21"),
        (dict(guidance_scale=float("nan")), "guidance_scale must be finite"),
        (dict(vae="anything"), "makes pixels"),
    ],
)
def test_bad_options_are_named(pixels, tmp_path, changes, message):
    assert PIXELS.process.num_levels == 20
    with pytest.raises(ValueError, match=message):
        sampling.sample(options(pixels, tmp_path / "set", **changes))
    assert not list(tmp_path.glob("set/shard*"))


def test_a_sweep_of_nothing_or_twice_the_same(pixels):
    common = dict(checkpoint=pixels, output="o", reference="r", weights="x")
    for changes, message in (
        (dict(num_steps=()), r"num_steps must be one or more different numbers, got \(\)"),
        (dict(guidance_scales=(1.0, 1.0)), r"guidance_scales must be one or more different numbers, got \(1.0, 1.0\)"),
        (dict(multihost=True), "a sweep runs on one host"),
        (dict(weights=None), "name either --inception"),
    ):
        with pytest.raises(ValueError, match=message):
            sampling.SweepOptions(**common | changes)
