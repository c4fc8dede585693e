"""`train.py` on a likelihood, from the command line to the figures and pictures."""

import functools
import io
import json
import math

import numpy as np
import pytest
import rich.console
from PIL import Image

from sora_jax.commands import train
from sora_jax.data.dead_leaves import DeadLeavesConfig
from sora_jax.data.toy import HeartbeatConfig, SwissRollConfig
from sora_jax.evaluation.density import MCGSMConfig, fit_gaussian
from sora_jax.families.diffusion import BinomialConfig, DiffusionConfig, GaussianConfig
from sora_jax.models.mlp import MLPConfig
from sora_jax.runs.diffusion import HELD_OUT_SEED
from sora_jax.runs.study import mean_over_seeds, report_table

pytestmark = pytest.mark.slow

ROLL = """
from sora_jax.config import OptimizerConfig
from sora_jax.data.toy import SwissRollConfig
from sora_jax.models.mlp import MLPConfig
from sora_jax.families.diffusion import DiffusionConfig, GaussianConfig

def config():
    return DiffusionConfig(
        data=SwissRollConfig(batch_size=16, noise=0.2),
        model=MLPConfig(2, 2, width=8, depth=1, num_steps=8),
        process=GaussianConfig(num_levels=8, schedule="log_snr", log_snr_range=(-6.0, 5.0), loss="bound"),
        num_steps=3, log_every=3, eval_every=0, sample_every=0, num_held_out=20, num_samples=6, num_seeds=2,
        beside=({beside}),
    )
"""
BEATS = """
from sora_jax.data.toy import HeartbeatConfig
from sora_jax.models.mlp import MLPConfig
from sora_jax.families.diffusion import BinomialConfig, DiffusionConfig

def config():
    return DiffusionConfig(
        data=HeartbeatConfig(batch_size=16),
        model=MLPConfig(20, 20, width=8, depth=1, num_steps=8),
        process=BinomialConfig(num_levels=8),
        num_steps=3, log_every=3, eval_every=0, sample_every=0, num_held_out=10, num_samples=6,
    )
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Two seeds of a roll with another network beside it, run and reported; the other's own data and seeds differ."""
    folder = tmp_path_factory.mktemp("report")
    other = ROLL.replace("{beside}", "").replace("noise=0.2", "noise=0.9").replace("num_seeds=2", "num_seeds=1")
    (folder / "other.py").write_text(other.replace("width=8", "width=4"))
    (folder / "roll.py").write_text(ROLL.replace("{beside}", f"{str(folder / 'other.py')!r},"))
    command = [str(folder / "roll.py"), "--workdir", str(folder / "run"), "--json", str(folder / "figures.json")]
    assert train.main(command) == 0
    return folder, command


def test_figures_of_all_seeds(finished):
    folder, _ = finished
    figures = json.loads((folder / "figures.json").read_text())
    seeds = [json.loads((folder / f"run/roll_seed_{n}/report.json").read_text()) for n in (0, 1)]
    assert figures["k_by_seed"] == [seed["k_bits"] for seed in seeds]
    assert figures["k_bits"] == pytest.approx(np.mean(figures["k_by_seed"]))
    assert seeds[0]["k_bits"] != seeds[1]["k_bits"]
    assert figures["gap_bits"] == pytest.approx(figures["true_bits"] - figures["k_bits"])
    assert figures["gain_bits"] == pytest.approx(figures["k_bits"] - figures["null_bits"])
    assert figures["k_bits"] < figures["true_bits"]
    (other,) = figures["beside"].values()
    for shared in ("noise", "true_bits", "null_bits", "num_seeds"):
        assert other[shared] == figures[shared]
    assert other["k_bits"] != figures["k_bits"]


def test_the_heartbeat_and_what_is_known_of_it(tmp_path):
    (tmp_path / "beats.py").write_text(BEATS)
    command = [str(tmp_path / "beats.py"), "--workdir", str(tmp_path / "run"), "--json", str(tmp_path / "f.json")]
    assert train.main(command) == 0
    figures = json.loads((tmp_path / "f.json").read_text())
    assert figures["null_bits"] == -20
    assert figures["true_bits"] == pytest.approx(math.log2(1 / 5))
    assert figures["k_bits"] < figures["true_bits"]
    assert (tmp_path / "run/beats_seed_0/trajectories.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("beside", "message"),
    [
        ("roll.py", "beside must name other experiments than those already run"),
        ("beats.py", "beside must name experiments on the same kind of data, SwissRollConfig, got"),
        ("nothing.py", "no config"),
    ],
)
def test_what_cannot_stand_beside_an_experiment(tmp_path, capsys, beside, message):
    (tmp_path / "beats.py").write_text(BEATS)
    (tmp_path / "roll.py").write_text(ROLL.replace("{beside}", f"{str(tmp_path / beside)!r},"))
    assert train.main([str(tmp_path / "roll.py"), "--workdir", str(tmp_path / "run")]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_pictures(finished):
    folder, _ = finished
    for name in ("roll_seed_0/trajectories.png", "roll_seed_1/bound.png", "other_seed_1/trajectories.png"):
        with Image.open(io.BytesIO((folder / "run" / name).read_bytes())) as image:
            assert min(image.size) > 200


def test_a_finished_run_is_reported_again_and_says_the_same(finished, capsys):
    folder, command = finished
    before = (folder / "figures.json").read_text()
    assert train.main(command) == 0
    assert (folder / "figures.json").read_text() == before
    shown = capsys.readouterr().out
    assert shown.count("already finished") == 4
    assert "k_bits" in shown and "gap_bits" in shown


IMAGES = """
from sora_jax.data.dead_leaves import DeadLeavesConfig
from sora_jax.data.images import StillsConfig
from sora_jax.models.multiscale import MultiscaleConfig
from sora_jax.families.diffusion import DiffusionConfig, GaussianConfig

def config():
    return DiffusionConfig(
        data={data},
        model=MultiscaleConfig(1, 2, width=4, num_layers=1, num_scales=1, num_bumps=4, num_steps=8),
        process=GaussianConfig(num_levels=8, schedule="cosine", variance="learned", loss="hybrid", discrete={discrete}),
        num_steps=2, log_every=2, eval_every=0, sample_every={sample_every}, num_held_out=5, num_samples=4,
    )
"""


def test_dead_leaves_stand_beside_their_baselines(tmp_path, monkeypatch):
    monkeypatch.setattr("sora_jax.runs.diffusion.MCGSMConfig", functools.partial(MCGSMConfig, num_steps=3, radius=1))
    data = "DeadLeavesConfig(batch_size=4, size=4, num_images=50)"
    text = IMAGES.format(data=data, discrete=False, sample_every=0)
    (tmp_path / "leaves.py").write_text(text)
    command = [str(tmp_path / "leaves.py"), "--workdir", str(tmp_path / "run"), "--json", str(tmp_path / "f.json")]
    assert train.main(command) == 0
    figures = json.loads((tmp_path / "f.json").read_text())
    held_out = DeadLeavesConfig(size=4, num_images=50).images("held_out", 5)
    null = -0.5 * (np.log2(2 * np.pi) + np.square(held_out).mean() / np.log(2))
    assert figures["null_bits"] == pytest.approx(null, rel=1e-5)
    gaussian = fit_gaussian(DeadLeavesConfig(size=4, num_images=50).images("train"))
    assert figures["gaussian_bits"] == pytest.approx(gaussian.log_density(held_out).mean() / 16)
    assert math.isfinite(figures["mcgsm_bits"]) and figures["pixel_noise"] == 0.05
    with Image.open(tmp_path / "run/leaves_seed_0/inpainting.png") as image:
        rows = np.asarray(image)[:, :, 0]
    side = 64 + 2  # of an image in the picture, with its gap
    original, masked, filled = (rows[2 + n * side : 66 + n * side, 2:66] for n in range(3))
    assert (masked[16:48, 16:48] == 255).all()
    np.testing.assert_array_equal(filled[:16], original[:16])
    assert (filled[16:48, 16:48] != original[16:48, 16:48]).any()


def test_digits_have_bits_per_dimension_and_a_rate(tmp_path, monkeypatch):
    pixels = np.random.default_rng(0).integers(256, size=(9, 4, 4, 1)).astype(np.uint8)
    monkeypatch.setattr("sora_jax.data.images.load_images", lambda *_: (pixels, []))
    monkeypatch.setattr("sora_jax.runs.diffusion.data_fingerprints", lambda *_: {"train": "a1"})
    text = IMAGES.format(data="StillsConfig(batch_size=4, size=4, path='data')", discrete=True, sample_every=2)
    (tmp_path / "digits.py").write_text(text)
    command = [str(tmp_path / "digits.py"), "--workdir", str(tmp_path / "run"), "--json", str(tmp_path / "f.json")]
    assert train.main(command) == 0
    figures = json.loads((tmp_path / "f.json").read_text())
    assert figures["bits_per_dim"] == -figures["k_bits"] > 0
    assert len(figures["rate"]) == len(figures["distortion"]) == 8
    assert (np.diff(figures["rate"]) >= 0).all() and figures["rate"][-1] <= figures["bits_per_dim"]
    for name in ("samples.png", "trajectories.png", "rate_distortion.png", "bound.png", "samples/00000002.png"):
        assert (tmp_path / "run/digits_seed_0" / name).stat().st_size > 100


def test_all_sequences_count_the_same():
    config = DiffusionConfig(
        data=HeartbeatConfig(), model=MLPConfig(20, 20), process=BinomialConfig(num_levels=1000), num_held_out=10
    )
    rows, counts = np.unique(config.data.held_out(config.num_held_out, HELD_OUT_SEED), axis=0, return_counts=True)
    assert len(rows) == 5 and set(counts) == {2}
    config = DiffusionConfig(
        data=HeartbeatConfig(), model=MLPConfig(20, 20), process=BinomialConfig(num_levels=1000), num_held_out=7
    )
    with pytest.raises(ValueError, match="num_held_out must be a multiple of the 5 sequences, got 7"):
        config.data.held_out(config.num_held_out, HELD_OUT_SEED)


def test_held_out_points_are_the_same_for_every_seed_and_not_those_trained_on():
    one, two = (
        DiffusionConfig(data=SwissRollConfig(), process=GaussianConfig(loss="bound"), seed=seed, num_held_out=9)
        for seed in (0, 1)
    )
    np.testing.assert_array_equal(
        one.data.held_out(one.num_held_out, HELD_OUT_SEED), two.data.held_out(two.num_held_out, HELD_OUT_SEED)
    )


def test_means_over_seeds_and_their_table():
    reports = [{"unit": "value", "k_bits": k, "k_stderr": 0.1, "rate": [k, 0.0]} for k in (1.0, 2.0)]
    mean = mean_over_seeds(reports, "k_bits", "k")
    assert mean == {
        "unit": "value", "k_bits": 1.5, "k_stderr": 0.1, "rate": [1.5, 0.0], "num_seeds": 2, "k_by_seed": [1.0, 2.0],
        "k_seed_std": pytest.approx(math.sqrt(0.5)),
    }  # fmt: skip
    console = rich.console.Console(file=io.StringIO(), width=100)
    console.print(report_table({"one": mean, "other": {"unit": "example", "k_bits": -2.0, "num_seeds": 1}}, "bits"))
    text = console.file.getvalue()
    assert "1.5000" in text and "-2.0000" in text and "rate" not in text
