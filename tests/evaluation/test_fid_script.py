"""evaluate.py fid and reference, with a feature network of colours in the place of the real ones."""

import io
import json

import numpy as np
import pytest
from PIL import Image
from test_features import Colours, pictures
from test_manifest import SAMPLES

from sora_jax.commands.evaluations import fid as script
from sora_jax.data.records import ClipMetadata
from sora_jax.evaluation.manifest import manifest_path, write_manifest
from sora_jax.provenance import file_hash, params_hash


class Pictures:
    """A data set of pictures and one clip of two frames."""

    path = "data"

    def __init__(self, images):
        self.images = images
        count = len(images) + 1
        self.metadata = ClipMetadata(
            clip_ids=np.arange(count),
            num_frames=np.array([1] * (count - 1) + [2], np.int32),
            height=np.array([len(image) for image in images] + [4], np.int32),
            width=np.array([image.shape[1] for image in images] + [4], np.int32),
            fps=np.full(count, 24, np.float32),
            labels=np.full(count, -1, np.int32),
            captions=[""] * count,
            names=[f"{i}.png" for i in range(count)],
        )

    def read_frames(self, index, frame_indices):
        buffer = io.BytesIO()
        Image.fromarray(self.images[index]).save(buffer, "png")
        return [buffer.getvalue() for _ in frame_indices]


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(script.NetworkOptions, "network", lambda self: Colours())


@pytest.fixture
def run(small, tmp_path):
    def run(samples, reference):
        options = script.FidOptions(
            weights="x", samples=str(samples), reference=str(reference), batch_size=16, json=tmp_path / "scores.json"
        )
        script.fid(options)
        return json.loads((tmp_path / "scores.json").read_text())

    return run


def test_from_a_data_set_to_scores(run, tmp_path, monkeypatch, capsys):
    """Statistics of a data set, then samples against them; then against the same pictures in other guises."""
    real, drawn = pictures(0), pictures(1)
    monkeypatch.setattr(script, "open_source", lambda path, split: Pictures(list(real)))
    script.write_reference(
        script.ReferenceOptions(
            weights="x", data=script.DataOptions("data"), output=str(tmp_path / "stats.npz"), num_pool=50
        )
    )
    assert "num_images: 50" in capsys.readouterr().out
    np.savez(tmp_path / "samples.npz", drawn)
    write_manifest(manifest_path(tmp_path / "samples.npz"), SAMPLES)
    found = run(tmp_path / "samples.npz", tmp_path / "stats.npz")
    assert list(found["scores"]) == ["FD", "sFD", "S", "P", "R"] and found["scores"]["FD"] > 1e-3
    manifest = found["manifest"]
    assert manifest["reference_hash"] == file_hash(tmp_path / "stats.npz") and manifest["num_samples"] == 50
    assert manifest["features"] == "Colours" and manifest["features_hash"] == params_hash(Colours().params)
    assert manifest["samples"]["sampler"] == "ddpm" and manifest["environment"]["numpy"] == np.__version__
    assert "50 samples of 4 x 5" in capsys.readouterr().out

    np.savez(tmp_path / "real.npz", real)
    (tmp_path / "real").mkdir()
    for i, image in enumerate(real):
        Image.fromarray(image).save(tmp_path / "real" / f"{i:02}.png")
    for guise in ("real.npz", "real"):
        again = run(tmp_path / "samples.npz", tmp_path / guise)
        assert again["scores"] == pytest.approx(found["scores"], rel=1e-5)
        assert run(tmp_path / guise, tmp_path / "stats.npz")["scores"]["FD"] == pytest.approx(0, abs=1e-9)


def test_statistics_beside_images_are_taken_as_they_are(run, tmp_path):
    """As in guided-diffusion's reference files: moments of the whole data set, images of a part of it."""
    np.savez(tmp_path / "samples.npz", pictures(1))
    mean, covariance = np.full(3, 0.25), np.eye(3) / 9
    np.savez(tmp_path / "reference.npz", arr_0=pictures(0), mu=mean, sigma=covariance)
    np.savez(tmp_path / "bare.npz", mu=mean, sigma=covariance)
    np.savez(tmp_path / "images.npz", arr_0=pictures(0))
    both, bare, images = (
        run(tmp_path / "samples.npz", tmp_path / f"{name}.npz")["scores"] for name in ("reference", "bare", "images")
    )
    assert list(both) == ["FD", "S", "P", "R"] and list(bare) == ["FD", "S"]
    assert both["FD"] == bare["FD"] != images["FD"]
    assert (both["P"], both["R"]) == (images["P"], images["R"])


def test_pictures_of_several_sizes_need_one(small, monkeypatch, tmp_path):
    images = [pictures(0, 1, size)[0] for size in ((8, 8), (8, 12), (30, 20))]
    source = Pictures(images)
    monkeypatch.setattr(script, "open_source", lambda path, split: source)
    settings = dict(weights="x", data=script.DataOptions("data"), output=str(tmp_path / "stats.npz"))
    with pytest.raises(ValueError, match=r"'1\.png' has 8 x 12 pixels and the first picture 8 x 8; with --image-size"):
        script.write_reference(script.ReferenceOptions(**settings))
    assert not (tmp_path / "stats.npz").exists()
    found = list(script.read_stills(source, np.arange(3), 8))
    assert [image.shape for image in found] == [(1, 8, 8, 3)] * 3
    np.testing.assert_array_equal(found[0][0], images[0])
    np.testing.assert_array_equal(found[1][0], images[1][:, 2:10])
    middle = np.asarray(Image.fromarray(images[2]).resize((10, 15), Image.Resampling.BOX).resize((8, 12), 3))[2:10]
    np.testing.assert_array_equal(found[2][0], middle)
    whole = list(script.read_stills(source, np.arange(3), 8, "stretch"))
    np.testing.assert_array_equal(whole[0][0], images[0])
    squeezed = Image.fromarray(images[1]).resize((8, 8), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(whole[1][0], np.asarray(squeezed))
    with pytest.raises(ValueError, match="--fit stretch needs --image-size"):
        script.ReferenceOptions(**settings, fit="stretch")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(), "name either --inception"),
        (dict(inception="a", weights="b"), "name either --inception"),
        (dict(weights="b", resize="pytorch"), "--resize pytorch is of Inception"),
        (dict(weights="b", batch_size=0), "batch_size must be at least 1, got 0"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        script.FidOptions(samples="s", reference="r", **options)
