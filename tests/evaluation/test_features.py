"""Features as a stream over devices, scores by their names, and files of images."""

import dataclasses
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from helpers.compilation import on_devices
from PIL import Image

from sora_jax.evaluation.features import (
    SPATIAL,
    EfficientNetNetwork,
    Features,
    FeatureSet,
    InceptionNetwork,
    collect_features,
    extract_features,
    scores,
)
from sora_jax.evaluation.frechet import FeatureStatistics, frechet_distance
from sora_jax.evaluation.image_files import ImageFiles, has_images
from sora_jax.evaluation.inception_score import inception_score


@dataclasses.dataclass(frozen=True)
class Colours:
    """A feature network of means: of each channel, of each corner's first pixel, and a random map of them."""

    name: str = "Colours"
    dim: int = 3

    @property
    def params(self):
        return {"kernel": np.random.default_rng(9).normal(size=(3, 5)).astype(np.float32)}

    @property
    def metrics(self):
        return {"frechet": "FD", "spatial": "sFD", "score": "S", "precision": "P", "recall": "R"}

    def preprocess(self, images):
        return images.astype(np.float32) / 255

    def apply(self, params, inputs):
        pool = inputs.mean(axis=(1, 2))
        return Features(pool, inputs[:, ::3, ::4, 0].reshape(len(inputs), -1), jnp.square(pool) @ params["kernel"] * 9)


def pictures(seed, count=50, size=(4, 5)):
    """Of a colour of their own each, and noise."""
    rng = np.random.default_rng(seed)
    colours = rng.integers(0, 150 + 50 * seed, (count, 1, 1, 3))
    return (colours + rng.integers(0, 50, (count, *size, 3))).clip(0, 255).astype(np.uint8)


def batches(images, size):
    return [images[start : start + size] for start in range(0, len(images), size)]


def test_the_stream_is_the_network_on_everything():
    network, images = Colours(), pictures(0)
    expected = network.apply(network.params, network.preprocess(images))
    for given, size in ((50, 7), (3, 16), (1, 64)):
        done = []
        parts = list(extract_features(network, batches(images, given), batch_size=size, progress=done.append))
        assert sum(done) == 50 and max(done) <= size
        for found, whole in zip(zip(*parts, strict=True), expected, strict=True):
            np.testing.assert_allclose(np.concatenate(found), whole, rtol=1e-5, atol=1e-5)  # of logits up to 9
    with pytest.raises(ValueError, match="one size, got 4 x 5 and 5 x 4 pixels"):
        list(extract_features(network, [images, images.transpose(0, 2, 1, 3)], batch_size=64))
    with pytest.raises(ValueError, match=r"must be \(N, H, W, 3\) uint8, got \(50, 4, 5, 3\) float32"):
        list(extract_features(network, [images.astype(np.float32)]))


def test_scores_are_those_of_the_features_and_have_the_networks_names():
    network, images, others = Colours(), pictures(0), pictures(1, count=40)
    pools = [x.astype(np.float64).mean(axis=(1, 2)) / 255 for x in (images, others)]
    sets = [collect_features(extract_features(network, batches(x, 9), batch_size=8)) for x in (images, others)]
    found = scores(network, sets[0], sets[1])
    assert list(found) == ["FD", "sFD", "S", "P", "R"]
    expected = frechet_distance(*(FeatureStatistics.of(pool).moments() for pool in pools))
    assert found["FD"] == pytest.approx(expected, rel=1e-4)  # float32 features
    corners = [x[:, [0, 0, 3, 3], [0, 4, 0, 4], 0] / 255 for x in (images, others)]
    expected = frechet_distance(*(FeatureStatistics.of(x).moments() for x in corners))
    assert found["sFD"] == pytest.approx(expected, rel=1e-4)
    assert found["S"] == pytest.approx(inception_score(pools[0] ** 2 @ network.params["kernel"] * 9), rel=1e-4)
    assert 0 < found["P"] <= 1 and 0 < found["R"] <= 1
    some = collect_features(
        extract_features(network, batches(others, 9), batch_size=8), keep=np.array([0, 7, 8, 39]), keep_logits=False
    )
    np.testing.assert_allclose(some.pool, pools[1][[0, 7, 8, 39]], rtol=1e-5)
    assert some.logits is None and some.moments.keys() == {"", SPATIAL}
    bare = FeatureSet({"": sets[1].moments[""]})
    assert list(scores(network, sets[0], bare)) == ["FD", "S"]


def test_a_score_claims_no_more_than_its_network():
    inception, efficientnet = InceptionNetwork(None), EfficientNetNetwork(None)
    assert (inception.dim, efficientnet.dim) == (2048, 1280)
    assert inception.metrics["frechet"] == "FID" and InceptionNetwork(None, "pytorch").name != inception.name
    assert efficientnet.metrics["frechet"] == "FD-EffNetLite0"
    assert all(name.endswith("-EffNetLite0") for name in efficientnet.metrics.values())


ON_EIGHT_DEVICES = """
import sys
import jax, numpy as np
sys.path.insert(0, sys.argv[1])
from test_features import Colours, batches, pictures
from sora_jax.evaluation.features import collect_features, extract_features
assert jax.device_count() == 8
found = collect_features(extract_features(Colours(), batches(pictures(0), 11), batch_size=13))
np.savez(sys.argv[2], pool=found.pool, mean=found.moments[""].mean, covariance=found.moments[""].covariance)
"""


def test_eight_devices_change_nothing(tmp_path):
    folder = __file__.rsplit("/", 1)[0]
    command = [sys.executable, "-c", ON_EIGHT_DEVICES, folder, str(tmp_path / "eight.npz")]
    subprocess.run(command, env=on_devices(8), check=True)
    eight = np.load(tmp_path / "eight.npz")
    one = collect_features(extract_features(Colours(), [pictures(0)], batch_size=50))
    np.testing.assert_allclose(eight["pool"], one.pool, rtol=1e-6)
    np.testing.assert_allclose(eight["mean"], one.moments[""].mean, rtol=1e-6)
    scale = np.abs(one.moments[""].covariance).max()
    np.testing.assert_allclose(eight["covariance"], one.moments[""].covariance, rtol=0, atol=1e-6 * scale)


def test_files_of_images(tmp_path):
    images = pictures(2, count=7)
    np.savez(tmp_path / "plain.npz", images, np.arange(7))  # arr_1 are the labels, as guided-diffusion writes them
    np.savez_compressed(tmp_path / "small.npz", arr_0=images)
    (tmp_path / "folder").mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / "folder" / f"{i:03}.png")
    (tmp_path / "folder" / "notes.txt").write_text("no picture")
    for name in ("plain.npz", "small.npz", "folder"):
        files = ImageFiles(tmp_path / name)
        assert (files.count, files.height, files.width) == (7, 4, 5) and has_images(tmp_path / name)
        for size in (3, 7, 9):
            found = list(files.batches(size))
            assert max(map(len, found)) <= size
            np.testing.assert_array_equal(np.concatenate(found), images)


def test_what_holds_no_images_is_named(tmp_path):
    np.savez(tmp_path / "stats.npz", mu=np.zeros(2))
    assert not has_images(tmp_path / "stats.npz")
    np.savez(tmp_path / "floats.npz", np.zeros((2, 4, 5, 3)))
    (tmp_path / "text.npz").write_bytes(b"text")
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("stats.npz", r"stats\.npz is no \.npz file with an array arr_0"),
        ("text.npz", r"text\.npz is no \.npz file"),
        ("floats.npz", r"floats\.npz: arr_0 must be .* uint8 in C order, got \(2, 4, 5, 3\) float64"),
        ("empty", r"empty holds no pictures"),
    ):
        with pytest.raises(ValueError, match=message):
            ImageFiles(tmp_path / name)
    with pytest.raises(FileNotFoundError, match=r"no samples at .*none"):
        ImageFiles(tmp_path / "none")
    for i, size in enumerate(((4, 5), (6, 5))):
        Image.new("RGB", size[::-1]).save(tmp_path / "empty" / f"{i}.png")
    with pytest.raises(ValueError, match=r"1\.png has 6 x 5 pixels, 0\.png has 4 x 5"):
        list(ImageFiles(tmp_path / "empty").batches(9))
