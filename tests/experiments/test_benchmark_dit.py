"""benchmark.py dit: what is compared agrees, all of it is timed, and bad options are named."""

import json

import numpy as np
import pytest
from benchmarks import dit

CONFIG = """
from sora_jax.config import PatchConfig
from sora_jax.data.latents import LatentDataConfig
from sora_jax.models.dit import DiTConfig
from sora_jax.families.dit import ClassConditionalConfig, ClassSampleConfig

def config():
    return ClassConditionalConfig(
        data=LatentDataConfig(batch_size=2, row_length=16),
        patch=PatchConfig(size=(1, 2, 2), channels=4),
        model=DiTConfig(image_size=(8, 8), width=32, depth=2, num_heads=2, mlp_dim=128, num_classes=5),
        sample=ClassSampleConfig(labels=(0,), size=(8, 8)),
    )
"""


@pytest.mark.parity
def test_all_three_are_checked_and_timed(tmp_path):
    pytest.importorskip("diffusers", reason="needs .[parity]")
    (tmp_path / "tiny.py").write_text(CONFIG)
    options = dit.DiTOptions(config=str(tmp_path / "tiny.py"), batch_size=2, num_steps=3, repeats=2)
    figures = json.loads(json.dumps(dit.run(options)))
    rows = {row["what"]: row for row in figures["rows"]}
    assert list(rows) == ["forward", "train", "sample"]
    for row in rows.values():
        assert 0 < row["jax_spread"][0] <= row["jax_seconds"] <= row["jax_spread"][1]
        assert row["ratio"] == pytest.approx(row["jax_seconds"] / row["torch_seconds"])


def test_results_that_differ_are_an_error():
    options, right = dit.DiTOptions(), np.ones(4)
    dit.check_agreement("forward", right * (1 + 5e-5), right, options)
    for wrong in (right * (1 + 2e-4), right * np.nan):
        with pytest.raises(ValueError, match="forward: ours differs from PyTorch's by"):
            dit.check_agreement("forward", wrong, right, options)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(batch_size=0), "batch_size must be at least 1, got 0"),
        (dict(repeats=0), "repeats must be at least 1, got 0"),
        (dict(num_steps=1001), "num_steps must be at most the process's 1000, got 1001"),
        (dict(threads=10_000), "threads must be between 1 and the .* cores of this process, got 10000"),
    ],
)
def test_bad_options_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        dit.DiTOptions(**changes)


def test_a_size_that_is_not_there_is_named():
    with pytest.raises(ValueError, match="no DiT 'dit_z_2': give one of dit_s_2"):
        dit.model_config(dit.DiTOptions(config="dit_z_2"))
