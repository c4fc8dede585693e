"""Exact resume of a run on real clips: in the middle of packing, with two data workers, however it was stopped."""

import dataclasses
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tiny_run
from helpers.runs import train

from sora_jax.config import PatchConfig
from sora_jax.data.builders import clip_dataset, folder
from sora_jax.data.builders.parts import Encoding
from sora_jax.data.captioned import DataConfig
from sora_jax.data.captions import CaptionTable
from sora_jax.data.identity import data_fingerprints
from sora_jax.data.pipeline import make_pipeline
from sora_jax.data.sources import open_source
from sora_jax.training.checkpoint import FOLDER, latest_step
from sora_jax.training.loop import Outcome
from sora_jax.training.run_directory import DataChangedError

ROOT = pathlib.Path(__file__).parents[2]
FILES = ("1f30c.webp", "1f375.webp", "1f4a7.webp", "1f528.webp", "1f995.webp", "1f9e0.webp")
NUM_STEPS = 6


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A small data set, and a config that trains on it."""
    root = tmp_path_factory.mktemp("resume")
    (root / "clips").mkdir()
    for file in FILES:
        shutil.copy(ROOT / "tests" / "fixtures" / "fluent_emoji" / file, root / "clips" / file)
    lines = [json.dumps({"file": file, "caption": file, "split": "train"}) for file in FILES]
    (root / "clips" / "captions.jsonl").write_text("\n".join(lines))
    tasks, _ = folder.make_tasks(str(root / "clips"))
    report = clip_dataset.prepare(
        folder.ClipFolder, tasks, folder.Converter(256), Encoding(64, 92), str(root / "data"), 0, [], {}
    )
    return tiny_run.config(
        patch=dataclasses.asdict(PatchConfig(size=(2, 8, 8))),
        data=dataclasses.asdict(
            DataConfig(
                path=report["path"], eval_splits=(), num_frames=(1, 8), long_side=(16, 32), row_length=64,
                text_length=16, max_segments=6, max_caption_tokens=2, num_bins=8, batch_size=2, num_shards=2,
                num_workers=2, prefetch=3,
            )
        ),
        num_steps=NUM_STEPS,
        save_every=2,
        keep=5,
    )  # fmt: skip


class Interrupted:
    """Gives batches, and a SIGTERM with one of them."""

    def __init__(self, batches, number):
        self.batches, self.left = batches, number

    def __next__(self):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return next(self.batches)

    def __getattr__(self, name):
        return getattr(self.batches, name)


def opener(config, stop_at=0):
    """Returns the `open_batches` of `train` on real clips, captions encoded as their letters."""
    captions = open_source(config.data.path, "train").metadata.captions
    encode = lambda texts: [np.full((2, config.model.text_dim), len(t) + sum(map(ord, t)) % 7) for t in texts]  # noqa: E731
    table = CaptionTable.build(captions, encode)
    return lambda split, training: Interrupted(
        make_pipeline(config.data, config.patch, table, split, training=training), stop_at
    )


def test_stopped_in_the_middle_of_packing(clips, tmp_path):
    config = clips
    assert train(config, tmp_path / "straight", opener(config)) is Outcome.FINISHED
    assert train(config, tmp_path / "stopped", opener(config, stop_at=3)) is Outcome.PREEMPTED
    assert latest_step(tmp_path / "stopped") == 3
    _, places = tiny_run.whole_state(tmp_path / "stopped", config)
    assert train(config, tmp_path / "stopped", opener(config)) is Outcome.FINISHED
    tiny_run.assert_same_runs(tmp_path / "straight", tmp_path / "stopped", config)

    # The place that was saved is the one where the fourth batch of a fresh pipeline comes next.
    fresh, restored = opener(config)("train", True), opener(config)("train", True)
    restored.set_state(places)
    batches = [next(fresh) for _ in range(4)]
    for a, b in zip(batches[3], next(restored), strict=True):
        np.testing.assert_array_equal(a, b)
    assert any((a != b).any() for a, b in zip(batches[2], batches[3], strict=True))
    fresh.close()
    restored.close()


CONFIG_FILE = """
from sora_jax.families.sora import SoraConfig
from sora_jax.config_json import from_json

def config():
    return from_json(SoraConfig, {text!r})
"""


@pytest.mark.slow
def test_killed_while_a_save_is_under_way(clips, tmp_path):
    """`kill -9` of the script, each time a checkpoint's temporary folder is there, until the run is through."""
    from sora_jax.config_json import to_json

    config = dataclasses.replace(
        clips, save_every=1, num_steps=12, model=dataclasses.replace(clips.model, text_dim=384),
        data=dataclasses.replace(clips.data, max_caption_tokens=8, text_length=48),
    )  # fmt: skip
    (tmp_path / "experiment.py").write_text(CONFIG_FILE.format(text=to_json(config)))

    def start(workdir):
        script = ROOT / "experiments" / "train.py"
        return subprocess.Popen(
            [sys.executable, script, tmp_path / "experiment.py", "--workdir", workdir],
            env={**os.environ, "JAX_PLATFORMS": "cpu"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    straight = start(tmp_path / "straight")
    output, _ = straight.communicate()
    assert straight.returncode == 0, output

    killed = 0
    for attempt in range(4):
        process = start(tmp_path / "killed")
        while process.poll() is None:
            step = latest_step(tmp_path / "killed") or 0
            if attempt < 3 and step >= 3 * attempt + 2 and list((tmp_path / "killed" / FOLDER).glob("*tmp*")):
                process.kill()
                killed += 1
                break
            time.sleep(0.001)
        output, _ = process.communicate()
        if killed == attempt + 1:
            assert not (tmp_path / "killed" / "DONE").exists()
        elif process.returncode == 0:
            break
    assert killed >= 1, "no save was caught under way"
    assert process.returncode == 0, output
    tiny_run.assert_same_runs(tmp_path / "straight", tmp_path / "killed", config)
    again = start(tmp_path / "killed")
    output, _ = again.communicate()
    assert again.returncode == 0 and "already finished" in output


def test_goes_on_bitwise_on_data_that_has_moved_and_refuses_other_data(clips, tmp_path, capsys):
    """The same data elsewhere is the same run; other data at the run's own path is not."""
    config = dataclasses.replace(clips, data=dataclasses.replace(clips.data, num_workers=0))
    here, there = tmp_path / "here", tmp_path / "there"
    shutil.copytree(config.data.path, here)

    def at(path, **changes):
        return dataclasses.replace(config, data=dataclasses.replace(config.data, path=str(path)), **changes)

    def run(config, workdir, stop_at=0):
        found = lambda: data_fingerprints(config.data, ("train",))  # noqa: E731
        return train(config, workdir, opener(config, stop_at), data_fingerprints=found)

    assert run(at(here), tmp_path / "straight") is Outcome.FINISHED
    assert run(at(here), tmp_path / "moved", stop_at=3) is Outcome.PREEMPTED
    here.rename(there)
    assert run(at(there), tmp_path / "moved") is Outcome.FINISHED
    tiny_run.assert_same_runs(tmp_path / "straight", tmp_path / "moved", config)
    said = capsys.readouterr().err
    assert f"the data has moved from {here} to {there}: the same by its fingerprints (train " in said
    assert json.loads((tmp_path / "moved" / "config.json").read_text())["data"]["path"] == str(there)

    shutil.copytree(there, here)
    index = json.loads((here / "index-train.json").read_text())
    (here / "index-train.json").write_text(json.dumps(index | {"names": index["names"][::-1]}))
    old, new = (data_fingerprints(at(path).data, ("train",))["train"] for path in (there, here))
    message = (
        rf"data\.path .*here' holds other data .* 'train' has the fingerprint {new}, the run's has {old}\. .*--workdir"
    )
    with pytest.raises(DataChangedError, match=message):
        run(at(here, num_steps=8), tmp_path / "straight")
